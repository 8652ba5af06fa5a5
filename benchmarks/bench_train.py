"""Speed and memory of GPT training, against a plain loop written as LlamaGen's is.

    python3 benchmarks/bench_train.py                                      # all cases: about half an hour on 2 cores
    python3 benchmarks/bench_train.py --cases GPT-B:256:16 --no-write      # preset:image tokens:batch, comma-separated

Three sides, each in a process of its own, in turns, with the same model, batch, data, dtype (--mixed-precision's
default) and dropout 0.1, EMA on:
  plain   LlamaGen's loop and blocks: norm and rotation as chains of tensor operations, full logits and their fp32
          cross-entropy, loss.item() at every step, clip_grad_norm_, fused AdamW, EMA parameter by parameter
  loop    the same loop around our blocks: the difference to plain is what the blocks bring
  ours    what training runs: `GPTTask` under `Trainer.optimizer_step`
Nothing is compiled, nothing is read from disk. A row per case and side goes to benchmarks/results/train.md.
"""
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.conditions import LabelEmbedder
from autoregressive.models.gpt import GPT_models, ModelArgs, Transformer
from autoregressive.train.conditions import Classes
from autoregressive.train.config import GPTTrainFlags
from autoregressive.train.task import GPTTask
from benchmarks.machine import cpu_name
from utils import cli, dist
from utils.cli import flag
from utils.options import DeviceFlags
from utils.training.meter import peak_memory
from utils.training.optim import adamw
from utils.training.run_folder import RunFolder
from utils.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "train.md"
SIDES = ("plain", "loop", "ours")
DROPOUT, DECAY = 0.1, 0.9999
HEADER = """# Training

`python3 benchmarks/bench_train.py`: tokens per second, share of the measured peak of matrix products (MFU; 6 FLOPs per
weight of a matrix and token, and causal attention's), peak memory (GiB; of the whole process on a CPU, of what torch
allocates on a GPU). "plain" is a loop written as LlamaGen's, "loop" that loop around our blocks, "ours" what training
runs; each in its own process, in turns. Medians of the timed steps; the first of each process is not timed.

| model | tokens x batch | dtype | device, threads | versions | timed steps | side | tokens/s | faster | MFU | GiB | \
memory |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(kw_only=True)
class BenchTrainFlags(DeviceFlags):
    """The benchmark of training."""

    cases: str = flag("GPT-B:256:16,GPT-B:576:8,GPT-L:256:16,GPT-L:576:8", "preset:image tokens:batch, comma-separated")
    sides: str = flag(",".join(SIDES), "which sides, comma-separated")
    timed_steps: int = flag(2, "steps that each process times, after one that it does not")
    turns: int = flag(1, "processes of each side")
    cores: int = flag(os.cpu_count() or 1, "threads of each process")
    one_side: str | None = flag(None, "run this side once and print JSON (for the benchmark itself)", choices=SIDES)
    write: bool = flag(True, "append the rows to benchmarks/results/train.md")


# ---- the plain side


class PlainNorm(nn.Module):
    """RMSNorm, one tensor operation after the other."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def plain_rotation(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, H, K) turned by table (T, K/2, 2): reshape, stack, flatten in fp32."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    table = table.view(1, pairs.shape[1], 1, pairs.shape[3], 2)
    turned = torch.stack([pairs[..., 0] * table[..., 0] - pairs[..., 1] * table[..., 1],
                          pairs[..., 1] * table[..., 0] + pairs[..., 0] * table[..., 1]], dim=-1)
    return turned.flatten(3).type_as(x)


