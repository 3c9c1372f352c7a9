"""Any torch data set of (image, label) is a source of episodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from snail import NearestNeighbour, evaluate
from snail.datasets import TorchDataset


class Listed(Dataset[Any]):
    def __init__(self, items: list[Any], classes: list[str] | None = None) -> None:
        self.items = items
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def shaded(label: int, size: int = 8) -> np.ndarray:
    return np.full((3, size, size), 20 * label, np.uint8)


def test_one_line_makes_episodes_of_a_torch_data_set() -> None:
    shades = torch.arange(6).repeat_interleave(3)  # three images of each class, all of one shade
    dataset = TensorDataset((shades / 6).view(18, 1, 1, 1).expand(18, 3, 8, 8), shades)
    result = evaluate(NearestNeighbour(5), TorchDataset(test=dataset).episodes("test", shots=1, count=10))
    assert result.accuracy == 100
    assert (result.facts["dataset"], result.facts["split"]) == ("tensordataset", "given/test")


def test_images_are_gathered_by_label_in_whatever_order_they_come() -> None:
    labels = [2, 0, 1, 0, 2]
    images = TorchDataset(train=Listed([(shaded(y), y) for y in labels])).images("train")
    assert (images.class_names, images.counts) == (("0", "1", "2"), (2, 1, 2))
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 0, 20, 40, 40]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGB", (8, 8), (51, 102, 204)),
        torch.tensor([51, 102, 204], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8),
        torch.tensor([51, 102, 204]).view(3, 1, 1).expand(3, 8, 8) / 255,
        np.array([0.2, 0.4, 0.8]).reshape(3, 1, 1) * np.ones((3, 8, 8)),
    ],
    ids=["Pillow", "uint8 tensor", "float tensor", "float array"],
)
def test_images_of_every_kind_are_taken(image: Any) -> None:
    images = TorchDataset(test=Listed([(image, "blue")])).images("test")
    assert images.pixels.shape == (1, 3, 8, 8) and images.class_names == ("blue",)
    assert images.pixels[0, :, 0, 0].tolist() == [51, 102, 204]


def test_floats_become_the_nearest_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    pixels = TorchDataset(test=Listed([(levels / 255, 0)])).images("test").pixels
    assert torch.equal(pixels[0], levels)
    between = torch.tensor([0.6, 0.4, 254.6]).view(3, 1, 1) / 255  # as resizing leaves them: the nearest level counts
    pixels = TorchDataset(test=Listed([(between, 0)])).images("test").pixels
    assert pixels.flatten().tolist() == [1, 0, 255]


def test_grey_pictures_have_one_channel_and_sizes_are_made_one_on_request() -> None:
    items = [(Image.new("L", (9, 12), 7), 0), (Image.new("L", (20, 8), 9), 1)]
    with pytest.raises(ValueError, match=r"shapes \[\(1, 8, 20\), \(1, 12, 9\)\]; give image_size"):
        TorchDataset(test=Listed(items)).images("test")
    assert TorchDataset(test=Listed(items), image_size=6).images("test").pixels.shape == (2, 1, 6, 6)


def test_labels_may_be_tensors_and_names_come_from_the_data_set() -> None:
    dataset = Listed([(shaded(1), torch.tensor(1)), (shaded(0), np.int64(0))], classes=["cat", "dog"])
    assert TorchDataset(val=dataset, name="pets").images("val").class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (7, r"item 0 of listed is int; \(image, label\) is needed"),
        ((torch.zeros(8, 8), 0), r"has the shape \(8, 8\); \(c, h, w\)"),
        ((torch.zeros(8, 8, 3), 0), r"has the shape \(8, 8, 3\)"),
        ((torch.full((3, 8, 8), -1.5), 0), r"float32 from -1\.5 to -1\.5; uint8, or numbers in \[0, 1\]"),
        ((torch.zeros(3, 8, 8, dtype=torch.int64), 0), r"is int64 from 0 to 0"),
    ],
)
def test_what_is_no_image_with_a_label_is_refused(item: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchDataset(test=Listed([item])).images("test")


def test_a_part_that_was_not_given_says_so() -> None:
    with pytest.raises(ValueError, match=r"no data set was given for val; TorchDataset\(val=\.\.\.\)"):
        TorchDataset(test=Listed([(shaded(0), 0)])).images("val")
