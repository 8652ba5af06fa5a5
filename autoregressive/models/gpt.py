"""The GPT over image tokens: a class or caption prefix, then codes in raster order (LlamaGen, arXiv 2406.06525 §2.2).

`GPT_models` is the registry; state-dict names are those of the released checkpoints.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.args import PRESETS, ModelArgs, find_multiple
from autoregressive.models.attend import KVCache
from autoregressive.models.base import CodeModel
from autoregressive.models.batch import Batch
from autoregressive.models.blocks import Parts, RMSNorm, TransformerBlock
from autoregressive.models.conditions import UNCONDITIONAL, CaptionEmbedder, LabelEmbedder
from autoregressive.models.conditions import dropped as chosen_by_chance
from autoregressive.models.lean import Dropout
from autoregressive.models.ragged import Unpadded
from utils.compatible import missing_names


class Transformer(CodeModel):
    """From the prefix and codes x_1 … x_{L-1} to the logits of x_1 … x_L."""

    HEAD = "output"

    def __init__(self, config: ModelArgs) -> None:
        super().__init__(config)
        if config.model_type == "c2i":
            self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, dropout_prob=config.class_dropout_prob)
        else:
            self.cls_embedding = CaptionEmbedder(config.caption_dim, config.dim, token_num=config.cls_token_num,
                                                 dropout_prob=config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = Dropout(config.token_dropout_p)
        rates = torch.linspace(0, config.drop_path_rate, config.n_layer, device="cpu").tolist()
        self.layers = nn.ModuleList(
            TransformerBlock(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if not self.output.weight.is_meta:
            self.init_weights(int(torch.randint(2**62, ())))

    def first_std(self, name: str) -> float:
        """See `CodeModel.first_std`."""
        return self.config.caption_dim ** -0.5 if name == UNCONDITIONAL else super().first_std(name)

    def blocks(self) -> list[nn.Module]:
        """The modules that training checkpoints, compiles and shards one by one (utils/training/parallel.py)."""
        return list(self.layers)

    @property
    def control_layers(self) -> list[int]:
        """Before which layers a control picture is added: at 0, 1 and 2 thirds of the depth (ControlAR, arXiv
        2410.02705)."""
        return sorted({third * len(self.layers) // 3 for third in range(3)})

    def hidden_states(self, x: Tensor, *, mask: Tensor | None, rope: Tensor, cache: KVCache | None = None,
                      control: Tensor | None = None) -> Tensor:
        """Run the layers on embeddings x (B, T, D) with rotary rows `rope` (T, K/2, 2) or (B, T, K/2, 2) → (B, T, D),
        normed. mask and cache: see `Attention`; control (places, B, T, D): added before `control_layers`."""
        added = {} if control is None else dict(zip(self.control_layers, control, strict=True))
        for i, layer in enumerate(self.layers):
            x = x + added[i] if i in added else x
            x = layer(x, rope, cache, mask, i)
        return self.norm(x)

    # ---- decoding: see `Decodable` in engines.py

    def embed(self, codes: Tensor) -> Tensor:
        """Codes (n,) → (n, D)."""
        return self.tok_embeddings(codes)

    def prefix(self, conditions: list[int] | list[Tensor]) -> tuple[Tensor, Tensor]:
        """Labels, or text features (N, caption_dim) each → prefixes (n, N, D), and the one of no condition (N, D)."""
        return self.cls_embedding.prefixes(conditions)

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """Empty caches for `rows` rows of `tokens` tokens."""
        return self.empty_caches(self.config.n_layer, rows, tokens)

    def decode(self, x: Tensor, batch: Batch, cache: KVCache, control: Tensor | None = None) -> Tensor:
        """Embeddings x (n, D) of a step's tokens → logits (a, V) of those that are asked; control (places, n, D): what
        is added to the tokens."""
        rope = self.rope(x.device)[cache.filled(batch.fed[1])]  # (n, K/2, 2)
        if control is not None:
            control = torch.stack([cache.filled(terms) for terms in control])[:, None]  # (places, 1, n, D)
        hidden = self.hidden_states(x[None], mask=None, rope=rope, cache=cache, control=control)[0]
        token = batch.asks[0]
        return self.output(hidden[cache.filled(token)])[:len(token)]

    def parts(self) -> Parts:
        """The weights as the C++ kernels take them."""
        return Parts([layer.parts() for layer in self.layers], self.norm, self.output)

    def forward(self, idx: Tensor, cond_idx: Tensor, targets: Tensor | None = None, mask: Tensor | None = None,
                valid: Tensor | None = None, *, lengths: Tensor | None = None, dropped: Tensor | None = None,
                control: Tensor | None = None, summed_loss: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """Teacher-forced logits and loss; with `summed_loss` (sum of the tokens' losses, sum of their weights).

        idx (B, n) codes x_1 … x_n, n < L; cond_idx (B,) labels or (B, N, caption_dim) features, N up to cls_token_num;
        targets (B, n+1); lengths (B,): how many of the features are real, 1 to N, the last ones; the others are padding
        that nothing sees, without a mask (`ragged.py`); mask (B, T, T) or (B, 1, T, T) bool, True where attended
        (default: causal); valid (B,), 0 for samples that carry no loss; dropped (B,) bool, whose condition is left out
        (None: in training by chance, with class_dropout_prob). Returns logits (B, n+1, V), from the last prefix
        position on, and the mean cross-entropy in fp32, or None without targets. With `summed_loss` the logits are
        never made as a whole; targets must be given.
        control (B, C, H, W) in [-1, 1]: pictures that the images are to follow, left out with the condition; what they
        say of a cell is added to the token that predicts it (see `CodeModel.control_terms`).
        """
        if dropped is None and self.training:
            dropped = chosen_by_chance(cond_idx, True, self.config.class_dropout_prob)
        prefix = self.cls_embedding(cond_idx, drop=False if dropped is None else dropped)  # (B, N, D)
        assert prefix.shape[1] <= self.config.cls_token_num, (prefix.shape, self.config.cls_token_num)
        before, count = prefix.shape[1] - 1, idx.shape[1] + 1  # tokens before the first that predicts a code, and codes
        terms = None
        if control is not None:
            terms = F.pad(self.kept_control(control, dropped)[:, :, :count], (0, 0, before, 0))  # (places, B, T, D)
        x = self.tok_dropout(torch.cat([prefix, self.tok_embeddings(idx)], dim=1))  # (B, T, D), fp32 under autocast
        rope = self.rope(x.device)[self.config.cls_token_num - 1 - before:][:x.shape[1]]
        if lengths is not None:
            assert mask is None, "a mask is for padding that is left in"
            unpadded = Unpadded(lengths, prefix=prefix.shape[1], tokens=x.shape[1])
            x, rope, terms = unpadded(x), unpadded.rope(rope), None if terms is None else unpadded(terms)
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        x = self.hidden_states(x, mask=mask, rope=rope, control=terms)
        x = x[:, before:] if lengths is None else unpadded.asked(x, count)  # (B, n+1, D)
        return self.logits_and_loss(x, targets, valid, summed_loss=summed_loss)


def _build(width: dict[str, int], **options) -> Transformer:
    return Transformer(ModelArgs(**{**width, **options}))


GPT_models: dict[str, Callable[..., Transformer]] = {name: partial(_build, size) for name, size in PRESETS.items()}

__all__ = ["PRESETS", "GPT_models", "ModelArgs", "Transformer", "find_multiple"]
__getattr__ = missing_names(__name__)  # LlamaGen's other names: GPT_B, …
