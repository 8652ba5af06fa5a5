"""Parallelism and compilation, put on a model from outside."""
import contextlib
import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils import dist


def apply_compile(model: nn.Module) -> nn.Module:
    """Compile in place: parameters and state-dict names stay as they are."""
    model.compile()
    return model


def apply_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap for data parallelism when there is more than one process; alone, the model itself. Buffers stay local."""
    if dist.world_size() == 1:
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.14
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   **{sync_buffers: False})


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def gradient_sync(modules: Iterable[nn.Module], enabled: bool):
    """Within the block, backward passes exchange gradients only if `enabled`."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if not enabled and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield
