"""LlamaGen's file name of tokenizer/reconstruct.py --reconstructor vae: the SD or SDXL VAE."""
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--reconstructor", "vae"]
    runpy.run_path(str(Path(__file__).parents[1] / "reconstruct.py"), run_name="__main__")
