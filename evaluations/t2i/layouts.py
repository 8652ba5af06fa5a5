"""Prompts in, pictures out: the files that text-to-image benchmarks give, and the folders that their scorers read.

    prompts = read_prompts("evaluation_metadata.jsonl")
    layout = LAYOUTS[layout_for("evaluation_metadata.jsonl")]("samples", prompts)
    for job in remaining_jobs(layout, process):
        layout.write(job, picture_of(job.prompt.text, job.seed(global_seed)))

Any prompts can be used with any layout that needs no more than they hold. Pictures are uint8 (H, W, 3). Interrupted
work continues: existing pictures are not made again, and a picture does not depend on which process makes it.
"""
import csv
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.emoji import open_emoji
from utils import dist, images
from utils.files import replacing, sweep
from utils.seeding import check_seed, derive_seed


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its benchmark says about it."""

    text: str
    name: str = ""  # DPG-Bench's id
    metadata: dict[str, Any] = field(default_factory=dict)  # GenEval's line


class PromptJob(NamedTuple):
    """A picture to make."""

    prompt: Prompt
    prompt_index: int
    image_index: int

    def seed(self, global_seed: int) -> int:
        """The seed of this picture's random stream, whatever the number of processes and of pictures per prompt."""
        return derive_seed(check_seed(global_seed), self.prompt_index, self.image_index)


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts in their order: a table (.csv, .tsv) with a column Prompt, GenEval's .jsonl, DPG-Bench's folder of .txt;
    or the names of the embedded emoji ("emoji_unseen").

    Raises FileNotFoundError, or ValueError for what is none of these or has a prompt without text.
    """
    path = Path(path)
    if is_emoji(path):
        return [Prompt(caption) for caption in open_emoji(str(path), size=8).captions]
    kind = layout_for(path)
    if not path.exists():
        raise FileNotFoundError(f"no prompts at {path}")
    prompts = {"dpg": read_text_folder, "geneval": read_json_lines, "flat": read_table}[kind](path)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def is_emoji(path: str | Path) -> bool:
    """Whether prompts are asked for by the name of the embedded data set, and no file is called so."""
    return re.fullmatch("emoji(_[a-z]+)?", str(path)) is not None and not Path(path).exists()


def layout_for(path: str | Path) -> str:
    """The layout that the scorer of these prompts expects."""
    path = Path(path)
    return "dpg" if path.is_dir() else "geneval" if path.suffix == ".jsonl" else "flat"


def read_table(path: Path) -> list[Prompt]:
    """coco_captions.csv, PartiPrompts.tsv. Columns end at commas if the header has one, else at tabs: a file with one
    column need not quote its commas.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        delimiter = "," if "," in file.readline() else "\t"
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        header = next(rows, [])
        if "Prompt" not in header:
            raise ValueError(f"{path} has the columns {', '.join(header)[:100]}: expected one called Prompt")
        column = header.index("Prompt")
        prompts = []
        try:
            for row in filter(None, rows):
                where = f"{path}, line {rows.line_num}"
                if not column < len(row) <= len(header):  # short rows are fine: their last columns are empty
                    raise ValueError(f"{where}: {len(row)} columns, the header has {len(header)}")
                prompts.append(Prompt(stripped(row[column], where)))
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error} (is a quote not closed?)") from None
    return prompts


def read_json_lines(path: Path) -> list[Prompt]:
    """GenEval's evaluation_metadata.jsonl: an object with "prompt" on each line."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
        try:
            metadata = json.loads(line)
            text = metadata["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: expected a JSON object with "prompt"') from None
        prompts.append(Prompt(stripped(text, f"{path}, line {number}"), metadata=metadata))
    return prompts


def read_text_folder(path: Path) -> list[Prompt]:
    """DPG-Bench's folder: <id>.txt with one prompt each, sorted by name. Its scorer ends an id at the first dot."""
    files = sorted(path.glob("*.txt"))
    names = [file.name.split(".")[0] for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"{path} holds files that are equal up to the first dot: DPG-Bench takes them for one")
    texts = [" ".join(file.read_text(encoding="utf-8").split()) for file in files]
    return [Prompt(stripped(text, str(file)), name=name)
            for text, file, name in zip(texts, files, names, strict=True)]


def stripped(text: Any, where: str) -> str:
    """A prompt without the space around it. Raises ValueError when nothing is left, or more than one line: captions.txt
    has a line for each, and an unclosed quote would take in the rows after it.
    """
    text = text.strip() if isinstance(text, str) else ""
    if not text:
        raise ValueError(f"{where}: the prompt is empty")
    if "\n" in text or "\r" in text:
        raise ValueError(f"{where}: the prompt goes over several lines (is a quote not closed?)")
    return text


