"""Networks that turn an image into the vector that enters a sequence. Any ``nn.Module`` may stand in their place.

Axes: ``b`` image, ``c`` channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["Conv4", "ResidualEmbedding"]


class Conv4(nn.Module):
    """Four blocks of {3x3 convolution, batch norm, ReLU, 2x2 max pooling}, then a linear layer.

    The Omniglot embedding of the paper: 28x28 is pooled to 1x1x64 and mapped to 64. Whether the linear layer was
    there is unclear from the paper, and ports differ; ``out_features=None`` leaves it out. MAML's own network on
    Omniglot (Finn et al., 2017, section 5.2) has strides in the place of pooling: ``strided=True``; it is a quarter of
    the work.

    Args:
        in_channels: 1 for grey, 3 for colour.
        filters: Channels of every block, or of each of the four.
        image_size: Height and width of the images in pixels, at least 16.
        out_features: Width of the linear layer; ``None`` for none.
        strided: Whether convolutions halve the image by a stride of 2 instead of pooling; what is left of it after
            four of them is averaged.

    Shape:
        ``(b, in_channels, image_size, image_size) -> (b, out_channels)``.

    Raises:
        ValueError: If the image is too small for four poolings, or there are not four numbers of filters.
    """

    def __init__(
        self,
        in_channels: int = 1,
        *,
        filters: int | Sequence[int] = 64,
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
        widths = [filters] * 4 if isinstance(filters, int) else list(filters)
        if len(widths) != 4:
            raise ValueError(f"filters is {widths}; give one number, or one for each of the four blocks")
        layers: list[nn.Module] = []
        for before, after in pairwise([in_channels, *widths]):
            layers += [nn.Conv2d(before, after, 3, stride=2 if strided else 1, padding=1), nn.BatchNorm2d(after)]
            # The largest of what ReLU leaves is what ReLU leaves of the largest: the same, for a quarter of the work.
            layers += [nn.ReLU()] if strided else [nn.MaxPool2d(2), nn.ReLU()]
        if strided:
            layers.append(nn.AdaptiveAvgPool2d(1))
            side = 1
        self.layers = nn.Sequential(*layers, nn.Flatten())
        told = "-".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))
        self.description = f"Conv-4 of {told}, {'strided' if strided else 'max-pooled'}"
        features = widths[-1] * side * side
        self.head = nn.Identity() if out_features is None else nn.Linear(features, out_features)
        self.out_channels = features if out_features is None else out_features
        # Channels beside each other in memory, the layout that convolutions are fastest in; images follow the weights.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(b, in_channels, image_size, image_size)`` as ``(b, out_channels)``."""
        features: Tensor = self.head(self.layers(images))
        return features

    def grow_from(self, narrower: Mapping[str, Tensor]) -> bool:
        """Take the weights of a network of fewer filters: it answers as that one did, with more to learn with.

        New filters see all that is before them; in what was there they count for nothing until training finds a use
        for them. (Net2Net, Chen et al., 2016, doubles filters instead.)

        Args:
            narrower: ``state_dict`` of a ``Conv4`` with the same ``out_features``.

        Returns:
            Whether it could be done; nothing is changed if ``narrower`` is no such network.
        """
        own = self.state_dict()
        fits = own.keys() == narrower.keys() and "head.weight" in own
        if not fits or len(own["head.weight"]) != len(narrower["head.weight"]):
            return False
        pairs = [(mine, narrower[name]) for name, mine in own.items()]
        sizes = [(mine.shape, given.shape) for mine, given in pairs]
        if any(len(a) != len(b) or any(m < n for m, n in zip(a, b, strict=True)) for a, b in sizes):
            return False
        with torch.no_grad():
            for mine, given in pairs:
                there = tuple(slice(n) for n in given.shape)
                mine[there[:1]].zero_()  # what was there is blind to what is new
                mine[there] = given
        return True


class ResidualEmbedding(nn.Module):
    """Four residual blocks of three convolutions: the miniImageNet embedding of the paper (appendix A, figure 6).

    Each block is three times {3x3 convolution, batch norm, leaky ReLU}, to which a 1x1 convolution of its input is
    added, then 2x2 max pooling and dropout. A 1x1 convolution to ``wide`` channels, the mean over the image, ReLU,
    dropout and a linear layer follow. The paper's "dropout 0.9" is read as the probability to keep, ports drop as many;
    its last pooling is a mean, where the best known port takes the maximum.

    Args:
        in_channels: 1 for grey, 3 for colour.
        filters: Channels of each block.
        wide: Channels that the mean is taken of.
        out_features: Width of the answer.
        keep: Probability that dropout keeps a number.
        leak: Slope of the leaky ReLU below zero.

    Shape:
        ``(b, in_channels, height, width) -> (b, out_features)``, any height and width; 84x84 are pooled to 6x6.

    Raises:
        ValueError: If ``keep`` is no probability above 0.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        filters: Sequence[int] = (64, 96, 128, 256),
        wide: int = 2048,
        out_features: int = 384,
        keep: float = 0.9,
        leak: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep:g}; a probability above 0 and up to 1 is needed")
        widths = [in_channels, *filters]
        self.blocks = nn.Sequential(*(_ResidualBlock(before, after, keep, leak) for before, after in pairwise(widths)))
        self.widen = nn.Conv2d(widths[-1], wide, 1)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(1 - keep), nn.Linear(wide, out_features))
        self.out_channels = out_features
        self.description = f"residual, {'-'.join(map(str, filters))}"
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(b, in_channels, height, width)`` as ``(b, out_features)``."""
        maps = self.widen(self.blocks(images))
        features: Tensor = self.head(maps.mean((-2, -1)))
        return features


class _ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, filters: int, keep: float, leak: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (in_channels, filters, filters):
            layers += [nn.Conv2d(width, filters, 3, padding=1), nn.BatchNorm2d(filters), nn.LeakyReLU(leak)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Conv2d(in_channels, filters, 1)
        self.end = nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Dropout(1 - keep))

    def forward(self, maps: Tensor) -> Tensor:
        shorter: Tensor = self.end(self.layers(maps) + self.shortcut(maps))
        return shorter