class PlainAttention(nn.Module):
    """Attention that repeats keys and values for grouped heads even if the groups are of one."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_head, config.n_kv_head, config.dim // config.n_head
        self.wqkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        widths = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in self.wqkv(x).split(widths, dim=-1))
        q, k = plain_rotation(q, table), plain_rotation(k, table)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.wo(out.transpose(1, 2).contiguous().view(batch, tokens, dim)))


class PlainFeedForward(nn.Module):
    """SwiGLU, every intermediate kept."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class PlainBlock(nn.Module):
    """Attention and feed-forward with their norms."""

    def __init__(self, config: ModelArgs) -> None:
        super().__init__()
        self.attention, self.feed_forward = PlainAttention(config), PlainFeedForward(config)
        self.attention_norm, self.ffn_norm = (PlainNorm(config.dim, config.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.feed_forward(self.ffn_norm(x))


class PlainGPT(nn.Module):
    """A class-conditional GPT with the parameters, names and first weights of `model`."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        config = model.config
        self.cls_embedding = LabelEmbedder(config.num_classes, config.dim, dropout_prob=config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.tok_dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = PlainNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.load_state_dict(model.state_dict())
        self.table = model.rope(torch.device("cpu"))

    def forward(self, idx: Tensor, cond_idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L, V) fp32 and their mean cross-entropy."""
        self.table = self.table.to(idx.device)
        x = self.tok_dropout(torch.cat([self.cls_embedding(cond_idx, drop=True), self.tok_embeddings(idx)], dim=1))
        for layer in self.layers:
            x = layer(x, self.table[:x.shape[1]])
        logits = self.output(self.norm(x)).float()
        return logits, F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def plain_step(model: nn.Module, flags: GPTTrainFlags, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], float]:
    """One step of LlamaGen's loop: batch → loss."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = adamw(model, lr=flags.lr, weight_decay=flags.weight_decay, betas=(flags.beta1, flags.beta2))

    def step(batch: dict[str, Tensor]) -> float:
        with dist.autocast(batch["codes"].device, dtype):
            _, loss = model(batch["codes"][:, :-1], batch["labels"], targets=batch["codes"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(DECAY).add_(parameter, alpha=1 - DECAY)
        return loss.item()

    return step


# ---- measuring


class LabelsOnly(Classes):
    """Labels without a store."""

    def __init__(self) -> None:
        pass


def our_step(model: Transformer, flags: GPTTrainFlags, process: dist.Process,
             dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    """One step of our training."""
    task = GPTTask(model, LabelsOnly(), dtype=dtype, tokenizer=None, seed=0, token_noise=0.0, cfg_scale=1.0)
    run = RunFolder(Path(tempfile.mkdtemp()), {}, known=True)
    trainer = Trainer(task, flags, process, run, samples=10**9, saved_config={})
    trainer.checkpoints.claim()

    def step(batch: dict[str, Tensor]) -> None:
        trainer.optimizer_step(iter([batch]))
        trainer.step += 1
        trainer.handle_step_flags(drain=False)

    return step


def batches(model: Transformer, count: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Random codes and labels, the same for every side."""
    config, random = model.config, torch.Generator().manual_seed(0)
    while True:
        codes = torch.randint(config.vocab_size, (count, config.block_size), generator=random)
        labels = torch.randint(config.num_classes, (count,), generator=random)
        dropped = torch.rand(count, generator=random) < config.class_dropout_prob
        yield {"codes": codes.to(device), "labels": labels.to(device), "dropped": dropped.to(device)}


def measured_side(config: BenchTrainFlags) -> dict[str, float | list[float]]:
    """Seconds of each timed step, peak memory and the speed of matrix products, of one side in this process."""
    name, tokens, count = split_case(config.cases)
    process = dist.setup(config.device)
    device = process.device
    torch.set_num_threads(config.cores)
    flags = GPTTrainFlags(code_path="", ema=True, global_batch_size=count)
    dtype = dist.compute_dtype(flags.mixed_precision, device)
    torch.manual_seed(0)
    model = GPT_models[name](block_size=tokens).train()
    data = batches(model, count, device)
    if config.one_side == "ours":
        step = our_step(model.to(device), flags, process, dtype)
    else:
        step = plain_step((PlainGPT(model) if config.one_side == "plain" else model).to(device), flags, dtype)
    if config.one_side == "plain":
        del model
    seconds = []
    for _ in range(1 + config.timed_steps):
        batch = next(data)
        synchronize(device)
        start = time.perf_counter()
        step(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "memory": peak_memory(device), "dtype": str(dtype).removeprefix("torch."),
            "peak": product_speed(device, dtype)}


def product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of a few matrix products of a GPT's shapes."""
    best = 0.0
    size = 4096 if device.type == "cpu" else 8192
    for inner, outer in ((768, 2304), (1024, 4096), (2048, 2048)):
        left = torch.randn(size, inner, device=device, dtype=dtype)
        right = torch.randn(outer, inner, device=device, dtype=dtype)
        for _ in range(10):
            synchronize(device)
            start = time.perf_counter()
            left @ right.t()
            synchronize(device)
            best = max(best, 2 * size * inner * outer / (time.perf_counter() - start))
    return best


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flops_per_token(name: str, tokens: int) -> float:
    """Forward and backward: 6 per weight of a matrix (embeddings are looked up), 6 L D T for causal attention."""
    with torch.device("meta"):
        model = GPT_models[name](block_size=tokens)
    matrices = sum(p.numel() for key, p in model.named_parameters() if p.ndim == 2 and "embedding" not in key)
    return 6 * (matrices + model.config.n_layer * model.config.dim * tokens)


def in_fresh_process(config: BenchTrainFlags, case: str, side: str) -> dict[str, float | list[float]]:
    """measured_side in a fresh process."""
    words = [sys.executable, __file__, "--cases", case, "--one-side", side, "--timed-steps", str(config.timed_steps),
             "--cores", str(config.cores), "--device", config.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.cores)}
    output = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def split_case(case: str) -> tuple[str, int, int]:
    """"GPT-B:256:16" → preset, tokens, batch. Raises ValueError for another form."""
    name, *numbers = case.split(":")
    if name not in GPT_models or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--cases has {case!r}, expected preset:tokens:batch such as GPT-B:256:16")
    return name, *map(int, numbers)


