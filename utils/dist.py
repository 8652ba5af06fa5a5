"""The same calls for one process and for many under torchrun: rank, device, collectives (no-ops when alone)."""
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed

Precision = Literal["none", "fp32", "tf32", "fp16", "bf16"]  # none and fp32 are one
BF16_PAYS_FROM = 500_000  # weights of what is trained, on a CPU: measured, benchmarks/results/precision.md
PR_SET_PDEATHSIG = 1  # Linux's <sys/prctl.h>: the signal that a process gets when its parent ends
LAUNCHER = "LLAMAGEN_LAUNCHER"  # utils/launch.py's process number, for the processes that it starts


@dataclass(frozen=True)
class Process:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files for all: rank 0."""
        return self.rank == 0


def env_rank() -> int:
    """Rank as torchrun set it, 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def setup(wanted: str = "auto", *, timeout: float = 1800.0) -> Process:
    """Join the process group if torchrun started us; choose this process's GPU, or the CPU.

    `wanted`: auto, cpu, or cuda, which is a ValueError where there is none. A process that hears nothing of another for
    `timeout` seconds gives up.
    """
    follow_launcher()
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that this torch can use")
    if wanted != "cpu" and torch.cuda.is_available():
        place, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= gpus:
            raise ValueError(f"a process for GPU {place} was started, but there are {gpus}: give nproc_per_node={gpus}")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group(backend(device), timeout=timedelta(seconds=timeout),
                                                 device_id=bound_device(device))
        except torch.distributed.DistError as error:
            if (taken := taken_port(error)) is None:
                raise
            raise ValueError(taken) from None
    return Process(env_rank(), world_size, device)


def taken_port(error: Exception) -> str | None:
    """What to say when processes cannot meet because their port is in use; None for any other error."""
    port = re.search(r"port: (\d+).*(EADDRINUSE|address already in use)", str(error), flags=re.IGNORECASE | re.DOTALL)
    return port and (f"port {port[1]}, at which the processes are to meet, is in use by another program, perhaps "
                     f"another training: give a free one, such as master_port={int(port[1]) % 65535 + 1} "
                     "(torchrun: --master_port), or on one machine leave it out")


def follow_launcher() -> None:
    """In a process that a launcher started: take the SIGTERM that it passes on, and end when it ends, however it does.

    A killed launcher would otherwise leave processes that go on writing into the folder of a training which somebody
    has long resumed. The kernel kills this process then (Linux only). The launcher may have ended before this call:
    then this process ends here.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":  # torchrun, so utils/launch.py too, sets it
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])  # utils/launch.py blocks it for itself
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(1)


def backend(device: torch.device) -> str:
    """Collectives of GPU tensors go through nccl, those of CPU tensors (offloaded weights, say) through gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def bound_device(device: torch.device) -> torch.device | None:
    """The GPU that a process group is bound to, so that nccl need not guess it; None without one.

    None with torch 2.8 too: there a bound group splits nccl's part only, and `hsdp` splits one of gloo and nccl.
    """
    splits_both = hasattr(torch.distributed.ProcessGroup, "split_group")
    return device if device.type == "cuda" and splits_both else None


def join_alone(device: torch.device) -> None:
    """Start a process group of this process alone, for code that needs a group, such as FSDP."""
    torch.distributed.init_process_group(backend(device), store=torch.distributed.HashStore(), rank=0, world_size=1,
                                         device_id=bound_device(device))


def new_cpu_group(*, timeout: float) -> torch.distributed.ProcessGroup | None:
    """A second group of all processes, for a thread that talks beside the main one; None when alone."""
    if not torch.distributed.is_initialized():
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def speaks_for_all(*, patience: float = 0.0) -> bool:
    """Called on an error: whether this process is the first to report one, so that the user reads one line.

    `patience`: seconds to wait for the report of another process, whose error may be the cause of this one.
    """
    if not torch.distributed.is_initialized():
        return env_rank() == 0
    store = torch.distributed.distributed_c10d._get_default_store()
    try:
        if patience:
            with contextlib.suppress(RuntimeError):  # none was reported in time
                store.wait(["error"], timedelta(seconds=patience))
        return store.add("error", 1) == 1
    except RuntimeError:  # the process that holds the store has ended
        return True


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """When one process meets a ValueError or OSError in the block, all processes raise it at the end of the block.

    All processes must enter the block; within it, none may wait for another.
    """
    problem: list[Exception] = []
    try:
        yield
    except (ValueError, OSError) as error:
        problem = [error]
    everyones = gather_lists(problem)
    if everyones:
        raise next((error for error in everyones if isinstance(error, OSError)), everyones[0])


def lost_contact(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone or silent."""
    known = isinstance(error, torch.distributed.DistError) or any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Connection reset", "NCCL"))
    return torch.distributed.is_initialized() and world_size() > 1 and known


def shutdown() -> None:
    """Leave the process group, if in one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait for every process."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def mean(values: torch.Tensor) -> torch.Tensor:
    """Mean of `values` over all processes."""
    return total(values) / world_size()


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all processes."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values


def broadcast_object(value: object) -> object:
    """The value that rank 0 holds (what the others pass is ignored)."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]


def gather_lists(values: list, *, group: torch.distributed.ProcessGroup | None = None) -> list:
    """The lists of all processes, joined in rank order."""
    if not torch.distributed.is_initialized():
        return values
    boxes: list[list] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(boxes, values, group=group)
    return [value for box in boxes for value in box]


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def compute_dtype(precision: Precision | None, device: torch.device, *, weights: int | None = None) -> torch.dtype:
    """The autocast type for a precision flag; None, the user said nothing: bf16 where that is faster.

    On a CPU bf16 without instructions for it is emulated, slower than fp32, and fp16 has no kernels worth using: both
    become fp32. With such instructions bf16 pays for all but the smallest models; `weights`: how many there are.
    """
    if precision in ("none", "fp32", "tf32"):
        return torch.float32
    if device.type != "cpu":
        return torch.float16 if precision == "fp16" else torch.bfloat16
    small = precision is None and weights is not None and weights < BF16_PAYS_FROM
    return torch.bfloat16 if precision != "fp16" and not small and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16 (AVX512-BF16, AMX). For tests LLAMAGEN_CPU_BF16=1 or 0 says so."""
    if os.environ.get("LLAMAGEN_CPU_BF16") in ("0", "1"):
        return os.environ["LLAMAGEN_CPU_BF16"] == "1"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every release
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def ask_for_huge_pages() -> None:
    """Have PyTorch ask Linux for huge pages for its large tensors on the CPU, in this process and those it starts.

    Steps of decoding read all weights and caches: with eight images they take a tenth less. Not for training, which
    does not gain and needs 3 % more memory. PyTorch looks at this with its first tensor: in a program that has made one
    before, nothing changes. THP_MEM_ALLOC_ENABLE=0 in the environment keeps it from happening.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """torch.autocast that fp32 switches off."""
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        yield
