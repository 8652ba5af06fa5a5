"""Layouts of codes that are read, and batches drawn from them."""
import re

import numpy as np
import pytest
import torch

from autoregressive.train.open_data import open_classes
from dataset import codes as stores
from dataset.code_joins import Mixture, OtherViews
from dataset.code_writer import code_dtype
from tests.conftest import entry
from tests.dataset.codes import STORE, every_code, fake_codes, write_llamagen, write_packed
from utils.cli import build_parser


@pytest.mark.parametrize("views", [1, 2, 10])
def test_llamagens_layout_is_read(tmp_path, views, monkeypatch):
    codes, labels = fake_codes(views=views), np.arange(14) % 5
    write_llamagen(tmp_path, codes, labels)
    for path in (tmp_path, tmp_path / STORE):
        store = stores.open_store(path)
        np.testing.assert_array_equal(every_code(store), codes)
        np.testing.assert_array_equal(store.labels, labels)
        assert (store.views, store.grid, store.num_classes, store.vocab_size) == (views, (4, 4), 5, None)
    monkeypatch.chdir(tmp_path)
    assert len(stores.open_store(".")) == 14
    monkeypatch.chdir(tmp_path / STORE)
    assert len(stores.open_store(".")) == 14


def test_arpgs_layout_is_read(tmp_path):
    codes = fake_codes(views=2)
    labels = np.array([0] * 11 + [2] + [10] * 2)
    places = [*range(11), 0, 0, 1]
    for code, label, place in zip(codes, labels, places, strict=True):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        np.save(tmp_path / str(label) / f"{place}.npy", code)
    store = stores.open_store(tmp_path)
    np.testing.assert_array_equal(every_code(store), codes)  # 10.npy comes after 9.npy, class 10 after class 2
    np.testing.assert_array_equal(store.labels, labels)
    assert store.num_classes == 11


def test_other_layouts_may_hold_grids_that_are_not_square(tmp_path):
    write_llamagen(tmp_path, fake_codes(tokens=24), [0] * 14, name="imagenet64x96")
    with pytest.raises(ValueError, match="24 tokens, no square: give --image-size"):
        stores.open_store(tmp_path)
    assert stores.open_store(tmp_path, grid=(4, 6)).grid == (4, 6)
    with pytest.raises(ValueError, match="grid of 4x4 does not hold"):
        stores.open_store(tmp_path, grid=(4, 4))
    flags = entry("train_gpt")[1]

    def opened(*argv):
        words = map(str, ["--code-path", tmp_path, *argv])
        return open_classes(flags(**vars(build_parser(flags).parse_args(list(words)))))[0]

    assert opened("--image-size", "64x96").grid == (4, 6)
    assert opened("--image-size", "32x48", "--downsample-size", 8).grid == (4, 6)
    with pytest.raises(ValueError, match="does not hold"):
        opened("--image-size", "32x96")


def test_damaged_files_of_other_layouts_are_named(tmp_path):
    write_llamagen(tmp_path, fake_codes(), [0] * 14)
    folder = tmp_path / STORE
    for content, said in ((b"", "cut short"), (b"garbage", "no array"), (None, "is missing")):
        path = folder / "3.npy"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            every_code(stores.open_store(tmp_path)) if content is not None else stores.open_store(tmp_path)
    write_llamagen(tmp_path, fake_codes(), [0] * 14)
    np.save(folder / "3.npy", fake_codes(count=1, views=2))
    with pytest.raises(ValueError, match=r"3\.npy holds codes of shape \(2, 16\)"):
        every_code(stores.open_store(tmp_path))


@pytest.mark.parametrize("write", [
    write_llamagen, lambda root, codes, labels: write_packed(root / STORE, codes, labels)], ids=["llamagen", "packed"])
def test_other_crops_beside_a_folder_are_pointed_out(tmp_path, capsys, monkeypatch, write):
    """LlamaGen draws from both in silence."""
    def said(paths: str, **options) -> str:
        stores.open_stores(paths, **options)
        return capsys.readouterr().err

    wide, narrow = tmp_path / "x_ten_crop", tmp_path / "x_ten_crop_105"
    write(wide, fake_codes(), np.arange(14))
    narrow.mkdir()
    assert said(str(wide), subfolder=STORE) == ""  # nothing is in it
    write(narrow, fake_codes(seed=1), np.arange(14))
    expected = (f"note: {narrow} lies beside {wide}: LlamaGen draws from both, here only what is named is read; "
                f"--code-path {wide},{narrow} takes both\n")
    assert said(str(wide), subfolder=STORE) == said(str(wide)) == expected
    assert f"--code-path {wide}/{STORE},{narrow}/{STORE} takes both" in said(f"{wide}/{STORE}")
    assert said(str(narrow)) == said(f"{wide},{narrow}") == said(f"{narrow},{wide}/") == ""
    assert said(str(wide), weights=(1.0,)) == ""  # other images are mixed by weights, not crops
    assert stores.open_stores(f"{wide},{narrow}").views == 20
    monkeypatch.chdir(tmp_path)
    assert "takes both\n" in said("x_ten_crop")
    write(tmp_path / "plain", fake_codes(), np.arange(14))
    (tmp_path / "plain_105").mkdir()
    assert said(str(tmp_path / "plain")) == ""


