"""A small model with a second stream of queries, as ARPG has it (arXiv 2503.10568): any order, many codes at once."""
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from autoregressive.models.attend import KVCache
from autoregressive.models.batch import Batch
from autoregressive.models.blocks import AttentionParts, FeedForward, FeedForwardParts, Parts, RMSNorm, TransformerBlock
from autoregressive.models.gpt import ModelArgs
from autoregressive.models.rope import apply_rope, rope_table
from tests.autoregressive.models.test_gpt import V


class CrossBlock(nn.Module):
    """Queries attend shared keys and values, then a feed-forward layer."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_head
        self.to_q, self.proj = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(2))
        self.attention_norm, self.ffn_norm = RMSNorm(config.dim), RMSNorm(config.dim)
        self.feed_forward = FeedForward(config.dim, config.hidden, dropout=0.0)

    def forward(self, y: Tensor, rope: Tensor, attend) -> Tensor:
        """y (n, D) → (n, D); attend(q (n, H, K)) → (n, H, K)."""
        q = apply_rope(self.to_q(self.attention_norm(y))[None].unflatten(-1, (-1, self.head_dim)), rope)[0]
        y = y + self.proj(attend(q).flatten(1))
        return y + self.feed_forward(y[None], self.ffn_norm)[0]

    def parts(self) -> tuple[AttentionParts, FeedForwardParts]:
        """As the kernels take it."""
        ffn = self.feed_forward
        return (AttentionParts(self.attention_norm, (self.to_q, 0), None, None, self.proj),
                FeedForwardParts(self.ffn_norm, ffn.w1, ffn.w3, ffn.w2))


class TwoStreams(nn.Module):
    """Two layers of content, two of queries."""

    def __init__(self, grid: tuple[int, int], *, n_kv_head: int = 4) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.config = ModelArgs(dim=48, n_layer=2, n_head=4, n_kv_head=n_kv_head, multiple_of=16, num_classes=3,
                                vocab_size=V, grid=grid)
        D, kv = 48, 12 * n_kv_head
        self.table = nn.Embedding(V + 5, D)  # codes, the query, classes, no class
        self.layers = nn.ModuleList(TransformerBlock(self.config, 0.0) for _ in range(2))
        self.shared_norm, self.to_k, self.to_v = RMSNorm(D), nn.Linear(D, kv, bias=False), nn.Linear(D, kv, bias=False)
        self.queries = nn.ModuleList(CrossBlock(self.config) for _ in range(2))
        self.norm, self.output = RMSNorm(D), nn.Linear(D, V, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.2)
        self.eval().requires_grad_(False)

    def rope(self, device: torch.device) -> Tensor:
        return rope_table(self.config.grid, 12, 1).to(device)

    def embed(self, codes: Tensor) -> Tensor:
        return self.table(codes)

    def check(self, condition: int, visible: None) -> None:
        pass

    def prefix(self, conditions: list[int]) -> tuple[Tensor, Tensor]:
        rows = self.table(torch.tensor([*conditions, 3]) + V + 1)[:, None]
        return rows[:-1], rows[-1]

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        weight = self.table.weight
        return KVCache(3, rows, self.config.n_kv_head, tokens, 12, device=weight.device, dtype=weight.dtype)

    def decode(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        table = self.rope(x.device)
        rope = table[cache.filled(batch.fed[1])]
        x = x[None]
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, cache, None, i)
        cache.write(2, *self.keys_and_values(x[0], rope))
        cache.place_asks(batch)
        rope = table[cache.filled(batch.asks[1])]
        y = self.table.weight[V].expand(len(rope), -1)
        for layer in self.queries:
            y = layer(y, rope, lambda q: cache.attend(2, q))
        return self.output(self.norm(y))[:batch.asks.shape[1]]

    def keys_and_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        z = self.shared_norm(x)
        k, v = (linear(z).unflatten(-1, (-1, 12)) for linear in (self.to_k, self.to_v))
        return apply_rope(k[None], rope)[0], v

    def parts(self) -> Parts:
        shared = AttentionParts(self.shared_norm, None, (self.to_k, 0), (self.to_v, 0), None)
        return Parts([layer.parts() for layer in self.layers], self.norm, self.output, shared,
                     tuple(layer.parts() for layer in self.queries), self.table.weight[V])


def plain_codes(model: TwoStreams, label: int, plan: SimpleNamespace, choose) -> list[int]:
    """Codes of one image by whole forwards without a cache: plan.order, plan.sizes, plan.scales, plan.known (codes).

    choose(logits (V,), cell) → code.
    """
    table, done = model.rope(torch.device("cpu")), len(plan.known)
    codes = dict(zip(plan.order, plan.known, strict=False))
    seen_by = [1, *[1 + done] * done]  # how much each token sees: the class itself, a group its end
    for size in plan.sizes:
        group, logits = plan.order[done:done + size], []
        for row in (label, 3):
            tokens = torch.tensor([V + 1 + row, *(codes[cell] for cell in plan.order[:done])])
            rope = table[torch.tensor([0, *(1 + cell for cell in plan.order[:done])])]
            mask = torch.arange(len(tokens))[None] < torch.tensor(seen_by)[:, None]
            x = model.table(tokens)[None]
            for layer in model.layers:
                x = layer(x, rope, None, mask[None, None])
            k, v = (part.repeat_interleave(4 // part.shape[1], 1) for part in model.keys_and_values(x[0], rope))
            y, places = model.table.weight[V].expand(size, -1), table[torch.tensor(group) + 1]
            for layer in model.queries:
                y = layer(y, places, lambda q, k=k, v=v: torch.einsum(
                    "hts,shk->thk", (torch.einsum("thk,shk->hts", q, k) * 12**-0.5).softmax(-1), v))
            logits.append(model.output(model.norm(y)))
        for i, cell in enumerate(group):
            scale = plan.scales[done + i]
            codes[cell] = choose(logits[1][i] + scale * (logits[0][i] - logits[1][i]) if scale > 1 else logits[0][i],
                                 cell)
        done += size
        seen_by += [1 + done] * size
    return [codes[cell] for cell in range(len(plan.order))]
