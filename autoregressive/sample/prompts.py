"""Prompts: from where they come, their text features, and the pictures of (prompt, index).

Image j of prompt p has a random stream of its own, from (seed, p, j): it does not depend on the batch, on the number of
processes or of images per prompt. Features are made of all prompts at once, before anything is drawn, by an encoder
that is then freed: its memory and that of the decoder's caches are not needed at the same time.
"""
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from evaluations.t2i.layouts import Prompt, PromptJob, read_prompts
from language.text_encoder import TextEncoder, TextEncoderFlags, load_text_encoder
from utils import cli, dist
from utils.checkpoints.hub import known_as
from utils.cli import flag
from utils.files import few, what_it_is
from utils.recipes import FOLDER

ENCODER = "flan-t5-xl"  # of LlamaGen's released models, for files that name none
ENCODED = 32  # prompts at a time
TABLES = (".csv", ".tsv", ".jsonl")  # files of benchmarks
STDIN = "-"


@dataclass(kw_only=True)
class TextSampleFlags(SampleFlags, TextEncoderFlags):
    """Text. Without --t5-model-type the encoder is the one that the checkpoint names, else flan-t5-xl."""

    gpt_type: Literal["c2i", "t2i"] = "t2i"
    cfg_scale: float = 7.5
    top_k: int = 1000
    t5_model_type: str | None = None
    left_padding: bool = flag(True, "padding stands before the text, as in training; --no-left-padding: after it, so "
                                    "that a token of padding gives the first code")
    images_per_prompt: int | None = flag(None, "images of each prompt; None: one, in sets as many as the benchmark's "
                                               "scorer expects")


# ---- the models


def load_text_pipeline(flags: TextSampleFlags, *, device: torch.device) -> Pipeline:
    """Load the GPT and the tokenizer. Raises for all that is wrong with them or the settings, before any sampling."""
    pipeline = load_pipeline(flags, device=device)
    pipeline.conditions = replace(pipeline.conditions, on_the_left=flags.left_padding)
    pipeline.described |= pipeline.conditions.described
    unusual = unlike_the_preset(flags, pipeline)
    if unusual:
        pipeline.warnings.append(unusual)
        cli.warn(unusual)
    return pipeline


def unlike_the_preset(flags: TextSampleFlags, pipeline: Pipeline) -> str | None:
    """What to say of settings that are not those of a released checkpoint, which is known by its file's name; None:
    nothing."""
    for path in sorted(FOLDER.glob("t2i_*.json")):
        preset = json.loads(path.read_text())["sample"]
        if Path(preset["gpt-ckpt"]).name != known_as(flags.gpt_ckpt):
            continue
        sizes = (preset["image-size"],) * 2, pipeline.image_size
        found = [f"--image-size {cli.shown_size(sizes[1])} (not {cli.shown_size(sizes[0])})"] * (sizes[0] != sizes[1])
        if flags.temperature != preset["temperature"]:
            found.append(f"--temperature {flags.temperature} (not {preset['temperature']})")
        if found:
            return (f"{flags.gpt_ckpt} draws worse with {' and '.join(found)}: --recipe {path.stem} has the settings "
                    "that it was released with")
    return None


def encoder_for(flags: TextSampleFlags, pipeline: Pipeline, *, device: torch.device) -> TextEncoder:
    """The text encoder that the flags name, else the one that the model was trained with, in bf16 with --precision
    bf16, else in fp32 (T5 overflows in fp16). Another one than in training is pointed out.

    Raises ValueError if its features are not of the width that the model takes.
    """
    conditions = pipeline.conditions
    trained = conditions.encoder or {}
    name = flags.t5_model_type or trained.get("name") or ENCODER
    dtype = dist.compute_dtype("bf16" if flags.precision == "bf16" else "none", device)
    encoder = load_text_encoder(replace(flags, t5_model_type=name, t5_feature_max_len=min(
        flags.t5_feature_max_len, conditions.length)), device=device, dtype=dtype)
    if encoder.dim != conditions.dim:
        known = f" (of {trained['name']})" if trained.get("name") else ""
        raise ValueError(f"the text encoder {name} gives features of width {encoder.dim}, {flags.gpt_ckpt} takes width "
                         f"{conditions.dim}{known}: give the encoder that it was trained with by --t5-model-type")
    differs = [key for key in trained if "sha256" in key and encoder.described.get(key) != trained[key]]
    if differs:
        other = (f"{flags.gpt_ckpt} was trained with another text encoder ({trained.get('name')}; {', '.join(differs)} "
                 f"differs) than {name}: pictures may not show what their prompts say")
        pipeline.warnings.append(other)
        cli.warn(other)
    return encoder


