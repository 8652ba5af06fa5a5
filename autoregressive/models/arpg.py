"""ARPG: codes in any order, many at once ("Autoregressive Image Generation with Randomized Parallel Decoding",
arXiv 2503.10568).

Two halves, one after the other. The first is a decoder over the class and the codes that are known. Its output becomes
one set of keys and values. In the second, queries attend those: one for each cell that is asked for, all starting from
the same vector; only the rotation of a query says which cell it means. Queries do not see each other, so any number of
cells in any places can be asked for at once. State-dict names are those of the released checkpoints.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.args import ModelArgs
from autoregressive.models.attend import KVCache
from autoregressive.models.base import CodeModel
from autoregressive.models.batch import Batch
from autoregressive.models.blocks import AttentionParts, Parts, RMSNorm, SplitBlock, normed_and_rotated
from autoregressive.models.conditions import UNCONDITIONAL, CaptionEmbedder
from autoregressive.models.conditions import dropped as chosen_by_chance
from autoregressive.models.lean import Dropout
from autoregressive.models.ragged import Unpadded
from autoregressive.models.schedule import StepAttention


@dataclass
class ARPGArgs(ModelArgs):
    """What shapes an ARPG: `n_layer` layers over what is known, `n_query_layer` (None: as many) that ask.

    Rotations tell only how far cells lie apart. With `class_at_origin` the class, or the text, lies where the first
    cell does, so that cells know their own place once a code is known; in the released weights it lies nowhere.
    `step_attention`: that of a `DrawSchedule` which does not say.
    """

    n_query_layer: int | None = None
    class_at_origin: bool = False
    step_attention: StepAttention = "block"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_query_layer = self.n_layer if self.n_query_layer is None else self.n_query_layer
        if self.n_query_layer < 1 or self.n_layer < 0:
            raise ValueError(f"{self.n_layer} layers and {self.n_query_layer} of queries make no ARPG: it needs at "
                             "least one of queries")


class Halves(nn.Module):
    """The layers of both halves, and the projections to the keys and values between them."""

    def __init__(self, config: ARPGArgs) -> None:
        super().__init__()
        depth = config.n_layer + config.n_query_layer
        rates = torch.linspace(0, config.drop_path_rate, depth, device="cpu").tolist()
        self.self_dec = nn.ModuleList(SplitBlock(config, rate, stores=True) for rate in rates[:config.n_layer])
        self.cross_dec = nn.ModuleList(SplitBlock(config, rate, stores=False) for rate in rates[config.n_layer:])
        self.norm = RMSNorm(config.dim, config.norm_eps)
        kv_width = config.n_kv_head * (config.dim // config.n_head)
        self.to_k, self.to_v = (nn.Linear(config.dim, kv_width, bias=False) for _ in range(2))


class ARPG(CodeModel):
    """From a class, or a caption, and some codes to the logits of any other cells.

    One table holds all embeddings: V codes, the vector that every query starts from, and with classes also these, "no
    class", and a row that nothing uses. The released models are of classes. With captions, of which the
    paper does not say how they enter, the prefix is LlamaGen's, under its names.
    """

    HEAD = "head"
    any_order = True

    def __init__(self, config: ARPGArgs) -> None:
        super().__init__(config)
        self.step_attention = config.step_attention
        text = config.model_type == "t2i"
        self.embeddings = nn.Embedding(config.vocab_size + (1 if text else config.num_classes + 3), config.dim)
        if text:
            self.cls_embedding = CaptionEmbedder(config.caption_dim, config.dim, token_num=config.cls_token_num,
                                                 dropout_prob=config.class_dropout_prob)
        self.tok_dropout = Dropout(config.token_dropout_p)
        self.layers = Halves(config)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if not self.head.weight.is_meta:
            self.init_weights(int(torch.randint(2**62, ())))

    @property
    def prefix_at_origin(self) -> bool:
        """See `CodeModel`."""
        return self.config.class_at_origin

    def place_class(self, at_origin: bool) -> None:
        """Say where the class lies (see `ARPGArgs`), which no weight shows."""
        self.config.class_at_origin = at_origin
        self._rope.clear()

    def first_std(self, name: str) -> float:
        """See `CodeModel.first_std`."""
        return self.config.caption_dim ** -0.5 if name == UNCONDITIONAL else super().first_std(name)

    def blocks(self) -> list[nn.Module]:
        """The modules that training checkpoints, compiles and shards one by one (utils/training/parallel.py)."""
        return [*self.layers.self_dec, *self.layers.cross_dec]

    @property
    def query(self) -> Tensor:
        """The vector (D,) that every query starts from."""
        return self.embeddings.weight[self.config.vocab_size]

    def embed_classes(self, labels: Tensor) -> Tensor:
        """Labels (n,), num_classes for none → (n, D)."""
        return self.embeddings(labels + self.config.vocab_size + 1)

    def keys_and_values(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries attend: from the first half's output x (B, T, D), (B, T, KV heads, K) each."""
        layers, config = self.layers, self.config
        _, k, v = normed_and_rotated(x, layers.norm, rope, config.dim // config.n_head, None, layers.to_k, layers.to_v)
        return k, v

    def embed_condition(self, conditions: Tensor, dropped: Tensor | None) -> Tensor:
        """Labels (B,), or features (B, N, caption_dim) → the prefix (B, N, D); left out where `dropped` (B,) says."""
        if self.config.model_type == "t2i":
            return self.cls_embedding(conditions, drop=False if dropped is None else dropped)
        labels = conditions.reshape(-1)
        if dropped is not None:
            labels = torch.where(dropped, self.config.num_classes, labels)
        return self.embed_classes(labels)[:, None]

    def forward(self, idx: Tensor, cond_idx: Tensor, targets: Tensor | None = None,
                masks: tuple[Tensor, Tensor] | None = None, valid: Tensor | None = None, *,
                lengths: Tensor | None = None, orders: Tensor | None = None, dropped: Tensor | None = None,
                control: Tensor | None = None, summed_loss: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Teacher-forced logits and loss, all tensors in the order in which the codes are drawn.

        idx (B, n) codes 1 … n, n < L; cond_idx (B,) labels or (B, N, caption_dim) features; targets (B, n+1) codes 1 …
        n+1; orders (L,) or (B, L): the cell of each code (None: raster order). Query t sees the prefix and the codes
        before t: `masks` (what each input sees, what each query sees; (B or 1, 1, N+n, N+n) bool, the first N-1 queries
        ask for nothing) say otherwise. Nothing depends on train or eval mode but dropout, and by chance the conditions
        where `dropped` (B,) bool, whose condition is left out, is None. The rest, `lengths` too, and what is returned,
        as in `Transformer.forward`: logits (B, n+1, V). What a control picture says of a cell is added to the cell's
        query.
        """
        config, layers, inputs, queries = self.config, self.layers, *(masks or (None, None))
        count = idx.shape[1] + 1
        cells = torch.arange(config.block_size, device=idx.device) if orders is None else orders
        cells = cells[..., :count]
        if dropped is None and self.training:
            dropped = chosen_by_chance(cond_idx, True, config.class_dropout_prob)
        prefix = self.embed_condition(cond_idx, dropped)  # (B, N, D)
        before = prefix.shape[1] - 1  # queries that ask for nothing, so that query and input t stand side by side
        table = self.rope(idx.device)
        places = table[config.cls_token_num:][cells]  # (n+1, K/2, 2) or (B, n+1, K/2, 2): of the queries
        nowhere = table[:1].expand_as(places[..., :1, :, :])
        fed = torch.cat([nowhere] * (before + 1) + [places[..., :-1, :, :]], dim=-3)  # (…, T, K/2, 2)
        places = torch.cat([nowhere] * before + [places], dim=-3)
        x = self.tok_dropout(torch.cat([prefix, self.embeddings(idx)], dim=1))  # (B, T, D)
        y = self.query.expand_as(x)
        if control is not None:
            terms = self.kept_control(control, dropped)[0]  # (B, L, D)
            terms = terms.gather(1, cells.expand(len(x), -1)[..., None].expand(-1, -1, x.shape[-1]))
            y = y + F.pad(terms, (0, 0, before, 0))
        if lengths is not None:
            assert masks is None, "masks are for padding that is left in"
            unpadded = Unpadded(lengths, prefix=before + 1, tokens=x.shape[1])
            x, fed, places = unpadded(x), unpadded.rope(fed), unpadded.rope(places)
            y = y if control is None else unpadded(y)
        for layer in layers.self_dec:
            x = layer(x, fed, None, inputs)
        shared = self.keys_and_values(x, fed)
        for layer in layers.cross_dec:
            y = layer(y, places, None, queries, 0, shared)
        y = y[:, before:] if lengths is None else unpadded.asked(y, count)  # (B, n+1, D)
        return self.logits_and_loss(self.norm(y), targets, valid, summed_loss=summed_loss)

    def control_terms(self, pictures: Tensor) -> Tensor:
        """See `CodeModel.control_terms`. Where tokens are to replace the query: the difference to it."""
        terms = super().control_terms(pictures)
        return terms - self.query if self.control.replaces else terms

    # ---- decoding: see `Decodable` in engines.py

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (n,) → (n, D)."""
        return self.embeddings(codes)

    def prefix(self, conditions: list[int] | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels, or text features (N, caption_dim) each → prefixes (n, N, D), and the one of no condition (N, D)."""
        if self.config.model_type == "t2i":
            return self.cls_embedding.prefixes(conditions)
        labels = torch.tensor([*conditions, self.config.num_classes], device=self.embeddings.weight.device)
        rows = self.embed_classes(labels)[:, None]
        return rows[:-1], rows[-1]

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """Empty caches for `rows` rows of `tokens` tokens: of the first half's layers, and what the queries share."""
        return self.empty_caches(self.config.n_layer + 1, rows, tokens)

    def decode(self, x: Tensor, batch: Batch, cache: KVCache, control: Tensor | None = None) -> Tensor:
        """Embeddings x (n, D) of a step's tokens → logits (a, V) of the cells that are asked for; control (1, a, D):
        what is added to the queries."""
        table, layers, last = self.rope(x.device), self.layers, self.config.n_layer
        rope, x = table[cache.filled(batch.fed[1])], x[None]
        for i, layer in enumerate(layers.self_dec):
            x = layer(x, rope, cache, None, i)
        k, v = self.keys_and_values(x, rope)
        cache.write(last, k[0], v[0])
        cache.place_asks(batch)
        rope = table[cache.filled(batch.asks[1])]
        y = self.query.expand(1, len(rope), -1)
        if control is not None:
            y = y + cache.filled(control[0])
        for layer in layers.cross_dec:
            y = layer(y, rope, cache, None, last)
        return self.head(self.norm(y[0]))[:batch.asks.shape[1]]

    def parts(self) -> Parts:
        """The weights as the C++ kernels take them."""
        layers = self.layers
        shared = AttentionParts(layers.norm, None, (layers.to_k, 0), (layers.to_v, 0), None)
        return Parts([layer.parts() for layer in layers.self_dec], self.norm, self.head, shared,
                     tuple(layer.parts() for layer in layers.cross_dec), self.query)


PRESETS: dict[str, dict[str, int | str]] = {
    "ARPG-S": {"n_layer": 2, "n_head": 2, "dim": 128, "multiple_of": 64, "class_at_origin": True,
               "step_attention": "causal"},  # trains in minutes on a laptop
    "ARPG-L": {"n_layer": 12, "n_head": 16, "dim": 1024},  # 320M
    "ARPG-XL": {"n_layer": 18, "n_head": 20, "dim": 1280},  # 719M
    "ARPG-XXL": {"n_layer": 24, "n_head": 24, "dim": 1536},  # 1.3B
}


def _build(size: dict[str, int | str], **options) -> ARPG:
    return ARPG(ARPGArgs(**{**size, **options}))


ARPG_models: dict[str, Callable[..., ARPG]] = {name: partial(_build, size) for name, size in PRESETS.items()}
