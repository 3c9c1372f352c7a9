"""Any torch data set of images with labels as a source of episodes."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .decoding import pixels_of, resized
from .images import Images
from .module import ImageData
from .prepared import Pixels

__all__ = ["TorchDataset"]


class TorchDataset(ImageData):
    """A torch data set that yields ``(image, label)``, for each part one whose classes the other parts do not have.

    ``TorchDataset(test=CIFAR100("data")).episodes("test", shots=1)`` scores a learner on any of torchvision's.

    Args:
        train: Training classes; likewise ``val`` and ``test``. Images are Pillow's, or tensors or arrays: uint8
            ``(c, h, w)`` or floating in [0, 1], before any normalisation. Labels are integers or words.
        val: See ``train``.
        test: See ``train``.
        name: What results call it.
        image_size: Height and width that Pillow's images are cut to; ``None``: as they are, all of one size.
        **kwargs: See ``ImageData``.
    """

    split = "given"

    def __init__(
        self,
        train: Dataset[Any] | None = None,
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        name: str = "",
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._given = {"train": train, "val": val, "test": test}
        present = [dataset for dataset in self._given.values() if dataset is not None]
        self.dataset = name or (type(present[0]).__name__.lower() if present else "none")
        self.image_size = image_size

    def load(self, part: str) -> Images:
        """See ``ImageData.load``.

        Raises:
            ValueError: If the part was not given, an item is no image with a label, or images differ in shape.
        """
        dataset = self._given[part]
        if dataset is None:
            raise ValueError(f"no data set was given for {part}; TorchDataset({part}=...) takes one")
        classes: dict[Any, list[Pixels]] = {}
        for i in range(len(cast(Sized, dataset))):
            item = dataset[i]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise ValueError(f"item {i} of {self.dataset} is {type(item).__name__}; (image, label) is needed")
            image, label = item
            key = label.item() if isinstance(label, (Tensor, np.generic)) else label
            classes.setdefault(key, []).append(self._pixels(image, i))
        shapes = {pixels.shape for members in classes.values() for pixels in members}
        if len(shapes) != 1:
            raise ValueError(f"images of {self.dataset} have the shapes {sorted(shapes)[:3]}; give image_size")
        known: Sequence[Any] | None = getattr(dataset, "classes", None)
        keys = sorted(classes)
        names = [str(known[key]) if known is not None and isinstance(key, int) else str(key) for key in keys]
        pixels = np.stack([pixels for key in keys for pixels in classes[key]])
        return Images(torch.from_numpy(pixels), tuple(names), tuple(len(classes[key]) for key in keys))

    def _pixels(self, image: Any, i: int) -> Pixels:
        if isinstance(image, Image.Image):
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
            size = self.image_size
            return pixels_of(image.convert(mode) if size is None else resized(image, size, mode=mode, crop=True))
        array = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise ValueError(
                f"image {i} of {self.dataset} has the shape {array.shape}; (c, h, w) with 1 or 3 colours is needed"
            )
        if array.dtype == np.uint8:
            return array
        if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"image {i} of {self.dataset} is {array.dtype} from {array.min():g} to {array.max():g}; uint8, or "
                f"numbers in [0, 1] before any normalisation, are needed"
            )
        return np.asarray((array * 255).round(), dtype=np.uint8)
