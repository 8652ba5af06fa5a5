"""Captioned pictures: every layout gives the same pairs; a fault is counted under its kind and costs nothing else."""
import csv
import io
import json
import os
import pickle
import tarfile
import time
from multiprocessing import reduction

import numpy as np
import pytest

from dataset import pair_cache, pair_index, pairs_lines, t2i
from dataset.build import PairFlags, build_dataset, flagged_pairs
from dataset.pairs import Problems
from dataset.pictures import UnreadableError
from dataset.t2i import open_pairs
from tests.dataset.captioned import (
    add,
    caption,
    jsonl_line,
    picture,
    png,
    write_jsonl,
    write_plain,
    write_tar,
    write_tars,
)

pytestmark = pytest.mark.usefixtures("own_cache")


def everything(pairs) -> list:
    """(name, long, short, picture's hash) of each pair."""
    return [(pairs.name(i), *pairs.captions(i), pairs.image(i).tobytes()) for i in range(len(pairs))]


def expected(names, *, short: bool = False, indices=None) -> list:
    return [(name, caption(i), f"short {i}" if short else None, picture(i).tobytes())
            for i, name in zip(indices or range(99), names, strict=False)]


def test_llamagens_jsonl(tmp_path):
    pairs = open_pairs(write_jsonl(tmp_path))
    names = [*(f"part-0.jsonl:{i}" for i in range(4)), *(f"part-1.jsonl:{i}" for i in range(3))]
    assert everything(pairs) == expected(names, short=True)
    assert pairs.has_short and not pairs.problems.counts
    assert everything(open_pairs(tmp_path / "part-1.jsonl")) == everything(pairs)[4:]
    assert everything(open_pairs(tmp_path, part=(1, None))) == everything(open_pairs(tmp_path, part=(1, 1)))
    for part in ((2, None), (1, 0), (0, 2), (-1, None)):
        with pytest.raises(ValueError, match="holds the files 0 to 1"):
            open_pairs(tmp_path, part=part)


def test_where_pictures_of_a_list_are_looked_for(tmp_path, monkeypatch):
    """Absolute; below the list's folder; below the working directory."""
    work, data = tmp_path / "work", tmp_path / "data"
    for folder, index in ((work, 1), (data, 2), (tmp_path, 3)):
        folder.mkdir(exist_ok=True)
        (folder / "both.png").write_bytes(png(index))
    (work / "here.png").write_bytes(png(1))
    paths = ["both.png", "here.png", "../both.png", str(work / "both.png")]
    (data / "a.jsonl").write_text("\n".join(jsonl_line(0, image_path=path) for path in paths))
    monkeypatch.chdir(work)
    found = [pixels for *_, pixels in everything(open_pairs(data))]
    assert found == [picture(i).tobytes() for i in (2, 1, 3, 1)]


@pytest.mark.parametrize("text", [
    ["short", "long"], ["long"], "long", ["", "long"], [None, " long\n"], ["long", ""], ["long", None, "3"]], ids=str)
def test_which_caption_is_the_long_one(tmp_path, text):
    write_jsonl(tmp_path, (1,))
    (tmp_path / "part-0.jsonl").write_text(jsonl_line(0, text=text))
    assert open_pairs(tmp_path).captions(0) == ("long", "short" if text[0] == "short" else None)


def test_broken_lines_are_counted_and_cost_only_themselves(tmp_path):
    write_jsonl(tmp_path, (9,))
    lines = [jsonl_line(0), '{"image_path": "images/1.p', "", jsonl_line(1, text=[]), jsonl_line(2, text=" \n"), "[1]",
             jsonl_line(2, text=7), json.dumps({"text": "no picture"}), "[" * 10**5, '"\udcff"', jsonl_line(3)[:-1]]
    (tmp_path / "part-0.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\n".join([*lines, jsonl_line(4)]).encode(errors="surrogateescape"))
    pairs = open_pairs(tmp_path)
    assert [name for name, *_ in everything(pairs)] == ["part-0.jsonl:0", "part-0.jsonl:11"]
    assert pairs.problems.counts == {"broken line": 4, "empty caption": 2, "line without image or caption": 3}
    assert pairs.problems.examples["broken line"][0].startswith("part-0.jsonl:1: no JSON (")


