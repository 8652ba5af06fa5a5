"""Recipes: the paper's numbers, flags that the real parsers take, typed flags first, refusals; sampling and scoring."""
import json
import shlex
from pathlib import Path

import pytest

from autoregressive.sample import sample_and_score
from autoregressive.sample.sample_and_score import SampleAndScoreFlags, compare
from autoregressive.sample.sample_ddp import SampleSetFlags
from autoregressive.sample.sample_t2i import PromptGridFlags
from autoregressive.sample.sample_t2i_ddp import PromptSetFlags
from autoregressive.train.config import GPTTrainFlags
from autoregressive.train.extract_codes import ExtractFlags
from tests.conftest import ROOT, TINY_GPT, call
from tokenizer.reconstruct import ReconstructFlags
from tokenizer.tokenizer_image.vq_train import VQTrainFlags
from utils import cli
from utils.cli import build_parser
from utils.recipes import SECTIONS, read_recipe, recipe_names
from utils.training.flags import check_flags

TABLE = {  # row of the paper's table: FID, cfg, batch, GPUs, days, sharded
    "c2i_B_256": (5.46, 2.0, 256, 8, 1, False), "c2i_B_384": (6.09, 2.25, 256, 8, 1, False),
    "c2i_L_256": (3.80, 1.75, 256, 8, 2, False), "c2i_L_384": (3.07, 2.0, 256, 8, 2, False),
    "c2i_XL_256": (3.39, 1.75, 256, 16, 3, False), "c2i_XL_384": (2.62, 1.75, 256, 16, 3, False),
    "c2i_XXL_256": (3.09, 1.75, 512, 32, 4, True), "c2i_XXL_384": (2.34, 1.75, 512, 32, 4, True),
    "c2i_3B_384": (2.18, 1.65, 512, 32, 5, True),
}
TOKENIZERS = {  # rFID, PSNR, SSIM at 256, 384, 512; on COCO at 256; usage at 256
    "vq_16": [(2.19, 20.79, 0.675), (0.94, 21.94, 0.726), (0.70, 23.03, 0.772), (8.11, 20.42, 0.678), 0.970],
    "vq_8": [(0.59, 24.45, 0.813), (0.37, 25.63, 0.852), (0.39, 26.98, 0.888), (4.19, 24.20, 0.822), 0.976],
}
ARPG = {  # lr and batch; row of the README, of the guide, of table 8 at 32 steps: FID, cfg
    "L": (4e-4, 1024, (2.44, 4.5), (2.38, 5.0), (2.30, 5.4)), "XL": (3e-4, 768, (2.10, 6.0), (2.02, 6.0), (1.93, 6.6)),
    "XXL": (2e-4, 512, (1.94, 7.5), (1.91, 7.5), (1.83, 6.5)),
}
ARPG_ROWS = {"": (64, "cosine"), "_arccos": (64, "arccos"), "_32steps": (32, "arccos")}  # steps, schedule
ARPG_NAMES = [f"arpg_{model}_256{row}" for model in ARPG for row in ARPG_ROWS]
TEXT = {"t2i_XL_256": (256, "t2i_XL_stage1_256.pt"), "t2i_XL_512": (512, "t2i_XL_stage2_512.pt")}
COMMANDS = {"extract": (ExtractFlags, ["--data-path", "d", "--code-path", "c"]),
            "sample": (SampleSetFlags, []), "reconstruct": (ReconstructFlags, ["--data-path", "d"]),
            "evaluate": (SampleAndScoreFlags, ["--fid-reference", "r.npz"])}


def command(name: str, section: str):
    if name in TEXT and section == "sample":
        return PromptSetFlags, []
    if section != "train":
        return COMMANDS[section]
    return (VQTrainFlags, ["--data-path", "d"]) if name.startswith("vq") else (GPTTrainFlags, ["--code-path", "c"])


def test_there_is_a_recipe_for_each_row():
    assert recipe_names() == sorted([*TABLE, *TOKENIZERS, *ARPG_NAMES, *TEXT])


