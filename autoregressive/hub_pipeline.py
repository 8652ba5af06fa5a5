"""A pipeline in the manner of diffusers, over the one of the commands (autoregressive/sample/pipeline.py).

    from autoregressive.hub import LlamaGenPipeline

    runs = "runs/quickstart"
    pipe = LlamaGenPipeline.from_pretrained(f"{runs}/gpt/000-GPT-S", tokenizer=f"{runs}/tokenizer/000-VQ-4-S")
    pipe(class_labels=["animals", 0], generator=torch.Generator().manual_seed(0)).images[0].save("animal.png")
"""
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from PIL import Image

from autoregressive.hub_models import HubModel, Tokenizer, owner_of
from autoregressive.models.generate import release
from autoregressive.models.sampling import check_sampling
from autoregressive.released import tokenizer_of
from autoregressive.sample.conditions import ClassConditions
from autoregressive.sample.pipeline import Pipeline, engine_name, load_pipeline
from autoregressive.sample.prompts import TextSampleFlags, encoder_for, features_of, prompt_stream
from autoregressive.sample.sample_c2i import GridFlags
from utils.checkpoints import containers
from utils.checkpoints.hub import hub_name, pushing
from utils.dist import Precision
from utils.files import exists, replacing
from utils.seeding import sample_generator

INDEX = "model_index.json"
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class ImagesOutput:
    """Images as `output_type` says: a list of PIL's, an array (B, H, W, 3) or a tensor (B, 3, H, W), both in [0, 1]."""

    images: Any


@dataclass(kw_only=True)
class AnyConditionFlags(TextSampleFlags):
    """Settings for a model of either kind."""

    gpt_type: Literal["c2i", "t2i"] | None = None


