"""The routes over a backend that draws in colours: answers, events, refusals, limits, clients that go away."""
import asyncio
import base64
import io
import json
import re
import socket
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from autoregressive.serve.answers import KeptPictures
from autoregressive.serve.protocol import FailedError, OverloadedError, UnavailableError
from autoregressive.serve.routes import make_app
from tests.autoregressive.serve.coloured import CARDS, COLOURS, ColouredBackend
from tests.autoregressive.serve.serving import served

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class Counted(ColouredBackend):
    """With what /metrics asks for."""

    decoding = waiting = restarts = 0


@pytest.fixture
def backend() -> Counted:
    return Counted()


@pytest.fixture
def url(backend):
    with served(make_app(backend, most_bytes=100_000, body_seconds=0.5, request_seconds=20, most_pixels=10_000)) as url:
        yield url


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def pixels(datum: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))).convert("RGB"))


def error(response: httpx.Response) -> str:
    """The message of an answer in OpenAI's shape of errors."""
    told = response.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    assert told["type"] == {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}.get(
        response.status_code, "invalid_request_error")
    return told["message"]


def until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def test_pictures_with_their_seed_and_index(client):
    answer = client.post(GENERATIONS, json={"prompt": "flags", "n": 2, "seed": 3, "index": 5}).json()
    assert [(datum["seed"], datum["index"]) for datum in answer["data"]] == [(3, 5), (3, 6)]
    assert (answer["model"], answer["size"], answer["output_format"]) == ("emoji-gpt", "16x16", "png")
    assert np.array_equal(pixels(answer["data"][1]), np.broadcast_to(np.uint8(COLOURS[1]), (16, 16, 3)))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_files_by_url(client, kind):
    asked = {"prompt": "flags", "response_format": "url", "output_format": kind, "output_compression": 80}
    url = client.post(GENERATIONS, json=asked).json()["data"][0]["url"]
    found = client.get(url)
    assert found.headers["content-type"] == f"image/{kind}"
    assert Image.open(io.BytesIO(found.content)).format == kind.upper()
    assert "kept for an hour" in error(client.get("/v1/images/files/other.png"))


def test_kept_pictures_are_bounded(monkeypatch):
    from autoregressive.serve import answers

    monkeypatch.setattr(answers, "KEPT_BYTES", 100)
    kept = KeptPictures()
    names = [kept.add(bytes(40), "png") for _ in range(5)]
    assert [kept.get(name) is not None for name in names] == [False, False, False, True, True] and kept.size == 80
    monkeypatch.setattr(answers, "KEPT_SECONDS", -1)
    assert kept.get(names[-1]) is None and kept.size == 0


def events(response: httpx.Response) -> list[dict]:
    found = []
    for line in response.iter_lines():
        if line.startswith("event: "):
            found.append({"event": line.removeprefix("event: ")})
        elif line.startswith("data: "):
            found[-1] |= json.loads(line.removeprefix("data: "))
    return found


def test_events(client):
    asked = {"prompt": "flags", "n": 2, "stream": True, "partial_images": 3}
    with client.stream("POST", GENERATIONS, json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        found = events(response)
    assert all(event["event"] == event["type"] for event in found)
    assert [event["type"].split(".")[1] for event in found] == ["partial_image"] * 6 + ["completed"] * 2
    assert [(event["image_index"], event["partial_image_index"]) for event in found[:6]] == [
        (image, partial) for partial in range(3) for image in range(2)]
    assert all(0 < event["share"] < 1 for event in found[:6]) and np.array_equal(
        pixels(found[6]), pixels(client.post(GENERATIONS, json={"prompt": "flags"}).json()["data"][0]))


def test_an_error_in_the_middle_of_events_is_an_event(client, backend):
    backend.error, backend.good = UnavailableError("it died"), 8
    with client.stream("POST", GENERATIONS, json={"stream": True, "partial_images": 3}) as response:
        *_, last = events(response)
    assert response.status_code == 200 and last["event"] == "error" and last["error"]["message"] == "it died"


def test_refusals_of_backends(client, backend, capsys):
    for failed, status, retry in ((OverloadedError("full", seconds=7), 429, "7"), (UnavailableError("gone"), 503, "5"),
                                  (ValueError("no such thing"), 400, None), (FailedError("NaN"), 500, None)):
        backend.error = failed
        for asked in ({}, {"stream": True}):
            response = client.post(GENERATIONS, json=asked)
            assert response.status_code == status and response.headers.get("retry-after") == retry
            assert str(failed) in error(response)
    backend.error = KeyError("a secret of another request")
    response = client.post(GENERATIONS, json={})
    assert response.status_code == 500 and "its log says more" in error(response) and "secret" not in response.text
    assert "a secret of another request" in capsys.readouterr().err
    backend.state = "loading"
    assert client.get("/health").status_code == 503
    backend.state = "ready"
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"n": NaN}',
                                  b'{"n": 1e999}', b'{"prompt": "\\ud800"}', b'{"n": ' + b"9" * 5000 + b"}"],
                         ids=lambda body: body[:12].decode("ascii", "replace"))
