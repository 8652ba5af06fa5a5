#!/usr/bin/env bash
# Sample a set of images: PNGs and the npz for scoring.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/sample_ddp.py "$@"
