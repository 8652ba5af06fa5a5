#!/usr/bin/env bash
# Run the linter and the test suite: bash scripts/test.sh [pytest arguments]. Makes .venv and installs on first use.
# TORCH=2.8 bash scripts/test.sh runs it with that version of torch, in .venv-torch-2.8.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
cd "$root"
"$python" -m ruff check .
exec "$python" -m pytest "$@"
