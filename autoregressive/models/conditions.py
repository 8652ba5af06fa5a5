"""Conditions that become the prefix of the token sequence: a class, or a caption's text features."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LabelEmbedder(nn.Module):
    """One embedding per class and one, at index num_classes, for "no class"."""

    def __init__(self, num_classes: int, dim: int, *, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def unconditional(self, labels: Tensor) -> Tensor:
        """The "no class" label for each of `labels`."""
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor, *, drop: bool) -> Tensor:
        """Labels (B,) → prefix (B, 1, D); with `drop` each label is replaced by "no class" with dropout_prob."""
        labels = labels.reshape(-1)
        if drop and self.dropout_prob > 0:
            dropped = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)[:, None]


class CaptionMLP(nn.Module):
    """Text features to model width: fc1 → GELU(tanh) → fc2, no biases."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Text features (B, N, caption_dim) → prefix (B, N, D). The unconditional features are random and never trained."""

    def __init__(self, caption_dim: int, dim: int, *, token_num: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.cap_proj = CaptionMLP(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(token_num, caption_dim) / caption_dim**0.5)

    def unconditional(self, features: Tensor) -> Tensor:
        """The unconditional features for each of `features`, (B, N, caption_dim)."""
        return self.uncond_embedding.to(features.dtype).expand_as(features)

    def forward(self, features: Tensor, *, drop: bool) -> Tensor:
        """Project; with `drop` a sample's whole prefix is replaced by the unconditional one with dropout_prob."""
        if drop and self.dropout_prob > 0:
            dropped = torch.rand(features.shape[0], device=features.device) < self.dropout_prob
            features = torch.where(dropped[:, None, None], self.unconditional(features), features)
        return self.cap_proj(features)