@pytest.mark.parametrize("name", recipe_names())
def test_all_of_a_recipe_is_taken_by_the_real_parsers(name):
    recipe = read_recipe(name)
    for section in recipe.keys() & set(SECTIONS):
        flags, typed = command(name, section)
        parsed = vars(build_parser(flags).parse_args([*typed, "--recipe", name]))
        for key, value in recipe[section].items():
            expected = (value, value) if key.startswith("image-size") else value
            assert parsed[key.replace("-", "_")] == expected, (section, key)


@pytest.mark.parametrize("name", TABLE)
def test_numbers_are_those_of_the_table(name):
    recipe = read_recipe(name)
    _, model, size = name.split("_")
    fid, cfg, batch, gpus, days, sharded = TABLE[name]
    train, sample = recipe["train"], recipe["sample"]
    assert (recipe["expected"]["fid"], sample["cfg-scale"]) == (fid, cfg)
    assert (train["global-batch-size"], train["epochs"], recipe["hardware"]["gpus"]) == (batch, 300, gpus)
    assert recipe["hardware"]["days"] == days and recipe["hardware"]["source"] and recipe["expected"]["source"]
    assert train["gpt-model"] == sample["gpt-model"] == f"GPT-{model}"
    assert train["image-size"] == sample["image-size"] == recipe["extract"]["image-size"] == int(size)
    assert (sample["num-fid-samples"], sample["top-k"], sample["top-p"], sample["temperature"]) == (50000, 0, 1.0, 1.0)
    assert sample["image-size-eval"] == 256 and sample["precision"] == "bf16"
    assert train["data-parallel"] == ("fsdp" if sharded else "ddp")
    assert train["lr"] == pytest.approx(1e-4 * batch / 256)
    assert any("2e-4" in note for note in recipe["notes"]) == (model == "XL")  # the one that breaks the rule


@pytest.mark.parametrize("name", ARPG_NAMES)
def test_arpgs_numbers_are_those_published(name):
    recipe = read_recipe(name)
    _, model, _, *row = name.split("_")
    lr, batch, *rows = ARPG[model]
    row = f"_{row[0]}" if row else ""
    train, sample, expected = recipe["train"], recipe["sample"], recipe["expected"]
    assert (expected["fid"], sample["cfg-scale"]) == rows[list(ARPG_ROWS).index(row)]
    assert (sample["step"], sample["sample-schedule"]) == ARPG_ROWS[row] and sample["cfg-schedule"] == "linear"
    assert ("is" in expected) == (row == "") and "ARPG" in expected["source"]
    assert train["gpt-model"] == sample["gpt-model"] == f"ARPG-{model}" and sample["label-mode"] == "balanced"
    assert (train["lr"], train["global-batch-size"], train["epochs"], train["warmup-epochs"]) == (lr, batch, 400, 100)
    assert train["lr"] == pytest.approx(1e-4 * batch / 256)
    assert (train["min-lr"], train["lr-schedule"], train["weight-decay"]) == (1e-5, "cosine", 0.05)
    assert recipe["extract"] == {"image-size": 256, "vq-model": "VQ-16", "ten-crop": True, "crop-range": 1.1}
    assert ("hardware" in recipe) == (model == "L")


@pytest.mark.parametrize("name", TEXT)
def test_models_of_text_have_the_settings_that_they_were_released_with(name):
    recipe, (size, file) = read_recipe(name), TEXT[name]
    train, sample = recipe["train"], recipe["sample"]
    assert (sample["cfg-scale"], sample["top-k"], sample["top-p"], sample["temperature"]) == (7.5, 1000, 1.0, 1.0)
    assert train["image-size"] == sample["image-size"] == size and train["gpt-type"] == "t2i"
    assert Path(sample["gpt-ckpt"]).name == file and Path(sample["vq-ckpt"]).name == "vq_ds16_t2i.pt"
    assert train["cls-token-num"] == sample["cls-token-num"] == sample["t5-feature-max-len"] == 120
    assert not {"expected", "hardware"} & recipe.keys() and any("Not published" in note for note in recipe["notes"])
    config = build_parser(PromptGridFlags).parse_args(["--recipe", name, "--prompt", "a cat"])
    assert (config.image_size, config.gpt_ckpt) == ((size, size), sample["gpt-ckpt"])


