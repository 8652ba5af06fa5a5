"""Tokenizers by name: the interface that the rest of the program uses, and how they are loaded."""
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dataset.code_manifest import same_tokenizer, tokenizer_name
from tokenizer.tokenizer_image import convolution
from tokenizer.tokenizer_image.layers import to_channels_last
from tokenizer.tokenizer_image.vq_model import PRESETS, VQ_models, VQModel
from utils.checkpoints import containers
from utils.cli import flag
from utils.finite import finite_images

RELEASED = "pretrained_models"  # the folder in which LlamaGen's scripts look for its weights
PIXELS = 2**18  # at a time where results do not depend on the batch: 4 images of 256 pixels, about 0.5 GiB
PADDED = {"cpu": 2**13, "cuda": 2**16}  # pixels at a time elsewhere; one small image is padded to as many
ENCODED = {"cpu": 2**13, "cuda": 2**18}  # when encoding: mostly data sets, so more at a time for a GPU
MOST = {"cpu": 8, "cuda": 16}  # images at a time, however small


class ImageTokenizer(Protocol):
    """Images ↔ codes in raster order."""

    downsample: int
    codebook_size: int

    def encode_codes(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] → codes (B, h*w)."""

    def decode_code(self, codes: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Codes (B, h*w) with shape (h, w) → images (B, 3, H, W), about [-1, 1]."""


@dataclass(kw_only=True)
class TokenizerFlags:
    """Which tokenizer. What is left out is taken from the checkpoint, else from the named preset."""

    shapes_run: ClassVar[bool] = False
    vq_model: str | None = flag(None, "VQ-16, VQ-8 or VQ-4-S; None: what --vq-ckpt says or its weights "
                                    "show, else VQ-16",
                                choices=tuple(VQ_models))
    vq_ckpt: str | None = flag(None, "tokenizer checkpoint")
    codebook_size: int | None = flag(None, "number of codes; None: the model's own (VQ-16: 16384)")
    codebook_embed_dim: int | None = flag(None, "code dimension; None: the model's own (VQ-16: 8)")


def new_tokenizer(flags: TokenizerFlags, saved: dict | None = None, **options) -> tuple[str, VQModel]:
    """An untrained tokenizer (name, model). `saved`: the checkpoint's config, used where the flags say nothing."""
    saved = saved or {}
    name = flags.vq_model or saved.get("vq_model") or "VQ-16"
    if name not in VQ_models:
        raise ValueError(f"tokenizer {name} is unknown: choose from {', '.join(VQ_models)}")
    sizes = {key: getattr(flags, key) or saved.get(key) for key in ("codebook_size", "codebook_embed_dim")}
    return name, VQ_models[name](**{key: value for key, value in sizes.items() if value}, **options)


def load_tokenizer(flags: TokenizerFlags, *, device: torch.device) -> tuple[str, VQModel]:
    """The tokenizer of --vq-ckpt, in eval mode on `device`: (name, model). Its EMA weights if it has them."""
    if flags.vq_ckpt is None:
        raise ValueError("--vq-ckpt is missing: which tokenizer checkpoint?")
    if Path(flags.vq_ckpt).parent.name == RELEASED and not containers.resolve(flags.vq_ckpt).exists():
        raise FileNotFoundError(f"no checkpoint at {flags.vq_ckpt}, where LlamaGen's scripts look for its released "
                                f"weights: put the tokenizer {Path(flags.vq_ckpt).name} there (below the folder that "
                                "the command is started in), or give yours by --vq-ckpt")
    content = containers.read(flags.vq_ckpt)
    state = containers.weights(content, flags.vq_ckpt)
    if "quantize.embedding.weight" not in state:
        raise ValueError(f"{flags.vq_ckpt} is no tokenizer checkpoint: it has no quantize.embedding.weight"
                         f"{' (it looks like a GPT: --gpt-ckpt?)' if 'tok_embeddings.weight' in state else ''}")
    saved = containers.saved_config(content)
    if flags.vq_model is None and "vq_model" not in saved:
        saved |= tokenizer_sizes(state)
    name, model = new_tokenizer(flags, saved, codebook_l2_norm=saved.get("codebook_l2_norm", True))
    containers.load_strict(model, state, flags.vq_ckpt)
    model.rounded_from = saved.get("weights_sha256")
    return name, to_channels_last(model.eval().requires_grad_(False).to(device))


def tokenizer_sizes(state: dict[str, Tensor]) -> dict[str, Any]:
    """The preset and the codebook's sizes of a tokenizer's state dict, as far as its tensors tell."""
    first, codebook = state.get("encoder.conv_in.weight"), state["quantize.embedding.weight"]
    levels = len({name.split(".")[2] for name in state if name.startswith("encoder.conv_blocks.")})
    preset = next((name for name, one in PRESETS.items() if first is not None and len(first) == one.ch
                   and levels == len(one.encoder_ch_mult)), None)
    if preset is None or codebook.ndim != 2:
        return {}
    return {"vq_model": preset, "codebook_size": len(codebook), "codebook_embed_dim": codebook.shape[1]}


