"""LlamaGen's FSDP runs go on: folders written by PyTorch's FSDP1 itself, as LlamaGen calls it, on two processes."""
import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from autoregressive.models.gpt import GPT_models
from tests.conftest import ROOT, TINY_GPT, call, two_processes
from utils.checkpoints import llamagen_fsdp, sharded
from utils.training import trainer

STEPS = 2
SIZES = {"grid": (4, 4), "vocab_size": 256, "num_classes": 3, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0,
         "token_dropout_p": 0.0, "class_dropout_prob": 0.0}
GO_ON = [*TINY_GPT, "--epochs", 1, "--global-batch-size", 12, "--dropout-p", 0, "--token-dropout-p", 0,
         "--class-dropout", 0, "--mixed-precision", "none", "--max-grad-norm", 0]  # three steps of 36 images
WRITER = """import sys
from pathlib import Path
import torch
import torch.distributed
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, StateDictType
sys.path.insert(0, {root!r})
from tests.utils.training.test_llamagen_fsdp import first_model, llamagen_optimizer, train
torch.distributed.init_process_group("gloo")
rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
model = first_model()
wrapped = set(model.layers)
model = FSDP(model, auto_wrap_policy=lambda module, recurse, nonwrapped_numel: recurse or module in wrapped,
             device_id=torch.device("cpu"), sharding_strategy=ShardingStrategy.FULL_SHARD, use_orig_params=True)
optimizer = llamagen_optimizer(model)
train(model, optimizer)
folder = Path({folder!r})
whole = FullStateDictConfig(rank0_only=True, offload_to_cpu=True)
with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, whole):
    state = model.state_dict()
if rank == 0:
    torch.save(state, folder / "consolidated.pth")
    torch.save({{name: value + 1 for name, value in state.items()}}, folder / "consolidated_ema.pth")
    (folder / "resume_step.txt").write_text("2\\n")
torch.save(optimizer.state_dict(), folder / f"optimizer.{{rank:05d}}-of-{{size:05d}}.pth")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def first_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return GPT_models["GPT-S"](**SIZES)


def llamagen_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    named = dict(model.named_parameters())
    groups = [{"params": [p for name, p in named.items() if ("norm" in name) == norms], "weight_decay": decay}
              for norms, decay in ((False, 0.05), (True, 0.0))]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two steps, on the same data in every process."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        codes = torch.randint(256, (3, 16), generator=generator)
        _, loss = model(codes[:, :-1], torch.tensor([0, 1, 2]), targets=codes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def plain() -> tuple[torch.nn.Module, torch.optim.AdamW]:
    """The same training by one process without FSDP."""
    model = first_model()
    optimizer = llamagen_optimizer(model)
    train(model, optimizer)
    return model, optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """0000002/ with consolidated.pth, consolidated_ema.pth, resume_step.txt and two optimizer files."""
    root = tmp_path_factory.mktemp("fsdp")
    made = root / "0000002"
    made.mkdir()
    (root / "write.py").write_text(WRITER.format(root=str(ROOT), folder=str(made)))
    environment = {**os.environ, "nproc_per_node": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, ROOT / "utils" / "launch.py", root / "write.py"], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def checkpoint(results: Path, step: int = 3) -> dict:
    return sharded.read_folder(results / "000-GPT-S" / "checkpoints" / f"{step:07d}", optimizers=True)


@pytest.mark.processes
def test_pieces_of_real_fsdp_are_the_moments_of_a_plain_training(folder, plain):
    model, optimizer = plain
    shapes = {name: p.shape for name, p in model.named_parameters()}
    pieces = torch.load(folder / "optimizer.00001-of-00002.pth")["state"]
    assert any(state["exp_avg"].numel() and state["exp_avg"].ndim == 1 for state in pieces.values())
    found = llamagen_fsdp.moments(folder, shapes)
    assert len(found) == 3 * len(shapes)
    for name, p in model.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(found[f"{name}.{moment}"].whole(), optimizer.state[p][moment], atol=1e-7,
                                       rtol=1e-4)
        assert found[f"{name}.step"] == STEPS


@pytest.mark.processes
@pytest.mark.parametrize("given", ["folder", "file", "run"])
def test_a_further_step_is_that_of_the_plain_training(given, folder, plain, code_store, tmp_path, monkeypatch, capsys):
    gradients = []
    step = trainer.step_unless
    monkeypatch.setattr(trainer, "step_unless", lambda optimizer, bad: (gradients.append(
        [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]), step(optimizer, bad)))
    path = {"folder": folder, "file": folder / "consolidated.pth", "run": folder.parent}[given]
    call("train_gpt", "--code-path", code_store, *GO_ON, "--ema", "--gpt-resume", path, "--results-dir", tmp_path)
    said = capsys.readouterr().out
    assert "at step 2" in said and "anew" not in said and len(gradients) == 1
    model, optimizer = first_model(), None
    model.load_state_dict(torch.load(folder / "consolidated.pth"))
    optimizer = llamagen_optimizer(model)
    optimizer.load_state_dict(copy.deepcopy(plain[1].state_dict()))
    named = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(named, gradients[0], strict=True):
        p.grad = gradient
    optimizer.step()
    made = checkpoint(tmp_path)
    for name, p in model.named_parameters():
        torch.testing.assert_close(made["model"][name], p.detach(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(made["optimizer"][f"{name}.exp_avg"], optimizer.state[p]["exp_avg"], atol=1e-6,
                                   rtol=1e-4)
        assert made["optimizer"][f"{name}.step"] == 3
    averages = torch.load(folder / "consolidated_ema.pth")["output.weight"]  # one more than the weights
    expected = averages.lerp(made["model"]["output.weight"], 1 - 3 / 12)  # the third step's decay
    torch.testing.assert_close(made["ema"]["output.weight"], expected)


@pytest.mark.processes
def test_two_processes_go_on_sharded_as_one_does(folder, code_store, tmp_path):
    command = ["--code-path", code_store, *GO_ON, "--gpt-resume", folder, "--results-dir"]
    call("train_gpt", *command, tmp_path / "one")
    two_processes([("train_gpt", [*command, tmp_path / "two", "--data-parallel", "fsdp"])], tmp_path)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    for part in ("model", "optimizer"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize(("harm", "said"), [
    (lambda folder: (folder / "optimizer.00001-of-00002.pth").unlink(), "optimizer.00001-of-00002.pth is missing"),
    (lambda folder: [path.unlink() for path in folder.glob("optimizer*")], "there are no files optimizer"),
    (lambda folder: shutil.copy(folder / "optimizer.00000-of-00002.pth", folder / "optimizer.00001-of-00002.pth"),
     "values, expected"),
    (lambda folder: shutil.copy(folder / "optimizer.00000-of-00002.pth", folder / "optimizer.00000-of-00001.pth"),
     "of 1 and of 2 processes"),
    (lambda folder: (folder / "optimizer.00001-of-00002.pth").write_bytes(b"cut"), "is a text file"),
    (lambda folder: torch.save({"param_groups": 3, "state": []}, folder / "optimizer.00001-of-00002.pth"),
     "are no AdamW state dicts"),
    (lambda folder: torch.save({"param_groups": [], "state": {}}, folder / "optimizer.00001-of-00002.pth"),
     "another number of parameters")])
def test_without_a_whole_optimizer_it_begins_anew_and_says_so(harm, said, folder, code_store, tmp_path, capsys):
    spoilt = tmp_path / "0000002"
    shutil.copytree(folder, spoilt)
    harm(spoilt)
    (spoilt / "resume_step.txt").unlink()  # the folder's name tells the step too
    call("train_gpt", "--code-path", code_store, *GO_ON, "--gpt-resume", spoilt, "--results-dir", tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "the optimizer begins anew" in line]
    assert len(lines) == 1 and said in lines[0]
    made = checkpoint(tmp_path)
    assert made["steps"] == 3 and all(v == 1 for name, v in made["optimizer"].items() if name.endswith(".step"))


@pytest.mark.processes
def test_copies_of_hybrid_sharding_and_what_is_refused(folder, plain, code_store, tmp_path, capsys):
    shapes = {name: p.shape for name, p in plain[0].named_parameters()}
    four = tmp_path / "four"
    four.mkdir()
    for rank in range(4):
        shutil.copy(folder / f"optimizer.{rank % 2:05d}-of-00002.pth", four / f"optimizer.{rank:05d}-of-00004.pth")
    once, twice = llamagen_fsdp.moments(folder, shapes), llamagen_fsdp.moments(four, shapes)
    name = "layers.0.attention.wqkv.weight.exp_avg"
    assert torch.equal(twice[name].whole(), once[name].whole())

    shutil.copy(folder / "consolidated.pth", four / "consolidated.pth")
    for text in (None, "about 5"):
        if text is not None:
            (four / "resume_step.txt").write_text(text)
        with pytest.raises(SystemExit):
            call("train_gpt", "--code-path", code_store, *GO_ON, "--gpt-resume", four, "--results-dir", tmp_path / "x")
        error, = capsys.readouterr().err.splitlines()
        assert "does not tell its step" in error and "resume_step.txt" in error and "--init-from" in error
    (four / "resume_step.txt").write_text("2")
    with pytest.raises(SystemExit):
        call("train_gpt", "--code-path", code_store, *GO_ON, "--gpt-resume", four, "--gpt-model", "GPT-B",
             "--results-dir", tmp_path / "x")
    assert "does not fit" in capsys.readouterr().err
