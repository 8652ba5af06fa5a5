"""Fine-tuning a tokenizer from its weights alone: the fresh discriminator learns first, then its say rises."""
import shutil

import pytest
import torch

from tests.conftest import TINY_VQ, call
from tests.dataset.captioned import write_jsonl, write_tars
from tests.tokenizer.test_losses import losses_of
from tokenizer.tokenizer_image.vq_loss import LossFlags, VQLoss
from utils.checkpoints import containers
from utils.training.logger import read_metrics

CPU = torch.device("cpu")
FINETUNE = ["--image-size", 24, "--num-workers", 0, "--perceptual-weight", 0, "--global-batch-size", 6, "--epochs", 1,
            "--finetune", "--disc-start", 0, "--log-every", 1, "--lr", 1e-3, "--vq-model", "VQ-4-S",
            "--mixed-precision", "none"]


def weights_over(steps: int, **flags) -> list[float]:
    loss = VQLoss(LossFlags(perceptual_weight=0, disc_weight=0.8, **flags), device=CPU)
    return [round(loss.adversarial_weight(step), 6) for step in range(steps)]


def test_the_adversarial_weight_over_the_steps():
    assert weights_over(4, disc_start=2) == [0, 0, 0.8, 0.8]
    assert weights_over(9, disc_start=0, disc_warmup_steps=4) == [0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8]
    assert weights_over(8, disc_start=2, disc_warmup_steps=2) == [0, 0, 0, 0, 0.4, 0.8, 0.8, 0.8]
    loss = VQLoss(LossFlags(perceptual_weight=0, disc_start=2, disc_warmup_steps=2), device=CPU)
    assert [loss.adversarial(step) for step in range(4)] == [False, False, True, True]  # it trains from disc_start on
    assert not VQLoss(LossFlags(perceptual_weight=0, disc_weight=0, disc_start=0), device=CPU).adversarial_weight(9)
    with pytest.raises(ValueError, match="--disc-warmup-steps is -1"):
        VQLoss(LossFlags(perceptual_weight=0, disc_warmup_steps=-1), device=CPU)


def test_the_loss_follows_it():
    flags = LossFlags(perceptual_weight=0, disc_start=0, disc_weight=0.5, disc_warmup_steps=4)
    images, made, _, critic, loss, parts = losses_of(flags, step=3)
    assert critic.calls == 0 and "generator" not in parts
    torch.testing.assert_close(loss, (images - made).square().mean() + 0.6)
    images, made, _, critic, loss, _ = losses_of(flags, step=5)
    torch.testing.assert_close(loss, (images - made).square().mean() + 0.6 - 0.25 * critic(made).mean())


def test_a_tokenizer_stays_the_quantiser_that_it_was(image_folder, tmp_path):
    """Its codebook is normalised or not as in the checkpoint; no weight's shape would tell."""
    command = ["train_vq", "--data-path", image_folder, *TINY_VQ, "--epochs", 1, "--results-dir"]
    call(*command, tmp_path / "first", "--no-codebook-l2-norm")
    call(*command, tmp_path / "second", "--vq-ckpt", tmp_path / "first" / "000-VQ-4-S", "--finetune")
    for run in ("first", "second"):
        saved = containers.saved_config(containers.read(tmp_path / run / "000-VQ-4-S"))
        assert saved["codebook_l2_norm"] is False


def test_the_discriminator_trains_alone_first_and_resuming_is_exact(vq_ckpt, image_folder, tmp_path):
    """Until the warm-up is over the weights are those of a run without a discriminator, bit for bit."""
    torch.save({"model": containers.read(vq_ckpt)["ema"]}, tmp_path / "released.pt")
    command = ["train_vq", "--data-path", image_folder, *FINETUNE, "--vq-ckpt", tmp_path / "released.pt",
               "--ckpt-every", 2, "--results-dir"]  # 6 steps
    call(*command, tmp_path / "warm", "--disc-warmup-steps", 2)
    call(*command, tmp_path / "none", "--disc-weight", 0)
    warm, none = (tmp_path / name / "000-VQ-4-S" for name in ("warm", "none"))
    rows = read_metrics(warm / "metrics.jsonl")
    assert ["generator" in row for row in rows] == [False] * 2 + [True] * 4
    assert all("grad_norm_discriminator" in row for row in rows)
    assert [row["loss"] for row in rows][:2] == [row["loss"] for row in read_metrics(none / "metrics.jsonl")][:2]
    early, late = ([containers.read(run / "checkpoints" / f"{step:07d}")["model"] for run in (warm, none)]
                   for step in (2, 6))
    assert all(torch.equal(value, early[1][name]) for name, value in early[0].items())
    assert not all(torch.equal(value, late[1][name]) for name, value in late[0].items())

    shutil.rmtree(warm / "checkpoints" / "0000006")  # go on in the middle of the rise
    shutil.rmtree(warm / "checkpoints" / "0000004")
    call(*command, tmp_path / "warm", "--disc-warmup-steps", 2, "--resume", "auto")
    assert [row["loss"] for row in read_metrics(warm / "metrics.jsonl")] == [row["loss"] for row in rows]
    again = containers.read(warm / "checkpoints" / "0000006")["model"]
    assert all(torch.equal(value, again[name]) for name, value in late[0].items())


@pytest.mark.parametrize("write", [write_jsonl, write_tars], ids=lambda write: write.__name__)
def test_captioned_pictures_fine_tune_a_tokenizer(vq_ckpt, image_folder, tmp_path, write, own_cache, capsys):
    """LlamaGen's --dataset t2i_image; a broken line and a damaged picture cost only themselves."""
    data = write(tmp_path / "data")
    if write is write_jsonl:
        (data / "images" / "2.png").write_bytes(b"no picture")
        with open(data / "part-1.jsonl", "a") as file:
            file.write("no json\n")
    call("train_vq", "--dataset", "t2i_image", "--data-path", data, "--data-face-path", image_folder, *FINETUNE,
         "--vq-ckpt", vq_ckpt, "--results-dir", tmp_path / "runs")
    said = capsys.readouterr()
    assert "43 images" in said.out and len(read_metrics(tmp_path / "runs" / "000-VQ-4-S" / "metrics.jsonl")) >= 7
    if write is write_jsonl:
        assert "1 broken line (part-1.jsonl:3:" in said.err and "passed over: part-0.jsonl:2" in said.err
