"""The routes of the server: a request's fields become a job, a backend draws it, its pictures are the answer."""
import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from autoregressive.serve.answers import (
    MIME,
    RETRY_AFTER,
    ClientGoneError,
    KeptPictures,
    encoded,
    refusal,
    while_wanted,
)
from autoregressive.serve.fields import EditFields, GenerationFields, RefusedError, card_for, fields_of, job_of
from autoregressive.serve.guard import Guard, error_body, error_headers
from autoregressive.serve.protocol import EngineBackend, Job, ModelCard, Picture
from autoregressive.serve.telemetry import Telemetry

GONE = 499  # the status that logs have for a client that went away
BODY_SECONDS = 60.0  # in which a request must arrive, and in which a client must read something of its answer
UPLOADS_AT_ONCE = 2  # pictures that are decoded at the same time
MOST_JSON = 2**20  # bytes; more than any request that makes sense


def make_app(backend: EngineBackend, *, api_key: str | None = None, request_seconds: float = 600.0,
             most_bytes: int = 20 * 2**20, most_pixels: int = 2**24, body_seconds: float = BODY_SECONDS) -> FastAPI:
    """The application over a backend that was started, which it stops in the end. The limits: see `ServerFlags`."""
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await backend.stop()

    app = FastAPI(title="llamagen", docs_url=None, redoc_url=None, lifespan=lifespan)  # pages with foreign scripts
    app.add_middleware(Guard, api_key=api_key, most_bytes=most_bytes, seconds=body_seconds)
    routes = Routes(backend, request_seconds=request_seconds, most_pixels=most_pixels)
    app.get("/health")(routes.health)
    app.get("/metrics")(routes.metrics)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}")(routes.model)
    app.get("/v1/images/files/{name}")(routes.file)
    app.post("/v1/images/generations", openapi_extra=body_schema("application/json", GenerationFields))(
        routes.generations)
    app.post("/v1/images/edits", openapi_extra=body_schema("multipart/form-data", EditFields))(routes.edits)
    app.exception_handler(HTTPException)(routes.no_route)
    app.exception_handler(RefusedError)(routes.no_route)
    app.exception_handler(Exception)(routes.broken)
    return app


