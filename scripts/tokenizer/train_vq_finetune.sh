#!/usr/bin/env bash
# Fine-tune a tokenizer from --vq-ckpt: its weights, fresh counters, adversarial loss from the start.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/tokenizer_image/vq_train.py --finetune --disc-start 0 "$@"
