"""The sampling commands with an ARPG: its flags, its checkpoints in every container, sets that go on."""
import json
import re

import pytest
import torch
from safetensors.torch import save_file

from autoregressive.models.arpg import ARPG, ARPG_models
from autoregressive.models.decoder import CodeDecoder
from autoregressive.models.generate import generate
from autoregressive.models.registry import MODELS, facts_of
from autoregressive.sample.batch_size import bytes_per_image
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_gpt, load_pipeline
from autoregressive.train import export, train
from tests.autoregressive.sample.test_sample_commands import contents, grid, refused, sample_set
from tests.conftest import call, two_processes
from utils import cli
from utils.checkpoints import containers, sharded
from utils.seeding import sample_generator

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(arpg_ckpt, vq_ckpt) -> list[str]:
    return ["--gpt-ckpt", str(arpg_ckpt), "--vq-ckpt", str(vq_ckpt), "--precision", "none"]


@pytest.fixture(scope="module")
def state(arpg_ckpt) -> dict[str, torch.Tensor]:
    return containers.weights(containers.read(arpg_ckpt), arpg_ckpt)


def loaded(path, **flags) -> ARPG:
    return load_gpt(SampleFlags(gpt_ckpt=str(path), precision="none", **flags), device=CPU)[0]


@pytest.mark.parametrize("kind", ["state_dict", "model", "module", "ema", "bare", "safetensors"])
def test_every_container_is_read_strictly(kind, state, tmp_path):
    path = tmp_path / ("arpg.safetensors" if kind == "safetensors" else "arpg.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state if kind == "bare" else {kind: state, **({"model": {}} if kind == "ema" else {})}, path)
    # not of a published width, so that the file does not say which preset it is
    model = loaded(path, gpt_model="ARPG-S")
    assert isinstance(model, ARPG)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert (model.config.num_classes, model.config.vocab_size) == (3, 256)

    lacking = {name: value for name, value in state.items() if name != "layers.cross_dec.1.attn.to_q.weight"}
    torch.save({"state_dict": lacking}, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"missing layers.cross_dec.1.attn.to_q.weight"):
        loaded(tmp_path / "lacking.pt", gpt_model="ARPG-S")


@pytest.mark.parametrize("depth", [(3, 1), (0, 4), (1, 3)])
def test_depths_and_class_counts_are_those_of_the_file(depth, tmp_path):
    made = ARPG_models["ARPG-S"](n_layer=depth[0], n_query_layer=depth[1], num_classes=7, vocab_size=64)
    torch.save(made.state_dict(), tmp_path / "arpg.pt")
    config = loaded(tmp_path / "arpg.pt").config  # the width says which preset
    assert (config.n_layer, config.n_query_layer, config.num_classes, config.vocab_size) == (*depth, 7, 64)


def test_where_the_class_lies_is_recorded_and_goes_on(code_store, tmp_path):
    """Checkpoints that do not say it are from before it could be chosen."""
    command = ["train_gpt", "--code-path", code_store, "--gpt-model", "ARPG-S", "--epochs", 1, "--global-batch-size",
               12, "--results-dir"]
    call(*command, tmp_path)
    content = containers.read(tmp_path / "000-ARPG-S")
    assert content["config"].pop("class_at_origin") is True and loaded(tmp_path / "000-ARPG-S").config.class_at_origin
    torch.save({"model": content["model"], "config": content["config"]}, tmp_path / "earlier.pt")
    assert not loaded(tmp_path / "earlier.pt").config.class_at_origin
    torch.save({"model": content["model"]}, tmp_path / "bare.pt")
    assert loaded(tmp_path / "bare.pt").config.class_at_origin
    for name, at_origin in (("earlier", False), ("bare", True)):
        cli.run(export.main, export.ExportFlags, ["--gpt-ckpt", str(tmp_path / f"{name}.pt"), "--output",
                                                  str(tmp_path / name)])
        assert loaded(tmp_path / name).config.class_at_origin == at_origin
    call(*command, tmp_path / "tuned", "--init-from", tmp_path / "earlier.pt")
    tuned = tmp_path / "tuned" / "000-ARPG-S"
    assert not loaded(tuned).config.class_at_origin
    call(*command, tmp_path / "other", "--resume", tuned, "--epochs", 2)
    assert not loaded(tmp_path / "other" / "000-ARPG-S").config.class_at_origin


def test_a_run_of_an_earlier_version_goes_on_with_its_class_where_it_was(code_store, tmp_path, monkeypatch):
    """Its losses show it: they are those of a run that was not interrupted."""
    command = ["train_gpt", "--code-path", code_store, "--gpt-model", "ARPG-S", "--global-batch-size", 12,
               "--log-every", 1, "--resume", "auto", "--results-dir"]
    for folder in ("whole", "halves"):
        with monkeypatch.context() as earlier:
            earlier.setattr(train, "recorded_options", lambda name, config: {"class_at_origin": False})
            call(*command, tmp_path / folder, "--epochs", 2 if folder == "whole" else 1)
        state = containers.newest(tmp_path / folder / "000-ARPG-S" / "checkpoints") / sharded.STATE
        facts = json.loads(state.read_text())
        assert facts["config"].pop("class_at_origin") is False
        state.write_text(json.dumps(facts))
    call(*command, tmp_path / "halves", "--epochs", 2)
    losses = [[row["loss"] for row in map(json.loads, (tmp_path / folder / "000-ARPG-S" / "metrics.jsonl").open())]
              for folder in ("whole", "halves")]
    assert losses[0] == losses[1] and len(losses[0]) > 3
    assert not loaded(tmp_path / "halves" / "000-ARPG-S").config.class_at_origin


def test_query_layers_of_a_training(code_store, tmp_path, capsys):
    command = ["train_gpt", "--code-path", code_store, "--gpt-model", "ARPG-S", "--epochs", 1, "--global-batch-size",
               12, "--results-dir", tmp_path]
    call(*command, "--query-layers", 3)
    found, saved = load_gpt(SampleFlags(gpt_ckpt=str(tmp_path / "000-ARPG-S"), precision="none"), device=CPU)
    assert (found.config.n_layer, found.config.n_query_layer) == (1, 3) and saved["gpt_model"] == "ARPG-S"
    for layers in (0, 5):
        assert f"--query-layers is {layers}" in refused(capsys, call, *command, "--query-layers", layers)
    assert "--query-layers is for ARPG" in refused(capsys, call, *command, "--gpt-model", "GPT-S", "--query-layers", 2)


@pytest.mark.parametrize(("made", "typed", "said"), [
    ("ARPG-L", "ARPG-XL", "an ARPG of 12+12 layers, width 1024, 16384 codes, no ARPG-XL: give --gpt-model ARPG-L"),
    ("ARPG-XXL", "ARPG-L", "an ARPG of 24+24 layers, width 1536, 16384 codes, no ARPG-L: give --gpt-model ARPG-XXL"),
    ("GPT-L", "ARPG-L", "a GPT of 24 layers, width 1024, 16384 codes, no ARPG-L: give --gpt-model GPT-L"),
    ("ARPG-L", "GPT-L", "an ARPG of 12+12 layers, width 1024, 16384 codes, no GPT-L: give --gpt-model ARPG-L"),
    ("GPT-3B", "GPT-XXL", "a GPT of 24 layers, width 3200, 16384 codes, no GPT-XXL: give --gpt-model GPT-3B")])
def test_the_wrong_preset_is_refused_and_the_right_one_named(made, typed, said, tmp_path):
    state = published(made)
    torch.save(state, tmp_path / "foreign.pt")
    torch.save({"model": state, "config": {"kind": "gpt", "gpt_model": typed}}, tmp_path / "mislabelled.pt")
    for path, flags in ((tmp_path / "foreign.pt", {"gpt_model": typed}), (tmp_path / "mislabelled.pt", {})):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path} is {said}')}$"):
            loaded(path, **flags)
    assert facts_of(state).name() == made  # so that it needs no --gpt-model


