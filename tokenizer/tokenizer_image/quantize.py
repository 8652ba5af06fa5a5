"""Vector quantizer with an L2-normalised codebook (ViT-VQGAN, arXiv 2110.04627; LlamaGen, arXiv 2406.06525 §2.1)."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.tokenizer_image import convolution

USAGE_WINDOW = 65536  # assignments over which codebook usage is counted, as in the paper
ROWS_PER_CHUNK = 8192  # bounds the similarity matrix: 8192 x 16384 fp32 = 512 MiB


class CodebookLosses(NamedTuple):
    """Unweighted scalars except `commit` and `entropy`, which carry their ratios (beta, entropy_loss_ratio)."""

    codebook: Tensor
    commit: Tensor
    entropy: Tensor


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer over features (B, C, h, w); see `VQConfig` for the options."""

    def __init__(self, codebook_size: int, dim: int, *, beta: float = 0.25, entropy_loss_ratio: float = 0.0,
                 l2_norm: bool = True) -> None:
        super().__init__()
        self.codebook_size, self.dim, self.l2_norm = codebook_size, dim, l2_norm
        self.beta, self.entropy_loss_ratio = beta, entropy_loss_ratio
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        if l2_norm:
            with torch.no_grad():
                self.embedding.weight.copy_(F.normalize(self.embedding.weight, dim=-1))
        self._normalised: tuple[Tensor, Tensor] | None = None  # (weights, the normalised codebook made from them)
        self.register_buffer("codebook_used", torch.full((USAGE_WINDOW,), -1.0))  # oldest first; -1: none yet

    def codebook(self) -> Tensor:
        """The vectors that codes stand for, (codebook_size, dim); unit length when `l2_norm`."""
        weight = self.embedding.weight
        if self.training or not self.l2_norm or (torch.is_grad_enabled() and weight.requires_grad):
            return F.normalize(weight.float(), dim=-1) if self.l2_norm else weight.float()
        known = self._normalised
        if known is None or known[0].device != weight.device or not torch.equal(known[0], weight):
            with torch.inference_mode(False), torch.no_grad():
                known = self._normalised = weight.detach().clone(), F.normalize(weight.float(), dim=-1)
        return known[1]

    def forward(self, features: Tensor) -> tuple[Tensor, CodebookLosses | None, Tensor]:
        """Features (B, C, h, w) → (quantised (B, C, h, w) with straight-through gradient, losses, codes (B*h*w,)).

        Losses are None in eval mode. Distances are computed in fp32 for any autocast type: codes must not depend on it.
        """
        with torch.autocast(features.device.type, enabled=False):
            z = features.float().permute(0, 2, 3, 1)  # (B, h, w, C)
            if self.l2_norm:
                z = F.normalize(z, dim=-1)
            codebook = self.codebook()
            codes = nearest_codes(z.flatten(0, 2), codebook, l2_norm=self.l2_norm,
                                  native=convolution.ready(self.embedding, z))  # (B*h*w,)
            quantised = F.embedding(codes, codebook).view(z.shape)
            losses = None
            if self.training:
                self._remember(codes)
                entropy = z.new_zeros(())
                if self.entropy_loss_ratio > 0:  # N x codebook_size with gradient: much memory, only on request
                    entropy = self.entropy_loss_ratio * entropy_loss(z.flatten(0, 2), codebook)
                losses = CodebookLosses(F.mse_loss(quantised, z.detach()),
                                        self.beta * F.mse_loss(z, quantised.detach()), entropy)
            quantised = z + (quantised - z).detach()
        return quantised.permute(0, 3, 1, 2).to(features.dtype), losses, codes

    def lookup(self, codes: Tensor) -> Tensor:
        """Code indices (…,) → vectors (…, C). Raises ValueError for an index outside the codebook."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(f"codes lie in [{int(codes.min())}, {int(codes.max())}], but the codebook has "
                             f"{self.codebook_size} entries: were they made by another tokenizer?")
        return F.embedding(codes, self.codebook())

    @torch.no_grad()
    def usage(self) -> tuple[float, float]:
        """(fraction of the codebook, perplexity) of the last 65,536 assignments."""
        assigned = self.codebook_used[self.codebook_used >= 0].long()
        counts = torch.bincount(assigned, minlength=self.codebook_size).float()
        share = counts / counts.sum().clamp_min(1)
        perplexity = torch.exp(-(share * torch.log(share.clamp_min(1e-12))).sum())
        return float((counts > 0).float().mean()), float(perplexity)

    @torch.no_grad()
    def _remember(self, codes: Tensor) -> None:
        recent = codes[-USAGE_WINDOW:].to(self.codebook_used.dtype)
        self.codebook_used.copy_(torch.cat([self.codebook_used[len(recent):], recent]))


@torch.no_grad()
def nearest_codes(z: Tensor, codebook: Tensor, *, l2_norm: bool, native: bool = False) -> Tensor:
    """Index of the nearest code for each row of z (N, C) → (N,) int64, in chunks of bounded memory.

    native: by the CPU's own kernels, whose sums do not depend on the number of rows.
    """
    bias = None if l2_norm else -0.5 * codebook.square().sum(-1)  # |z-e|^2 = |z|^2 - 2 (z.e - |e|^2 / 2)
    product = convolution.linear if native else F.linear
    return torch.cat([product(rows, codebook, bias).argmax(-1) for rows in z.split(ROWS_PER_CHUNK)])


def entropy_loss(z: Tensor, codebook: Tensor, *, temperature: float = 0.01) -> Tensor:
    """Mean entropy of each assignment minus entropy of the mean assignment (MaskGIT, arXiv 2202.04200).

    Low when every feature chooses clearly and all codes are chosen equally often. z (N, C), codebook (V, C).
    """
    affinity = (2 * z @ codebook.t() - codebook.square().sum(-1)) / temperature  # -distance up to a row constant
    log_p = affinity.log_softmax(-1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(-1).mean() + (mean * torch.log(mean + 1e-5)).sum()
