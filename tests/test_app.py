"""app.py: whose models the page shows, and what it says when there are none."""
import asyncio
import os
import shutil
import subprocess
import sys

import pytest

import app
from autoregressive.serve import page_server
from autoregressive.serve.client import ServerBackend
from tests.autoregressive.serve.coloured import ColouredBackend
from tests.conftest import ROOT
from utils import cli


def parsed(*words: str) -> app.PageFlags:
    return app.PageFlags(**vars(cli.build_parser(app.PageFlags).parse_args(list(words))))


def refused(capsys, *words: str) -> str:
    """The line that the command says."""
    with pytest.raises(SystemExit) as stop:
        cli.run(app.main, app.PageFlags, list(words))
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_a_servers_models_or_those_loaded_here(monkeypatch):
    monkeypatch.setenv("LLAMAGEN_API_KEY", "of the environment")
    backend = app.chosen_backend(parsed("--server-url", "http://host:8000/"))
    assert isinstance(backend, ServerBackend) and backend.url == "http://host:8000"
    assert backend.headers == {"Authorization": "Bearer of the environment"}
    backend = app.chosen_backend(parsed("--server-url", "http://host:8000", "--api-key", "typed"))
    assert backend.headers == {"Authorization": "Bearer typed"}
    monkeypatch.setattr(app, "make_backend", lambda flags: flags.gpt_ckpt)
    assert app.chosen_backend(parsed("--gpt-ckpt", "x.pt")) == "x.pt"


@pytest.mark.parametrize(("words", "says"), [
    (["--server-url", "http://host", "--gpt-ckpt", "x.pt"], "--gpt-ckpt is for models that are loaded here"),
    (["--server-url", "http://host", "--cfg-scale", "2"], "--cfg-scale is for models that are loaded here"),
    (["--server-url", "host:8000"], "expected an address such as http://host:8000"),
    (["--api-key", "x"], "give --server-url too"), (["--seed", "-1"], "seed"), (["--port", "x"], "--port"),
    (["--server-url", "http://127.0.0.1:9", "--port", "0"], "does not answer"),
    (["--server-url", "http://127.0.0.1:9", "--port", "99999"], "give another --port")])
def test_mistakes_are_a_line(capsys, words, says):
    line = refused(capsys, *words)
    assert line.startswith("error: ") and says in line


def test_with_nothing_trained_a_line_says_what_to_run(capsys, monkeypatch, tmp_path):
    from autoregressive.serve import served

    monkeypatch.setattr(served, "QUICKSTART", tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "--port", "0")
    assert "bash scripts/quickstart.sh" in line and "--gpt-ckpt and --vq-ckpt" in line


def test_without_gradio_a_line_says_what_to_install(capsys, monkeypatch):
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert "pip install gradio httpx" in refused(capsys)


def test_the_seed_of_the_command_line_is_where_the_page_begins(monkeypatch):
    found = {}

    class Server:
        def __init__(self, config):
            found["app"] = config.app

        async def serve(self, sockets):
            found["port"] = sockets[0].getsockname()[1]

    import uvicorn

    monkeypatch.setattr(uvicorn, "Server", Server)
    monkeypatch.setattr(page_server, "web_app", lambda page: page.controls["seed"].value)
    asyncio.run(page_server.serve_page(ColouredBackend(), host="127.0.0.1", port=0, seed=17))
    assert found["app"] == 17 and found["port"] > 0


@pytest.mark.processes
def test_a_shell_that_has_not_activated_the_environment_uses_it(tmp_path):
    """A Python without torch hands over to .venv, which the quickstart makes; without .venv it says what is missing."""
    shutil.copy(ROOT / "app.py", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    own = tmp_path / ".venv" / "bin" / "python"
    own.write_text('#!/bin/sh\necho "own $@"\n')
    own.chmod(0o755)

    def run() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-I", "-S", "app.py", "--seed", "3"], cwd=tmp_path, text=True,
                              capture_output=True, env=dict(os.environ), check=False)

    assert run().stdout.split() == ["own", "app.py", "--seed", "3"]
    own.unlink()
    done = run()
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"error: torch is not installed in {sys.executable}: run bash scripts/quickstart.sh, which makes .venv, then "
        "this command again"]


