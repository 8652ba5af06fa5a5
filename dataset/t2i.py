"""Captioned pictures, from any of the layouts that people have. Every layout gives the same: `Pairs`.

    pairs = open_pairs("/data/laion")
    pairs.image(0), pairs.captions(0), pairs.name(0)      # RGB picture, (long, short or None), "part-0.jsonl:17"

What --data-path may be:

1. LlamaGen's: a folder of *.jsonl, or one such file. A line is a JSON object:

       {"image_path": "images/0001.jpg", "text": ["a cat", "A grey cat sleeps on a red sofa near a window."]}

   `text` is a list, the short caption (BLIP's) first, the long one (LLaVA's) second; or one string, the long caption.
   A relative image_path is looked for below the folder of the .jsonl, then below the working directory. Instead of
   image_path also image, file_name (Hugging Face's metadata.jsonl), file, path, …; instead of text caption, prompt,
   title; short_caption may be given apart. Lines are counted from 0, as LlamaGen counts them: "part-0.jsonl:17".

2. A table: a .csv or .tsv file, or a folder with exactly one. The first line names the columns, by the same words:

       file,caption,short_caption
       images/0001.jpg,"A grey cat sleeps, curled up, on a sofa.",a cat

3. Plain: a folder with pictures at any depth, each beside a .txt of the same stem that holds its caption (UTF-8):

       cats/0001.jpg   cats/0001.txt

4. Tar archives as img2dataset writes them (WebDataset): a folder of *.tar, one, `{00000..00009}.tar`, or several with
   commas between; here, or at a URL (s3://…, https://…; a pattern or, where the server can list, a folder):

       000000000.jpg  000000000.txt  000000000.json     # the caption: .txt, else "caption", "text", … of .json

5. `--dataset emoji` (emoji_heldout, …): the embedded emoji with their names, without --data-path.

Not used, but counted by kind, told, and never replaced by a blank: broken lines, lines without a picture or caption,
empty captions, captions without a picture, names that occur twice, damaged archives (what is whole in them is used),
pictures that are missing, cannot be read, or are too small. Absolute paths and `..` in your own lists mean what they
say; links and devices in archives are passed over. `python3 dataset/check_pairs.py --data-path …` counts all of it.

Memory: 24 bytes a pair for .jsonl and tables, 28 for archives, memory-mapped from the cache (50 million: 1.2 and 1.4
GB). Plain pairs are listed anew at each start, all their .txt files read, and their names are held in memory: for
millions take archives.
"""
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dataset.image_folders import existing_folder, is_hidden
from dataset.pair_cache import list_remote, remote_state
from dataset.pair_index import THREADS, Source
from dataset.pairs import DAMAGED_FILE, Pairs, Problems
from dataset.pairs_lines import LinePairs
from dataset.pairs_plain import PlainPairs
from dataset.pairs_tar import TarPairs
from dataset.pictures import PictureReader
from dataset.remote import is_url
from utils import cli
from utils.files import few

TABLES = (".csv", ".tsv")
MOST_FILES = 10**6  # that a pattern may name


def open_pairs(path: str | Path, *, reader: PictureReader | None = None, smallest: tuple[int, int] = (0, 0),
               part: tuple[int | None, int | None] = (None, None)) -> Pairs:
    """Open captioned pictures of any layout.

    `smallest`: height and width in pixels below which `image` refuses a picture; `part`: the first and the last, both
    included, of the .jsonl files or archives in sorted order; None: from the beginning, to the end.
    Raises FileNotFoundError or ValueError that says what was found instead, also if nothing usable is there.
    """
    path = str(path)
    options = {"reader": reader, "smallest": smallest}
    files, problems = listed_files(path), Problems()
    if files is None:
        refuse_part(part, path)
        return PlainPairs(existing_folder(path), **options).checked(path)
    sources = sources_of(chosen_part(files, part, path), problems)
    kind = TarPairs if file_ending(files[0]) == ".tar" else LinePairs
    pairs = kind(sources, **options)
    pairs.problems.merge(problems.described())
    return pairs.checked(path)


