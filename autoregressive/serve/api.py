"""A server of pictures over HTTP, in the shape of OpenAI's images API.

    python3 autoregressive/serve/api.py --gpt-ckpt GPT.pt --vq-ckpt VQ.pt
    curl localhost:8000/v1/images/generations -H 'Content-Type: application/json' \\
        -d '{"prompt": "faces", "n": 2, "seed": 0}'

Routes: POST /v1/images/generations and /v1/images/edits, GET /v1/models, /health, /metrics (Prometheus) and
/openapi.json. Without models on the command line it offers those that the quickstart trained. Picture (seed, index) is
the one that the grid commands draw with the same settings, whatever else is being drawn.
"""
import asyncio
import base64
import io
import json
import os
import secrets
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.serve.protocol import Backend, Job, OverloadedError, Picture, UnavailableError
from autoregressive.serve.served import ServeFlags, served_models
from utils import cli
from utils.cli import flag

RETRY_AFTER = 5  # seconds, while models are loaded
KEPT_BYTES, KEPT_SECONDS = 256 * 2**20, 3600  # of pictures that are handed out by URL
MIME = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
QUALITY = {"jpeg": 95, "webp": 95}
BODY_SECONDS = 60.0  # in which a request must arrive
CONNECTIONS = 2048  # at once
GONE = 499  # the status that logs have for a client that went away


@dataclass(kw_only=True)
class BindFlags:
    """Where to listen."""

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: all, so that other machines can ask")
    port: int = flag(8000, "port to listen at; 0: a free one")


@dataclass(kw_only=True)
class BackendFlags(ServeFlags):
    """How the models are run."""

    slots: int = flag(64, "images of a model that are decoded at once, or fewer where memory is short")
    queue: int = flag(256, "images that may wait besides; what goes beyond is answered 429")


@dataclass(kw_only=True)
class ServerFlags(BackendFlags, BindFlags):
    """The server."""

    backend: Literal["native", "vllm"] = flag("native", "what draws: the decoder of this program, or vLLM (in the "
                                                        "environment that scripts/serve_env.sh makes)",
                                              choices=("native", "vllm"))
    api_key: str | None = flag(None, "clients must send this key; None: what LLAMAGEN_API_KEY holds, else none is "
                                     "needed")
    request_seconds: float = flag(600.0, "longest time that a request may take; then it is answered 504")
    drain_seconds: int = flag(30, "on SIGTERM or Ctrl-C no more requests are taken; time for those in progress")
    most_upload: float = flag(20.0, "MiB that a request may have")
    most_pixels: int = flag(4096 * 4096, "pixels that an uploaded picture may have")


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


async def while_wanted(request: Any, pictures: AsyncIterator[Picture], *, until: float) -> AsyncIterator[Picture]:
    """The pictures, as long as the client is there; it closes `pictures`, which frees their places.

    Raises ClientGoneError, or RefusedError when `until` (of time.monotonic) has come.
    """
    from autoregressive.serve.fields import RefusedError

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
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