def features_of(encoder: TextEncoder, texts: Sequence[str], *, precision: str) -> dict[str, Tensor]:
    """The features (n, dim) of each text, on the CPU: bf16 with --precision bf16, else fp32. All processes must call
    it together; each gives its own texts.

    Says of how many texts nothing was left after cleaning, and of how many the end was cut off.
    """
    features, distinct = {}, list(dict.fromkeys(texts))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with tqdm(total=len(distinct), desc="text features", unit="prompt", mininterval=1.0,
              disable=dist.env_rank() > 0 or len(distinct) <= ENCODED) as bar:
        for first in range(0, len(distinct), ENCODED):
            batch = distinct[first:first + ENCODED]
            features |= {text: one.to("cpu", dtype) for text, one in zip(batch, encoder(batch), strict=True)}
            bar.update(len(batch))
    nothing = encoder([""])[0].to("cpu", dtype)
    blank = dist.gather_lists([text for text, one in features.items() if torch.equal(one, nothing)])
    long = dist.gather_lists([text for text, one in features.items() if len(one) >= encoder.max_tokens])
    if blank:
        note_prompts(blank, "nothing is left after cleaning", "their pictures are of no prompt")
    if long:
        note_prompts(long, f"the text has {encoder.max_tokens} tokens or more", "what is beyond them is left out")
    return features


def note_prompts(texts: list[str], what: str, follows: str) -> None:
    """Say what is the matter with some prompts."""
    shown = few([repr(beginning(text, 30)) for text in texts], most=2)
    cli.warn(f"of {len(texts)} prompt{'s' * (len(texts) > 1)} ({shown}) {what}: {follows}", kind="note")


def beginning(text: str, length: int) -> str:
    """The beginning of a text."""
    return text if len(text) <= length else text[:length - 1] + "…"


def draw_jobs(pipeline: Pipeline, jobs: Sequence[PromptJob], features: dict[str, Tensor], *, seed: int) -> Tensor:
    """The codes (B, h*w) of some pictures of prompts."""
    streams = [prompt_stream(seed, job.image_index, prompt=job.prompt_index) for job in jobs]
    return pipeline.draw([features[job.prompt.text] for job in jobs], seed=seed, generators=streams)


def prompt_stream(seed: int, index: int, *, prompt: int = 0) -> torch.Generator:
    """The random stream of image `index` of a prompt, which is the first of its command, or number `prompt`."""
    return torch.Generator().manual_seed(PromptJob(Prompt(""), prompt, index).seed(seed))


# ---- where prompts come from


def prompts_from(source: str) -> list[str]:
    """The prompts of a file: a benchmark's (.csv, .tsv, .jsonl, a folder of .txt), or a text with one on each line,
    blank ones left out; "-" is standard input. Raises FileNotFoundError or ValueError."""
    path = Path(source)
    if source == STDIN:
        content, name = sys.stdin.buffer.read(), "standard input"
    elif path.is_dir() or path.suffix.lower() in TABLES:
        return [prompt.text for prompt in read_prompts(path)]
    else:
        if not path.is_file():
            raise FileNotFoundError(f"no prompts at {path}: --prompt-file takes a text with one on each line, .csv, "
                                    f".tsv, .jsonl, or {STDIN} for standard input")
        content, name = path.read_bytes(), str(path)
    try:
        lines = content.decode("utf-8-sig").replace("\r", "\n").split("\n")
    except UnicodeDecodeError:
        kind = None if source == STDIN else what_it_is(path)
        raise ValueError(f"{name} is {kind or 'no text in UTF-8'}: expected one prompt on each line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{name} holds no prompts: expected one on each line")
    return prompts


def typed(text: str) -> str:
    """A prompt as typed, without bytes that are no UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