def published(name: str) -> dict[str, torch.Tensor]:
    """A state dict of a preset in the published layout; one number takes the place of each tensor."""
    with torch.device("meta"):
        own = MODELS[name]().state_dict()
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in own.items()}


def test_a_training_names_the_flag_that_fits_the_file(arpg_ckpt, gpt_ckpt, code_store, capsys, tmp_path, state):
    torch.save(state, tmp_path / "bare.pt")
    torch.save(published("ARPG-L"), tmp_path / "large.pt")
    deep = ARPG_models["ARPG-S"](n_layer=1, n_query_layer=3, num_classes=3, vocab_size=256).state_dict()
    torch.save(deep, tmp_path / "deep.pt")
    torch.save(ARPG_models["ARPG-S"](num_classes=5, vocab_size=256).state_dict(), tmp_path / "five.pt")
    for flag in ("--gpt-ckpt", "--init-from"):
        for name, file, said in (
                ("ARPG-S", "deep.pt", "of 1+3 layers, width 128, 256 codes, this run's has 2+2 layers, width 128, 256 "
                                      "codes: give --query-layers 3"),
                ("ARPG-S", "large.pt", "codes of the same tokenizer"), ("GPT-S", "bare.pt", "give --gpt-model ARPG-S")):
            line = refused(capsys, call, "train_gpt", "--code-path", code_store, "--gpt-model", name, flag,
                           tmp_path / file, "--results-dir", tmp_path)
            assert said in line and line.count("(") < 3, line  # no list of shapes
    line = refused(capsys, call, "train_gpt", "--code-path", code_store, "--gpt-model", "ARPG-S", "--gpt-ckpt",
                   tmp_path / "five.pt", "--results-dir", tmp_path)
    assert "five.pt has 5 classes, this run's model 3: give --init-from in its place" in line


