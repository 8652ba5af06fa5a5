"""The reconstruction command: its numbers, computed another way, on one process and on two."""
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import uniform_filter

from dataset.augmentation import center_crop
from tests.conftest import TINY, two_processes
from tokenizer import reconstruct, reconstructors
from tokenizer.build import TokenizerFlags, load_tokenizer
from utils import cli
from utils.checkpoints import containers
from utils.images import load_png


def run(sample_dir: Path, *argv) -> Path:
    """Run the command in this process; return the folder it made."""
    cli.run(reconstruct.main, reconstruct.ReconstructFlags, [
        *TINY, "--sample-dir", str(sample_dir), *map(str, argv)])
    folder, = (path for path in sample_dir.iterdir() if path.is_dir())
    return folder


def results_of(folder: Path) -> dict:
    """results.json of a set; JSON has no infinity."""
    return json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)


def crops_of(folder: Path) -> np.ndarray:
    """The centre crops (N, 16, 16, 3) of an image folder in data-set order."""
    files = [file for name in ("blue", "green", "red") for file in sorted((folder / name).iterdir())]
    return np.stack([center_crop(Image.open(file).convert("RGB"), (16, 16)) for file in files])


def ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004 with a flat 7x7 window and sample covariances, mean over whole windows and channels."""
    values = []
    for x, y in zip(a.transpose(2, 0, 1), b.transpose(2, 0, 1), strict=True):
        mx, my = uniform_filter(x, 7), uniform_filter(y, 7)
        unbiased = 49 / 48
        vx, vy, cov = (unbiased * (uniform_filter(p, 7) - q)
                       for p, q in ((x * x, mx * mx), (y * y, my * my), (x * y, mx * my)))
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
        values.append(score[3:-3, 3:-3].mean())
    return float(np.mean(values))


@pytest.fixture
def broken_folder(image_folder, tmp_path) -> Path:
    """The image folder with one file that is no image and one cut in half."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    files = sorted((folder / "green").iterdir())
    files[2].write_bytes(b"broken")
    files[5].write_bytes(files[5].read_bytes()[:200])
    return folder


@torch.no_grad()
def test_numbers_are_those_of_an_independent_computation(image_folder, vq_ckpt, tmp_path, capsys):
    folder = run(tmp_path, "--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--per-proc-batch-size", 5)
    results = results_of(folder)
    _, model = load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))
    rows, codes = [], []
    for i, picture in enumerate(crops_of(image_folder)):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        codes.append(model.encode_codes(pixels))
        made = (127.5 * model(pixels)[0] + 128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        saved = load_png(folder / f"{i:06d}.png")
        assert np.abs(saved.astype(int) - made.astype(int)).max() <= 1  # a rounding edge
        a, b = picture / 255, saved / 255
        rows.append([10 * np.log10(1 / np.mean((a - b) ** 2)), ssim(a, b, 1.0), ssim(a, b, 2.0)])
    psnr, one, two = np.mean(rows, 0)
    assert results["psnr"] == pytest.approx(psnr, abs=1e-6)
    assert results["ssim"] == pytest.approx(one, abs=1e-6) and results["ssim_llamagen"] == pytest.approx(two, abs=1e-6)
    assert results["images"] == 36 and results["unreadable"] == []
    share = np.bincount(torch.cat(codes).flatten().numpy(), minlength=256) / 36 / 16
    assert results["codebook_usage"] == pytest.approx((share > 0).mean(), abs=2 / 256)
    perplexity = np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())
    assert results["codebook_perplexity"] == pytest.approx(perplexity, rel=0.02)
    packed = np.load(folder.with_name(f"{folder.name}.npz"))["arr_0"]
    assert np.array_equal(packed, np.stack([load_png(folder / f"{i:06d}.png") for i in range(36)]))
    assert folder.with_name(f"{folder.name}.png").is_file()
    assert f"36 images: PSNR {psnr:.2f} dB" in capsys.readouterr().out


@pytest.mark.processes
def test_two_processes_agree_with_one_and_broken_images_are_counted(broken_folder, vq_ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "USAGE_WINDOW", 100)  # 6.25 images' codes
    common = ["--data-path", broken_folder, "--image-size-eval", 24]
    commands = {"vq": [*common, "--vq-ckpt", vq_ckpt], "identity": [*common[:2], "--reconstructor", "identity"]}
    jobs = [("reconstruct", [*argv, *TINY, "--per-proc-batch-size", 3, "--sample-dir", tmp_path / "two" / kind])
            for kind, argv in commands.items()]
    two_processes(jobs, tmp_path, setup="""
import tests.conftest, tokenizer.reconstruct
tests.conftest.ENTRIES["reconstruct"] = ("tokenizer.reconstruct", "ReconstructFlags")
tokenizer.reconstruct.USAGE_WINDOW = 100""")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes: how a convolution is split shows in its last bits
    try:
        ones = {kind: run(tmp_path / "one" / kind, *argv) for kind, argv in commands.items()}
    finally:
        torch.set_num_threads(threads)
    for kind, one in ones.items():
        other = tmp_path / "two" / kind / one.name
        a, b = results_of(one), results_of(other)
        assert a["images"] == 34 and len(a["unreadable"]) == 2
        assert a.keys() == b.keys()
        assert all(a[key] == (pytest.approx(b[key], abs=1e-9) if isinstance(b[key], float) else b[key]) for key in a)
        names = sorted(path.name for path in one.glob("*.png"))
        assert names == sorted(path.name for path in other.glob("*.png")) and len(names) == 34
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
        assert one.with_name(f"{one.name}.npz").read_bytes() == other.with_name(f"{one.name}.npz").read_bytes()
        assert load_png(one / names[0]).shape == ((24, 24, 3) if kind == "vq" else (16, 16, 3))
    assert 0 < results_of(ones["vq"])["usage_queue65536"] < results_of(ones["vq"])["codebook_usage"]


