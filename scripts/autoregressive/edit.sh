#!/usr/bin/env bash
# Edit a picture: fill holes, redraw parts as another class, vary it, continue it beyond its edges. In one process.
# The tokenizer is LlamaGen's released one, unless --vq-ckpt gives another (it wins over what is before --).
set -euo pipefail
export nnodes=1 nproc_per_node=1
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/edit.py \
    --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt -- "$@"
