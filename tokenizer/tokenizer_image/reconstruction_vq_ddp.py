"""LlamaGen's file name of tokenizer/reconstruct.py: reconstruct images with a VQ tokenizer."""
import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "reconstruct.py"), run_name="__main__")
