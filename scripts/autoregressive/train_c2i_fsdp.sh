#!/usr/bin/env bash
# Train a large class-conditional GPT on codes, sharded over all processes (FSDP2).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/train/train.py --data-parallel fsdp "$@"
