"""Images made a little different each time they are seen.

Axes: ``m`` image, ``c`` colour channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distort"]


def distort(images: Tensor, strength: float = 1.0) -> Tensor:
    """Turn, stretch, slant and shift each image at random, by PyTorch's random generator of its device.

    At strength 1, uniformly: by up to 15 degrees, a factor of exp(0.15) in size and of exp(0.1) between its sides, a
    slant of 0.15 and 6 % of the width in each direction. What comes in from outside is black.

    Args:
        images: ``(..., c, h, w)``, floats.
        strength: What all of these are multiplied by; 0 changes nothing.

    Returns:
        Images of the same shape.

    Raises:
        ValueError: If ``strength`` is negative.
    """
    if strength < 0:
        raise ValueError(f"strength is {strength:g}; it must be at least 0")
    if strength == 0:
        return images
    flat = images.flatten(0, -4)
    most = images.new_tensor([math.radians(15), 0.15, 0.1, 0.15, 0.12, 0.12]) * strength
    angle, size, sides, slant, right, down = (torch.rand(len(flat), 6, device=flat.device) * 2 - 1).mul(most).unbind(1)
    cos, sin, size, sides = angle.cos(), angle.sin(), size.exp(), sides.exp()
    rows = [cos * size * sides, slant - sin * size, right], [sin * size, cos * size / sides, down]
    where = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, where, align_corners=False).view(images.shape)
