"""Transformer blocks in Llama's layout: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models import lean
from autoregressive.models.args import ModelArgs
from autoregressive.models.attend import KVCache
from autoregressive.models.rope import apply_rope


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the statistic in fp32, cast back before the scale."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training a sample's branch is left out with probability p.

    Not torchvision.ops' StochasticDepth: importing it loads torch's compiler, 2 seconds and 160 MB in every process.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x), then dropout."""

    def __init__(self, dim: int, hidden: int, *, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.dropout = lean.Dropout(dropout)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """norm(x) through the layer: x (B, T, D) → (B, T, D)."""
        if lean.applies(self.w1, self.w3, self.w2):
            out = lean.normed_swiglu(x, norm.weight, norm.eps, self.w1.weight, self.w3.weight, self.w2.weight)
        else:
            x = norm(x)
            out = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return self.dropout(out)


class Attention(nn.Module):
    """Self-attention with one packed projection `wqkv`: query rows, then key rows, then value rows."""

    def __init__(self, dim: int, heads: int, kv_heads: int, *, dropout: float, attn_dropout: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.attn_dropout = attn_dropout
        self.wqkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.dropout = lean.Dropout(dropout)

    def forward(self, x: Tensor, norm: RMSNorm, rope: Tensor, mask: Tensor | None, cache: KVCache | None,
                layer: int) -> Tensor:
        """norm(x) through the layer: x (B, T, D) → (B, T, D). rope (T, K/2, 2), or one table per row; mask
        (B or 1, 1, T, T) bool, or None: plain causal. With a cache, x (1, n, D) are a decoding step's tokens, of
        any rows: the cache knows which, and what they see."""
        if cache is None and lean.applies(self.wqkv):
            q, k, v = lean.normed_qkv(x, norm.weight, norm.eps, self.wqkv.weight, rope, (self.heads, self.kv_heads))
        else:
            sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(norm(x)).split(sizes, dim=-1))
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            cache.write(layer, k[0], v[0])
            return self.wo(cache.attend(layer, q[0]).flatten(1))[None]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, K)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.kv_heads != self.heads,
            dropout_p=self.attn_dropout if self.training else 0.0)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class AttentionParts(NamedTuple):
    """Attention as the C++ kernels take it; q, k and v are (layer, first of its rows). Without q it only stores keys
    and values, without k and v it attends those that another stored."""

    norm: RMSNorm
    q: tuple[nn.Module, int] | None
    k: tuple[nn.Module, int] | None
    v: tuple[nn.Module, int] | None
    out: nn.Module | None


class FeedForwardParts(NamedTuple):
    """A feed-forward layer as the C++ kernels take it."""

    norm: RMSNorm
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Parts(NamedTuple):
    """A model as the C++ kernels take it. `queries`: the layers of a second stream, which attends what `shared` stores;
    it starts from `query` (D,) at every ask."""

    layers: list[tuple[AttentionParts, FeedForwardParts]]
    norm: RMSNorm
    output: nn.Module
    shared: AttentionParts | None = None
    queries: tuple[tuple[AttentionParts, FeedForwardParts], ...] = ()
    query: Tensor | None = None


class TransformerBlock(nn.Module):
    """Pre-norm residual block: attention, then feed-forward, each with stochastic depth (arXiv 1603.09382)."""

    def __init__(self, config: ModelArgs, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config.dim, config.n_head, config.n_kv_head, dropout=config.resid_dropout_p,
                                   attn_dropout=config.attn_dropout_p)
        self.feed_forward = FeedForward(config.dim, config.hidden, dropout=config.ffn_dropout_p)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None = None, mask: Tensor | None = None,
                layer: int = 0) -> Tensor:
        """x (B, T, D) → (B, T, D); rope, mask and cache: see `Attention`. `layer`: its number in the cache."""
        x = x + self.drop_path(self.attention(x, self.attention_norm, rope, mask, cache, layer))
        return x + self.drop_path(self.feed_forward(x, self.ffn_norm))

    def parts(self) -> tuple[AttentionParts, FeedForwardParts]:
        """The block as the C++ kernels take it."""
        attention, ffn = self.attention, self.feed_forward
        heads, kv_heads = (count * attention.head_dim for count in (attention.heads, attention.kv_heads))
        packed = [(attention.wqkv, first) for first in (0, heads, heads + kv_heads)]
        return (AttentionParts(self.attention_norm, *packed, attention.wo),
                FeedForwardParts(self.ffn_norm, ffn.w1, ffn.w3, ffn.w2))
