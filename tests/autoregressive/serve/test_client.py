"""A server elsewhere as a backend: the same pictures, its refusals as errors in a line, nothing left behind."""
import asyncio
import contextlib
import socket

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

from autoregressive.serve.client import ServerBackend, lines_of, runs_of
from autoregressive.serve.native_backend import FailedError
from autoregressive.serve.protocol import Job, OverloadedError, UnavailableError
from autoregressive.serve.routes import make_app
from tests.autoregressive.serve.coloured import CARDS, ColouredBackend
from tests.autoregressive.serve.serving import served


@pytest.fixture
def coloured():
    """A backend, and the address of a server over it."""
    backend = ColouredBackend()
    with served(make_app(backend)) as url:
        yield backend, url


def asked(model: str = "emoji-gpt", **given) -> Job:
    return Job(**{"model": model, "condition": 1, "seed": 5, "indices": (0, 1), "cfg_scale": 2.5, "temperature": 0.7,
                  "top_k": 9, "top_p": 0.5, "partials": 3} | given)


def drawn(url: str, job: Job, **given) -> list:
    """The pictures of a job, by way of the server."""
    async def draw():
        backend = ServerBackend(url, **given)
        try:
            await backend.start()
            assert backend.cards == CARDS and backend.state == "ready"
            return [picture async for picture in backend.draw(job)]
        finally:
            await backend.stop()

    return asyncio.run(draw())


def direct(job: Job) -> list:
    async def draw():
        return [picture async for picture in ColouredBackend().draw(job)]

    return asyncio.run(draw())


HOLE = np.zeros((16, 16), bool)
HOLE[3:9, 5:] = True
EDIT = {"image": np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8), "mask": HOLE}


@pytest.mark.parametrize("job", [
    asked(), asked(condition=None), asked(condition=0, partials=0), asked("emoji-arpg", steps=4),
    asked("emoji-text", condition="red heart"), asked("emoji-text", condition=None),
    asked("emoji-arpg", **EDIT, paste=2, steps=7), asked(**EDIT, condition=None), asked(indices=(7,), seed=2**32 - 1)],
    ids=["class", "no class", "class 0", "arpg", "text", "no text", "edit", "edit without class", "index"])
def test_pictures_and_what_is_asked_are_the_same_as_without_a_server(coloured, job):
    backend, url = coloured
    pictures, wanted = drawn(url, job), direct(job)
    assert [(p.which, p.partial, p.share) for p in pictures] == [(p.which, p.partial, p.share) for p in wanted]
    assert all((p.pixels == w.pixels).all() for p, w in zip(pictures, wanted, strict=True))
    got, = backend.jobs
    for name in ("model", "condition", "seed", "cfg_scale", "temperature", "top_k", "top_p", "steps", "partials",
                 "paste"):
        assert getattr(got, name) == getattr(job, name), name
    assert list(got.indices) == list(job.indices)
    assert job.image is None or ((got.image == job.image).all() and (got.mask == job.mask).all())


def test_indices_with_gaps_are_asked_in_runs(coloured):
    backend, url = coloured
    assert list(runs_of([4, 5, 9, 2, 3])) == [(0, [4, 5]), (2, [9]), (3, [2, 3])]
    pictures = drawn(url, asked(indices=(4, 5, 9), partials=0))
    assert [p.which for p in pictures] == [0, 1, 2]
    assert [list(job.indices) for job in backend.jobs] == [[4, 5], [9]]


@pytest.mark.parametrize(("error", "good"), [
    (OverloadedError("80 are waiting", seconds=7), 0),
    (OverloadedError("80 are waiting", seconds=7), 9),
    (UnavailableError("the engine died"), 0), (UnavailableError("the engine died"), 9),
    (FailedError("it broke"), 0), (FailedError("it broke"), 9), (ValueError("no such thing"), 0)])
def test_refusals_are_the_errors_that_a_backend_raises(coloured, error, good):
    coloured[0].error, coloured[0].good = error, good
    with pytest.raises(type(error), match=str(error)) as raised:
        drawn(coloured[1], asked())
    assert good or getattr(raised.value, "seconds", 7) == 7


def test_what_the_server_does_not_take_is_said_in_its_words(coloured):
    with pytest.raises(ValueError, match="steps are for an ARPG"):
        drawn(coloured[1], asked(steps=3))
    with pytest.raises(ValueError, match="there is no model 'other'"):
        drawn(coloured[1], asked("other"))


def test_a_key_is_sent_and_its_lack_is_told():
    with served(make_app(ColouredBackend(), api_key="secret")) as url:
        assert drawn(url, asked(), api_key="secret")
        for wrong in (None, "other"):
            with pytest.raises(ValueError, match="wants a key: give the right one by --api-key"):
                drawn(url, asked(), api_key=wrong)


def test_closing_the_iterator_frees_the_server(coloured):
    backend, url = coloured
    backend.held, backend.good = True, 8

    async def leave():
        client = ServerBackend(url)
        await client.start()
        pictures = client.draw(asked())
        await anext(pictures)
        assert backend.open == 1
        await pictures.aclose()
        while backend.open:
            await asyncio.sleep(0.01)
        await client.stop()

    asyncio.run(asyncio.wait_for(leave(), 60))


def test_a_server_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    with pytest.raises(UnavailableError, match=r"does not answer .*is it running\?"):
        drawn(f"http://127.0.0.1:{port}", asked())


@pytest.mark.parametrize(("content", "said"), [
    ("", UnavailableError), ('data: {"type": "image_generation.partial_image"}\n\n', FailedError),
    ("data: nonsense\n\n", FailedError), ("data: [1]\n\n", FailedError), ("event: x\n: comment\n\n", UnavailableError),
    ('data: {"type": "x.completed", "b64_json": "AAAA", "image_index": 0, "share": 1}\n\n', FailedError)])
def test_strange_answers_are_errors_in_a_line(content, said):
    app = make_app(ColouredBackend())
    app.router.routes[:] = [route for route in app.router.routes if "generations" not in getattr(route, "path", "")]
    app.post("/v1/images/generations")(lambda: StreamingResponse(iter([content]), media_type="text/event-stream"))
    with served(app) as url, pytest.raises(said) as raised:
        drawn(url, asked())
    assert "\n" not in str(raised.value)


def test_another_server_is_recognised():
    app = FastAPI()
    app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "gpt-4", "object": "model"}]})
    with served(app) as url, pytest.raises(ValueError, match="is it another server"):
        drawn(url, asked())
    app = FastAPI()
    app.get("/v1/models")(lambda: PlainTextResponse("hello"))
    with served(app) as url, pytest.raises(ValueError, match="is it another server"):
        drawn(url, asked())
    with served(FastAPI()) as url, pytest.raises(ValueError, match="status 404"):
        drawn(url, asked())


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "http://", "http://host:port", "http://host:99999"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="expected an address such as http://host:8000"):
        ServerBackend(url)
    with pytest.raises(ValueError, match="--api-key"):
        ServerBackend("http://host", api_key="a\nb")


def test_lines_may_come_in_any_parts():
    async def parts():
        for part in (b"da", b"ta: 1\r\n\nda", b"ta: 2", b"\n"):
            yield part

    async def collect():
        async with contextlib.aclosing(parts()) as found:
            return [line async for line in lines_of(found)]

    assert asyncio.run(collect()) == [b"data: 1", b"", b"data: 2"]
