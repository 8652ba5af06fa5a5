#!/usr/bin/env bash
# Reconstruct images with a VQGAN of taming-transformers (--vqgan, --local-weights) and report PSNR and SSIM.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/reconstruct.py --reconstructor vqgan "$@"
