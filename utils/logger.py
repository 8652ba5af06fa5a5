"""What a run leaves to read: console lines, metrics.jsonl and TensorBoard, all from the same numbers."""
import json
from pathlib import Path

import numpy as np

from utils.checkpoint import replacing


class MetricsLogger:
    """Writes on rank 0 only (`enabled`). A resumed run drops rows from its start step on, then goes on from there."""

    def __init__(self, folder: Path, *, enabled: bool, start_step: int = 0) -> None:
        self.enabled = enabled
        self.path = folder / "metrics.jsonl"
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(self.path) if row["step"] <= start_step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.board = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One row: the step and its numbers."""
        if not self.enabled:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A uint8 (H, W, 3) picture for TensorBoard."""
        if self.enabled:
            self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard."""
        if self.enabled:
            self.board.close()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, one for each step; a last line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if rows and rows[-1]["step"] == row["step"]:
            rows[-1] |= row
        else:
            rows.append(row)
    return rows
