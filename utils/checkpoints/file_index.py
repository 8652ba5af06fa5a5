"""The index of a checkpoint that lies in several files, in Hugging Face's layout.

    model.safetensors.index.json          {"weight_map": {tensor: file, …}}
    model-00001-of-00002.safetensors …    the tensors (or pytorch_model-….bin beside pytorch_model.bin.index.json)
"""
import json
import re
from collections.abc import Collection
from pathlib import Path

from utils.files import exists, few, first_line, names_in, what_it_is

INDEX_END, IS_PART = ".index.json", re.compile(r"-\d{5}-of-\d{5}\.\w+$")


def index_of(folder: Path) -> Path | None:
    """The index of a checkpoint in several files in a folder, that of safetensors first; None if there is none."""
    names = sorted((name for name in names_in(folder) if name.endswith(INDEX_END)),
                   key=lambda name: "safetensors" not in name)
    return folder / names[0] if names else None


def homes_of(index: Path) -> dict[str, str]:
    """{tensor: name of its file, beside the index}, as the index says.

    Raises ValueError for what is no such index, FileNotFoundError where a file is missing.
    """
    try:
        homes = json.loads(index.read_text())["weight_map"]
        sound = bool(homes) and all(isinstance(name, str) for pair in homes.items() for name in pair)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        shown = what_it_is(index)
        shown = first_line(error) if shown is None or shown.startswith("a JSON text") else f"it is {shown}"
        raise ValueError(f"{index} cannot be read as the index of a checkpoint ({shown}): expected "
                         '{"weight_map": {tensor: file}}') from None
    if not sound:
        raise ValueError(f"{index} cannot be read as the index of a checkpoint: its weight_map should give each tensor "
                         "the name of a file")
    for tensor, name in homes.items():  # it may come from a stranger
        if Path(name).name != name or name in ("", "..") or "\0" in name or "\\" in name:
            raise ValueError(f"{index} is refused: it says that {tensor} is in {name!r}, expected a file beside it")
    missing = sorted({name for name in homes.values() if not exists(index.with_name(name))})
    if missing:
        raise FileNotFoundError(f"{index} names {few(missing)}, missing beside it: download the checkpoint again")
    return homes


def index_over(path: Path) -> Path | None:
    """The index of which a file is a part by itself; None: of none."""
    index = index_of(path.parent) if IS_PART.search(path.name) else None
    return index if index is not None and path.name in homes_of(index).values() else None


def check_file(homes: dict[str, str], name: str, found: Collection[str]) -> list[str]:
    """What is wrong with the tensors `found` in the file `name`, in words: missing ones, and those of other files."""
    return ([f"{tensor} is not in {name}" for tensor, home in homes.items() if home == name and tensor not in found]
            + [f"{tensor} is in {name}, expected in {homes.get(tensor, 'no file')}" for tensor in found
               if homes.get(tensor) != name])
