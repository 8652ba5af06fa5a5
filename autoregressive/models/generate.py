"""Sample image codes from a GPT with a KV cache and classifier-free guidance, one after the other or in windows.

Exact Jacobi decoding: the noise of every position is fixed beforehand, so a code is a function of the codes before it.
A window of drafts (guessed codes) goes through the model at once. The results are right up to and including the first
that differs from its draft; these are kept, the rest becomes the next drafts. So the codes are those of sequential
decoding, whatever the window ("Parallel and flexible sampling from autoregressive models", arXiv 2105.08164; for
discrete codes with shared noise, "Predictive sampling with forecasting autoregressive models", arXiv 2002.09928).
"""
import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from autoregressive.models.engine import Engine, TorchEngine
from autoregressive.models.gpt import Transformer
from autoregressive.models.native_engine import NativeEngine, fitting_kernels
from autoregressive.models.sampling import Settings, check_sampling, choose
from utils.compatible import missing_names
from utils.finite import NotFiniteError

Decode = Literal["auto", "sequential", "jacobi"]
RIDGE = {"cpu": 8, "cuda": 64}  # about so many tokens take no longer than one: reading the weights does
WORTH_A_TRIAL = 0.002  # seconds; where a step is shorter, windows are not worth a trial
TRIAL = 16  # steps of each kind that `auto` times before it chooses
NEVER = 2**62  # a position beyond all
PREFILL_TOKENS = 4096  # prefix tokens in one step at most: bounds the memory


@dataclass
class Statistics:
    """What a call of `generate` did."""

    steps: int = 0  # forward passes after the prefill
    tokens: int = 0  # codes of each image that came from these steps
    window: int = 1  # drafts at once, as chosen in the end

    @property
    def tokens_per_step(self) -> float:
        """Mean number of codes that an image gets in a forward pass."""
        return self.tokens / max(1, self.steps)