def listed_files(path: str) -> list[str] | None:
    """The .jsonl files, tables or archives that --data-path names, sorted; None for a folder of plain pairs."""
    named = [name for part in path.split(",") for name in expanded(part)] if not os.path.exists(path) else [path]
    folders = [name for name in named if (is_url(name) and file_ending(name) != ".tar") or os.path.isdir(name)]
    if (len(named) > 1 and folders) or not named:
        raise ValueError(f"--data-path {path}: of several paths each should be a file, {few(folders)} is none")
    if folders:
        return files_in(folders[0])
    kinds = {file_ending(name) for name in named}
    if len(kinds) > 1 or not kinds <= {".jsonl", ".tar", *TABLES}:
        raise_missing(named, path)
        raise ValueError(f"--data-path {path}: expected files of one kind, .jsonl, .csv, .tsv or .tar, or a folder; "
                         f"these end in {', '.join(sorted(kinds))}")
    raise_missing(named, path)
    return named


def without_query(name: str) -> str:
    """A URL without what follows "?", which may be a signature; a path as it is."""
    return name.partition("?")[0] if is_url(name) else name


def file_ending(name: str) -> str:
    """".tar" of "x.TAR" and "https://server/x.tar?signature"."""
    return os.path.splitext(without_query(name))[1].lower()


def raise_missing(named: list[str], path: str) -> None:
    """Raise FileNotFoundError if none of the files is there."""
    if not any(is_url(name) or os.path.exists(name) for name in named):
        raise FileNotFoundError(f"--data-path {path}: there is no {few(named, most=2)}")


def files_in(folder: str) -> list[str] | None:
    """What a folder holds: its .jsonl files, else its archives, else its one table; None: neither."""
    if is_url(folder):
        found = list_remote(folder, ".tar")
        if not found:
            raise FileNotFoundError(f"--data-path {folder} holds no *.tar: elsewhere only archives can be read")
        return found
    names = sorted(name for name in os.listdir(existing_folder(folder)) if not is_hidden(name))
    for endings in ((".jsonl",), (".tar",), TABLES):
        found = [os.path.join(folder, name) for name in names if name.lower().endswith(endings)]
        others = [name for name in names if found and name.lower().endswith((".tar", *TABLES)) and
                  not name.lower().endswith(endings)]
        if others:
            cli.warn(f"--data-path {folder}: its *{endings[0]} are read; not {few(others)}", kind="note")
        if endings == TABLES and len(found) > 1:
            raise ValueError(f"--data-path {folder} holds several tables ({few(found)}): give the path of one")
        if found:
            return found
    return None


def expanded(pattern: str) -> list[str]:
    """"{00000..00009}.tar" → its names. Raises ValueError for a pattern that names too many."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern] if pattern else []
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + MOST_FILES:
        raise ValueError(f"--data-path {pattern}: expected {{first..last}}, at most {MOST_FILES} files")
    return [pattern[:found.start()] + f"{number:0{len(found[1])}d}" + pattern[found.end():]
            for number in range(first, last + 1)]


def chosen_part(files: list[str], part: tuple[int | None, int | None], path: str) -> list[str]:
    """The files from --data-start to --data-end, both included."""
    first, last = part[0] or 0, len(files) - 1 if part[1] is None else part[1]
    if not 0 <= first <= last < len(files):
        raise ValueError(f"--data-start {first} --data-end {last}: {path} holds the files 0 to {len(files) - 1}")
    return files[first:last + 1]


def refuse_part(part: tuple[int | None, int | None], path: str) -> None:
    """Raise ValueError where there are no files to choose from."""
    if part != (None, None):
        raise ValueError(f"--data-start and --data-end choose among .jsonl files or archives: {path} has none")


def sources_of(files: list[str], problems: Problems) -> list[Source]:
    """The files with their sizes; those that are not there are counted."""
    files_alone = [without_query(file) for file in files]
    names = [os.path.basename(file) for file in files_alone]
    if len(set(names)) < len(names):  # of several folders
        parts = [file.split("/") for file in files_alone]
        shared = next((i for i, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), 0)
        names = ["/".join(words[shared:]) for words in parts]

    def source_of(file: str, name: str) -> Source | None:
        try:
            if is_url(file):
                return Source(name, file, *remote_state(file))
            state = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Source(name, os.path.abspath(file), state.st_size, str(state.st_mtime_ns))

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(source_of, files, names))
    for name, source in zip(names, found, strict=True):
        if source is None:
            problems.add(DAMAGED_FILE, f"{name}: it is missing")
    return [source for source in found if source is not None]
