"""Names of the hub where a checkpoint is asked for: what they mean, fetched over HTTP, and what is said if not."""
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT, two_processes
from utils.checkpoints import containers
from utils.checkpoints.hub import HubName, _fetched, files_meant, hint, hub_name, known_as

WEIGHTS = {"a": torch.arange(6.0), "b": torch.ones(2, 2)}


def repository(hub, name: str = "owner/name") -> Path:
    folder = hub.root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def weights(path) -> dict:
    return containers.weights(containers.read(path), path)


def same(found: dict, expected: dict = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(("given", "meant"), [
    ("FoundationVision/LlamaGen:c2i_B_256.pt", HubName("FoundationVision/LlamaGen", "c2i_B_256.pt")),
    ("owner/name", HubName("owner/name")), ("owner/name@v1.0", HubName("owner/name", None, "v1.0")),
    ("owner/name@v1:sub/x.pt", HubName("owner/name", "sub/x.pt", "v1")),
    ("owner/name:x.pt@refs/pr/1", HubName("owner/name", "x.pt", "refs/pr/1")),
    ("owner/name:a file.pt", HubName("owner/name", "a file.pt")), ("0w/n.a-m_e:gpt/", HubName("0w/n.a-m_e", "gpt")),
    ("owner/name@1:x@2", None), ("owner/name:a:b", None), ("owner/name:/etc/x.pt", None), ("owner/name:../x.pt", None),
    ("owner/..:x.pt", None), ("owner/name:", None), ("owner/name:/", None), ("owner/name@", None),
    (r"C:\models\x.pt", None), ("C:/x", None), ("C:/a/x.pt", None), ("s3://bucket/x.pt", None), ("x.pt", None),
    ("https://a.b/c.pt", None), ("gpt", None), ("a/b/c", None), ("/a/b", None), ("./a/b", None), ("./a", None),
    ("../a", None), ("~/a", None), ("-a/b", None), ("results/x.pt", None), ("a/b.safetensors", None), ("", None),
    (r"owner\name:x.pt", None), (r"owner/name:a\b.pt", None), ("owner/näme", None), ("owner/name\n", None)])
def test_what_a_name_means(given, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(given) == meant
    assert meant is None or hub_name(str(meant)) == meant


def test_what_is_here_comes_first(hub, tmp_path, monkeypatch):
    """A file with a colon, a folder owner/name, and a path that is missing in a folder which is there."""
    monkeypatch.chdir(tmp_path)
    for given in ("owner/name:x.pt", "owner/name/x.pt"):
        Path(given).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": WEIGHTS}, given)
        assert same(weights(given))
    assert hub_name("owner/name") is None and hub_name("owner/missing") is None
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at owner/missing$"):
        containers.read("owner/missing")
    assert not hub.asked


@pytest.mark.parametrize(("given", "said"), [
    ("s3://bucket/x.pt", "no checkpoint at s3://bucket/x.pt: a checkpoint is a file or folder here, or a name of the"),
    ("owner/name:a:b", "owner/name@revision:file"), ("C:\\x.pt", r"no checkpoint at C:\\x\.pt$"),
    ("x.pt", r"no checkpoint at x\.pt$")])
def test_a_path_that_is_no_name_says_how_names_are_written(given, said):
    with pytest.raises(FileNotFoundError, match=said):
        containers.read(given)
    assert hint("runs/x.pt") == ""


NAMES = ["README.md", "b.pt", "gpt/config.json", "gpt/model.safetensors", "gpt/pytorch_model.bin", "two/x.pt",
         "two/y.pt", "one/only.pth", "both/w.safetensors", "both/w.ckpt", "parts/model.safetensors.index.json",
         "parts/model-00001-of-00002.safetensors", "parts/model-00002-of-00002.safetensors", "parts/config.json",
         "parts/pytorch_model-00001-of-00001.bin", "parts/pytorch_model.bin.index.json", "step/state.json",
         "step/.metadata", "step/__0_0.distcp", "foreign/config.json", "foreign/vae.pt"]


@pytest.mark.parametrize(("inside", "files"), [
    (None, ["b.pt"]), ("gpt", ["gpt/model.safetensors", "gpt/config.json"]), ("one", ["one/only.pth"]),
    ("both", ["both/w.safetensors"]), ("two/y.pt", ["two/y.pt"]), ("foreign", ["foreign/vae.pt"]),
    ("parts", ["parts/model.safetensors.index.json", "parts/model-00001-of-00002.safetensors",
               "parts/model-00002-of-00002.safetensors", "parts/config.json"]),
    ("parts/pytorch_model.bin.index.json", ["parts/pytorch_model.bin.index.json",
                                            "parts/pytorch_model-00001-of-00001.bin"]),
    ("step", ["step/state.json", "step/.metadata", "step/__0_0.distcp"])])
def test_which_files_a_name_means(inside, files):
    assert files_meant(HubName("owner/name", inside), NAMES) == files


@pytest.mark.parametrize(("inside", "kind", "said"), [
    ("two", ValueError, r"holds 2 checkpoints: say which, as owner/name:two/x\.pt \(x\.pt, y\.pt\)"),
    ("tow", FileNotFoundError, r"has no checkpoint tow: it has b\.pt, both/w\.ckpt"),
    ("two/z.pt", FileNotFoundError, r"has no checkpoint two/z\.pt")])
def test_names_that_mean_no_one_file_are_refused(inside, kind, said):
    with pytest.raises(kind, match=said):
        files_meant(HubName("owner/name", inside), NAMES)
    with pytest.raises(FileNotFoundError, match="at its top: it has no checkpoint at all"):
        files_meant(HubName("owner/name"), ["README.md"])


def test_a_file_is_fetched_once_and_read_again_offline(hub, monkeypatch, capsys):
    torch.save({"model": WEIGHTS}, repository(hub) / "c2i.pt")
    torch.save({"model": {}}, repository(hub) / "other.pt")
    given = "owner/name:c2i.pt"
    assert same(weights(given)) and containers.resolve(given).name == known_as(given) == "c2i.pt"
    assert containers.content_hash(given) == containers.content_hash(hub.root / "owner/name/c2i.pt")
    assert sum(word.startswith("GET") and "resolve" in word for word in hub.asked) == 1
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    assert same(weights(given)) and same(weights("owner/name@main:c2i.pt"))
    assert "taken from the hub's cache (c2i.pt of" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"owner/name:other\.pt here, nor is it in the hub's cache, and "
                                                r"HF_HUB_OFFLINE is set: .*`hf download owner/name other\.pt "
                                                "--local-dir name`"):
        containers.read("owner/name:other.pt")
    assert len(hub.asked) == asked


def test_a_revision_and_a_repository_of_one_checkpoint(hub):
    folder = repository(hub)
    save_file(WEIGHTS, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"kind": "gpt", "gpt_model": "GPT-S"}))
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(print, file)
    for given in ("owner/name", "owner/name@v1", f"owner/name@{hub.commit('owner/name')}"):
        assert same(weights(given))
        assert containers.saved_config(containers.read(given))["gpt_model"] == "GPT-S"
    assert not any("pytorch_model.bin" in word for word in hub.asked)
    with pytest.raises(FileNotFoundError, match="owner/name has no revision v7"):
        containers.read("owner/name@v7")
    with pytest.raises(ValueError, match="which would run code when loaded"):
        containers.read("owner/name:pytorch_model.bin")


