"""What all models over image codes have in common: their grid and its rotary table, first weights, loss, caches."""
import zlib
from collections.abc import Callable
from numbers import Integral
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.args import ModelArgs
from autoregressive.models.attend import KVCache
from autoregressive.models.linear_cross_entropy import linear_cross_entropy
from autoregressive.models.rope import rope_table
from utils.seeding import derive_seed


class CodeModel(nn.Module):
    """A model over the codes of an h x w grid, with a prefix that says what to draw."""

    HEAD: ClassVar[str]  # name of the linear layer that gives the logits
    any_order: ClassVar[bool] = False  # draws cells in any order, many at once; else in raster order
    step_attention = "block"  # of a `DrawSchedule` that does not say
    prefix_at_origin = False  # its tokens turn as the first cell does (see `rope_table`)

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.config = config
        self.control: nn.Module | None = None  # what turns control pictures into something to add: see `control_terms`
        self._rope: dict[torch.device, Tensor] = {}  # not a buffer: the table must stay fp32 and must not be saved

    @torch.no_grad()
    def init_weights(self, seed: int, *, assign: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Draw every matrix from N(0, 0.02^2), the head zero, so that the first loss is ln V; norms start at one,
        biases at zero, a control adapter's last layers where it says.

        A tensor's values depend on (seed, its name) only, and one is drawn at a time, on the CPU: models that are
        spread over processes start from the same weights. `assign(own, values)` copies the values.
        """
        zero = {f"{self.HEAD}.weight"}
        if self.control is not None:
            zero |= {f"control.{name}" for name in self.control.zero_at_start()}
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if name in zero or name.endswith(".bias"):
                values = torch.zeros(tensor.shape)
            elif tensor.ndim < 2:
                values = torch.ones(tensor.shape)
            else:
                stream = torch.Generator().manual_seed(derive_seed(seed, zlib.crc32(name.encode())))
                values = torch.empty(tensor.shape, device="cpu").normal_(std=self.first_std(name), generator=stream)
            assign(tensor, values)

    def first_std(self, name: str) -> float:
        """Standard deviation of a matrix's first values."""
        return self.config.initializer_range

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Change the token grid to (h, w), which no weight depends on."""
        self.config.grid, self.config.block_size = tuple(grid), grid[0] * grid[1]
        self._rope.clear()

    def rope(self, device: torch.device) -> Tensor:
        """The rotary table on `device`, (prefix + L, K/2, 2) fp32."""
        if device not in self._rope:
            config = self.config
            with torch.device("cpu"), torch.inference_mode(False):  # the same bits on every device, usable in training
                table = rope_table(config.grid, config.dim // config.n_head, config.cls_token_num,
                                   base=config.rope_base, prefix_at_origin=self.prefix_at_origin)
                self._rope[device] = table.to(device)
        return self._rope[device]

    def check(self, condition: int | Tensor, visible: Tensor | None) -> None:
        """Raise ValueError for a condition that the model does not take: labels are 0 to num_classes, which is none."""
        config, text = self.config, self.config.model_type == "t2i"
        if not text and not (isinstance(condition, Integral) and 0 <= condition <= config.num_classes):
            raise ValueError(f"class {condition} is out of range: the model has 0 to {config.num_classes - 1} (and "
                             f"{config.num_classes} for none)")
        shape = config.cls_token_num, config.caption_dim
        if text and (not isinstance(condition, Tensor) or condition.shape != shape):
            raise ValueError(f"text features are {tuple(getattr(condition, 'shape', ()))}, the model takes {shape}")
        if visible is not None and visible.shape != (config.cls_token_num,):
            raise ValueError(f"the mask of the prefix is {tuple(visible.shape)}, expected ({config.cls_token_num},)")
        if visible is not None and self.any_order and not visible.any():
            raise ValueError("the mask hides the whole prefix: an ARPG's first codes need a token to see")

    @property
    def control_layers(self) -> list[int]:
        """Before which layers a control picture is added to the tokens; none: it is added to the queries."""
        return []

    def control_terms(self, pictures: Tensor) -> Tensor:
        """What control pictures (B, C, H, W) in [-1, 1] add to the model in each place, (places, B, L, D), cells in
        raster order. Raises ValueError for a model without an adapter, and for pictures of another size than the
        grid's."""
        if self.control is None:
            raise ValueError("the model has no control adapter, so that it takes no control pictures: train it with "
                             "--init-from and --control")
        return self.control(pictures, self.config.grid)

    def kept_control(self, pictures: Tensor, dropped: Tensor | None) -> Tensor:
        """The same for a training batch: zero where the condition is left out, dropped (B,) bool."""
        terms = self.control_terms(pictures)
        return terms if dropped is None else terms.masked_fill(dropped[:, None, None], 0)

    def empty_caches(self, layers: int, rows: int, tokens: int) -> KVCache:
        """Caches of `layers` layers for `rows` rows of `tokens` tokens."""
        config, weight = self.config, next(self.parameters())
        return KVCache(layers, rows, config.n_kv_head, tokens, config.dim // config.n_head,
                       device=weight.device, dtype=weight.dtype)

    def logits_and_loss(self, x: Tensor, targets: Tensor | None, valid: Tensor | None, *,
                        summed_loss: bool) -> tuple[Tensor | None, Tensor | None]:
        """From normed states x (B, n, D): logits (B, n, V) and the mean cross-entropy with targets (B, n) in fp32, None
        without targets; with `summed_loss` (sum of the tokens' losses, sum of their weights), without the logits of all
        at once. valid (B,): 0 for samples that carry no loss."""
        head = self.get_submodule(self.HEAD)
        weight = None if valid is None else valid.float()[:, None].expand(targets.shape).flatten()
        if summed_loss:
            loss = linear_cross_entropy(x.flatten(0, 1), head.weight, targets.flatten(), valid=weight, reduction="sum")
            return loss, loss.new_full((), float(targets.numel())) if weight is None else weight.sum()
        logits = head(x)  # (B, n, V)
        if targets is None:
            return logits, None
        if weight is None:
            return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        per_token = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return logits, (per_token * weight).sum() / weight.sum().clamp_min(1)
