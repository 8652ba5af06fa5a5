"""Processes end with their launcher, SIGTERM reaches it at any time; variables mean what torchrun reads."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from utils import launch

pytestmark = [pytest.mark.processes, pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent has ended")]
PATIENCE = 120.0


@pytest.fixture
def folder(tmp_path):
    """Where the processes of a test write <rank>.pid, their process numbers; those left after it are killed."""
    yield tmp_path
    for number in filter(runs, numbers(tmp_path)):
        os.kill(number, signal.SIGKILL)


def launched(folder: Path, body: str, *, stderr: int | None = None, **variables: str) -> subprocess.Popen:
    """Start two processes that run `body`, which may call note() to write down the process number."""
    script = folder / "script.py"
    script.write_text(f"""import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from utils import dist
folder, rank, parent = Path({str(folder)!r}), os.environ.get("RANK", "0"), os.getppid()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def note():
    (folder / f"{{rank}}.pid").write_text(f"{{os.getpid()}}\\n")
{body}
""")
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / "utils" / "launch.py"), str(script)],
                            env={**environment, **variables}, stderr=stderr, text=True)


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


# ---- the variables


MEET = """process = dist.setup()
(folder / f"{process.rank}.ran").write_text(str(process.world_size))
"""


def outcome(folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and stderr of a launcher whose processes meet and write <rank>.ran."""
    launcher = launched(folder, MEET, stderr=subprocess.PIPE, **variables)
    said = launcher.communicate(timeout=PATIENCE)[1]
    return launcher.returncode, said


def ran(folder: Path) -> dict[str, str]:
    """{rank: size of its world} of the processes that met."""
    return {path.stem: path.read_text() for path in folder.glob("*.ran")}


@pytest.mark.parametrize(("wanted", "gpus", "count"), [
    ("", 0, 1), ("", 3, 3), ("2", 0, 2), ("cpu", 3, os.cpu_count()), ("auto", 0, os.cpu_count())])
def test_nproc_per_node_means_what_it_means_to_torchrun(wanted, gpus, count, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)  # of a machine with GPUs
    monkeypatch.setattr("torch._utils.cpu_count", os.cpu_count, raising=False)
    assert launch.processes_here(wanted, gpus=gpus) == count


def test_nproc_per_node_gpu_is_all_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert launch.processes_here("gpu", gpus=3) == 3


def test_ranges_of_machines_go_to_torchrun():
    assert launch.check_variables({"nnodes": "1:4"}, gpus=2) == (2, 4)
    assert launch.check_variables({"nnodes": "1:1"}, gpus=0) == (1, 1)


@pytest.mark.parametrize("variables", [
    {"nproc_per_node": value} for value in ("gpu", "zwei", "0", "-1", "1.5", "\x1b[31mred")] + [
    {"nnodes": value} for value in ("0", "4:1", "1:2:3", "-1", "two", ":2")] + [
    {"node_rank": "1"}, {"nnodes": "2", "node_rank": "2"}, {"node_rank": "-1"}, {"master_port": "x"},
    {"master_port": "65536"}], ids=str)
def test_nonsense_is_named(variables):
    with pytest.raises(ValueError, match=f"^{[*variables][-1]} is "):
        launch.check_variables(variables, gpus=0)


def test_nonsense_is_one_line(folder):
    code, said = outcome(folder, nproc_per_node="zwei")
    assert (code, said.count("\n"), ran(folder)) == (2, 1, {})
    assert said.startswith("error: nproc_per_node is 'zwei', expected ")


def test_empty_variables_are_not_set(folder):
    assert outcome(folder, **dict.fromkeys(launch.VARIABLES, "")) == (0, "")
    assert ran(folder) == {"0": "1"}
    assert outcome(folder, **{**dict.fromkeys(launch.VARIABLES, ""), "nproc_per_node": "2"})[0] == 0
    assert ran(folder) == {"0": "2", "1": "2"}


@pytest.fixture
def taken():
    """A port that a program of this machine holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


def test_a_taken_port_is_one_line(taken, folder):
    code, said = outcome(folder, master_port=taken)
    assert (code, said.count("\n"), ran(folder)) == (2, 1, {})
    assert said.startswith(f"error: port {taken}, ") and "master_port=" in said


def test_a_taken_port_is_one_line_without_a_launcher(taken, folder):
    """Where each process is started by hand, or by a cluster's own launcher."""
    script = folder / "alone.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.conftest import call
call("verify", "--code-path", "x")
""")
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken,
                   "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert found.stderr.startswith(f"error: port {taken}, ")


def test_one_process_needs_no_port(taken, folder):
    assert outcome(folder, nproc_per_node="1", master_port=taken)[0] == 0
    assert ran(folder) == {"0": "1"}
