"""Keys and values of the tokens seen so far, in one preallocated block per layer."""
import torch
from torch import Tensor


class KVCache:
    """Static caches, per layer keys and values (rows, KV heads, capacity, K); each row has its own number of tokens.

    `place` says where a step's tokens go; `update` is what the layers call.
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, capacity: int, head_dim: int, *, device: torch.device,
                 dtype: torch.dtype) -> None:
        shape = (rows, kv_heads, capacity, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.rows, self.capacity = rows, capacity
        self.used, self.end, self.slots = slice(0, rows), 0, None

    def place(self, slots: Tensor | int, *, rows: slice, end: int) -> None:
        """The next step writes at `slots` (R, T), or from the slot `slots` on, of `rows`, and reads up to `end`."""
        self.used, self.end, self.slots = rows, end, slots

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (R, KV heads, T, K) of one layer; return its keys and values (R, KV heads, end, K)."""
        keys, values = self.keys[layer][self.used], self.values[layer][self.used]
        if isinstance(self.slots, int):
            keys[:, :, self.slots:self.slots + k.shape[2]] = k
            values[:, :, self.slots:self.slots + k.shape[2]] = v
        else:
            index = self.slots[:, None, :, None].expand(k.shape)
            keys.scatter_(2, index, k.to(keys.dtype))
            values.scatter_(2, index, v.to(values.dtype))
        return keys[:, :, :self.end], values[:, :, :self.end]

    def copy_row(self, source: int, target: int, *, length: int) -> None:
        """Let row `target` begin with the `length` first tokens of row `source`."""
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]
