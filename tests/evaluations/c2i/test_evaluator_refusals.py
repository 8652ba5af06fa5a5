"""What the evaluation refuses, each in one line, before or instead of a plausible wrong number."""
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations.c2i import features
from tests.conftest import TINY_GPT, TINY_VQ, call
from tests.evaluations.stand_ins import TINY, evaluate, pictures, refused
from utils.images import save_png

pytestmark = pytest.mark.usefixtures("own_cache")


def truncate(path: Path, *, keep: float) -> None:
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * keep)])


def corrupt_pixels(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def too_few_pixels(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (9, 16, 16, 3)})
        member.write(bytes(8 * 16 * 16 * 3))


def write(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(("make", "says"), [
    (write(arr_0=pictures(8, seed=0).astype(np.float32) / 255), "arr_0 is float32, expected uint8"),
    (write(arr_0=np.full((8, 16, 16, 3), np.nan)), "arr_0 is float64, expected uint8"),
    (write(arr_0=pictures(8, seed=0).transpose(0, 3, 1, 2)), "it looks like (N, 3, H, W)"),
    (write(arr_0=pictures(8, seed=0)[..., 0]), "expected (N, H, W, 3)"),
    (write(arr_0=np.asfortranarray(pictures(8, seed=0))), "Fortran order"),
    (write(arr_0=np.zeros((0, 16, 16, 3), np.uint8)), "holds no images"),
    (write(arr_0=pictures(1, seed=0)), "holds 1 image: a covariance needs two"),
    (write(arr_0=pictures(3, seed=0)), "third neighbour"),
    (write(images=pictures(8, seed=0)), "neither images (arr_0) nor statistics (mu): it holds images"),
    (write(mu=np.zeros(96), sigma=np.eye(96)), "--features are others; it holds no images (arr_0): Fréchet distance, "
                                               "Precision, Recall cannot be computed, nor can any other metric"),
    (write(arr_0=np.array([{}], dtype=object)), "arr_0 is object, expected uint8"),
    (write(arr_0=np.array([exec], dtype=object)), "arr_0 is refused: it names builtins.exec, which would run code"),
    (write(arr_0=np.zeros((2, 16, 16, 3), np.uint8), mu=np.array([exec], dtype=object)), "it names builtins.exec"),
    (lambda path: zipfile.ZipFile(path, "w").writestr("arr_0", b"pixels"), "it holds nothing"),
    (too_few_pixels, "announces 9 images"),
    (lambda path: path.write_bytes(b"not a zip"), "not a complete npz file"),
    (lambda path: (np.savez(path, arr_0=pictures(8, seed=0)), truncate(path, keep=0.6)), "not a complete npz file"),
    (lambda path: (np.savez(path, arr_0=pictures(80, seed=0)), corrupt_pixels(path)), "is damaged"),
    (lambda path: (path / "0.png").parent.mkdir() or np.save(path / "x.npy", np.zeros(3)), "holds no images"),
    (lambda path: None, "no image set at"),
    (lambda path: path.mkdir(), "holds no images"),
    (lambda path: [save_png(path / f"{size}{n}.png", pictures(1, seed=0, size=size)[0]) for n in "ab"
                   for size in (16, 20)], "20a.png is 20x20, 16a.png 16x16"),
    (lambda path: (save_png(path / "a.png", pictures(1, seed=0)[0]), truncate(path / "a.png", keep=0.5)),
     "cannot be read as an image"),
])
def test_bad_samples_are_one_line(make, says, sets, capsys):
    sets[1].unlink()
    make(sets[1])
    refused(capsys, says, *sets, *TINY)
    assert not sets[1].with_suffix(".json").exists()


@pytest.mark.parametrize(("make", "flags", "says"), [
    (write(mu=np.zeros(96), sigma=np.eye(96)), (), "none for sFID (mu_s, sigma_s); it holds no images (arr_0): sFID, "
                                                   "Precision, Recall cannot be computed, --metrics fid,is can"),
    (write(mu=np.zeros(96), sigma=np.eye(96)), ("--metrics", "fid,sfid"), "none for sFID"),
    (write(mu=np.zeros(96), sigma=np.eye(96), arr_0=pictures(8, seed=0)), (), "none for sFID"),
    (write(mu=np.zeros(96)), (), "only one of mu and sigma"),
    (write(mu=np.zeros(96), sigma=np.eye(95)), (), "expected (D,) and (D, D)"),
    (write(mu=np.zeros(64), sigma=np.eye(64)), ("--metrics", "fid"), "mu of length 64, expected 96"),
    (write(mu=np.full(96, np.nan), sigma=np.eye(96)), ("--metrics", "fid"), "should be finite"),
    (write(mu=np.zeros(96), sigma=-np.eye(96)), ("--metrics", "fid"), "negative eigenvalues"),
    (write(arr_0=pictures(8, seed=0)), ("--metrics", "fid,kid"), "choose from fid, sfid, is, precision, recall"),
    (write(arr_0=pictures(8, seed=0)), ("--device", "cuda"), "no GPU"),
    (write(arr_0=pictures(8, seed=0)), ("--output", "x.txt"), "ends in .json"),
    (write(arr_0=pictures(8, seed=0)), ("--per-proc-batch-size", 0), "--per-proc-batch-size is 0"),
    (write(arr_0=pictures(8, seed=0)), ("--acceptance",), "expected one of ADM's sample files"),
    (write(arr_0=pictures(8, seed=0)), (*TINY, "--metrics", "fid"), "(FID, sFID and IS are Inception's)"),
    (write(mu=np.zeros(96), sigma=np.eye(96), arr_0=pictures(8, seed=0)), TINY, "--features are others"),
    (write(arr_0=pictures(8, seed=0)), ("--features", "nowhere:net"), "cannot be loaded"),
    (write(arr_0=pictures(8, seed=0)), ("--features", "torch.nn:Linear"), "cannot be loaded"),
    (write(arr_0=pictures(8, seed=0)), ("--features", "nowhere.pt"), "neither a TorchScript file nor"),
])
def test_bad_references_and_flags_are_one_line(make, flags, says, stand_in, sets, capsys):
    if torch.cuda.is_available() and "cuda" in flags:
        pytest.skip("there is a GPU")
    sets[0].unlink()
    make(sets[0])
    refused(capsys, says, *sets, *flags)


def test_what_one_process_cannot_read_all_raise(sets, monkeypatch, capsys):
    """Else the others would wait for it."""
    theirs = ValueError, "5.png of another process is broken"
    monkeypatch.setattr(features.dist, "gather_lists", lambda values: [*values, theirs])
    refused(capsys, "5.png of another process is broken", *sets, *TINY)


def test_features_that_are_not_finite_are_no_number(sets, capsys):
    refused(capsys, "are not finite", *sets, "--features", "tests.evaluations.stand_ins:not_finite")


def test_a_reference_of_one_image_is_refused(stand_in, tmp_path, capsys):
    save_png(tmp_path / "images" / "a" / "0.png", pictures(1, seed=0)[0])
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"broken")
    with pytest.raises(SystemExit):
        call("reference", "--data-path", tmp_path / "images", "--image-size", 16, "--output", tmp_path / "made.npz")
    assert "images has 1 image that can be read, expected at least 2" in capsys.readouterr().err


