#!/usr/bin/env bash
# Sample a set of images: PNGs and the npz for scoring.
# The tokenizer is LlamaGen's released one, unless --vq-ckpt or a --recipe gives another (they win over what is before --).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/sample_ddp.py \
    --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt -- "$@"
