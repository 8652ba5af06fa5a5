#!/usr/bin/env bash
# Continue a fine-tuning run from --vq-ckpt, its training checkpoint.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/tokenizer_image/vq_train.py --disc-start 0 "$@"