def check_image_size(size: tuple[int, int], downsample: int) -> tuple[int, int]:
    """The token grid of an image size. Raises ValueError when the size is not divisible by `downsample`."""
    if size[0] % downsample or size[1] % downsample:
        raise ValueError(f"--image-size {size[0]}x{size[1]} is not divisible by {downsample}, the tokenizer's "
                         "downsample ratio")
    return size[0] // downsample, size[1] // downsample


@torch.inference_mode()
def decode_images(tokenizer: ImageTokenizer, codes: Tensor, grid: tuple[int, int], *,
                  dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes (B, h*w) → images (B, 3, H, W) on the CPU; an image does not depend on the others of its batch.

    Raises NotFiniteError for pixels that are not finite.

    dtype bfloat16: our kernels on CPUs with AMX keep 16 bits of what they multiply, which changes the pictures little
    (with random weights the PSNR against fp32 is 101 dB); elsewhere the decoder runs in autocast (43 dB), which is for
    GPUs, and slow on most CPUs.
    """
    low = dtype != torch.float32
    with torch.autocast(codes.device.type, enabled=False):  # whatever the caller's is
        free = runs_on_kernels(tokenizer) and (not low or convolution.can_keep_16_bits())
    with (convolution.keeping_16_bits(low),
          torch.autocast(codes.device.type, dtype=dtype, enabled=low and not free)):
        images = in_chunks(lambda chunk: tokenizer.decode_code(chunk, grid).float().cpu(), codes,
                           pixels=math.prod(grid) * tokenizer.downsample**2, free=free)
    return finite_images(images, f"the tokenizer ({type(tokenizer).__name__})")


@torch.inference_mode()
def encode_images(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] → codes (B, h*w); they do not depend on the other images of the batch."""
    return in_chunks(lambda chunk: tokenizer.encode_codes(chunk.contiguous(memory_format=torch.channels_last)), images,
                     pixels=math.prod(images.shape[-2:]), free=runs_on_kernels(tokenizer), padded=ENCODED)


def runs_on_kernels(tokenizer: ImageTokenizer) -> bool:
    """Whether our C++ kernels decode and encode: results depend neither on the batch nor on threads then."""
    return (isinstance(tokenizer, VQModel) and convolution.ready(tokenizer.decoder.conv_in)
            and tokenizer.decoder._compiled_call_impl is None  # a compiled one runs PyTorch's kernels
            and all(map(convolution.fits, (part for part in tokenizer.modules()
                                            if isinstance(part, (nn.Conv2d, nn.GroupNorm, nn.Embedding))))))


def images_at_once(pixels: int, device: str, *, free: bool, padded: dict[str, int] = PADDED) -> int:
    """How many images of `pixels` pixels `in_chunks` takes at a time on a type of device."""
    return max(1, PIXELS // max(1, pixels)) if free else max(1, min(MOST[device], padded[device] // max(1, pixels)))


def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, *, pixels: int, free: bool = False,
              padded: dict[str, int] = PADDED) -> Tensor:
    """function(x), called on a few rows at a time: images of `pixels` pixels, or what belongs to one each.

    `free`: the results do not depend on how many there are. Else it is always the same number, which depends on
    `pixels` and the type of device alone, and the last rows are padded: the batch size decides which of PyTorch's
    convolution kernels runs, and so the last bits of its sums. Codes whose distances nearly tie, and pixels on the edge
    between two 8-bit values, would change with it.
    """
    rows = images_at_once(pixels, x.device.type, free=free, padded=padded)
    if free or len(x) == 0:
        return torch.cat([function(chunk) for chunk in x.split(rows)])
    parts = [function(torch.cat([chunk, chunk[-1:].expand(rows - len(chunk), *chunk.shape[1:])]))[:len(chunk)]
             for chunk in x.split(rows)]
    return torch.cat(parts)


def describe_tokenizer(name: str, model: VQModel) -> dict[str, Any]:
    """What codes, and models of codes, record of the tokenizer that made them. Takes 0.2 s for VQ-16, on a CPU core."""
    own = {"name": name, "downsample": model.downsample, "codebook_size": model.codebook_size,
           "weights_sha256": fingerprint(model)}
    return own if model.rounded_from in (None, own["weights_sha256"]) else own | {"rounded_from": model.rounded_from}


def other_tokenizer(made: Any, name: str, model: VQModel, *, codes: str, source: str) -> str | None:
    """A line saying that `codes` were made with another tokenizer (`made`) than this one of the file `source`.

    None where it is the same, or `made` does not say its hash.
    """
    if same_tokenizer(made, made) is None or same_tokenizer(made, own := describe_tokenizer(name, model)):
        return None
    return (f"{codes} of tokenizer {tokenizer_name(made)}, but {source} is {tokenizer_name(own)}: pictures will be "
            "wrong unless it is a copy of that one; give the tokenizer that made the codes as --vq-ckpt")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names and values of a model's parameters: which tokenizer made these codes?"""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
