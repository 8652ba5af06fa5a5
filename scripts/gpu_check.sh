#!/usr/bin/env bash
# Does everything work on this machine's GPU? bash scripts/gpu_check.sh: up to ten minutes, and a report in
# runs/gpu_check/report.md. Makes .venv and installs on first use; without a GPU it tries small models on the CPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh" "" # no extras
exec "$python" "$root/benchmarks/gpu_check.py" "$@"
