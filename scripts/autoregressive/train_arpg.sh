#!/usr/bin/env bash
# Train an ARPG on codes: ARPG-L with its paper's settings (arXiv 2503.10568), unless others are typed or in a --recipe.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/train.py \
    --gpt-model ARPG-L --epochs 400 --global-batch-size 1024 --lr 4e-4 --min-lr 1e-5 --lr-schedule cosine \
    --warmup-epochs 100 --weight-decay 0.05 --beta1 0.9 --beta2 0.95 --max-grad-norm 1.0 --dropout-p 0.1 \
    --token-dropout-p 0.1 --class-dropout 0.1 --mixed-precision bf16 -- "$@"