def make_app(backend: Backend, flags: ServerFlags) -> Any:
    """The FastAPI application over a backend, which it starts and stops."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

    from autoregressive.serve.fields import (
        EditFields,
        GenerationFields,
        RefusedError,
        card_for,
        fields_of,
        job_of,
    )
    from autoregressive.serve.guard import Guard, error_body, error_headers
    from autoregressive.serve.telemetry import Telemetry

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.stop()

    app = FastAPI(title="llamagen", docs_url=None, redoc_url=None, lifespan=lifespan)  # pages with foreign scripts
    key = flags.api_key or os.environ.get("LLAMAGEN_API_KEY")
    app.add_middleware(Guard, api_key=key, most_bytes=int(flags.most_upload * 2**20), seconds=BODY_SECONDS)
    kept, telemetry = KeptPictures(), Telemetry(backend)

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
        return RefusedError(f"the pictures could not be drawn: {cli.message(error)}", status=500)

    def answer(route: str, error: Exception) -> Response:
        if isinstance(error, ClientGoneError):
            telemetry.note(route, GONE)
            return Response(status_code=GONE)
        told = refusal(error)
        telemetry.note(route, told.status)
        return JSONResponse(error_body(told), status_code=told.status, headers=error_headers(told))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        return answer("other", RefusedError(text, status=error.status_code))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer("other", RuntimeError("an error of the server"))

    # ---- what is there

    @app.get("/health")
    async def health() -> Response:
        ready = backend.state == "ready"
        return JSONResponse({"status": "ok" if ready else "loading"}, status_code=200 if ready else 503,
                            headers={} if ready else {"Retry-After": str(RETRY_AFTER)})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(telemetry.text(), media_type="text/plain; version=0.0.4")

    def described(card: Any) -> dict[str, Any]:
        return {**card.as_json(), "id": card.name, "object": "model", "owned_by": "llamagen"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [described(card) for card in backend.cards]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        try:
            return JSONResponse(described(card_for(name, backend.cards)))
        except RefusedError as error:
            return answer("models", error)

    @app.get("/v1/images/files/{name}")
    async def file(name: str) -> Response:
        content = kept.get(name)
        if content is None:
            return answer("files", RefusedError("there is no such picture: they are kept for an hour", status=404))
        return Response(content, media_type=MIME[name.rpartition(".")[2]])

    # ---- pictures

    async def respond(request: Request, route: str, read: Callable) -> Response:
        """Read a request into its fields and job, draw, answer."""
        start = time.monotonic()
        try:
            fields, job = await read()
            pictures = while_wanted(request, backend.draw(job), until=start + flags.request_seconds)
            if fields.stream:
                first = await anext(pictures)  # what is refused has its status
                return StreamingResponse(events(request, route, fields, job, first, pictures, start),
                                         media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            data: list[Any] = [None] * len(job.indices)
            async with aclosing(pictures):
                async for picture in pictures:
                    telemetry.note_picture(job)
                    data[picture.which] = await datum(request, fields, job, picture)
        except Exception as error:
            return answer(route, error)
        telemetry.note(route, 200, seconds=time.monotonic() - start)
        height, width = data_size(job)
        return JSONResponse({"created": int(time.time()), "data": data, "model": job.model, "size": f"{width}x{height}",
                             "output_format": fields.output_format or "png"})

    def data_size(job: Job) -> tuple[int, int]:
        return card_for(job.model, backend.cards).image_size

    async def datum(request: Request, fields: GenerationFields, job: Job, picture: Picture) -> dict[str, Any]:
        """A picture in an answer."""
        kind = fields.output_format or "png"
        content = await asyncio.to_thread(encoded, picture.pixels, kind, fields.output_compression)
        place = {"url": str(request.base_url) + f"v1/images/files/{kept.add(content, kind)}"} \
            if fields.response_format == "url" and picture.partial is None else {
                "b64_json": base64.b64encode(content).decode()}
        return {**place, "seed": job.seed, "index": job.indices[picture.which]}

    async def events(request: Request, route: str, fields: GenerationFields, job: Job, first: Picture,
                     pictures: AsyncIterator[Picture], start: float) -> AsyncIterator[str]:
        """Server-sent events of pictures, partial ones among them."""
        family = "image_edit" if route == "edits" else "image_generation"
        height, width = data_size(job)
        status = 200
        try:
            async with aclosing(pictures):
                picture: Picture | None = first
                while picture is not None:
                    kind = f"{family}.{'completed' if picture.partial is None else 'partial_image'}"
                    event = {"type": kind, **await datum(request, fields, job, picture), "created_at": int(time.time()),
                             "image_index": picture.which, "share": picture.share, "size": f"{width}x{height}",
                             "quality": "auto", "background": "opaque", "output_format": fields.output_format or "png"}
                    if picture.partial is None:
                        telemetry.note_picture(job)
                    else:
                        event["partial_image_index"] = picture.partial
                    yield f"event: {kind}\ndata: {json.dumps(event)}\n\n"
                    picture = await anext(pictures, None)
        except ClientGoneError:
            status = GONE
        except (asyncio.CancelledError, GeneratorExit):
            status = GONE
            raise
        except Exception as error:
            told = refusal(error)
            status = told.status
            yield f"event: error\ndata: {json.dumps({'type': 'error', **error_body(told)})}\n\n"
        finally:
            telemetry.note(route, status, seconds=time.monotonic() - start if status == 200 else None)

    @app.post("/v1/images/generations", openapi_extra=body_schema("application/json", GenerationFields))
    async def generations(request: Request) -> Response:
        async def read() -> tuple[GenerationFields, Job]:
            fields = fields_of(GenerationFields, parsed(await request.body()))
            return fields, job_of(fields, card_for(fields.model, backend.cards))

        return await respond(request, "generations", read)

    def parsed(body: bytes) -> Any:
        try:
            return json.loads(body)
        except (ValueError, RecursionError):  # also for bytes that are no UTF-8
            raise RefusedError("the body is no JSON: expected {\"prompt\": …, …}") from None

    @app.post("/v1/images/edits", openapi_extra=body_schema("multipart/form-data", EditFields))
    async def edits(request: Request) -> Response:
        async def read() -> tuple[EditFields, Job]:
            values, files = {}, {}
            try:
                form = await request.form(max_files=4, max_fields=64)
            except HTTPException as error:
                raise RefusedError(f"the form cannot be read: {error.detail}") from None
            async with aclosing_form(form):
                for name, value in form.multi_items():
                    found = files if isinstance(value, UploadFile) else values
                    name = name.removesuffix("[]")
                    if name in found:
                        raise RefusedError(f"{name} is given twice, one is taken", param=name)
                    found[name] = await value.read() if found is files else value
            unknown = next((name for name in files if name not in ("image", "mask")), None)
            if "image" not in files or unknown is not None:
                raise RefusedError("expected a form (multipart/form-data) with the files image and, if you like, mask"
                                   + (f"; there is a file {unknown[:50]!r}" if unknown else ""), param="image")
            fields = fields_of(EditFields, values, strings=True)
            job = await asyncio.to_thread(job_of, fields, card_for(fields.model, backend.cards), image=files["image"],
                                          mask=files.get("mask"), most_pixels=flags.most_pixels)
            return fields, job

        return await respond(request, "edits", read)

    return app


@asynccontextmanager
async def aclosing_form(form: Any) -> AsyncIterator[None]:
    """Close the files of a form at the end."""
    try:
        yield
    finally:
        await form.close()


def body_schema(kind: str, fields: Any) -> dict[str, Any]:
    """What /openapi.json says of a route's body."""
    schema = fields.model_json_schema()
    if kind.startswith("multipart"):
        schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    return {"requestBody": {"content": {kind: {"schema": schema}}, "required": True}}


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ValueError if the port is taken, or the address is none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise ValueError(f"cannot listen at {host}:{port} ({getattr(error, 'strerror', None) or error}): give another "
                         "--port, or 0 for a free one") from None
    return listening


