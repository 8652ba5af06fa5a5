"""A server of pictures over HTTP, in the shape of OpenAI's images API.

    python3 autoregressive/serve/api.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt
    curl localhost:8000/v1/images/generations -d '{"prompt": "faces", "n": 2, "seed": 0}'

Routes: POST /v1/images/generations and /v1/images/edits, GET /v1/models, /health, /metrics (Prometheus) and
/openapi.json. Without models on the command line it offers those that the quickstart trained. Picture (seed, index) is
the one that the grid commands draw with the same settings, whatever else is being drawn.
"""
import asyncio
import math
import os
import signal
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.serve.backends import BackendFlags, make_backend
from autoregressive.serve.protocol import EngineBackend
from utils import cli
from utils.cli import flag

CONNECTIONS = 1024  # at once


@dataclass(kw_only=True)
class BindFlags:
    """Where to listen."""

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: all, so that other machines can ask")
    port: int = flag(8000, "port to listen at; 0: a free one")


@dataclass(kw_only=True)
class KeyFlags:
    """The server's key."""

    api_key: str | None = flag(None, "key that a server wants of its clients; None: what LLAMAGEN_API_KEY holds, if "
                                     "anything, else none is needed")

    @property
    def key(self) -> str | None:
        """The key in force."""
        return self.api_key or os.environ.get("LLAMAGEN_API_KEY") or None


@dataclass(kw_only=True)
class ServerFlags(BackendFlags, BindFlags, KeyFlags):
    """The server."""

    request_seconds: float = flag(600.0, "longest time that a request may take; then it is answered 504")
    drain_seconds: int = flag(30, "on SIGTERM or Ctrl-C no more requests are taken; time for those in progress")
    most_upload: float = flag(20.0, "MiB that a request may have")
    most_pixels: int = flag(2**24, "pixels that an uploaded picture may have")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises ValueError if the port is taken, or the address is none of this machine."""
    # With the protocol named, asyncio sends what is written at once; else an answer waits 40 ms for the client's ACK.
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()  # two servers could bind one port before either listens; clients wait while models are loaded
    except (OSError, OverflowError) as error:
        bound.close()
        raise ValueError(f"cannot listen at {host}:{port} ({getattr(error, 'strerror', None) or error}): give another "
                         "--port, or 0 for a free one") from None
    return bound


async def answer_until_told(app: Any, bound: socket.socket, *, drain_seconds: int) -> None:
    """Serve an ASGI application until SIGTERM or Ctrl-C; requests in progress have time to finish."""
    import uvicorn

    class Server(uvicorn.Server):
        """Does not raise a signal once more when it has ended, so that what comes after is done too."""

        def capture_signals(self) -> AbstractContextManager[None]:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self.handle_exit, number, None)
            return nullcontext()

    await Server(uvicorn.Config(app, log_level="warning", limit_concurrency=CONNECTIONS,
                                timeout_graceful_shutdown=drain_seconds)).serve(sockets=[bound])


async def serve(flags: ServerFlags, backend: EngineBackend, bound: socket.socket) -> None:
    """Load the models and answer until SIGTERM or Ctrl-C."""
    from autoregressive.serve.routes import make_app

    try:
        await backend.start()
        app = make_app(backend, api_key=flags.key, request_seconds=flags.request_seconds,
                       most_bytes=int(flags.most_upload * 2**20), most_pixels=flags.most_pixels)
        host, port = bound.getsockname()[:2]
        names = ", ".join(card.name for card in backend.cards)
        print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1/images/generations draws {names}",
              flush=True)
        await answer_until_told(app, bound, drain_seconds=flags.drain_seconds)
    finally:
        await backend.stop()


def main(flags: ServerFlags) -> None:
    """Serve."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        cli.require_package(package, purpose="the server", package="fastapi uvicorn prometheus-client python-multipart")
    for name in ("request_seconds", "most_upload", "most_pixels", "drain_seconds"):
        if not 0 < getattr(flags, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected more than 0")
    if flags.key is not None and not (flags.key.isascii() and flags.key.isprintable()):
        raise ValueError("the API key has letters that HTTP headers cannot carry: expected printable ASCII")
    with bound_socket(flags.host, flags.port) as bound:
        asyncio.run(serve(flags, make_backend(flags), bound))


if __name__ == "__main__":
    cli.run(main, ServerFlags)