def script_flags(name: str) -> list[str]:
    """The flags that a launch script adds, up to its `--`."""
    text = (ROOT / "scripts" / "autoregressive" / name).read_text()
    launch = shlex.split(text.replace("\\\n", " ").splitlines()[-1])
    start = next(i for i, word in enumerate(launch) if word.endswith(".py"))
    return launch[start + 1:launch.index("--") + 1]


def test_the_script_trains_arpg_l_as_its_recipe_does():
    parser = build_parser(GPTTrainFlags)
    mine = vars(parser.parse_args([*script_flags("train_arpg.sh"), "--code-path", "c"]))
    assert mine | {"recipe": "arpg_L_256", "image_size": (256, 256), "vocab_size": 16384} == vars(
        parser.parse_args(["--recipe", "arpg_L_256", "--code-path", "c"]))
    sampled = vars(build_parser(SampleSetFlags).parse_args(script_flags("sample_arpg.sh")))
    recipe = read_recipe("arpg_L_256_arccos")["sample"]
    for key in ("cfg-scale", "sample-schedule", "cfg-schedule", "label-mode"):
        assert sampled[key.replace("-", "_")] == recipe[key]


@pytest.mark.parametrize(("typed", "expected"), [
    ([], (0, 100.0, 1e-5)), (["--warmup-steps", "9"], (9, 0, 1e-5)), (["--warmup-epochs=2"], (0, 2.0, 1e-5)),
    (["--warmup-steps", "9", "--warmup_epochs", "2"], (9, 2.0, 1e-5)),
    (["--lr-schedule", "constant"], (0, 100.0, None)), (["--lr-schedule", "cosine"], (0, 100.0, 1e-5)),
    (["--lr-schedule", "constant", "--min-lr", "1e-6"], (0, 100.0, 1e-6)),
])
@pytest.mark.parametrize("source", [["--recipe", "arpg_L_256"], "script"], ids=["recipe", "script"])
def test_typed_flags_displace_what_cannot_stand_beside_them(source, typed, expected):
    """Both warm-ups typed, and the end of a cosine typed beside another schedule, remain the user's mistake."""
    words = script_flags("train_arpg.sh") if source == "script" else source
    config = build_parser(GPTTrainFlags).parse_args([*words, "--code-path", "c", *typed])
    assert (config.warmup_steps, config.warmup_epochs, config.min_lr) == expected
    if len(typed) < 4:
        check_flags(config, world_size=1)
    else:
        with pytest.raises(ValueError, match=r"--warmup-steps and --warmup-epochs|--min-lr"):
            check_flags(config, world_size=1)


def test_a_warm_up_as_long_as_the_training_is_pointed_out(code_store, tmp_path, capsys):
    for epochs, told in (("2", True), ("0.5", False)):
        call("train_gpt", "--code-path", code_store, *TINY_GPT, "--epochs", 2, "--warmup-epochs", epochs,
             "--results-dir", tmp_path / epochs)
        assert ("is not shorter than the training of" in capsys.readouterr().err) == told


def test_a_recipe_displaces_a_scripts_warm_up(tmp_path):
    (tmp_path / "own.json").write_text('{"train": {"warmup-steps": 5, "lr-schedule": "constant"}}')
    config = build_parser(GPTTrainFlags).parse_args(
        [*script_flags("train_arpg.sh"), "--code-path", "c", "--recipe", str(tmp_path / "own.json")])
    assert (config.warmup_steps, config.warmup_epochs, config.min_lr) == (5, 0, None)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_numbers_are_those_of_the_table(name):
    expected = read_recipe(name)["expected"]
    keys = ("rfid", "psnr", "ssim_llamagen")
    rows = [expected["by_image_size"][size] for size in ("256", "384", "512")] + [expected["coco_val2017_256"]]
    assert [tuple(row[key] for key in keys) for row in rows] == TOKENIZERS[name][:4]
    assert rows[0]["usage_queue65536"] == TOKENIZERS[name][4]


