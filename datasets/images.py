"""The images of a split, held as one uint8 tensor.

Axes: ``m`` image, ``h`` and ``w`` pixels, ``c`` colour channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

__all__ = ["PARTS", "Images", "split_hash"]

PARTS = ("train", "val", "test")
"""The parts of a data set; no class is in two of them."""


def split_hash(names: Iterable[str]) -> str:
    """SHA-256, in hex, of the sorted class names, one a line."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Images:
    """A split of a data set: its pixels, class after class, and what the classes are called.

    Args:
        pixels: ``(m, c, h, w)``, uint8, the images of a class one after the other.
        class_names: One name a class, without repetition.
        counts: Number of images of each class, in the order of the names; they add up to m.

    Raises:
        ValueError: If these do not fit each other.
    """

    pixels: Tensor
    class_names: tuple[str, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != torch.uint8:
            raise ValueError(
                f"pixels of shape {tuple(self.pixels.shape)} and dtype {self.pixels.dtype}; "
                f"uint8 (m, c, h, w) is needed"
            )
        if len(set(self.class_names)) != len(self.class_names) or len(self.class_names) != len(self.counts):
            raise ValueError(
                f"{len(self.class_names)} class names, {len(set(self.class_names))} of them different, for "
                f"{len(self.counts)} classes"
            )
        if min(self.counts, default=1) < 1:
            raise ValueError(f"class {self.class_names[self.counts.index(min(self.counts))]!r} has no image")
        if sum(self.counts) != len(self.pixels):
            raise ValueError(f"the classes count {sum(self.counts)} images, but there are {len(self.pixels)}")

    @classmethod
    def from_classes(cls, array: np.ndarray, class_names: Sequence[str]) -> Images:
        """From equally many grey images a class: ``array`` of ``(classes, images, h, w)``, uint8."""
        classes, images = array.shape[:2]
        pixels = torch.from_numpy(np.ascontiguousarray(array)).flatten(0, 1).unsqueeze(1)
        return cls(pixels, tuple(class_names), (images,) * classes)

    def __len__(self) -> int:
        """Number of images m."""
        return len(self.pixels)

    def take(self, indices: Tensor) -> Tensor:
        """The images at ``indices`` (any shape), as floats in [0, 1]: ``(*indices.shape, c, h, w)``.

        Indices may lie on another device than the pixels; the bytes are sent there and scaled after the transfer.
        """
        chosen = self.pixels[indices.to(self.pixels.device)].to(indices.device, non_blocking=True)
        return chosen.float().div_(255)

    def to(self, device: torch.device | str) -> Images:
        """The same images with the pixels on ``device``."""
        if self.pixels.device == torch.device(device):
            return self
        return replace(self, pixels=self.pixels.to(device))

    def first(self, classes: int) -> Images:
        """The first so many classes.

        Raises:
            ValueError: If there are not so many.
        """
        if not 1 <= classes <= len(self.class_names):
            raise ValueError(f"the first {classes} of {len(self.class_names)} classes cannot be had; ask for 1 to all")
        counts = self.counts[:classes]
        return Images(self.pixels[: sum(counts)], self.class_names[:classes], counts)

    def with_rotations(self) -> Images:
        """Every class also turned by 90, 180 and 270 degrees, each turn a class of its own (Santoro et al., 2016).

        Raises:
            ValueError: If the images are not square.
        """
        if self.pixels.shape[2] != self.pixels.shape[3]:
            raise ValueError(f"images of {tuple(self.pixels.shape[2:])} pixels cannot be turned; they must be square")
        turns = [torch.rot90(self.pixels, k, (2, 3)) for k in range(4)]
        names = [f"{name}/rot{90 * k:03d}" for k in range(4) for name in self.class_names]
        return Images(torch.cat(turns), tuple(names), self.counts * 4)

    def with_mirror_images(self) -> Images:
        """Every class also upside down, as a class of its own; with all its turns, every mirror image there is."""
        names = [f"{name}/mirrored" for name in self.class_names]
        pixels = torch.cat([self.pixels, self.pixels.flip(2)])
        return Images(pixels, (*self.class_names, *names), self.counts * 2)
