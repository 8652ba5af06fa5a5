"""Several stores as one: other crops of the same images, or different images mixed by weights."""
import json
from collections import Counter

import numpy as np
import pytest
import torch

from dataset import code_joins, order
from dataset.code_joins import Mixture, coprime_stride
from dataset.codes import CodeBatches, open_store, open_stores, store_weights
from dataset.loader import StepSampler, loader
from dataset.order import BLOCK_ROWS, WINDOW_ROWS
from tests.conftest import TINY_GPT, call
from tests.dataset.codes import draw, every_code, fake_codes, flip_byte, write_llamagen, write_packed

LABELS = np.arange(14) % 3


# ---- other crops


@pytest.mark.parametrize(("fact", "values"), [("classes", (["cat"], ["dog"])), ("image_names", ("0a", "0b"))])
def test_other_images_with_the_same_labels_are_no_other_crops(tmp_path, fact, values):
    """Two sets of one class each, of as many images."""
    stores = [write_packed(tmp_path / name, fake_codes(), np.zeros(14, dtype=int)) for name in "ab"]
    for store, value in zip(stores, values, strict=True):
        path = store / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {fact: value}))
    with pytest.raises(ValueError, match="other names, labels or classes; different images are mixed by --store-wei"):
        open_stores(f"{stores[0]},{stores[1]}")
    assert len(open_stores(f"{stores[0]},{stores[1]}", weights=(1.0, 1.0))) == 28


def test_crops_of_the_same_images_are_views_of_one_store(tmp_path):
    codes = [fake_codes(seed=seed, views=views) for seed, views in ((0, 10), (1, 3))]
    wide, narrow = (write_packed(tmp_path / name, part, LABELS) for name, part in zip("ab", codes, strict=True))
    both = open_stores(f"{wide},{narrow}")
    assert (len(both), both.views, both.packed, both.folder) == (14, 13, True, wide)
    np.testing.assert_array_equal(every_code(both), np.concatenate(codes, axis=1))
    rows, views = np.array([3, 3, 13, 0]), np.array([12, 0, 10, 9])
    np.testing.assert_array_equal(both.read(rows, views), every_code(both)[rows, views])
    llamagen = write_llamagen(tmp_path / "old", codes[0], LABELS)
    old = open_stores(f"{llamagen},{narrow}")
    assert (old.vocab_size, old.packed) == (256, False)


@pytest.mark.parametrize(("labels", "tokens", "tokenizer", "said"), [
    (np.roll(LABELS, 1), 16, "0", "does not hold other views of the images in .*mixed by --store-weights"),
    (LABELS[:12], 16, "0", "12 images against 14"),
    (LABELS, 25, "0", "holds grids of 5x5 codes, .* of 4x4"),
    (LABELS, 16, "1", "holds codes of another tokenizer than"),
])
def test_what_cannot_be_other_crops_is_refused(tmp_path, labels, tokens, tokenizer, said):
    first = write_packed(tmp_path / "a", fake_codes(), LABELS, tokenizer="0")
    second = write_packed(tmp_path / "b", fake_codes(len(labels), tokens=tokens), labels, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=said):
        open_stores(f"{first},{second}")


# ---- mixtures


@pytest.fixture
def mixture(tmp_path):
    """mixture(weights, **options of the second store) → 14 images in three views and 5 in two, as one store.

    Codes tell the image: 10 * row in the first store, 200 + row in the second, plus the view.
    """
    def build(weights, *, classes=(None, None), **options) -> Mixture:
        first, second = (np.arange(views)[None, :, None] + start + np.arange(count)[:, None, None] * step
                         + np.zeros((1, 1, 16), int) for start, count, step, views in ((0, 14, 10, 3), (200, 5, 10, 2)))
        paths = [write_packed(tmp_path / "a", first, LABELS, classes=classes[0]),
                 write_packed(tmp_path / "b", second, [0, 1, 0, 1, 0], classes=classes[1], **options)]
        return open_stores(",".join(map(str, paths)), weights=weights)

    return build