def test_presets_refuse_each_others_reference(stand_in, tmp_path, capsys):
    np.savez(tmp_path / "images.npz", arr_0=pictures(9, seed=0))
    np.savez(tmp_path / "trained.npz", arr_0=pictures(5, seed=0), mu=np.zeros(96), sigma=np.eye(96))
    np.savez(tmp_path / "sample.npz", arr_0=pictures(9, seed=1))
    np.savez(tmp_path / "fewer.npz", arr_0=pictures(8, seed=1))
    np.savez(tmp_path / "larger.npz", arr_0=pictures(9, seed=1, size=20))
    fast = ("--metrics", "precision")
    assert evaluate(tmp_path / "images.npz", tmp_path / "sample.npz", *fast, "--preset", "rfid")["protocol"][
        "preset"] == "rfid"
    assert evaluate(tmp_path / "trained.npz", tmp_path / "sample.npz", *fast, "--preset", "gfid")["protocol"][
        "reference"]["kind"] == "custom"
    for reference_name, sample, preset, says in [
            ("images", "sample", "gfid", "without statistics of a training set"),
            ("trained", "sample", "rfid", "holds statistics of a training set"),
            ("images", "fewer", "rfid", "9 reference images and 8 reconstructions"),
            ("images", "larger", "rfid", "the samples of 20x20"),
            ("trained", "larger", "gfid", "the samples of 20x20")]:
        refused(capsys, says, tmp_path / f"{reference_name}.npz", tmp_path / f"{sample}.npz", *fast, "--preset", preset)
    evaluate(tmp_path / "images.npz", tmp_path / "larger.npz", *fast)  # without a preset: said, not refused
    assert "the samples of 20x20" in capsys.readouterr().err


@pytest.mark.parametrize(("arrays", "says"), [
    ({"arr_0": pictures(5, seed=0), "mu": np.zeros(96), "sigma": np.eye(96)}, "holds statistics of a training set"),
    ({"arr_0": pictures(5, seed=0, size=20)}, "holds images of 20x20, expected 16x16"),
])
def test_tokenizers_reconstruct_images_of_their_size(arrays, says, stand_in, image_folder, tmp_path, capsys):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(SystemExit):
        call("train_vq", "--data-path", image_folder, *TINY_VQ, "--results-dir", tmp_path / "none", "--eval-every", 1,
             "--eval-reference", tmp_path / "reference.npz")
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "says"), [
    (["--eval-reference", "x.npz"], "--eval-every needs --vq-ckpt"),
    (["--vq-ckpt", "vq"], "--eval-every needs --eval-reference"),
    (["--vq-ckpt", "vq", "--eval-reference", "x.npz"], "no image set at x.npz"),
    (["--vq-ckpt", "vq", "--eval-reference", "x.npz", "--eval-images", 3], "--eval-images is 3"),
    (["--eval-every", -1], "--eval-every is -1"),
])
def test_bad_evaluations_while_training(flags, says, vq_ckpt, code_store, tmp_path, capsys):
    flags = [vq_ckpt if word == "vq" else word for word in flags]
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", code_store, *TINY_GPT, "--results-dir", tmp_path, "--eval-every", 1,
             *TINY, *flags)
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