def test_a_line_that_never_ends_is_one_broken_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_lines, "MOST_LINE", 2**10)
    write_jsonl(tmp_path, (2,))
    (tmp_path / "part-0.jsonl").write_text("\n".join([jsonl_line(0), "x" * 2**12, jsonl_line(1)]))
    pairs = open_pairs(tmp_path)
    assert everything(pairs) == expected(["part-0.jsonl:0", "part-0.jsonl:2"], short=True)
    assert pairs.problems.counts == {"broken line": 1}


def test_halves_of_surrogate_pairs_can_be_written(tmp_path):
    write_jsonl(tmp_path, (1,))
    line = r'{"image_path": "images/0.png", "text": "cut \ud83d and whole \ud83d\ude00"}'
    (tmp_path / "part-0.jsonl").write_text(line)
    assert open_pairs(tmp_path).captions(0).long == "cut \ufffd and whole \U0001f600"


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")], ids=str)
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
def test_tables(tmp_path, name, delimiter, end):
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    captions = [caption(0), 'with "quotes", and; more\tof them', f"two{end}lines", "été 中文 \U0001f600"]
    with open(tmp_path / name, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
        writer.writerow(["Number", "File_Name", "Caption", "short_caption"])
        writer.writerows([[i, f"images/{i}.png", captions[i], "s" * i] for i in range(4)])
    for path in (tmp_path, tmp_path / name):
        pairs = open_pairs(path)
        assert [found for found, *_ in everything(pairs)] == [f"{name}:{line}" for line in (1, 2, 3, 5)]
        assert [tuple(pairs.captions(i)) for i in range(4)] == [
            (text, "s" * i or None) for i, text in enumerate(captions)]


def test_broken_rows_of_a_table_cost_only_themselves(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").write_bytes(png(0))
    rows = ["image,caption", "a.png,one", 'a.png,"never closed', "a.png,two", "a.png", "a.png,x,y", "", "a.png,  ",
            ",none", 'a.png,"three\nfour"', "a.png,\udcff", *["a.png,more"] * 40, 'a.png,"not closed at the end']
    (tmp_path / "a.csv").write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    pairs = open_pairs(tmp_path)
    assert [pairs.captions(i).long for i in range(len(pairs))] == ["one", "two", "three\nfour", *["more"] * 40]
    assert pairs.problems.counts == {"broken line": 5, "empty caption": 1, "line without image or caption": 1}


def test_a_table_needs_its_columns_and_a_folder_only_one(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"begins with 'a,b': expected the names of its columns, one of image_path"):
        open_pairs(tmp_path)
    (tmp_path / "b.tsv").write_text("image\ttext\n")
    with pytest.raises(ValueError, match="holds several tables"):
        open_pairs(tmp_path)


def test_plain_pairs_and_their_faults(tmp_path):
    write_plain(tmp_path)
    sound = open_pairs(tmp_path)
    names = ["even/0.png", "even/2.png", "even/4.png", "odd/1.png", "odd/3.png", "odd/5.png"]
    assert everything(sound) == expected(names, indices=[0, 2, 4, 1, 3, 5]) and not sound.problems.counts
    (tmp_path / "even" / "0.txt").write_text(" \n")
    (tmp_path / "even" / "2.txt").unlink()
    (tmp_path / "even" / "4.txt").write_bytes(b"caf\xe9")
    (tmp_path / "odd" / "1.jpg").write_bytes(png(1))
    (tmp_path / "odd" / "lone.txt").write_text("nothing to see")
    (tmp_path / "odd" / "3.txt").write_bytes("été".encode("utf-16"))
    pairs = open_pairs(tmp_path)
    assert pairs.problems.counts == {"empty caption": 1, "no caption": 1, "caption that is no text": 1,
                                     "duplicate name": 1, "caption without image": 1}
    assert [(pairs.name(i), pairs.captions(i).long) for i in range(len(pairs))] == [
        ("odd/1.jpg", caption(1)), ("odd/3.png", "été"), ("odd/5.png", caption(5))]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str)
def test_archives_of_every_kind(tmp_path, format):
    long = "d" * 120 + "/é" + "n" * (10 if format == tarfile.USTAR_FORMAT else 130)
    write_tar(tmp_path / "0.tar", range(3), format=format)
    with tarfile.open(tmp_path / "0.tar", "a", format=format) as archive:
        add(archive, f"{long}.png", png(3))
        add(archive, f"{long}.txt", caption(3).encode())
    pairs = open_pairs(tmp_path / "0.tar")
    names = ["000000000", "000000001", "000000002", long]
    assert everything(pairs) == expected([f"0.tar:{name}" for name in names])
    assert not pairs.problems.counts and not pairs.has_short


def test_ways_to_name_archives(tmp_path):
    whole = everything(open_pairs(write_tars(tmp_path, (2, 2, 1))))
    assert [name for name, *_ in whole] == [f"0000{k}.tar:00000000{i}" for i, k in enumerate([0, 0, 1, 1, 2])]
    assert everything(open_pairs(f"{tmp_path}/{{00000..00002}}.tar")) == whole
    assert everything(open_pairs(f"{tmp_path}/00000.tar,{tmp_path}/{{00001..00002}}.tar")) == whole
    assert everything(open_pairs(tmp_path, part=(1, 1))) == whole[2:4]
    gap = open_pairs(f"{tmp_path}/{{00001..00003}}.tar")
    assert len(gap) == 3 and gap.problems.counts == {"missing or damaged file": 1}
    write_tar(tmp_path / "other" / "00000.tar", [0])
    named = open_pairs(f"{tmp_path}/00000.tar,{tmp_path}/other/00000.tar")
    assert [named.name(i) for i in range(3)] == ["00000.tar:000000000", "00000.tar:000000001",
                                                 "other/00000.tar:000000000"]
    for wrong, said in (("{00007..00009}.tar", "there is no "), ("{9..0}.tar", "expected {first..last}"),
                        ("{0..99999999999}.tar", "at most 1000000 files"), ("none", "there is no "),
                        ("00000.tar,other", "other is none"), ("x.zip", "expected files of one kind")):
        (tmp_path / "x.zip").touch()
        path = ",".join(str(tmp_path / name) for name in wrong.split(","))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            open_pairs(path)


def faulty_tar(path) -> None:
    """A pair, then every fault, then a pair."""
    with tarfile.open(path, "w") as archive:
        def pair(key: str, **parts) -> None:
            for ending, content in parts.items():
                add(archive, f"{key}.{ending}", content)

        pair("00", png=png(0), txt=b"zero")
        pair("01", png=png(1))
        pair("02", txt=b"no picture")
        pair("03", png=png(3), txt=b" \n", json=b'{"caption": null}')
        pair("04", png=png(4), json=b'{"url": "x"}')
        pair("05", png=png(5), json=b'{"caption": "cut')
        pair("06", png=png(6), txt=b"\xff\xfe\x00\xd8")
        pair("00", png=png(9), txt=b"twice")
        pair("._07", png=png(7), txt=b"hidden")
        for kind, name in ((tarfile.SYMTYPE, "08.png"), (tarfile.LNKTYPE, "09.png"), (tarfile.CHRTYPE, "10.png"),
                           (tarfile.DIRTYPE, "11.png"), (tarfile.FIFOTYPE, "12.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../etc/passwd"
            archive.addfile(member)
        pair("08", txt=b"of a link")
        pair("../20", png=png(20), txt=b"twenty")
        pair("21", png=png(21), txt=b" ", json=b'{"TEXT": "of json", "short_caption": "brief"}')


def test_faults_within_an_archive(tmp_path):
    faulty_tar(tmp_path / "a.tar")
    pairs = open_pairs(tmp_path)
    assert [(name, long, short) for name, long, short, _ in everything(pairs)] == [
        ("a.tar:00", "zero", None), ("a.tar:../20", "twenty", None), ("a.tar:21", "of json", "brief")]
    assert pairs.image(1).tobytes() == picture(20).tobytes() and pairs.has_short
    assert pairs.problems.counts == {"no caption": 2, "caption without image": 2, "empty caption": 1,
                                     "caption that is no text": 2, "duplicate name": 2}


@pytest.mark.parametrize("cut", [0, 100, 700, 4000, -600, -1025, "header", "zeros"], ids=str)
def test_damaged_archives_give_what_is_whole(tmp_path, cut):
    """Cut anywhere; a header spoilt, or made zeros, in the middle."""
    whole = everything(open_pairs(write_tars(tmp_path, (6, 1))))
    path = tmp_path / "00000.tar"
    content = bytearray(path.read_bytes())
    if isinstance(cut, int):
        content = content[:len(content.rstrip(b"\0")) + 1024 + cut if cut < 0 else cut]
    else:
        place = content.index(b"000000002.png")
        content[place:place + 512] = b"\0" * 512 if cut == "zeros" else content[place + 1:place + 513]
    path.write_bytes(content)
    pairs = open_pairs(tmp_path)
    found = everything(pairs)
    assert found[-1] == whole[-1] and all(one in whole for one in found)
    kept = {0: "6", 100: "6", 700: "6", 4000: "06", -600: "0123456", -1025: "0123456"}.get(cut, "013456")
    assert "".join(name[-1] for name, *_ in found) == kept
    assert pairs.problems.counts["missing or damaged file"] == 1


@pytest.mark.parametrize(("content", "said"), [
    (b"<!DOCTYPE html><html>", "an HTML page"), (b"\x1f\x8b" + b"x" * 2000, "compressed by gzip"), (b"", "empty"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS")], ids=["html", "gzip", "empty", "lfs"])
def test_what_is_no_archive_is_said(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"holds no usable pair.*{said}"):
        open_pairs(tmp_path)
    write_tar(tmp_path / "b.tar", [0])
    assert len(open_pairs(tmp_path)) == 1


def test_pictures_that_cannot_be_used_are_refused_by_kind(tmp_path):
    write_jsonl(tmp_path, (4,))
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "1.png").write_bytes(png(1)[:200])
    (tmp_path / "images" / "2.png").write_bytes(png(2, size=20))
    pairs = open_pairs(tmp_path, smallest=(24, 24))
    for i, kind in enumerate(["missing image", "unreadable image", "too small"]):
        with pytest.raises(UnreadableError, match=f"part-0.jsonl:{i}") as caught:
            pairs.image(i)
        assert caught.value.kind == kind
    assert pairs.image(3).height == 24
    assert open_pairs(tmp_path).image(2).height == 20


def test_nothing_left_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image_path": "x.png", "text": ""}\n')
    with pytest.raises(ValueError, match=r"no usable pair .*: 1 empty caption \(a.jsonl:0: the caption is empty\)"):
        open_pairs(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no usable pair of a picture and a caption: it is empty"):
        open_pairs(tmp_path / "empty")


@pytest.mark.parametrize("write", [write_jsonl, write_tars], ids=["jsonl", "tar"])
def test_an_index_is_kept_until_the_file_changes(tmp_path, monkeypatch, write):
    monkeypatch.setattr(pair_index, "KEPT_FROM", 0)
    root, looked = write(tmp_path / "data"), []
    whole = everything(open_pairs(root))
    real = pair_index.keep
    monkeypatch.setattr(pair_index, "keep", lambda path, found: (looked.append(path), real(path, found))[1])
    again = open_pairs(root)
    assert everything(again) == whole and not looked
    states, path = again.states(), sorted(root.glob("*.*"))[0]
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    assert everything(open_pairs(root)) == whole and len(looked) == 1
    assert open_pairs(root).states()["image_sizes"] != states["image_sizes"]
    for kept in (tmp_path / "cache" / "llamagen" / "pairs").glob("*.npy"):
        kept.write_bytes(kept.read_bytes()[:-8])
    assert everything(open_pairs(root)) == whole and len(looked) == 3
    os.rename(root, tmp_path / "moved")
    moved = open_pairs(tmp_path / "moved").states()
    assert moved["image_names"] == states["image_names"]


def test_where_no_cache_can_be_written_pairs_are_read_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_index, "KEPT_FROM", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert len(everything(open_pairs(write_tars(tmp_path)))) == 7


def test_remote_archives_come_once_and_the_cache_is_bounded(tmp_path, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    fetched, real = [], pair_cache.fetch_whole
    monkeypatch.setattr(pair_cache, "fetch_whole", lambda url, *rest, **more: (
        fetched.append(url), real(url, *rest, **more))[1])
    local = write_tars(tmp_path / "data", (2, 2, 2))
    for path in local.iterdir():
        with fsspec.open(f"memory://bucket/{path.name}", "wb") as file:
            file.write(path.read_bytes())
    whole = everything(open_pairs(local))
    for named in ("memory://bucket", "memory://bucket/", "memory://bucket/{00000..00002}.tar"):
        assert everything(open_pairs(named)) == whole
    assert len(fetched) == 3
    copies, size = tmp_path / "cache" / "llamagen" / "archives", (local / "00000.tar").stat().st_size
    monkeypatch.setattr(pair_cache, "MOST_CACHED", 2 * size)
    with fsspec.open("memory://bucket/00003.tar", "wb") as file:
        file.write((local / "00000.tar").read_bytes())
    assert len(everything(open_pairs("memory://bucket"))) == 8
    assert len(list(copies.glob("*.tar"))) == 2
    assert not list(copies.glob("*.lock"))
    with pytest.raises(FileNotFoundError, match=r"there is no memory://nowhere"):
        open_pairs("memory://nowhere")
    gone = open_pairs("memory://bucket/{00003..00004}.tar")
    assert len(gone) == 2 and gone.problems.counts == {"missing or damaged file": 1}
    memory.store.clear()


def test_a_folder_may_be_called_emoji(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "emoji")
    write_tar(tmp_path / "emoji" / "0.tar", [0])
    assert len(flagged_pairs(PairFlags(data_path="emoji"))) == 7
    assert "its *.jsonl are read; not 0.tar" in capsys.readouterr().err


def test_signed_urls_are_files(monkeypatch):
    """What follows "?" is neither the ending nor part of a pair's name."""
    monkeypatch.setattr(t2i, "remote_state", lambda url: (1, ""))
    urls = ["https://server/a.tar?sign=x/y.z", "https://server/b.TAR?sign=2"]
    files = t2i.listed_files(",".join(urls))
    assert files == urls and [source.name for source in t2i.sources_of(files, Problems())] == ["a.tar", "b.TAR"]


def test_an_archive_too_large_for_its_index_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("dataset.pairs_tar.MOST_ARCHIVE", 1000)
    with pytest.raises(ValueError, match="expected less than 2 TiB: split it"):
        open_pairs(write_tar(tmp_path / "a.tar", [0]))


def test_a_missing_back_end_names_the_flag():
    with pytest.raises(ValueError, match=r"^--data-path nosuch://bucket"):
        open_pairs("nosuch://bucket/{0..1}.tar")


def test_what_a_killed_download_left_is_removed_when_room_is_needed(tmp_path):
    for age, name in ((2 * pair_cache.ABANDONED, ".a.tar.0.tmp"), (0, ".b.tar.0.tmp")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    pair_cache.make_room(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == [".b.tar.0.tmp"]


def test_emoji_are_pairs_too():
    pairs = flagged_pairs(PairFlags(dataset="emoji"), emoji_size=16)
    captions = {pairs.name(i): pairs.captions(i).long for i in range(len(pairs))}
    assert captions["1F603"] == "grinning face with big eyes"
    assert all(value == "flag of " + value.removeprefix("flag of ") for name, value in captions.items()
               if 0x1F1E6 <= int(name.split("-")[0], 16) <= 0x1F1FF)
    assert len(set(captions.values())) == len(pairs)


@pytest.mark.parametrize(("flags", "said"), [
    ({}, "--dataset t2i needs --data-path"), ({"dataset": "imagenet", "data_path": "x"}, "imagenet has no captions"),
    ({"dataset": "emoji", "data_start": 1}, "--data-start and --data-end choose among")], ids=str)
def test_flags_that_ask_for_no_pairs(flags, said):
    with pytest.raises(ValueError, match=said):
        flagged_pairs(PairFlags(**flags))


def test_captioned_pictures_train_a_tokenizer(tmp_path):
    data = build_dataset("t2i_image", str(write_jsonl(tmp_path)), size=(16, 16))
    assert data.classes is None and np.array_equal(data.labels, np.zeros(7)) and data.image(3).height == 24
    assert io.BytesIO(data.image(0).tobytes()).read() == picture(0).tobytes()


@pytest.mark.parametrize("write", [write_jsonl, write_plain, write_tars], ids=lambda write: write.__name__)
@pytest.mark.parametrize("kept_from", [0, 2**24], ids=["index in the cache", "index in memory"])
def test_pairs_go_to_processes_that_are_started_afresh(tmp_path, monkeypatch, write, kept_from):
    """Python 3.14 sends what workers read, which is not to hold open files or maps."""
    monkeypatch.setattr(pair_index, "KEPT_FROM", kept_from)
    pairs = open_pairs(write(tmp_path / "data"))
    whole = everything(pairs)
    buffer = io.BytesIO()
    reduction.ForkingPickler(buffer).dump(pairs)
    assert everything(pickle.loads(buffer.getvalue())) == whole