def test_bodies_that_are_no_request(client, backend, body):
    response = client.post(GENERATIONS, content=body)
    assert response.status_code == 400 and error(response)
    assert not backend.jobs and client.get("/health").status_code == 200


def test_other_routes_and_methods_have_errors_in_the_same_shape(client):
    assert "GET /v1/nothing" in error(client.get("/v1/nothing"))
    assert client.get(GENERATIONS).status_code == 405 and error(client.get(GENERATIONS))
    assert client.get("/v1/models/other").status_code == 404 and "choose from" in error(client.get("/v1/models/other"))


def test_models_and_what_they_take(client):
    found = client.get("/v1/models").json()
    assert found["object"] == "list" and [model["id"] for model in found["data"]] == [own.name for own in CARDS]
    assert client.get("/v1/models/emoji-arpg").json()["class_names"] == ["faces", "flags", "clocks"]
    schema = client.get("/openapi.json").json()["paths"][GENERATIONS]["post"]["requestBody"]
    assert "cfg_scale" in schema["content"]["application/json"]["schema"]["properties"]


# ---- edits


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
MASK = np.zeros((16, 16), np.uint8)
MASK[4:8, 4:12] = 255


def test_edits(client, backend):
    answer = client.post(EDITS, files={"image": png(PICTURE), "mask": png(MASK)}, data={
        "model": "emoji-arpg", "prompt": "flags", "n": "2", "seed": "4", "paste": "2", "steps": "3"})
    assert [datum["index"] for datum in answer.json()["data"]] == [0, 1]
    assert np.array_equal(backend.jobs[0].mask, MASK > 0) and np.array_equal(backend.jobs[0].image, PICTURE)
    assert (backend.jobs[0].paste, backend.jobs[0].seed, backend.jobs[0].steps) == (2, 4, 3)
    expected = np.where(MASK[..., None] > 0, np.uint8(COLOURS[1]), PICTURE)
    assert np.array_equal(pixels(answer.json()["data"][0]), expected)


FORMS = [
    ({"json": {"prompt": "flags"}}, "expected a form"), ({"data": {"n": "1"}}, "expected a form"),
    ({"files": {"mask": png(MASK)}}, "expected a form"),
    ({"files": {"image": png(PICTURE), "other": b"x"}}, "no other"),
    ({"files": [("image", png(PICTURE)), ("image", png(PICTURE))]}, "given twice"),
    ({"files": [("image[]", png(PICTURE)), ("image[]", png(PICTURE))]}, "given twice"),
    ({"files": {"image": b"x", "mask": png(MASK)}}, "no PNG"),
    ({"files": {"image": png(PICTURE), "mask": png(MASK)}, "data": {"n": "x"}}, "^n:"),
    ({"files": {"image": png(PICTURE)}, "data": {"mask": "x"}}, "no such field"),
    ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, "form"),
    ({"content": b"--x\r\nbroken", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}, "form"),
]


def test_an_edit_without_a_model_goes_to_one_that_redraws_any_part(client, backend):
    client.post(EDITS, files={"image": png(PICTURE), "mask": png(MASK)}, data={"prompt": "flags"})
    client.post(GENERATIONS, json={"prompt": "flags"})
    assert [job.model for job in backend.jobs] == ["emoji-arpg", "emoji-gpt"]


def test_large_pictures_are_cropped_before_they_reach_the_backend(client, backend):
    large, mask = PICTURE.repeat(3, 0).repeat(4, 1), MASK.repeat(3, 0).repeat(4, 1)  # 48 x 64: the sides are cut off
    client.post(EDITS, files={"image": png(large), "mask": png(mask)})
    assert backend.jobs[0].image.shape == (16, 16, 3) and backend.jobs[0].mask.shape == (16, 16)
    left = np.zeros_like(mask)
    left[:, :4] = 255
    refused = client.post(EDITS, files={"image": png(large), "mask": png(left)})
    assert refused.status_code == 400 and "cut off" in error(refused)


