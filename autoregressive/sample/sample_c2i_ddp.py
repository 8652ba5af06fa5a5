"""LlamaGen's file name of autoregressive/sample/sample_ddp.py: sample a set of images."""
import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("sample_ddp.py")), run_name="__main__")
