#!/usr/bin/env bash
# Sample a set of images with an ARPG: PNGs and the npz for scoring.
# The settings are those of ARPG's guide for ARPG-L, the tokenizer LlamaGen's released one, unless others are typed or in
# a --recipe.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/sample_ddp.py \
    --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt --sample-schedule arccos --cfg-schedule linear --cfg-scale 5.0 \
    --label-mode balanced -- "$@"
