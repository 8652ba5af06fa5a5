#!/usr/bin/env bash
# Launch an entry (path relative to the repository) on every local GPU, or as one process on a CPU.
# nnodes, nproc_per_node, node_rank, master_addr and master_port may be set in the environment, as for torchrun.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || python=python3
entry="$1"
shift
exec "$python" "$root/utils/launch.py" "$root/$entry" "$@"
