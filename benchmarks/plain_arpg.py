"""Sampling as ARPG's code does it, in our words: what bench_arpg.py compares with. Only benchmarks run this.

It draws from the same distribution as ours. What it does on the way, and why it is slow:
- keys and values grow by concatenation: every step copies the whole cache of every layer;
- every call copies the rotary table for each row, every layer rotates queries and keys by a chain of small operations;
- q, k, v and both halves of SwiGLU are products of their own; the first query, always the same, is computed for each
  cell that is asked for;
- both rows of guidance are computed from the first step to the last, at any scale.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.arpg import ARPG, ARPGArgs
from autoregressive.models.rope import rope_table
from autoregressive.models.schedule import DrawSchedule
from benchmarks.bench_train import PlainFeedForward, PlainNorm, plain_rotation


class PlainARPGAttention(nn.Module):
    """Attention with a projection each, over keys and values that grow."""

    def __init__(self, config: ARPGArgs, *, stores: bool) -> None:
        super().__init__()
        self.head_dim = config.dim // config.n_head
        self.to_q, self.proj = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(2))
        if stores:
            self.to_k, self.to_v = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(2))
        self.keys = self.values = None

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, H, K)."""
        return x.view(*x.shape[:2], -1, self.head_dim)

    def forward(self, x: Tensor, table: Tensor, shared: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (B, T, D) with its rotary rows (T, K/2, 2); `shared`: keys and values (B, H, S, K), else its own."""
        q = plain_rotation(self.heads(self.to_q(x)), table).transpose(1, 2)
        if shared is None:
            k = plain_rotation(self.heads(self.to_k(x)), table).transpose(1, 2)
            v = self.heads(self.to_v(x)).transpose(1, 2)
            self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
            self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
            shared = self.keys, self.values
        out = F.scaled_dot_product_attention(q, *shared)
        return self.proj(out.transpose(1, 2).contiguous().view(x.shape))


class PlainARPGBlock(nn.Module):
    """Attention and feed-forward with their norms."""

    def __init__(self, config: ARPGArgs, *, stores: bool) -> None:
        super().__init__()
        self.attn, self.ffn = PlainARPGAttention(config, stores=stores), PlainFeedForward(config)
        self.attn_norm, self.ffn_norm = (PlainNorm(config.dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor, shared: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x = x + self.attn(self.attn_norm(x), table, shared)
        return x + self.ffn(self.ffn_norm(x))


class PlainARPG(nn.Module):
    """The ARPG `model`, computed in this way with the same parameters (not copies)."""

    def __init__(self, model: ARPG) -> None:
        super().__init__()
        self.config = config = model.config
        with torch.device("meta"):
            self.embeddings = nn.Embedding(config.vocab_size + config.num_classes + 3, config.dim)
            self.layers = nn.Module()
            self.layers.self_dec = nn.ModuleList(PlainARPGBlock(config, stores=True) for _ in range(config.n_layer))
            self.layers.cross_dec = nn.ModuleList(
                PlainARPGBlock(config, stores=False) for _ in range(config.n_query_layer))
            self.layers.norm, self.norm = (PlainNorm(config.dim, config.norm_eps) for _ in range(2))
            self.layers.to_k, self.layers.to_v = (nn.Linear(config.dim, config.dim, bias=False) for _ in range(2))
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.load_state_dict(model.state_dict(), assign=True)
        self.eval()

    def setup_caches(self) -> None:
        """Nothing is cached yet."""
        for layer in self.layers.self_dec:
            layer.attn.keys = layer.attn.values = None
        self.keys = self.values = None

    def forward(self, tokens: Tensor, fed: Tensor, asked: Tensor) -> Tensor:
        """Rows of the embedding table (B, n) with rotary rows `fed` (n, K/2, 2); logits (B, c, V) fp32 of the cells
        with rotary rows `asked` (c, K/2, 2)."""
        x, layers = self.embeddings(tokens), self.layers
        for layer in layers.self_dec:
            x = layer(x, fed)
        x = layers.norm(x)
        heads = layers.self_dec[0].attn.heads
        k = plain_rotation(heads(layers.to_k(x)), fed).transpose(1, 2)
        v = heads(layers.to_v(x)).transpose(1, 2)
        self.keys = k if self.keys is None else torch.cat([self.keys, k], dim=2)
        self.values = v if self.values is None else torch.cat([self.values, v], dim=2)
        y = self.embeddings(torch.full((len(tokens), len(asked)), self.config.vocab_size, device=tokens.device))
        for layer in layers.cross_dec:
            y = layer(y, asked, (self.keys, self.values))
        return self.head(self.norm(y)).float()


@torch.no_grad()
def plain_arpg_generate(model: PlainARPG, labels: Tensor, schedule: DrawSchedule, *, cfg_scale: float, order: Tensor,
                        greedy: bool = False) -> Tensor:
    """Labels (n,) → codes (n, L), all in one order (L,) of cells."""
    config, device = model.config, labels.device
    base = rope_table(config.grid, config.dim // config.n_head, 1, base=config.rope_base)
    rows = 2 * len(labels)
    table = base.repeat(rows, 1, 1, 1).to(device)[0]
    plan = schedule.plan(order.numpy(), cfg_scale=cfg_scale)
    model.setup_caches()
    labels = torch.cat([labels, torch.full_like(labels, config.num_classes)])
    tokens, fed, done, drawn = labels[:, None] + config.vocab_size + 1, table[:1], 0, []
    for size in [end - start for start, end in zip([0, *plan.ends], plan.ends, strict=False)]:
        asked = table[order[done:done + size] + 1]
        conditional, unconditional = model(tokens, fed, asked).chunk(2)
        logits = unconditional + float(plan.scales[done]) * (conditional - unconditional)
        probabilities = F.softmax(logits, dim=-1)
        codes = probabilities.argmax(-1) if greedy else torch.multinomial(
            probabilities.flatten(0, 1), num_samples=1).view(len(logits), size)
        drawn.append(codes)
        tokens, fed, done = codes.repeat(2, 1), asked, done + size
    return torch.cat(drawn, dim=1)[:, order.argsort()]