@torch.no_grad()  # not inference_mode: its results cannot be used in training
def generate(model: Transformer, cond: Tensor, max_new_tokens: int, emb_masks: Tensor | None = None,
             cfg_scale: float | Sequence[float] = 1.0, cfg_interval: float = -1,
             temperature: float | Sequence[float] = 1.0, top_k: int | Sequence[int] = 0,
             top_p: float | Sequence[float] = 1.0, sample_logits: bool = True,
             generators: list[torch.Generator] | None = None, decode: Decode = "auto", window: int | None = None,
             statistics: Statistics | None = None) -> Tensor:
    """Generate codes (B, max_new_tokens) int64 in raster order, in eval mode.

    cond: labels (B,) or text features (B, N, caption_dim); emb_masks (B, N): 1 where the prefix is text, 0 where it is
    padding, which is hidden from attention. cfg_scale <= 1 runs one stream. cfg_interval i > -1 guides only while the
    index of the decoding step (0 is the first after the prefill) is <= i, then uses conditional logits alone.
    cfg_scale, temperature, top_k and top_p may be sequences, one value per image. generators: one per sample, from
    which its key is drawn; without them keys come from torch's global state. sample_logits=False takes the best code
    instead of drawing. decode: one code per step, windows of `window` drafts, or auto: windows while they pay. The
    codes are the same. statistics: receives the counts. Raises ValueError for labels, lengths or settings out of
    range, NotFiniteError, at the end, for logits that were not finite.
    """
    config, batch = model.config, cond.shape[0]
    if not 0 < max_new_tokens <= config.block_size:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but the model's grid holds 1 to {config.block_size}")
    if batch == 0:
        raise ValueError("the batch is empty: nothing to generate")
    if config.model_type == "c2i" and (int(cond.min()) < 0 or int(cond.max()) > config.num_classes):
        raise ValueError(f"class labels lie in [{int(cond.min())}, {int(cond.max())}], the model has classes "
                         f"0 to {config.num_classes - 1} (and {config.num_classes} for none)")
    if config.model_type == "t2i" and cond.shape[1:] != (config.cls_token_num, config.caption_dim):
        raise ValueError(f"text features are {tuple(cond.shape)}, the model takes (batch, {config.cls_token_num}, "
                         f"{config.caption_dim})")
    if emb_masks is not None and (cond.ndim < 2 or emb_masks.shape != cond.shape[:2]):
        raise ValueError(f"emb_masks is {tuple(emb_masks.shape)}, expected {tuple(cond.shape[:2])} as the features")
    if decode not in ("auto", "sequential", "jacobi"):
        raise ValueError(f"--decode is {decode!r}, expected auto, sequential or jacobi")
    if window is not None and window < 1:
        raise ValueError(f"the window is {window}, expected 1 or more")
    scales, temperatures, ks, ps = (_per_image(name, value, batch, whole=name == "top_k") for name, value in (
        ("cfg_scale", cfg_scale), ("temperature", temperature), ("top_k", top_k), ("top_p", top_p)))
    for values in zip(temperatures, ks, ps, strict=True):
        check_sampling(temperature=values[0], top_k=values[1], top_p=values[2])
    if generators is None:
        keys = torch.randint(2**62, (batch,)).tolist()
    elif len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples")
    else:
        keys = [int(torch.randint(2**62, (), generator=g, device=g.device)) for g in generators]

    engine = take_engine(model)
    device = cond.device
    extra = -batch % engine.row_multiple  # rows are filled up with copies of the last image
    cond, emb_masks = _extended(cond, extra), None if emb_masks is None else _extended(emb_masks, extra)
    scales, temperatures, ks, ps, keys = (x + x[-1:] * extra for x in (scales, temperatures, ks, ps, keys))
    settings = Settings(*(torch.tensor(x, dtype=dtype, device=device) for x, dtype in (
        (scales, torch.float32), (temperatures, torch.float32), (ks, torch.long), (ps, torch.float32),
        (keys, torch.long))), greedy=not sample_logits, uses_top_k=any(0 < k < config.vocab_size for k in ks),
        uses_top_p=any(p < 1 for p in ps))
    guided = [scale > 1 for scale in scales]
    if any(guided) and engine.row_multiple > 1:
        guided = [True] * len(guided)  # all images get two rows; the second is not used where the scale is 1
    if decode == "sequential" or (decode == "auto" and not engine.picks_rows):  # windows are seldom faster there
        window = 1
    if window is None:
        window = max(1 if decode == "auto" else 2, RIDGE.get(device.type, 64) // (len(guided) + sum(guided)))
    window = max(1, min(window, max_new_tokens - 1))
    training = [module for module in model.modules() if module.training]
    with torch.inference_mode(False), torch.no_grad():  # later calls reuse these tensors in any mode
        try:
            model.eval()
            engine.reserve(len(guided) + sum(guided), config.cls_token_num + max_new_tokens + window)
            run = _Run(model, engine, settings, [i for i, yes in enumerate(guided) if yes], cfg_interval,
                       max_new_tokens, window)
            run.prefill(cond, emb_masks)
            run.finish(adaptive=decode == "auto")
            codes = run.codes[:batch, :max_new_tokens].clone()
            check_logits(run.broken[:batch].tolist())
        finally:
            for module in training:
                module.training = True
    model.engines.append(engine)  # only after success: an error may leave half-written caches
    if statistics is not None:
        vars(statistics).update(vars(run.statistics))
    return codes


def take_engine(model: Transformer) -> Engine:
    """An idle engine of the model that fits, or a new one. Put it back into model.engines after use."""
    weights, kernels = fitting_kernels(model)
    with contextlib.suppress(IndexError):  # none is left; another thread may take one too
        while True:
            engine = model.engines.pop()
            if engine.weights == weights:
                return engine
    return TorchEngine(model) if kernels is None else NativeEngine(model, weights, kernels)


def check_logits(broken: list[int]) -> None:
    """Raise NotFiniteError for images that have a code, the first is `broken[i]`, drawn from NaN or infinite logits."""
    images = [i for i, position in enumerate(broken) if position < NEVER]
    if images:
        raise NotFiniteError(
            f"the GPT's logits are not finite, from code {broken[images[0]]} on, in {len(images)} of {len(broken)} "
            f"images (the first is number {images[0]} of the batch): its weights diverged, or overflow: try "
            "--precision none")


class _Run:
    """The state of one call: cached tokens, each image's position, which codes are drafts."""

    def __init__(self, model: Transformer, engine: Engine, settings: Settings, guided: list[int], interval: float,
                 length: int, window: int) -> None:
        self.model, self.engine, self.settings = model, engine, settings
        self.length, self.window = length, window
        self.statistics = Statistics(tokens=length - 1)
        device, images = settings.keys.device, len(settings.keys)
        self.images = torch.arange(images, device=device)
        self.guided = torch.tensor(guided, dtype=torch.long, device=device)
        self.partner = torch.full((images,), -1, dtype=torch.long, device=device)  # an image's unconditional row
        self.partner[self.guided] = images + torch.arange(len(guided), device=device)
        self.partner[settings.scale <= 1] = -1
        self.no_partner = torch.full_like(self.partner, -1)
        self.place = torch.ones(1, dtype=torch.long, device=device)  # of the next code, the same for all images
        bounded = -1 < interval < length
        self.guided_until = math.floor(interval) + 2 if bounded else length  # the first position without guidance
        self.codes = torch.zeros(images, length + window, dtype=torch.long, device=device)
        rope, prefix = model.rope(device), model.config.cls_token_num
        self.rope = rope[prefix:]
        self.no_rotation = rope[:1]

    def prefill(self, cond: Tensor, emb_masks: Tensor | None) -> None:
        """Cache the prefixes and choose the first codes."""
        embed, images = self.model.cls_embedding, len(self.images)
        prefix = torch.cat([embed(one, drop=False) for one in cond.split(1)])  # alone: independent of the batch
        width = self.model.config.cls_token_num
        visible = torch.ones(images, width, dtype=torch.bool, device=cond.device) if emb_masks is None \
            else emb_masks.bool()
        same = torch.arange(len(self.guided), device=cond.device)
        if len(self.guided):  # unconditional prefixes differ only in which tokens are visible
            distinct = visible[self.guided]
            if self.engine.picks_rows:
                seen: dict[bytes, int] = {}
                patterns = [row.tobytes() for row in distinct.cpu().numpy()]
                same = torch.tensor([seen.setdefault(pattern, len(seen)) for pattern in patterns], device=cond.device)
                distinct = distinct[[patterns.index(pattern) for pattern in seen]]
            none = embed(embed.unconditional(cond[:1]), drop=False).expand(len(distinct), *prefix.shape[1:])
            prefix, visible = torch.cat([prefix, none]), torch.cat([visible, distinct])
        # Prefix rows have no position, so hidden ones are left out; only the last gives logits, hidden or not.
        shown = visible.clone()
        shown[:, -1] = True
        order = (~shown).to(torch.uint8).argsort(dim=1, stable=True)
        tokens, hidden = shown.sum(1), ~visible[:, -1]  # (R,)
        order = order[:, :int(tokens.max())]
        x = prefix.gather(1, order[..., None].expand(*order.shape, prefix.shape[2]))
        rope = self.no_rotation.expand(1, x.shape[1], *self.no_rotation.shape[1:])
        logits = []
        at_once = max(self.engine.row_multiple, PREFILL_TOKENS // x.shape[1])
        for first in range(0, len(x), at_once):
            part = slice(first, min(first + at_once, len(x)))
            rows = torch.arange(part.stop - part.start, device=x.device)
            logits.append(self.engine.step(x[part], rope, torch.zeros_like(rows), rows=part, longest=0, uniform=True,
                                           wanted=rows * x.shape[1] + tokens[part] - 1).clone())
        self.prefix = tokens - hidden.long()  # cached tokens before the first code; a hidden last one is overwritten
        for i, source in reversed(list(enumerate(same.tolist()))):
            if i != source:
                self.engine.copy_row(images + source, images + i, length=x.shape[1])
        self.prefix = torch.cat([self.prefix[:images], self.prefix[images:][same]])
        lengths = self.prefix.unique().tolist()
        self.longest, self.uniform = lengths[-1], len(lengths) == 1
        unconditional = torch.where(self.partner >= 0, images, -1)
        unconditional[self.guided] = torch.where(self.partner[self.guided] >= 0, images + same, -1)
        first = torch.zeros_like(self.images)
        self.codes[:, 0], finite = choose(torch.cat(logits), self.images, unconditional, first, self.images,
                                          self.settings)
        self.broken = torch.where(finite, NEVER, first)  # (B,) the first code whose logits were not finite
        self.codes[:, 1:] = self.codes[:, :1]  # first drafts; any codes would do
        self.cursor = torch.ones_like(self.images)  # the first code that is not decided
        kept = ("codes", "prefix", "place", "images", "guided", "partner", "no_partner", "rope", "broken")
        own = {name: getattr(self, name) for name in kept}
        settings = {name: value for name, value in vars(self.settings).items() if isinstance(value, Tensor)}
        kind = (len(self.images), tuple(self.guided.tolist()), self.codes.shape, self.settings.greedy,
                self.settings.uses_top_k, self.settings.uses_top_p, self.uniform, self.rope.shape)
        buffers = self.engine.graphs.adopt(kind, {**own, **settings})
        for name in kept:
            setattr(self, name, buffers[name])
        self.settings = replace(self.settings, **{name: buffers[name] for name in settings})

    def finish(self, *, adaptive: bool) -> None:
        """Decide all codes. adaptive: a few steps code by code, a few with windows, then the faster way."""
        position = 1  # the same for all images as long as they go code by code
        trial = min(TRIAL, self.length // 4) if adaptive and self.window > 1 else 0
        lockstep_until = self.length if self.window == 1 else 1 + trial
        start = time.perf_counter()
        while position < lockstep_until:
            self.advance_together(position)
            position += 1
        seconds = (time.perf_counter() - start) / max(1, trial)  # per code
        if trial and seconds < WORTH_A_TRIAL:
            lockstep_until = self.length
        elif position < self.length:
            self.cursor.fill_(position)
            steps, start = 0, time.perf_counter()
            while len(active := self.images[self.cursor < self.length]):
                self.advance(active, self.window)
                steps += 1
                decided = float(self.cursor.float().mean()) - position
                if steps == trial and (time.perf_counter() - start) / decided > seconds:
                    lockstep_until = self.length
                    break
            self.statistics.steps += steps
            position = int(self.cursor.max())
            while len(active := self.images[self.cursor < position]):  # images that are not at the end yet
                self.advance(active, 1)
                self.statistics.steps += 1
        self.statistics.window = 1 if lockstep_until == self.length else self.window
        self.place.fill_(position)
        while position < self.length:
            self.advance_together(position)
            position += 1

    def advance_together(self, position: int) -> None:
        """Decide code `position` of every image."""
        self.statistics.steps += 1
        guides = position < self.guided_until and len(self.guided) > 0
        longest = self.longest + position - 1

        def step() -> None:
            before = self.place - 1
            x = self.model.tok_embeddings(self.codes.index_select(1, before))  # (B, 1, D)
            lengths = self.prefix + before
            if guides:
                x = torch.cat([x, x[self.guided]])
            logits = self.engine.step(x, self.rope.index_select(0, before)[None], lengths[:len(x)],
                                      rows=slice(0, len(x)), longest=longest, uniform=self.uniform)
            found, finite = choose(logits, self.images, self.partner if guides else self.no_partner,
                                   self.place.expand_as(self.images), self.images, self.settings)
            self.codes.index_copy_(1, self.place, found[:, None])
            self.broken.copy_(torch.where(finite, self.broken, torch.minimum(self.broken, self.place)))
            self.place += 1

        self.engine.graphs.run((guides, self.engine.read_up_to(longest + 1)), step)

    def advance(self, active: Tensor, window: int) -> None:
        """Run a window of drafts of the `active` images; keep what is decided."""
        whole = not self.engine.picks_rows
        if whole:  # finished images take part too, so that shapes stay the same
            active = self.images
        offsets = torch.arange(window, device=active.device)
        places = self.cursor[active][:, None] + offsets  # (A, W) the codes to decide
        inputs = self.codes[active].gather(1, places - 1)
        guides = torch.isin(active, self.guided) & (self.cursor[active] < self.guided_until)  # (A,)
        if whole:
            guides = torch.isin(active, self.guided)
        both = torch.cat([torch.arange(len(active), device=active.device), guides.nonzero()[:, 0]])  # image of each row
        rows = torch.cat([active, self.row_of(active[guides])])
        x = self.model.tok_embeddings(inputs)[both]  # (R, W, D)
        rope = self.rope[(places - 1).clamp(max=len(self.rope) - 1)][both]
        lengths = self.prefix[rows] + self.cursor[active][both] - 1
        logits = self.engine.step(x, rope, lengths, rows=slice(0, len(rows)) if whole else rows,
                                  longest=int(lengths.max()), uniform=False)
        at = torch.full((len(active),), -1, device=active.device)
        at[guides] = len(active) + torch.arange(int(guides.sum()), device=active.device)
        at = torch.where(self.partner[active] >= 0, at, -1)
        conditional = torch.arange(len(active) * window, device=active.device)
        unconditional = torch.where((at[:, None] >= 0) & (places < self.guided_until),
                                    at[:, None] * window + offsets, -1)
        found, finite = (of_all.view_as(places) for of_all in choose(
            logits, conditional, unconditional.flatten(), places.flatten(), active.repeat_interleave(window),
            self.settings))
        drafts = self.codes[active].gather(1, places)
        agreed = (found == drafts).long().cumprod(1).sum(1)
        before = self.cursor[active]
        after = (before + (agreed + 1).clamp(max=window)).clamp(max=self.length)
        counts = ~finite & (places < after[:, None])  # drafts that are not decided may be what the model never sees
        self.broken[active] = torch.minimum(self.broken[active], torch.where(counts, places, NEVER).amin(1))
        codes = self.codes[active].scatter(1, places, found)
        self.codes[active], self.cursor[active] = codes, after

    def row_of(self, images: Tensor) -> Tensor:
        """The unconditional cache rows of `images`, which are guided."""
        return len(self.images) + torch.searchsorted(self.guided, images)


def _per_image(name: str, value: float | Sequence[float] | Tensor, batch: int, *, whole: bool = False) -> list:
    """A number, or one per image, of Python, NumPy or PyTorch → a list of `batch` finite numbers."""
    values = torch.as_tensor(value, dtype=torch.float64).tolist()
    values = values if isinstance(values, list) else [values] * batch
    if len(values) != batch:
        raise ValueError(f"{len(values)} values of {name} for {batch} samples")
    for number in values:
        if not math.isfinite(number) or (whole and number != int(number)):
            kind = "whole" if whole else "finite"
            raise ValueError(f"--{name.replace('_', '-')} is {number}, expected a {kind} number")
    return [int(number) for number in values] if whole else values


def _extended(x: Tensor, extra: int) -> Tensor:
    return torch.cat([x, x[-1:].expand(extra, *x.shape[1:])])

__getattr__ = missing_names(__name__)  # LlamaGen's other names: sample, …
