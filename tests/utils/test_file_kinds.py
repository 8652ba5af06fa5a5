"""What a wrong file is called, and texts that can do nothing to a terminal."""
import bz2
import gzip
import io
import lzma
import re
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import call
from utils import cli
from utils.files import first_line, plain, what_it_is

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title>"


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "said"), [
    (b"", "empty"), (bytes(9000), "nothing but zeros"),
    (POINTER.encode(), "a Git LFS pointer.*git lfs pull"),
    (POINTER.replace("\n", "\r\n").encode(), "a Git LFS pointer"),
    (b"\xef\xbb\xbf" + POINTER.encode(), "a Git LFS pointer"), (POINTER.encode("utf-16"), "a Git LFS pointer"),
    (b"version https://hawser.github.com/spec/v1\n", "a Git LFS pointer"),
    (PAGE.encode(), "an HTML page.*download it again"), (b"\n  " + PAGE.lower().encode(), "an HTML page"),
    (b"<HTML><BODY>404", "an HTML page"), (b"<!-- x -->\n<html lang='de'>", "an HTML page"),
    (PAGE.encode() + "é".encode() * 9000, "an HTML page"),
    (b'<?xml version="1.0"?><html xmlns="x">', "an HTML page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "an XML text.*<Error><Code>.*download"),
    (b"<Error><Code>NoSuchKey", "an XML text"), (b'{"error": "Repository not found"}', "a JSON text.*Repository"),
    (b'[{"message": 1}]', "a JSON text"), (b"Not Found", r"a text file \(Not Found\)"), (b" \n\n", "a blank text file"),
    ("Запрещено".encode(), "a text file"), (tarred(), "a tar archive"), (gzip.compress(tarred()), "compressed by gzip"),
    (bz2.compress(b"x"), "compressed by bzip2"), (lzma.compress(b"x"), "compressed by xz"),
    (picture("PNG"), "a PNG picture"), (picture("JPEG"), "a JPEG picture"), (picture("WEBP"), "a WebP picture"),
    (b"PK\x03\x04rest", "a zip archive"), (b"\x93NUMPY\x01", "a NumPy array"), (b"\x80\x02}q\x00.", None),
    (b"\x0a\x0b\x0c\x00\x01", None), (np.random.default_rng(0).bytes(5000), None)])
def test_a_wrong_file_is_called_what_it_is(content, said, tmp_path):
    (tmp_path / "x").write_bytes(content)
    found = what_it_is(tmp_path / "x")
    if said is None:
        assert found is None
    else:
        assert found is not None and "\n" not in found
        assert re.match(said, found), found


def test_what_is_no_file_is_not_called_anything(tmp_path):
    assert what_it_is(tmp_path) is what_it_is(tmp_path / "absent") is None


def test_only_the_start_of_a_file_is_read(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 10**6)
    assert len(what_it_is(tmp_path / "x")) < 200


# ---- terminals


CODES = "".join(map(chr, [*range(32), 127, *range(128, 160), 0x2028, 0x2029, 0x202E, 0x2066, 0xDCFF]))


def test_control_characters_are_spelt_out_and_nothing_else():
    spelt = plain(f"a{CODES}b")
    assert spelt.startswith(r"a\x00\x01") and spelt.endswith(r"\u202e\u2066\udcffb")
    assert spelt.isascii() and spelt.isprintable()
    for kept in ("naïve café", "金魚", "👩‍👩‍👧 family", "עברית", "a\u00a0b", "e\u0301"):
        assert plain(kept) == kept
    assert unicodedata.category(CODES[0]) == "Cc"


def test_errors_and_warnings_can_do_nothing_to_a_terminal(capsys):
    with pytest.raises(SystemExit):
        cli.fail(f"no such file: {CODES}.png", quiet=False)
    cli.warn(f"strange: {CODES}\x1b]0;title\x07")
    said = capsys.readouterr().err
    assert said.count("\n") == 2
    assert said.replace("\n", "").isprintable() and said.isascii()


@pytest.mark.parametrize("mistake", [["--\x1b[31mflag"], ["--code-path", "\x1b[2J\x1b]0;x\x07"],
                                     ["--code-path", "x", "--lr", "\x1b[31m"]], ids=["flag", "path", "value"])
def test_mistakes_on_the_command_line_too(mistake, capsys):
    with pytest.raises(SystemExit) as caught:
        call("train_gpt", *mistake)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.count("\n") == 1 and said.strip().isprintable()


def test_what_torch_says_comes_without_its_colours(tmp_path):
    torch.save({"model": pytest.raises}, tmp_path / "x.pt")
    with pytest.raises(Exception, match="Weights only") as caught:
        torch.load(tmp_path / "x.pt", weights_only=True)
    assert "\x1b" in str(caught.value) or "GLOBAL" in str(caught.value)
    assert "\x1b" not in first_line(caught.value)


def test_what_a_training_says_can_do_nothing_to_a_terminal(capsys):
    """Its lines name classes and files."""
    cli.say(f"2 new: {CODES}, cat")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.strip().isprintable()
