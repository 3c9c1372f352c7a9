"""Networks that turn an image into the vector that enters a sequence. Any ``nn.Module`` may stand in their place.

Axes: ``b`` image, ``c`` channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Conv4"]


class Conv4(nn.Module):
    """Four blocks of {3x3 convolution, batch norm, ReLU, 2x2 max pooling}, then a linear layer.

    The Omniglot embedding of the paper: 28x28 is pooled to 1x1x64 and mapped to 64. Whether the linear layer was
    there is unclear from the paper, and ports differ; ``out_features=None`` leaves it out. MAML's own network on
    Omniglot (Finn et al., 2017, section 5.2) has strides in the place of pooling: ``strided=True``; it is a quarter of
    the work.

    Args:
        in_channels: 1 for grey, 3 for colour.
        filters: Channels of every block.
        image_size: Height and width of the images in pixels, at least 16.
        out_features: Width of the linear layer; ``None`` for none.
        strided: Whether convolutions halve the image by a stride of 2 instead of pooling; what is left of it after
            four of them is averaged.

    Shape:
        ``(b, in_channels, image_size, image_size) -> (b, out_channels)``.

    Raises:
        ValueError: If the image is too small for four poolings.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        filters: int = 64,
        image_size: int = 28,
        out_features: int | None = 64,
        strided: bool = False,
    ) -> None:
        super().__init__()
        side = image_size // 16
        if side < 1:
            raise ValueError(
                f"images of {image_size} pixels are too small for four 2x2 poolings; at least 16 are needed"
            )
        layers: list[nn.Module] = []
        for width in (in_channels, filters, filters, filters):
            layers += [
                nn.Conv2d(width, filters, 3, stride=2 if strided else 1, padding=1),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            ]
            if not strided:
                layers.append(nn.MaxPool2d(2))
        if strided:
            layers.append(nn.AdaptiveAvgPool2d(1))
            side = 1
        self.layers = nn.Sequential(*layers, nn.Flatten())
        self.description = f"Conv-4 of {filters}, {'strided' if strided else 'max-pooled'}"
        features = filters * side * side
        self.head = nn.Identity() if out_features is None else nn.Linear(features, out_features)
        self.out_channels = features if out_features is None else out_features
        # Channels beside each other in memory: the layout that CPU and GPU convolutions are fastest in.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(b, in_channels, image_size, image_size)`` as ``(b, out_channels)``."""
        features: Tensor = self.head(self.layers(images.contiguous(memory_format=torch.channels_last)))
        return features