class Layout:
    """A folder of pictures, `count` for each prompt. Raises ValueError for prompts that cannot be laid out so."""

    usual_count = 1

    def __init__(self, folder: str | Path, prompts: list[Prompt], *, images_per_prompt: int | None = None) -> None:
        self.folder, self.prompts = Path(folder), prompts
        self.count = self.usual_count if images_per_prompt is None else images_per_prompt
        if self.count < 1:
            raise ValueError(f"{self.count} images per prompt: at least 1 is needed")

    @property
    def settings_path(self) -> Path:
        """The file that says how the pictures are made, where the scorer does not look."""
        return self.folder / "config.json"

    def begin(self) -> None:
        """Prepare the folder; one process does."""
        raise NotImplementedError

    def path(self, job: PromptJob) -> Path:
        """The file that the picture goes to."""
        raise NotImplementedError

    def write(self, job: PromptJob, image: np.ndarray) -> None:
        """Write a picture, atomically."""
        images.save_png(self.path(job), image)


class FlatLayout(Layout):
    """COCO and PartiPrompts: images/000000.png …, captions.txt and result.jsonl, line i for image i.

    With n pictures per prompt, picture j of prompt p is number p * n + j. Only the prompts asked for are listed.
    """

    def begin(self) -> None:
        """Write what the pictures should show."""
        texts = [prompt.text for prompt in self.prompts for _ in range(self.count)]
        rows = [json.dumps({"text": text, "image_path": f"images/{i:06d}.png"}) for i, text in enumerate(texts)]
        write_lines(self.folder / "captions.txt", texts)
        write_lines(self.folder / "result.jsonl", rows)

    def path(self, job: PromptJob) -> Path:
        """images/<number>.png"""
        return self.folder / "images" / f"{job.prompt_index * self.count + job.image_index:06d}.png"


class GenEvalLayout(Layout):
    """GenEval (arXiv 2310.11513): 00000/metadata.jsonl, one JSON object, and 00000/samples/00000.png … per prompt.

    The grid.png of its own generator is not written: its scorer does not read it.
    """

    usual_count = 4

    def __init__(self, folder: str | Path, prompts: list[Prompt], *, images_per_prompt: int | None = None) -> None:
        super().__init__(folder, prompts, images_per_prompt=images_per_prompt)
        if not all("tag" in prompt.metadata for prompt in self.prompts):
            raise ValueError('the GenEval layout needs prompts with "tag": give its evaluation_metadata.jsonl')

    def begin(self) -> None:
        """Write what the scorer should look for in each picture."""
        for index, prompt in enumerate(self.prompts):
            write_lines(self.folder / f"{index:05d}" / "metadata.jsonl", [json.dumps(prompt.metadata)])

    def path(self, job: PromptJob) -> Path:
        """<prompt>/samples/<picture>.png"""
        return self.folder / f"{job.prompt_index:05d}" / "samples" / f"{job.image_index:05d}.png"


class DPGLayout(Layout):
    """DPG-Bench (arXiv 2403.05135): <id>.png, four pictures in one: top left, top right, bottom left, bottom right.

    The scorer lists every file of the folder, so nothing else is in it: finished tiles wait in memory, and up to three
    are made again after an interruption. Start the scorer with --resolution of one tile, --pic-num 4, and
    --res-path elsewhere.
    """

    usual_count = 4

    def __init__(self, folder: str | Path, prompts: list[Prompt], *, images_per_prompt: int | None = None) -> None:
        super().__init__(folder, prompts, images_per_prompt=images_per_prompt)
        self.tiles: dict[int, dict[int, np.ndarray]] = {}  # by prompt and picture
        if self.count != 4:
            raise ValueError(f"{self.count} images per prompt: DPG-Bench's grids have 4")
        if not all(prompt.name for prompt in self.prompts):
            raise ValueError("the DPG-Bench layout needs prompts with ids: give its folder of <id>.txt")

    @property
    def settings_path(self) -> Path:
        """A file beside the folder: inside, the scorer would take it for a picture."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def begin(self) -> None:
        """Remove what a killed writer left: the scorer would take it for a picture."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)

    def path(self, job: PromptJob) -> Path:
        """<id>.png, of all four pictures."""
        return self.folder / f"{job.prompt.name}.png"

    def write(self, job: PromptJob, image: np.ndarray) -> None:
        """Keep a tile; with the fourth one, write the grid."""
        tiles = self.tiles.setdefault(job.prompt_index, {})
        tiles[job.image_index] = image
        if len(tiles) == self.count:
            images.save_png(self.path(job), images.grid(np.stack([tiles[i] for i in range(4)]), columns=2, gap=0))
            del self.tiles[job.prompt_index]


LAYOUTS = {"flat": FlatLayout, "geneval": GenEvalLayout, "dpg": DPGLayout}


def remaining_jobs(layout: Layout, process: dist.Process) -> list[PromptJob]:
    """The pictures that this process should still make, prompt by prompt. All processes must call it together.

    The first process prepares the folder and looks which pictures exist. All pictures of a prompt go to one process.
    """
    missing: dict[int, list[int]] = {}
    if process.is_main:
        layout.begin()
        for index, prompt in enumerate(layout.prompts):
            absent = [j for j in range(layout.count) if not layout.path(PromptJob(prompt, index, j)).exists()]
            if absent:
                missing[index] = absent
    missing = dist.broadcast_object(missing)
    mine = list(missing.items())[process.rank::process.world_size]
    return [PromptJob(layout.prompts[index], index, j) for index, absent in mine for j in absent]


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