def main(config: BenchTrainFlags) -> None:
    if config.one_side:
        print(json.dumps(measured_side(config)))
        return
    cases, sides = config.cases.split(","), config.sides.split(",")
    shapes = [split_case(case) for case in cases]
    if not sides or set(sides) - set(SIDES):
        raise ValueError(f"--sides is {config.sides!r}, expected some of {','.join(SIDES)}")
    device = torch.cuda.get_device_name() if config.device != "cpu" and torch.cuda.is_available() else cpu_name()
    for case, (name, tokens, count) in zip(cases, shapes, strict=True):
        runs: dict[str, list[dict]] = {side: [] for side in sides}
        for turn in range(config.turns):
            for side in sides if turn % 2 == 0 else reversed(sides):
                runs[side].append(in_fresh_process(config, case, side))
                print(case, side, runs[side][-1], flush=True)
        peak = max(run["peak"] for parts in runs.values() for run in parts)
        first = None
        for side, parts in runs.items():
            seconds = statistics.median(second for run in parts for second in run["seconds"])
            speed, memory = tokens * count / seconds, max(run["memory"] for run in parts)
            first = first or (speed, memory)
            row = [name, f"{tokens} x {count}", parts[0]["dtype"], f"{device}, {config.cores}",
                   f"torch {torch.__version__}", str(config.timed_steps * config.turns), side, f"{speed:.0f}",
                   f"{speed / first[0]:.2f}×", f"{speed * flops_per_token(name, tokens) / peak:.0%}",
                   f"{memory:.2f}", f"{memory / first[1]:.2f}×"]
            line = f"| {' | '.join(row)} |\n"
            print(line, end="", flush=True)
            if config.write:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(line if file.tell() else HEADER + line)


if __name__ == "__main__":
    cli.run(main, BenchTrainFlags)
