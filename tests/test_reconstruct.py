"""The reconstruction command: its numbers, computed another way, on one process and on two."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import uniform_filter

from dataset.augmentation import center_crop
from tokenizer import reconstruct
from tokenizer.build import TokenizerFlags, load_tokenizer
from utils import cli
from utils.images import load_png

ROOT = Path(__file__).resolve().parents[1]


def run(sample_dir: Path, *argv) -> Path:
    """Run the command in this process; return the folder it made."""
    cli.run(reconstruct.main, reconstruct.ReconstructFlags, [
        "--image-size", "16", "--num-workers", "0", "--sample-dir", str(sample_dir), *map(str, argv)])
    folder, = (path for path in sample_dir.iterdir() if path.is_dir())
    return folder


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
    results = json.loads((folder / "results.json").read_text())
    _, model = load_tokenizer(TokenizerFlags(vq_ckpt=str(vq_ckpt)), device=torch.device("cpu"))
    files = [file for name in ("blue", "green", "red") for file in sorted((image_folder / name).iterdir())]
    rows, codes = [], []
    for i, file in enumerate(files):
        picture = center_crop(Image.open(file).convert("RGB"), (16, 16))
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


def test_two_processes_agree_with_one_and_broken_images_are_counted(broken_folder, vq_ckpt, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two processes: how a convolution is split shows in its last bits
    flags = ["--data-path", broken_folder, "--vq-ckpt", vq_ckpt, "--image-size-eval", "24"]
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    two = subprocess.Popen(["bash", ROOT / "scripts/tokenizer/reconstruction_vq.sh", *flags, "--image-size", "16",
                            "--num-workers", "0", "--per-proc-batch-size", "3", "--sample-dir", tmp_path / "two"],
                           env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        one = run(tmp_path / "one", *flags)
    finally:
        torch.set_num_threads(threads)
    output, errors = two.communicate(timeout=120)
    assert two.returncode == 0 and "2 unreadable images skipped" in output, errors
    other = tmp_path / "two" / one.name
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert a["images"] == 34 and len(a["unreadable"]) == 2
    assert all(a[key] == (pytest.approx(b[key], abs=1e-9) if isinstance(b[key], float) else b[key]) for key in a)
    names = sorted(path.name for path in one.glob("*.png"))
    assert names == sorted(path.name for path in other.glob("*.png")) and len(names) == 34
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    assert one.with_name(f"{one.name}.npz").read_bytes() == other.with_name(f"{one.name}.npz").read_bytes()
    assert load_png(one / names[0]).shape == (24, 24, 3)


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
