"""Glyphs, the built-in data: characters that the package draws itself, so that everything runs without a download."""

from __future__ import annotations

from typing import Any

from PIL import Image

from .decoding import ink_of, pixels_of
from .drawing import draw_glyphs
from .images import Images
from .module import ImageData
from .prepared import Pixels

__all__ = ["Glyphs"]

CLASSES = {"train": 1000, "val": 100, "test": 200}
DRAWINGS = 20
SIZE = 28  # pixels a side


class Glyphs(ImageData):
    """The built-in data set: 1,300 handwritten-looking characters of 20 drawings, 28x28, drawn in seconds.

    1,000 characters are for training, 100 for validation, 200 for test.

    Args:
        glyph_seed: Seed of the characters. Another seed is another data set.
        **kwargs: See ``ImageData``.
    """

    dataset = "glyphs"
    ink = True
    default_test_episodes = 1000  # a first run is over in minutes

    def __init__(self, glyph_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.glyph_seed = glyph_seed
        self.split = f"seed{glyph_seed}"

    def load(self, part: str) -> Images:
        """See ``ImageData.load``."""
        parts = list(CLASSES)
        first = sum(CLASSES[before] for before in parts[: parts.index(part)])
        names = [f"seed{self.glyph_seed}/glyph{first + i:04d}" for i in range(CLASSES[part])]
        drawn = draw_glyphs(CLASSES[part], DRAWINGS, seed=self.glyph_seed, first=first, size=SIZE)
        return Images.from_classes(drawn, names)

    def to_pixels(self, picture: Image.Image) -> Pixels:
        """See ``ImageData.to_pixels``: 28x28, ink 255 on 0, whichever of ink and paper was the lighter."""
        return pixels_of(ink_of(picture, SIZE))
