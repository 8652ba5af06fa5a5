"""Models that reconstruct images, all called alike: VQ, taming VQGAN, SD/SDXL VAE, Consistency Decoder, identity."""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokenizer.build import (
    TokenizerFlags,
    check_image_size,
    encode_images,
    in_chunks,
    load_tokenizer,
    runs_on_kernels,
)
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.vae.model import VAE, VAES, ConsistencyDecoder
from tokenizer.vqgan.model import VQGANS, load_vqgan
from utils.cli import flag
from utils.finite import finite_images
from utils.options import SeedFlags


@dataclass(kw_only=True)
class ReconstructorFlags(TokenizerFlags, SeedFlags):
    """What reconstructs."""

    reconstructor: Literal["vq", "vqgan", "vae", "consistency", "identity"] = flag(
        "vq", "what reconstructs: the tokenizer of --vq-ckpt, --vqgan, --vae, the Consistency Decoder, or nothing",
        choices=("vq", "vqgan", "vae", "consistency", "identity"))
    vqgan: str = flag("vqgan_imagenet_f16_16384", "which of taming-transformers' VQGANs", choices=tuple(VQGANS))
    vae: str = flag("sd-vae-ft-mse", "which KL autoencoder", choices=VAES)
    local_weights: str | None = flag(None, "the VQGAN's last.ckpt, or a folder as diffusers saves it with the VAE or "
                                           "Consistency Decoder; None: those come from the Hugging Face hub")


class Reconstructor(Protocol):
    """`weights` is the file it was loaded from, None without one; `codebook_size` is None if it has no codes."""

    name: str
    weights: Path | None
    downsample: int
    codebook_size: int | None

    def __call__(self, pixels: Tensor, indices: list[int]) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) in [-1, 1], numbered `indices` → (reconstructions (B, 3, H, W), codes (B, L) if any).

        An image's reconstruction depends on nothing but the image, its number and the seed. Raises NotFiniteError for
        one that is not finite.
        """


class Identity:
    """Returns images unchanged."""

    name, weights, downsample, codebook_size = "identity", None, 1, None

    def __call__(self, pixels: Tensor, indices: list[int]) -> tuple[Tensor, None]:
        return pixels, None


class ThroughCodes:
    """A VQModel: to codes and back."""

    def __init__(self, name: str, model: VQModel, *, weights: str) -> None:
        self.name, self.model, self.weights = name, model, Path(weights)
        self.downsample, self.codebook_size = model.downsample, model.codebook_size

    def __call__(self, pixels: Tensor, indices: list[int]) -> tuple[Tensor, Tensor]:
        grid = check_image_size(pixels.shape[-2:], self.downsample)
        codes = encode_images(self.model, pixels)
        made = in_chunks(lambda chunk: self.model.decode_code(chunk, grid).float(), codes,
                         pixels=math.prod(pixels.shape[-2:]), free=runs_on_kernels(self.model))
        return finite_images(made, self.name), codes


def build_reconstructor(flags: ReconstructorFlags, *, device: torch.device) -> Reconstructor:
    """The reconstructor of --reconstructor. Raises ValueError or OSError when it cannot be loaded."""
    weights = flags.local_weights
    if weights and flags.reconstructor in ("vq", "identity"):
        raise ValueError(f"--local-weights has no use with --reconstructor {flags.reconstructor}"
                         f"{': its checkpoint is --vq-ckpt' if flags.reconstructor == 'vq' else ''}")
    if flags.reconstructor == "vq":
        return ThroughCodes(*load_tokenizer(flags, device=device), weights=flags.vq_ckpt)
    if flags.reconstructor == "vqgan":
        return ThroughCodes(flags.vqgan, load_vqgan(flags.vqgan, weights, device=device), weights=weights)
    if flags.reconstructor == "vae":
        return VAE(flags.vae, weights, seed=flags.global_seed, device=device)
    if flags.reconstructor == "consistency":
        return ConsistencyDecoder("consistency-decoder", weights, seed=flags.global_seed, device=device)
    return Identity()
