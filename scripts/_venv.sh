# Sourced by quickstart.sh, test.sh and gpu_check.sh: make .venv and install the project into it, once per change of requirements.
# Sets root, venv and python. PYTHON chooses the interpreter (3.10 or newer); extras to install are passed as $1.
# TORCH=2.8 takes that version of torch, and the torchvision that belongs to it, in a folder of its own.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv${TORCH:+-torch-$TORCH}"
python="$venv/bin/python"
base="${PYTHON:-python3}"
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer is needed, $base is not: set PYTHON=/path/to/python3" >&2
    exit 2
fi
stamp="$venv/.installed-${1:-base}"
wanted="$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$python" -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear "$venv"
    echo "installing into $(basename "$venv") (the first time takes some minutes) …"
    "$python" -m pip install --quiet --editable "$root${1:+[$1]}" ${TORCH:+"torch==$TORCH.*" torchvision}
    echo "$wanted" > "$stamp"
fi
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH" # for the scripts that _torchrun.sh starts
