"""Web applications served by a thread of the tests, at a free port of this machine."""
import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from autoregressive.serve.api import bound_socket


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an ASGI application within the block; its address."""
    import uvicorn

    place = bound_socket("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[place])), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"  # who asks too early waits in the socket's queue
    finally:
        server.should_exit = True
        thread.join()
        place.close()
