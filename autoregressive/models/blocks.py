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
        return self.dropout(self.wo(attended(q, k, v, mask, dropout=self.attn_dropout if self.training else 0.0)))


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float) -> Tensor:
    """Attention of q (B, T, H, K) over k and v (B, T, KV heads, K) → (B, T, H K). mask (B or 1, 1, T, T), or None:
    causal."""
    if mask is None and dropout == 0 and (out := lean.causal_attention(q, k, v)) is not None:
        return out
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, K)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                         enable_gqa=q.shape[1] != k.shape[1], dropout_p=dropout)
    return out.transpose(1, 2).flatten(2)


def normed_and_rotated(x: Tensor, norm: RMSNorm, rope: Tensor, head_dim: int, q: nn.Linear | None,
                       k: nn.Linear | None, v: nn.Linear | None) -> list[Tensor]:
    """norm(x) of x (B, T, D) through each of the given layers, in heads (B, T, heads, K), all but v rotated by `rope`;
    what has no layer has no heads."""
    linears = [linear for linear in (q, k, v) if linear is not None]
    if lean.applies(*linears):
        heads = [0 if linear is None else linear.out_features // head_dim for linear in (q, k)]
        packed = torch.cat([linear.weight for linear in linears])  # one product in place of three
        return list(lean.normed_qkv(x, norm.weight, norm.eps, packed, rope, tuple(heads)))
    x = norm(x)
    none = x.new_empty(*x.shape[:2], 0, head_dim)
    q, k, v = (none if linear is None else linear(x).unflatten(-1, (-1, head_dim)) for linear in (q, k, v))
    return [part if part is v or part is none else apply_rope(part, rope) for part in (q, k, v)]


class SplitAttention(nn.Module):
    """Attention with a projection each for queries, keys and values; or, without `stores`, for queries alone, which
    attend keys and values that are made elsewhere."""

    def __init__(self, config: ModelArgs, *, stores: bool) -> None:
        super().__init__()
        self.head_dim, self.attn_dropout = config.dim // config.n_head, config.attn_dropout_p
        kv_width = config.n_kv_head * self.head_dim
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, kv_width, bias=False) if stores else None
        self.to_v = nn.Linear(config.dim, kv_width, bias=False) if stores else None
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = lean.Dropout(config.resid_dropout_p)

    def forward(self, x: Tensor, norm: RMSNorm, rope: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int,
                shared: tuple[Tensor, Tensor] | None) -> Tensor:
        """norm(x) through the layer; as `Attention`. `shared`: keys and values (B, T, KV heads, K) where this layer has
        none; with a cache they are what its layer `layer` holds."""
        q, k, v = normed_and_rotated(x, norm, rope, self.head_dim, self.to_q, self.to_k, self.to_v)
        if cache is not None:
            if self.to_k is not None:
                cache.write(layer, k[0], v[0])
            return self.proj(cache.attend(layer, q[0]).flatten(1))[None]
        k, v = (k, v) if shared is None else shared
        return self.dropout(self.proj(attended(q, k, v, mask, dropout=self.attn_dropout if self.training else 0.0)))


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


class SplitBlock(nn.Module):
    """The same with `SplitAttention`, under the names of ARPG's checkpoints; without `stores` it is a layer of queries
    that attend shared keys and values."""

    def __init__(self, config: ModelArgs, drop_path: float, *, stores: bool) -> None:
        super().__init__()
        self.attn = SplitAttention(config, stores=stores)
        self.ffn = FeedForward(config.dim, config.hidden, dropout=config.ffn_dropout_p)
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor, cache: KVCache | None = None, mask: Tensor | None = None,
                layer: int = 0, shared: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D); see `SplitAttention`."""
        x = x + self.drop_path(self.attn(x, self.attn_norm, rope, mask, cache, layer, shared))
        return x + self.drop_path(self.ffn(x, self.ffn_norm))

    def parts(self) -> tuple[AttentionParts, FeedForwardParts]:
        """The block as the C++ kernels take it."""
        attn, ffn = self.attn, self.ffn
        q, k, v = (linear and (linear, 0) for linear in (attn.to_q, attn.to_k, attn.to_v))
        return (AttentionParts(self.attn_norm, q, k, v, attn.proj),
                FeedForwardParts(self.ffn_norm, ffn.w1, ffn.w3, ffn.w2))
