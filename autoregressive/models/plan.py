"""What a request asks of a decoder, and its plan: which codes come next. Host integers, without a model.

A plan is an order of the grid's cells, with the strength of guidance at each position of that order. The first `known`
positions hold codes that are given (an image that is edited, say); the others are drawn, some at a time.
"""
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from autoregressive.models.arguments import integers
from autoregressive.models.sampling import check_sampling

TRIAL = 16  # windows after which a plan knows whether they pay


class Plan:
    """Positions below `decided` hold codes for good; those below `seen` were fed to the model, with these codes."""

    grouped = False  # the codes of a step are drawn independently
    block = False  # codes that are fed together see each other
    window = 1  # codes that are drawn at once, all but the first after drafts

    def __init__(self, order: ArrayLike, scales: ArrayLike, *, known: int = 0) -> None:
        """order (L,): cells in the order in which they are drawn, the known ones first; scales (L,): 1 or less is no
        guidance."""
        order, scales = integers("an order is", order).numpy(), np.asarray(scales, np.float32)
        length = order.size
        if not 0 <= known < length or scales.shape != (length,) or not np.array_equal(np.sort(order), range(length)):
            raise ValueError(f"an order of {length} cells, {scales.size} scales and {known} known codes make no plan: "
                             "the order holds every cell once, every position has a scale, and one is to be drawn")
        if not np.isfinite(scales).all():
            raise ValueError("scales of guidance are not finite")
        self.order, self.scales = order, scales
        self.known = self.decided = known
        self.seen = 0
        self.guided_until = int(np.flatnonzero(self.scales > 1).max(initial=-1)) + 1  # positions from here on are not

    @property
    def finished(self) -> bool:
        """Whether all codes are there."""
        return self.decided == len(self.order)

    def next(self) -> tuple[int, int, int]:
        """(end, first, count): feed the positions `seen` … end - 1, ask for first … first + count - 1."""
        raise NotImplementedError

    def settle(self, right: int) -> None:
        """The first `right` of the codes that were asked for are decided."""
        raise NotImplementedError


class Raster(Plan):
    """Row by row, as a GPT draws. With a window, drafts (guessed codes) go through the model at once (exact Jacobi).

    The noise of every position is fixed beforehand, so a code is a function of the codes before it. The results are
    right up to and including the first that differs from its draft; these are kept, the rest becomes the next drafts.
    So the codes are those of one after the other, whatever the window ("Parallel and flexible sampling from
    autoregressive models", arXiv 2105.08164; for discrete codes with shared noise, "Predictive sampling with
    forecasting autoregressive models", arXiv 2002.09928). `price`: how many times as long as a single code a window
    takes; if after some windows fewer codes come from each, single codes follow.
    """

    def __init__(self, scales: np.ndarray, *, known: int = 0, window: int = 1, price: float = 0.0) -> None:
        super().__init__(np.arange(len(scales)), scales, known=known)
        if window < 1:
            raise ValueError(f"the window is {window}, expected 1 or more")
        self.window, self.price, self.windows = window, price, 0

    def next(self) -> tuple[int, int, int]:
        # The first code is drawn alone: it is the first draft of the others.
        count = 1 if self.decided == self.known else min(self.window, len(self.order) - self.decided)
        return self.decided + count - 1, self.decided, count

    def settle(self, right: int) -> None:
        if self.decided > self.known and self.window > 1:
            self.windows += 1
            if self.windows == TRIAL and self.decided + right - self.known - 1 < self.price * TRIAL:
                self.window = 1
        self.decided += right
        self.seen = self.decided - 1


class Groups(Plan):
    """Any order, in groups of any size; the codes of a group are drawn independently and then, as a `block`, see each
    other."""

    grouped = True

    def __init__(self, order: ArrayLike, scales: ArrayLike, sizes: ArrayLike, *, known: int = 0,
                 block: bool = True) -> None:
        """sizes: how many codes each step draws. block False: codes see only those before them in the order."""
        super().__init__(order, scales, known=known)
        self.block = block
        sizes = integers("groups are", sizes).tolist()
        if min(sizes, default=0) < 1 or sum(sizes) != len(self.order) - known:
            raise ValueError(f"groups of {sizes} codes do not make up the {len(self.order) - known} that are to be "
                             "drawn")
        self.ends = (known + np.cumsum(sizes)).tolist()

    def next(self) -> tuple[int, int, int]:
        return self.decided, self.decided, self.ends[0] - self.decided

    def settle(self, right: int) -> None:
        self.seen, self.decided = self.decided, self.ends.pop(0)


@dataclass(eq=False)
class Request:
    """One image. condition: a label, or text features (N, caption_dim); visible (N,) bool: which of the features are
    text, None: all; key: of its noise, 64 bits; known: the codes of the plan's first cells, (plan.known,); control:
    what a control picture adds, (places, L, D), see `CodeModel.control_terms`."""

    condition: int | Tensor
    plan: Plan
    key: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    visible: Tensor | None = None
    greedy: bool = False  # the best code instead of a draw
    known: ArrayLike | None = None
    control: Tensor | None = None

    def __post_init__(self) -> None:
        self.known = None if self.known is None else integers("known codes are", self.known)

    def check(self, *, vocab_size: int, length: int, guided: bool, queries: bool) -> None:
        """Raise ValueError for what makes no sense, or has no room where `length` codes, `guided` or not, have it.
        queries: whether the model has a stream of them."""
        check_sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        if self.plan.decided > self.plan.known:
            raise ValueError("the plan has begun: it is for one request, once")
        if self.plan.grouped != queries:
            raise ValueError("models with a stream of queries draw codes in groups, others in raster order: the plan "
                             f"is {type(self.plan).__name__}")
        with_guidance = {True: "with guidance", False: "without guidance"}
        if len(self.plan.order) > length or (self.plan.guided_until and not guided):
            raise ValueError(f"a plan of {len(self.plan.order)} codes {with_guidance[self.plan.guided_until > 0]} does "
                             f"not fit: there is room for {length} {with_guidance[guided]}")
        known = [] if self.known is None else self.known.tolist()
        if len(known) != self.plan.known:
            raise ValueError(f"the plan has {self.plan.known} known codes, the request {len(known)}")
        if known and not 0 <= min(known) <= max(known) < vocab_size:
            raise ValueError(f"known codes lie in [{min(known)}, {max(known)}], the model has 0 to {vocab_size - 1}")
        if not -2**63 <= self.key < 2**63:
            raise ValueError(f"the key {self.key} does not fit into 64 bits")


@dataclass
class Finished:
    """An image that is complete: its codes (L,) int64 in raster order. broken: the first position whose logits were not
    finite, None if all were."""

    slot: int
    codes: Tensor
    broken: int | None
