#!/usr/bin/env bash
# Turn images with classes into a packed store of codes.
# The tokenizer is LlamaGen's released one, unless --vq-ckpt or a --recipe gives another (they win over what is before --).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/extract_codes.py \
    --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt -- "$@"
