"""Extraction of codes with captions: what the store holds, faults counted by kind, kills, ranks, small pictures."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_t2i
from dataset import code_check, code_writer, codes
from dataset.augmentation import center_crop
from dataset.t2i import open_pairs
from tests.conftest import call, two_processes
from tests.dataset.captioned import caption, picture, png, write_jsonl, write_plain, write_tars
from tests.dataset.codes import content, every_code
from tokenizer.build import TokenizerFlags, encode_images, load_tokenizer
from utils.images import to_float

pytestmark = pytest.mark.usefixtures("own_cache")
WRITERS = {"jsonl": write_jsonl, "tar": write_tars}


@pytest.fixture
def extract(vq_ckpt, tmp_path):
    """extract(data path, flags…) → the folder of the store."""
    def run(data, *flags, to="codes", name="t2i16_codes"):
        call("extract_t2i", "--data-path", data, "--vq-ckpt", vq_ckpt, "--image-size", 16, "--num-workers", 0,
             "--code-path", tmp_path / to, *flags)
        return tmp_path / to / name

    return run


def rows_of(store) -> list[tuple]:
    rows = np.arange(len(store))
    return list(zip(*(store.column(name, rows) for name in store.columns), strict=True))


@pytest.mark.parametrize("layout", WRITERS)
def test_codes_and_captions_are_those_of_the_pairs_in_order(extract, vq_ckpt, tmp_path, layout):
    data = WRITERS[layout](tmp_path / "data")
    folder = extract(data)
    store, pairs = codes.open_stores(str(tmp_path / "codes")), open_pairs(data)
    assert code_check.verify(folder) == [] and (store.views, store.classes, store.grid) == (1, None, (4, 4))
    tokenizer = load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))[1]
    crops = np.stack([center_crop(picture(i), (16, 16)) for i in range(7)])
    np.testing.assert_array_equal(every_code(store)[:, 0], encode_images(tokenizer, to_float(crops)).numpy())
    assert not store.labels.any()
    captions = [(caption(i), f"short {i}") if layout == "jsonl" else (caption(i),) for i in range(7)]
    assert rows_of(store) == [(pairs.name(i), *captions[i]) for i in range(7)]
    manifest = store.manifest
    assert [manifest[key] for key in ("dataset", "images", "left_out", "unusable", "skipped", "smallest")] == [
        "t2i", 7, {}, {}, [], [16, 16]]
    assert {"image_names", "image_sizes", "image_times"} <= manifest.keys()


def test_a_pair_without_a_short_caption_has_an_empty_one(extract, tmp_path):
    write_jsonl(tmp_path / "data", (2,))
    (tmp_path / "data" / "part-0.jsonl").write_text('{"image_path": "images/0.png", "text": ["s", "l"]}\n'
                                                    '{"image_path": "images/1.png", "text": "only"}\n')
    store = codes.open_stores(str(extract(tmp_path / "data")))
    assert rows_of(store) == [("part-0.jsonl:0", "l", "s"), ("part-0.jsonl:1", "only", "")]


def test_what_is_left_out_is_counted_by_kind_and_never_blank(extract, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(code_writer, "PART_ROWS", 3)
    monkeypatch.setattr(code_writer, "MOST_NAMED", 4)
    data = write_jsonl(tmp_path / "data", (12,))
    images = data / "images"
    for i in (0, 1, 2):  # a whole part
        (images / f"{i}.png").write_bytes(png(i)[:100])
    (images / "5.png").unlink()
    for i in (6, 10):
        Image.new("RGB", (15, 40)).save(images / f"{i}.png")
    with open(data / "part-0.jsonl", "a") as file:
        file.write('{"image_path": "images/0.png", "text": " "}\nno json\n')
    folder = extract(data)
    said = capsys.readouterr()
    assert "2 left out: 1 broken line (part-0.jsonl:13: no JSON (" in said.err
    assert "6 pairs of 4x4 codes and captions in" in said.out and "--min-size 0 takes small pictures too" in said.out
    assert "left out: 1 missing image, 2 too small, 3 unreadable image, such as part-0.jsonl:0" in said.out
    store = codes.open_stores(str(folder))
    assert store.column("name", np.arange(6)) == [f"part-0.jsonl:{i}" for i in (3, 4, 7, 8, 9, 11)]
    assert store.manifest["left_out"] == {"missing image": 1, "too small": 2, "unreadable image": 3}
    assert store.manifest["unusable"] == {"broken line": 1, "empty caption": 1}
    assert store.manifest["skipped"] == [f"part-0.jsonl:{i}" for i in (0, 1, 2, 5)]
    whole = codes.open_stores(str(extract(data, "--min-size", 0, to="all")))
    assert len(whole) == 8 and whole.manifest["smallest"] == [0, 0]


def test_pictures_that_are_all_too_small_are_one_line_that_says_what_to_do(extract, tmp_path, capsys):
    data = write_plain(tmp_path / "data")
    with pytest.raises(SystemExit):
        extract(data, "--image-size", 256)
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: none of all 6 pictures can be used: 6 too small (") and "\n" not in said
    assert said.endswith("--min-size 0 takes small pictures too, enlarged") and not (tmp_path / "codes").exists()
    assert len(codes.open_stores(str(extract(data, "--min-size", 0)))) == 6


@pytest.mark.parametrize("layout", WRITERS)
def test_extraction_goes_on_after_a_kill(extract, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(code_writer, "PART_ROWS", 2)
    data = WRITERS[layout](tmp_path / "data")
    whole, write = extract(data), code_writer.write_part
    with monkeypatch.context() as patch:
        patch.setattr(code_writer, "write_part", lambda folder, part, *rest, **more: (
            _ for _ in ()).throw(KeyboardInterrupt) if part == 2 else write(folder, part, *rest, **more))
        with pytest.raises(SystemExit):
            extract(data, to="cut")
    assert content(extract(data, "--per-proc-batch-size", 3, to="cut")) == content(whole)


def test_another_set_of_pairs_is_not_mixed_in(extract, tmp_path, capsys):
    data = write_jsonl(tmp_path / "data")
    extract(data)
    moved = shutil.move(data, tmp_path / "moved")
    extract(moved)
    assert "is complete: nothing to do" in capsys.readouterr().out
    for flags in (["--min-size", 3], ["--data-start", 1, "--data-end", 1]):
        name = "t2i16_1-1_codes" if "--data-start" in flags else "t2i16_codes"
        if "--data-start" in flags:
            assert len(codes.open_stores(str(extract(moved, *flags, name=name)))) == 3
            continue
        with pytest.raises(SystemExit):
            extract(moved, *flags)
        assert "made with another smallest: give another --code-path" in capsys.readouterr().err
    lines = (moved / "part-0.jsonl").read_text().splitlines(keepends=True)
    (moved / "part-0.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit):
        extract(moved)
    assert "made with another images, image_names" in capsys.readouterr().err


def test_emoji_with_their_names(vq_ckpt, tmp_path):
    call("extract_t2i", "--dataset", "emoji_heldout", "--vq-ckpt", vq_ckpt, "--image-size", 16, "--num-workers", 0,
         "--code-path", tmp_path)
    store = codes.open_stores(str(tmp_path / "emoji_heldout_t2i16_codes"))
    assert len(store) > 90 and all(name and text for name, text in rows_of(store))


def test_a_file_that_changes_meanwhile_is_left_out(extract, tmp_path, monkeypatch):
    data, real = write_jsonl(tmp_path / "data", (3,)), extract_codes_t2i.check_usable

    def changed(pairs, *, seed):
        real(pairs, seed=seed)
        path = data / "part-0.jsonl"
        path.write_bytes(path.read_bytes().replace(b"number 1", b"numb\"r 1"))

    monkeypatch.setattr(extract_codes_t2i, "check_usable", changed)
    store = codes.open_stores(str(extract(data)))
    assert len(store) == 2 and store.manifest["left_out"] == {"broken line": 1}


@pytest.mark.processes
@pytest.mark.parametrize("layout", WRITERS)
def test_two_processes_write_what_one_does(extract, vq_ckpt, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(code_writer, "PART_ROWS", 2)
    data = WRITERS[layout](tmp_path / "data")
    (data / "images" / "3.png").write_bytes(b"") if layout == "jsonl" else None
    flags = ["--data-path", data, "--vq-ckpt", vq_ckpt, "--image-size", 16, "--num-workers", 1, "--code-path",
             tmp_path / "two"]
    two_processes([("extract_t2i", flags)], tmp_path,
                  setup="from dataset import code_writer as w, pair_index as p\nw.PART_ROWS, p.KEPT_FROM = 2, 0")
    made = content(tmp_path / "two" / "t2i16_codes")
    assert made == content(extract(data))
    assert json.loads(made["manifest.json"])["count"] == (6 if layout == "jsonl" else 7)
