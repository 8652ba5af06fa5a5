"""What tests of trainings share: flags of a short run, its metrics, its last checkpoint, interruptions."""
import torch

from utils.checkpoints import containers, sharded
from utils.training import trainer
from utils.training.logger import read_metrics

OFTEN = ["--ema", "--lr", 1e-3, "--lr-schedule", "cosine", "--warmup-steps", 3, "--global-batch-size", 8, "--epochs", 2,
         "--ckpt-every", 4, "--log-every", 3]  # 36 images: 4.5 steps an epoch, 9 in all; rows do not meet checkpoints


def rows(folder) -> list[dict]:
    """The metrics of a run."""
    return read_metrics(folder / "metrics.jsonl")


def same(a, b) -> bool:
    """Whether two nested checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def last(folder) -> dict:
    """All that the newest checkpoint of a run holds but the flags, which name folders."""
    content = sharded.read_folder(containers.newest(folder / "checkpoints"), optimizers=True)
    del content["flags"]
    return content


def interrupt(monkeypatch, at: int):
    """Press Ctrl-C in the middle of step `at` (1-based)."""
    step = trainer.Trainer.optimizer_step

    def stopped(self, batches):
        if self.step == at - 1:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", stopped)
