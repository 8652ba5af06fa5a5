"""Pictures as a server hands them out: as files, by URL, and only as long as somebody waits for them."""
import asyncio
import io
import secrets
import time
import traceback
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
from PIL import Image

from autoregressive.serve.fields import RefusedError
from autoregressive.serve.protocol import FailedError, OverloadedError, Picture, UnavailableError
from utils import cli

RETRY_AFTER = 5  # seconds, while models are loaded
KEPT_BYTES, KEPT_SECONDS = 256 * 2**20, 3600  # of pictures that are handed out by URL
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = {"jpeg": 95, "webp": 95}


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class KeptPictures:
    """Pictures that are handed out by URL: for an hour, the newest 256 MiB."""

    def __init__(self) -> None:
        self.pictures: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.size = 0

    def add(self, content: bytes, kind: str) -> str:
        """Keep a picture; its name, which nobody can guess."""
        name = f"{secrets.token_urlsafe(18)}.{kind}"
        self.pictures[name] = time.monotonic(), content
        self.size += len(content)
        while self.size > KEPT_BYTES and len(self.pictures) > 1:
            self.drop()
        return name

    def get(self, name: str) -> bytes | None:
        """A picture, if it is still there."""
        while self.pictures and next(iter(self.pictures.values()))[0] < time.monotonic() - KEPT_SECONDS:
            self.drop()
        return self.pictures[name][1] if name in self.pictures else None

    def drop(self) -> None:
        """Forget the oldest."""
        self.size -= len(self.pictures.popitem(last=False)[1][1])


def encoded(pixels: np.ndarray, kind: str, compression: int | None) -> bytes:
    """A picture uint8 (H, W, 3) as a file. compression: of OpenAI's API, the quality of JPEG and WebP, 0 to 100."""
    file = io.BytesIO()
    quality = {} if kind == "png" else {"quality": QUALITY[kind] if compression is None else compression}
    Image.fromarray(pixels).save(file, format=kind, **quality)
    return file.getvalue()


async def while_wanted(receive: Callable[[], Awaitable[dict[str, Any]]], pictures: AsyncIterator[Picture], *,
                       until: float) -> AsyncIterator[Picture]:
    """The pictures, as long as the client is there; at the end it closes `pictures`, which frees their places. receive:
    of ASGI, after the request has arrived.

    Raises ClientGoneError, or RefusedError when `until` (of time.monotonic) has come.
    """
    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def following() -> Picture | None:
        return await anext(pictures, None)

    gone = asyncio.ensure_future(disconnect())
    try:
        async with aclosing(pictures):
            while True:
                step = asyncio.ensure_future(following())
                try:
                    await asyncio.wait({gone, step}, timeout=max(0.0, until - time.monotonic()),
                                       return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not step.done():
                        step.cancel()
                        with suppress(asyncio.CancelledError):
                            await step
                if step.cancelled():
                    if gone.done():
                        raise ClientGoneError
                    raise RefusedError("the pictures took too long", status=504)
                if step.result() is None:
                    return
                yield step.result()
    finally:
        gone.cancel()


def refusal(error: Exception) -> RefusedError:
    """Any error of a request as what its client is told."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, OverloadedError):
        return RefusedError(str(error), status=429, code="overloaded", retry_after=error.seconds)
    if isinstance(error, UnavailableError):
        return RefusedError(str(error), status=503, code="unavailable", retry_after=RETRY_AFTER)
    if isinstance(error, ValueError):
        return RefusedError(cli.message(error))
    if isinstance(error, FailedError):
        return RefusedError(f"the pictures could not be drawn: {cli.message(error)}", status=500)
    traceback.print_exception(error)
    return RefusedError("an error of the server, of which its log says more", status=500)