def make_backend(flags: ServerFlags) -> Backend:
    """What draws."""
    if flags.slots < 1 or flags.queue < 0:
        raise ValueError(f"--slots is {flags.slots} and --queue {flags.queue}: expected 1 or more, and 0 or more")
    models = served_models(flags)
    if flags.backend == "vllm":
        from autoregressive.serve.vllm_backend import VLLMBackend

        return VLLMBackend(models, slots=flags.slots, waiting=flags.queue)
    from autoregressive.serve.native_backend import NativeBackend

    return NativeBackend(models, slots=flags.slots, waiting=flags.queue)


async def serve(flags: ServerFlags, backend: Backend, listening: socket.socket) -> None:
    """Load the models and answer until SIGTERM or Ctrl-C."""
    import uvicorn

    try:
        await backend.start()
        config = uvicorn.Config(make_app(backend, flags), log_level="warning", limit_concurrency=CONNECTIONS,
                                timeout_graceful_shutdown=flags.drain_seconds)
        host, port = listening.getsockname()[:2]
        names = ", ".join(card.name for card in backend.cards)
        print(f"ready: http://{f'[{host}]' if ':' in host else host}:{port}/v1/images/generations draws {names}",
              flush=True)
        await uvicorn.Server(config).serve(sockets=[listening])
    finally:
        await backend.stop()


def main(flags: ServerFlags) -> None:
    """Serve."""
    for package in ("fastapi", "uvicorn", "prometheus_client", "multipart"):
        cli.require_package(package, purpose="the server", package="'llamagen[serve]'")
    for name in ("request_seconds", "most_upload", "most_pixels"):
        if not getattr(flags, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(flags, name)}, expected more than 0")
    listening = bound_socket(flags.host, flags.port)
    with listening:
        asyncio.run(serve(flags, make_backend(flags), listening))


if __name__ == "__main__":
    cli.run(main, ServerFlags)
