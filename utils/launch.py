"""Start an entry on every local GPU, or as one process on a CPU. Used by scripts/_torchrun.sh.

    python utils/launch.py autoregressive/train/train.py --code-path ...

The variables nnodes, nproc_per_node, node_rank, master_addr and master_port mean what they mean to torchrun, words such
as nproc_per_node=gpu and ranges such as nnodes=1:4 included; an empty one counts as not set. With one process the entry
runs directly. The exit code is that of the process that failed first. SIGTERM is passed on, so that a
training saves, ends well and the exit code is 0. When this process is killed, the kernel kills those that it started
(Linux).
"""
import contextlib
import logging
import os
import re
import runpy
import signal
import sys
import threading
from pathlib import Path

VARIABLES = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port")
sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: list[str]) -> None:
    """Run `argv` = [entry.py, flags …]."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # see pass_on; the threads of torch's import inherit it
    import torch

    from utils.cli import fail
    gpus = torch.cuda.device_count()
    given = {name: value for name in VARIABLES if (value := os.environ.get(name, "").strip())}
    try:
        local, machines = check_variables(given, gpus=gpus)
    except ValueError as error:
        fail(str(error), quiet=False)
    if local * machines == 1:
        sys.argv = argv
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        runpy.run_path(argv[0], run_name="__main__")
        return

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    from utils import dist
    logging.disable(logging.CRITICAL)  # torchrun's; the entry itself says in one line what is wrong
    if not gpus:  # DDP warns of a setting that exact resuming on a CPU needs (utils/training/parallel.py)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[dist.LAUNCHER] = str(os.getpid())  # its processes end with it: see utils/dist.py
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    flags = [f"--{name}={value}" for name, value in {"nnodes": "1", **given, "nproc_per_node": local}.items()]
    if machines == 1 and "master_port" not in given:
        flags.append("--standalone")
    if Path(f"/proc/self/task/{os.getpid()}/children").exists():  # not every Linux has it
        threading.Thread(target=pass_on, args=[signal.SIGTERM], daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        torchrun([*flags, *argv])
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        rank, failure = min(error.failures.items(), key=lambda item: (  # killed ones come first
            item[1].timestamp > first + 2, item[1].exitcode >= 0 or item[1].exitcode == -signal.SIGTERM))
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            reason = " (out of memory, most often)" if name == "SIGKILL" else ""
            print(f"error: process {rank} of {local * machines} was killed by {name}{reason}, the others were stopped: "
                  "training continues with --resume auto", file=sys.stderr)
            sys.exit(128 - failure.exitcode)
        sys.exit(failure.exitcode)
    except SignalException as error:  # Ctrl-C; the processes have received the signal too
        sys.exit(128 + error.sigval)
    except (torch.distributed.DistError, RendezvousError) as error:
        place = f"{given.get('master_addr', 'this machine')}, port {given.get('master_port', '29500')}"
        fail(dist.taken_port(error) or f"the processes do not find each other at {place}: {error}", quiet=False)


def check_variables(given: dict[str, str], *, gpus: int) -> tuple[int, int]:
    """(processes on this machine, most machines) that the variables which are set mean.

    Raises ValueError naming the variable that makes no sense.
    """
    nodes = given.get("nnodes", "1")
    if not re.fullmatch(r"\d+(:\d+)?", nodes) or not 1 <= (bounds := [*map(int, nodes.split(":"))])[0] <= bounds[-1]:
        raise ValueError(f"nnodes is {nodes!r}, expected a number of machines, at least 1, or a range such as 1:4")
    for name, least, end in (("node_rank", 0, bounds[-1]), ("master_port", 0, 2**16)):
        value = given.get(name, "0")
        if not re.fullmatch(r"\d+", value) or not least <= int(value) < end:
            reason = f" (nnodes is {nodes})" if name == "node_rank" else ""
            raise ValueError(f"{name} is {value!r}, expected a number from {least} to {end - 1}{reason}")
    return processes_here(given.get("nproc_per_node", ""), gpus=gpus), bounds[-1]


def processes_here(wanted: str, *, gpus: int) -> int:
    """How many processes `nproc_per_node` asks for; "" is one per GPU, without GPUs one."""
    if not wanted:
        return max(1, gpus)
    if wanted == "gpu" and not gpus:
        raise ValueError("nproc_per_node is gpu, but there is no GPU that this torch can use: give a number of "
                         "processes, or cpu for one per core")
    from torch.distributed.run import determine_local_world_size
    try:
        count = determine_local_world_size(wanted)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"nproc_per_node is {wanted!r}, expected a number of processes, or gpu, cpu or auto "
                         "(one per GPU, per core, or per GPU if there are any and else per core)")
    return count


def pass_on(number: int) -> None:
    """Wait for a signal that all threads block and send it to this process's children, again and again.

    torchrun's own handler, which some versions let nobody replace, would kill them 30 seconds later. (It is never
    called while the signal is blocked.) Before there are children, end.
    """
    while True:
        signal.sigwait([number])
        children = []
        for listing in Path("/proc/self/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread that has ended meanwhile
                children += listing.read_text().split()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), number)
        if not children:
            os._exit(128 + number)


if __name__ == "__main__":
    main(sys.argv[1:])
