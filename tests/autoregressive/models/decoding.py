"""What tests of decoding share: the plain oracle (one full forward per code), single steps, a record of logits."""
import math

import numpy as np
import torch
from torch import Tensor

from autoregressive.models import decoder as module
from autoregressive.models import generate as calls
from autoregressive.models.batch import Batch
from autoregressive.models.engines import Engine
from autoregressive.models.gpt import Transformer
from autoregressive.models.sampling import Settings, choose, filter_logits, guide, gumbel
from utils.seeding import sample_generator


def engine_of(model: Transformer) -> Engine | None:
    """The engine that waits for the model's next call of `generate`."""
    decoder = calls._IDLE.get(model)
    return decoder and decoder.engine


def run_step(engine: Engine, x: Tensor, places: Tensor, lengths: list[int], *, rows: list[int] | None = None,
             causal: bool = True, wanted: list[int] | None = None) -> Tensor:
    """Logits of T tokens for each of R rows: x (R, T, D) with rotary rows `places` (R, T), after `lengths` tokens;
    each sees those before it and those of the step up to itself, or all. wanted: of which of the tokens."""
    count, new = x.shape[:2]
    rows = torch.arange(count) if rows is None else torch.tensor(rows)
    slots = torch.tensor(lengths)[:, None] + torch.arange(new)
    sees = slots + 1 if causal else slots[:, -1:].expand_as(slots) + 1
    fed = torch.stack([torch.zeros_like(slots), places.expand_as(slots), rows[:, None].expand_as(slots), slots, sees])
    token = torch.arange(count * new) if wanted is None else torch.tensor(wanted)
    asks = torch.stack([token, *[torch.zeros_like(token)] * 3])
    empty = torch.empty(7, 0, dtype=torch.long)
    batch = Batch(fed.flatten(1), asks, empty, torch.empty(0), rows.numpy(), np.full(count, new),
                  np.full(count, 0), int(sees.max()), fresh=False, drafts=False)
    return engine.forward(x.flatten(0, 1).clone(), batch).clone()


def draw_codes(logits: Tensor, conditional: Tensor, unconditional: Tensor, positions: Tensor, images: Tensor,
               settings: Settings, *, scale: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """`choose` with its arguments one by one; scale: of guidance, a number or one per image."""
    scale = torch.as_tensor(scale, dtype=torch.float32).expand(len(settings.key))[images].contiguous()
    return choose(logits, torch.stack([conditional, unconditional, images, positions]), scale, settings)


def attention_mask(emb_masks: Tensor | None, prefix: int, total: int) -> Tensor:
    """Causal mask (B or 1, 1, total, total), bool; padded prefix positions are hidden from all but themselves."""
    mask = torch.ones(total, total, dtype=torch.bool).tril()[None]
    if emb_masks is not None:
        mask = mask.repeat(len(emb_masks), 1, 1)
        mask[:, :, :prefix] &= emb_masks.bool()[:, None]
        mask |= torch.eye(total, dtype=torch.bool)
    return mask[:, None]


def keys_of(generators: list[torch.Generator]) -> Tensor:
    """The key of each image, as `generate` draws it."""
    return torch.tensor([int(torch.randint(2**62, (), generator=g)) for g in generators])


def streams(count: int, *, seed: int = 0) -> list[torch.Generator]:
    """The generators of the images 0 … count - 1."""
    return [sample_generator(seed, i) for i in range(count)]


@torch.no_grad()
def plain_logits(model: Transformer, codes: Tensor, cond: Tensor, *, valid: Tensor | None = None, scale=1.0,
                 interval: int = -1) -> Tensor:
    """Guided logits (B, V) of the code after `codes` (B, n); scale is a number or one per image."""
    prefix = model.config.cls_token_num
    mask = attention_mask(valid, prefix, prefix + codes.shape[1])
    logits = model(codes, cond, mask=mask)[0][:, -1]
    scale = torch.as_tensor(scale, dtype=torch.float32).expand(len(cond))[:, None]
    if interval >= 0 and codes.shape[1] - 1 > interval:  # decoding step 0 is the first after the prefill
        return logits
    free = model(codes, model.cls_embedding.unconditional(cond), mask=mask)[0][:, -1]
    return torch.where(scale > 1, guide(logits, free, scale), logits)


def plain_codes(model: Transformer, cond: Tensor, length: int, *, keys: Tensor | None = None,
                valid: Tensor | None = None, scale=1.0, interval: int = -1, temperature=1.0, top_k=0,
                top_p=1.0) -> Tensor:
    """Codes (B, length), one after the other; the best ones without keys. Settings are numbers or one per image."""
    codes = torch.empty(len(cond), 0, dtype=torch.long)
    for position in range(length):
        logits = plain_logits(model, codes, cond, valid=valid, scale=scale, interval=interval)
        if keys is not None:
            filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            logits = filtered + gumbel(keys, torch.full_like(keys, position), model.config.vocab_size)
        codes = torch.cat([codes, logits.argmax(-1, keepdim=True)], 1)
    return codes


class Record:
    """Stands in for `choose`, and keeps the logits (conditional, unconditional or 0) that decided each code."""

    def __init__(self, monkeypatch) -> None:
        self.rows: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        def recorded(logits, draws, scale, settings, *, fused):
            for conditional, unconditional, image, position in draws[:4].T.tolist():
                self.rows[image, position] = (  # a position is decided by the last window that holds it
                    logits[conditional].clone(),
                    logits[unconditional].clone() if unconditional >= 0 else torch.tensor(0.0))
            return choose(logits, draws, scale, settings, fused=fused)

        monkeypatch.setattr(module, "choose", recorded)

    def take(self, images: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """What was seen of images 0 … images - 1, in order; forgets all."""
        rows = [self.rows[image, position] for image in range(images) for position in range(length)]
        self.rows.clear()
        return rows


def same_bits(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))


def chi_square_tail(seen: Tensor, expected: Tensor, *, least: float = 5.0) -> float:
    """Probability that right counts are further from `expected` than `seen`; cells below `least` are taken together.

    One degree of freedom less than there are cells; nothing may have been seen where nothing is expected.
    """
    assert not seen[expected == 0].any(), seen[expected == 0]
    rare = (expected < least) & (expected > 0)
    cells = [(seen[expected >= least], expected[expected >= least])]
    if expected[rare].sum() > 0:
        cells.append((seen[rare].sum()[None], expected[rare].sum()[None]))
    distance = sum(((s - e) ** 2 / e).sum() for s, e in cells)
    freedom = sum(len(s) for s, _ in cells) - 1
    assert freedom > 0 and math.isclose(seen.sum(), expected.sum(), rel_tol=1e-3)
    return float(torch.special.gammaincc(torch.tensor(freedom / 2), (distance / 2).float()))
