"""A model that gives NaN: previews and evaluations cost a line, resuming is refused with the tensor's name."""
import numpy as np
import pytest

from autoregressive.train.task import GPTTask, SampleStream
from tests.conftest import TINY_GPT, TINY_VQ, call
from tests.runs import OFTEN, rows
from tokenizer.tokenizer_image.vq_train import TokenizerTask
from utils.finite import NotFiniteError
from utils.training.trainer import Trainer

NAN = float("nan")


@pytest.fixture
def command(code_store, vq_ckpt, tmp_path):
    return ["train_gpt", "--code-path", code_store, "--vq-ckpt", vq_ckpt, *TINY_GPT, *OFTEN, "--no-ema",
            "--results-dir", tmp_path]


def test_a_preview_of_nan_is_told_and_training_goes_on(command, tmp_path, monkeypatch, capsys):
    real = GPTTask.preview

    def preview(self, model):
        weight = model.output.weight
        kept = weight.data.clone()
        weight.data[3, 3] = NAN
        try:
            return real(self, model)
        finally:
            weight.data.copy_(kept)

    monkeypatch.setattr(GPTTask, "preview", preview)
    call(*command)
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert [line.split(": ")[1] for line in said] == [f"no preview of step {step}" for step in (4, 8, 9)]
    assert "the model's logits are not finite, from code 0 on, in" in said[0]
    assert rows(tmp_path / "000-GPT-S")[-1]["step"] == 9 and not list(tmp_path.rglob("previews/*.png"))


def test_a_tokenizer_s_preview_of_nan_is_told_and_no_black_picture(image_folder, tmp_path, monkeypatch, capsys):
    real = TokenizerTask.preview

    def preview(self, model):
        bias = model.decoder.conv_out.bias
        kept = bias.data.clone()
        bias.data[1] = NAN
        try:
            return real(self, model)
        finally:
            bias.data.copy_(kept)

    monkeypatch.setattr(TokenizerTask, "preview", preview)
    call("train_vq", *TINY_VQ, *OFTEN, "--no-ema", "--data-path", image_folder, "--results-dir", tmp_path)
    said = [line for line in capsys.readouterr().out.splitlines() if "warning: no preview" in line]
    assert said and all("the tokenizer gave images that are not finite" in line for line in said)
    assert not list(tmp_path.rglob("previews/*.png"))


def test_an_evaluation_of_nan_is_told_and_training_goes_on(command, tmp_path, monkeypatch, capsys, stand_in, own_cache):
    np.savez(tmp_path / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8))
    real, seen = SampleStream.batches, []

    def batches(self, size, **place):
        seen.append(1)
        if len(seen) == 1:
            raise NotFiniteError("the model's logits are not finite")
        return real(self, size, **place)

    monkeypatch.setattr(SampleStream, "batches", batches)
    call(*command, "--eval-every", 4, "--eval-images", 9, "--eval-reference", tmp_path / "reference.npz", "--metrics",
         "precision")
    said = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert said == ["warning: no evaluation of step 4: the model's logits are not finite"]
    assert [row["step"] for row in rows(tmp_path / "000-GPT-S") if "eval_precision" in row] == [8, 9]


def test_resuming_a_checkpoint_of_nan_is_refused(command, monkeypatch, capsys):
    real = Trainer.save

    def save(self):
        self.optimizers["model"].state[self.plain["model"].output.weight]["exp_avg"][2, 2] = NAN
        self.plain["model"].layers[1].attention.wo.weight.data[0, 0] = NAN
        real(self)

    monkeypatch.setattr(Trainer, "save", save)
    monkeypatch.setattr(GPTTask, "preview", lambda self, model: None)
    with pytest.raises(SystemExit):
        call(*command, "--max-skipped-steps", 2)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*command, "--resume", "auto")
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert "holds weights that are not finite: model.layers.1.attention.wo.weight (nan), " in line
    assert "optimizer.output.weight.exp_avg (nan)" in line