def drawn(store: Mixture, epochs: int, *, seed: int = 0) -> list[list[tuple[str, int, int]]]:
    """Per epoch: (store, row, view) of each sample, in the order of their indices."""
    found = []
    for epoch in range(epochs):
        codes, _ = draw(store, np.full(len(store), epoch), np.arange(len(store)), seed=seed)
        found.append([("b", (c - 200) // 10, c % 10) if c >= 200 else ("a", c // 10, c % 10)
                      for c in codes[:, 0].tolist()])
    return found


@pytest.mark.parametrize(("weights", "samples"), [
    ((1.0, 1.0), (14, 5)), ((1.0, 0.5), (14, 2)), ((0.25, 3.0), (4, 15)), ((2.5, 0.01), (35, 1))])
def test_weights_say_how_often_an_image_comes(mixture, weights, samples):
    store = mixture(weights)
    epochs = drawn(store, 20)
    assert len(store) == sum(samples)
    for name, count, size in zip("ab", samples, (14, 5), strict=True):
        stream = [row for epoch in epochs for home, row, _ in epoch if home == name]
        assert len(stream) == 20 * count
        for start in range(0, len(stream), size):  # whole passes, whatever the epochs' borders
            part = stream[start:start + size]
            assert len(set(part)) == len(part)
        orders = {tuple(stream[start:start + size]) for start in range(0, len(stream) - size + 1, size)}
        assert len(orders) > 0.8 * (len(stream) // size)  # each in its own order
    views = Counter(view for epoch in epochs for home, _, view in epoch if home == "a")
    assert set(views) == {0, 1, 2}
    assert min(views.values()) > 0.2 * 20 * samples[0]


def test_what_is_drawn_depends_on_seed_epoch_and_index_only(mixture):
    store = mixture((1.5, 2.0))
    whole = drawn(store, 4)
    assert whole == drawn(store, 4)
    assert whole != drawn(store, 4, seed=1)
    assert whole[0] != whole[1]
    keys = np.random.default_rng(0).permutation([(epoch, i) for epoch in range(4) for i in range(len(store))])
    for part in np.array_split(keys, 9):  # in any company and order
        codes, labels = draw(store, *part.T, seed=0)
        for (epoch, index), code, label in zip(part, codes[:, 0], labels, strict=True):
            home, row, view = whole[epoch][index]
            assert code == 10 * row + view + (200 if home == "b" else 0)
            assert label == (LABELS[row] if home == "a" else row % 2)


def test_a_mixture_of_known_numbers(mixture):
    """Runs go on from where they were: what was drawn once is drawn for ever."""
    codes, _ = draw(mixture((1.0, 0.5)), np.full(16, 3), np.arange(16), seed=7)
    assert codes[:, 0].tolist() == [21, 50, 30, 121, 70, 62, 90, 11, 131, 102, 82, 110, 40, 2, 231, 221]


@pytest.fixture
def small_windows(monkeypatch):
    """Blocks of two samples, windows of two blocks, in every module that knows of them."""
    for module in (order, code_joins):
        for name, value in (("BLOCK_ROWS", 2), ("WINDOW_BLOCKS", 4), ("WINDOW_ROWS", 8)):
            monkeypatch.setattr(module, name, value, raising=module is order)


@pytest.mark.parametrize(("weights", "samples"), [((1.0, 1.0), (14, 5)), ((2.5, 1.0), (35, 5)), ((0.5, 3.0), (7, 15))])
def test_a_mixture_larger_than_a_window_is_mixed_everywhere(mixture, small_windows, weights, samples):
    store = mixture(weights)
    epochs = drawn(store, 20)
    for name, count, size in zip("ab", samples, (14, 5), strict=True):
        assert all(sum(home == name for home, _, _ in epoch) == count for epoch in epochs)
        found = Counter(row for epoch in epochs for home, row, _ in epoch if home == name)
        assert max(found.values()) - min(found.values()) <= 1  # whole passes
        assert len(found) == size
    shares = [sum(home == "a" for home, _, _ in epoch[start:start + 8]) / 8 for epoch in epochs
              for start in range(0, len(store) - 7)]
    mean = samples[0] / sum(samples)
    assert all(abs(share - mean) <= 0.3 for share in shares), (min(shares), max(shares), mean)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    keys = np.random.default_rng(0).permutation([(epoch, i) for epoch in range(20) for i in range(len(store))])
    for part in np.array_split(keys, 9):
        codes, labels = draw(store, *part.T, seed=0)
        for (epoch, index), code, label in zip(part, codes[:, 0], labels, strict=True):
            home, row, view = epochs[epoch][index]
            assert code == 10 * row + view + (200 if home == "b" else 0)
            assert label == (LABELS[row] if home == "a" else row % 2)


@pytest.mark.parametrize("count", [WINDOW_ROWS, WINDOW_ROWS + 1, 3 * 2**21, 50_000_000, 50_000_017, 10**11])
def test_strides_visit_every_number_and_spread_a_block(count):
    stride = coprime_stride(count)
    assert np.gcd(stride, count) == 1
    assert (count - 1) * stride < 2**63
    if count == WINDOW_ROWS:
        assert stride == 1
    else:
        block = np.arange(BLOCK_ROWS) * stride % count
        shares = np.bincount(block * 8 // count, minlength=8)  # of the stores of a mixture, say
        assert shares.min() > 0.9 * BLOCK_ROWS / 8


def test_training_batches_of_a_mixture_do_not_depend_on_ranks(mixture):
    store = mixture((1.0, 0.5))

    def steps(ranks, start=0):
        samplers = [StepSampler(len(store), global_batch=6, accumulation=1, rank=rank, world_size=ranks, seed=3,
                                start_step=start, end_step=8) for rank in range(ranks)]
        data = CodeBatches(store, vocab_size=256, seed=3)
        parts = [loader(data, sampler, num_workers=0, pin_memory=False) for sampler in samplers]
        return [torch.cat([batch["codes"] for batch in step]) for step in zip(*parts, strict=True)]

    alone = steps(1)
    for other in (steps(2), steps(3)):
        assert all(map(torch.equal, alone, other))
    assert all(map(torch.equal, alone[5:], steps(2, start=5)))
    visited = torch.cat(alone)[:48, 0]  # three epochs of 16
    assert sorted(visited[visited < 200].tolist()) != sorted(set(visited.tolist()))
    assert Counter((visited[visited < 200] // 10).tolist()) == dict.fromkeys(range(14), 3)


def test_rows_of_a_mixture_can_be_read(mixture):
    store = mixture((1.0, 3.0))
    assert len(store.labels) == 19
    assert store.read(np.array([18, 0, 13, 14]), np.array([2, 2, 0, 1]))[:, 0].tolist() == [240, 2, 130, 201]


@pytest.mark.parametrize(("classes", "union", "labels"), [
    ((None, None), None, [0, 1, 0, 1, 0]),
    ((["x", "y", "z"],) * 2, ["x", "y", "z"], [0, 1, 0, 1, 0]),
    ((["x", "y", "z"], ["z", "new"]), ["x", "y", "z", "new"], [2, 3, 2, 3, 2]),
])
def test_classes_are_joined_by_name(mixture, classes, union, labels):
    store = mixture((1.0, 1.0), classes=classes)
    assert store.classes == union
    assert store.num_classes == (len(union) if union else 3)
    np.testing.assert_array_equal(store.labels, [*LABELS, *labels])
    _, found = draw(store, np.zeros(19, int), np.arange(19), seed=0)
    assert Counter(found.tolist()) == Counter(store.labels.tolist())
    store.labels = np.zeros_like(store.labels)  # as for a model without classes
    assert not draw(store, np.zeros(19, int), np.arange(19), seed=0)[1].any()


@pytest.mark.parametrize(("weights", "options", "said"), [
    ((1.0,), {}, "--store-weights has 1 numbers, --code-path 2 stores"),
    ((1.0, 1.0), {"classes": (None, ["x", "y"])}, "a has no class names, but other stores of --code-path have"),
    ((1.0, 1.0), {"classes": (["x", "y", "z"], ["x", "x"])}, "b has two classes of one name"),
    ((1.0, 1.0), {"tokenizer": "1" * 64}, "b holds codes of another tokenizer"),
])
def test_what_cannot_be_mixed_is_refused(mixture, weights, options, said):
    with pytest.raises(ValueError, match=said):
        mixture(weights, **options)


def test_weights_are_numbers_above_zero():
    assert store_weights("1,0.5,20") == (1.0, 0.5, 20.0)
    for text in ("0", "1,-1", "1,", "inf", "nan", "one"):
        with pytest.raises(ValueError, match=r"expected numbers above 0|could not convert"):
            store_weights(text)


def test_one_store_may_have_a_weight(tmp_path):
    path = write_packed(tmp_path / "a", fake_codes(), LABELS)
    assert len(open_stores(str(path), weights=(0.5,))) == 7
    assert len(open_stores(str(path), weights=(0.001,))) == 1
    assert len(open_store(path)) == 14


def test_training_takes_weights_and_leaves_corrupt_shards_out(tmp_path, capsys):
    first = write_packed(tmp_path / "a", fake_codes(count=24, views=2), np.arange(24) % 2, classes=["x", "y"])
    second = write_packed(tmp_path / "b", fake_codes(count=16, views=3), np.arange(16) % 2, classes=["y", "z"])
    flip_byte(second / "shard-00001.npy")
    flags = ["--code-path", f"{first},{second}", *TINY_GPT, "--epochs", 1, "--results-dir", tmp_path / "results"]
    with pytest.raises(SystemExit):
        call("train_gpt", *flags)
    assert "shard-00001.npy has changed" in capsys.readouterr().err
    call("train_gpt", *flags, "--store-weights", "1,1.5", "--corrupt-shards", "skip")
    config = json.loads((tmp_path / "results" / "000-GPT-S" / "config.json").read_text())
    assert config["images"] == 24 + 18  # 1.5 times the 12 that are left
    assert config["model"]["classes"] == ["x", "y", "z"]
    assert config["store_weights"] == [1.0, 1.5]
