"""What shapes a GPT: its fields, and the sizes by name (LlamaGen, arXiv 2406.06525, table 3)."""
import math
from dataclasses import dataclass
from typing import Literal


def find_multiple(n: int, k: int) -> int:
    """The smallest multiple of k that is not below n."""
    return k * -(-n // k)


@dataclass
class ModelArgs:
    """Everything that shapes a GPT. `grid` (h, w) wins over `block_size`, which means a square grid."""

    dim: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    initializer_range: float = 0.02

    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0

    model_type: Literal["c2i", "t2i"] = "c2i"
    num_classes: int = 1000
    caption_dim: int = 2048
    class_dropout_prob: float = 0.1
    cls_token_num: int = 1

    vocab_size: int = 16384
    block_size: int = 256
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.dim % self.n_head:
            raise ValueError(f"width {self.dim} is not divisible by {self.n_head} heads")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"{self.n_head} heads cannot share {self.n_kv_head} KV heads: n_head must be a multiple")
        if self.model_type not in ("c2i", "t2i"):
            raise ValueError(f"model_type is {self.model_type!r}, expected c2i or t2i")
        if self.model_type == "c2i" and self.cls_token_num != 1:
            raise ValueError(f"a class is one prefix token, got cls_token_num {self.cls_token_num}")
        if self.grid is None:
            side = math.isqrt(self.block_size)
            if side * side != self.block_size:
                raise ValueError(f"block_size {self.block_size} is no square: give grid=(h, w)")
            self.grid = (side, side)
        self.grid = tuple(self.grid)
        self.block_size = self.grid[0] * self.grid[1]

    @property
    def hidden(self) -> int:
        """Feed-forward width: 8/3 of dim, times ffn_dim_multiplier, rounded up to a multiple of `multiple_of`."""
        return find_multiple(int((self.ffn_dim_multiplier or 1) * int(8 * self.dim / 3)), self.multiple_of)


PRESETS: dict[str, dict[str, int]] = {
    "GPT-S": {"n_layer": 4, "n_head": 2, "dim": 128, "multiple_of": 64},  # trains in minutes on a laptop
    "GPT-B": {"n_layer": 12, "n_head": 12, "dim": 768},  # 111M
    "GPT-L": {"n_layer": 24, "n_head": 16, "dim": 1024},  # 343M
    "GPT-XL": {"n_layer": 36, "n_head": 20, "dim": 1280},  # 775M
    "GPT-XXL": {"n_layer": 48, "n_head": 24, "dim": 1536},  # 1.4B
    "GPT-XXXL": {"n_layer": 48, "n_head": 40, "dim": 2560},  # 3.9B
    "GPT-1B": {"n_layer": 22, "n_head": 32, "dim": 2048},  # 1.2B
    "GPT-3B": {"n_layer": 24, "n_head": 32, "dim": 3200},  # 3.1B
    "GPT-7B": {"n_layer": 32, "n_head": 32, "dim": 4096},  # 6.6B
}
