"""The server as users start it, with real models: OpenAI's client, the same pictures as the command line's, many
clients, a process that dies, an end in order."""
import asyncio
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys

import httpx
import numpy as np
import pytest
import torch
from openai import OpenAI
from PIL import Image

from autoregressive.sample.editing import edit
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.prompts import draw_jobs, encoder_for, features_of, load_text_pipeline
from evaluations.t2i.layouts import Prompt, PromptJob
from tests.autoregressive.sample.editing import block, picture
from tests.autoregressive.serve.models import CLASSES, SIZE, listed_models, save_models
from tests.autoregressive.serve.test_routes import EDITS, GENERATIONS, pixels, png, until
from tests.conftest import ROOT

pytestmark = [pytest.mark.processes, pytest.mark.slow]
PROMPT = "a red cat"


def start(*argv, **options) -> tuple[subprocess.Popen, str]:
    """A server at a free port, once it is ready, and its address."""
    server = subprocess.Popen([sys.executable, str(ROOT / "autoregressive/serve/api.py"), "--port", "0",
                               *map(str, argv)], stdout=subprocess.PIPE, text=True, **options)
    line = server.stdout.readline()
    assert line.startswith("ready: http://"), line
    return server, line.split()[1].split("/v1/")[0]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(models):
    process, url = start("--models", models, "--slots", 16, "--queue", 300)
    yield process, url
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server[1], timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def pipelines(models, one_thread_for_the_module) -> dict[str, Pipeline]:
    """The pipelines that the commands load, by the models' names."""
    gpt, arpg, text = listed_models(models)
    device = torch.device("cpu")
    return {"gpt": load_pipeline(gpt.flags, device=device), "arpg": load_pipeline(arpg.flags, device=device),
            "text": load_text_pipeline(text.flags, device=device)}


@pytest.fixture(scope="module")
def one_thread_for_the_module():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def offline(pipeline: Pipeline, label: int, *, seed: int, indices: list[int], **settings) -> np.ndarray:
    """What the command line draws with these settings."""
    kept, pipeline.settings = pipeline.settings, pipeline.settings | settings
    try:
        return pipeline([label] * len(indices), seed=seed, indices=indices)
    finally:
        pipeline.settings = kept


