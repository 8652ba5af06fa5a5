#!/usr/bin/env bash
# Turn images with classes into a packed store of codes.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/extract_codes.py "$@"
