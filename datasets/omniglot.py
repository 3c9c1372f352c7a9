"""Omniglot (Lake et al., 2015): 1,623 handwritten characters of 20 drawings, 28x28."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from .decoding import ink_of, pixels_of
from .images import Images
from .module import ImageData
from .omniglot_reader import SIZE, download_omniglot, omniglot_split, read_omniglot
from .prepared import Pixels

__all__ = ["Omniglot"]


class Omniglot(ImageData):
    """Omniglot with every training character also turned by 90, 180 and 270 degrees, each turn a class of its own.

    Validation and test characters are not turned, and no character is in two parts.

    Args:
        root: Folder that holds, or is to hold, ``omniglot-py`` as torchvision knows it: the zips, or what they
            hold. Omniglot is downloaded into it where it is missing.
        split: ``vinyals``: 1,028 / 172 / 423 characters, mostly whole alphabets held out; ``random``: the same
            numbers drawn at random, the paper's protocol (of its 1,200 training characters, 172 validate).
        rotations: Whether turned training characters are classes too.
        mirrored: Whether mirror images of all these are classes too; the paper has none.
        train_on_validation: Whether the validation characters are trained on as well, for a final run with everything
            settled; there is no validation then.
        **kwargs: See ``ImageData``.
    """

    dataset = "omniglot"
    ink = True

    def __init__(
        self,
        root: Path = Path("data"),
        split: Literal["vinyals", "random"] = "vinyals",
        rotations: bool = True,
        mirrored: bool = False,
        train_on_validation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if train_on_validation:
            self.eval_episodes["val"] = 0
        self.root = Path(root).expanduser()
        self.split = split
        self.rotations = rotations
        self.mirrored = mirrored
        self.train_on_validation = train_on_validation

    @property
    def trained_on(self) -> str:
        """See ``EpisodeData.trained_on``."""
        return "training and validation characters" if self.train_on_validation else ""

    @property
    def changes(self) -> list[str]:
        """See ``EpisodeData.changes``; it tells of mirror images."""
        return ["mirror images too"] * self.mirrored + super().changes

    @cached_property
    def _drawings(self) -> tuple[list[str], np.ndarray]:
        return read_omniglot(self.root)

    def prepare_data(self) -> None:
        """Download what is missing."""
        download_omniglot(self.root)

    def to_pixels(self, picture: Image.Image) -> Pixels:
        """See ``ImageData.to_pixels``: 28x28, ink 255 on 0, whichever of ink and paper was the lighter."""
        return pixels_of(ink_of(picture, SIZE))

    def load(self, part: str) -> Images:
        """See ``ImageData.load``."""
        names, drawings = self._drawings
        parts = omniglot_split(names, self.split)
        chosen = parts["train"] + parts["val"] if part == "train" and self.train_on_validation else parts[part]
        place = {name: i for i, name in enumerate(names)}
        images = Images.from_classes(drawings[[place[name] for name in chosen]], chosen)
        if part != "train":
            return images
        images = images.with_rotations() if self.rotations else images
        return images.with_mirror_images() if self.mirrored else images
