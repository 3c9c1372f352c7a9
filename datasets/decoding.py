"""From a picture in a file to the pixels that a network reads.

Axes: ``c`` colour channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .prepared import Pixels

__all__ = ["EXTENSIONS", "ink_of", "is_picture", "open_picture", "pixels_of", "resized"]

EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What files that hold a picture are called."""


def is_picture(path: Path) -> bool:
    """Whether a file is called like a picture; hidden ones, such as macOS's ``._1.jpg``, are none."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


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
    picture = _opaque(picture).convert(mode)
    if picture.size == (size, size):
        return picture
    # Shrunk by the mean over an area, as the field's scripts do it; enlarged, that would be blocks.
    by = Image.Resampling.BOX if min(picture.size) >= size else Image.Resampling.BILINEAR
    return ImageOps.fit(picture, (size, size), by) if crop else picture.resize((size, size), by)


def pixels_of(picture: Image.Image) -> Pixels:
    """A picture's numbers, ``(c, h, w)``."""
    array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def ink_of(picture: Image.Image, size: int) -> Image.Image:
    """A drawing as grey levels of ink, 255 on 0, whichever of ink and paper was the darker; ``size`` pixels a side.

    What covers more of the picture is taken for the paper; what is transparent is white.
    """
    grey = _opaque(picture).convert("L")  # mode "1" would be resized by nearest neighbour
    if np.median(np.asarray(grey)) > 127:
        grey = ImageOps.invert(grey)
    # HAMMING keeps strokes at nearly full ink, where BILINEAR fades them, and it commutes with quarter turns,
    # of which other classes are made, to a grey level, where BOX, BICUBIC and LANCZOS are off by 20 to 60.
    return grey.resize((size, size), Image.Resampling.HAMMING)


def _opaque(picture: Image.Image) -> Image.Image:
    """The same picture on white, in 8 bits."""
    if picture.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255; "I", of 32, may hold 8
        levels = np.asarray(picture)
        shift = 0 if picture.mode == "I" and levels.max() < 256 else 8
        return Image.fromarray((levels >> shift).clip(0, 255).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture
