#!/usr/bin/env bash
# Train a text-conditional GPT at 256x256: the first stage of LlamaGen's text-to-image model (arXiv 2406.06525, 3.2).
#   --data-path STORE --t5-feat-path FEATURES     codes and features, extracted before
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/train_t2i.py \
    --gpt-model GPT-XL --image-size 256 -- "$@"
