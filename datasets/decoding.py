"""From a picture in a file to the pixels that a network reads.

Axes: ``c`` colour channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .prepared import Pixels

__all__ = ["EXTENSIONS", "open_picture", "pixels_of", "resized"]

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What files that hold a picture are called; ``ImageFolder`` looks at no others."""


def open_picture(source: Path | bytes) -> Image.Image:
    """A picture, decoded, turned the way that its camera says.

    Raises:
        ValueError: If Pillow cannot read it.
    """
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
            turned = ImageOps.exif_transpose(picture)
            turned.load()
            return turned
    except Exception as error:  # Pillow's errors share no base class
        where = source if isinstance(source, Path) else f"a picture of {len(source)} bytes"
        raise ValueError(f"{where} cannot be read as a picture ({type(error).__name__}: {error})") from error


def resized(picture: Image.Image, size: int, *, mode: str, crop: bool) -> Image.Image:
    """A picture as a square of ``size`` pixels.

    Args:
        picture: Any picture. What is transparent in it becomes white.
        size: Height and width of the answer.
        mode: Pillow's name of its colours: ``"L"`` for grey, ``"RGB"``.
        crop: Whether the middle of a picture that is not square is taken; otherwise it is squeezed.
    """
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture)
    elif picture.mode.startswith("I;16"):  # 16 bits of grey, which Pillow would cut off at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert(mode)
    if picture.size == (size, size):
        return picture
    # Shrunk by the mean over an area, as the field's scripts do it; enlarged, that would be blocks.
    by = Image.Resampling.BOX if min(picture.size) >= size else Image.Resampling.BILINEAR
    return ImageOps.fit(picture, (size, size), by) if crop else picture.resize((size, size), by)


def pixels_of(picture: Image.Image) -> Pixels:
    """A picture's numbers, ``(c, h, w)``."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
