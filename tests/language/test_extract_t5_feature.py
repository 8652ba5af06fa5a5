"""Features of captions: of pictures and stores, kills, ranks, faults; what of them a store of codes gets."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dataset import code_writer
from dataset.codes import open_store
from dataset.text_features import attach_features, read_features
from language.extract_t5_feature import chosen_caption
from language.text_encoder import TextEncoderFlags, load_text_encoder
from tests.conftest import ROOT, call, two_processes
from tests.dataset.captioned import caption, jsonl_line, write_jsonl, write_tars
from tests.dataset.codes import content
from tests.language.encoders import WIDTH, write_t5

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    write_t5(root / "tiny")
    write_t5(root / "wide", width=32)
    return root


@pytest.fixture
def extract(encoders, tmp_path):
    """extract(data, flags…) → the folder of features."""
    def run(data, *flags, to="features"):
        call("extract_t5", *arguments(data, tmp_path / to, encoders), *flags)
        return tmp_path / to

    return run


def arguments(data, folder, encoders) -> list:
    return ["--data-path", data, "--t5-path", folder, "--t5-model-path", encoders, "--t5-model-type", "tiny",
            "--num-workers", 0]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "data")


@pytest.fixture
def codes(data, vq_ckpt, tmp_path):
    call("extract_t2i", "--data-path", data, "--vq-ckpt", vq_ckpt, "--image-size", 16, "--num-workers", 0,
         "--code-path", tmp_path)
    return tmp_path / "t2i16_codes"


def expected(encoders, texts, *, dtype=torch.bfloat16):
    encoder = load_text_encoder(TextEncoderFlags(t5_path=str(encoders), t5_model_type="tiny"),
                                device=torch.device("cpu"), dtype=dtype)
    return [encoder([text])[0] for text in texts]


def attached(codes, features, *, column="features"):
    store = open_store(codes)
    attach_features(store, str(features), column=column)
    store.leave_out(store.damaged)
    return store


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("none", torch.float32)])
@pytest.mark.parametrize("of", ["data", "codes"])
def test_features_are_the_encoders_whole_and_unpadded(request, extract, encoders, codes, of, precision, dtype):
    folder = extract(request.getfixturevalue(of), "--caption-key", "llava", "--precision", precision)
    store = attached(codes, folder)
    assert_same(read_features(store, "features", np.array([6, 0, 3])),
                expected(encoders, [caption(6), caption(0), caption(3)], dtype=dtype))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["count"] == 7 and manifest["text_encoder"]["name"] == "tiny" and "shards" not in manifest
    assert {file.name for file in folder.iterdir()} == {
        "manifest.json", "name-offsets.npy", "name-00000.npy", "features-offsets.npy", "features-00000.npy"}
    rows = sum(len(one) for one in expected(encoders, [caption(i) for i in range(7)]))
    size = (folder / "features-00000.npy").stat().st_size - 128
    assert size == rows * WIDTH * dtype.itemsize


def test_captions_are_chosen():
    long, short = "A cat. It sleeps!", "cat"
    assert [chosen_caption(long, short, key, trunc=False) for key in ("blip", "llava", "llava_first")] == [
        "cat", long, "A cat."]
    assert chosen_caption(long, short, "llava", trunc=True) == "A cat."
    assert chosen_caption(long, "", "blip", trunc=False) == long
    assert chosen_caption("no stop", "", "llava_first", trunc=False) == "no stop"


def test_examples_are_drawn_by_the_seed(extract, data, capsys):
    shown = []
    for seed in (0, 0, 1):
        extract(data, "--global-seed", seed, to=f"features{len(shown)}")
        shown.append([line for line in capsys.readouterr().out.splitlines() if line.endswith("tokens")])
    assert len(shown[0]) == 3 and shown[0] == shown[1] != shown[2]


def test_loading_processes_make_no_difference(extract, data, encoders, monkeypatch):
    monkeypatch.setattr("language.extract_t5_feature.AT_ONCE", 2)
    monkeypatch.setattr(code_writer, "PART_ROWS", 3)
    alone = content(extract(data))
    assert content(extract(data, "--num-workers", 2, to="others")) == alone


def test_parts_by_files(extract, encoders, data, codes, tmp_path, capsys):
    folder = extract(data, "--caption-key", "llava", "--data-start", 1, "--data-end", 1)
    store = attached(codes, folder / "1-1")
    assert "lacks features of 4 of 7 captions, such as part-0.jsonl:0" in capsys.readouterr().err
    assert store.column("name", np.arange(3)) == [f"part-1.jsonl:{i}" for i in range(3)]
    assert_same(read_features(store, "features", np.arange(3)), expected(encoders, [caption(i) for i in (4, 5, 6)]))


def test_names_in_another_order_meet(extract, encoders, codes, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    lines = {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}
    for part, indices in lines.items():  # a line more, others captions' features are of no use
        (other / f"part-{part}.jsonl").write_text("".join(jsonl_line(i) + "\n" for i in indices))
    (other / "a.jsonl").write_text(jsonl_line(9) + "\n")
    store = attached(codes, extract(other, "--caption-key", "llava"))
    assert store.attached["features"].places.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert_same(read_features(store, "features", np.arange(7)), expected(encoders, [caption(i) for i in range(7)]))


def test_a_broken_line_costs_that_line(extract, codes, data, capsys):
    path = data / "part-0.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    folder = extract(data)
    assert "1 broken line" in capsys.readouterr().err
    store = attached(codes, folder)
    assert "lacks features of 1 of 7 captions, such as part-0.jsonl:1" in capsys.readouterr().err
    assert store.column("name", np.arange(2)) == ["part-0.jsonl:0", "part-0.jsonl:2"]


def test_archives(extract, tmp_path):
    folder = extract(write_tars(tmp_path / "tars"))
    assert json.loads((folder / "manifest.json").read_text())["count"] == 7


# ---- kills, ranks, faults


def many_lines(folder, count=60):
    """Captions, some of them twice, without pictures."""
    folder.mkdir()
    words = ["cat", "dog", "red", "sky", "on", "a", "big"]
    rng = np.random.default_rng(0)
    lines = [json.dumps({"image_path": f"{i}.png", "text": [" ".join(rng.choice(words, 1 + i % 9))]})
             for i in range(count)]
    (folder / "part-0.jsonl").write_text("\n".join(lines + lines[:20]) + "\n")
    return folder


SMALL_PARTS = "from dataset import code_writer; code_writer.PART_ROWS = 8; code_writer.SHARD_BYTES = 4096"


@pytest.mark.processes
def test_two_processes_write_the_same_files(extract, encoders, tmp_path, monkeypatch):
    data = many_lines(tmp_path / "many")
    monkeypatch.setattr(code_writer, "PART_ROWS", 8)
    monkeypatch.setattr(code_writer, "SHARD_BYTES", 4096)
    alone = content(extract(data))
    assert sum(name.startswith("features-0") for name in alone) > 2
    two_processes([("extract_t5", arguments(data, tmp_path / "two", encoders))], tmp_path, setup=SMALL_PARTS)
    assert content(tmp_path / "two") == alone


@pytest.mark.processes
def test_killed_and_run_again_it_writes_the_same_files(extract, encoders, tmp_path, monkeypatch):
    data = many_lines(tmp_path / "many")
    monkeypatch.setattr(code_writer, "PART_ROWS", 8)
    alone = content(extract(data))
    slow = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from dataset import code_writer
code_writer.PART_ROWS = 8
write = code_writer.write_part
code_writer.write_part = lambda *a, **k: (write(*a, **k), time.sleep(0.3))
from tests.conftest import call
call("extract_t5", *sys.argv[1:])"""
    words = [str(word) for word in arguments(data, tmp_path / "killed", encoders)]
    process = subprocess.Popen([sys.executable, "-c", slow, *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    end = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("parts/*.json"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("parts/*.npy")}
    assert len(left) >= 6 and not (tmp_path / "killed" / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"is unfinished: run language/extract_t5_feature\.py again"):
        attach_features(FakeNames(), str(tmp_path / "killed"), column="features")
    written, real = [], code_writer.write_part
    monkeypatch.setattr(code_writer, "write_part", lambda folder, part, *rest, **more: (
        written.append(part), real(folder, part, *rest, **more)))
    assert content(extract(data, to="killed")) == alone
    assert 0 < len(written) <= 10 - 3


class FakeNames:
    """A store that only has names."""

    columns, folder = {"name": None}, None


def test_a_full_disk_is_told_in_a_line(extract, data, monkeypatch, capsys):
    def full(path, array):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(code_writer, "save_array", full)
        with pytest.raises(SystemExit):
            extract(data)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    assert json.loads((extract(data) / "manifest.json").read_text())["count"] == 7


def test_a_complete_store_is_kept_and_another_is_refused(extract, data, capsys):
    folder = extract(data)
    before = content(folder)
    extract(data)
    assert "is complete: nothing to do" in capsys.readouterr().out and content(folder) == before
    for changed in (["--caption-key", "llava"], ["--t5-model-type", "wide"], ["--precision", "none"]):
        with pytest.raises(SystemExit):
            extract(data, *changed)
        assert "already holds features made with another" in (said := capsys.readouterr().err)
        assert "--t5-path" in said
    path = data / "part-0.jsonl"
    path.write_text(path.read_text().replace("short 0", "a new caption"))
    with pytest.raises(SystemExit):
        extract(data)
    assert "made with another captions" in capsys.readouterr().err
    assert content(folder) == before


@pytest.mark.parametrize(("flags", "said"), [
    (["--t5-model-type", "none"], "there is no text encoder none"),
    (["--t5-feature-dim", 2048], f"--t5-feature-dim is 2048, but the features of tiny are {WIDTH} numbers wide"),
    (["--data-start", 5], "--data-start 5"),
    (["--data-path", "nowhere"], "nowhere"),
    (["--t5-path", "s3://bucket/features"], "is a URL: write to a folder"),
])
def test_mistakes_are_told_in_a_line(extract, data, capsys, flags, said):
    with pytest.raises(SystemExit) as caught:
        extract(data, *flags)
    assert caught.value.code == 2
    assert said in (lines := capsys.readouterr().err.strip().splitlines())[-1] and lines[-1].startswith("error: ")


# ---- attaching


def llamagen(root, encoders, *, count=7):
    """LlamaGen's files of the long captions."""
    for i, features in enumerate(expected(encoders, [caption(i) for i in range(count)], dtype=torch.float32)):
        folder = root / f"part-{i // 4}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{i % 4}.npy", features[None].numpy())
    return root


def test_llamagens_files(encoders, codes, tmp_path):
    store = attached(codes, llamagen(tmp_path / "npy", encoders))
    assert_same(read_features(store, "features", np.array([5, 0])),
                expected(encoders, [caption(5), caption(0)], dtype=torch.float32))


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-9]),
    lambda path: np.save(path, np.full((1, 3, WIDTH), np.nan, np.float32)),
    lambda path: np.save(path, np.ones((1, 3, WIDTH + 1), np.float32)),
    lambda path: np.save(path, np.ones((1, 0, WIDTH), np.float32)),
    lambda path: np.save(path, np.array([{}], dtype=object)),
], ids=["missing", "empty", "cut", "nan", "other width", "no tokens", "pickle"])
def test_a_file_of_llamagens_that_cannot_be_used_is_told(encoders, codes, tmp_path, capfd, spoil):
    root = llamagen(tmp_path / "npy", encoders)
    spoil(root / "part-0" / "2.npy")
    store = attached(codes, root)
    whole = expected(encoders, [caption(i) for i in range(7)], dtype=torch.float32)
    names = store.column("name", np.arange(len(store)))
    features = read_features(store, "features", np.arange(len(store)))
    for name, found in zip(names, features, strict=True):  # gone, or empty, for which training has no loss
        row = 4 * int(name[5]) + int(name[-1])
        assert torch.equal(found, whole[row]) if row != 2 else found.shape == (0, WIDTH)
    said = capfd.readouterr().err
    assert "part-0.jsonl:2" in said or "2.npy holds no features" in said


