"""LlamaGen's file name of autoregressive/train/extract_codes.py: turn images with classes into codes."""
import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("extract_codes.py")), run_name="__main__")
