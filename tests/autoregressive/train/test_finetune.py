"""Starting a GPT from another one's weights: the class table, what is frozen, LoRA against peft's own merging."""
import builtins
import copy
import functools
import json
import shutil

import numpy as np
import pytest
import torch

from autoregressive.models.generate import generate
from autoregressive.models.gpt import GPT_models, Transformer
from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.train import export
from autoregressive.train.finetune import (
    FinetuneFlags,
    adapter_start,
    add_lora,
    check_finetune,
    check_same_classes,
    fit_class_table,
    freeze,
    initial_weights,
    without_classes,
)
from dataset import emoji
from dataset.build import build_dataset
from dataset.codes import open_stores
from tests.conftest import call, two_processes
from tests.data.fill import fill
from tests.dataset.codes import draw
from utils import cli
from utils.checkpoints import containers
from utils.checkpoints.lora import is_adapter, merge_lora, plain_name
from utils.training.logger import read_metrics

CLASS_TABLE = "cls_embedding.embedding_table.weight"
SMALL = {"vocab_size": 32, "grid": (2, 3), "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0, "token_dropout_p": 0.0}


def gpt(**options) -> Transformer:
    """An untrained GPT-S with lively weights, head included."""
    model = GPT_models["GPT-S"](**{**SMALL, "num_classes": 3, **options})
    fill(model.state_dict())
    return model.eval()


def file_of(model: Transformer, classes: list[str] | None = None) -> dict:
    """What a checkpoint of ours holds."""
    return {"model": copy.deepcopy(model.state_dict()), "config": {"classes": classes}}


def load(model: Transformer, content: dict, classes: list[str] | None = None, *, seed: int = 0) -> str:
    """Fill a model as training does; what was said."""
    values, said = initial_weights(content, "some.pt", model=model, classes=classes, seed=seed)
    assert values.keys() == model.state_dict().keys()
    model.load_state_dict(values)
    return said


def logits(model: Transformer) -> torch.Tensor:
    return model(torch.arange(10).view(2, 5), torch.tensor([0, 2]))[0]


# ---- the class table


def test_classes_are_taken_over_by_name():
    table = torch.arange(8.0).view(4, 2)  # a, b, c, none
    rows, said = fit_class_table(table, ["a", "b", "c"], count=4, names=["c", "x", "a", "y"])
    assert rows.tolist() == [[4, 5], [2, 3], [0, 1], [2, 3], [6, 7]]  # new ones: the mean of a, b and c
    assert said == "2 of 4 classes taken over by name, 2 new: x, y, 1 left out: b"
    rows, said = fit_class_table(table, ["a", "b", "c"], count=3, names=["a", "b", "c"])
    assert torch.equal(rows, table)
    assert said == "3 of 3 classes taken over by name"
    _, said = fit_class_table(table, ["a", "b", "c"], count=9, names=["a", *"123456"])
    assert said == "1 of 9 classes taken over by name, 6 new: 1, 2, 3, 4, 5 …, 2 left out: b, c"


@pytest.mark.parametrize(("known", "names"), [(None, ["a", "b", "c"]), (["a", "b", "c"], None), (None, None)])
def test_without_names_equally_many_classes_go_by_number(known, names):
    table = torch.arange(8.0).view(4, 2)
    rows, said = fit_class_table(table, known, count=3, names=names)
    assert torch.equal(rows, table)
    assert said == "all 3 classes taken over by number, as there are no names"
    rows, said = fit_class_table(table, known, count=1, names=None)  # so does unconditional training
    assert rows.tolist() == [[2, 3], [6, 7]]
    assert said == "class embeddings start anew (3 classes in the file, 1 here, without names on both sides)"


def test_another_grid_and_a_foreign_file_are_taken_as_they_are():
    model, other = gpt(), gpt(grid=(4, 4))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.nn.init.zeros_(other.output.weight)
    assert load(other, {"module": state}).startswith("starting from the weights of some.pt: all 3 classes taken over")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_text_conditional_models_have_no_class_table():
    model = GPT_models["GPT-S"](**SMALL, model_type="t2i", cls_token_num=4, caption_dim=8)
    other = GPT_models["GPT-S"](**SMALL, model_type="t2i", cls_token_num=4, caption_dim=8)
    load(other, file_of(model))
    assert torch.equal(other.cls_embedding.uncond_embedding, model.cls_embedding.uncond_embedding)
    with pytest.raises(ValueError, match=r"^--init-from some.pt is a GPT conditioned on text, this run's is a GPT c"):
        initial_weights(file_of(model), "some.pt", model=gpt(), classes=None, seed=0)


@pytest.mark.parametrize(("options", "said"), [
    ({"vocab_size": 16}, "has 4 layers, width 128, 16 codes"), ({"n_layer": 3}, "has 3 layers, width 128, 32 codes"),
    ({"dim": 64}, "has 4 layers, width 64, 32 codes"),
    ({"n_head": 4, "n_kv_head": 1}, r"does not fit this run's GPT: layers\.0\.attention\.wqkv\.weight is \(384, 128\), "
                                    r"expected \(192, 128\)")])
def test_another_vocabulary_width_or_depth_is_refused_with_both_sides(options, said):
    with pytest.raises(ValueError, match=said) as caught:
        initial_weights(file_of(gpt()), "some.pt", model=gpt(**options), classes=None, seed=0)
    assert "n_head" in options or "some.pt is a GPT of 4 layers, width 128, 32 codes" in str(caught.value)


def test_what_is_no_gpt_or_not_whole_is_refused():
    with pytest.raises(ValueError, match=r"some\.pt is no GPT or ARPG checkpoint: it looks like a tokenizer"):
        load(gpt(), {"model": {"quantize.embedding.weight": torch.ones(1)}})
    content = file_of(gpt())
    del content["model"]["norm.weight"]
    content["model"]["extra"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"some\.pt does not fit this run's GPT: missing norm\.weight; unexpected ext"):
        load(gpt(), content)


@pytest.mark.parametrize(("flags", "others", "said"), [
    ({"init_from": "a"}, {"gpt_ckpt": "b"}, "--init-from and --gpt-ckpt both say where to start"),
    ({"init_from": "a"}, {"resume": "b.pt"}, "--init-from and --resume b.pt both say where to start"),
    ({"lora_rank": 8}, {}, "--lora-rank needs --init-from"), ({"freeze": "blocks"}, {}, "--freeze needs --init-from"),
    ({"lora_rank": -1}, {}, "--lora-rank is -1, expected 0 to 1024"),
    ({"init_from": "a", "lora_rank": 8, "freeze": "blocks"}, {}, "leave --freeze blocks out")])
def test_flags_that_contradict_each_other_are_refused(flags, others, said):
    with pytest.raises(ValueError, match=said):
        check_finetune(FinetuneFlags(**flags), **{"gpt_ckpt": None, "resume": "none", **others})


def test_flags_that_go_together():
    for flags, resume in (({}, "none"), ({"init_from": "a", "lora_rank": 8}, "auto"), ({"lora_rank": 8}, "run/3")):
        check_finetune(FinetuneFlags(**flags), gpt_ckpt=None, resume=resume)


# ---- what is trained


def trained(model: Transformer) -> set[str]:
    return {name.removesuffix(".weight") for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_what_is_frozen():
    model = gpt()
    everything = trained(model)
    freeze(model, "none")
    assert trained(model) == everything
    freeze(model, "blocks")
    assert trained(model) == {"cls_embedding.embedding_table", "tok_embeddings", "output"}
    freeze(model, "all-but-classes")
    assert trained(model) == {"cls_embedding.embedding_table"}


def test_lora_is_trained_beside_the_class_table_and_changes_nothing_at_first():
    model = gpt()
    before, content = logits(model), file_of(model)
    assert add_lora(model, 4) == {"rank": 4, "alpha": 8}
    load(model, content)
    assert isinstance(model, Transformer)
    adapters = {name for name in trained(model) if "lora" in name}
    assert len(adapters) == 4 * 5 * 2  # layers, matrices, A and B
    assert trained(model) - adapters == {"cls_embedding.embedding_table"}
    assert {plain_name(name) for name in model.state_dict() if not is_adapter(name)} == gpt().state_dict().keys()
    assert torch.equal(logits(model), before)
    codes = generate(model, torch.tensor([0, 1]), 6, cfg_scale=2.0, sample_logits=False)
    assert torch.equal(codes, generate(gpt(), torch.tensor([0, 1]), 6, cfg_scale=2.0, sample_logits=False))

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = {"idx": torch.arange(10).view(2, 5), "cond_idx": torch.tensor([0, 2]),
             "targets": torch.arange(12).view(2, 6)}
    found = []
    for _ in range(3):
        loss = model.train()(**batch)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[2] < found[1] < found[0]


def test_adapters_start_from_seed_and_name_alone():
    shape, name = torch.Size([4, 64]), "layers.0.attention.wo.lora_A.default.weight"
    first = adapter_start(name, shape, seed=1)
    torch.manual_seed(99)
    assert torch.equal(adapter_start(name, shape, seed=1), first)
    assert 0.11 < first.abs().max() <= 64 ** -0.5
    assert not torch.equal(adapter_start(name, shape, seed=2), first)
    assert not torch.equal(adapter_start(name.replace("0", "1"), shape, seed=1), first)
    assert not adapter_start(name.replace("lora_A", "lora_B"), shape, seed=1).any()
    with torch.device("meta"):  # as a model that is to be sharded is built
        model = GPT_models["GPT-S"](**SMALL, num_classes=3)
    add_lora(model, 4)
    values, _ = initial_weights(file_of(gpt()), "some.pt", model=model, classes=None, seed=1)
    assert torch.equal(values["layers.1.attention.wo.lora_A.default.weight"],
                       adapter_start("layers.1.attention.wo.lora_A.default.weight", (4, 128), seed=1))
    assert all(value.device.type == "cpu" for value in values.values())


def test_merging_is_what_peft_does():
    from peft.tuners.lora.layer import LoraLayer

    model = gpt()
    add_lora(model, 4)
    fill(model.state_dict(), "other")
    wanted, state = logits(model), copy.deepcopy(model.state_dict())
    merged = merge_lora(state, {"lora": {"rank": 4, "alpha": 8}}, source="some.pt")
    plain = gpt()
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), wanted, atol=1e-4, rtol=1e-4)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            layer.merge()
            torch.testing.assert_close(merged[f"{name}.weight"], layer.base_layer.weight, atol=1e-6, rtol=1e-6)
            assert not torch.equal(merged[f"{name}.weight"], state[f"{name}.base_layer.weight"])
    narrow = merge_lora({name: value.bfloat16() for name, value in state.items()}, {"lora": {"rank": 4, "alpha": 8}},
                        source="some.pt")
    assert {value.dtype for value in narrow.values()} == {torch.bfloat16}


