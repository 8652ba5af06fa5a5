"""What the evaluator advises can be done: every message about a file that lacks something is followed, and succeeds."""
import contextlib
import re

import numpy as np
import pytest

from evaluations.c2i import image_sets
from evaluations.c2i.scores import OF_INCEPTION, OF_OTHERS
from tests.conftest import call
from tests.evaluations.stand_ins import TINY, WIDTHS, evaluate, pictures, refused

pytestmark = pytest.mark.usefixtures("own_cache", "stand_in")


def statistics(mean: str, covariance: str, *, width: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(len(mean))
    values = rng.normal(size=(300, width or WIDTHS[mean]))
    return {mean: values.mean(0), covariance: np.cov(values, rowvar=False)}


MU, MU_S = statistics("mu", "sigma"), statistics("mu_s", "sigma_s")
FILES = {
    "images": {"arr_0": pictures(9, seed=0)}, "three images": {"arr_0": pictures(3, seed=0)},
    "one image": {"arr_0": pictures(1, seed=0)}, "mu": MU, "mu_s": MU_S, "all statistics": MU | MU_S,
    "of another network": statistics("mu", "sigma", width=64),
    "mu of another network": statistics("mu", "sigma", width=64) | MU_S,
    **{f"images, {name}": {"arr_0": pictures(9, seed=0), **parts}
       for name, parts in (("mu", MU), ("mu_s", MU_S), ("all statistics", MU | MU_S),
                           ("of another network", statistics("mu", "sigma", width=64)))}}


def outcome(capsys, *argv) -> str:
    """"" for success, else the one line."""
    capsys.readouterr()
    with contextlib.suppress(SystemExit):
        call("evaluate", *argv)
        return ""
    line, = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.mark.parametrize("features", [(), TINY], ids=["inception", "others"])
@pytest.mark.parametrize(("reference", "sample"), [
    *((name, "images") for name in FILES), *(("images", name) for name in FILES), ("mu", "mu"), ("mu", "mu_s"),
    ("mu", "one image"), ("all statistics", "mu"), ("three images", "mu"), ("images, mu", "three images")])
def test_the_advice_can_be_followed(reference, sample, features, tmp_path, capsys):
    paths = [tmp_path / "ref.npz", tmp_path / "sample.npz"]
    for path, name in zip(paths, (reference, sample), strict=True):
        np.savez(path, **FILES[name])
    offered = OF_OTHERS if features else OF_INCEPTION
    possible = {name for name in offered if not outcome(capsys, *paths, *features, "--metrics", name)}
    for asked in [None, *offered, "precision,recall", offered[0] + ",precision"]:
        wanted = set(asked.split(",")) if asked else set(offered)
        said = outcome(capsys, *paths, *features, *([] if asked is None else ["--metrics", asked]))
        assert (said == "") == (wanted <= possible), (asked, said)
        advised = re.search("--metrics ([a-z_,]+) can", said)
        if said:
            assert bool(advised) == bool(possible) and (advised or "nor can any other metric" in said), said
        if advised:
            assert set(advised[1].split(",")) == (wanted & possible or possible)
            assert not outcome(capsys, *paths, *features, "--metrics", advised[1]), said


def test_statistics_as_pytorch_fid_saves_them_give_fid_on_either_side(tmp_path, capsys):
    np.savez(tmp_path / "stats.npz", **MU)
    np.savez(tmp_path / "images.npz", arr_0=pictures(40, seed=0))
    there = evaluate(tmp_path / "stats.npz", tmp_path / "images.npz", "--metrics", "fid")
    back = evaluate(tmp_path / "images.npz", tmp_path / "stats.npz", "--metrics", "fid")
    assert there["fid"] == pytest.approx(back["fid"], rel=1e-9) and there["fid"] > 1
    assert evaluate(tmp_path / "stats.npz", tmp_path / "stats.npz", "--metrics", "fid")["fid"] < 1e-6
    assert back["protocol"]["sample"]["images"] is None
    assert "it does not say of how many images" in capsys.readouterr().err
    for preset, said in (("gfid", "without statistics"), ("rfid", "40 reference images and 0 reconstructions")):
        refused(capsys, said, tmp_path / "images.npz", tmp_path / "stats.npz", "--metrics", "fid", "--preset", preset)
    evaluate(tmp_path / "stats.npz", tmp_path / "stats.npz", "--metrics", "fid", "--preset", "gfid")


# ---- pixels of another type


def ramp(low, high, dtype) -> np.ndarray:
    return np.linspace(low, high, 4 * 8 * 8 * 3).reshape(4, 8, 8, 3).astype(dtype)


UNIT, CENTRED = "numpy.uint8(255 * x + 0.5)", "numpy.uint8(numpy.clip(127.5 * x + 128, 0, 255))"
UNKNOWN = "how they become 0 to 255 is not known here"


@pytest.mark.parametrize(("pixels", "said"), [
    *((ramp(0, 1, dtype), rf"[0, 1]: if that is [0, 1], save {UNIT}") for dtype in ("f2", "f4", "f8", ">f4")),
    (ramp(-1, 1, "f4"), f"[-1, 1]: if that is [-1, 1], save {CENTRED}"),
    (ramp(-1.25, 1.125, "f2"), f"[-1.25, 1.125]: if that is [-1, 1], save {CENTRED}"),
    (ramp(0, 255, "f4"), "[0, 255]: if that is [0, 255], save x.round().astype(numpy.uint8)"),
    *((ramp(0, 255, dtype), "[0, 255]: if that is [0, 255], save x.astype(numpy.uint8)")
      for dtype in ("i8", "i4", "i2", "u2")),
    (ramp(0, 65535, "u2"), "[0, 65535]: if that is [0, 65535], save (x / 257).round().astype(numpy.uint8)"),
    (ramp(0, 1, "f4") > 0.5, f"[0, 1]: if that is [0, 1], save {UNIT}"),
    (ramp(-3, 3, "f4"), f"[-3, 3]: {UNKNOWN}"), (ramp(0, 1.5, "f4"), f"[0, 1.5]: {UNKNOWN}"),
    (ramp(0, 1000, "f4"), f"[0, 1000]: {UNKNOWN}"), (ramp(-128, 127, "i1"), f"[-128, 127]: {UNKNOWN}"),
    (ramp(0, 65535, "i4"), f"[0, 65535]: {UNKNOWN}"), (ramp(-100, 255, "i8"), f"[-100, 255]: {UNKNOWN}"),
    *((np.where(ramp(0, 1, "f4") == 1, value, 0.5), "values that are not finite (NaN, infinite)")
      for value in (np.nan, np.inf, -np.inf)),
    (np.full((2, 8, 8, 3), np.inf), "values that are not finite"), (np.zeros((0, 8, 8, 3)), "it holds none"),
    (np.full((2, 8, 8, 3), 1j), "arr_0 is complex128, expected uint8 pixels"),
    (np.full((2, 8, 8, 3), "0"), "arr_0 is <U1, expected uint8 pixels")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_advice_depends_on_the_range(pixels, said, save, tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "BLOCK", 1000)  # so that several are read
    monkeypatch.setattr(image_sets, "LOOKED_AT", 10**6)
    save(tmp_path / "x.npz", arr_0=pixels)
    with pytest.raises(ValueError, match=re.escape(said)) as stop:
        image_sets.open_image_set(tmp_path / "x.npz")
    assert f"arr_0 is {pixels.dtype}, expected uint8 pixels" in str(stop.value) and "\n" not in str(stop.value)
    if "save" in said:  # and what is advised is right
        mended = eval(said.partition("save ")[2], {"numpy": np, "x": pixels})
        assert mended.dtype == np.uint8 and (mended.min(), mended.max()) == (0, 255)
        np.savez(tmp_path / "mended.npz", arr_0=mended)
        assert image_sets.open_image_set(tmp_path / "mended.npz").count == len(pixels)


def test_a_large_array_is_not_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "LOOKED_AT", 2 * image_sets.BLOCK)
    pixels = np.zeros((3 * image_sets.BLOCK // 12, 1, 1, 3), np.float32)
    pixels[-1] = np.nan
    np.savez_compressed(tmp_path / "x.npz", arr_0=pixels)
    with pytest.raises(ValueError, match=re.escape("[0, 0]: if that is [0, 1]")):
        image_sets.open_image_set(tmp_path / "x.npz")


