#!/usr/bin/env bash
# Reconstruct images and report PSNR, SSIM and codebook usage.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/reconstruct.py "$@"