@pytest.mark.parametrize("name", ["gpt", "arpg"])
def test_pictures_are_those_of_the_command_line(client, pipelines, name):
    answer = client.post(GENERATIONS, json={"model": name, "prompt": "dog", "n": 3, "seed": 5, "index": 2})
    expected = offline(pipelines[name], 1, seed=5, indices=[2, 3, 4])
    assert np.array_equal([pixels(datum) for datum in answer.json()["data"]], expected)
    settings = {"cfg_scale": 1.5, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    answer = client.post(GENERATIONS, json={"model": name, "class": 2, "seed": 1, **settings})
    assert np.array_equal(pixels(answer.json()["data"][0]), offline(pipelines[name], 2, seed=1, indices=[0],
                                                                     **settings)[0])
    nothing = client.post(GENERATIONS, json={"model": name, "seed": 1}).json()["data"][0]
    assert np.array_equal(pixels(nothing), offline(pipelines[name], len(CLASSES), seed=1, indices=[0])[0])


def test_prompts_are_those_of_the_grid_command(client, pipelines, models):
    flags, pipeline = listed_models(models)[2].flags, pipelines["text"]
    encoder = encoder_for(flags, pipeline, device=torch.device("cpu"))
    features = features_of(encoder, [PROMPT], precision="none")
    codes = draw_jobs(pipeline, [PromptJob(Prompt(PROMPT), 0, j) for j in range(2)], features, seed=3)
    answer = client.post(GENERATIONS, json={"model": "text", "prompt": PROMPT, "n": 2, "seed": 3}).json()
    assert np.array_equal([pixels(datum) for datum in answer["data"]], pipeline.to_pixels(codes))


def test_edits_are_those_of_the_edit_command(client, pipelines):
    image, mask = picture(), block(4, 8, 8, 8)
    made = edit(pipelines["arpg"], image, mask, conditions=[1, 1], seed=2, indices=[0, 1], paste=1)
    answer = client.post(EDITS, files={"image": png(image), "mask": png(np.where(mask, 255, 0).astype(np.uint8))},
                         data={"model": "arpg", "class": "dog", "n": "2", "seed": "2", "paste": "1"})
    assert np.array_equal([pixels(datum) for datum in answer.json()["data"]], made.pictures)
    below = block(8, 0, 8, SIZE[1])
    made = edit(pipelines["gpt"], image, below, conditions=[1], seed=2, indices=[0])
    asked = {"image": png(image), "mask": png(np.where(below, 255, 0).astype(np.uint8))}
    answer = client.post(EDITS, files=asked, data={"model": "gpt", "class": "dog", "seed": "2"})
    assert np.array_equal(pixels(answer.json()["data"][0]), made.pictures[0])
    refused = client.post(EDITS, files={"image": png(image), "mask": png(np.where(mask, 255, 0).astype(np.uint8))},
                          data={"model": "gpt"})
    assert refused.status_code == 400 and "row by row" in refused.json()["error"]["message"]


def test_openais_client(server, pipelines):
    client = OpenAI(base_url=f"{server[1]}/v1", api_key="any")
    assert [model.id for model in client.models.list()] == ["gpt", "arpg", "text"]
    made = client.images.generate(model="gpt", prompt="cat", n=2, size="24x16", extra_body={"seed": 7})
    assert np.array_equal([pixels(datum.model_dump()) for datum in made.data],
                          offline(pipelines["gpt"], 0, seed=7, indices=[0, 1]))
    by_url = client.images.generate(model="gpt", prompt="cat", response_format="url", extra_body={"seed": 7})
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(httpx.get(by_url.data[0].url).content))),
                          pixels(made.data[0].model_dump()))
    events = list(client.images.generate(model="gpt", prompt="cat", stream=True, partial_images=3,
                                         extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    first, last = pixels({"b64_json": events[0].b64_json}), pixels({"b64_json": events[-1].b64_json})
    assert np.array_equal(last, pixels(made.data[0].model_dump()))
    assert (first[-4:] == 127).all() and (first[:4] != 127).any()  # rows appear from above
    hole = np.dstack([picture(), np.where(block(4, 8, 8, 8), 0, 255).astype(np.uint8)])
    edited = client.images.edit(model="arpg", image=("a.png", png(picture())), mask=("mask.png", png(hole)),
                                prompt="dog", extra_body={"seed": 2, "paste": 1})
    expected = edit(pipelines["arpg"], picture(), block(4, 8, 8, 8), conditions=[1], seed=2, paste=1)
    assert np.array_equal(pixels(edited.data[0].model_dump()), expected.pictures[0])


def test_a_picture_beside_63_others_is_the_same(server, client, pipelines):
    """Different models, numbers of pictures, settings; some are cancelled, some refused."""
    chance = random.Random(0)
    jobs = [{"model": chance.choice(["gpt", "arpg"]), "class": chance.randrange(3), "n": chance.choice([1, 1, 2, 3]),
             "seed": chance.randrange(100), "index": chance.randrange(5), "cfg_scale": chance.choice([1.0, 2.0, 4.5]),
             "temperature": chance.choice([0.8, 1.0]), "top_k": chance.choice([0, 10])} for _ in range(64)]

    async def ask(asker: httpx.AsyncClient, place: int) -> list | None:
        if place % 10 == 9:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asker.post(GENERATIONS, json=jobs[place] | {"n": 64}), 0.1)
            return None
        return (await asker.post(GENERATIONS, json=jobs[place])).json()["data"]

    async def ask_all() -> list:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server[1], timeout=300, limits=limits) as asker:
            return await asyncio.gather(*(ask(asker, place) for place in range(64)))

    answers = asyncio.run(ask_all())
    for job, answer in zip(jobs, answers, strict=True):
        if answer is not None:
            expected = offline(pipelines[job["model"]], job["class"], seed=job["seed"],
                               indices=[job["index"] + i for i in range(job["n"])],
                               **{name: job[name] for name in ("cfg_scale", "temperature", "top_k")})
            assert np.array_equal([pixels(datum) for datum in answer], expected)
    until(lambda: "llamagen_images_decoding 0.0" in client.get("/metrics").text)
    assert "llamagen_images_waiting 0.0" in client.get("/metrics").text