class LlamaGenPipeline:
    """A GPT or an ARPG and its tokenizer: classes or prompts in, images out."""

    def __init__(self, pipeline: Pipeline, flags: AnyConditionFlags) -> None:
        """Of loaded models; see `from_pretrained`."""
        self.pipeline, self.flags, self.encoder = pipeline, flags, None

    @classmethod
    def from_pretrained(cls, gpt: str | Path, *, tokenizer: str | Path | None = None, device: str = "cpu",
                        precision: Precision = TextSampleFlags.precision, **settings: Any) -> "LlamaGenPipeline":
        """Load a saved pipeline's folder, or a GPT or ARPG (anything that --gpt-ckpt takes, names of the hub too) with
        its tokenizer, which a released file needs not name. `settings`: other flags of the sampling commands, such as
        image_size=(256, 256), t5_model_type="minilm".

        Raises ValueError or FileNotFoundError, one line.
        """
        index = Path(gpt) / INDEX
        if tokenizer is None and exists(index):
            parts = json.loads(index.read_text())
            if not isinstance(parts, dict) or not all(parts.get(name) == name for name in ("gpt", "tokenizer")):
                raise ValueError(f"{index} is no index of a pipeline: expected the folders gpt and tokenizer")
            gpt, tokenizer = Path(gpt) / "gpt", Path(gpt) / "tokenizer"
        tokenizer = tokenizer or tokenizer_of(gpt)
        found = hub_name(gpt)
        if tokenizer is None and found is not None and found.inside is None:  # a saved pipeline, as it seems
            gpt, tokenizer = (str(replace(found, inside=part)) for part in ("gpt", "tokenizer"))
        if tokenizer is None:
            raise ValueError(f"which tokenizer? Give tokenizer=…, the one whose codes {gpt} was trained on")
        unknown = settings.keys() - AnyConditionFlags.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"{min(unknown)} is no setting of the sampling commands")
        flags = AnyConditionFlags(gpt_ckpt=str(containers.resolve(gpt)), vq_ckpt=str(containers.resolve(tokenizer)),
                                  precision=precision, **settings)
        return cls(load_pipeline(flags, device=torch.device(device)), flags)

    def to(self, device: torch.device | str) -> "LlamaGenPipeline":
        """Move both models."""
        release(self.pipeline.gpt)
        self.pipeline.gpt.to(device)
        self.pipeline.tokenizer.to(device)
        self.encoder = None
        self.pipeline.described["engine"] = engine_name(self.pipeline.gpt, self.pipeline.tokenizer)
        return self

    def __call__(self, prompt: str | Sequence[str] | None = None, *,
                 class_labels: int | str | Sequence[int | str] | None = None, num_images_per_prompt: int = 1,
                 generator: Generators | None = None, seed: int | None = None, indices: Sequence[int] | None = None,
                 guidance_scale: float | None = None, num_inference_steps: int | None = None,
                 temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
                 output_type: Literal["pil", "np", "pt"] = "pil") -> ImagesOutput:
        """Draw. Classes go by number or name. What is None is as in sample_c2i.py and sample_t2i.py.

        seed: the pictures are those of the commands: for classes image i is number `indices[i]` (None: i) of the seed's
        stream; each prompt has a stream of its own, of which the images are numbers 0, 1, … or `indices`. generator: a
        list has one for each image, which gives the image's key and an ARPG's order, as in
        `generate`; one alone gives each image in turn the seed of a generator of its own. Neither: torch's global one.
        num_inference_steps is for an ARPG. Raises ValueError for what the models do not take.
        """
        pipeline = self.pipeline
        classes = isinstance(pipeline.conditions, ClassConditions)
        if (prompt if classes else class_labels) is not None or (class_labels if classes else prompt) is None:
            raise ValueError("this model draws classes: give class_labels=[…]" if classes else
                             "this model draws what a text says: give prompt=…")
        given = class_labels if classes else prompt
        given = [given] if isinstance(given, Integral | str) else list(given)
        given = [one.item() if isinstance(one, torch.Tensor | np.generic) else one for one in given]
        if not isinstance(num_images_per_prompt, Integral) or num_images_per_prompt < 1 or not given:
            raise ValueError(f"{len(given)} conditions of {num_images_per_prompt} images: expected 1 or more")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type is {output_type!r}, expected pil, np or pt")
        found = [pipeline.conditions.label_of(str(one)) for one in given] if classes else self.features(given)
        found = [one for one in found for _ in range(num_images_per_prompt)]
        preset = GridFlags if classes else TextSampleFlags
        scale = preset.cfg_scale if guidance_scale is None else guidance_scale
        settings = {"cfg_scale": scale, "temperature": temperature, "top_p": top_p,
                    "top_k": preset.top_k if top_k is None else top_k}
        check_sampling(temperature=temperature, top_k=settings["top_k"], top_p=top_p)
        schedule = replace(self.flags, step=num_inference_steps).draw_schedule(pipeline.gpt) \
            if num_inference_steps is not None else pipeline.schedule
        drawing = replace(pipeline, settings=pipeline.settings | settings, schedule=schedule)
        streams = streams_of(len(found), generator=generator, seed=seed, indices=indices,
                             each=None if classes else num_images_per_prompt)
        pixels = drawing.to_pixels(drawing.draw(found, seed=seed or 0, generators=streams))
        return ImagesOutput(as_type(pixels, output_type))

    def features(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """The text features (n, dim) of prompts; the encoder is loaded on first use."""
        if self.encoder is None:
            self.encoder = encoder_for(self.flags, self.pipeline, device=next(self.pipeline.gpt.parameters()).device)
        found = features_of(self.encoder, prompts, precision=self.flags.precision)
        return [found[text] for text in prompts]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both models, as their checkpoints hold them, into gpt/ and tokenizer/ of a folder, and the index that
        `from_pretrained` reads. Raises ValueError where a checkpoint was changed since it was loaded."""
        parts: dict[str, tuple[type[HubModel], str, str]] = {
            "gpt": (owner_of(self.pipeline.gpt), self.flags.gpt_ckpt, "gpt_ckpt_sha256"),
            "tokenizer": (Tokenizer, self.flags.vq_ckpt, "vq_ckpt_sha256")}
        for _, path, key in parts.values():
            if containers.content_hash(path) != self.pipeline.described[key]:
                raise ValueError(f"{path} was changed since it was loaded: load the pipeline again to save it")
        for name, (kind, path, _) in parts.items():
            kind.from_pretrained(path).save_pretrained(Path(folder) / name)
        with replacing(Path(folder) / INDEX) as temporary:
            temporary.write_text(json.dumps({"_class_name": type(self).__name__, **{name: name for name in parts}}))

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Save into a repository owner/name of the hub, which is made if need be → the URL of the commit."""
        with pushing(repo_id), tempfile.TemporaryDirectory() as folder:
            api = HfApi(token=token)
            repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=repository, folder_path=folder)


def streams_of(count: int, *, generator: Generators | None, seed: int | None,
               indices: Sequence[int] | None, each: int | None) -> list[torch.Generator]:
    """The random stream of each image; `each`: images of a prompt, None for classes. Raises ValueError for what
    contradicts itself."""
    if seed is not None:
        numbers = [i % (each or count) for i in range(count)] if indices is None else list(indices)
        if generator is not None or len(numbers) != count:
            raise ValueError(f"{len(numbers)} indices for {count} images, or a generator beside a seed: give seed= "
                             "with one index for each image, or generator=")
        if each is not None:
            return [prompt_stream(seed, index, prompt=i // each) for i, index in enumerate(numbers)]
        return [sample_generator(seed, index) for index in numbers]
    if indices is not None:
        raise ValueError("indices are of images of a seed: give seed= too")
    if generator is None or isinstance(generator, torch.Generator):
        place = "cpu" if generator is None else generator.device
        seeds = [int(torch.randint(2**62, (), generator=generator, device=place)) for _ in range(count)]
        return [torch.Generator().manual_seed(one) for one in seeds]
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} images: give one for each, or one alone")
    return list(generator)


def as_type(pixels: np.ndarray, output_type: str) -> Any:
    """uint8 (B, H, W, 3) as `ImagesOutput` has it."""
    if output_type == "pil":
        return [Image.fromarray(one) for one in pixels]
    shares = pixels.astype(np.float32) / 255
    return shares if output_type == "np" else torch.from_numpy(shares).permute(0, 3, 1, 2).contiguous()
