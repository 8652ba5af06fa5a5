"""The same for large models, sharded over all processes: LlamaGen's file name of train.py --data-parallel fsdp."""
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--data-parallel", "fsdp"]
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
