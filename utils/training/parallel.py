"""Parallelism, checkpointing and compilation, put on a model from outside: activation checkpointing → compile → DDP or
FSDP2. Models and the training loop know nothing of it; a model names the modules to treat one by one in `blocks()`.

FSDP2 (fully_shard; the method is ZeRO's, arXiv 1910.02054) wraps every block and then the rest. The shards a process
keeps are fp32 masters. In half precision a block is gathered in that type, the rest (embeddings, last norm, head; a few
per cent of a large model) in fp32, and the forward runs under autocast as DDP's does: the residual stream is fp32, and
losses are DDP's but for the blocks' norm weights, which are rounded when gathered. Gradients are reduced in fp32.
Models are built on the meta device and filled one tensor at a time, so no process ever holds a whole one.
"""
import contextlib
import functools
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from utils import dist
from utils.cli import flag


@dataclass(kw_only=True)
class ParallelFlags:
    """How a large model is spread over processes."""

    shapes_run: ClassVar[bool] = False
    data_parallel: Literal["ddp", "fsdp", "sdp", "hsdp"] = flag(
        "ddp", "ddp: every process holds the model; fsdp: it is sharded over all; sdp: sharded, but each weight is "
        "gathered once per step, whatever the accumulation; hsdp: sharded over --shard-size processes, the groups hold "
        "copies", choices=("ddp", "fsdp", "sdp", "hsdp"))
    shard_size: int | None = flag(None, "hsdp: processes that share one copy of the model; None: those of one machine")
    reshard_after_forward: bool = flag(True, "fsdp and hsdp: drop a block's gathered weights after its forward and "
                                             "gather them again for the backward (less memory, more traffic)")
    grad_precision: Literal["fp32", "fp16", "bf16"] = flag("fp32", "sharded: type in which gradients are summed over "
                                                                   "processes", choices=("fp32", "fp16", "bf16"))
    cpu_offload: bool = flag(False, "sharded: keep weights, gradients and optimizer in the CPU's memory")
    activation_checkpointing: bool = flag(False, "keep only each block's input and compute the block again in the "
                                                 "backward: far less memory, about a third more time")

    def check(self, world_size: int) -> None:
        """Raise ValueError for settings that do not fit together."""
        if not self.sharded:
            for name, default in (("shard_size", None), ("cpu_offload", False), ("grad_precision", "fp32"),
                                  ("reshard_after_forward", True)):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name.replace('_', '-')} is for sharded models: give --data-parallel fsdp, "
                                     "sdp or hsdp")
        if self.shard_size is not None and (self.data_parallel != "hsdp" or self.shard_size < 1
                                            or world_size % self.shard_size):
            raise ValueError(f"--shard-size {self.shard_size} is for --data-parallel hsdp and divides the number of "
                             f"processes, here {world_size}")

    @property
    def sharded(self) -> bool:
        """Whether the model is FSDP's."""
        return self.data_parallel != "ddp"


def apply_parallelism(model: nn.Module, flags: ParallelFlags, device: torch.device, *, dtype: torch.dtype,
                      compiled: bool) -> nn.Module:
    """Put an unfilled model (meta device) on this process's device as the flags say; `dtype` is the type to compute in.

    Returns what to call, under autocast of that type, in its place. Its values are undefined: `init_weights` or a
    checkpoint must follow.
    """
    if flags.activation_checkpointing:
        apply_activation_checkpointing(model)
    if compiled:
        apply_compile(model)
    if not flags.sharded:
        return model.to_empty(device=device)  # apply_ddp comes after the filling: it sends rank 0's values to all
    apply_fsdp(model, flags, device, dtype=dtype)
    return model.to_empty(device="cpu" if flags.cpu_offload else device)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """What the model's method `blocks()` names; nothing where it has none, and is to be treated as a whole."""
    return model.blocks() if hasattr(type(model), "blocks") else []


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Each block keeps its input only. In place: names stay; dropout draws the same masks again."""
    for block in blocks_of(model) or [model]:
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def apply_compile(model: nn.Module) -> nn.Module:
    """Compile in place, block by block where there are blocks: one compilation serves all of them; names stay."""
    for module in blocks_of(model) or [model]:
        module.compile()
    return model


def apply_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap for data parallelism when there is more than one process; alone, the model itself. Buffers stay local.

    On a CPU the buckets of gradients stay as first cut, which `find_unused_parameters` brings with it: cut anew after
    the first step, three processes or more would add in another order, and a resumed run differ in the last bits.
    """
    if dist.world_size() == 1 or isinstance(model, FSDPModule):
        return model
    known = inspect.signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch < 2.14
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                   find_unused_parameters=device.type == "cpu", **{sync_buffers: False})


