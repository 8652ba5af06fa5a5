"""utils.distributed as LlamaGen has it. Our commands ask utils/dist.py."""
import os
from argparse import Namespace

import torch

from utils import dist

__all__ = ["init_distributed_mode"]


def init_distributed_mode(args: Namespace) -> None:
    """Join torchrun's processes and write rank, world_size, gpu and distributed into `args`.

    Started without torchrun, `distributed` is False and there is no process group.
    """
    process = dist.setup()
    args.distributed = "RANK" in os.environ
    if args.distributed and not torch.distributed.is_initialized():
        dist.join_alone(process.device)
    args.rank, args.world_size = process.rank, process.world_size
    args.gpu = int(os.environ.get("LOCAL_RANK", 0))