# ---- batches


def test_batches_draw_one_view_per_visit(tmp_path):
    codes = fake_codes()
    store = stores.open_store(write_llamagen(tmp_path, codes, np.arange(14)))
    keys = [(epoch, row) for epoch in range(30) for row in range(14)]
    batch = stores.CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys)
    assert batch["codes"].shape == (420, 16)
    assert batch["codes"].dtype == batch["labels"].dtype == torch.int64
    drawn = []
    for (_, row), code, label in zip(keys, batch["codes"].numpy(), batch["labels"].tolist(), strict=True):
        view, = np.flatnonzero((codes[row] == code).all(-1))
        drawn.append(view)
        assert label == row
    assert np.bincount(drawn, minlength=10).min() > 20
    alone = stores.CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys[77:78])
    assert torch.equal(alone["codes"][0], batch["codes"][77])
    other = stores.CodeBatches(store, vocab_size=256, seed=1).__getitems__(keys)
    assert not torch.equal(other["codes"], batch["codes"])


def test_codes_in_any_order_are_another_order_for_each_sample_and_visit(tmp_path):
    store = stores.open_store(write_llamagen(tmp_path, fake_codes(), np.arange(14)))
    keys = [(epoch, row) for epoch in range(200) for row in range(14)]
    plain = stores.CodeBatches(store, vocab_size=256, seed=0).__getitems__(keys)
    batch = stores.CodeBatches(store, vocab_size=256, seed=0, any_order=True).__getitems__(keys)
    orders = batch["orders"]
    assert orders.dtype == torch.int64 and torch.equal(orders.sort(1).values, torch.arange(16).expand(2800, 16))
    assert torch.equal(batch["codes"], plain["codes"].gather(1, orders))
    assert torch.equal(batch["labels"], plain["labels"]) and torch.equal(batch["dropped"], plain["dropped"])
    assert len(orders.unique(dim=0)) == 2800
    places = torch.stack([torch.bincount(orders[:, place], minlength=16) for place in range(16)])
    assert places.min() > 115 and places.max() < 240  # of 175 for each cell in each place: 4.5 standard deviations
    alone = stores.CodeBatches(store, vocab_size=256, seed=0, any_order=True).__getitems__(keys[77:78])
    assert torch.equal(alone["orders"][0], orders[77]) and torch.equal(alone["codes"][0], batch["codes"][77])
    other = stores.CodeBatches(store, vocab_size=256, seed=1, any_order=True).__getitems__(keys[:5])
    assert not torch.equal(other["orders"], orders[:5])


def test_codes_outside_the_vocabulary_are_refused(tmp_path):
    codes = fake_codes(views=1)
    codes[5, 0, 3] = 256
    named = re.escape(f"{tmp_path / STORE / '5.npy'} holds code 256, but the model's vocabulary is 256: give the")
    one = stores.open_store(write_llamagen(tmp_path, codes, [0] * 14))
    wider = write_packed(tmp_path / "packed", fake_codes(views=1), [0] * 14)
    for store in (one, OtherViews(["a", "b"], [stores.open_store(wider), one]),
                  Mixture(["a", "b"], [stores.open_store(wider), one], (1.0, 1.0))):
        batches = stores.CodeBatches(store, vocab_size=256, seed=0)
        with pytest.raises(ValueError, match=named):
            batches.__getitems__([(epoch, row) for epoch in range(9) for row in range(len(store))])
    narrow = stores.CodeBatches(stores.open_store(wider), vocab_size=int(fake_codes(views=1)[9:].max()), seed=0)
    with pytest.raises(ValueError, match=r"packed/shard-0000[23]\.npy holds code \d+, but"):
        narrow.__getitems__([(0, row) for row in range(9, 14)])


def test_codes_are_stored_in_the_smallest_type():
    assert [code_dtype(size) for size in (256, 2**16, 2**16 + 1)] == [np.uint16, np.uint16, np.uint32]
