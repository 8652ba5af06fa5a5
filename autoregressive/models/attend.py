"""Keys and values of the tokens seen so far, and attention over them for the tokens of a ragged step, in PyTorch."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.models.batch import Batch

BUCKET = {"cpu": 1, "cuda": 64}  # the cache is read up to a multiple of it: few graphs to capture on a GPU


class KVCache:
    """Static caches, per layer keys and values (rows, KV heads, capacity, K).

    `place` says where a step's tokens go and what they see; `write` and `attend` are what the layers call.
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, capacity: int, head_dim: int, *, device: torch.device,
                 dtype: torch.dtype) -> None:
        # Rows of attention and of products: with fewer, on a CPU, the last bits depend on their number.
        self.together, self.least = (8, 16) if device.type == "cpu" else (1, 1)
        self.bucket = BUCKET.get(device.type, 64)
        shape = (-(-rows // self.together) * self.together, kv_heads, -(-capacity // 64) * 64, head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.rows, self.capacity = rows, shape[2]

    def place(self, batch: Batch) -> None:
        """The tokens of the next calls are those that the batch feeds."""
        _, _, row, slot, sees = batch.fed.unbind()
        self.index, self.drafts, self.spoilt = (row, slot), batch.drafts, None
        if batch.fresh:  # a NaN that an earlier sequence left would spread, though its weight is 0
            for cache in (*self.keys, *self.values):
                cache[row[slot == 0]] = 0
        self._see(row, sees, batch, batch.sizes)

    def place_asks(self, batch: Batch) -> None:
        """The tokens of the next calls are queries, one for each ask of the batch."""
        _, _, row, sees = batch.asks.unbind()
        self._see(row, sees, batch, batch.counts)

    def _see(self, row: Tensor, sees: Tensor, batch: Batch, sizes: np.ndarray) -> None:
        rows = batch.rows
        self.end = min(-(-batch.longest // self.bucket) * self.bucket, self.capacity)
        self.rectangles = []  # rows with equally many tokens attend together
        for size in np.unique(sizes[sizes > 0]).tolist():
            chosen = sizes == size
            low = int(rows[chosen].min()) // self.together * self.together
            high = -(-(int(rows[chosen].max()) + 1) // self.together) * self.together
            tokens = slice(0, len(row)) if chosen.all() else torch.from_numpy(
                np.repeat(chosen, sizes).nonzero()[0]).to(row.device)
            whole = np.array_equal(rows[chosen], np.arange(low, high))
            at = None if whole else row[tokens][::size] - low  # where its rows lie among those that are read
            visible = sees[tokens].unflatten(0, (-1, size))  # (R, T)
            if at is not None:
                visible = visible.new_ones(high - low, size).index_copy_(0, at, visible)
            mask = (torch.arange(self.end, device=row.device) < visible[..., None])[:, None]  # (R, 1, T, end)
            self.rectangles.append((tokens, size, slice(low, high), at, mask))

    def filled(self, x: Tensor) -> Tensor:
        """x (n, …) with zeros up to a number of rows with which the bits of a row do not depend on the others."""
        missing = max(self.least - len(x), -len(x) % self.together) if len(x) else 0
        return F.pad(x, (*[0] * (2 * x.ndim - 1), missing))

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store k, v (n, KV heads, K) of one layer.

        Beside drafts, tokens that are not finite are stored as zeros, and `attend` answers them with NaN: a draft that
        turns out wrong would else spread, as 0 * NaN, to tokens that do not see it.
        """
        row, slot = self.index
        if self.drafts:
            self.spoilt = ~(k.isfinite().all(-1) & v.isfinite().all(-1)).all(-1)[:, None, None]  # (n, 1, 1)
            k, v = k.masked_fill(self.spoilt, 0), v.masked_fill(self.spoilt, 0)
        for cache, new in ((self.keys[layer], k), (self.values[layer], v)):
            cache[row, :, slot] = new[:len(row)].to(cache.dtype)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of q (n, H, K) over what a layer has stored → (n, H, K)."""
        keys, values = self.keys[layer], self.values[layer]
        out = torch.zeros_like(q)  # tokens that only fill the step up stay zero
        for tokens, size, rows, at, mask in self.rectangles:
            asked = q[tokens].unflatten(0, (-1, size))  # (R, T, H, K)
            if at is not None:
                asked = asked.new_zeros(len(mask), *asked.shape[1:]).index_copy_(0, at, asked)
            found = attention(asked.transpose(1, 2), keys[rows, :, :self.end], values[rows, :, :self.end], mask)
            found = found.transpose(1, 2)  # (R, T, H, K)
            out[tokens] = (found if at is None else found[at]).flatten(0, 1)
        return out if self.spoilt is None else out.masked_fill(self.spoilt, float("nan"))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of the newest T tokens q (B, H, T, K) over S cached ones, k and v (B, KV heads, S, K).

    mask (B, 1, T, S) bool, True where attended. On a CPU it is two matrix products: the fused kernel splits its sum by
    the number of rows, so that the last bits of an image would depend on the batch it was drawn in; with the products
    they do not (tests/autoregressive/models/test_jacobi.py).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, KV heads, H / KV heads, T, K)
    scores = grouped.flatten(2, 3) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, KV heads, group*T, S)
    scores = scores.float().unflatten(2, grouped.shape[2:4]).masked_fill(~mask[:, None], float("-inf"))
    weights = scores.softmax(-1).type_as(v)
    return (weights.flatten(2, 3) @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)  # (B, H, T, K)
