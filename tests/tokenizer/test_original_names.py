"""Reconstructions are also found under LlamaGen's names, and its documented evaluation works on them as written."""
import json
import re

import numpy as np
import pytest

from tests.conftest import call
from tests.tokenizer.test_reconstruct import results_of, run
from tokenizer import reconstruct
from tokenizer.original_names import give_original_name
from tokenizer.reconstruct import ReconstructFlags, size_for_scoring

NAME = "VQ-4-S-imagenet-size-16-size-16-codebook-size-256-dim-8-seed-3"


@pytest.mark.usefixtures("own_cache", "stand_in")
def test_llamagens_evaluation_works_as_its_documents_show_it(image_folder, vq_ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "reconstructions"
    vq = run(made, "--data-path", image_folder, "--vq-ckpt", vq_ckpt, "--global-seed", 3)
    assert (made / f"{NAME}.npz").readlink().name == f"{vq.name}.npz"
    reconstruct.main(ReconstructFlags(reconstructor="identity", data_path=str(image_folder), image_size=(16, 16),
                                      sample_dir=str(made), num_workers=0))
    results = results_of(vq)
    line, = (made / f"{NAME}_results.txt").read_text().splitlines()
    assert line == f"PSNR: {results['psnr']:.6f}, SSIM: {results['ssim_llamagen']:.6f}"
    call("evaluate", "reconstructions/val_imagenet.npz", f"reconstructions/{NAME}.npz", "--preset", "rfid", "--metrics",
         "fid,sfid,is")
    assert re.search(r"^FID: \d", (made / f"{NAME}.txt").read_text(), flags=re.MULTILINE)  # where LlamaGen's puts it
    report = json.loads((made / f"{NAME}.json").read_text())
    assert report["protocol"]["reconstructor"]["psnr"] == results["psnr"]
    assert not (made / "val_imagenet_results.txt").exists()


def test_a_link_follows_the_last_run_and_a_foreign_file_stays(tmp_path):
    for name in ("one", "two"):
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros(1))
        assert not give_original_name(tmp_path / name, "theirs", psnr=None, ssim=0.5)
        assert (tmp_path / "theirs.npz").readlink().name == f"{name}.npz"
    assert (tmp_path / "theirs_results.txt").read_text() == "PSNR: inf, SSIM: 0.500000\n"
    (tmp_path / "two.npz").unlink()  # a broken link is still ours
    assert not give_original_name(tmp_path / "one", "theirs", psnr=20.0, ssim=0.5)
    assert np.load(tmp_path / "theirs.npz")["arr_0"].shape == (1,)

    for foreign in ("a.npz", "b_results.txt"):
        (tmp_path / foreign).write_text("of LlamaGen")
        said = give_original_name(tmp_path / "one", foreign[0], psnr=20.0, ssim=0.5)
        assert f"{foreign} is there already" in said and (tmp_path / foreign).read_text() == "of LlamaGen"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big.npz").write_text("on another disk")
    (tmp_path / "c.npz").symlink_to("elsewhere/big.npz")
    assert "c.npz is there already" in give_original_name(tmp_path / "one", "c", psnr=20.0, ssim=0.5)
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_only_vq_is_scored_at_256_where_nothing_is_said():
    for kind, kept in {"vq": 256, "vqgan": 384, "vae": 384, "consistency": 384, "identity": 384}.items():
        assert size_for_scoring(ReconstructFlags(reconstructor=kind, image_size=(384, 384))) == (kept, kept)
    asked = ReconstructFlags(reconstructor="vae", image_size=(384, 384), image_size_eval=(256, 256))
    assert size_for_scoring(asked) == (256, 256)
    assert size_for_scoring(ReconstructFlags(image_size=(48, 48))) == (48, 48)
