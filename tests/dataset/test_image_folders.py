"""Folders as people have them: what hides among the classes, links, files that are no pictures, damaged ones."""
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample.conditions import ClassConditions
from dataset.image_folders import class_tree, flat_folder
from dataset.loader import CentreCrops
from dataset.pictures import endings
from dataset.unreadable import PassedOver, check_readable, split_readable


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, "PNG" if path.suffix not in (".jpg", ".avif") else None)
    return path


@pytest.fixture
def tree(tmp_path):
    """data/{apples,pears}/{0,1,2}.png"""
    for name in ("apples", "pears"):
        for i in range(3):
            picture(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def names(data) -> list[tuple[str, str]]:
    return [(data.files[i].name, data.classes[label]) for i, label in enumerate(data.labels)]


HERE = [(f"{i}.png", name) for name in ("apples", "pears") for i in range(3)]


def test_hidden_and_system_folders_are_no_classes_and_said_once(tree, capsys):
    left_behind = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", ".Trash-1000",
                   "System Volume Information", "__pycache__")
    for name in left_behind:
        picture(tree / name / "0.png")
        picture(tree / "apples" / name / "9.png")
    picture(tree / "pears" / "._0.png")
    (tree / "pears" / "Thumbs.db").write_bytes(b"")
    data = class_tree(tree)
    assert names(data) == HERE
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"what is hidden or a system's own ({2 * len(left_behind) + 2}: " in said
    assert len(flat_folder(tree)) == 6


def test_names_that_only_begin_so_are_classes(tree):
    for name in ("#hashtag", "@home", "lost", "$100"):
        picture(tree / name / "0.png")
    assert class_tree(tree).classes == ["#hashtag", "$100", "@home", "apples", "lost", "pears"]


@pytest.mark.parametrize("link", ["apples/up", "apples/deep/up", "up"])
@pytest.mark.parametrize("target", ["root", "above", "far above", "pears", "itself"])
def test_links_lead_nowhere_twice(tree, link, target, capsys):
    """Whatever a link leads back to: each picture counts once, in its own class."""
    place = tree / link
    place.parent.mkdir(exist_ok=True)
    if place.parent == tree and target == "pears":
        pytest.skip("two names of one class: refused, see below")
    targets = {"root": tree, "above": tree.parent, "far above": "/", "pears": tree / "pears", "itself": place.parent}
    place.symlink_to(targets[target], target_is_directory=True)
    assert names(class_tree(tree)) == HERE
    assert "links to folders that are visited anyway (1: " in capsys.readouterr().err
    assert len(flat_folder(tree)) == 6


def test_links_to_other_places_are_followed(tree, tmp_path):
    picture(tmp_path / "elsewhere" / "7.png")
    (tree / "quinces").symlink_to(tmp_path / "elsewhere")
    picture(tmp_path / "more" / "8.png")
    (tree / "pears" / "more").symlink_to(tmp_path / "more")
    (tree / "pears" / "again").symlink_to(tmp_path / "more")  # visited once
    assert names(class_tree(tree)) == [*HERE, ("8.png", "pears"), ("7.png", "quinces")]


def test_two_names_of_one_folder_are_refused(tree):
    (tree / "birnen").symlink_to(tree / "pears")
    with pytest.raises(ValueError, match=r"birnen.*pears.*same folder"):
        class_tree(tree)


def test_every_ending_that_pillow_reads_counts_and_the_rest_is_said(tree, capsys):
    newest = "y.AVIF" if ".avif" in endings() else "y.WEBP"  # older Pillows do not know it
    for name in ("x.jfif", newest, "z.tga", "w.JPG"):
        kind = {"jfif": "JPEG", "JPG": "JPEG"}.get(name.split(".")[1])
        Image.new("RGB", (16, 16)).save(tree / "apples" / name, kind)
    (tree / "apples" / "notes.txt").write_text("")
    (tree / "apples" / "features.npy").write_bytes(b"")
    (tree / "README").write_text("")
    picture(tree / "beside.png")
    data = class_tree(tree)
    assert sorted(name for name, label in names(data) if label == "apples") == [
        "0.png", "1.png", "2.png", "w.JPG", "x.jfif", newest, "z.tga"]
    check_readable(data)
    said = capsys.readouterr().err
    assert "4 files: " in said and ".txt 1" in said and "no ending 1" in said and ".png 1" in said