def child_of(pid: int) -> int:
    """The process that draws for a server."""
    found = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return int(next(line for line in found.splitlines() if "spawn_main" in line).split()[0])


def test_a_killed_engine_is_told_at_once_and_started_again(server, client, pipelines):
    process, url = server

    async def ask_and_kill() -> httpx.Response:
        async with httpx.AsyncClient(base_url=url, timeout=60) as asker:
            asked = asyncio.ensure_future(asker.post(GENERATIONS, json={"model": "gpt", "n": 64}))
            while "llamagen_images_decoding 0.0" in (await asker.get("/metrics")).text:
                await asyncio.sleep(0.005)
            os.kill(child_of(process.pid), signal.SIGKILL)
            return await asyncio.wait_for(asked, 5)

    answer = asyncio.run(ask_and_kill())
    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert client.get("/health").status_code == client.post(GENERATIONS, json={}).status_code == 503
    until(lambda: client.get("/health").status_code == 200, seconds=120)
    made = client.post(GENERATIONS, json={"model": "gpt", "class": 1, "seed": 5}).json()["data"][0]
    assert np.array_equal(pixels(made), offline(pipelines["gpt"], 1, seed=5, indices=[0])[0])
    assert "llamagen_engine_restarts 1.0" in client.get("/metrics").text


def test_a_stopped_server_finishes_what_it_has_and_a_killed_one_leaves_nothing(models):
    second, url = start("--models", models, "--slots", 2)
    engine = child_of(second.pid)

    async def ask_and_stop() -> httpx.Response:
        async with httpx.AsyncClient(base_url=url, timeout=60) as asker:
            asked = asyncio.ensure_future(asker.post(GENERATIONS, json={"model": "gpt", "n": 20}))
            while "llamagen_images_decoding 0.0" in (await asker.get("/metrics")).text:
                await asyncio.sleep(0.005)
            for process in (engine, second.pid):  # as a service manager does, which ends all of a service's processes
                os.kill(process, signal.SIGTERM)
            return await asked

    answer = asyncio.run(ask_and_stop())
    assert answer.status_code == 200 and len(answer.json()["data"]) == 20
    assert second.wait(60) == 0 and not os.path.exists(f"/proc/{engine}")

    third, url = start("--models", models)
    engine = child_of(third.pid)
    third.kill()
    third.wait()
    until(lambda: not os.path.exists(f"/proc/{engine}"))


ABANDONED = """import asyncio, sys
from autoregressive.serve.native_backend import NativeBackend
from autoregressive.serve.served import ServeFlags, served_models

if __name__ == "__main__":
    backend = NativeBackend(served_models(ServeFlags(models=sys.argv[1])))
    asyncio.run(backend.start())
    print(backend.pid)
"""


def test_who_forgets_to_stop_a_backend_ends_with_it_all_the_same(models, tmp_path):
    (tmp_path / "abandoned.py").write_text(ABANDONED)
    ran = subprocess.run([sys.executable, str(tmp_path / "abandoned.py"), str(models)], capture_output=True, text=True,
                         cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert not os.path.exists(f"/proc/{ran.stdout.split()[-1]}")


def test_what_is_wrong_is_one_line(models, tmp_path):
    def refused(*argv) -> str:
        ran = subprocess.run([sys.executable, str(ROOT / "autoregressive/serve/api.py"), *map(str, argv)],
                             capture_output=True, text=True, cwd=tmp_path, timeout=120)
        *_, last = ran.stderr.strip().splitlines()
        assert ran.returncode == 2 and "Traceback" not in ran.stderr, ran.stderr
        return last

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "give another --port" in refused("--port", taken.getsockname()[1], "--models", models)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    assert "broken.pt" in refused("--port", 0, "--gpt-ckpt", "broken.pt", "--vq-ckpt", "broken.pt")
    assert "no checkpoint at" in refused("--port", 0, "--gpt-ckpt", models.parent / "GPT-S.pt", "--vq-ckpt", "none.pt")
    assert "--slots is 0" in refused("--port", 0, "--models", models, "--slots", 0)
