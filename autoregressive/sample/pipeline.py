"""From labels or text features to pictures: the sampling pipeline that every command uses.

Image (seed, index) comes from its own random stream, so it does not depend on the batch or the process it is made in.
"""
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.control.adapter import PREFIX, AdapterArgs, attach
from autoregressive.models.base import CodeModel
from autoregressive.models.blocks import FeedForward
from autoregressive.models.generate import generate, requests_for
from autoregressive.models.native_engine import WEIGHTS, fitting_kernels
from autoregressive.models.plan import Request
from autoregressive.models.planning import Decode
from autoregressive.models.quantized import quantize_
from autoregressive.models.registry import MODELS, facts_of, recorded_options
from autoregressive.models.sampling import check_sampling
from autoregressive.models.schedule import DrawSchedule, cell_order
from autoregressive.released import released_grid
from autoregressive.sample.conditions import TAKEN_BY, WORDS, ClassConditions, TextConditions, conditions_of
from autoregressive.sample.options import SampleFlags
from autoregressive.train.finetune import class_names
from native.build import UNITS, available, prepare
from tokenizer.build import (
    ImageTokenizer,
    check_image_size,
    decode_images,
    load_tokenizer,
    other_tokenizer,
    runs_on_kernels,
)
from tokenizer.tokenizer_image import convolution
from utils import cli, dist, images
from utils.checkpoints import containers
from utils.files import exists
from utils.seeding import sample_generator

DEFAULT_IMAGE_SIZES = {"c2i": 384, "t2i": 512}  # of LlamaGen's commands; our own checkpoints say theirs
ARPG_IMAGE_SIZE = 256  # of the released models
KINDS = {"int8": 8, "int4": 4}  # bits of --quantize
LABEL_STREAM = 0x1ABE1  # a stream of its own for labels, so that they are independent of the codes
ORDER_STREAM = 0x04DE4  # the same for the order that all images share


@dataclass
class Pipeline:
    """A GPT and a tokenizer that belong together."""

    gpt: CodeModel
    tokenizer: ImageTokenizer
    conditions: ClassConditions | TextConditions
    settings: dict[str, Any]  # cfg_scale, cfg_interval, temperature, top_k, top_p
    described: dict[str, Any]  # models, files' hashes and sizes, for config.json
    decode: Decode = "auto"  # does not change the images
    schedule: DrawSchedule | None = None  # of an ARPG
    shared_order: bool = False  # one order for all images of a seed
    warnings: list[str] = field(default_factory=list)  # why the images may be bad
    control: dict[str, Any] | None = None  # of a model with a control adapter: kind and how its pictures were made

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        h, w = self.gpt.config.grid
        return h * self.tokenizer.downsample, w * self.tokenizer.downsample

    def __call__(self, given: Sequence[int] | Sequence[Tensor], *, seed: int, indices: list[int],
                 size: tuple[int, int] | None = None, control: list[Tensor | None] | None = None,
                 control_strength: float = 1.0) -> np.ndarray:
        """Labels or text features, and the index of each image in the stream of `seed` → uint8 (B, H, W, 3), resized to
        `size`. control: see `sample_codes`.
        """
        codes = self.sample_codes(given, seed=seed, indices=indices, control=control,
                                  control_strength=control_strength)
        return self.to_pixels(codes, size=size)

    def sample_codes(self, given: Sequence[int] | Sequence[Tensor], *, seed: int, indices: list[int],
                     control: list[Tensor | None] | None = None, control_strength: float = 1.0) -> Tensor:
        """Labels, or the features (n, dim) of a prompt for each image, and the index of each image in the stream of
        `seed` → codes (B, h*w) on the GPT's device.

        control: a picture (C, H, W) in [-1, 1], of the kind that the model was trained with, or None for each image;
        control_strength: 1 as in training, 0 as without.
        """
        return self.draw(given, seed=seed, generators=[sample_generator(seed, index) for index in indices],
                         control=control, control_strength=control_strength)

    def draw(self, given: Sequence[int] | Sequence[Tensor], *, seed: int, generators: list[torch.Generator],
             known: Tensor | None = None, control: list[Tensor | None] | None = None,
             control_strength: float = 1.0, **settings) -> Tensor:
        """Labels or text features, `conditions.nothing` for none, and the random stream of each image → codes (B, h*w)
        on the GPT's device. known (B, h*w): codes that stay as they are, -1 where one is to be drawn; control: see
        `sample_codes`; settings: cfg_scale, temperature, … in place of the pipeline's own."""
        return generate(self.gpt, generators=generators, known=known, control=control,
                        control_strength=control_strength, **self.arguments(given, seed=seed, **settings))

    def requests(self, given: Sequence[int] | Sequence[Tensor], *, seed: int, generators: list[torch.Generator],
                 known: Tensor | None = None, beside: int = 0, **settings) -> list[Request | None]:
        """What a `CodeDecoder` is asked to draw the images of `draw`; None for an image of which all codes are known.
        beside: rows of other images in that decoder."""
        return requests_for(self.gpt, generators=generators, known=known, beside=beside,
                            **self.arguments(given, seed=seed, **settings))

    def arguments(self, given: Sequence[int] | Sequence[Tensor], *, seed: int, **settings) -> dict[str, Any]:
        """What `generate` takes for labels or text features; settings: in place of the pipeline's own, among them
        `schedule`."""
        settings = {"decode": self.decode, "schedule": self.schedule} | self.settings | settings
        orders = None
        if self.shared_order:
            orders = torch.from_numpy(cell_order("random", self.gpt.config.grid,
                                                 sample_generator(seed ^ ORDER_STREAM, 0)))
        return settings | {"max_new_tokens": self.gpt.config.block_size, "orders": orders} | self.conditions.arguments(
            given, cfg_scale=settings["cfg_scale"], device=next(self.gpt.parameters()).device)

    def to_pixels(self, codes: Tensor, *, size: tuple[int, int] | None = None) -> np.ndarray:
        """Codes (B, h*w) → uint8 (B, H, W, 3), resized to `size`."""
        pixels = decode_images(self.tokenizer, codes, self.gpt.config.grid, dtype=pixel_dtype(self.gpt, self.tokenizer))
        if size not in (None, self.image_size):
            pixels = F.interpolate(pixels, size=size, mode="bicubic")
        return images.to_uint8(pixels)

    def tell_null_control(self) -> None:
        """Say that images are drawn without control pictures, of a model that was trained to follow some."""
        if self.control is not None:
            cli.warn(f"the model can follow {self.control.get('kind')} pictures; here it draws without one "
                     "(--control-image of sample_c2i.py)", kind="note")


