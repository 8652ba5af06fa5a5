"""The machine and the versions that a measurement depends on."""
import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed

ROOT = Path(__file__).resolve().parents[1]


def cpu_name() -> str:
    """The processor's name."""
    listing = Path("/proc/cpuinfo")  # Linux
    lines = listing.read_text().splitlines() if listing.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Meanwhile so many other processes keep a core busy each."""
    ends_with_us = "import os, threading; threading.Thread(target=lambda: (os.read(0, 1), os._exit(0))).start()"
    others = [subprocess.Popen([sys.executable, "-c", f"{ends_with_us}\nprint(flush=True)\nwhile True: pass"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for other in others:
            other.stdout.readline()  # it has begun
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


def said_by(*words: str) -> str:
    """What a program prints; "" where it is missing, fails or hangs."""
    try:
        return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def nvidia_cards() -> str:
    """Name, driver and memory of the cards that the driver sees; "" without one."""
    listed = said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return "; ".join(f"{name}, driver {driver}, {memory}" for name, driver, memory in
                     (line.split(", ") for line in listed.splitlines() if line.count(", ") == 2))


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    commit = said_by("git", "rev-parse", "HEAD")
    changed = " with changes" if commit and said_by("git", "status", "--porcelain", "--untracked-files=no") else ""
    with_nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if with_nccl else "none"
    return {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "commit": f"{commit or 'unknown'}{changed}",
            "cards": f"{torch.cuda.device_count()} that torch sees", "driver's cards": nvidia_cards() or "none",
            "torch": torch.__version__,
            "CUDA, cuDNN, nccl": f"{torch.version.cuda or torch.version.hip}, {torch.backends.cudnn.version()}, {nccl}",
            "Python": f"{platform.python_version()}, {platform.platform()}",
            "CPU": f"{cpu_name()}, {os.cpu_count()} cores"}
