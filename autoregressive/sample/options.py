"""Flags of the sampling commands."""
import math
from dataclasses import dataclass
from typing import Literal, get_args

from autoregressive.models.base import CodeModel
from autoregressive.models.schedule import CfgSchedule, DrawSchedule, Order, SampleSchedule, StepAttention
from autoregressive.train.config import GPTFlags, GuidanceFlags
from tokenizer.build import TokenizerFlags
from utils.cli import flag
from utils.options import CompileFlags, PrecisionFlags
from utils.seeding import seed_number


def interval(text: str) -> float:
    """Parse a number of decoding steps, which may be 3, 3.0 or 2.5. Whole ones become int: 3.0 is the set of 3."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("expected a number of steps, or -1")
    return int(value) if value.is_integer() else value


@dataclass(kw_only=True)
class ScheduleFlags:
    """How an ARPG draws: names as ARPG has them."""

    step: int | None = flag(None, "ARPG: steps that an image is drawn in; None: 64, or one per code of a smaller grid")
    sample_schedule: SampleSchedule | None = flag(None, "ARPG: how many codes each step draws; None: arccos",
                                                  choices=get_args(SampleSchedule))
    cfg_schedule: CfgSchedule | None = flag(None, "ARPG: guidance that rises with the share of the image that is "
                                                  "there, or stays; None: linear", choices=get_args(CfgSchedule))
    order: Order | None = flag(None, "ARPG: which cells come first; spiral is spiral-in, from the border to the "
                                     "middle; None: random", choices=get_args(Order))
    step_attention: StepAttention | None = flag(None, "ARPG: the codes of a step see each other (block), or only those "
                                                      "before them, as in training (causal); None: block, of ARPG-S "
                                                      "causal", choices=get_args(StepAttention))
    shared_order: bool = flag(False, "ARPG: one random order, fixed by the seed, for all images; else each has its own")

    def draw_schedule(self, model: CodeModel) -> DrawSchedule | None:
        """What the flags say; None for a GPT. Raises ValueError for flags that the model has no use for."""
        typed = {"steps": self.step, "sample_schedule": self.sample_schedule, "cfg_schedule": self.cfg_schedule,
                 "order": self.order, "step_attention": self.step_attention}
        typed = {name: value for name, value in typed.items() if value is not None}
        if not model.any_order and (typed or self.shared_order):
            named = next(iter(typed), "shared_order").replace("steps", "step").replace("_", "-")
            raise ValueError(f"--{named} is for ARPG, which draws many codes at once: leave it out for a GPT")
        if not model.any_order:
            return None
        schedule = DrawSchedule(**typed).resolved(model.step_attention)
        schedule.check(model.config.block_size)
        if self.shared_order and schedule.order != "random":
            raise ValueError(f"--shared-order is for random orders: --order {schedule.order} is the same for all "
                             "images")
        return schedule


@dataclass(kw_only=True)
class DrawSeedFlags:
    """Randomness, in the commands that make a few pictures."""

    seed: int = flag(0, "image i of a seed is always the same", parse=seed_number)


@dataclass(kw_only=True)
class ClassesFlags(DrawSeedFlags):
    """What to draw, in the commands that make a few pictures."""

    classes: str | None = flag(None, "class names or numbers, comma-separated; a name with a comma goes in double "
                                     "quotes ('\"tench, Tinca tinca\",3'); None: sample_c2i draws a few classes, an "
                                     "edit has none")


@dataclass(kw_only=True)
class SampleCountFlags:
    """How many, in the commands that make sets of pictures."""

    num_fid_samples: int = flag(50000, "number of images; of a benchmark, whose prompts may have several images each: "
                                       "its first so many prompts")


@dataclass(kw_only=True)
class SampleFlags(GPTFlags, TokenizerFlags, GuidanceFlags, PrecisionFlags, CompileFlags, ScheduleFlags):
    """Which models, and how codes are drawn."""

    from_fsdp: bool = flag(False, "--gpt-ckpt is a bare state dict, or of an FSDP training of ours (read without this "
                                  "flag too; with it, demanded)")
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
