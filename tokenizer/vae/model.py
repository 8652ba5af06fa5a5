"""Continuous autoencoders from diffusers: the VAEs of Stable Diffusion and SDXL, and the Consistency Decoder.

An image's latent is drawn from its posterior, as in LlamaGen's comparison, with noise that depends on the seed and the
image's index only. Everything runs in fp32.
"""
import math
from pathlib import Path

import torch
from torch import Tensor

from tokenizer.build import in_chunks
from utils.files import first_line
from utils.finite import check_finite, finite_images
from utils.seeding import sample_generator

VAES = ("sd-vae-ft-mse", "sdxl-vae")
HUB = {**{name: f"stabilityai/{name}" for name in VAES}, "consistency-decoder": "openai/consistency-decoder"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class VAE:
    """A KL autoencoder (arXiv 2112.10752): images → a latent of each → images."""

    diffusers_class = "AutoencoderKL"
    codebook_size = None

    def __init__(self, name: str, folder: str | None, *, seed: int, device: torch.device) -> None:
        model, self.weights = load_diffusers(name, folder, class_name=self.diffusers_class)
        self.name, self.seed = name, seed
        self.model = model.eval().requires_grad_(False).to(device)
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)

    def __call__(self, pixels: Tensor, indices: list[int]) -> tuple[Tensor, None]:
        """Images (B, 3, H, W) in [-1, 1], numbered `indices` → reconstructions (B, 3, H, W), no codes."""
        generators = [sample_generator(self.seed, index) for index in indices]
        mean, std = in_chunks(self.posterior, pixels, pixels=math.prod(pixels.shape[-2:])).chunk(2, 1)  # (B, C, h, w)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=generator) for generator in generators])
        return finite_images(self.decode(mean + std * noise.to(mean), generators), self.name), None

    def posterior(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, H, W) → mean and standard deviation of their latents (B, 2C, h, w)."""
        latents = self.model.encode(pixels).latent_dist
        return torch.cat([latents.mean, latents.std], 1)

    def decode(self, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W). Needs no noise."""
        return in_chunks(lambda chunk: self.model.decode(chunk).sample, latents,
                         pixels=math.prod(latents.shape[-2:]) * self.downsample**2)


class ConsistencyDecoder(VAE):
    """Stable Diffusion's encoder and a two-step consistency model as its decoder (DALL-E 3, OpenAI 2023)."""

    diffusers_class = "ConsistencyDecoderVAE"

    def decode(self, latents: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Latents (B, C, h, w) → images (B, 3, H, W), one by one: the U-Net is large, the noise is per image."""
        return torch.cat([self.model.decode(latent[None], generator=generator).sample
                          for latent, generator in zip(latents, generators, strict=True)])


def load_diffusers(name: str, folder: str | None, *, class_name: str) -> tuple[torch.nn.Module, Path]:
    """(model, its weight file), from a folder as diffusers saves it, else from the Hugging Face hub.

    Raises ValueError or OSError that say what to do when diffusers, the hub, or a part of the model is missing.
    """
    try:
        import diffusers
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise ValueError(f"{name} needs the package diffusers: pip install diffusers") from None
    for part in ("config.json", WEIGHTS_FILE) if folder else ():
        if not Path(folder, part).is_file():
            raise FileNotFoundError(f"--local-weights {folder} holds no {part}: expected what diffusers' "
                                    "save_pretrained writes")
    diffusers.utils.logging.set_verbosity_error()  # missing and unexpected weights are checked below
    try:
        model, found = getattr(diffusers, class_name).from_pretrained(
            folder or HUB[name], use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        if folder:
            raise ValueError(f"--local-weights {folder} does not hold {name}: {first_line(error)}") from None
        raise OSError(f"{HUB[name]} could not be loaded from the Hugging Face hub ({first_line(error)}): give a local "
                      "copy of its folder by --local-weights") from None
    problems = [f"{what} {key}" for what, keys in found.items() for key in keys]
    if problems:
        raise ValueError(f"{folder or HUB[name]} does not hold {name}: {'; '.join(problems[:4])}")
    check_finite(model.state_dict(), folder or HUB[name])
    return model, Path(folder, WEIGHTS_FILE) if folder else Path(try_to_load_from_cache(HUB[name], WEIGHTS_FILE))
