"""Which classes and functions a pickle names, found out without loading it: nothing is imported or run.

Readers refuse pickles of strangers that name anything but tensors and plain values; this is what they can say then.
"""
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils.files import few, first_line, plain, what_it_is

HARMLESS = re.compile(r"""(torch\.(\w+Storage|Size|device|Tensor|(b?float|u?int|complex|bool|half|q)\w*)
    |torch\.(_utils|_tensor|storage|nn\.parameter)\.\w+ |torch\.serialization\._get_layout
    |collections\.(OrderedDict|defaultdict|Counter)
    |numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.(multiarray|numeric)\.\w+) |_codecs\.encode |argparse\.Namespace
    |copyreg\._reconstructor |builtins\.(object|set|frozenset|complex|slice|range|bytearray)
    |pytorch_lightning\.callbacks\.model_checkpoint\.ModelCheckpoint)""", re.VERBOSE)
SAME_AS = {"posix": "os", "nt": "os", "__builtin__": "builtins", "copy_reg": "copyreg"}
MOST_PICKLES = 8  # of a file: torch's old format has five, one after the other
LONGEST_NAME = 100
PROTOCOL = b"\x80"
TEXT_OPS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING"}


def suspicious_names(path: Path) -> list[str]:
    """"module.name" of all but tensors and plain values that a file written by torch or pickle names, each once."""
    found: dict[str, None] = {}
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                found |= dict.fromkeys(names_in_pickles(file))
            else:
                with zipfile.ZipFile(file) as archive:
                    for name in archive.namelist():
                        if name.endswith((".pkl", ".npy")):
                            found |= dict.fromkeys(names_in_pickles(archive.open(name)))
    except (OSError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error):
        pass  # it is damaged: what was found till there counts
    return list(found)


def names_in_pickles(file: IO[bytes]) -> list[str]:
    """The same of the pickles that follow one another from a file's position on, as far as they can be read."""
    found: dict[str, None] = {}
    if not skip_header_of_array(file):
        return []
    for _ in range(MOST_PICKLES):
        start, names = file.read(1), []
        file.seek(-len(start), 1)
        try:
            for module, name in _globals(file):
                full = f"{SAME_AS.get(module, module)}.{name}"
                if not HARMLESS.fullmatch(full):
                    names.append(plain(full[:LONGEST_NAME]))
        except (ValueError, LookupError, OSError, EOFError, zipfile.BadZipFile, zlib.error):  # damaged, or no pickle
            if start == PROTOCOL:  # any text could begin as a pickle without this mark does
                found |= dict.fromkeys(names)
            break
        found |= dict.fromkeys(names)
    return list(found)


def skip_header_of_array(file: IO[bytes]) -> bool:
    """Go to where the pickle begins in a .npy file of objects; whether there is one. Other files are left as they are.
    """
    start = file.read(8)
    if start[:6] != b"\x93NUMPY":
        file.seek(-len(start), 1)
        return True
    length = int.from_bytes(file.read(2 if start[6:7] == b"\1" else 4), "little")
    return b"|O'" in file.read(min(length, 2**20))


def _globals(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(module, name) of what one pickle imports. Protocol 4 takes both from the stack, perhaps by way of the memo."""
    stack: list[str | None] = []  # the texts among what was pushed last; None for all else
    memo: dict[int, str | None] = {}
    for op, argument, _ in pickletools.genops(file):
        if op.name in ("GLOBAL", "INST"):
            module, _, name = argument.partition(" ")
            yield module, name
        if op.name == "STACK_GLOBAL":
            name, module = (stack.pop() if stack else None for _ in range(2))
            yield module or "?", name or "?"
        if op.name == "MEMOIZE":
            memo[len(memo)] = stack[-1] if stack else None
        elif op.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else None
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument))
        elif op.stack_after:
            stack.append(argument if op.name in TEXT_OPS else None)


def why_no_array(path: Path, error: Exception) -> str:
    """Why numpy could not read an array from a file: code in it, another kind of file, or what numpy says."""
    names, found = suspicious_names(path), what_it_is(path)
    if names:
        return f"it names {few(names)}, which would run code when loaded"
    return first_line(error) if found is None or found.startswith(("a NumPy", "a zip")) else f"it is {found}"
