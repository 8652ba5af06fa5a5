"""How many pictures a server draws, and how long a request waits, by the number of clients that ask at once.

    python3 benchmarks/bench_serve.py                                   # the quickstart's GPT
    python3 benchmarks/bench_serve.py --vllm-python .venv-serve/bin/python   # and vLLM, by turns
    python3 benchmarks/bench_serve.py --mixed 1000                      # many kinds of requests, a tenth cancelled

Each server is a process of its own, asked over HTTP. A client asks for one picture, waits for it, asks again. "One
after another" is one client. With --mixed 64 clients ask for different numbers of pictures, seeds and settings, each
picture is compared with the one that the command line draws, and the memory of the server and of the process that draws
is read at the start and at the end. Rows go to benchmarks/results/serve.md.
"""
import asyncio
import base64
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.sample.pipeline import load_pipeline
from autoregressive.serve.served import ServedModel, ServeFlags, served_models
from benchmarks.machine import ROOT
from benchmarks.sample_rows import surroundings
from utils import cli
from utils.cli import flag
from utils.files import replacing

RESULTS = Path(__file__).parent / "results" / "serve.md"
HEADER = """# Serving

`python3 benchmarks/bench_serve.py`: the quickstart's GPT-S (48 x 48 pixels, 144 codes, guidance 2) behind the server,
asked over HTTP by clients on the same machine. Times are of requests, from sending to the whole answer. GiB: resident
memory of the server and of the process that draws, before and after. Same: pictures that equal the command line's.

| backend: clients, requests | device, threads | versions, date | repeats | images/s | of one client | p50 s | p99 s | \
GiB | same |
|---|---|---|---|---|---|---|---|---|---|
"""
ROUTE = "/v1/images/generations"
WARM_UP = 8  # requests
CPU = torch.device("cpu")


@dataclass(kw_only=True)
class ServeBenchFlags(ServeFlags):
    """The load."""

    clients: str = flag("1,8,32,64", "numbers of clients that ask at once, comma-separated; the first is compared with")
    each: int = flag(5, "requests of each client in a turn, at least 30 in all")
    rounds: int = flag(3, "rounds over all servers and numbers of clients, one after the other")
    vllm_python: str | None = flag(None, "Python of the environment that scripts/serve_env.sh makes: measure vLLM too")
    mixed: int = flag(0, "requests of many kinds from 64 clients, in place of the above")
    add_rows: bool = flag(True, "add the rows to benchmarks/results/serve.md")


@dataclass
class Server:
    """A server that was started, and what was measured of it."""

    backend: str
    process: subprocess.Popen
    url: str
    spans: dict[int, list[float]] = field(default_factory=dict)  # seconds of requests, by the number of clients
    rates: dict[int, list[float]] = field(default_factory=dict)  # images a second of each turn

    def classes(self) -> int:
        """How many classes its model has."""
        with urllib.request.urlopen(f"{self.url}/v1/models") as answer:
            return json.load(answer)["data"][0]["classes"]

    def memory(self) -> float:
        """Resident GiB of the server and of the processes that it started."""
        listed = subprocess.run(["ps", "-o", "pid=,ppid=,rss=", "-A"], capture_output=True, text=True, check=True)
        rows = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
        family = {self.process.pid}
        for _ in range(3):
            family |= {pid for pid, parent, _ in rows if parent in family}
        return sum(size for pid, _, size in rows if pid in family) / 2**20


def start(python: str, backend: str, model: ServedModel) -> Server:
    """Start a server for a model. Raises ValueError if it does not come up."""
    flags = model.flags
    words = [python, str(ROOT / "autoregressive/serve/api.py"), "--port", "0", "--backend", backend, "--gpt-ckpt",
             flags.gpt_ckpt, "--vq-ckpt", flags.vq_ckpt, "--precision", flags.precision]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("ready: "):
            return Server(backend, process, line.split()[1].split("/v1/")[0])
    raise ValueError(f"the {backend} server did not start")


async def ask_all(server: Server, jobs: list[dict], clients: int, *, cancelled: frozenset[int] = frozenset(),
                  bar: tqdm | None = None) -> tuple[list[float], list[list[dict] | None], float]:
    """Send all jobs from so many clients: (seconds of each that was answered, the answers, seconds of all). Of those in
    `cancelled` the connection is closed after a moment."""
    import httpx

    waiting, spans, answers = iter(enumerate(jobs)), [], [None] * len(jobs)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def client(asker: httpx.AsyncClient) -> None:
        for place, job in waiting:
            start = time.perf_counter()
            try:
                wait = 0.1 if place in cancelled else 600
                answer = await asyncio.wait_for(asker.post(ROUTE, json=job), wait)
                answer.raise_for_status()
                answers[place] = answer.json()["data"]
                spans.append(time.perf_counter() - start)
            except asyncio.TimeoutError:
                pass
            if bar is not None:
                bar.update()

    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, verify=False) as asker:
        start = time.perf_counter()
        await asyncio.gather(*(client(asker) for _ in range(clients)))
    return spans, answers, time.perf_counter() - start


def percentile(values: list[float], share: float) -> float:
    """The value below which this share of the values lies."""
    return float(np.quantile(values, share))