def test_what_is_typed_wins(tmp_path):
    parser = build_parser(SampleSetFlags)
    for words in (["--recipe", "c2i_B_256", "--cfg-scale", "3"], ["--cfg_scale=3", "--recipe=c2i_B_256"]):
        parsed = parser.parse_args(words)
        assert (parsed.cfg_scale, parsed.image_size, parsed.recipe) == (3.0, (256, 256), "c2i_B_256")
    assert parser.parse_args([]).cfg_scale == 1.5
    assert build_parser(ExtractFlags).parse_args(
        ["--data-path", "d", "--code-path", "c", "--recipe", "c2i_B_256", "--no-ten-crop"]).ten_crop is False
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"extract": {"code_path": "codes", "mirror": False, "ten-crop": True}}))
    parsed = build_parser(ExtractFlags).parse_args(["--recipe", str(own)])
    assert (parsed.code_path, parsed.mirror, parsed.ten_crop) == ("codes", False, True)


@pytest.mark.parametrize(("content", "message"), [
    ('{"sample": {"colour": 1}}', "own.json: --colour is no flag of this command"),
    ('{"sample": {"cfg-scale": "much"}}', "own.json: --cfg-scale is 'much': could not convert"),
    ('{"sample": {"cfg-scale": true}}', "own.json: --cfg-scale is True, expected a value"),
    ('{"sample": {"compile": 1}}', "own.json: --compile is 1, expected true or false"),
    ('{"sample": {"top-k": [1]}}', "own.json: --top-k is [1], expected a number or a text"),
    ('{"sample": {"top-k": 1.5}}', "own.json: --top-k is 1.5: invalid literal"),
    ('{"sample": {"label-mode": "sorted"}}', "own.json: --label-mode is 'sorted', choose from random, balanced"),
    ('{"train": {"lr": 1}}', "has nothing for this command (sample): it has train"),
    ('{"sample": 3}', "'sample' must map flags to values"), ('{"sample": {}, "extra": 1}', "'extra' is no section"),
    ('{"title": "x"}', "has no section of flags"), ("[]", "has no section of flags"), ("{", "is no JSON"),
])
def test_refusals(tmp_path, capsys, content, message):
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        build_parser(SampleSetFlags).parse_args(["--recipe", str(tmp_path / "own.json")])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines


def test_an_unknown_recipe_is_refused_with_the_list_of_those_there_are(capsys):
    with pytest.raises(SystemExit):
        build_parser(SampleSetFlags).parse_args(["--recipe", "c2i_Q_256"])
    assert "--recipe c2i_Q_256: no such recipe, there are arpg_L_256, arpg_L_256_32steps" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_parser(SampleSetFlags).parse_args(["--recipe"])
    assert "argument --recipe: expected one argument" in capsys.readouterr().err


def test_verdicts():
    recipe = {"expected": {"fid": 5.46, "is": 190.0, "source": "paper"}}
    scores = compare({"fid": 5.55, "is": 191.0, "fid_extra": 1.0}, recipe, changed=[])
    assert scores["verdict"] == "FID is within 0.1 of the expected" and scores["source"] == "paper"
    assert scores["measured"] == {"is": 191.0, "fid": 5.55} and scores["expected"] == {"fid": 5.46, "is": 190.0}
    assert compare({"fid": 5.96}, recipe, changed=[])["verdict"].startswith("FID is 0.50 above the expected")
    assert "--cfg-scale is not the recipe's" in compare({"fid": 5.5}, recipe, changed=["cfg_scale"])["verdict"]
    assert compare({"fid": 5.5}, {}, changed=[])["verdict"] == "no expected FID to compare with"


