"""Builds of the C++ kernels: whole or not at all, and nothing of them outlives the program."""
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from native import build
from tests.conftest import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")]
SLOW = """#!/bin/sh
case $1 in --version) echo 1; exit ;; esac
for word in "$@"; do last=$word; done
echo half > "$last"
echo half > "$TMPDIR/assembly.s"
sleep 600 & wait
"""


@pytest.fixture
def slow_compiler(tmp_path, own_cache, monkeypatch) -> str:
    """A compiler that writes half a file and never ends; its name is in the environment of all that it starts."""
    path = tmp_path / "slow"
    path.write_text(SLOW)
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("LLAMAGEN_NATIVE", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return str(path)


def started_with(word: str) -> list[str]:
    """The command lines of the processes that have `word` in their environment, this one's aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and word.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().decode().replace("\0", " "))
        except OSError:
            continue
    return found


def waited_for(condition) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


BACKGROUND = "prepare(('sample',), ('conv',)); "


@pytest.mark.parametrize(("program", "end", "code"), [
    (BACKGROUND + "input(); sys.exit(2)", None, 2), (BACKGROUND + "input(); 1 / 0", None, 1),
    (BACKGROUND + "time.sleep(600)", signal.SIGTERM, -15), (BACKGROUND + "time.sleep(600)", signal.SIGKILL, -9),
    ("load('sample')", signal.SIGINT, -2), ("load('sample')", signal.SIGTERM, -15)])
def test_no_compiler_and_no_file_outlives_the_program(program, end, code, slow_compiler, tmp_path):
    hears = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background ignores it
    running = subprocess.Popen([sys.executable, "-c",
                                f"import signal, sys, time; {hears}; from native.build import *; {program}"],
                               cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    builds = 2 if BACKGROUND in program else 1
    assert waited_for(lambda: sum("sleep 600" in line for line in started_with(slow_compiler)) == builds)
    assert files(tmp_path) == {"slow", "made", "assembly.s"}
    if end is None:
        running.stdin.write(b"\n")
        running.stdin.flush()
    else:
        running.send_signal(end)
    assert running.wait(60) == code
    running.stdin.close()
    assert waited_for(lambda: not started_with(slow_compiler)), started_with(slow_compiler)
    assert waited_for(lambda: files(tmp_path) == {"slow"}), files(tmp_path)
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_build_leaves_the_library_alone(native, own_cache):
    library = Path(build._load.__wrapped__("sample", ())._name)
    assert list(library.parent.iterdir()) == [library] and library.parent.is_relative_to(os.environ["XDG_CACHE_HOME"])


def test_what_the_compiler_says_is_told(tmp_path):
    path = tmp_path / "broken"
    path.write_text("#!/bin/sh\necho 1\necho 'out of order' >&2\ntest \"$1\" = --version\n")
    path.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as error:
        build._built("sample", str(path), [], tmp_path / "kernels")
    assert error.value.stderr.strip() == "out of order" and not list((tmp_path / "kernels").iterdir())


PICKY = """#!/bin/sh
for word in "$@"; do
    case $word in -march=*) [ -e "$0.healthy" ] || { echo "kernel.cpp:1: error: no such tuning" >&2; exit 1; } ;; esac
    last=$word
done
case $1 in --version) echo 1; exit ;; esac
for word in "$@"; do case $word in -march=*) tuned=tuned ;; esac; done
while [ "$1" != -o ]; do shift; done
echo "plain $tuned" > "$2"
"""


def test_a_build_without_tuning_is_said_and_does_not_stay(tmp_path, capfd):
    path, folder = tmp_path / "picky", tmp_path / "kernels"
    path.write_text(PICKY)
    path.chmod(0o755)
    build._say.cache_clear()
    plain = build._built("sample", str(path), [], folder)
    assert plain.read_text() == "plain \n"
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "-march=native failed (kernel.cpp:1: error: no such tuning)" in said
    assert "slower" in said and "sample.cpp" in said
    (tmp_path / "picky.healthy").touch()
    tuned = build._built("sample", str(path), [], folder)
    assert tuned != plain and tuned.read_text() == "plain tuned\n" and capfd.readouterr().err == ""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of another kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "cascadelake", "cooperlake"])
@pytest.mark.parametrize("kernels", [("conv",), ("sample",), *(("decode", f"WEIGHTS={i}") for i in range(4))],
                         ids="".join)
def test_kernels_compile_for_other_processors(kernels, processor):
    """Without vectors, with AVX2, with AVX-512, with its bfloat16: here they run for one of them."""
    name, *defines = kernels
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = subprocess.run([compiler, *build.FLAGS, "-fsyntax-only", f"-march={processor}",
                            *(f"-D{define}" for define in defines), str(build.SOURCES / f"{name}.cpp")],
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
