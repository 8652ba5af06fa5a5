"""C++ kernels for the CPU, compiled for this very machine on first use (a few seconds) and kept in the cache folder.

Why not PyTorch's own CPU kernels: in decoding, their product of two rows with a matrix runs at a quarter of the
memory's speed, its last bit depends on the number of rows, and half precision is emulated. The sources here need no
PyTorch headers (plain pointers, called through ctypes), so they build in seconds. Without a compiler, or with
LLAMAGEN_NATIVE=0 in the environment, everything runs on PyTorch's kernels instead. LLAMAGEN_NATIVE=avx2, avx512,
bf16dot (AVX512-BF16) or amx keeps the kernels to these instructions, as though the processor had no later ones.
"""
import ctypes
import functools
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

from torch import Tensor

from utils.files import cache_folder, few, own_temporary_folder

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared",
         "-pthread")
# Sets of instructions, each of which has those before it: AVX2, AVX-512, AVX512-BF16 (dot products), AMX (tiles).
UNITS = {"avx2": "avx2", "avx512": "avx512f", "bf16dot": "avx512_bf16", "amx": "amx_bf16"}  # → their names in Linux
TUNINGS = ("-march=native",), ()  # the latter where a compiler lacks the former

# sh -c COMPILE <temporary folder> <library> <compiler> <its arguments>. Its standard input is a pipe whose other end we
# hold and write nothing to. A process of its own waits for that end to close, which the kernel does when we end, by
# SIGKILL too; then it ends the compiler and what that has started, and removes the temporary folder.
COMPILE = """
exec 3<&0 </dev/null
( trap '' TERM; read -r _ <&3; kill -TERM 0; rm -rf "$0" || rm -rf "$0"; kill -KILL 0 ) >/dev/null 2>&1 &
library=$1
shift
mkdir -m 700 "$0" && TMPDIR=$0 "$@" -o "$0/made" 3<&- && mv -f "$0/made" "$library"
code=$?
rm -rf "$0"
{ kill -KILL $!; wait $!; } 2>/dev/null
exit $code
"""

_LOCKS: dict[tuple[str, tuple[str, ...]], threading.Lock] = defaultdict(threading.Lock)  # one build of each at a time


def load(name: str, *defines: str) -> ctypes.CDLL | None:
    """The kernels of <name>.cpp, compiled with `defines` (NAME=VALUE each), or None where they are switched off or
    cannot be built (said once, on stderr). Raises ValueError if LLAMAGEN_NATIVE wants units that are not there."""
    if not available():
        return None
    defines = *defines, f"UNITS={units()}"
    with _LOCKS[name, defines]:
        return _load(name, defines)


os.register_at_fork(after_in_child=_LOCKS.clear)  # after a fork the parent goes on with its build, the child has none


def available() -> bool:
    """Whether kernels are wanted and can be compiled here."""
    return os.environ.get("LLAMAGEN_NATIVE") != "0" and _compiler() is not None


def units() -> int:
    """How many of UNITS the kernels may use: those that the processor has, or up to the one that LLAMAGEN_NATIVE names.

    Raises ValueError if it names one that is not there.
    """
    return _units(os.environ.get("LLAMAGEN_NATIVE", "1"))


@functools.cache
def _units(wanted: str) -> int:
    if wanted == "0":
        return 0
    if wanted not in ("", "1", *UNITS):
        raise ValueError(f"LLAMAGEN_NATIVE={wanted}: give 0 (PyTorch's kernels), 1 (the C++ kernels as the processor "
                         f"runs them best) or {', '.join(UNITS)} (with these instructions)")
    flags, has, refused = cpu().split(), [], ""
    for name, flag in UNITS.items():
        if flag not in flags:
            break
        if name == "amx" and (error := _tiles_refused()):
            refused = f", but Linux does not give this process the registers of AMX ({error})"
            break
        has.append(name)
        if name == wanted:
            return len(has)
    if wanted in UNITS:
        raise ValueError(f"LLAMAGEN_NATIVE={wanted}: the processor has {few(has) or 'none of these'}{refused}, as far "
                         "as is known here")
    return len(has)


