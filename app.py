"""A page to play with: choose a model and a class or write a prompt, watch pictures appear, redraw parts of them.

    python3 app.py                                     the models that the quickstart trained
    python3 app.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt   a model of yours, or a released one
    python3 app.py --server-url http://host:8000       the models of a server (autoregressive/serve/api.py)
"""
import asyncio
import dataclasses
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__" and not (find_spec("torch") and find_spec("gradio")):
    own = Path(__file__).resolve().parent / ".venv" / "bin" / "python"  # made by the quickstart
    if own.exists() and Path(sys.prefix).resolve() != own.parents[1]:
        os.execv(own, [str(own), *sys.argv])  # so that `python3 app.py` works where .venv is not activated
    if not find_spec("torch"):
        print(f"error: torch is not installed in {sys.executable}: run bash scripts/quickstart.sh, which makes .venv, "
              "then this command again", file=sys.stderr)
        sys.exit(2)

from autoregressive.sample.options import DrawSeedFlags
from autoregressive.serve.api import BindFlags, KeyFlags
from autoregressive.serve.backends import BackendFlags, make_backend
from autoregressive.serve.client import ServerBackend
from autoregressive.serve.page_server import serve_page
from autoregressive.serve.protocol import Backend, UnavailableError
from utils import cli
from utils.cli import flag


@dataclass(kw_only=True)
class PageFlags(BackendFlags, DrawSeedFlags, BindFlags, KeyFlags):
    """The page."""

    server_url: str | None = flag(None, "ask a server, such as http://host:8000, for pictures; None: draw them here")
    port: int = 7860


def chosen_backend(flags: PageFlags) -> Backend:
    """What draws: the models of a server, or those that are loaded here. Raises ValueError or FileNotFoundError."""
    if flags.server_url is None:
        if flags.api_key is not None:
            raise ValueError("--api-key is what a server is sent: give --server-url too")
        return make_backend(flags)
    for field in dataclasses.fields(BackendFlags):
        if getattr(flags, field.name) != getattr(PageFlags, field.name):
            raise ValueError(f"--{field.name.replace('_', '-')} is for models that are loaded here, but --server-url "
                             "asks a server for its own: leave one of them out")
    return ServerBackend(flags.server_url, api_key=flags.key)


def main(flags: PageFlags) -> None:
    """Show the page until the process is told to end."""
    for package in ("gradio", "httpx"):
        cli.require_package(package, purpose="the page", package="gradio httpx")
    try:
        asyncio.run(serve_page(chosen_backend(flags), host=flags.host, port=flags.port, seed=flags.seed))
    except UnavailableError as error:
        raise ValueError(str(error)) from None


if __name__ == "__main__":
    cli.run(main, PageFlags)
