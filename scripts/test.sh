#!/usr/bin/env bash
# Run the linter and the quick tests: bash scripts/test.sh. All tests: bash scripts/test.sh --all [pytest arguments].
# Tests of your choice: bash scripts/test.sh tests/utils -k resume. Makes .venv and installs on first use.
# TORCH=2.8 bash scripts/test.sh … runs them with that version of torch, in .venv-torch-2.8.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" dev
cd "$root"
"$python" -m ruff check .
workers=(-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder)
case "${1:-}" in
    "") set -- "${workers[@]}" -m "not slow" ;;
    --all) shift; set -- "${workers[@]}" "$@" ;;
esac
exec "$python" -m pytest "$@"
