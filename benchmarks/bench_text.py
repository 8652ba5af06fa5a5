"""Training on captions: padding left out against masked padding; stored features against the encoder in the loop.

    python3 benchmarks/bench_text.py

The baseline of a step is LlamaGen's way: every prefix is 120 tokens, a mask (B, T, T) hides the padding. Captions have
8 to 60 tokens, drawn evenly. Forward and backward, no optimizer; the sides take turns. Of features: how many captions a
second come from a store, and from MiniLM.
"""
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.base import CodeModel
from autoregressive.models.gpt import GPT_models
from benchmarks.machine import cpu_name
from dataset.emoji import open_emoji
from language.text_encoder import TextEncoderFlags, load_text_encoder

MODEL, BATCH, TURNS = "GPT-B", 2, 3
TOKENS, WIDTH, CODES, SHORTEST, LONGEST = 120, 2048, 256, 8, 60


def masked_step(model: CodeModel, codes: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
    """The loss with the padding in its place, hidden by a mask."""
    total = TOKENS + CODES - 1
    mask = torch.ones(total, total, dtype=torch.bool).tril().repeat(len(codes), 1, 1)
    mask[:, :, :TOKENS] &= (torch.arange(TOKENS) >= TOKENS - lengths[:, None])[:, None]
    mask |= torch.eye(total, dtype=torch.bool)
    return model(codes[:, :-1], features, targets=codes, mask=mask, summed_loss=True)[0]


def unpadded_step(model: CodeModel, codes: Tensor, features: Tensor, lengths: Tensor) -> Tensor:
    """The loss without padding."""
    longest = int(lengths.max())
    return model(codes[:, :-1], features[:, -longest:], targets=codes, lengths=lengths, summed_loss=True)[0]


def timed_step(step: Callable[..., Tensor], model: CodeModel, *data: Tensor) -> tuple[float, float]:
    """(time of forward and backward, loss)."""
    start = time.perf_counter()
    loss = step(model, *data)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def compare_steps() -> None:
    """Print the times of both sides."""
    model = GPT_models[MODEL](model_type="t2i", cls_token_num=TOKENS, caption_dim=WIDTH, token_dropout_p=0.0,
                                        resid_dropout_p=0.0, ffn_dropout_p=0.0, class_dropout_prob=0.0).train()
    codes, features = torch.randint(16384, (BATCH, CODES)), torch.randn(BATCH, TOKENS, WIDTH)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (BATCH,), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"masked": [], "ours": []}
    for turn in range(TURNS + 1):
        for name, step in (("masked", masked_step), ("ours", unpadded_step)):
            model.zero_grad()
            spent, loss = timed_step(step, model, codes, features, lengths)
            if turn:  # the first turn warms up
                times[name].append(spent)
    plain, ours = (statistics.median(values) for values in times.values())
    print(f"{MODEL}, {BATCH} captions of {lengths.tolist()} tokens, {CODES} codes, fp32: masked "
          f"{plain:.2f} s, ours {ours:.2f} s a step: {plain / ours:.2f} times as fast (last loss {loss:.3f})")


def compare_features() -> None:
    """Print how many captions a second come from a store, and from an encoder."""
    captions = open_emoji("emoji", size=8).captions
    encoder = load_text_encoder(TextEncoderFlags(t5_model_type="minilm"), device=torch.device("cpu"),
                                dtype=torch.bfloat16)
    start = time.perf_counter()
    made = encoder(captions)
    online = len(captions) / (time.perf_counter() - start)
    sizes = np.array([len(one) for one in made])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        np.save(path, torch.cat(made).view(torch.int16).numpy())
        stored, ends = np.load(path, mmap_mode="r"), np.cumsum(sizes)
        order, start = np.random.default_rng(0).permutation(len(captions)), time.perf_counter()
        for row in order.tolist():
            torch.from_numpy(np.array(stored[ends[row] - sizes[row]:ends[row]])).view(torch.bfloat16)
        read = len(captions) / (time.perf_counter() - start)
    print(f"features of {len(captions)} captions, {sizes.mean():.1f} tokens x {encoder.dim}, bf16: minilm makes "
          f"{online:.0f} a second, a store gives {read:.0f}; {2 * encoder.dim * sizes.mean():.0f} bytes each")


def main() -> None:
    """Print the machine and both comparisons."""
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    compare_steps()
    compare_features()


if __name__ == "__main__":
    main()
