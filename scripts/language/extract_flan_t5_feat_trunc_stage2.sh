#!/usr/bin/env bash
# Features of the first sentences of the second stage's long captions, its short captions.
#   --data-path STORE_OR_PICTURES --t5-path FEATURES
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/../_torchrun.sh" language/extract_t5_feature.py --caption-key llava --trunc-caption -- "$@"
