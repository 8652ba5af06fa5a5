#!/usr/bin/env bash
# Train a class-conditional GPT on codes.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/train.py "$@"
