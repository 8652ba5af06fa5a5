#!/usr/bin/env bash
# Features of LAION-COCO's captions, for the first stage.
#   --data-path STORE_OR_PICTURES --t5-path FEATURES
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" language/extract_t5_feature.py --caption-key blip -- "$@"
