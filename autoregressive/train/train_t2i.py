"""Train a GPT or an ARPG on captioned images.

    bash scripts/autoregressive/train_t2i_stage1.sh --data-path /data/codes/t2i256_codes --t5-feat-path /data/features

The loop, and all that is not about captions, is that of train.py.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.config import T2ITrainFlags
from autoregressive.train.train import main
from utils import cli

if __name__ == "__main__":
    cli.run(main, T2ITrainFlags)