class Routes:
    """The routes over one backend."""

    def __init__(self, backend: EngineBackend, *, request_seconds: float, most_pixels: int) -> None:
        self.backend, self.request_seconds, self.most_pixels = backend, request_seconds, most_pixels
        self.kept, self.telemetry = KeptPictures(), Telemetry(backend)
        self.decoding = asyncio.Semaphore(UPLOADS_AT_ONCE)

    # ---- what is there

    async def health(self) -> Response:
        """Whether jobs are taken."""
        ready = self.backend.state == "ready"
        return JSONResponse({"status": "ok" if ready else "loading"}, status_code=200 if ready else 503,
                            headers={} if ready else {"Retry-After": str(RETRY_AFTER)})

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(self.telemetry.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> Response:
        """All models; the first is the default."""
        return JSONResponse({"object": "list", "data": [model_entry(card) for card in self.backend.cards]})

    async def model(self, name: str) -> Response:
        """One model."""
        try:
            return JSONResponse(model_entry(card_for(name, self.backend.cards)))
        except RefusedError as error:
            return self.answer("models", error)

    async def file(self, name: str) -> Response:
        """A picture that was handed out by URL."""
        content = self.kept.get(name)
        if content is None:
            return self.answer("files", RefusedError("there is no such picture: they are kept for an hour at most",
                                                     status=404))
        return Response(content, media_type=MIME[name.rpartition(".")[2]])

    # ---- errors

    def answer(self, route: str, error: Exception) -> Response:
        """What a client is told of an error."""
        if isinstance(error, ClientGoneError | ClientDisconnect):
            self.telemetry.note(route, GONE)
            return Response(status_code=GONE)
        told = refusal(error)
        self.telemetry.note(route, told.status)
        return JSONResponse(error_body(told), status_code=told.status, headers=error_headers(told))

    async def no_route(self, request: Request, error: HTTPException | RefusedError) -> Response:
        """An error of Starlette's, or of the guard's where no route reads the body."""
        if isinstance(error, HTTPException):
            error = RefusedError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        return self.answer("other", error)

    async def broken(self, request: Request, error: Exception) -> Response:
        """An error of ours. Its traceback is in the log."""
        return self.answer("other", RefusedError("an error of the server, of which its log says more", status=500))

    # ---- pictures

    async def generations(self, request: Request) -> Response:
        """Pictures of a class or a prompt."""
        async def read() -> tuple[GenerationFields, Job]:
            body = await request.body()
            if len(body) > MOST_JSON:
                raise RefusedError(f"the JSON has more than {MOST_JSON / 2**20:g} MiB", status=413)
            try:
                values = json.loads(body)
            except (ValueError, RecursionError):  # also of bytes that are no UTF-8
                raise RefusedError('the body is no JSON: expected {"prompt": …, …}') from None
            fields = fields_of(GenerationFields, values)
            return fields, job_of(fields, card_for(fields.model, self.backend.cards))

        return await self.respond(request, "generations", read)

    async def edits(self, request: Request) -> Response:
        """A picture with parts drawn anew."""
        async def read() -> tuple[EditFields, Job]:
            values, files = await read_form(request)
            fields = fields_of(EditFields, values, strings=True)
            card = card_for(fields.model, self.backend.cards, edit=True)
            async with self.decoding:  # a picture of 58 KB may have 16 million pixels
                job = await asyncio.to_thread(job_of, fields, card, **files, most_pixels=self.most_pixels)
            return fields, job

        return await self.respond(request, "edits", read)

    async def respond(self, request: Request, route: str, read: Callable[[], Awaitable[tuple[GenerationFields, Job]]],
                      ) -> Response:
        """Read a request, draw, answer with all pictures or with events."""
        start = time.monotonic()
        try:
            fields, job = await read()
            pictures = while_wanted(request.receive, self.backend.draw(job), until=start + self.request_seconds)
            if fields.stream:
                first = await anext(pictures)  # so that a refusal has its status
                return StreamingResponse(self.events(request, route, fields, job, first, pictures, start),
                                         media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            data: list[Any] = [None] * len(job.indices)
            async with aclosing(pictures):
                async for picture in pictures:
                    self.telemetry.note_picture(job)
                    data[picture.which] = await self.datum(request, fields, job, picture)
        except Exception as error:
            return self.answer(route, error)
        self.telemetry.note(route, 200, seconds=time.monotonic() - start)
        return JSONResponse({"created": int(time.time()), "data": data, "model": job.model, **self.shape(fields, job)})

    def shape(self, fields: GenerationFields, job: Job) -> dict[str, str]:
        """What OpenAI's API says of all pictures of an answer."""
        height, width = card_for(job.model, self.backend.cards).image_size
        return {"size": f"{width}x{height}", "quality": "auto", "background": "opaque",
                "output_format": fields.output_format or "png"}

    async def datum(self, request: Request, fields: GenerationFields, job: Job, picture: Picture) -> dict[str, Any]:
        """A picture in an answer; partial ones have no URL."""
        kind = fields.output_format or "png"
        content = await asyncio.to_thread(encoded, picture.pixels, kind, fields.output_compression)
        if fields.response_format == "url" and picture.partial is None:
            place = {"url": f"{request.base_url}v1/images/files/{self.kept.add(content, kind)}"}
        else:
            place = {"b64_json": base64.b64encode(content).decode()}
        return {**place, "seed": job.seed, "index": job.indices[picture.which]}

    async def events(self, request: Request, route: str, fields: GenerationFields, job: Job, picture: Picture | None,
                     pictures: AsyncIterator[Picture], start: float) -> AsyncIterator[str]:
        """Server-sent events: `picture` and those that follow it, partial ones among them."""
        family, status = {"edits": "image_edit"}.get(route, "image_generation"), 200
        try:
            async with aclosing(pictures):
                while picture is not None:
                    kind = f"{family}.{'completed' if picture.partial is None else 'partial_image'}"
                    event = {"type": kind, **await self.datum(request, fields, job, picture),
                             "created_at": int(time.time()), "image_index": picture.which, "share": picture.share,
                             **self.shape(fields, job)}
                    if picture.partial is None:
                        self.telemetry.note_picture(job)
                    else:
                        event["partial_image_index"] = picture.partial
                    yield f"event: {kind}\ndata: {json.dumps(event)}\n\n"
                    picture = await anext(pictures, None)
        except (ClientGoneError, asyncio.CancelledError, GeneratorExit) as error:
            status = GONE
            if not isinstance(error, ClientGoneError):
                raise
        except Exception as error:
            told = refusal(error)
            status = told.status
            yield f"event: error\ndata: {json.dumps({'type': 'error', **error_body(told)})}\n\n"
        finally:
            self.telemetry.note(route, status, seconds=time.monotonic() - start if status == 200 else None)


def model_entry(card: ModelCard) -> dict[str, Any]:
    """A model in OpenAI's shape, with what the card says."""
    return {**card.as_json(), "id": card.name, "object": "model", "owned_by": "llamagen"}


async def read_form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """The values of a form and its files image and mask. Raises RefusedError."""
    values, files = {}, {}
    try:
        form = await request.form(max_files=4, max_fields=64)
    except HTTPException as error:
        raise RefusedError(f"the form cannot be read: {error.detail}") from None
    try:
        for name, value in form.multi_items():
            found, name = (files if isinstance(value, UploadFile) else values), name.removesuffix("[]")
            if name in found:
                raise RefusedError(f"{name[:50]} is given twice, one is taken", param=name[:50])
            found[name] = await value.read() if found is files else value
    finally:
        await form.close()
    if "image" not in files or not files.keys() <= {"image", "mask"}:
        raise RefusedError("expected a form (multipart/form-data) with the file image, the file mask if you like, and "
                           "no other files", param="image")
    return values, files


def body_schema(kind: str, fields: type[GenerationFields]) -> dict[str, Any]:
    """What /openapi.json says of a route's body."""
    schema = fields.model_json_schema()
    if kind.startswith("multipart"):
        schema["properties"] |= {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    return {"requestBody": {"content": {kind: {"schema": schema}}, "required": True}}