def add_serve_row(cells: list[str], *, write: bool) -> None:
    """Show a row and put it at the end of the results."""
    tqdm.write(" | ".join(cells))
    if write:
        text = RESULTS.read_text() if RESULTS.exists() else HEADER
        with replacing(RESULTS) as temporary:
            temporary.write_text(f"{text}| {' | '.join(cells)} |\n")


def measure_load(servers: list[Server], model: ServedModel, flags: ServeBenchFlags) -> None:
    """Rates and waiting times by the number of clients; the servers take turns."""
    counts, chance = [int(word) for word in flags.clients.split(",")], random.Random(0)
    classes = servers[0].classes()

    def jobs(count: int) -> list[dict]:
        return [{"class": chance.randrange(classes), "seed": chance.randrange(2**32), "cfg_scale":
                 model.flags.cfg_scale, "temperature": model.flags.temperature, "top_k": model.flags.top_k}
                for _ in range(count)]

    for server in servers:
        asyncio.run(ask_all(server, jobs(WARM_UP), WARM_UP))
    with tqdm(total=flags.rounds * len(servers) * len(counts), desc="turns", unit="turn") as bar:
        for _ in range(flags.rounds):
            for count in counts:
                for server in servers:
                    spans, _, seconds = asyncio.run(ask_all(server, jobs(max(30, flags.each * count)), count))
                    server.spans.setdefault(count, []).extend(spans)
                    server.rates.setdefault(count, []).append(len(spans) / seconds)
                    bar.update()
    for server in servers:
        first = statistics.median(server.rates[counts[0]])
        for count in counts:
            rate, spans = statistics.median(server.rates[count]), server.spans[count]
            add_serve_row([
                f"{server.backend}: {count}, {len(spans)}", *surroundings(CPU), str(flags.rounds), f"{rate:.1f}",
                f"{rate / first:.2f}×", f"{percentile(spans, 0.5):.3f}", f"{percentile(spans, 0.99):.3f}",
                f"{server.memory():.2f}", "-"], write=flags.add_rows)


def mixed_jobs(count: int, *, classes: int) -> list[dict]:
    """Requests of many kinds, always the same."""
    chance = random.Random(1)
    return [{"class": chance.randrange(classes), "n": chance.choice([1, 1, 1, 2, 3, 4]), "seed": chance.randrange(1000),
             "index": chance.randrange(10), "cfg_scale": chance.choice([1.0, 1.5, 2.0, 4.0]),
             "temperature": chance.choice([0.8, 0.9, 1.0]), "top_k": chance.choice([0, 50]),
             "top_p": chance.choice([1.0, 0.95])} for _ in range(count)]


def offline(model: ServedModel, jobs: list[dict]) -> list[np.ndarray]:
    """The pictures of each job as the command line draws them, a few jobs with the same settings at a time."""
    pipeline, found = load_pipeline(model.flags, device=CPU), []
    for job in tqdm(jobs, desc="offline", unit="request"):
        pipeline.settings |= {name: job[name] for name in ("cfg_scale", "temperature", "top_k", "top_p")}
        indices = list(range(job["index"], job["index"] + job["n"]))
        found.append(pipeline([job["class"]] * job["n"], seed=job["seed"], indices=indices))
    return found


def measure_mixed(server: Server, model: ServedModel, flags: ServeBenchFlags) -> None:
    """Many kinds of requests, a tenth of them cancelled: rates, memory, and whether the pictures are the same."""
    jobs, clients = mixed_jobs(flags.mixed, classes=server.classes()), 64
    cancelled = frozenset(range(7, len(jobs), 10))
    asyncio.run(ask_all(server, jobs[:clients], clients))
    before = server.memory()
    with tqdm(total=len(jobs), desc="mixed", unit="request") as bar:
        spans, answers, seconds = asyncio.run(ask_all(server, jobs, clients, cancelled=cancelled, bar=bar))
    after, drawn, same = server.memory(), 0, 0
    os.kill(server.process.pid, 15)
    for answer, pictures in zip(answers, offline(model, jobs), strict=True):
        if answer is None:  # cancelled
            continue
        for datum, expected in zip(answer, pictures, strict=True):
            drawn += 1
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(datum["b64_json"]))))
            same += np.array_equal(pixels, expected)
    add_serve_row([
        f"{server.backend}, mixed: {clients}, {len(spans)} of {len(jobs)}", *surroundings(CPU), "1",
        f"{drawn / seconds:.1f}", "-", f"{percentile(spans, 0.5):.3f}", f"{percentile(spans, 0.99):.3f}",
        f"{before:.2f}, {after:.2f}", f"{same} of {drawn}"], write=flags.add_rows)


def main(flags: ServeBenchFlags) -> None:
    """Start the servers, measure, stop them."""
    cli.require_package("httpx", purpose="the benchmark's clients")
    if flags.rounds < 1 or flags.each < 1 or not all(word.isdigit() and int(word) for word in flags.clients.split(",")):
        raise ValueError("--rounds, --each and --clients are numbers from 1 on")
    model, servers = served_models(flags)[0], []
    try:
        for backend, python in (("native", sys.executable), ("vllm", flags.vllm_python)):
            if python is not None:
                servers.append(start(python, backend, model))
        if flags.mixed:
            measure_mixed(servers[0], model, flags)
        else:
            measure_load(servers, model, flags)
    finally:
        for server in servers:
            server.process.terminate()
        for server in servers:
            server.process.wait(60)


if __name__ == "__main__":
    cli.run(main, ServeBenchFlags)
