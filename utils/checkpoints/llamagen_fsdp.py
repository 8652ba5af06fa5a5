"""LlamaGen's FSDP checkpoints: a folder with the whole model, and the optimizer in one file per process.

    0050000/consolidated.pth               a bare state dict; consolidated_ema.pth beside it
    0050000/optimizer.00000-of-00008.pth … AdamW's state dict of each process
    0050000/resume_step.txt                the step

LlamaGen shards by FSDP1 with use_orig_params: a process's moments of a parameter are the 1-D piece of the flattened
parameter that it holds, empty or absent where it holds none. The pieces of all processes, in the order of their ranks,
are the whole; with HYBRID_SHARD the whole comes as many times as there are groups of processes. Parameters are numbered
as in named_parameters(), first those whose name lacks "norm" (with weight decay), then the others.
"""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoints import containers, sharded
from utils.checkpoints.sharded import CONSOLIDATED

AVERAGES, STEP = "consolidated_ema.pth", "resume_step.txt"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Pieces:
    """A tensor of which a file per process holds a 1-D piece; put together when asked for, to save memory."""

    def __init__(self, pieces: Sequence[Tensor], shape: torch.Size) -> None:
        self.pieces, self.shape = pieces, shape

    def whole(self) -> Tensor:
        """The tensor, fp32."""
        return torch.cat([piece.float() for piece in self.pieces])[:self.shape.numel()].view(self.shape)


def folder_of(path: Path) -> Path | None:
    """The folder of this layout that a path means: itself, or that of its consolidated.pth; None: it is none."""
    folder = path.parent if path.name == CONSOLIDATED else path
    return folder if (folder / CONSOLIDATED).is_file() and not sharded.is_sharded(folder) else None


def read_consolidated(folder: Path) -> dict[str, Any]:
    """{"model": …, "ema": … if there, "steps": …}. Raises ValueError where nothing tells the step."""
    content = {"model": containers.weights(containers.read_file(folder / CONSOLIDATED), folder / CONSOLIDATED),
               "steps": step_of(folder)}
    if (folder / AVERAGES).is_file():
        content["ema"] = containers.weights(containers.read_file(folder / AVERAGES), folder / AVERAGES)
    return content


def step_of(folder: Path) -> int:
    """The step: of resume_step.txt, else of the folder's name."""
    written = folder / STEP
    text = written.read_text().strip() if written.is_file() else folder.absolute().name
    if not re.fullmatch(r"\d{1,15}", text):
        why = f"it holds {text[:40]!r}" if written.is_file() else "it is missing, and the folder's name is no number"
        raise ValueError(f"{folder} does not tell its step: write it into {STEP} there ({why}), or take the weights "
                         f"alone by --init-from {folder}")
    return int(text)


def moments(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor | Pieces]:
    """{"<parameter>.<moment>": values} of the parameters `shapes`, in the order of named_parameters().

    Raises ValueError saying why the optimizer cannot be had: files are missing, or their pieces do not add up.
    """
    files = optimizer_files(folder)
    states = [containers.read_file(path) for path in files]
    names = [name for name in shapes if "norm" not in name] + [name for name in shapes if "norm" in name]
    for path, state in zip(files, states, strict=True):
        if [number for group in state.get("param_groups", ()) for number in group["params"]] != list(range(len(names))):
            raise ValueError(f"{path.name} is of another number of parameters than {len(names)}")
    found: dict[str, Tensor | Pieces] = {}
    copies = set()
    for number, name in enumerate(names):
        of_ranks = [state["state"].get(number, {}) for state in states]
        held = [own for own in of_ranks if own]
        for moment in MOMENTS:
            pieces = [own[moment].flatten() for own in held]
            count, rest = divmod(sum(map(len, pieces)), max(1, shapes[name].numel()))
            if rest or not count:
                raise ValueError(f"{moment} of {name} has {sum(map(len, pieces))} values, expected "
                                 f"{shapes[name].numel()}")
            copies.add(count)
            found[f"{name}.{moment}"] = Pieces(pieces, shapes[name])
        found[f"{name}.step"] = torch.as_tensor(held[0]["step"], dtype=torch.float32)
    if len(copies) > 1:
        raise ValueError(f"some parameters are there {min(copies)} times, some {max(copies)} times")
    return found


def optimizer_files(folder: Path) -> list[Path]:
    """The optimizer's files in the order of their ranks. Raises ValueError unless they are all there."""
    ranks = {path: tuple(map(int, match.groups())) for path in folder.iterdir()
             if (match := re.fullmatch(r"optimizer\.(\d+)-of-(\d+)\.pth", path.name))}
    if not ranks:
        raise ValueError("there are no files optimizer.…-of-….pth")
    sizes = {size for _, size in ranks.values()}
    if len(sizes) > 1:
        raise ValueError(f"its optimizer files are of {' and of '.join(map(str, sorted(sizes)))} processes")
    missing = set(range(size := sizes.pop())) - {rank for rank, _ in ranks.values()}
    if missing:
        raise ValueError(f"optimizer.{min(missing):05d}-of-{size:05d}.pth is missing")
    return sorted(ranks, key=lambda path: ranks[path])