def _tiles_refused() -> str:
    """Ask Linux for the registers of AMX, which it gives to processes that ask; why it refuses, "" if it does not."""
    arch_prctl, ask_for, tiles = 158, 0x1023, 18
    if ctypes.CDLL(None, use_errno=True).syscall(*map(ctypes.c_long, (arch_prctl, ask_for, tiles))) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def prepare(*kernels: tuple[str, ...]) -> None:
    """Begin, in the background, to build what `load` will be asked for; only `load` waits for the build to end. Raises
    ValueError as `load` does."""
    units()
    for arguments in kernels:
        threading.Thread(target=load, args=arguments, daemon=True).start()


def pointer(x: Tensor | None) -> int | None:
    """Where a contiguous CPU tensor's values begin, for an argument or field declared as c_void_p."""
    if x is None:
        return None
    assert x.is_contiguous() and x.is_cpu, (x.shape, x.stride(), x.device)
    return x.data_ptr()


@functools.cache
def _compiler() -> str | None:
    found = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")))), None)
    if found is None:
        _say("no C++ compiler found (g++, clang++ or $CXX): PyTorch's kernels do the work, which are slower")
    return found


@functools.cache
def _load(name: str, defines: tuple[str, ...]) -> ctypes.CDLL | None:
    compiler, problem = _compiler(), None
    for parent in cache_folder, own_temporary_folder:
        try:
            folder = parent() / "native"
            path = _built(name, compiler, [f"-D{define}" for define in defines], folder)
            if path.stat().st_uid not in (os.getuid(), 0):
                raise PermissionError(f"{path} belongs to another user")
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # such as a truncated file
                path.unlink()
                return ctypes.CDLL(str(_built(name, compiler, [f"-D{define}" for define in defines], folder)))
        except (OSError, subprocess.CalledProcessError) as error:
            problem = error
    _say(f"the C++ kernels could not be built with {compiler}: PyTorch's kernels do the work, which are slower "
         f"({first_error(problem)})")
    return None


@functools.cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _built(name: str, compiler: str, defines: list[str], folder: Path) -> Path:
    """The shared library of <name>.cpp in `folder`, named by all it depends on; built where it is missing."""
    texts = [path.read_bytes() for path in (SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h")))]
    defines = [*defines, f"-DTEAM=team_{hashlib.sha256((SOURCES / 'team.h').read_bytes()).hexdigest()[:16]}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    failure, vectors = None, ()  # compilers use 512 bits only where they are asked to
    if "avx512f" in cpu().split():
        vectors = ("-mno-avx512f",) if "-DUNITS=1" in defines else ("-mprefer-vector-width=512",)
    for tuning in TUNINGS:
        tuning = *tuning, *(vectors if tuning else ())
        parts = [*texts, version, " ".join([*FLAGS, *tuning, *defines]).encode(), cpu().encode()]
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        library = folder / f"{name}-{key}.so"
        if not library.is_file():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                _compile([compiler, *FLAGS, *tuning, *defines, str(SOURCES / f"{name}.cpp")], library)
            except subprocess.CalledProcessError as error:
                failure = failure or error
                continue
        if failure is not None:
            _say(f"{compiler} {' '.join(TUNINGS[0])} failed ({first_error(failure)}): the C++ kernels of {name}.cpp "
                 f"were compiled for any {platform.machine()} processor, and are slower")
        return library
    raise failure


def first_error(error: Exception) -> str:
    """What a failure says first: of a compiler's many words, its first error."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [str(error)]
    return next((line for line in lines if "error:" in line), lines[0])


def _compile(command: list[str], library: Path) -> None:
    """Run the compiler; what it makes becomes `library` if all went well. Raises CalledProcessError.

    However this process ends, the compiler ends with it and leaves no file: see COMPILE.
    """
    temporary = library.with_name(f".{library.name}.{secrets.token_hex(4)}.tmp")
    ends_with_us, ours = os.pipe()
    try:
        subprocess.run(["sh", "-c", COMPILE, temporary, library, *command], stdin=ends_with_us, capture_output=True,
                       text=True, check=True, start_new_session=True)
    finally:
        os.close(ends_with_us)
        os.close(ours)


@functools.cache
def cpu() -> str:
    """The CPU's model and features, which decide what -march=native means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(next((line for line in lines if line.startswith(key)), "")
                       for key in ("model name", "flags", "Features"))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
