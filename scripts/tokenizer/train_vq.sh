#!/usr/bin/env bash
# Train an image tokenizer.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/tokenizer_image/vq_train.py "$@"
