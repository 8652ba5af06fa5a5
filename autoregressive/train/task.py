"""A model over codes in the training loop: the loss of a micro-batch, samples as previews and for an evaluation."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive.models.base import CodeModel
from autoregressive.models.generate import generate, release
from autoregressive.train.conditions import Condition, evenly_spaced
from autoregressive.train.finetune import check_resumed
from dataset.control import to_signed
from evaluations.c2i.image_sets import Batch, ImageSet
from tokenizer.build import ImageTokenizer, decode_images
from utils import dist, images
from utils.seeding import sample_generator
from utils.training import parallel
from utils.training.trainer import Backward

PREVIEW_IMAGES = 16


class GPTTask:
    """The GPT's part of the training loop: loss of a micro-batch, report, preview."""

    def __init__(self, model: nn.Module, condition: Condition, *, dtype: torch.dtype, tokenizer: ImageTokenizer | None,
                 seed: int, token_noise: float, cfg_scale: float,
                 checks: Sequence[Callable[[dict[str, Any], Path], None]] = (),
                 controlled: tuple[np.ndarray, Tensor] | None = None) -> None:
        """`checks`: called with a checkpoint from which the training is to go on, to raise ValueError where that was on
        other codes, say, or with another control adapter; `controlled`: conditions (N,) and control pictures (N, C, H,
        W) uint8 for previews."""
        self.modules = {"model": model}
        config = parallel.unwrap(model).config
        self.token_noise, self.vocab_size, self.sample_weight = token_noise, config.vocab_size, config.block_size
        self.dtype, self.condition, self.tokenizer, self.seed = dtype, condition, tokenizer, seed
        self.cfg_scale, self.checks, self.controlled = cfg_scale, checks, controlled

    def micro_step(self, batch: dict[str, Tensor], *, step: int, backward: Backward) -> dict[str, Tensor]:
        """Cross-entropy of the codes (B, L) given their conditions."""
        codes, more = batch["codes"], self.condition.inputs(batch, dtype=self.dtype)
        if "orders" in batch:
            more["orders"] = batch["orders"]
        if "control" in batch:
            more["control"] = to_signed(batch["control"])
        inputs = corrupt(codes[:, :-1], self.token_noise, vocab_size=self.vocab_size)
        with dist.autocast(codes.device, self.dtype):
            loss, weight = self.modules["model"](inputs, targets=codes, valid=batch.get("valid"),
                                                 dropped=batch["dropped"], summed_loss=True, **more)
        backward("model", loss, weight)
        return {"loss": torch.where(weight > 0, loss / weight, 0.0)}

    def check(self, facts: dict[str, Any], path: Path) -> None:
        """Raise ValueError for a checkpoint of other conditions, codes or control, or of another model."""
        for check in self.checks:
            check(facts, path)
        check_resumed(path, parallel.unwrap(self.modules["model"]).state_dict())

    def report(self) -> dict[str, float]:
        """Nothing: the steps return all there is to log."""
        return {}

    def preview(self, model: CodeModel) -> np.ndarray | None:
        """Samples of evenly spaced conditions, always from the same random streams; with control, below their pictures.
        """
        if self.tokenizer is None:
            return None
        conditions, control = self.controlled or (evenly_spaced(self.condition, PREVIEW_IMAGES), None)
        names = [self.condition.name(condition) for condition in conditions.tolist()]
        try:
            samples = self.sample(model, conditions, range(len(conditions)), control=control)
            if control is not None:
                shown = images.to_uint8(to_signed(control.expand(-1, 3, -1, -1)))
                samples, names = np.concatenate([shown, samples]), names + names
            return images.grid(samples, columns=PREVIEW_IMAGES // 2, labels=names)
        finally:
            release(model)  # its memory is the training's again

    def sample(self, model: CodeModel, conditions: np.ndarray, indices: Iterable[int], *,
               control: Tensor | None = None) -> np.ndarray:
        """Conditions (B,), and the index of each image in the run's stream, control pictures (B, C, H, W) uint8 → uint8
        (B, H, W, 3)."""
        device = next(model.parameters()).device
        control = None if control is None else to_signed(control).to(device)
        codes = generate(model, max_new_tokens=model.config.block_size, cfg_scale=self.cfg_scale, control=control,
                         generators=[sample_generator(self.seed, int(i)) for i in indices],
                         **self.condition.to_draw(conditions, device))
        return images.to_uint8(decode_images(self.tokenizer, codes, model.config.grid))


class SampleStream(ImageSet):
    """The model's samples as an image set, equally many of each condition; made when read and not kept."""

    def __init__(self, task: GPTTask, model: CodeModel, count: int) -> None:
        super().__init__("samples", count, tuple(side * task.tokenizer.downsample for side in model.config.grid))
        self.task, self.model = task, model

    def batches(self, size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Batches of samples; image i is the same on any process."""
        for start in range(rank * size, self.count, size * world_size):
            indices = np.arange(start, min(start + size, self.count))
            yield indices, self.task.sample(self.model, indices % self.task.condition.count, indices)


def corrupt(codes: Tensor, share: float, *, vocab_size: int) -> Tensor:
    """Codes (B, T) with a random `share` of them replaced by codes drawn uniformly."""
    if share <= 0:
        return codes
    replaced = torch.rand(codes.shape, device=codes.device) < share
    return torch.where(replaced, torch.randint_like(codes, vocab_size), codes)