@pytest.mark.parametrize(("flags", "said"), [
    (("--gpt-model", "GPT-S"), "this run's is a GPT conditioned on classes: give --gpt-model ARPG-S"),
    (("--gpt-model", "ARPG-S", "--query-layers", 3), "this run's has 1+3 layers, width 128, 256 codes: give "
                                                     "--query-layers 2")])
def test_a_training_is_not_resumed_with_another_model(flags, said, arpg_ckpt, code_store, capsys, tmp_path):
    for resumed in ("--resume", "--gpt-ckpt"):
        line = refused(capsys, call, "train_gpt", "--code-path", code_store, *flags, resumed, arpg_ckpt,
                       "--results-dir", tmp_path)
        assert said in line and "missing" not in line


def test_the_wrong_family_is_refused(arpg_ckpt, gpt_ckpt, code_store, capsys, tmp_path):
    with pytest.raises(ValueError, match=r"is an ARPG of 2\+2 layers, width 128, 256 codes, no GPT-B: give .*ARPG-S"):
        loaded(arpg_ckpt, gpt_model="GPT-B")
    with pytest.raises(ValueError, match=r"is a GPT of 4 layers, width 128, 256 codes, no ARPG-L: give .*GPT-S"):
        loaded(gpt_ckpt, gpt_model="ARPG-L")
    said = refused(capsys, call, "train_gpt", "--code-path", code_store, "--gpt-model", "GPT-S", "--init-from",
                   arpg_ckpt, "--results-dir", tmp_path)
    assert "is an ARPG conditioned on classes, this run's is a GPT" in said


# ---- sampling


@pytest.mark.parametrize("flags", [
    {}, {"step": 5, "sample_schedule": "cosine", "cfg_schedule": "constant"}, {"order": "spiral-in", "step": 16},
    {"shared_order": True, "cfg_interval": 2}], ids=str)
def test_an_image_depends_on_seed_and_index_only(models, arpg_ckpt, vq_ckpt, flags):
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(arpg_ckpt), vq_ckpt=str(vq_ckpt), precision="none", top_k=50,
                                         **flags), device=CPU)
    labels = [i % 3 for i in range(5)]
    whole = pipeline.sample_codes(labels, seed=4, indices=list(range(5)))
    for index in range(5):
        alone = pipeline.sample_codes(labels[index:index + 1], seed=4, indices=[index])
        assert torch.equal(alone[0], whole[index])
    assert not torch.equal(pipeline.sample_codes(labels, seed=5, indices=list(range(5))), whole)


def test_orders_are_of_the_image_or_of_the_seed(models, arpg_ckpt, vq_ckpt, monkeypatch):
    orders, join = [], CodeDecoder.join
    monkeypatch.setattr(CodeDecoder, "join", lambda self, request: orders.append(request.plan.order.tolist())
                        or join(self, request))
    for shared in (False, True):
        pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(arpg_ckpt), vq_ckpt=str(vq_ckpt), precision="none",
                                             shared_order=shared), device=CPU)
        for seed in (0, 1):
            pipeline.sample_codes([0, 1], seed=seed, indices=[3, 4])
    own, one = orders[:4], orders[4:]
    assert len({tuple(order) for order in own}) == 4
    assert one[0] == one[1] != one[2] == one[3]


