"""Conditions that become the prefix of the token sequence: a class, or a caption's text features."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNCONDITIONAL = "cls_embedding.uncond_embedding"  # its name in checkpoints


def dropped(conditions: Tensor, drop: Tensor | bool, probability: float) -> Tensor:
    """Which of the conditions (B, …) are left out, (B,) bool: as `drop` says, or with `True` by chance."""
    if isinstance(drop, Tensor):
        return drop
    if probability == 0:
        return torch.zeros(conditions.shape[0], dtype=torch.bool, device=conditions.device)
    return torch.rand(conditions.shape[0], device=conditions.device) < probability


class LabelEmbedder(nn.Module):
    """One embedding per class and one, at index num_classes, for "no class"."""

    def __init__(self, num_classes: int, dim: int, *, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def unconditional(self, labels: Tensor) -> Tensor:
        """The "no class" label for each of `labels`."""
        return torch.full_like(labels, self.num_classes)

    def forward(self, labels: Tensor, *, drop: bool | Tensor) -> Tensor:
        """Labels (B,) → prefix (B, 1, D). `drop` (B,) bool: whose label becomes "no class"; True: see `dropped`."""
        labels = labels.reshape(-1)
        if drop is not False:
            labels = torch.where(dropped(labels, drop, self.dropout_prob), self.num_classes, labels)
        return self.embedding_table(labels)[:, None]

    def prefixes(self, conditions: list[int]) -> tuple[Tensor, Tensor]:
        """Labels → prefixes (n, 1, D), and the one of no class (1, D)."""
        labels = torch.tensor([*conditions, self.num_classes], device=self.embedding_table.weight.device)
        rows = self(labels, drop=False)
        return rows[:-1], rows[-1]


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
        """The unconditional features for each of `features` (B, N, caption_dim); of shorter ones, that are padded on
        the left, the last N."""
        return self.uncond_embedding[-features.shape[1]:].to(features.dtype).expand_as(features)

    def forward(self, features: Tensor, *, drop: bool | Tensor) -> Tensor:
        """Project. `drop` (B,) bool: whose whole prefix is replaced by the unconditional one; True: see `dropped`."""
        if drop is not False:
            replaced = dropped(features, drop, self.dropout_prob)[:, None, None]
            features = torch.where(replaced, self.unconditional(features), features)
        return self.cap_proj(features)

    def prefixes(self, conditions: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Text features (N, caption_dim) each → prefixes (n, N, D), and the one of no caption (N, D)."""
        one = [features[None].to(self.cap_proj.fc1.weight) for features in conditions]  # alone: independent of a batch
        return (torch.cat([self(features, drop=False) for features in one]),
                self(self.unconditional(one[0]), drop=False)[0])
