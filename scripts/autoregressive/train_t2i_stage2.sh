#!/usr/bin/env bash
# Train it on at 512x512: the second stage, which begins with the weights of the first.
#   --init-from STAGE1 --data-path STORE --t5-feat-path FEATURES --short-t5-feat-path FIRST_SENTENCES
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/train_t2i.py \
    --gpt-model GPT-XL --image-size 512 -- "$@"
