"""The command line: what --help shows, group by group, and which class a flag is declared in."""
import importlib
from dataclasses import dataclass

import pytest

from tests.house.test_architecture import ENTRIES
from utils import cli
from utils.cli import REQUIRED, build_parser, declaring_class, flag


@dataclass(kw_only=True)
class PaintFlags:
    """How it is painted. What is left out
    is white.

    Not shown.
    """

    colour: str = flag("white", "of the wall; 100% sure")
    coats: int = flag(REQUIRED, "layers of paint")


@dataclass(kw_only=True)
class SizeOfWallFlags:
    """Size of the wall."""

    wall: str = flag(REQUIRED, "which wall", positional=True)
    height: float = flag(2.5, "metres")


@dataclass(kw_only=True)
class HouseFlags(PaintFlags, SizeOfWallFlags):
    """Building a house."""

    height: float = 3.0
    roof: bool = flag(True, "put a roof on it")


def main(flags: HouseFlags) -> None:
    """Nothing."""


@pytest.fixture(autouse=True)
def _width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(capsys, config_class: type, **options) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        build_parser(config_class, **options).parse_args(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_has_a_group_for_each_declaring_class_the_commands_own_first(capsys):
    lines = help_of(capsys, HouseFlags)
    assert lines[0].endswith(" WALL --coats COATS [flags]")
    assert lines[2].startswith("The command line: what --help shows")
    words = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in (
        "--roof,", "-h,", "--colour", "--coats", "WALL", "--height")]
    assert words == ["--roof,", "-h,", "--colour", "--coats", "WALL", "--height"]
    assert [line for line in lines if line.endswith(":") and line[0] != " "] == [
        "Building a house:", "How it is painted:", "Size of the wall:"]
    text = " ".join(" ".join(lines).split())
    assert "How it is painted: What is left out is white. --colour COLOUR of the wall; 100% sure (default: w" in text
    assert "metres (default: 3.0)" in text and "Not shown" not in text


def test_a_restated_default_stays_with_the_class_that_declared_the_flag():
    assert declaring_class(HouseFlags, "height") is SizeOfWallFlags
    assert declaring_class(HouseFlags, "roof") is HouseFlags


def test_the_command_is_described_by_the_module_of_its_main(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["house.py", "--help"])
    with pytest.raises(SystemExit):
        cli.run(main, HouseFlags)
    assert capsys.readouterr().out.splitlines()[2].startswith("The command line")
    assert help_of(capsys, HouseFlags, described_in="utils.cli")[2].startswith("Command lines from")


@pytest.mark.parametrize(("module", "flags"), ENTRIES, ids=[module for module, _ in ENTRIES])
def test_groups_of_the_real_commands_have_different_titles_in_plain_words(module, flags, capsys):
    lines = help_of(capsys, getattr(importlib.import_module(module), flags), described_in=module)
    titles = [line for line in lines if line.endswith(":") and line[0] != " "]
    assert titles and len(set(titles)) == len(titles)
    assert all(len(title) <= 60 and not title.startswith("For commands") and "`" not in title for title in titles)


def test_a_repeated_flag_is_a_list():
    @dataclass(kw_only=True)
    class Wishes:
        """Wishes."""

        wish: list[str] | None = flag(None, "one of them", repeated=True)

    parser = build_parser(Wishes, described_in=__name__)
    assert parser.parse_args([]).wish is None
    assert parser.parse_args(["--wish", "a b", "--wish=", "--wish", "-"]).wish == ["a b", "", "-"]
