"""The page as a web application: it asks nothing of other hosts, and its backend belongs to the server's event loop."""
from typing import Any

from autoregressive.serve.api import answer_until_told, bound_socket
from autoregressive.serve.page import Page
from autoregressive.serve.page_style import CSS, POLICY, theme
from autoregressive.serve.protocol import Backend
from utils import cli

LARGEST_UPLOAD = "25mb"
PATIENCE = 3  # seconds that open connections are waited for at the end


def web_app(page: Page) -> Any:
    """The FastAPI application of a page."""
    import fastapi
    import gradio as gr
    from starlette.requests import ClientDisconnect

    app = fastapi.FastAPI(openapi_url=None)

    @app.middleware("http")
    async def only_from_here(request: fastapi.Request, call_next: Any) -> fastapi.Response:
        try:
            response = await call_next(request)
        except ClientDisconnect:  # a tab that was closed in the middle of an upload
            return fastapi.Response(status_code=400)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    return gr.mount_gradio_app(app, page.blocks, path="/", footer_links=[], run_history=False, ssr_mode=False,
                               max_file_size=LARGEST_UPLOAD, theme=theme(), css=CSS, mcp_server=False, pwa=False)


async def serve_page(backend: Backend, *, host: str, port: int, seed: int = 0) -> None:
    """Start the backend and show its page until the process is told to end. seed: what the page begins with."""
    place = bound_socket(host, port)
    try:
        await backend.start()
        app = web_app(Page(backend, seed=seed))
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        cli.say(f"the page is at http://{shown}:{place.getsockname()[1]} (Ctrl-C ends it)")
        await answer_until_told(app, place, drain_seconds=PATIENCE)
    finally:
        place.close()
        await backend.stop()
