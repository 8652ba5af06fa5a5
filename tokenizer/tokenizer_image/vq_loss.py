"""The tokenizer's training loss: reconstruction + perceptual + adversarial + codebook (VQGAN, arXiv 2012.09841)."""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image.discriminator import PatchGAN, StyleGANDiscriminator
from tokenizer.tokenizer_image.lpips import LPIPSFlags, perceptual_loss
from tokenizer.tokenizer_image.quantize import CodebookLosses
from utils.cli import flag


@dataclass(kw_only=True)
class LossFlags(LPIPSFlags):
    """Weights and kinds of the loss terms."""

    codebook_weight: float = flag(1.0, "weight of the codebook, commitment and entropy terms")
    entropy_loss_ratio: float = flag(0.0, "weight of the entropy term, which evens out codebook usage; 0 costs nothing")
    commit_loss_beta: float = flag(0.25, "weight of the commitment term")
    reconstruction_weight: float = flag(1.0, "weight of the pixel loss")
    reconstruction_loss: Literal["l1", "l2"] = flag("l2", "pixel loss", choices=("l1", "l2"))
    perceptual_weight: float = flag(1.0, "weight of LPIPS; 0 does not load its network")
    disc_weight: float = flag(0.5, "weight of the adversarial loss; 0 builds no discriminator")
    disc_start: int = flag(20000, "step from which the adversarial loss counts")
    disc_warmup_steps: int = flag(0, "from --disc-start on the discriminator first trains this many steps alone, then "
                                     "its weight rises to full over as many: for --finetune, where it is new")
    disc_type: Literal["patchgan", "stylegan"] = flag("patchgan", "discriminator", choices=("patchgan", "stylegan"))
    disc_loss: Literal["hinge", "vanilla", "non-saturating"] = flag(
        "hinge", "the discriminator's loss", choices=("hinge", "vanilla", "non-saturating"))
    gen_loss: Literal["hinge", "non-saturating"] = flag("hinge", "the tokenizer's side of it",
                                                        choices=("hinge", "non-saturating"))
    disc_adaptive_weight: bool = flag(False, "scale the adversarial loss so that its gradient at the last layer is as "
                                             "large as that of reconstruction + perceptual")


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """Loss of a discriminator from its logits on real and on reconstructed images."""
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    # vanilla and non-saturating have one discriminator objective, cross-entropy; they differ for the generator
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(kind: str, fake: Tensor) -> Tensor:
    """Adversarial loss of the tokenizer from the discriminator's logits on reconstructions."""
    return -fake.float().mean() if kind == "hinge" else F.softplus(-fake.float()).mean()


class VQLoss:
    """All losses but the discriminator's own. Not a module, so that none of it is saved in checkpoints."""

    def __init__(self, flags: LossFlags, *, device: torch.device) -> None:
        if flags.disc_warmup_steps < 0:
            raise ValueError(f"--disc-warmup-steps is {flags.disc_warmup_steps}, expected at least 0")
        self.flags = flags
        self.perceptual = perceptual_loss(flags.lpips_backbone, device=device) if flags.perceptual_weight > 0 else None

    def adversarial(self, step: int) -> bool:
        """Whether the discriminator trains at this step."""
        return self.flags.disc_weight > 0 and step >= self.flags.disc_start

    def adversarial_weight(self, step: int) -> float:
        """Weight of the adversarial loss at this step, 0 while only the discriminator trains.

        A new discriminator has learnt nothing: its gradient would spoil good reconstructions. When it has learnt, its
        full weight at once would be a jump in the loss of a trained tokenizer (users of VQGAN report a spike in the
        error), so the weight rises linearly.
        """
        if not self.adversarial(step):
            return 0.0
        warmup = self.flags.disc_warmup_steps
        trained = step - self.flags.disc_start - warmup + 1
        return self.flags.disc_weight * (1.0 if warmup == 0 else min(1.0, max(0.0, trained / warmup)))

    def __call__(self, images: Tensor, reconstructions: Tensor, codebook: CodebookLosses, *, step: int,
                 discriminator: nn.Module | None, last_layer: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and reconstructions (B, 3, H, W) → (loss, its parts)."""
        flags = self.flags
        distance = F.mse_loss if flags.reconstruction_loss == "l2" else F.l1_loss
        parts = {"reconstruction": distance(reconstructions.float(), images.float())}
        likeness = flags.reconstruction_weight * parts["reconstruction"]
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(images, reconstructions).float().mean()
            likeness = likeness + flags.perceptual_weight * parts["perceptual"]
        loss = likeness + flags.codebook_weight * (codebook.codebook + codebook.commit + codebook.entropy)
        parts.update(codebook=codebook.codebook, commit=codebook.commit)
        if flags.entropy_loss_ratio > 0:
            parts["entropy"] = codebook.entropy
        weight = self.adversarial_weight(step)
        if weight > 0:
            parts["generator"] = generator_loss(flags.gen_loss, discriminator(reconstructions))
            if flags.disc_adaptive_weight:
                parts["adaptive_weight"] = adaptive_weight(likeness, parts["generator"], last_layer)
                weight = weight * parts["adaptive_weight"]
            loss = loss + weight * parts["generator"]
        return loss, {"loss": loss, **parts}


def adaptive_weight(likeness: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoder's last layer, at most 1e4."""
    wanted, = torch.autograd.grad(likeness, last_layer, retain_graph=True)
    given, = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (wanted.norm() / (given.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def build_discriminator(flags: LossFlags, *, image_size: tuple[int, int]) -> nn.Module:
    """The discriminator of --disc-type."""
    return PatchGAN() if flags.disc_type == "patchgan" else StyleGANDiscriminator(image_size=image_size)