def test_identity_writes_the_reference_set(image_folder, tmp_path, capsys):
    """The centre crops, pixel by pixel, in data-set order. No PSNR: the mean of infinities is none."""
    shutil.copytree(image_folder, tmp_path / "images")
    crops = crops_of(image_folder)
    flags = ["--data-path", tmp_path / "images", "--reconstructor", "identity"]
    folder = run(tmp_path / "out", *flags)
    assert folder.name == "val_imagenet-size-16x16-eval-16x16"
    with np.load(folder.with_name(f"{folder.name}.npz")) as packed:
        assert packed.files == ["arr_0"] and np.array_equal(packed["arr_0"], crops)
    results = results_of(folder)
    assert (results["images"], results["identical"], results["psnr"]) == (36, 36, None)
    assert results["ssim"] == pytest.approx(1) and results["checkpoint_sha256"] is None
    assert "codebook_usage" not in results and "lpips" not in results
    assert "36 images: all identical, SSIM 1.000" in capsys.readouterr().out
    sorted((tmp_path / "images" / "blue").iterdir())[7].write_bytes(b"broken")  # what is no more of the set must go
    (folder / ".000007.png.abc.tmp").write_bytes(b"half")
    assert run(tmp_path / "out", *flags) == folder
    assert {path.name for path in folder.iterdir()} == {
        "results.json", *(f"{i:06d}.png" for i in range(36) if i != 7)}
    with np.load(folder.with_name(f"{folder.name}.npz")) as packed:
        assert np.array_equal(packed["arr_0"], np.delete(crops, 7, 0))


def test_psnr_is_the_mean_over_changed_images(image_folder, tmp_path, monkeypatch, capsys):
    """An image that comes back unchanged has an infinite PSNR; it is counted, not averaged."""
    def spoil(self, pixels, indices):
        return torch.where(torch.tensor(indices)[:, None, None, None] < 3, pixels, -pixels.sign()), None

    monkeypatch.setattr(reconstructors.Identity, "__call__", spoil)
    folder = run(tmp_path, "--data-path", image_folder, "--reconstructor", "identity")
    pictures = np.load(folder.with_name(f"{folder.name}.npz"))["arr_0"] / 255
    errors = ((pictures - crops_of(image_folder) / 255) ** 2).mean((1, 2, 3))
    results = results_of(folder)
    assert results["identical"] == 3 == (errors == 0).sum()
    assert results["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors[3:])))
    assert "dB (3 identical ones aside)" in capsys.readouterr().out


@torch.no_grad()
def test_resizing_for_scoring_is_llamagens(image_folder, vq_ckpt, tmp_path):
    """Bicubic on floats; the reconstruction becomes 8-bit after it, the input it is compared with never does."""
    folder = run(tmp_path, "--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--image-size-eval", "24")
    _, model = load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))
    different, values = [], []
    for i, picture in enumerate(crops_of(image_folder)):
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        made, truth = (F.interpolate(x, (24, 24), mode="bicubic")[0].permute(1, 2, 0).numpy()
                       for x in (model(pixels)[0], pixels))
        saved = load_png(folder / f"{i:06d}.png")
        different.append(saved != np.clip(127.5 * made + 128, 0, 255).astype(np.uint8))
        values.append(-10 * np.log10((((truth + 1) / 2 - saved / 255.0) ** 2).mean()))
    assert np.mean(different) < 1e-3  # rounding edges; 8-bit before the resize would change a third of all
    assert results_of(folder)["psnr"] == pytest.approx(np.mean(values), abs=1e-5)


def test_lpips_is_measured_when_asked(image_folder, vq_ckpt, tmp_path, monkeypatch):
    def metric(a, b):
        assert a.dtype == b.dtype == torch.float32 and a.shape[1:] == (3, 16, 16)
        return (a - b).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(reconstruct, "perceptual_loss", lambda backbone, *, device: metric)
    backbone = tmp_path / "vgg16.pth"
    backbone.write_bytes(b"weights")
    folder = run(tmp_path / "out", "--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--lpips-backbone", backbone)
    made = np.stack([load_png(folder / f"{i:06d}.png") for i in range(36)])
    expected = np.abs(crops_of(image_folder) / 127.5 - made / 127.5).mean()
    results = results_of(folder)
    assert results["lpips"] == pytest.approx(expected, abs=1e-6)
    assert results["lpips_backbone_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert results["checkpoint_sha256"] == containers.content_hash(vq_ckpt)


def test_mistakes_are_one_line(image_folder, vq_ckpt, gpt_ckpt, tmp_path, capsys):
    (tmp_path / "bad" / "red").mkdir(parents=True)
    (tmp_path / "bad" / "red" / "0.png").write_bytes(b"broken")
    for flags, message in [
            (("--data-path", image_folder), "--vq-ckpt is missing"),
            (("--data-path", tmp_path / "none", "--vq-ckpt", vq_ckpt), "is not a folder"),
            (("--data-path", image_folder, "--vq-ckpt", gpt_ckpt), "looks like a GPT"),
            (("--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--image-size", 18), "not divisible by 4"),
            (("--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--per-proc-batch-size", 0), "--per-proc-batch-size"),
            (("--data-path", tmp_path / "bad", "--vq-ckpt", vq_ckpt), "none of the 1 images could be read")]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(tmp_path / "out", *flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
