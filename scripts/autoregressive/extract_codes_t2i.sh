#!/usr/bin/env bash
# Turn captioned pictures into a packed store of codes with their captions.
# The tokenizer is LlamaGen's released one for text, unless --vq-ckpt or a --recipe gives another (they win over what is before --).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/extract_codes_t2i.py \
    --vq-ckpt ./pretrained_models/vq_ds16_t2i.pt -- "$@"
