#!/usr/bin/env bash
# Reconstruct images with the Consistency Decoder and report PSNR and SSIM.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/reconstruct.py --reconstructor consistency "$@"