@pytest.mark.parametrize(("request_", "said"), FORMS, ids=range(len(FORMS)))
def test_forms_that_are_no_edit(client, backend, request_, said):
    response = client.post(EDITS, **request_)
    assert response.status_code == 400 and re.search(said, error(response)) and not backend.jobs


# ---- limits


def test_large_bodies_are_refused_before_they_are_read(url, client):
    assert client.post(GENERATIONS, content=bytes(200_000)).status_code == 413
    whole = iter([bytes(50_000)] * 4)  # sent in chunks, without a length
    assert client.post(GENERATIONS, content=whole).status_code == 413
    host, port = url.removeprefix("http://").split(":")
    for route in (GENERATIONS, "/nothing"):
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            raw.sendall(f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n".encode())
            assert b" 413 " in raw.recv(4096)  # nothing of the body was sent


def test_long_json_is_not_read(backend):
    with served(make_app(backend)) as url, httpx.Client(base_url=url, timeout=30) as client:
        response = client.post(GENERATIONS, content=b'{"prompt": "' + b"x" * 2**20 + b'"}')
        assert response.status_code == 413 and not backend.jobs


def test_a_client_that_reads_nothing_is_cut_off(url, client, backend):
    host, port = url.removeprefix("http://").split(":")
    asked = json.dumps({"n": 64, "stream": True, "partial_images": 64})
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(asked)}\r\n\r\n{asked}".encode())
        until(lambda: backend.open == 1)
        until(lambda: backend.open == 0)
    assert client.get("/health").status_code == 200


def test_a_cut_upload_is_a_client_that_went_away(url, client):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    counted = 'llamagen_requests_total{route="generations",status="499"} 1.0'
    until(lambda: counted in client.get("/metrics").text)


def test_slow_senders_are_refused(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in raw.recv(4096)


def test_the_key(backend):
    with served(make_app(backend, api_key="secret")) as url, httpx.Client(base_url=url) as client:
        right = {"Authorization": "Bearer secret"}
        for route in ("/v1/models", "/metrics", "/v1/images/nothing"):
            for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
                assert client.get(route, headers=headers).status_code == 401
        assert client.post(GENERATIONS, json={}).status_code == 401 and not backend.jobs
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers=right).status_code == 200
        url = client.post(GENERATIONS, json={"response_format": "url"}, headers=right).json()["data"][0]["url"]
        assert client.get(url).status_code == 200  # nobody can guess it


def test_a_request_that_takes_too_long_is_told_so_and_dropped(backend):
    backend.held = True
    with served(make_app(backend, request_seconds=0.2)) as url, httpx.Client(base_url=url) as client:
        response = client.post(GENERATIONS, json={})
        assert response.status_code == 504 and "too long" in error(response)
        until(lambda: backend.open == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_places(url, client, backend, stream):
    backend.held, backend.good = True, 8
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"stream": stream, "partial_images": 3})
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: backend.open == 1)
        if stream:
            raw.recv(4096)
    until(lambda: backend.open == 0)
    counted = f'llamagen_requests_total{{route="generations",status="{499}"}} 1.0'
    until(lambda: counted in client.get("/metrics").text)


def test_metrics(client):
    client.post(GENERATIONS, json={"n": 3})
    client.post(GENERATIONS, json={"n": 0})
    text = client.get("/metrics").text
    for line in ('llamagen_requests_total{route="generations",status="200"} 1.0',
                 'llamagen_requests_total{route="generations",status="400"} 1.0',
                 'llamagen_images_total{model="emoji-gpt"} 3.0', "llamagen_engine_ready 1.0",
                 'llamagen_request_seconds_count{route="generations"} 1.0'):
        assert line in text


def test_many_at_once(url, backend):
    backend.pause = 0.001

    async def ask() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            answers = await asyncio.gather(*(client.post(GENERATIONS, json={"n": 1 + i % 3}) for i in range(64)))
        return [len(answer.json()["data"]) for answer in answers]

    assert asyncio.run(ask()) == [1 + i % 3 for i in range(64)]
