"""Images made a little different each time they are seen.

Axes: ``m`` image, ``c`` colour channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distort", "mirror", "recolour"]


def distort(images: Tensor, strength: float = 1.0, *, outside: Literal["zeros", "reflection"] = "zeros") -> Tensor:
    """Turn, stretch, slant and shift each image at random, by PyTorch's random generator of its device.

    At strength 1, uniformly: by up to 15 degrees, a factor of exp(0.15) in size and of exp(0.1) between its sides, a
    slant of 0.15 and 6 % of the width in each direction.

    Args:
        images: ``(..., c, h, w)``, floats.
        strength: What all of these are multiplied by; 0 changes nothing.
        outside: What comes in at the edges: ``zeros``, which is no ink, or for photographs a ``reflection``.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: If ``strength`` is negative.
    """
    if _is_zero(strength):
        return images
    flat = images.flatten(0, -4)
    most = images.new_tensor([math.radians(15), 0.15, 0.1, 0.15, 0.12, 0.12]) * strength
    angle, size, sides, slant, right, down = (torch.rand(len(flat), 6, device=flat.device) * 2 - 1).mul(most).unbind(1)
    cos, sin, size, sides = angle.cos(), angle.sin(), size.exp(), sides.exp()
    rows = [cos * size * sides, slant - sin * size, right], [sin * size, cos * size / sides, down]
    where = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, where, padding_mode=outside, align_corners=False).view(images.shape)


def mirror(images: Tensor) -> Tensor:
    """Turn left to right every second image ``(..., c, h, w)`` or so, each by itself."""
    turned = torch.rand(*images.shape[:-3], 1, 1, 1, device=images.device) < 0.5
    return torch.where(turned, images.flip(-1), images)


def recolour(images: Tensor, strength: float = 1.0) -> Tensor:
    """Change brightness, contrast and saturation of each photograph at random, each by up to 40 % at strength 1.

    Args:
        images: ``(..., c, h, w)``, floats in [0, 1].
        strength: What the 40 % are multiplied by; 0 changes nothing.

    Returns:
        Images of the same shape, in [0, 1].

    Raises:
        ValueError: If ``strength`` is negative.
    """
    if _is_zero(strength):
        return images
    factors = 1 + 0.4 * strength * (torch.rand(*images.shape[:-3], 3, 1, 1, 1, device=images.device) * 2 - 1)
    brightness, contrast, saturation = factors.unbind(-4)
    images = images * brightness
    grey = images.mean(-3, keepdim=True)
    images = torch.lerp(grey, images, saturation)
    return torch.lerp(grey.mean((-2, -1), keepdim=True), images, contrast).clamp(0, 1)


def _is_zero(strength: float) -> bool:
    if strength < 0:
        raise ValueError(f"strength is {strength:g}; it must be at least 0")
    return strength == 0