def test_a_folder_without_pictures_says_what_it_holds(tree):
    (tree / "quinces").mkdir()
    (tree / "quinces" / "0.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"quinces holds no pictures \(passed over: 1 file: \.npy 1\)") as caught:
        class_tree(tree)
    assert "remove" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no images below .*passed over: 1 file: "):
        flat_folder(tree / "quinces")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused_by_name(tree):
    (tree / "pears" / "locked").mkdir(mode=0)
    with pytest.raises(ValueError, match="locked cannot be read"):
        class_tree(tree)


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tree, monkeypatch):
    scan = os.scandir

    def failing(path="."):
        if str(path).endswith("pears"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(ValueError, match=r"pears cannot be read \(Permission denied\)"):
        class_tree(tree)


def test_a_class_of_which_nothing_can_be_read_is_refused(tree):
    for path in (tree / "pears").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"nothing of class 'pears' can be read, such as .*0\.png cannot be read"):
        check_readable(class_tree(tree))
    picture(tree / "pears" / "z.png")
    check_readable(class_tree(tree))  # one is enough
    for path in (tree / "apples").iterdir():
        path.write_text("no picture")
    with pytest.raises(ValueError, match="all 3 images can be read"):
        check_readable(flat_folder(tree / "apples"))


def test_unreadable_pictures_are_told_once_with_their_reason(tree, capsys):
    (tree / "apples" / "1.png").write_text("hello")
    (tree / "pears" / "2.png").write_bytes(b"")
    data, passed_over = class_tree(tree), PassedOver()
    crops = CentreCrops(data, range(6), (8, 8))
    for _ in range(2):
        indices, views, unreadable = split_readable([crops[i] for i in range(6)], passed_over)
        assert (indices, unreadable) == ([0, 2, 3, 4], [1, 5])
        assert np.stack(views).shape == (4, 8, 8, 3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "1.png cannot be read as an image (it is a text file (hello)" in lines[0] and lines[0].endswith("1 so far")
    assert "2.png cannot be read as an image (it is empty" in lines[1] and lines[1].endswith("2 so far")


def test_names_of_files_can_do_nothing_to_a_terminal(tree, capsys):
    (tree / "apples" / "a\x1b]0;title\x07\n.png").write_text("hello")
    (tree / "pears" / "b\x1b[31m.txt\x1b[0m").write_text("hello")
    data = class_tree(tree)
    _, reason = CentreCrops(data, range(7), (8, 8))[[name for name, _ in names(data)].index("a\x1b]0;title\x07\n.png")]
    PassedOver().tell([reason])
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\x07" not in said and said.count("\n") == 2


# ---- names of classes


def test_a_word_that_is_a_class_name_means_that_name(capsys):
    numbers = sorted(str(i) for i in range(12))  # 0, 1, 10, 11, 2, …
    sampler = ClassConditions(12, numbers)
    assert [numbers[label] for label in sampler.parse("2, 10,0")] == ["2", "10", "0"]
    said = capsys.readouterr().err
    assert "class 2 is taken as the class of that name, whose number is 4; number 2 is named 10" in said
    assert said.count("\n") == 2  # for 0 name and number agree
    assert sampler.parse("007") == [7]  # no name: a number


def test_names_may_hold_commas_and_blanks():
    sampler = ClassConditions(4, ["goldfish", "tench, Tinca tinca", "the 'big\" one", "3"])
    assert sampler.parse("tench, Tinca tinca") == [1]
    assert sampler.parse('"tench, Tinca tinca",goldfish') == [1, 0]
    assert sampler.parse('goldfish , "tench, Tinca tinca", 0,3') == [0, 1, 0, 3]
    assert sampler.parse("the 'big\" one") == [2]
    blanks = ClassConditions(3, ["a", " b ", "c\nd"])
    assert blanks.parse(" b ") == [1] and blanks.parse("c\nd") == [2]
    assert blanks.parse('" b ", "c\nd",a ') == [1, 2, 0]
    with pytest.raises(ValueError, match="double quotes"):
        blanks.parse("a,c\nd")
    for text, says in (("tench", "double quotes"), ("4", "out of range"), ("-1", "out of range"), (" , ", "no class"),
                       ("1.5", "unknown"), ("²", "unknown")):
        with pytest.raises(ValueError, match=says):
            sampler.parse(text)
    with pytest.raises(ValueError, match="use numbers"):
        ClassConditions(4, None).parse("goldfish")


def test_the_states_of_many_files_are_asked_for_in_groups(tmp_path, monkeypatch):
    """A task for each file cost 2 kB and 40 microseconds: 2.4 GB for ImageNet."""
    for i in range(2500):
        (tmp_path / f"{i:04d}.png").write_bytes(bytes(i % 7))
    tasks, submit = [], ThreadPoolExecutor.submit
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *given: tasks.append(given) or submit(*given))
    data = flat_folder(tmp_path)
    (tmp_path / "0003.png").unlink()
    sizes = np.arange(2500) % 7
    sizes[3] = -1
    assert data.states()["image_sizes"] == hashlib.sha256(sizes.tobytes()).hexdigest()
    assert len(tasks) == 3
