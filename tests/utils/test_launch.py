"""Processes end with their launcher, however that ends; SIGTERM reaches it at any time."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent has ended")]
PATIENCE = 120.0


@pytest.fixture
def folder(tmp_path):
    """Where the processes of a test write <rank>.pid, their process numbers; those left after it are killed."""
    yield tmp_path
    for number in filter(runs, numbers(tmp_path)):
        os.kill(number, signal.SIGKILL)


def launched(folder: Path, body: str, **variables: str) -> subprocess.Popen:
    """Start two processes that run `body`, which may call note() to write down the process number."""
    script = folder / "script.py"
    script.write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from utils import dist
folder, rank, parent = Path({str(folder)!r}), os.environ["RANK"], os.getppid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note():
    (folder / f"{{rank}}.pid").write_text(f"{{os.getpid()}}\\n")
{body}
""")
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / "utils" / "launch.py"), str(script)],
                            env={**environment, **variables})


def wait_for(condition) -> None:
    """Until condition() is true."""
    patience = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < patience
        time.sleep(0.05)


def numbers(folder: Path) -> list[int]:
    """The process numbers that have been written whole."""
    return [int(text) for path in folder.glob("*.pid") if (text := path.read_text()).endswith("\n")]


def runs(number: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_killed_launcher_leaves_no_process(folder):
    """Not even one that ignores SIGTERM, in the middle of its work."""
    launcher = launched(folder, """dist.setup()
note()
time.sleep(600)
""")
    wait_for(lambda: len(numbers(folder)) == 2)
    assert all(map(runs, numbers(folder)))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(map(runs, numbers(folder))))


def test_a_process_does_not_start_to_work_when_its_launcher_has_ended(folder):
    launcher = launched(folder, """note()
while os.getppid() == parent:
    time.sleep(0.01)
try:
    dist.setup()
finally:
    (folder / "worked").touch()
""")
    wait_for(lambda: len(numbers(folder)) == 2)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not any(map(runs, numbers(folder))))
    assert not (folder / "worked").exists()


def test_sigterm_ends_a_launcher_that_waits_for_another_machine(folder):
    """It has started no process yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = launched(folder, "note()", nnodes="2", node_rank="0", master_addr="127.0.0.1", master_port=port)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(port))) == 0

    wait_for(listens)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(PATIENCE) == 128 + signal.SIGTERM
    assert not numbers(folder)
