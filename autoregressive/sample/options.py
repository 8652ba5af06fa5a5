"""Flags of the sampling commands."""
import math
from dataclasses import dataclass
from typing import Literal

from autoregressive.train.config import GPTFlags, GuidanceFlags
from tokenizer.build import TokenizerFlags
from utils.cli import flag
from utils.dist import Precision
from utils.options import CompileFlags


def interval(text: str) -> float:
    """Parse a number of decoding steps, which may be 3, 3.0 or 2.5. Whole ones become int: 3.0 is the set of 3."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("expected a number of steps, or -1")
    return int(value) if value.is_integer() else value


@dataclass(kw_only=True)
class SampleFlags(GPTFlags, TokenizerFlags, GuidanceFlags, CompileFlags):
    """Which models, and how codes are drawn."""

    from_fsdp: bool = flag(False, "--gpt-ckpt is a bare state dict, or of an FSDP training of ours (read without this "
                                  "flag too; with it, demanded)")
    precision: Precision = flag("bf16", "type of the GPT's weights; none is fp32, as is fp16 on a CPU",
                                choices=("none", "fp16", "bf16"))
    quantize: Literal["int8", "int4"] | None = flag(None, "keep the GPT's weights in fewer bits: faster for few images "
                                                          "on a CPU, but no longer the same model",
                                                    choices=("int8", "int4"))
    decode: Literal["auto", "sequential", "jacobi"] = flag(
        "auto", "code by code, or windows of drafts (Jacobi); the codes are the same, auto takes the faster",
        choices=("auto", "sequential", "jacobi"))
    cfg_interval: float = flag(-1, "guide only while the index of the decoding step is at most this; -1: always",
                               parse=interval)
    temperature: float = flag(1.0, "logits are divided by it")
    top_k: int = flag(0, "keep the k best codes; 0: all")
    top_p: float = flag(1.0, "keep the best codes up to this probability mass")
