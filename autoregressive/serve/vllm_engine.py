"""vLLM as it is used here: how it is started, what it is asked for an image, and the codes that it answers.

For the commands beside this file, and for the server (vllm_backend.py). Imports vLLM within its functions, and torch's
companions not at all: see scripts/serve_env.sh.
"""
import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from autoregressive.sample.options import SampleFlags
from autoregressive.sample.pipeline import Pipeline
from autoregressive.serve.vllm_folder import grid_config, model_folder, stored_head_size
from autoregressive.serve.vllm_places import class_id, scale_steps, text_id
from utils import dist
from utils.cli import flag
from utils.finite import NotFiniteError

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 2.0  # vLLM raises lower ones to the first and refuses higher ones
BLOCK = 128  # tokens: its caches are in blocks of this size on a CPU, smaller ones on a GPU
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are folders
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else it takes all cores but one for itself
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


@dataclass(kw_only=True)
class EngineFlags:
    """The engine."""

    max_num_seqs: int = flag(32, "images that are drawn at the same time; the memory of vLLM's caches is made for so "
                                 "many, with those without the condition beside them")


# ---- before the engine starts


def prepare_vllm() -> None:
    """Set what vLLM reads when it is imported; what the user has set stays. Raises ValueError if vLLM is absent."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed here: it has an environment of its own; "
                         "`bash scripts/serve_env.sh python …` makes it and runs this command in it")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def register_here() -> None:
    """Give vLLM in this process the model's class itself: else it looks at it in a process of its own, for 8 seconds.
    """
    from vllm import ModelRegistry

    from autoregressive.serve.vllm_model import TwoStreams
    from autoregressive.serve.vllm_plugin import ARCHITECTURE, register

    register()
    ModelRegistry.register_model(ARCHITECTURE, TwoStreams)


def fit_for_vllm(flags: SampleFlags, *, device: torch.device) -> SampleFlags:
    """The flags to load a pipeline with. Raises ValueError for what vLLM does not do, before any model is loaded."""
    for name, plain in (("quantize", None), ("decode", "auto"), ("left_padding", True)):
        value = getattr(flags, name, plain)
        if value != plain:
            shown = "--no-left-padding" if value is False else f"--{name} {value}"
            raise ValueError(f"{shown} is not for vLLM: leave it out, or use the commands in autoregressive/sample")
    check_limits(cfg_scale=flags.cfg_scale, temperature=flags.temperature)
    if dist.compute_dtype(flags.precision, device) == torch.float32:  # vLLM has not our kernels for bfloat16
        return replace(flags, precision="none")
    return flags


def check_limits(*, cfg_scale: float, temperature: float) -> None:
    """Raise ValueError for settings that vLLM does not take; those that nobody takes are checked elsewhere."""
    scale_steps(cfg_scale)
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE):
        raise ValueError(f"--temperature is {temperature}, vLLM takes 0, or {LEAST_TEMPERATURE} to "
                         f"{MOST_TEMPERATURE:g}")


def check_model(pipeline: Pipeline, *, source: str | Path) -> None:
    """Raise ValueError for a model that vLLM cannot draw with."""
    if pipeline.gpt.any_order:
        raise ValueError(f"{source} is an ARPG, which draws many codes at once: vLLM draws one after the other; use "
                         "the commands in autoregressive/sample")


def engine_arguments(pipeline: Pipeline, *, max_num_seqs: int, compile: bool = False) -> dict[str, Any]:
    """What vLLM's engines are started with; the model's folder is written if it is not there."""
    gpt, config = pipeline.gpt, pipeline.gpt.config
    folder = model_folder(gpt, checkpoint_hash=pipeline.described["gpt_ckpt_sha256"])
    overrides = grid_config(gpt, cfg_interval=pipeline.settings["cfg_interval"])
    length = overrides["max_position_embeddings"]
    blocks = max_num_seqs * (math.ceil(length / BLOCK) + 1) + 1
    arguments = {
        "model": str(folder), "skip_tokenizer_init": True, "dtype": str(gpt.output.weight.dtype).removeprefix("torch."),
        "hf_overrides": overrides, "max_model_len": length, "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(2048, max_num_seqs), "enforce_eager": not compile,
        "kv_cache_memory_bytes": blocks * block_bytes(pipeline), "enable_prompt_embeds": config.model_type == "t2i",
        "disable_log_stats": True, "use_tqdm_on_load": False, "generation_config": "vllm",
    }
    if compile and torch.cuda.is_available():  # the graph of a step; what is in it is not compiled
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments


def block_bytes(pipeline: Pipeline) -> int:
    """Bytes of BLOCK tokens in vLLM's cache: keys and values of all layers, of both streams."""
    config = pipeline.gpt.config
    numbers = 2 * config.n_layer * 2 * config.n_kv_head * stored_head_size(config.dim // config.n_head)
    return BLOCK * numbers * pipeline.gpt.output.weight.element_size()


def free_layers(pipeline: Pipeline) -> None:
    """Free the memory of the GPT's weights but those of its conditions: vLLM has its own."""
    for part in (pipeline.gpt.layers, pipeline.gpt.tok_embeddings, pipeline.gpt.output):
        part.to("meta")


# ---- an image


def prompt_for(pipeline: Pipeline, given: int | Tensor, *, scale: float) -> dict[str, Any]:
    """What vLLM is given for an image: of a label, or of the text features (n, dim) of a prompt. Guidance away from "no
    class" or no prompt changes nothing."""
    config = pipeline.gpt.config
    if config.model_type == "c2i":
        pipeline.gpt.check(given, None)
        scale = scale if given < config.num_classes else 1.0
        return {"prompt_token_ids": [class_id(given, scale, vocab_size=config.vocab_size,
                                              num_classes=config.num_classes)]}
    scale = 1.0 if given is pipeline.conditions.nothing else scale
    count, table = len(given), pipeline.gpt.cls_embedding
    features = table(given[None].to(table.uncond_embedding), drop=False)[0].cpu()  # (n, D)
    # vLLM's cache of prefixes looks at the embeddings alone, but the other stream depends on how many there are too.
    return {"prompt_embeds": features, "prompt_token_ids": [text_id(count, scale, prefix=config.cls_token_num)] * count,
            "prompt_is_token_ids": [False] * count, "cache_salt": str(count)}


def sampling_for(pipeline: Pipeline, *, seed: int, temperature: float, top_k: int, top_p: float) -> "SamplingParams":
    """How vLLM draws the codes of an image; `seed` is of its random stream."""
    from vllm import SamplingParams

    codes = pipeline.gpt.config.block_size
    return SamplingParams(temperature=temperature, top_k=min(top_k, pipeline.gpt.config.vocab_size),
                          top_p=max(top_p, 1e-6), seed=seed, max_tokens=codes, min_tokens=codes, ignore_eos=True,
                          detokenize=False)  # the least top_p keeps the best code, as 0 does in this program


def codes_from(pipeline: Pipeline, tokens: Sequence[int]) -> Tensor:
    """The codes (n,) int64 of what vLLM has drawn. Raises NotFiniteError."""
    codes = torch.tensor(tokens, dtype=torch.long)
    if (codes >= pipeline.gpt.config.vocab_size).any():
        first = int((codes >= pipeline.gpt.config.vocab_size).nonzero()[0])
        raise NotFiniteError(f"the model's logits are not finite, from code {first} on: its weights diverged, or "
                             "overflow: try --precision none")
    return codes


# ---- the engine of a command


@contextlib.contextmanager
def running_engine(pipeline: Pipeline, *, max_num_seqs: int, compile: bool) -> Iterator["LLM"]:
    """vLLM's engine for a command, which waits for its pictures: in this process. Raises ValueError."""
    if max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs is {max_num_seqs}, expected 1 or more")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    arguments = engine_arguments(pipeline, max_num_seqs=max_num_seqs, compile=compile)
    free_layers(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that vLLM imports
        from vllm import LLM

        register_here()
        engine = LLM(**arguments)
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()


def draw_codes(engine: "LLM", pipeline: Pipeline, given: Sequence[int] | Sequence[Tensor], *,
               seeds: Sequence[int]) -> Tensor:
    """Labels or text features, and the seed of each image's random stream → codes (B, h*w)."""
    own = {name: pipeline.settings[name] for name in ("temperature", "top_k", "top_p")}
    prompts = [prompt_for(pipeline, one, scale=pipeline.settings["cfg_scale"]) for one in given]
    answers = engine.generate(prompts, [sampling_for(pipeline, seed=seed, **own) for seed in seeds], use_tqdm=image_bar)
    return torch.stack([codes_from(pipeline, answer.outputs[0].token_ids) for answer in answers])


def image_bar(*arguments: Any, desc: str, **options: Any) -> tqdm:
    """The bar of what vLLM draws; what it does to prompts before that takes no time."""
    return tqdm(*arguments, **options | {"desc": "images", "disable": not desc.startswith("Processed")})
