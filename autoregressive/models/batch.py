"""One decoding step, flat and ragged: tokens of any requests that are fed, and the asks whose logits are wanted.

A GPT's asks are answered by fed tokens. A model with a second stream of queries answers an ask by a query with a rotary
row of its own. Everything is host integers, made without a model, and goes to the device in one piece.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Turn(NamedTuple):
    """What one request does in a step, but for the positions: places in the order in which its codes are drawn."""

    slot: int  # of the decoder: which codes, settings and cache rows are its own
    prefix: int  # prefix tokens in its cache rows
    fresh: bool  # its rows begin with this step
    embedded: int  # how many of the tokens that it feeds are no codes: the prefix, in its first step
    fed: int  # tokens that it feeds
    count: int  # codes that it asks for
    grouped: bool  # these are drawn independently, not after drafts
    block: bool  # codes see all that is fed with them, not only what comes before them
    guided: bool  # a second row is fed the same codes after the unconditional prefix
    like: int  # number of the turn whose unconditional row answers for its own: mostly this turn's


@dataclass
class Batch:
    """A step on a device. Tokens of one row stand side by side; the rows of guided requests' conditions come first."""

    fed: Tensor  # (5, n) int64: code (its place in the decoder's codes, -1 for a prefix), rotary row, row, slot, sees
    asks: Tensor  # (4, a) int64: fed token that answers; or of a query: rotary row, row, sees
    draws: Tensor  # (7, d) int64: ask, unconditional ask or -1, slot, cell; place in the decoder's codes, position in
    # the order, number of the first draw of the same window
    scale: Tensor  # (d,) fp32: of guidance
    rows: np.ndarray  # (R,) cache rows that are fed, in the order of the tokens
    sizes: np.ndarray  # (R,) tokens of each
    counts: np.ndarray  # (R,) asks of each
    longest: int  # slots that the token that sees most sees
    fresh: bool  # rows begin: prefixes are fed
    drafts: bool  # some are drawn after codes that are only guessed

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that lies on the device."""
        return self.fed, self.asks, self.draws, self.scale

    def over(self, tensors: list[Tensor]) -> "Batch":
        """The same step with its tensors elsewhere."""
        return replace(self, **dict(zip(("fed", "asks", "draws", "scale"), tensors, strict=True)))

    def shape(self, bucket: int) -> tuple[int, ...] | None:
        """What fixes the shapes of a step that reads the cache in multiples of `bucket`; None for ragged ones, and for
        those that give other results when they are repeated."""
        if self.fresh or self.drafts or (self.sizes != self.sizes[0]).any() or (self.counts != self.counts[0]).any():
            return None
        return (len(self.rows), *(tensor.shape[1] for tensor in self.tensors[:3]), int(self.rows.min()),
                int(self.rows.max()), -(-self.longest // bucket))


class StepLayout:
    """All that steps in which the same requests do the same have in common. A request's cache rows are its slot and
    slots + slot. prefix_rows: rotary rows before that of cell 0; width: places that a slot has for codes."""

    def __init__(self, turns: tuple[Turn, ...], *, slots: int, prefix_rows: int, width: int) -> None:
        slot, prefix, fresh, embedded, fed, count, grouped, block, guided, like = np.array(turns).T
        everyone = np.arange(len(turns))
        owner = np.concatenate([everyone, np.flatnonzero((guided == 1) & (like == everyone))])  # turn of each row
        self.rows, self.sizes, self.prefix_rows = slot[owner], fed[owner], prefix_rows
        self.rows[len(turns):] += slots
        row, within = _ragged(self.sizes)
        self.turn, self.within = turn, within = owner[row], within
        self.codes, self.base, self.prefix, self.fed = within >= embedded[turn], slot[turn] * width, prefix[turn], fed
        self.all_codes, self.block = bool(self.codes.all()), (block[turn] == 1) & self.codes
        self.counts = counts = count[owner]
        ask_row, self.ask_within = _ragged(counts)
        self.ask_turn = turn = owner[ask_row]
        self.ask_base, self.ask_end = slot[turn] * width, (prefix + fed)[turn]
        self.drawn = drawn = int(count.sum())  # the asks with conditions come first, one for each draw
        begin = np.full(len(turns), -1)  # of each turn's unconditional asks
        begin[owner[len(turns):]] = (np.cumsum(counts) - counts)[len(turns):]
        turn, within = turn[:drawn], self.ask_within[:drawn]
        self.other = np.where(guided[turn] == 1, begin[like[turn]] + within, -1)
        copied = np.flatnonzero((guided == 1) & (like != everyone))
        self.copies = [(int(slots + slot[source]), (slots + slot[copied[like[copied] == source]]).tolist(),
                        int(prefix[source])) for source in np.unique(like[copied])]  # (row, to rows, tokens)
        self.fresh, self.drafts = bool(fresh.any()), bool((count[grouped == 0] > 1).any())

        sizes = [5 * len(self.turn), 4 * len(self.ask_turn), 7 * drawn]
        self.whole, self.scale = np.empty(sum(sizes), np.int64), np.empty(drawn, np.float32)
        self.blocks = [part.reshape(count, -1) for part, count in zip(
            np.split(self.whole, np.cumsum(sizes)[:-1]), (5, 4, 7), strict=True)]
        tokens, asks, draws = self.blocks  # each step writes the rest
        tokens[2] = self.rows[row]
        asks[0], asks[2] = (np.cumsum(self.sizes) - counts)[ask_row] + self.ask_within, self.rows[ask_row]
        draws[0], draws[2], draws[6] = np.arange(drawn), slot[turn], np.arange(drawn) - within * (grouped[turn] == 0)
        self.on_host = [torch.from_numpy(part) for part in (self.whole, *self.blocks, self.scale)]

    def batch(self, starts: list[int], firsts: list[int], orders: np.ndarray, scales: np.ndarray, *,
              device: torch.device) -> Batch:
        """The step in which turns feed the positions from `starts` on (those below 0 are the prefix) and ask for those
        from `firsts` on. orders (slots, L): cells in the order in which they are drawn; scales (slots, L) fp32."""
        start, first, (tokens, asks, draws) = np.array(starts), np.array(firsts), self.blocks
        position = start[self.turn] + self.within
        np.add(self.prefix, position, out=tokens[3])
        cell = orders.ravel().take(self.base + (position if self.all_codes else np.maximum(position, 0)))
        np.add(self.base, cell, out=tokens[0])
        np.add(self.prefix_rows, cell, out=tokens[1])
        if not self.all_codes:
            tokens[:2, ~self.codes] = [[-1], [0]]
        tokens[4] = np.where(self.block, self.prefix + (start + self.fed)[self.turn], tokens[3] + 1)

        place = self.ask_base + first[self.ask_turn]
        place += self.ask_within
        cell = orders.ravel().take(place)
        np.add(self.prefix_rows, cell, out=asks[1])
        np.add(self.ask_end, start[self.ask_turn], out=asks[3])
        d = self.drawn
        scales.ravel().take(place[:d], out=self.scale)
        draws[1] = np.where(self.scale > 1, self.other, -1)
        draws[3] = cell[:d]
        np.add(self.ask_base[:d], cell[:d], out=draws[4])
        np.subtract(place[:d], self.ask_base[:d], out=draws[5])
        whole, *blocks, scale = self.on_host
        if device.type != "cpu":
            sizes = [block.numel() for block in blocks]
            blocks = [part.view(block.shape) for part, block in zip(whole.to(device).split(sizes), blocks, strict=True)]
            scale = scale.to(device)
        return Batch(*blocks, scale, self.rows, self.sizes, self.counts, int(tokens[4].max()), self.fresh,
                     self.drafts)


def _ragged(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each item of groups of these sizes: its group, its number in it."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - (np.cumsum(sizes) - sizes)[group]