@pytest.mark.processes
def test_a_set_on_two_processes_is_that_of_one(models, tmp_path):
    command = [*models, "--num-fid-samples", 7, "--step", 6, "--order", "random", "--global-seed", 3]
    one = sample_set(tmp_path / "one", *command, "--per-proc-batch-size", 3)
    assert "-step-6-arccos-linear-random-causal-seed-3" in one.name
    described = json.loads((one / "config.json").read_text())
    assert (described["steps"], described["order"], described["shared_order"]) == (6, "random", False)
    two_processes([("sample", [*command, "--per-proc-batch-size", 2, "--sample-dir", tmp_path / "two"])], tmp_path)
    two, = (path for path in (tmp_path / "two").iterdir() if path.is_dir())
    pictures = contents(one)
    assert {name: data for name, data in contents(two).items() if name.endswith("png")} == {
        name: data for name, data in pictures.items() if name.endswith("png")}
    other = sample_set(tmp_path / "other", *command[:-4], "--order", "raster", "--global-seed", 3)
    assert other.name != one.name


def test_a_set_whose_codes_see_each_other_is_described_as_by_earlier_versions(models, tmp_path):
    """These had no other way, and their sets go on."""
    command = [*models, "--num-fid-samples", 2, "--step", 6, "--step-attention", "block"]
    made = sample_set(tmp_path, *command)
    assert "-random-seed-" in made.name and "step_attention" not in json.loads((made / "config.json").read_text())


def test_what_flags_ask_for_is_what_is_drawn(models, arpg_ckpt, vq_ckpt):
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(arpg_ckpt), vq_ckpt=str(vq_ckpt), precision="none", step=16,
                                         order="raster", temperature=0.0), device=CPU)
    codes = pipeline.sample_codes([1], seed=0, indices=[0])
    assert torch.equal(codes, generate(pipeline.gpt, torch.tensor([1]), 16, cfg_scale=4.0, sample_logits=False,
                                       generators=[sample_generator(0, 0)], schedule=pipeline.schedule))
    assert pipeline.schedule.steps == 16 and pipeline.schedule.order == "raster"


def test_memory_counts_the_codes_of_a_step(models, arpg_ckpt, vq_ckpt):
    sizes = []
    for step in (1, 16):
        pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(arpg_ckpt), vq_ckpt=str(vq_ckpt), precision="none",
                                             step=step), device=CPU)
        sizes.append(bytes_per_image(pipeline, CPU))
    assert sizes[0] - sizes[1] == 2 * 15 * 8 * 4 * 256  # logits of 16 codes in place of one, with and without the class


def test_flags_that_do_not_fit_are_refused(models, gpt_ckpt, vq_ckpt, capsys, tmp_path):
    for flags, message in [(("--step", 17), "--step is 17, expected 1 to 16"), (("--step", 0), "--step is 0"),
                           (("--decode", "jacobi"), "--decode jacobi is for a GPT"),
                           (("--order", "raster", "--shared-order"), "--shared-order is for random orders"),
                           (("--order", "sideways"), "--order"), (("--num-classes", 9), "--num-classes is 9")]:
        assert message in refused(capsys, grid, *models, *flags)
    gpt = ["--gpt-ckpt", gpt_ckpt, "--vq-ckpt", vq_ckpt, "--precision", "none"]
    for flags, name in [(("--step", 8), "step"), (("--cfg-schedule", "linear"), "cfg-schedule"),
                        (("--sample-schedule", "cosine"), "sample-schedule"), (("--order", "raster"), "order"),
                        (("--shared-order",), "shared-order")]:
        assert f"--{name} is for ARPG" in refused(capsys, grid, *gpt, *flags)


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantized_weights_draw_too(models, quantize, tmp_path, capsys):
    grid(*models, "--quantize", quantize, "--step", 4, "--output", tmp_path / "grid.png")
    assert "3 images of 16x16" in capsys.readouterr().out
