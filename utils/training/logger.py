"""What a run leaves to read: metrics.jsonl, TensorBoard and, on request, Weights & Biases, all from the same numbers.

metrics.jsonl holds what a repeated run repeats to the last bit; what hangs on the clock is in speed.jsonl beside it.
"""
import json
import secrets
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import replacing


class MetricsLogger:
    """Writes on rank 0 only (`enabled`). A resumed run drops rows after its start step, then goes on from there."""

    def __init__(self, folder: Path, *, enabled: bool, start_step: int = 0, wandb_project: str | None = None,
                 config: dict[str, Any] | None = None) -> None:
        self.folder, self.enabled, self.start_step = folder, enabled, start_step
        self.wandb_project, self.config = wandb_project, config
        self.board: Any = None
        self.wandb: Any = None

    def open(self) -> None:
        """Begin to write. Nothing is touched before."""
        if not self.enabled or self.board is not None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "speed.jsonl"):
            kept = [line + "\n" for line in read_lines(self.folder / name)
                    if json.loads(line)["step"] <= self.start_step]
            with replacing(self.folder / name) as temporary:
                temporary.write_text("".join(kept))
        self.board = SummaryWriter(self.folder / "tensorboard", purge_step=self.start_step + 1)
        if self.wandb_project:
            import wandb
            try:
                self.wandb = wandb.init(project=self.wandb_project, name=self.folder.name, config=self.config,
                                        dir=self.folder, id=self.wandb_id(), resume="allow")
            except wandb.Error as error:
                raise ValueError(f"--wandb-project {self.wandb_project}: {error}") from None

    def wandb_id(self) -> str:
        """What Weights & Biases knows this run by, kept beside it: a resumed run goes on in the same curves."""
        path = self.folder / "wandb_id.txt"
        if self.start_step == 0 or not path.is_file():
            with replacing(path) as temporary:
                temporary.write_text(secrets.token_hex(8))
        return path.read_text().strip()

    def rows_of(self, step: int) -> int:
        """How many rows of a step metrics.jsonl has."""
        return sum(json.loads(line)["step"] == step for line in read_lines(self.folder / "metrics.jsonl"))

    def log(self, step: int, values: dict[str, float], *, clock: dict[str, float] | None = None) -> None:
        """One row: the step and its numbers; `clock`: those that another run would not repeat."""
        self.open()
        if not self.enabled:
            return
        for name, row in (("metrics.jsonl", values), ("speed.jsonl", clock)):
            if row:
                with open(self.folder / name, "a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
        both = {**values, **(clock or {})}
        for name, value in both.items():
            self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(both, step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 (H, W, 3) picture for TensorBoard."""
        self.open()
        if self.enabled:
            self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def read_lines(path: Path) -> list[str]:
    """The whole lines of a .jsonl file; a last one cut short by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            json.loads(line)
        except json.JSONDecodeError:
            break
        lines.append(line)
    return lines


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one for each step."""
    rows: list[dict] = []
    for row in map(json.loads, read_lines(path)):
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows
