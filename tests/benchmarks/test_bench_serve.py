"""The benchmark of the server: its clients, its rows, its comparison with pictures drawn offline."""
import asyncio
import subprocess
import sys

import pytest

from autoregressive.serve.routes import make_app
from benchmarks import bench_serve
from benchmarks.bench_serve import Server, add_serve_row, ask_all, mixed_jobs, percentile
from tests.autoregressive.serve.models import save_models
from tests.autoregressive.serve.serving import served
from tests.autoregressive.serve.test_routes import Counted, until
from tests.conftest import ROOT


def test_clients_ask_for_all_jobs_and_close_the_cancelled_ones():
    backend = Counted(pause=0.002)
    with served(make_app(backend)) as url:
        server = Server("native", subprocess.Popen.__new__(subprocess.Popen), url)
        spans, answers, seconds = asyncio.run(ask_all(server, [{"n": 1 + i % 3} for i in range(10)], 4))
        assert [len(answer) for answer in answers] == [1 + i % 3 for i in range(10)] and len(spans) == 10
        assert 0 < max(spans) <= seconds
        backend.held = True
        spans, answers, _ = asyncio.run(ask_all(server, [{}, {}], 2, cancelled=frozenset((0, 1))))
        assert not spans and answers == [None, None]
        until(lambda: backend.open == 0)


def test_mixed_jobs_are_many_kinds_and_always_the_same():
    jobs = mixed_jobs(100, classes=8)
    assert jobs == mixed_jobs(100, classes=8) and {job["n"] for job in jobs} == {1, 2, 3, 4}
    assert len({(job["cfg_scale"], job["temperature"], job["top_k"], job["top_p"]) for job in jobs}) > 20


def test_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_serve, "RESULTS", tmp_path / "serve.md")
    cells = ["-"] * bench_serve.HEADER.splitlines()[-1].count("---")
    for _ in range(2):
        add_serve_row(cells, write=True)
    add_serve_row(cells, write=False)
    assert (tmp_path / "serve.md").read_text() == bench_serve.HEADER + 2 * ("| " + " | ".join(cells) + " |\n")
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


@pytest.mark.processes
@pytest.mark.slow
def test_rates_and_mixed_requests_of_a_real_server(tmp_path):
    save_models(tmp_path)
    for words, shown in ((["--clients", "1,3", "--rounds", "1", "--each", "2"], "native: 3, 30"),
                         (["--mixed", "30"], "native, mixed: 64, ")):
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks/bench_serve.py"), "--no-add-rows", "--gpt-ckpt",
                               str(tmp_path / "GPT-S.pt"), "--vq-ckpt", str(tmp_path / "vq.pt"), "--precision", "none",
                               *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and shown in done.stdout, done.stderr
    same, _, drawn = done.stdout.strip().rsplit("|", 1)[1].split()
    assert same == drawn and int(drawn) > 30
