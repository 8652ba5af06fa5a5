"""Start an entry on every local GPU, or as one process on a CPU. Used by scripts/_torchrun.sh.

    python utils/launch.py autoregressive/train/train.py --code-path ...

The variables nnodes, nproc_per_node, node_rank, master_addr and master_port are passed to torchrun; with one process
the entry runs directly. The exit code is that of the process that failed first. SIGTERM is passed on, so that a
training saves, ends well and the exit code is 0. When this process is killed, the kernel kills those that it started
(Linux).
"""
import contextlib
import logging
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(argv: list[str]) -> None:
    """Run `argv` = [entry.py, flags …]."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # see pass_on; the threads of torch's import inherit it
    import torch

    gpus = torch.cuda.device_count()
    local = int(os.environ.get("nproc_per_node", 0)) or max(1, gpus)
    nodes = int(os.environ.get("nnodes", 1))
    if local * nodes == 1:
        sys.argv = argv
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        runpy.run_path(argv[0], run_name="__main__")
        return

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from utils import dist
    logging.disable(logging.CRITICAL)  # torchrun's; the entry itself says in one line what is wrong
    if not gpus:  # DDP warns of a setting that exact resuming on a CPU needs (utils/training/parallel.py)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ[dist.LAUNCHER] = str(os.getpid())  # its processes end with it: see utils/dist.py
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local)))
    flags = [f"--nnodes={nodes}", f"--nproc_per_node={local}"]
    flags += [f"--{name}={os.environ[name]}" for name in ("node_rank", "master_addr", "master_port")
              if name in os.environ]
    if nodes == 1 and "master_port" not in os.environ:
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
            print(f"error: process {rank} of {local * nodes} was killed by {name}{reason}, the others were stopped: "
                  "training continues with --resume auto", file=sys.stderr)
            sys.exit(128 - failure.exitcode)
        sys.exit(failure.exitcode)
    except SignalException as error:  # Ctrl-C; the processes have received the signal too
        sys.exit(128 + error.sigval)


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
