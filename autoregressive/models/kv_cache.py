"""Keys and values of the tokens seen so far, in one preallocated block for all layers."""
import torch
from torch import Tensor


class KVCache:
    """Static cache: (layers, rows, KV heads, max_tokens, K) for keys and the same for values."""

    def __init__(self, layers: int, rows: int, kv_heads: int, max_tokens: int, head_dim: int, *, device: torch.device,
                 dtype: torch.dtype) -> None:
        shape = (layers, rows, kv_heads, max_tokens, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # tokens that every layer holds; `advance` moves it once a step is through all layers

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (rows, KV heads, T, K) to one layer; return all keys and values up to and with them."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as held."""
        self.length += tokens

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first `rows` rows (views: nothing is copied)."""
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]
