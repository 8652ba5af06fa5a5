"""Pictures while they are drawn: what is there so far, how far that is in words, and how to stop it."""
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Hashable, Sequence
from typing import Literal

import numpy as np

from autoregressive.sample.seams import GREY
from autoregressive.serve.protocol import Backend, Job, ModelCard, Picture

PAUSE = 0.2  # seconds between two views: a browser loads each changed picture again


class Progress:
    """The pictures of some jobs of one model, as far as they are drawn."""

    def __init__(self, card: ModelCard, count: int) -> None:
        self.pictures = [np.full((*card.image_size, 3), GREY, np.uint8) for _ in range(count)]  # (H, W, 3) each
        self.shares = [0.0] * count
        self.codes = card.grid[0] * card.grid[1]  # of a picture
        self.state: Literal["running", "complete", "stopped", "replaced"] = "running"
        self.started = self.ended = time.monotonic()

    def take(self, picture: Picture, *, first: int = 0) -> None:
        """Note a picture of the job whose pictures begin at `first`."""
        self.pictures[first + picture.which] = picture.pixels
        self.shares[first + picture.which] = 1.0 if picture.partial is None else picture.share

    @property
    def share(self) -> float:
        """Of all codes, how many are drawn."""
        return sum(self.shares) / len(self.shares)

    def words(self) -> str:
        """How far the pictures are: "37 of 144 codes"."""
        count, complete = len(self.shares), sum(share == 1 for share in self.shares)
        if self.state == "complete":
            return f"{count} picture{'s' * (count > 1)} in {self.ended - self.started:.1f} s"
        codes = f"{round(self.share * count * self.codes)} of {count * self.codes} codes"
        words = codes if count == 1 else f"{complete} of {count} pictures, {codes}"
        return words if self.state == "running" else f"stopped after {words}"


class Runs:
    """What is being drawn for whom, so that it can be stopped. Methods belong to the backend's event loop."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.tasks: dict[Hashable, tuple[asyncio.Task, Progress]] = {}

    async def views(self, key: Hashable, jobs: Sequence[Job], progress: Progress) -> AsyncIterator[None]:
        """Draw jobs together into `progress`, and yield each time that there is something new to see, at most every
        `PAUSE` seconds. What was being drawn for the same key is replaced; `stop` and closing the iterator stop this.

        Raises what the backend raises; nothing when it was stopped: `progress` says how it ended.
        """
        changed = asyncio.Event()
        earlier = self.tasks.pop(key, None)
        task = asyncio.create_task(self._draw(jobs, progress, changed, after=earlier))
        self.tasks[key] = task, progress  # before anything is waited for: a second click may come meanwhile
        task.add_done_callback(lambda _: changed.set())
        try:
            while not task.done():
                await changed.wait()
                changed.clear()
                yield
                if not task.done():
                    await asyncio.wait([task], timeout=PAUSE)
            if not task.cancelled():
                task.result()
                progress.state = "complete"
        finally:
            task.cancel()
            progress.ended = time.monotonic()
            if progress.state == "running":
                progress.state = "stopped"
            if self.tasks.get(key) == (task, progress):
                del self.tasks[key]
            await asyncio.wait([task])

    async def stop(self, key: Hashable) -> None:
        """Stop what is drawn for the key, if anything is; returns when the backend has let go of it."""
        earlier = self.tasks.pop(key, None)
        if earlier is not None:
            await self._end(*earlier, state="stopped")

    async def _end(self, task: asyncio.Task, progress: Progress, *, state: Literal["stopped", "replaced"]) -> None:
        progress.state = state
        task.cancel()
        await asyncio.wait([task])

    async def _draw(self, jobs: Sequence[Job], progress: Progress, changed: asyncio.Event, *,
                    after: tuple[asyncio.Task, Progress] | None) -> None:
        if after is not None:
            await self._end(*after, state="replaced")

        async def draw(job: Job, first: int) -> None:
            async with contextlib.aclosing(self.backend.draw(job)) as pictures:
                async for picture in pictures:
                    progress.take(picture, first=first)
                    changed.set()

        firsts = [sum(len(job.indices) for job in jobs[:place]) for place in range(len(jobs))]
        tasks = [asyncio.create_task(draw(job, first)) for job, first in zip(jobs, firsts, strict=True)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
