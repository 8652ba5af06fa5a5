"""Exponential moving average of a model's weights."""
import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Averages of a model's trainable parameters, spread over processes as they are. Buffers stay the model's own.

    Decay ramps up as (1 + n) / (10 + n) until it reaches `decay`, so that short runs do not keep their random start.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999) -> None:
        self.decay, self.model = decay, model
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after optimizer step number `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.averages.values()), list(self.parameters.values()), weight)

    def restart(self, names: Iterable[str] | None = None) -> None:
        """Begin again at the model's weights, with all averages or some."""
        chosen = list(self.averages if names is None else names)
        copy_all([self.averages[name] for name in chosen], [self.parameters[name] for name in chosen])

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the model holds its averages. Its own weights wait beside them."""
        kept = [p.detach().clone() for p in self.parameters.values()]
        copy_all(self.parameters.values(), self.averages.values())
        try:
            yield
        finally:
            copy_all(self.parameters.values(), kept)


@torch.no_grad()
def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensor by tensor (the foreach form knows no sharded ones)."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
