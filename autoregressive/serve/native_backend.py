"""The decoder of this program as a backend: in a process of its own (engine_process.py), which is started again should
it die."""
import asyncio
import atexit
import collections
import contextlib
import itertools
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Literal

import torch

from autoregressive.serve.protocol import (
    MOST_IMAGES,
    FailedError,
    Job,
    ModelCard,
    OverloadedError,
    Picture,
    UnavailableError,
)
from autoregressive.serve.served import ServedModel
from native import build
from utils import cli

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a process that died is started again
RATE_OVER = 64  # pictures from whose times the rate is estimated
UNREAD = 64  # partial pictures of a job are left out while so many pictures of it wait to be read


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """Let PyTorch's threads sleep between operations in a process that is started within the block, if the C++ kernels
    do the work there: else they spin for milliseconds, on the cores that the kernels' threads wait for."""
    name = "OMP_WAIT_POLICY"
    if name in os.environ or not build.available() or torch.cuda.is_available():
        yield
        return
    os.environ[name] = "passive"
    try:
        yield
    finally:
        del os.environ[name]


class NativeBackend:
    """See `Backend`. At most `slots` images of a model are decoded at once, and at most `waiting` more wait; there is
    always room for one job."""

    def __init__(self, models: Sequence[ServedModel], *, slots: int = 64, waiting: int = 256) -> None:
        assert slots > 0 and waiting >= 0, (slots, waiting)
        self.models, self.slots, self.most = list(models), slots, max(MOST_IMAGES, slots * len(models) + waiting)
        self.cards: list[ModelCard] = []
        self.decoding = self.waiting = 0  # images that are decoded and that wait, as the process last said
        self.restarts = 0
        self._jobs: dict[int, asyncio.Queue] = {}
        self._left: dict[int, int] = {}  # pictures that a job still waits for
        self._numbers = itertools.count()
        self._ready: asyncio.Future | None = None
        self._again: asyncio.Task | None = None
        self._finished: collections.deque[float] = collections.deque(maxlen=RATE_OVER)
        self._stopped = False
        self._process: multiprocessing.Process | None = None
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()

    @property
    def state(self) -> Literal["ready", "loading"]:
        """See `Backend`."""
        ready = self._ready is not None and self._ready.done() and not self._ready.exception()
        return "ready" if ready and not self._stopped else "loading"

    @property
    def pid(self) -> int | None:
        """Of the process that draws."""
        return self._process and self._process.pid

    async def start(self) -> None:
        """See `Backend`."""
        self._loop = asyncio.get_running_loop()
        atexit.register(self._kill)  # should nobody call `stop`: Python would wait for it, which does not hear SIGTERM
        self._launch()
        self.cards = await self._ready

    async def stop(self) -> None:
        """See `Backend`."""
        self._stopped = True
        if self._again is not None:
            self._again.cancel()
        self._give_up("the server is being stopped")
        self._outbox.put(("stop", None))
        process = self._process
        if process is not None:
            await asyncio.to_thread(process.join, 5.0)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join)

    def _kill(self) -> None:
        """End the process, if there is one."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    async def draw(self, job: Job) -> AsyncIterator[Picture]:
        """See `Backend`."""
        if self.state != "ready":
            raise UnavailableError("the models are being loaded: try again in some seconds")
        outstanding = sum(self._left.values())
        if outstanding + len(job.indices) > self.most:
            raise OverloadedError(f"{outstanding} images are being drawn or wait, and {len(job.indices)} more are too "
                                  f"many: there is room for {self.most}", seconds=self._seconds_for(outstanding))
        number, events, unread = next(self._numbers), asyncio.Queue(), len(job.indices)
        self._jobs[number], self._left[number] = events, unread
        self._outbox.put(("draw", number, job))
        try:
            while unread:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                unread -= event.partial is None
                yield event
        finally:
            del self._jobs[number]
            if self._left.pop(number):
                self._outbox.put(("cancel", number))

    def _seconds_for(self, images: int) -> int:
        """About how long so many images take, by the last ones; 1 to 60 seconds."""
        if len(self._finished) < 2:
            return 1
        rate = (len(self._finished) - 1) / max(1e-3, self._finished[-1] - self._finished[0])
        return max(1, min(60, round(images / rate)))

    # ---- the process

    def _launch(self) -> None:
        """Start a process; `_ready` is done when it has loaded the models, or has failed to."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        from autoregressive.serve import engine_process

        self._ready, self._outbox = self._loop.create_future(), queue.SimpleQueue()
        self._process = context.Process(target=engine_process.main, args=(theirs, self.models, self.slots),
                                        name="engine", daemon=True)
        with quiet_threads():
            self._process.start()
        theirs.close()
        for work in (self._send, self._receive):
            threading.Thread(target=work, args=(ours, self._outbox, self._ready), daemon=True).start()

    def _send(self, connection: Connection, outbox: queue.SimpleQueue, ready: asyncio.Future) -> None:
        """Thread: send what is put into the outbox, until that is None."""
        try:
            while (message := outbox.get()) is not None:
                connection.send(message)
        except OSError:
            pass  # `_receive` sees it too
        connection.close()

    def _receive(self, connection: Connection, outbox: queue.SimpleQueue, ready: asyncio.Future) -> None:
        """Thread: hand what comes to the event loop."""
        try:
            while True:
                self._loop.call_soon_threadsafe(self._note, ready, connection.recv())
        except (EOFError, OSError):
            outbox.put(None)
        except RuntimeError:
            return  # the event loop is closed
        try:
            self._loop.call_soon_threadsafe(self._lost, ready)
        except RuntimeError:
            return

    def _note(self, ready: asyncio.Future, message: tuple) -> None:
        """What the process said."""
        if ready is not self._ready or self._stopped:
            return  # an earlier process, or nobody waits for it
        kind, *rest = message
        if kind == "ready":
            ready.set_result(*rest)
        elif kind == "load":
            self.decoding, self.waiting = rest
        elif rest[0] is None:
            ready.set_exception(ValueError(rest[1]))
        elif rest[0] in self._jobs:
            self._hand_out(kind, *rest)

    def _hand_out(self, kind: str, number: int, content: Picture | str) -> None:
        """Put what was said of a job where it is read. Its places are free when its pictures are drawn, read or not;
        of one who reads slowly partial pictures are left out."""
        events = self._jobs[number]
        if kind != "picture":
            self._left[number] = 0
            events.put_nowait(ValueError(content) if kind == "refused" else FailedError(content))
        elif content.partial is None:
            self._left[number] -= 1
            self._finished.append(time.monotonic())
            events.put_nowait(content)
        elif events.qsize() < UNREAD:
            events.put_nowait(content)

    def _give_up(self, why: str) -> None:
        """Tell all jobs that they will not be finished."""
        self.decoding = self.waiting = 0
        for events in self._jobs.values():
            events.put_nowait(UnavailableError(why))

    def _lost(self, ready: asyncio.Future) -> None:
        """The process is gone: jobs fail now, and another is started."""
        if ready is not self._ready or self._stopped:
            return
        if not ready.done():  # who waits for it goes on from here
            ready.set_exception(ValueError("the process that draws ended while it loaded the models (out of memory?)"))
        elif not ready.exception():
            self._ready = None
            self._give_up("the process that draws has died and is being started again: try again in some seconds")
            cli.warn("the process that draws has died; another one is started")
            self._again = self._loop.create_task(self._start_again())

    async def _start_again(self) -> None:
        """Start processes, after longer and longer pauses, until one has loaded the models."""
        pause = FIRST_PAUSE
        while not self._stopped:
            self.restarts += 1
            try:
                self._launch()
                self.cards = await self._ready
                return
            except Exception as error:  # whatever it is, the server goes on trying
                cli.warn(f"{cli.message(error)}; tried again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)