def test_features_of_other_captions_are_refused(extract, codes, tmp_path):
    other = many_lines(tmp_path / "many", count=20)
    (other / "part-0.jsonl").rename(other / "else.jsonl")
    with pytest.raises(ValueError, match=r"has features of none of the 7 captions of .*part-0\.jsonl:0"):
        attached(codes, extract(other))


def test_long_and_short_features_of_different_encoders_name_both(extract, codes, data):
    store = attached(codes, extract(data))
    with pytest.raises(ValueError, match="features of tiny, 24 wide and short_features of wide, 32 wide"):
        attach_features(store, str(extract(data, "--t5-model-type", "wide", to="short")), column="short_features")


def test_damaged_features_are_refused(extract, codes, data):
    folder = extract(data)
    values = folder / "features-00000.npy"
    values.write_bytes(values.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"is damaged: .*features-00000\.npy .*extract the features again"):
        attached(codes, folder)
    values.unlink()
    with pytest.raises(ValueError, match="extract the features again"):
        attached(codes, folder)


def test_a_store_of_features_elsewhere_is_fetched(extract, codes, data, encoders, tmp_path):
    folder = extract(data, "--caption-key", "llava")
    shutil.move(folder, tmp_path / "remote")
    store = attached(codes, f"file://{tmp_path / 'remote'}")
    assert_same(read_features(store, "features", np.arange(2)), expected(encoders, [caption(0), caption(1)]))


def test_captions_that_were_changed_under_the_same_names_are_told(extract, codes, capsys):
    features = extract(codes)
    attached(codes, features)
    assert "other captions" not in capsys.readouterr().err
    manifest = json.loads((codes / "manifest.json").read_text())
    column = next(column for column in manifest["columns"] if column["name"] == "caption")
    path = codes / column["files"][0]["file"]
    np.save(path, np.load(path)[::-1])
    column["files"][0]["sha256"] = "0" * 64
    (codes / "manifest.json").write_text(json.dumps(manifest))
    attached(codes, features)
    assert "has features of other captions than" in capsys.readouterr().err