def apply_fsdp(model: nn.Module, flags: ParallelFlags, device: torch.device, *, dtype: torch.dtype) -> None:
    """Shard a model in place, each block by itself, all else with the root."""
    if not torch.distributed.is_initialized():
        dist.join_alone(device)
    world = dist.world_size()
    if flags.data_parallel == "hsdp":
        size = flags.shard_size or min(world, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    reduced = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[flags.grad_precision]
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if flags.cpu_offload else OffloadPolicy()

    def shard(module: nn.Module, *, param_dtype: torch.dtype | None, reshard: bool) -> None:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
        if device.type == "cpu":  # gloo of torch 2.8 sums where FSDP2 tells it to average: sum, then divide
            module.set_force_sum_reduction_for_comms(True)

    for block in blocks_of(model):
        shard(block, param_dtype=None if dtype == torch.float32 else dtype,
              reshard=flags.data_parallel != "sdp" and flags.reshard_after_forward)
    shard(model, param_dtype=None, reshard=False)  # its weights are needed first and last
    model.gathered_once_per_step = flags.data_parallel == "sdp"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside a DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def copy_whole_into(own: Tensor, values: Tensor) -> None:
    """Copy whole `values` into a tensor, of which this process may hold a part only."""
    with torch.no_grad():
        if isinstance(own, DTensor):
            values = distribute_tensor(values.to(own.device, own.dtype), own.device_mesh, own.placements,
                                       src_data_rank=None)
            own.to_local().copy_(values.to_local())
        else:
            own.copy_(values)


def full_tensor(values: Tensor) -> Tensor:
    """A plain tensor: of a sharded one the whole, of which all processes must ask at once."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def local_part(values: Tensor) -> Tensor:
    """A plain tensor: of a sharded one the part that this process holds."""
    return values.to_local() if isinstance(values, DTensor) else values


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the block every process holds the whole model, all of it in the blocks' type, and may call its methods.

    One may do so alone: FSDP's hooks are off. They would note each forward, and in the next backward prefetch what this
    process alone has used, while the others wait for something else.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [kept for module in shards for kept in (module._forward_pre_hooks, module._forward_hooks)]
    before = [dict(kept) for kept in hooks]
    for module in shards:
        module.unshard()
    for kept in hooks:
        kept.clear()
    dtype = min((p.dtype for p in model.parameters()), key=lambda dtype: dtype.itemsize)
    wider = [(p, p.data) for p in model.parameters() if shards and p.dtype != dtype]
    for p, values in wider:
        p.data = values.to(dtype)
    try:
        yield
    finally:
        for p, values in wider:
            p.data = values
        for kept, known in zip(hooks, before, strict=True):
            kept.update(known)
        for module in shards:
            module.reshard()


@contextlib.contextmanager
def gradient_sync(modules: Iterable[nn.Module], enabled: bool):
    """Within the block, backward passes of DDP exchange gradients only if `enabled`: in a step's last micro-batch.

    FSDP's always do: keeping whole gradients until the last micro-batch would cost the memory that sharding saves. With
    sdp the gathered weights are dropped after the last one only; the next step gathers what the optimizer has updated.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if not enabled and isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
            elif getattr(module, "gathered_once_per_step", False):
                module.set_reshard_after_backward(enabled)
        yield