def load_pipeline(flags: SampleFlags, *, device: torch.device) -> Pipeline:
    """Load both models. Raises for all that is wrong with them or the settings, before any sampling."""
    dist.ask_for_huge_pages()
    check_sampling(temperature=flags.temperature, top_k=flags.top_k, top_p=flags.top_p)
    if flags.gpt_type != type(flags).gpt_type:
        raise ValueError(f"--gpt-type {flags.gpt_type}: this command takes {WORDS[type(flags).gpt_type]}; models of "
                         f"{WORDS[flags.gpt_type]} are for {TAKEN_BY[flags.gpt_type]}")
    if flags.quantize and device.type != "cpu":
        raise ValueError(f"--quantize {flags.quantize} is for CPUs: there are no such kernels for a GPU here")
    if device.type == "cpu" and all(path and exists(containers.resolve(path))
                                    for path in (flags.gpt_ckpt, flags.vq_ckpt)):
        weights = WEIGHTS[KINDS.get(flags.quantize, sampling_dtype(flags, device))]
        prepare(("decode", f"WEIGHTS={weights}"), ("sample",), ("conv",))
    gpt, saved = load_gpt(flags, device=device)
    vq_name, tokenizer = load_tokenizer(flags, device=device)
    plain = dist.compute_dtype(flags.precision, device)
    if not flags.quantize and sampling_dtype(flags, device) != plain and fitting_kernels(gpt)[1] is None:
        gpt, saved = load_gpt(replace(flags, precision="none"), device=device)  # PyTorch would emulate bfloat16
    config = gpt.config
    if config.vocab_size != tokenizer.codebook_size:
        raise ValueError(f"the GPT has {config.vocab_size} codes, the tokenizer {tokenizer.codebook_size}: "
                         "they do not belong together")
    if flags.downsample_size not in (None, tokenizer.downsample):
        raise ValueError(f"--downsample-size is {flags.downsample_size}, but {vq_name} has {tokenizer.downsample}")
    if flags.image_size is None and not saved.get("grid"):
        config_size = (ARPG_IMAGE_SIZE if gpt.any_order else DEFAULT_IMAGE_SIZES[config.model_type],) * 2
    else:
        config_size = flags.image_size or tuple(side * tokenizer.downsample for side in saved["grid"])
    gpt.set_grid(check_image_size(config_size, tokenizer.downsample))
    if flags.compile:
        for part in gpt.modules():
            if isinstance(part, FeedForward):  # its shapes mostly stay from step to step
                part.compile()
        if device.type != "cpu":  # on a CPU our kernels are faster than a compiled decoder
            tokenizer.decoder.compile()
    other = other_tokenizer(saved.get("tokenizer"), vq_name, tokenizer, source=flags.vq_ckpt,
                            codes=f"{flags.gpt_ckpt} was trained on codes")
    warnings = [other] if other else []
    if saved.get("grid") and gpt.config.grid != tuple(saved["grid"]):
        h, w = saved["grid"]
        warnings.append(f"--image-size {config_size[0]}x{config_size[1]} is {gpt.config.grid[0]}x{gpt.config.grid[1]} "
                        f"tokens, but {flags.gpt_ckpt} was trained on {h}x{w} ({h * tokenizer.downsample}x"
                        f"{w * tokenizer.downsample} pixels): without --image-size that size is taken")
    for text in warnings:
        cli.warn(text)
    schedule = flags.draw_schedule(gpt)
    if schedule is not None and flags.decode == "jacobi":
        raise ValueError("--decode jacobi is for a GPT: an ARPG draws --step groups of codes")
    conditions = conditions_of(gpt, saved)
    settings = {name: getattr(flags, name) for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p")}
    described = {"gpt_model": saved["gpt_model"], "vq_model": vq_name,
                 "gpt_ckpt_sha256": containers.content_hash(flags.gpt_ckpt),
                 "vq_ckpt_sha256": containers.content_hash(flags.vq_ckpt), "dtype": str(next(gpt.parameters()).dtype),
                 "engine": engine_name(gpt, tokenizer), "weights": saved["weights"],
                 **conditions.described, "image_size": list(config_size), **settings}
    if flags.quantize:
        described["dtype"] = flags.quantize
    if schedule is not None:
        described |= {**asdict(schedule), "shared_order": flags.shared_order}
        if schedule.step_attention == "block":  # not written, as in sets of earlier versions, which had no other
            del described["step_attention"]
    return Pipeline(gpt, tokenizer, conditions, settings, described, flags.decode, schedule,
                    flags.shared_order, warnings, saved.get("control") if gpt.control is not None else None)


def load_gpt(flags: SampleFlags, *, device: torch.device) -> tuple[CodeModel, dict[str, Any]]:
    """The GPT or ARPG of --gpt-ckpt in eval mode, and the config that its file holds (little for a foreign file)."""
    if flags.gpt_ckpt is None:
        raise ValueError("--gpt-ckpt is missing: which GPT checkpoint?")
    content = containers.read(flags.gpt_ckpt)
    state = containers.weights(content, flags.gpt_ckpt)
    ours = isinstance(content.get("flags"), dict) and content["flags"].get("data_parallel") == "fsdp"
    if flags.from_fsdp and state.keys() != content.keys() and not ours:
        raise ValueError(f"--from-fsdp: {flags.gpt_ckpt} is no bare state dict: leave the flag out")
    facts = facts_of(state)
    if facts is None or facts.condition is None:
        hint = " (it looks like a tokenizer: --vq-ckpt?)" if "quantize.embedding.weight" in state else ""
        raise ValueError(f"{flags.gpt_ckpt} is no GPT or ARPG checkpoint: it has no class table, no projection of text "
                         f"features or no token embeddings{hint}")
    if flags.gpt_type not in (None, facts.condition):
        raise ValueError(f"{flags.gpt_ckpt} is {facts.kind} conditioned on {WORDS[facts.condition]}, for "
                         f"{TAKEN_BY[facts.condition]}; this command takes one conditioned on {WORDS[flags.gpt_type]} "
                         f"(--gpt-type {flags.gpt_type})")
    saved = containers.saved_config(content) or released_grid(flags.gpt_ckpt, facts)
    saved["weights"] = "ema" if "ema" in content else "model"
    found = {"vocab_size": facts.vocab_size, "cls_token_num": facts.prefix}
    if facts.condition == "c2i":
        found["num_classes"] = facts.num_classes
        class_names(content, flags.gpt_ckpt, count=facts.num_classes)
    elif flags.num_classes is not None:
        cli.warn(f"--num-classes {flags.num_classes} means nothing here: a model of text has no classes", kind="note")
    for key, value in found.items():
        if getattr(flags, key) not in (None, value):
            raise ValueError(f"--{key.replace('_', '-')} is {getattr(flags, key)}, but {flags.gpt_ckpt} has {value}")
    if facts.condition == "t2i":
        found |= {"model_type": "t2i", "caption_dim": facts.caption_dim}
    name = flags.gpt_model or saved.get("gpt_model") or facts.name()
    recorded = recorded_options(name, saved)
    saved["gpt_model"] = name
    if name not in MODELS:
        raise ValueError(f"{flags.gpt_ckpt} is of model {name}, which is unknown: choose from {', '.join(MODELS)}")
    if facts.preset() not in (None, name) or not name.startswith(facts.family):
        mended = "leave --gpt-model out" if facts.preset() is None else f"give --gpt-model {facts.preset()}"
        raise ValueError(f"{flags.gpt_ckpt} is {facts.kind} of {facts.size}, no {name}: {mended}")
    with torch.device("meta"):
        model = MODELS[name](**found, **facts.layers(), **recorded)
        if model.any_order:
            saved["class_at_origin"] = model.config.class_at_origin  # for an export of a file that does not say it
        if any(name.startswith(PREFIX) for name in state):
            attach(model, AdapterArgs.from_config(saved.get("control"), flags.gpt_ckpt))
    containers.check_fit(model.state_dict(), state, flags.gpt_ckpt, type(model).__name__)
    model.to_empty(device="cpu")
    containers.load_strict(model, state, flags.gpt_ckpt)
    model = model.eval().requires_grad_(False)
    if flags.quantize:
        quantize_(model, KINDS[flags.quantize])
        return model, saved
    model.to(device=device, dtype=sampling_dtype(flags, device))
    if model.control is not None and device.type == "cpu":
        model.control.float()  # it runs once per image, on PyTorch's layers, which are slow in bfloat16 on most CPUs
    return model, saved


def sampling_dtype(flags: SampleFlags, device: torch.device) -> torch.dtype:
    """The type of the weights if C++ kernels can be built that fit the model. They are fast in bfloat16 on any CPU,
    PyTorch's on few."""
    if device.type == "cpu" and flags.precision == "bf16" and not flags.compile and available():
        return torch.bfloat16
    return dist.compute_dtype(flags.precision, device)


def pixel_dtype(gpt: CodeModel, tokenizer: ImageTokenizer) -> torch.dtype:
    """What `decode_images` decodes the model's codes in: bfloat16, as the model, where pictures don't suffer from it;
    else fp32, as LlamaGen does."""
    weight = next(gpt.parameters())
    low = weight.dtype == torch.bfloat16 and weight.is_cpu
    return torch.bfloat16 if low and convolution.can_keep_16_bits() and runs_on_kernels(tokenizer) else torch.float32


def engine_name(gpt: CodeModel, tokenizer: ImageTokenizer) -> str:
    """What computes codes and pixels here: other engines round differently, which changes some images a little."""
    kernels = fitting_kernels(gpt)[1]
    if kernels is None:
        codes = torch_engine(gpt)
    else:
        rounding = {list(UNITS).index("bf16dot") + 1: " with inputs in bfloat16",
                    list(UNITS).index("amx") + 1: " with inputs in bfloat16, by AMX"}
        codes = "C++ kernels" + rounding.get(kernels.units(), "")
    pixels = torch_engine(tokenizer)
    if runs_on_kernels(tokenizer):
        pixels = "C++ kernels" + (" by AMX" if pixel_dtype(gpt, tokenizer) == torch.bfloat16 else "")
    return f"{codes} for codes and {pixels} for pixels on {next(gpt.parameters()).device.type}"


def torch_engine(model: nn.Module) -> str:
    """How PyTorch runs a model that our kernels do not."""
    return "torch.compile" if any(part._compiled_call_impl is not None for part in model.modules()) else "PyTorch"


def labels_for(indices: range | list[int], *, mode: str, num_classes: int, seed: int) -> list[int]:
    """The label of each image index: balanced (index mod classes) or random, fixed by (seed, index)."""
    if mode == "balanced":
        return [index % num_classes for index in indices]
    return [int(torch.randint(num_classes, (), generator=sample_generator(seed ^ LABEL_STREAM, index)))
            for index in indices]

