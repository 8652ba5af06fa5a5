"""The process that draws for a server: its models (model_engine.py) take their steps in turn.

It is started by native_backend.py and talks with it through a pipe. To it: ("draw", job's number, Job), ("cancel",
number), ("stop", None). From it: ("ready", cards), ("picture", number, Picture), ("refused", number, message),
("failed", number, message), ("load", images being decoded, images waiting). It ends too when the pipe is closed.
"""
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection

from autoregressive.serve.model_engine import ModelEngine, outcome
from autoregressive.serve.protocol import Job
from autoregressive.serve.served import ServedModel
from utils import cli, dist

TELL_EVERY = 0.2  # seconds between two notes of how many images there are


class Engines:
    """All models of the process, which take their steps in turn."""

    def __init__(self, engines: list[ModelEngine], connection: Connection) -> None:
        self.engines = {engine.card.name: engine for engine in engines}
        self.homes: dict[int, ModelEngine] = {}
        self.connection = connection
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.told, self.last = (0, 0), 0.0
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        """Note what comes through the pipe; that it is closed means to stop."""
        try:
            while True:
                self.inbox.put(self.connection.recv())
        except (EOFError, OSError):
            self.inbox.put(("stop", None))

    def messages(self) -> Iterator[tuple]:
        """What has come; waits for something if there is nothing to draw. Raises EOFError when this is the end."""
        idle = not any(engine.active or engine.waiting for engine in self.engines.values())
        while True:
            try:
                message = self.inbox.get(block=idle)
            except queue.Empty:
                return
            if message[0] == "stop":
                raise EOFError
            idle = False
            yield message

    def run(self) -> None:
        """Draw until the pipe is closed."""
        while True:
            for kind, number, *rest in self.messages():
                if kind == "cancel":
                    for engine in self.engines.values():
                        engine.cancel(number)
                else:
                    self.take(number, *rest)
            for engine in self.engines.values():
                self.step(engine)
            self.tell()

    def take(self, number: int, job: Job) -> None:
        """Give a job to its model."""
        try:
            self.engines[job.model].take(number, job)
        except Exception as error:
            self.connection.send((outcome(error), number, cli.message(error)))
            if not isinstance(error, ValueError):
                traceback.print_exc()

    def step(self, engine: ModelEngine) -> None:
        """One step of a model. If it fails, its jobs do, and it begins anew."""
        try:
            engine.step()
        except OSError:
            raise  # the pipe is closed
        except Exception as error:
            traceback.print_exc()
            for drawing in list(engine.drawings.values()):
                self.connection.send(("failed", drawing.number, f"{type(error).__name__} in a step, of which the "
                                                                "server's log says more"))
            engine.waiting.clear()
            engine.active.clear()
            engine.drawings.clear()
            engine.renew()

    def tell(self) -> None:
        """Say how many images are decoded and wait, if that has changed."""
        load = (sum(len(engine.active) for engine in self.engines.values()),
                sum(len(engine.waiting) for engine in self.engines.values()))
        now = time.monotonic()
        if load != self.told and (now - self.last > TELL_EVERY or load == (0, 0)):
            self.connection.send(("load", *load))
            self.told, self.last = load, now


def main(connection: Connection, models: list[ServedModel], slots: int) -> None:
    """Load the models and draw. The one who started this process ends it, by closing the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach all of a group or service: the server ends in order
        signal.signal(number, signal.SIG_IGN)
    try:
        device = dist.setup().device
        found = [ModelEngine(model, device=device, slots=slots, send=connection.send) for model in models]
    except Exception as error:
        if not isinstance(error, ValueError | OSError):
            traceback.print_exc()
        connection.send(("failed", None, cli.message(error)))
        return
    engines = Engines(found, connection)
    try:
        connection.send(("ready", [engine.card for engine in found]))
        engines.run()
    except (EOFError, OSError):
        sys.exit(0)
