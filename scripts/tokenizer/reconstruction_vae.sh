#!/usr/bin/env bash
# Reconstruct images with the SD or SDXL VAE (--vae) and report PSNR and SSIM.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/reconstruct.py --reconstructor vae "$@"
