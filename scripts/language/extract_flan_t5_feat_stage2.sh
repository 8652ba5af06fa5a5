#!/usr/bin/env bash
# Features of the long captions of the second stage.
#   --data-path STORE_OR_PICTURES --t5-path FEATURES
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" language/extract_t5_feature.py --caption-key llava -- "$@"
