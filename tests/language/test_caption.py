"""Cleaning of captions: LlamaGen's strings, and texts that are no captions."""
import importlib.util
import json
import warnings

import pytest

from language import caption
from language.caption import clean, clean_caption
from tests.conftest import ROOT

EXAMPLES = json.loads((ROOT / "tests/data/captions.json").read_text())


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_reference_makes_the_same_of_it(number):
    assert clean_caption(EXAMPLES[number]["text"]) == EXAMPLES[number]["cleaned"]


@pytest.mark.parametrize(("text", "cleaned"), [
    ("a.com/foo.bar.com tail", "tail"),  # the second host begins where the first path ends
    ("x-https://b.com/a now", "x- now"),
    ("me@a.com", "me"),
    ("see a.png.jpg.txt", "see . txt"),  # up to the last known ending
    (".png alone", ". alone"),
    ("a <b", "a <b"),  # tags that do not end
    ("<![odd thing", "<! odd thing"),  # refused by the HTML parser
    ("50%25 off+now", "50% off now"),  # a URL's way of writing
])
def test_odd_rules_are_kept(text, cleaned):
    assert clean(text) == cleaned


UNITS = ["a", "!", "...", "<a ", "<a b='", "<!--", "&", "a.", "x.com@", "\ud83d ", "a\0", "a\n", "\\n", "- ", "1:11 ",
         " . ", "free ", "a1", "1x", "中", "😀", "'", '"']


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_any_long_text_is_taken_without_a_warning(unit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = clean_caption(unit * (10_000 // len(unit)))
    found.encode()  # no half characters are left, which no tokenizer takes


def test_a_name_of_a_file_is_no_reason_to_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean_caption("a&b.xml") == "a b. xml"
        assert clean_caption("<?xml version='1.0'?>cat") == "cat"


def test_where_hosts_end_is_looked_for_once(monkeypatch):
    """A host of 1,000 parts that is none costs one look, not one from each of its parts."""
    looked = []
    monkeypatch.setattr(caption, "last_host_end", lambda *place: looked.append(place))
    caption.without_addresses("www: " + "a." * 1000, caption.SCHEMES[0])
    assert len(looked) == 2  # at www and at the host


@pytest.mark.parametrize(("module", "package", "text"), [("ftfy", "ftfy", "a"), ("bs4", "beautifulsoup4", "a &lt; b")])
def test_a_missing_package_is_named(monkeypatch, module, package, text):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(ValueError, match=f"cleaning captions needs {package}: .* -m pip install {package}"):
        clean_caption(text)