# ---- sampling and scoring in one command


@pytest.fixture
def models(gpt_ckpt, vq_ckpt) -> list:
    return ["--gpt-ckpt", gpt_ckpt, "--vq-ckpt", vq_ckpt]


def score(folder: Path, *argv) -> dict:
    words = [str(word) for word in ("--sample-dir", folder, "--per-proc-batch-size", 8, *argv)]
    cli.run(sample_and_score.main, SampleAndScoreFlags, words)
    path, = folder.glob("*.scores.json")
    return json.loads(path.read_text())


@pytest.mark.usefixtures("own_cache", "stand_in")
def test_a_row_in_one_command(models, image_folder, tmp_path, capsys):
    reference = tmp_path / "ref.npz"
    call("reference", "--data-path", image_folder, "--image-size", 16, "--num-workers", 0, "--output", reference)
    recipe = {"sample": {"num-fid-samples": 9, "image-size-eval": 16, "precision": "none", "cfg-scale": 2.0,
                         "label-mode": "balanced"},
              "evaluate": {"metrics": "fid,is"}, "expected": {"fid": 0.0, "source": "none"}}
    (tmp_path / "row.json").write_text(json.dumps(recipe))
    flags = [*models, "--recipe", tmp_path / "row.json", "--fid-reference", reference]
    scores = score(tmp_path / "one", *flags)
    npz, = (tmp_path / "one").glob("*.npz")
    report = json.loads(npz.with_name(npz.name.replace(".npz", ".json")).read_text())
    assert scores["measured"] == {"is": report["is"], "fid": report["fid"]} and scores["changed"] == []
    assert report["protocol"]["preset"] == "gfid" and report["protocol"]["sampler"]["cfg_scale"] == 2.0
    assert f"FID is {report['fid']:.2f} above the expected" in scores["verdict"]
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["FID", f"{report['fid']:.4f}", "0.0"] for line in lines)

    recipe["expected"]["fid"] = round(report["fid"] - 0.05, 4)
    (tmp_path / "row.json").write_text(json.dumps(recipe))
    assert score(tmp_path / "two", *flags)["verdict"] == "FID is within 0.1 of the expected"
    changed = score(tmp_path / "three", *flags, "--cfg-scale", "1.0")
    assert changed["changed"] == ["cfg_scale"] and "--cfg-scale is not the recipe's" in changed["verdict"]


@pytest.mark.usefixtures("own_cache", "stand_in")
def test_a_wrong_reference_is_refused_before_sampling(models, sets, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        score(tmp_path / "samples", *models, "--fid-reference", sets[0], "--num-fid-samples", 4)
    assert stop.value.code == 2 and "--preset gfid" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


@pytest.mark.usefixtures("own_cache", "stand_in")
def test_large_samples_are_checked_and_scored_at_llamagens_size(models, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.options.SCORED_AT", 8)  # in place of 256, for samples of 16 pixels
    reference = tmp_path / "ref.npz"
    call("reference", "--data-path", image_folder, "--image-size", 8, "--num-workers", 0, "--output", reference)
    few = [*models, "--fid-reference", reference, "--num-fid-samples", 4, "--metrics", "fid"]
    assert score(tmp_path / "samples", *few)["measured"]["fid"] > 0
    with pytest.raises(SystemExit):
        score(tmp_path / "whole", *few, "--image-size-eval", 16)


@pytest.mark.usefixtures("own_cache", "stand_in")
def test_another_image_size_is_refused_before_sampling(models, image_folder, tmp_path, capsys):
    reference = tmp_path / "ref.npz"
    call("reference", "--data-path", image_folder, "--image-size", 24, "--num-workers", 0, "--output", reference)
    with pytest.raises(SystemExit) as stop:
        score(tmp_path / "samples", *models, "--fid-reference", reference, "--num-fid-samples", 4)
    assert stop.value.code == 2 and "24x24" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()
