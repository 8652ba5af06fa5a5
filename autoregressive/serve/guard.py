"""What stands before a server's routes: the key, the size of what is sent and the time that sending it takes."""
import asyncio
import contextlib
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from autoregressive.serve.fields import RefusedError

OPEN = ("/health", "/v1/images/files/")  # beginnings of paths that need no key
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class StalledError(Exception):
    """A client reads nothing of its answer."""


def error_body(error: RefusedError) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: RefusedError) -> dict[str, str]:
    """The headers that go with an error."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return headers | ({"WWW-Authenticate": "Bearer"} if error.status == 401 else {})


class Guard:
    """ASGI middleware. Requests without the key are refused (401), with a body of more than `most_bytes` (413), or
    whose body takes more than `seconds` to arrive (408). A client that reads nothing for as long is cut off."""

    def __init__(self, app: Callable, *, api_key: str | None, most_bytes: int, seconds: float) -> None:
        self.app, self.key, self.most_bytes, self.seconds = app, api_key, most_bytes, seconds

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Hand a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self.check_key(scope["path"], headers)
            length = headers.get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self.most_bytes:
                raise self.too_large()
        except RefusedError as error:
            from starlette.responses import JSONResponse

            refusal = JSONResponse(error_body(error), status_code=error.status,
                                   headers=error_headers(error) | {"Connection": "close"})
            await refusal(scope, receive, send)
            return
        with contextlib.suppress(StalledError):
            await self.app(scope, self.limited(receive), self.watched(send))

    def check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Raise RefusedError for a request that needs the key and has it not."""
        given = headers.get(b"authorization", b"")
        wanted = b"Bearer " + (self.key or "").encode()
        if self.key is not None and not path.startswith(OPEN) and not hmac.compare_digest(given, wanted):
            raise RefusedError("the API key is wrong or missing: send it as Authorization: Bearer KEY", status=401,
                               code="invalid_api_key")

    def too_large(self) -> RefusedError:
        """The refusal of a large body."""
        return RefusedError(f"the request has more than {self.most_bytes / 2**20:g} MiB", status=413)

    def watched(self, send: Send) -> Send:
        """`send` with the limit on time."""
        async def watched_send(message: dict[str, Any]) -> None:
            try:
                await asyncio.wait_for(send(message), self.seconds)
            except asyncio.TimeoutError:
                raise StalledError from None

        return watched_send

    def limited(self, receive: Receive) -> Receive:
        """`receive` with the limits on size and time."""
        size, whole, until = 0, False, time.monotonic() + self.seconds

        async def limited_receive() -> dict[str, Any]:
            nonlocal size, whole
            if whole:
                return await receive()  # a disconnect
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise RefusedError(f"the request did not arrive within {self.seconds:g} s", status=408) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.most_bytes:
                raise self.too_large()
            return message

        return limited_receive
