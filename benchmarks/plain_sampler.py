"""Sampling as LlamaGen's code does it, in our words: what bench_sample.py compares with. Only benchmarks run this.

It computes the same codes as ours. What it does on the way, and why it is slow:
- every call makes new caches for the longest sequence, rounded up to 8, a causal mask (S, S) per row, a rotary table;
- every step gathers its row of the mask, attends to the whole padded cache through the unfused ("math") kernel, copies
  keys and values by repeat_interleave even for groups of one, and writes the cache by index;
- rotation by upcast, reshape, stack and flatten for queries and keys of each layer; norms as chains of operations;
  w1 and w3 apart; the tokens concatenated with themselves for guidance, whose second half is computed even where
  --cfg-interval throws it away; probabilities of every step copied and kept.
The way from codes to pixels is bench_tokenizer.py's `PlainTokenizer`.
"""
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models.conditions import LabelEmbedder
from autoregressive.models.gpt import ModelArgs, Transformer
from autoregressive.models.rope import rope_table
from benchmarks.bench_train import PlainFeedForward, PlainNorm, plain_rotation

PREFIX = 1  # tokens of a class


@dataclass(frozen=True)
class PlainSettings:
    """How codes are drawn; the meanings are `generate`'s."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    sample_logits: bool = True


class PlainCachedAttention(nn.Module):
    """Attention over all of a padded cache."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def setup_cache(self, rows: int, length: int) -> None:
        """New zeros for keys and values, (rows, KV heads, length, K)."""
        shape = (rows, self.kv_heads, length, self.head_dim)
        self.keys, self.values = self.wo.weight.new_zeros(shape), self.wo.weight.new_zeros(shape)

    def forward(self, x: Tensor, table: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, D) at `positions` (T,) with their rows of the table (T, K/2, 2) and the mask (B, 1, T, S)."""
        batch, tokens, dim = x.shape
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in self.wqkv(x).split(widths, dim=-1))
        q, k = plain_rotation(q, table), plain_rotation(k, table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, K)
        self.keys[:, :, positions] = k
        self.values[:, :, positions] = v
        k, v = (held.repeat_interleave(self.heads // self.kv_heads, dim=1) for held in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.wo(out.transpose(1, 2).contiguous().view(batch, tokens, dim))


class PlainCachedBlock(nn.Module):
    """Attention and feed-forward with their norms."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.attention, self.feed_forward = PlainCachedAttention(config), PlainFeedForward(config)
        self.attention_norm, self.ffn_norm = (PlainNorm(config.dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table, positions, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class PlainSampler(nn.Module):
    """The class-conditional GPT `model`, computed in this way with the same parameters (not copies)."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.config = config = model.config
        with torch.device("meta"):
            self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, dropout_prob=config.class_dropout_prob)
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleList(PlainCachedBlock(config) for _ in range(config.n_layer))
            self.norm = PlainNorm(config.dim, config.norm_eps)
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.load_state_dict(model.state_dict(), assign=True)
        self.eval()

    def setup_caches(self, rows: int, length: int) -> None:
        """Everything that a call needs besides the weights, made anew."""
        config, device = self.config, self.output.weight.device
        length = -(-length // 8) * 8
        for layer in self.layers:
            layer.attention.setup_cache(rows, length)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        self.mask = causal[None].repeat(rows, 1, 1)  # (rows, S, S)
        self.table = rope_table(config.grid, config.dim // config.n_head, PREFIX, base=config.rope_base).to(device)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embeddings (B, T, D) at `positions` (T,) → logits (B, T, V) fp32."""
        mask, table = self.mask[:x.shape[0], None, positions], self.table[positions]
        for layer in self.layers:
            x = layer(x, table, positions, mask)
        return self.output(self.norm(x)).float()


def plain_draw(logits: Tensor, settings: PlainSettings) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) → codes (B, 1) that follow the last of T, and their probabilities (B, V)."""
    logits = logits[:, -1] / max(settings.temperature, 1e-5)
    if settings.top_k > 0:
        kept = torch.topk(logits, min(settings.top_k, logits.shape[-1])).values
        logits[logits < kept[:, -1:]] = float("-inf")
    probabilities = F.softmax(logits, dim=-1)
    if settings.sample_logits:
        return torch.multinomial(probabilities, num_samples=1), probabilities
    return probabilities.topk(1, dim=-1).indices, probabilities


@torch.no_grad()
def plain_prefill(model: PlainSampler, labels: Tensor, max_new_tokens: int, settings: PlainSettings) -> Tensor:
    """New caches, the class as prefix, the first code: labels (B,) → (B, 1)."""
    guided = settings.cfg_scale > 1
    if guided:
        labels = torch.cat([labels, torch.full_like(labels, model.config.num_classes)])
    model.setup_caches(len(labels), PREFIX + max_new_tokens)
    logits = model(model.cls_embedding(labels, drop=False), torch.arange(PREFIX, device=labels.device))
    if guided:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + (conditional - unconditional) * settings.cfg_scale
    return plain_draw(logits, settings)[0]


@torch.no_grad()
def plain_decode(model: PlainSampler, token: Tensor, steps: range,
                 settings: PlainSettings) -> tuple[list[Tensor], list[Tensor]]:
    """Decoding `steps` (0 is the first after the prefill) after `token` (B, 1) → their codes, (B, 1) each, and
    probabilities, (B, V) each."""
    positions = torch.tensor([PREFIX + steps.start], device=token.device)
    tokens, probabilities = [], []
    for step in steps:
        with sdpa_kernel(SDPBackend.MATH):
            if settings.cfg_scale > 1:
                logits = model(model.tok_embeddings(torch.cat([token, token])), positions)
                conditional, unconditional = logits.chunk(2)
                if settings.cfg_interval == -1 or step <= settings.cfg_interval:
                    logits = unconditional + (conditional - unconditional) * settings.cfg_scale
                else:
                    logits = conditional
            else:
                logits = model(model.tok_embeddings(token), positions)
            drawn, probability = plain_draw(logits, settings)
        positions += 1
        tokens.append(drawn.clone())
        probabilities.append(probability.clone())
        token = drawn.view(-1, 1)
    return tokens, probabilities


def plain_generate(model: PlainSampler, labels: Tensor, max_new_tokens: int, settings: PlainSettings) -> Tensor:
    """Labels (B,) → codes (B, max_new_tokens)."""
    first = plain_prefill(model, labels, max_new_tokens, settings)
    tokens, _probabilities = plain_decode(model, first, range(max_new_tokens - 1), settings)
    return torch.cat([first, *tokens], dim=1)


def plain_uint8(pixels: Tensor) -> np.ndarray:
    """Images (B, 3, H, W) in [-1, 1] → uint8 (B, H, W, 3)."""
    return torch.clamp(127.5 * pixels + 128.0, 0, 255).permute(0, 2, 3, 1).to("cpu", dtype=torch.uint8).numpy()


def png_files(images: np.ndarray) -> list[bytes]:
    """uint8 (B, H, W, 3) → PNG files in memory, one after the other; for both sides."""
    files = []
    for image in images:
        file = BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        files.append(file.getvalue())
    return files
