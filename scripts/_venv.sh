# Sourced by quickstart.sh and test.sh: make .venv and install the project into it, once per change of requirements.
# Sets root and python. PYTHON chooses the interpreter (3.10 or newer); extras to install are passed as $1.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
base="${PYTHON:-python3}"
if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or newer is needed, $base is not: set PYTHON=/path/to/python3" >&2
    exit 2
fi
stamp="$root/.venv/.installed-${1:-base}"
wanted="$(cat "$root/requirements.txt" "$root/pyproject.toml" | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$python" -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear "$root/.venv"
    echo "installing into .venv (the first time takes some minutes) …"
    "$python" -m pip install --quiet --editable "$root${1:+[$1]}"
    echo "$wanted" > "$stamp"
fi