def test_adapters_that_cannot_be_merged_are_refused():
    model = gpt()
    assert merge_lora(model.state_dict(), {}, source="some.pt").keys() == model.state_dict().keys()
    add_lora(model, 4)
    state = model.state_dict()
    with pytest.raises(ValueError, match=r"some\.pt holds LoRA adapters, but its config does not say"):
        merge_lora(state, {}, source="some.pt")
    del state["layers.2.feed_forward.w3.lora_B.default.weight"]
    with pytest.raises(ValueError, match=r"layers\.2\.feed_forward\.w3\.base_layer\.weight without both"):
        merge_lora(state, {"lora": {"rank": 4, "alpha": 8}}, source="some.pt")


def test_lora_without_peft_names_the_package(monkeypatch):
    load_module = builtins.__import__

    def without_peft(name, *rest, **more):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return load_module(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(ValueError, match=r"--lora-rank needs peft: .* -m pip install peft"):
        add_lora(gpt(), 4)


# ---- data


def test_a_store_without_classes(code_store):
    store = open_stores(str(code_store))
    plain = without_classes(store)
    assert plain.num_classes == 1 and plain.classes is None and plain.vocab_size == 256
    (codes, labels), wanted = (draw(one, np.zeros(36, int), np.arange(36), seed=0) for one in (plain, store))
    assert np.array_equal(codes, wanted[0]) and labels.dtype == np.int64 and not labels.any()
    assert store.classes == ["blue", "green", "red"] and set(wanted[1]) == {0, 1, 2}


def test_parts_of_the_emoji(monkeypatch):
    monkeypatch.setattr(emoji, "load_font", functools.cache(emoji.load_font))
    whole, without, only = (build_dataset(name, None, size=(8, 8)) for name in
                            ("emoji", "emoji_without_clocks", "emoji_only_clocks"))
    names = [[f"{data.classes[data.labels[i]]} {data.name(i)}" for i in range(len(data))]
             for data in (whole, without, only)]
    assert sorted(names[1] + names[2]) == sorted(names[0])
    assert without.classes == [name for name in whole.classes if name != "clocks"]
    assert only.classes == whole.classes and {only.classes[label] for label in only.labels} == {"clocks"}
    for name in ("emoji_clocks", "emoji_without_cats", "emoji_", "emoji_none"):
        with pytest.raises(ValueError, match=f"--dataset {name} is unknown: choose emoji, emoji_heldout, .*emoji_with"):
            build_dataset(name, None, size=(8, 8))


# ---- whole runs

QUICK = ["--num-workers", 0, "--global-batch-size", 12, "--log-every", 1, "--lr", 1e-2]  # 36 images: 3 steps an epoch


@pytest.fixture
def other_store(code_store, tmp_path):
    """The codes of `code_store`; their third class has another name."""
    folder = shutil.copytree(code_store / "imagenet16_codes", tmp_path / "store")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["classes"] = ["blue", "green", "violet"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(run) -> list[float]:
    return [row["loss"] for row in read_metrics(run / "metrics.jsonl")]


def test_a_lora_run(other_store, gpt_ckpt, tmp_path, capsys):
    """Only adapters and classes move; it resumes bit for bit; every reader takes its checkpoint, merged."""
    command = ["train_gpt", "--code-path", other_store, *QUICK, "--init-from", gpt_ckpt, "--lora-rank", 2, "--ema",
               "--epochs", 2, "--ckpt-every", 4, "--resume", "auto", "--results-dir", tmp_path / "runs"]
    call(*command)
    assert "2 of 3 classes taken over by name, 1 new: violet, 1 left out: red" in capsys.readouterr().out
    run = tmp_path / "runs" / "000-GPT-S"
    content, first = containers.read(run), losses(run)
    assert content["config"]["lora"] == {"rank": 2, "alpha": 4}
    assert content["config"]["classes"] == ["blue", "green", "violet"]
    base = containers.read(gpt_ckpt)["ema"]
    moved = {name for name, value in content["model"].items()
             if is_adapter(name) or not torch.equal(value, base[plain_name(name)])}
    assert moved == {name for name in content["model"] if is_adapter(name)} | {CLASS_TABLE}

    shutil.rmtree(run / "checkpoints" / "0000006")
    call(*command)
    assert "starting from" not in capsys.readouterr().out
    assert losses(run) == first and all(same(containers.read(run)[part], content[part]) for part in ("model", "ema"))

    merged = containers.weights(content, run)
    assert merged.keys() == base.keys() and not torch.equal(merged["layers.0.attention.wo.weight"],
                                                            base["layers.0.attention.wo.weight"])
    cli.run(export.main, export.ExportFlags, ["--gpt-ckpt", str(run), "--output", str(tmp_path / "out")])
    exported = containers.read(tmp_path / "out")
    assert same(exported["model"], merged) and "lora" not in exported["config"]
    call("train_gpt", "--code-path", other_store, *QUICK, "--init-from", run, "--lr", 0, "--epochs", 1, "--results-dir",
         tmp_path / "next")
    assert same(containers.read(tmp_path / "next" / "000-GPT-S")["model"], merged)


@pytest.mark.parametrize("choice", ["blocks", "all-but-classes"])
def test_frozen_parts_stay(choice, code_store, gpt_ckpt, tmp_path):
    call("train_gpt", "--code-path", code_store, *QUICK, "--init-from", gpt_ckpt, "--freeze", choice, "--epochs", 1,
         "--results-dir", tmp_path)
    base = containers.read(gpt_ckpt)["ema"]
    moved = {name for name, value in containers.read(tmp_path / "000-GPT-S")["model"].items()
             if not torch.equal(value, base[name])}
    more = {"tok_embeddings.weight", "output.weight"} if choice == "blocks" else set()
    assert moved == {CLASS_TABLE, *more}


@pytest.mark.processes
@pytest.mark.slow
def test_a_lora_run_on_two_processes_is_the_run_on_one(other_store, gpt_ckpt, tmp_path):
    command = ["--code-path", other_store, *QUICK, "--init-from", gpt_ckpt, "--lora-rank", 2, "--epochs", 1,
               "--dropout-p", 0, "--token-dropout-p", 0, "--class-dropout", 0, "--mixed-precision", "none",
               "--results-dir"]
    call("train_gpt", *command, tmp_path / "one")
    two_processes([("train_gpt", [*command, tmp_path / "ddp"]),
                   ("train_gpt", [*command, tmp_path / "fsdp", "--data-parallel", "fsdp"])], tmp_path)
    one = containers.read(tmp_path / "one" / "000-GPT-S")["model"]
    for kind in ("ddp", "fsdp"):
        run = tmp_path / kind / "000-GPT-S"
        assert losses(run) == pytest.approx(losses(tmp_path / "one" / "000-GPT-S"), abs=1e-5)
        for name, value in containers.read(run)["model"].items():
            torch.testing.assert_close(value, one[name], atol=1e-4, rtol=0)


def test_unconditional_training(code_store, gpt_ckpt, vq_ckpt, tmp_path, capsys):
    """--num-classes 1: from scratch or from a GPT with classes; sampled without guidance."""
    command = ["train_gpt", "--code-path", code_store, *QUICK, "--num-classes", 1, "--epochs", 1, "--results-dir"]
    call(*command, tmp_path / "scratch", "--gpt-model", "GPT-S")
    call(*command, tmp_path / "from", "--init-from", gpt_ckpt, "--lr", 0)
    assert "class embeddings start anew (3 classes in the file, 1 here" in capsys.readouterr().out
    content = containers.read(tmp_path / "from" / "000-GPT-S")
    table, old = content["model"][CLASS_TABLE], containers.read(gpt_ckpt)["ema"][CLASS_TABLE]
    torch.testing.assert_close(table, torch.stack([old[:3].mean(0), old[3]]))
    assert (content["config"]["num_classes"], content["config"]["classes"]) == (1, None)
    pipeline = load_pipeline(SampleFlags(gpt_ckpt=str(tmp_path / "scratch" / "000-GPT-S"), vq_ckpt=str(vq_ckpt),
                                         cfg_scale=1.0), device=torch.device("cpu"))
    assert pipeline([0, 0], seed=0, indices=[0, 1]).shape == (2, 16, 16, 3)


def test_resuming_does_not_take_the_old_run_for_the_new_one(gpt_ckpt, code_store, tmp_path, capsys):
    shutil.copytree(gpt_ckpt.parents[1], tmp_path / "000-GPT-S")
    command = ["train_gpt", "--code-path", code_store, *QUICK, "--init-from", tmp_path / "000-GPT-S", "--resume",
               "auto", "--epochs", 1, "--results-dir", tmp_path]
    call(*command)
    assert "000-GPT-S is another run" in capsys.readouterr().out
    assert containers.newest(tmp_path / "000-GPT-S" / "checkpoints").name == gpt_ckpt.name
    call(*command)
    assert "already trained" in capsys.readouterr().out and not (tmp_path / "002-GPT-S").exists()


def test_going_on_with_other_classes_is_refused(gpt_ckpt, code_store, other_store, tmp_path, capsys):
    """A GPT of red things is not to go on with violet ones under the same number."""
    weights = {"model": containers.read(gpt_ckpt)["model"], "config": containers.read(gpt_ckpt)["config"]}
    torch.save(weights, tmp_path / "weights.pt")
    for path in (gpt_ckpt, tmp_path / "weights.pt"):
        with pytest.raises(SystemExit):
            call("train_gpt", "--code-path", other_store, *QUICK, "--gpt-ckpt", path, "--results-dir", tmp_path)
        assert f"the classes of {path} are not those of the codes (red and violet): --init" in capsys.readouterr().err
    check_same_classes(weights, "some.pt", None)
    with pytest.raises(ValueError, match="their number"):
        check_same_classes(weights, "some.pt", ["blue", "green", "red", "violet"])


def test_a_gpt_of_another_size_is_one_line(code_store, gpt_ckpt, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        call("train_gpt", "--code-path", code_store, *QUICK, "--init-from", gpt_ckpt, "--vocab-size", 300,
             "--results-dir", tmp_path / "runs")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "is a GPT of 4 layers, width 128, 256 codes, this run's has 4 layers, width 128, 300 codes" in error
    assert not (tmp_path / "runs").exists()
