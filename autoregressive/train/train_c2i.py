"""LlamaGen's file name of autoregressive/train/train.py: train a class-conditional GPT on codes."""
import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).with_name("train.py")), run_name="__main__")
