"""ARPG fine-tuned: its classes lie in one table with the codes, and are matched by name all the same."""
import pytest
import torch

from autoregressive.models.arpg import ARPG_models
from autoregressive.models.registry import facts_of
from tests.autoregressive.sample.test_sample_commands import refused
from tests.autoregressive.train.test_finetune import file_of, load, losses, other_store
from tests.conftest import call
from tests.data.fill import fill
from utils.checkpoints import containers
from utils.checkpoints.lora import is_adapter, plain_name

__all__ = ["other_store"]  # a fixture
QUICK = ["--gpt-model", "ARPG-S", "--num-workers", "0", "--lr", "1e-3", "--global-batch-size", 12, "--log-every", 1]


def arpg(**options):
    """An untrained ARPG-S with lively weights, head included."""
    model = ARPG_models["ARPG-S"](**{"vocab_size": 32, "grid": (2, 3), "num_classes": 3, **options})
    fill(model.state_dict())
    return model.eval()


def test_classes_are_taken_over_by_name():
    old, new = arpg(), arpg(num_classes=4)
    before = old.embeddings.weight
    said = load(new, file_of(old, ["a", "b", "c"]), ["c", "x", "a", "y"])
    after = new.embeddings.weight
    assert said.endswith("2 of 4 classes taken over by name, 2 new: x, y, 1 left out: b")
    assert torch.equal(after[:33], before[:33])  # codes and the query
    assert torch.equal(after[33], before[35]) and torch.equal(after[35], before[33])
    assert torch.equal(after[34], before[33:36].mean(0)) and torch.equal(after[34], after[36])
    assert torch.equal(after[37:], before[36:])  # no class, and the row that nothing uses
    codes, orders = torch.arange(5)[None], torch.randperm(6)
    one, other = (model(codes, torch.tensor([label]), orders=orders)[0] for model, label in ((old, 2), (new, 0)))
    assert torch.equal(one, other)


def test_what_a_state_dict_says():
    facts = facts_of(arpg(n_layer=1, n_query_layer=3).state_dict())
    assert (facts.size, facts.num_classes, facts.kind) == ("1+3 layers, width 128, 32 codes", 3, "an ARPG")
    assert facts.layers() == {"n_layer": 1, "n_query_layer": 3}
    assert facts_of({"quantize.embedding.weight": torch.zeros(2, 2)}) is None
    for name in ("ARPG-L", "ARPG-XL", "ARPG-XXL"):
        with torch.device("meta"):
            assert facts_of(ARPG_models[name]().state_dict()).name() == name


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"is an ARPG of 2\+2 layers, width 128, 32 codes, this run's has 1\+3 layers"):
        load(arpg(n_layer=1, n_query_layer=3), file_of(arpg()))


def test_a_lora_run(other_store, arpg_ckpt, tmp_path, capsys):
    call("train_gpt", "--code-path", other_store, *QUICK, "--init-from", arpg_ckpt, "--lora-rank", 2, "--epochs", 1,
         "--results-dir", tmp_path)
    assert "2 of 3 classes taken over by name, 1 new: violet, 1 left out: red" in capsys.readouterr().out
    content, base = containers.read(tmp_path / "000-ARPG-S"), containers.read(arpg_ckpt)["model"]
    adapters = {name for name in content["model"] if is_adapter(name)}
    assert len(adapters) == 2 * (2 * 7 + 2 * 5)  # q, k, v, proj and three of SwiGLU; q, proj and three
    moved = {name for name, value in content["model"].items()
             if is_adapter(name) or not torch.equal(value, base[plain_name(name)])}
    assert moved == adapters | {"embeddings.weight"}
    assert containers.weights(content, "run").keys() == base.keys()


def test_frozen_parts_stay(code_store, arpg_ckpt, tmp_path, capsys):
    command = ["train_gpt", "--code-path", code_store, *QUICK, "--init-from", arpg_ckpt, "--epochs", 1, "--results-dir",
               tmp_path, "--freeze"]
    call(*command, "blocks")
    base, run = containers.read(arpg_ckpt)["model"], tmp_path / "000-ARPG-S"
    assert {name for name, value in containers.read(run)["model"].items() if not torch.equal(value, base[name])} == {
        "embeddings.weight", "head.weight"}
    assert losses(run)[-1] > 0
    assert "lie in one table with its codes" in refused(capsys, call, *command, "all-but-classes")
