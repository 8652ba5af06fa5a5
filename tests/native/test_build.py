"""Builds of the C++ kernels: whole or not at all, and nothing of them outlives the program."""
import os
import platform
import pwd
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from native import build
from tests.conftest import ROOT
from utils import files as files_module

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


# ---- where builds are kept


@pytest.fixture
def homeless(native, monkeypatch, tmp_path) -> Path:
    """The temporary directory of a user without $HOME and without an entry in the list of users."""
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build._say.cache_clear()
    return tmp_path


def test_without_a_home_builds_are_kept_in_the_temporary_directory(homeless):
    library = Path(build._load.__wrapped__("sample", ())._name)
    assert library.is_relative_to(homeless / f"llamagen-{os.getuid()}")
    assert library.parent.parent.stat().st_mode & 0o777 == 0o700
    assert files_module.remembered("number", "key", lambda: 3) == 3
    assert files_module.remembered("number", "key", lambda: 4) == 3


def foreign(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, os.getuid() + 1, -1)


@pytest.mark.parametrize("make", [
    lambda folder: (folder.mkdir(), folder.chmod(0o777)), lambda folder: (folder.mkdir(), folder.chmod(0o720)),
    lambda folder: folder.symlink_to("/tmp"), lambda folder: folder.write_text(""),
    pytest.param(foreign, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away"))],
    ids=["all", "group", "link", "file", "foreign"])
def test_a_temporary_folder_that_others_can_write_to_is_not_used(make, homeless, capfd):
    make(homeless / f"llamagen-{os.getuid()}")
    assert build._load.__wrapped__("sample", ()) is None
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "is not ours alone" in said and "XDG_CACHE_HOME" in said
    assert not list(homeless.rglob("*.so")) and files_module.remembered("a", 1, lambda: 5) == 5


def test_two_processors_share_a_cache_folder(tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    path.write_text(PICKY)
    path.chmod(0o755)
    (tmp_path / "compiler.healthy").touch()
    found = []
    for flags in ("avx2", "avx2 avx512f", "avx2"):
        monkeypatch.setattr(build, "cpu", lambda flags=flags: flags)
        found.append(build._built("sample", str(path), [], tmp_path / "kernels"))
    assert found[0] == found[2] != found[1] and len(list((tmp_path / "kernels").iterdir())) == 2


# ---- the processor's units


ALL = "flags : avx2 avx512f avx512_bf16 amx_bf16"


@pytest.mark.parametrize(("flags", "wanted", "found"), [
    ("", "1", 0), ("sse2 avx2", "1", 1), (ALL, "1", 4), (ALL, "", 4), (ALL, "avx2", 1), (ALL, "avx512", 2),
    (ALL, "bf16dot", 3), (ALL, "amx", 4), ("avx2 avx512f", "avx512", 2), ("avx2 avx512_bf16", "1", 1)])
def test_the_best_units_are_used_or_those_that_are_named(flags, wanted, found, monkeypatch):
    monkeypatch.setattr(build, "cpu", lambda: flags)
    monkeypatch.setattr(build, "_tiles_refused", lambda: "")
    assert build._units.__wrapped__(wanted) == found
    monkeypatch.setattr(build, "_tiles_refused", lambda: "No space left on device")
    if wanted == "amx":
        with pytest.raises(ValueError, match=r"LLAMAGEN_NATIVE=amx: the processor has avx2, avx512, bf16dot, but Linux "
                                             r"does not give .* AMX \(No space left on device\)"):
            build._units.__wrapped__(wanted)
    else:
        assert build._units.__wrapped__(wanted) == min(found, 3)


@pytest.mark.parametrize(("wanted", "said"), [
    ("avx512", r"LLAMAGEN_NATIVE=avx512: the processor has avx2, as far as is known here$"),
    ("neon", r"LLAMAGEN_NATIVE=neon: give 0 \(PyTorch's kernels\), 1 .* or avx2, avx512, bf16dot, amx \(")])
def test_units_that_are_not_there_are_refused(wanted, said, monkeypatch):
    monkeypatch.setattr(build, "cpu", lambda: "avx2")
    with pytest.raises(ValueError, match=said):
        build._units.__wrapped__(wanted)


def test_a_command_says_it_in_one_line(gpt_ckpt, vq_ckpt, native):
    run = subprocess.run([sys.executable, "autoregressive/sample/sample_c2i.py", "--gpt-ckpt", str(gpt_ckpt),
                          "--vq-ckpt", str(vq_ckpt)], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "LLAMAGEN_NATIVE": "neon"})
    assert run.returncode == 2 and run.stderr.startswith("error: LLAMAGEN_NATIVE=neon: give 0")
    assert run.stderr.count("\n") == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="processors of another kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "cascadelake", "cooperlake", "sapphirerapids"])
@pytest.mark.parametrize("kernels", [("conv",), ("sample",), *(("decode", f"WEIGHTS={i}") for i in range(4))],
                         ids="".join)
def test_kernels_compile_for_other_processors(kernels, processor):
    """Without vectors, with AVX2, with AVX-512, with its bfloat16, with AMX: here they run for one of them."""
    name, *defines = kernels
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = subprocess.run([compiler, *build.FLAGS, "-fsyntax-only", f"-march={processor}",
                            *(f"-D{define}" for define in defines), str(build.SOURCES / f"{name}.cpp")],
                           capture_output=True, text=True)
    if "bad value" in built.stderr:
        pytest.skip(f"the compiler does not know {processor}")
    assert built.returncode == 0, built.stderr
