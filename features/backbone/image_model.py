"""A tower of timm's in the form of a model of open_clip's; a file of its own, as classes of modules need torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class ImageTower(torch.nn.Module):
    """`trunk`, under the name that it has inside a CLIP; `config` is that of timm's folder, None where it had none."""

    def __init__(self, trunk: torch.nn.Module, config: dict[str, Any] | None) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config

    def forward(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Return features (B, D)."""
        features: torch.Tensor = self.trunk(pixels_B3HW)
        return features


class NoText(torch.nn.Module):
    """A text tower that gives zeros, as wide as the image's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Return zeros (B, D)."""
        return torch.zeros(len(tokens_BL), self.width, device=tokens_BL.device)


class ImageModel(torch.nn.Module):
    """An image tower with the methods of a CLIP."""

    def __init__(self, trunk: torch.nn.Module, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.visual = ImageTower(trunk, config)
        self.text = NoText(int(trunk.num_features))  # type: ignore[arg-type]

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:  # noqa: FBT001, FBT002
        """Return features (B, D)."""
        features: torch.Tensor = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:  # noqa: FBT001, FBT002
        """Return zeros (B, D)."""
        features: torch.Tensor = self.text(text)
        return features
