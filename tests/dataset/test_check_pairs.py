"""The check of captioned pictures: exact counts, examples, exit status, the sheet for captions of any kind."""
import json

import numpy as np
import pytest
from PIL import Image

from dataset import pair_sheet
from dataset.pairs import Captions
from tests.conftest import call
from tests.dataset.captioned import jsonl_line, picture, png, write_jsonl, write_plain, write_tars

pytestmark = pytest.mark.usefixtures("own_cache")


def check(data, *flags, code=0) -> dict:
    """Run the check; its report."""
    output = data.parent / "report.json"
    argv = ["--data-path", data, "--image-size", 16, "--num-workers", 2, "--output", output, *flags]
    if code:
        with pytest.raises(SystemExit) as caught:
            call("check_pairs", *argv)
        assert caught.value.code == code
    else:
        call("check_pairs", *argv)
    return json.loads(output.read_text()) if output.is_file() else {}


def test_every_problem_is_counted_by_kind_with_examples(tmp_path, capsys):
    data = write_jsonl(tmp_path / "data", (6, 2))
    (data / "images" / "0.png").unlink()
    (data / "images" / "2.png").write_bytes(png(2)[:90])
    (data / "images" / "4.png").write_bytes(png(4, size=12))
    with open(data / "part-0.jsonl", "a") as file:
        file.write("no json\n" + jsonl_line(1, text=["", " "]) + "\n")
    features = tmp_path / "features" / "part-0"
    features.mkdir(parents=True)
    for line in (0, 1, 2, 3, 4):
        np.save(features / f"{line}.npy", np.zeros((1, 2, 4)))
    report = check(data, "--t5-feat-path", tmp_path / "features")
    assert (report["pairs"], report["read"], report["usable"], report["short_captions"]) == (8, 8, 2, True)
    assert report["unusable"]["counts"] == {"broken line": 1, "empty caption": 1}
    assert report["left_out"]["counts"] == {"missing image": 1, "missing features": 3, "too small": 1,
                                            "unreadable image": 1}
    assert [text.split(":")[1] for text in report["left_out"]["examples"]["missing features"]] == ["5", "0", "1"]
    said = capsys.readouterr().out
    assert "          10  pairs found" in said and "           3  missing features: part-0.jsonl:5" in said
    assert "2 of 8 pairs can be used; --min-size 0 takes small pictures too, enlarged; report: " in said
    assert check(data, "--min-size", 0)["left_out"]["counts"] == {"missing image": 1, "unreadable image": 1}


@pytest.mark.parametrize("write", [write_jsonl, write_plain, write_tars], ids=lambda write: write.__name__)
def test_sound_pairs_of_every_layout(tmp_path, write):
    report = check(write(tmp_path / "data"))
    assert report["usable"] == report["pairs"] == report["read"] and not report["left_out"]["counts"]
    assert not (tmp_path / "report.png").exists()


def test_nothing_usable_is_status_2(tmp_path, capsys):
    report = check(write_plain(tmp_path / "data"), "--image-size", 64, code=2)
    assert report["usable"] == 0 and report["left_out"]["counts"] == {"too small": 6}
    assert "error: none of the 6 pairs looked at can be used, see" in capsys.readouterr().err


def test_a_dry_run_draws_some_pairs_with_their_captions(tmp_path, monkeypatch):
    data, drawn = write_jsonl(tmp_path / "data"), []
    monkeypatch.setattr("dataset.check_pairs.captioned_sheet", lambda rows: (
        drawn.append(rows), pair_sheet.captioned_sheet(rows))[1])
    assert check(data, "--dry-run", 4)["read"] == 4
    (rows,) = drawn
    assert len(rows) == 4 and {crop.size for _, crop, _ in rows} == {(16, 16)}
    assert all(captions.short == f"short {captions.long.split()[-1]}" for *_, captions in rows)
    with Image.open(tmp_path / "report.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(2**24)) > 50
    check(data, "--dry-run", 4)
    check(data, "--dry-run", 4, "--global-seed", 1)
    names = [[name for name, *_ in rows] for rows in drawn]
    assert names[0] == names[1] != names[2]
    assert check(data, "--dry-run", 99)["read"] == 7


STRANGE = ["word " * 2000, "x" * 10_000, "两只猫在窗边睡觉" * 30, "😀" * 20, "\u202eright to left", "a\0b\x1b[31m",
           "e\u0301" * 99, "<b>html</b>", "\n\n.\n", "שלום עולם", "\ud83d"]


@pytest.mark.parametrize("text", STRANGE, ids=range(len(STRANGE)))
def test_captions_of_any_kind_fit_on_the_sheet(text):
    lines = pair_sheet.lines_of_text("a.jsonl:3", Captions(text, text), 256)
    assert 2 <= len(lines) <= pair_sheet.LINES and all(lines)
    assert all(pair_sheet.text_font().getlength(line) <= 256 for line in lines)
    assert ("…" in "".join(lines)) == (len(text) > 60)
    pair_sheet.captioned_sheet([("a.jsonl:3", picture(0), Captions(text, None))])


def test_letters_that_the_font_lacks_are_spelt_out():
    assert pair_sheet.wrapped("a中é", 256, most=2) == ["a\\u4e2dé"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--dry-run", 999], "--dry-run is 999, expected 0 to 256"),
    (["--t5-feat-path", "nowhere"], "nowhere is not a folder of features"),
    (["--min-size", -1], "--min-size is -1, expected pixels, at least 0"),
    (["--t5-feat-path", "."], "holds no features")], ids=str)
def test_wrong_flags(tmp_path, capsys, flags, said):
    assert not check(write_tars(tmp_path / "data"), *flags, code=2)
    assert said in capsys.readouterr().err