def test_a_server_that_dies_in_the_middle_is_one_line(hub):
    torch.save({"model": {"a": torch.zeros(100_000)}}, repository(hub) / "c2i.pt")
    hub.faults["cut"] = 1000
    with pytest.raises(OSError, match=r"owner/name:c2i\.pt could not be fetched from http://.*: run it again, or"):
        containers.read("owner/name:c2i.pt")
    with pytest.raises(FileNotFoundError, match="cannot be reached: where the hub can"):
        containers.read("owner/name:c2i.pt")  # what came is no checkpoint


@pytest.mark.parametrize(("faults", "kind", "said"), [
    ({"status": 500}, FileNotFoundError, r"does not answer \(.*500.*where the hub can be reached"),
    ({"gated": True}, ValueError, r"is gated: ask for access at http://.*/owner/name, then `hf auth login`"),
    ({"token": "hf_x"}, FileNotFoundError, "no repository owner/name, or a private one: for that, `hf auth login`")])
def test_what_the_hub_refuses_is_one_line(hub, faults, kind, said, monkeypatch):
    torch.save({"model": WEIGHTS}, repository(hub) / "c2i.pt")
    hub.faults = faults
    with pytest.raises(kind, match=said) as caught:
        containers.read("owner/name:c2i.pt")
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        containers.read("owner/absent:c2i.pt")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    if "token" in faults:
        assert same(weights("owner/name:c2i.pt"))


def test_what_was_fetched_is_taken_where_the_hub_fails(hub, capsys):
    torch.save({"model": WEIGHTS}, repository(hub) / "c2i.pt")
    assert same(weights("owner/name:c2i.pt"))
    for faults in ({"status": 503}, {"gated": True}):
        _fetched.cache_clear()
        hub.faults = faults
        assert same(weights("owner/name:c2i.pt"))
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_cache_that_cannot_be_written_to(hub, tmp_path):
    torch.save({"model": WEIGHTS}, repository(hub) / "c2i.pt")
    (tmp_path / "cache of the hub").mkdir(mode=0o555)
    with pytest.raises(OSError, match="set HF_HOME to a folder that can be written to"):
        containers.read("owner/name:c2i.pt")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no file or folder owner/name here.* -m pip install huggingface_hub"):
        containers.read("owner/name")


def test_threads_that_ask_at_once_fetch_once(hub):
    torch.save({"model": {"a": torch.zeros(500_000)}}, repository(hub) / "c2i.pt")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(weights, ["owner/name:c2i.pt"] * 4))
    assert len(found) == 4 and sum(word.startswith("GET") and "resolve" in word for word in hub.asked) == 1


@pytest.mark.processes
def test_processes_fetch_once(hub, tmp_path, monkeypatch, vq_ckpt, image_folder):
    """Two of torchrun, by the address and the cache of the environment, as a user sets them."""
    content = containers.read(vq_ckpt)
    torch.save({"model": content["ema"], "config": content["config"]}, repository(hub) / "vq.pt")
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "a home"), "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    two_processes([("extract", ["--data-path", image_folder, "--code-path", tmp_path / "codes", "--image-size", 16,
                                "--num-workers", 0, "--vq-ckpt", "owner/name:vq.pt"])], tmp_path)
    assert list((tmp_path / "codes").rglob("manifest.json"))
    assert sum(word.startswith("GET") and "resolve" in word for word in hub.asked) == 1


@pytest.mark.processes
def test_a_stranger_from_another_folder(hub, tmp_path):
    """A command, started elsewhere, with a name that nobody has: one line, no traceback."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, str(ROOT / "autoregressive/train/export.py"), "--gpt-ckpt", "owner/absent"],
                          cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: there is no file or folder owner/absent here, and the hub has no repository")
