"""The decoder: requests join and leave at any step, each with its own condition, plan, key and settings.

`generate`, a server and editing are its callers. A step takes what every request's plan says comes next, as one flat
batch: prefixes of the new ones and codes of the others share a forward pass. An image depends on its request alone.
"""
import heapq
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from autoregressive.models.batch import Batch, StepLayout, Turn
from autoregressive.models.engines import Decodable, Engine, engine_for
from autoregressive.models.graphs import StepGraphs
from autoregressive.models.plan import Finished, Request
from autoregressive.models.sampling import Settings, choose

NEVER = 2**62  # a position beyond all
PREFILL_TOKENS = 4096  # prefix tokens in one step at most: bounds the memory


@dataclass
class _Active:
    """A request that has joined."""

    request: Request
    prefix: int  # tokens of its prefix that stay in the cache
    tokens: np.ndarray  # those that are fed: also the last, if it is hidden, as it gives the first logits
    fresh: bool = True  # nothing is cached yet


class CodeDecoder:
    """Decodes images that join and leave. For one thread. After an error in `step`, the same step can be done again."""

    def __init__(self, model: Decodable) -> None:
        self.model = weakref.proxy(model)
        self.engine: Engine | None = None
        self.active: dict[int, _Active] = {}
        self.free: list[int] = []
        self.slots = 0
        self.orders, self.scales = np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)  # (slots, L)
        self.control: Tensor | None = None  # (places, slots * L + 1, D) once a request has some; the last row is zero
        self.controlled = False  # whether a request has some now

    @torch.inference_mode(False)
    @torch.no_grad()
    def reserve(self, requests: int, *, length: int | None = None, guided: bool = True) -> None:
        """Have room for `requests` images of at most `length` codes (None: the model's grid), and see what the model is
        like now: its weights, their type, their device. `guided`: whether guidance may be asked for. Not while there
        are requests. Raises ValueError for a model in training mode.
        """
        assert not self.active, f"{len(self.active)} requests are being decoded"
        if self.model.training:
            raise ValueError("the model is in training mode, in which dropout would change its images: model.eval()")
        config, weight = self.model.config, next(self.model.parameters())
        length, engine = length or config.block_size, self.engine
        self.engine = engine_for(self.model, engine)
        moved = self.engine.reserve(requests * (1 + guided), config.cls_token_num + length)
        if moved or engine is not self.engine or requests > len(self.orders) or length > self.orders.shape[1]:
            self.graphs = StepGraphs()
            shape = max(requests, len(self.orders)), max(length, self.orders.shape[1])
            self.orders = np.empty((0, 0), np.int64)  # nothing is here until all of it is: memory may run out
            self.control = None
            self.codes = torch.zeros(shape, dtype=torch.long, device=weight.device)
            self.broken = torch.full(shape[:1], NEVER, device=weight.device)
            self.settings = Settings(*(torch.zeros(shape[0], dtype=dtype, device=weight.device) for dtype in (
                torch.float32, torch.long, torch.float32, torch.long, torch.bool)))
            self.orders, self.scales = np.zeros(shape, np.int64), np.ones(shape, np.float32)
        self.slots, self.length, self.guided, self.turns = requests, length, guided, ()
        self.queries = self.model.parts().query is not None
        self.rounding = 4 * torch.finfo(weight.dtype).eps
        self.free = list(range(requests))

    def join(self, request: Request) -> int:
        """Take a request in; its slot, which is its own until it is finished or leaves.

        Raises ValueError for what the model cannot do, RuntimeError when all slots are taken.
        """
        assert self.slots, "no room was reserved: call reserve first"
        plan, config = request.plan, self.model.config
        request.check(vocab_size=config.vocab_size, length=self.length, guided=self.guided, queries=self.queries)
        self.model.check(request.condition, request.visible)
        if request.control is not None:
            expected = len(self.model.control_layers) or 1, config.block_size, config.dim
            if request.control.shape != expected:
                raise ValueError(f"the control of a request is {tuple(request.control.shape)}, expected {expected}")
        if any(plan is active.request.plan for active in self.active.values()):
            raise ValueError("the plan is that of another request: each needs one of its own")
        if not self.free:
            raise RuntimeError(f"all {self.slots} slots are taken")
        visible = np.ones(config.cls_token_num, bool) if request.visible is None else request.visible.cpu().numpy() > 0
        shown = visible.copy()  # prefix tokens have no position, so hidden ones are left out
        shown[-1] |= plan.known == 0 and not self.queries  # a token gives the first logits, or a query does
        slot = heapq.heappop(self.free)
        self.active[slot] = _Active(request, int(visible.sum()), shown.nonzero()[0])
        length = len(plan.order)
        self.orders[slot, :length], self.scales[slot, :length] = plan.order, plan.scales
        return slot

    def leave(self, slot: int) -> None:
        """Drop the request of a slot."""
        del self.active[slot]
        heapq.heappush(self.free, slot)

    @torch.inference_mode(False)  # later calls reuse these tensors in any mode
    @torch.no_grad()
    def step(self) -> list[Finished]:
        """Let every request take its next step; those that are finished by it, which leave."""
        turns, starts, firsts = self._turns()
        if not turns:
            return []
        if turns != self.turns:  # mostly they do what they did in the last step, further on
            self.layout = StepLayout(turns, slots=self.slots, width=self.orders.shape[1],
                                     prefix_rows=self.model.config.cls_token_num)
            self.turns = turns
        self.controlled = any(active.request.control is not None for active in self.active.values())
        batch = self.layout.batch(starts, firsts, self.orders, self.scales, device=self.codes.device)
        run = partial(self._run, prefix=self._begin(turns) if batch.fresh else None)
        kind = self.settings.largest_k, self.settings.uses_top_p, self.controlled
        *_, right = self.graphs.run(batch, run, kind=kind, rounding=self.rounding)
        for source, targets, tokens in self.layout.copies:
            self.engine.copy(source, torch.tensor(targets, device=self.codes.device), length=tokens)
        right, done, at = right.cpu().numpy() if batch.drafts else None, [], 0
        for turn, first in zip(turns, firsts, strict=True):
            active = self.active[turn.slot]
            plan, active.fresh = active.request.plan, False
            plan.settle(turn.count if right is None else int(right[at:at + turn.count].sum()))
            at += turn.count
            if plan.window > 1 and first == plan.known:  # the first code is the first draft of the others
                self.codes[turn.slot, plan.decided:] = self.codes[turn.slot, first]
            if plan.finished:
                done.append((turn.slot, len(plan.order)))
        broken = self.broken[[slot for slot, _ in done]].tolist() if done else []
        for slot, _ in done:
            self.leave(slot)
        return [Finished(slot, self.codes[slot, :length].clone(), None if first == NEVER else first)
                for (slot, length), first in zip(done, broken, strict=True)]

    def _turns(self) -> tuple[tuple[Turn, ...], list[int], list[int]]:
        """What each request does, which position it feeds first, which it asks for first."""
        turns, starts, firsts, patterns, spent = [], [], [], {}, 0
        for slot in sorted(self.active):
            active = self.active[slot]
            plan, embedded, like = active.request.plan, 0, len(turns)
            start, (end, first, count) = plan.seen, plan.next()
            guided = first < plan.guided_until
            if active.fresh:
                embedded = len(active.tokens)
                if spent and spent + embedded > PREFILL_TOKENS:
                    continue  # its turn comes in a later step
                spent += embedded
                start, end = -active.prefix, end + embedded - active.prefix
                if guided and not (plan.known or plan.grouped):  # prefixes differ only in which tokens are visible
                    like = patterns.setdefault((active.prefix, active.tokens.tobytes()), like)
            starts.append(start)
            turns.append(Turn(slot, active.prefix, active.fresh, embedded, end - start, count, plan.grouped, plan.block,
                              guided, like))
            firsts.append(first)
        return tuple(turns), starts, firsts

    def _begin(self, turns: list[Turn]) -> Tensor:
        """Note the settings of new requests; their prefixes' embeddings (tokens, D), in the order of the batch."""
        new = [turn.slot for turn in turns if turn.fresh]
        requests, settings = [self.active[slot].request for slot in new], self.settings
        for name in ("temperature", "top_k", "top_p", "key", "greedy"):
            table, values = getattr(settings, name), [getattr(request, name) for request in requests]
            table[new] = torch.tensor(values, dtype=table.dtype, device=table.device)
        everyone, vocab = [active.request for active in self.active.values()], self.model.config.vocab_size
        settings.largest_k = max((one.top_k for one in everyone if one.top_k < vocab), default=0)
        settings.uses_top_p = any(one.top_p < 1 for one in everyone)
        self.broken[new] = NEVER
        for slot, request in zip(new, requests, strict=True):
            if request.plan.known:
                self.codes[slot, request.plan.order[:request.plan.known]] = request.known.to(self.codes.device)
            self._note_control(slot, request)
        with_condition, without = self.model.prefix([one.condition for one in requests])
        own = [prefix[self.active[slot].tokens] for slot, prefix in zip(new, with_condition, strict=True)]
        own += [without[self.active[turn.slot].tokens] for i, turn in enumerate(turns)
                if turn.fresh and turn.guided and turn.like == i]
        return torch.cat(own)

    def _note_control(self, slot: int, request: Request) -> None:
        """Keep what a new request's control picture adds, or that it has none."""
        terms, (slots, width) = request.control, self.orders.shape
        if terms is not None and self.control is None:
            places, _, dim = terms.shape
            weight = next(self.model.parameters())
            self.control = torch.zeros(places, slots * width + 1, dim, dtype=weight.dtype, device=weight.device)
            self.graphs = StepGraphs()
        if self.control is not None:
            own = self.control[:, slot * width:(slot + 1) * width]
            own.zero_()
            if terms is not None:
                own[:, :terms.shape[1]] = terms[:, :width]

    def _control(self, batch: Batch) -> Tensor:
        """What control pictures add in a step: to each query that of its cell, to each token that of the cell which it
        predicts; nothing in unconditional rows."""
        (_, place, row, *_), ahead = (batch.asks, 0) if self.queries else (batch.fed, 1)
        cell = place - self.model.config.cls_token_num + ahead
        home = torch.where(row < self.slots, row * self.orders.shape[1] + cell, self.control.shape[1] - 1)
        return self.control.index_select(1, home)

    def _run(self, batch: Batch, *, prefix: Tensor | None, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """What a step does on the device: (logits (a, V), codes (d,), which of them are decided (d,)). Here codes are
        chosen and noted."""
        codes, source = self.codes.view(-1), batch.fed[0]
        *_, image, _, place, position, window = batch.draws.unbind()
        if prefix is None:
            x = self.model.embed(codes.index_select(0, source))  # (n, D)
        else:
            x = self.model.embed(codes.index_select(0, source.clamp_min(0)))
            x[source < 0] = prefix
        logits = self.engine.forward(x, batch, *(self._control(batch),) if self.controlled else ())
        found, decided = choose(logits, batch.draws, batch.scale, self.settings, fused=fused)
        wrong = ~decided
        if batch.drafts:  # up to and including the first code that differs from its draft
            differ = found != codes.index_select(0, place)
            before = differ.cumsum(0) - differ.long()
            decided = before == before[window]
            wrong &= decided  # drafts that are not decided may be what the model never sees
        codes.index_copy_(0, place, found)
        self.broken.scatter_reduce_(0, image, torch.where(wrong, position, NEVER), "amin")
        return logits, found, decided
