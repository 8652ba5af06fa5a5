"""A server elsewhere as a backend: serve/api.py, asked over HTTP by httpx."""
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from autoregressive.serve.protocol import FailedError, Job, ModelCard, OverloadedError, Picture, UnavailableError
from utils.cli import require_package

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 20.0  # until there is a connection, until models are listed
SILENT_SECONDS = 660.0  # between two events of a stream: a server gives up after ten minutes
RETRY_AFTER = 5  # seconds, where a server does not say how long
MOST_BYTES = 64 * 2**20  # of one event: a picture of 4096 x 4096 pixels has fewer


class ServerBackend:
    """See `Backend`. url: such as http://host:8000; api_key: what the server wants to be sent."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        require_package("httpx", purpose="--server-url", package="httpx")
        try:
            parts = urlsplit(url.strip())
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"--server-url is {url!r}: expected an address such as http://host:8000")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("--api-key has characters that no header of HTTP can have")
        self.url = url.strip().rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.cards: list[ModelCard] = []
        self.client: Any = None

    @property
    def state(self) -> Literal["ready", "loading"]:
        """See `Backend`. Whether the server takes jobs shows when it is asked."""
        return "ready" if self.cards else "loading"

    async def start(self) -> None:
        """Ask which models there are. Raises UnavailableError if no server answers, ValueError if it is none of ours or
        refuses the key."""
        import httpx

        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS, pool=None)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        self.client = httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=timeout, limits=limits)
        try:
            async with self._asked("GET", "/v1/models", timeout=ANSWER_SECONDS) as response:
                content = await response.aread()
            self.cards = [described_card(described) for described in json.loads(content)["data"]]
        except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{self.url} answers, but not as serve/api.py of this version: is it another server?"
                             ) from None
        if not self.cards:
            raise UnavailableError(f"the server at {self.url} has no models yet: try again when it has loaded them")

    async def stop(self) -> None:
        """See `Backend`."""
        if self.client is not None:
            await self.client.aclose()

    async def draw(self, job: Job) -> AsyncIterator[Picture]:
        """See `Backend`. One request for each run of successive indices, one after the other."""
        for first, indices in runs_of(job.indices):
            async with self._asked("POST", *request_of(job, indices)) as response:
                left = len(indices)
                async for event in self._events(response):
                    picture = picture_of(event, first=first)
                    if picture is not None:
                        left -= picture.partial is None
                        yield picture
            if left:
                raise UnavailableError(f"the server at {self.url} ended its answer too early: try again")

    @asynccontextmanager
    async def _asked(self, method: str, path: str, options: dict[str, Any] | None = None, *,
                     timeout: float | None = None) -> AsyncIterator[Any]:
        """An answer of status 200, its content still to be read; leaving the block closes the connection. What goes
        wrong meanwhile is an UnavailableError, OverloadedError, ValueError or FailedError."""
        import httpx

        options = (options or {}) | ({} if timeout is None else {"timeout": timeout})
        try:
            async with self.client.stream(method, path, **options) as response:
                if response.status_code != 200:
                    raise self._refused(response.status_code, await response.aread(), response.headers)
                yield response
        except (httpx.TransportError, httpx.StreamError, httpx.DecodingError) as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"the server at {self.url} does not answer ({reason}): is it running?") from None
        except (httpx.InvalidURL, RuntimeError) as error:
            if isinstance(error, UnavailableError | OverloadedError | FailedError):
                raise
            raise UnavailableError(f"the server at {self.url} cannot be asked ({error})") from None

    def _refused(self, status: int, content: bytes, headers: Any) -> Exception:
        """What an answer of another status means."""
        try:
            told = json.loads(content)["error"]
            text = str(told["message"])
        except (LookupError, TypeError, ValueError, RecursionError):
            text = f"the server at {self.url} answered with status {status}"
        if status == 401:
            return ValueError(f"the server at {self.url} wants a key: give the right one by --api-key")
        if status == 429:
            wait = headers.get("retry-after", "")
            return OverloadedError(text, seconds=int(wait) if wait.isdecimal() and len(wait) < 6 else RETRY_AFTER)
        if status in (502, 503):
            return UnavailableError(text)
        return ValueError(text) if status < 500 else FailedError(text)

    async def _events(self, response: Any) -> AsyncIterator[dict[str, Any]]:
        """The server-sent events of an answer, as JSON objects. Raises what an event of an error means."""
        async for line in lines_of(response.aiter_bytes()):
            if not line.startswith(b"data:"):
                continue
            try:
                event = json.loads(line.removeprefix(b"data:"))
                kind = event["type"]
            except (LookupError, TypeError, ValueError, RecursionError):
                raise FailedError(f"the server at {self.url} sent an event that is none of serve/api.py") from None
            if kind == "error":
                status = {"overloaded": 429, "unavailable": 503}.get((event.get("error") or {}).get("code"), 500)
                raise self._refused(status, line.removeprefix(b"data:"), {})
            yield event


def described_card(described: dict[str, Any]) -> ModelCard:
    """A model as /v1/models describes it. Raises LookupError or TypeError."""
    values = {name: described[name] for name in ModelCard.__dataclass_fields__}
    for name in ("image_size", "grid"):
        h, w = values[name]
        values[name] = int(h), int(w)
    names = values["class_names"]
    return ModelCard(**values | {"class_names": names if names is None else tuple(map(str, names)),
                                 "defaults": dict(values["defaults"])})


def runs_of(indices: Any) -> Iterator[tuple[int, list[int]]]:
    """Runs of successive numbers, each with its position: 4, 5, 9 → (0, [4, 5]), (2, [9])."""
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = list(run)
        yield run[0][0], [index for _, index in run]


def request_of(job: Job, indices: list[int]) -> tuple[str, dict[str, Any]]:
    """Route and content of the request for images of successive indices."""
    from autoregressive.serve.answers import encoded

    fields = {"model": job.model, "n": len(indices), "index": indices[0], "seed": job.seed,
              "cfg_scale": job.cfg_scale, "temperature": job.temperature, "top_k": job.top_k, "top_p": job.top_p,
              "steps": job.steps, "stream": True, "partial_images": job.partials,
              "prompt" if isinstance(job.condition, str) else "class": job.condition}
    fields = {name: value for name, value in fields.items() if value is not None}
    if job.image is None:
        return "/v1/images/generations", {"json": fields}
    fields = fields if job.paste is None else fields | {"paste": job.paste}
    words = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in fields.items()}
    files = {"image": ("image.png", encoded(job.image, "png", None), "image/png"),
             "mask": ("mask.png", encoded(job.mask.astype(np.uint8) * 255, "png", None), "image/png")}
    return "/v1/images/edits", {"data": words, "files": files}


def picture_of(event: dict[str, Any], *, first: int) -> Picture | None:
    """The picture of an event; `first`: position of the request's first image. None for events of another kind."""
    if not str(event["type"]).endswith((".partial_image", ".completed")):
        return None
    try:
        with Image.open(io.BytesIO(base64.b64decode(event["b64_json"], validate=True)), formats=("PNG",)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        partial = event["partial_image_index"] if event["type"].endswith(".partial_image") else None
        return Picture(first + int(event["image_index"]), pixels, float(event["share"]), partial)
    except (LookupError, TypeError, ValueError, OSError):
        raise FailedError("the server sent a picture that cannot be read") from None


async def lines_of(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a stream, which may be long. Raises FailedError for one that never ends."""
    pending: list[bytes] = []
    size = 0
    async for part in parts:
        *lines, rest = part.split(b"\n")
        for line in lines:
            yield b"".join([*pending, line]).rstrip(b"\r")
            pending, size = [], 0
        pending.append(rest)
        size += len(rest)
        if size > MOST_BYTES:
            raise FailedError(f"the server sent a line of more than {MOST_BYTES >> 20} MiB")
