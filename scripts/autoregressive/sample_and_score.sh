#!/usr/bin/env bash
# Sample a set of images and score it: a row of the paper's table with --recipe.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" autoregressive/sample/sample_and_score.py "$@"
