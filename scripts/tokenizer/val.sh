#!/usr/bin/env bash
# Write the centre crops of a data set as they are: the reference set that reconstructions are compared with (rFID).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" tokenizer/reconstruct.py --reconstructor identity "$@"
