"""What tests of trainings share: flags of a short run, its metrics, its last checkpoint, interruptions."""
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.conftest import ROOT, TINY_GPT, TINY_VQ
from utils.checkpoints import containers, sharded
from utils.training import trainer
from utils.training.logger import read_metrics

QUICK = ["--log-every", 1, "--lr", 1e-4, "--epochs", 1, "--global-batch-size", 6, "--mixed-precision", "none"]
QUICK_GPT = [*TINY_GPT, "--dropout-p", 0, "--token-dropout-p", 0, "--class-dropout", 0, *QUICK]
QUICK_VQ = [*TINY_VQ, *QUICK]
OFTEN = ["--ema", "--lr", 1e-3, "--lr-schedule", "cosine", "--warmup-steps", 3, "--global-batch-size", 8, "--epochs", 2,
         "--ckpt-every", 4, "--log-every", 3]  # 36 images: 4.5 steps an epoch, 9 in all; rows do not meet checkpoints


def rows(folder) -> list[dict]:
    """The metrics of a run."""
    return read_metrics(folder / "metrics.jsonl")


def same(a, b) -> bool:
    """Whether two nested checkpoints hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def last(folder) -> dict:
    """All that the newest checkpoint of a run holds but the flags and the run's identity, which name folders."""
    content = sharded.read_folder(containers.newest(folder / "checkpoints"), optimizers=True)
    del content["flags"], content["identity"]
    return content


def interrupt(monkeypatch, at: int):
    """Press Ctrl-C in the middle of step `at` (1-based)."""
    step = trainer.Trainer.optimizer_step

    def stopped(self, batches):
        if self.step == at - 1:
            raise KeyboardInterrupt
        return step(self, batches)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", stopped)


# ---- trainings in processes of their own

SMALL_VQ16 = """from functools import partial
from tokenizer.tokenizer_image import vq_loss, vq_model
small = vq_model.VQConfig(ch=8, num_res_blocks=1, z_channels=16, codebook_size=64)
vq_model.VQ_models["VQ-16"] = partial(vq_model._build, small)
vq_loss.PatchGAN = partial(vq_loss.PatchGAN, width=8)"""  # the released tokenizer's shape, narrow


def start(command: list, folder: Path, *, processes: int = 1, setup: str = "") -> subprocess.Popen:
    """Start a command as scripts/_torchrun.sh does, in a process group of its own; `setup` is run before it."""
    script = folder / "command.py"
    script.write_text(f"""import json, sys
sys.path.insert(0, {str(ROOT)!r})
from tests.conftest import call
{setup}
call(*json.loads(sys.argv[1]))
""")
    environment = {**os.environ, "nproc_per_node": str(processes), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, str(ROOT / "utils" / "launch.py"), str(script),
                             json.dumps([str(word) for word in command])], env=environment, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, *, code: int = 0) -> str:
    """What a started command has printed, once it has ended with `code`."""
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text
    return text
