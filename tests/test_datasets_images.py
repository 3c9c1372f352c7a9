import hashlib
from typing import Any

import numpy as np
import pytest
import torch

from snail.datasets import Images
from snail.datasets.images import split_hash


def numbered(counts: tuple[int, ...] = (2, 3), size: int = 2) -> Images:
    """Grey images whose bytes are all different."""
    shape = (sum(counts), 1, size, size)
    pixels = torch.arange(sum(counts) * size * size, dtype=torch.uint8).reshape(shape)
    return Images(pixels, tuple(f"class{i}" for i in range(len(counts))), counts)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pixels": torch.zeros(5, 1, 2, 2)}, r"pixels of shape \(5, 1, 2, 2\) and dtype torch.float32; uint8"),
        ({"pixels": torch.zeros(5, 2, 2, dtype=torch.uint8)}, r"pixels of shape \(5, 2, 2\).*\(m, c, h, w\)"),
        ({"class_names": ("a", "a")}, "2 class names, 1 of them different, for 2 classes"),
        ({"class_names": ("a",)}, "1 class names, 1 of them different, for 2 classes"),
        ({"counts": (5,)}, "2 class names, 2 of them different, for 1 classes"),
        ({"counts": (2, 2)}, "the classes count 4 images, but there are 5"),
        ({"counts": (3, 3)}, "the classes count 6 images, but there are 5"),
    ],
)
def test_images_rejects_parts_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    good = {"pixels": torch.zeros(5, 1, 2, 2, dtype=torch.uint8), "class_names": ("a", "b"), "counts": (2, 3)}
    with pytest.raises(ValueError, match=message):
        Images(**(good | changed))


def test_images_length_is_the_number_of_images() -> None:
    assert len(numbered((2, 3))) == 5


def test_images_take_scales_bytes_to_one() -> None:
    pixels = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).reshape(1, 1, 2, 2)
    taken = Images(pixels, ("a",), (1,)).take(torch.tensor([0]))
    assert taken.dtype == torch.float32
    assert taken.flatten().tolist() == pytest.approx([0, 0.2, 0.4, 1])


@pytest.mark.parametrize("indices", [torch.tensor(3), torch.tensor([4, 0, 4]), torch.tensor([[1, 2, 0], [4, 3, 3]])])
def test_images_take_gives_the_image_at_each_index(indices: torch.Tensor) -> None:
    images = numbered()
    taken = images.take(indices)
    assert taken.shape == (*indices.shape, 1, 2, 2)
    assert torch.equal((taken * 255).round().byte(), images.pixels[indices])


def test_images_take_leaves_the_pixels_as_they_were() -> None:
    images = numbered()
    images.take(torch.arange(5)).zero_()
    assert torch.equal(images.pixels, numbered().pixels)


def test_images_to_keeps_names_and_counts() -> None:
    there = numbered().to("meta")
    assert there.pixels.device.type == "meta"
    assert (there.class_names, there.counts) == (("class0", "class1"), (2, 3))


def test_images_from_classes_keeps_classes_together() -> None:
    array = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    images = Images.from_classes(array, ["a", "b"])
    assert (images.class_names, images.counts) == (("a", "b"), (3, 3))
    assert images.pixels.shape == (6, 1, 4, 4)
    assert np.array_equal(images.pixels[4, 0].numpy(), array[1, 1])


def test_images_from_classes_takes_a_view_that_is_not_contiguous() -> None:
    array = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)[::-1, :, :, ::-1]
    assert np.array_equal(Images.from_classes(array, ["a", "b"]).pixels[0, 0].numpy(), array[0, 0])


def test_rotations_are_classes_of_their_own_and_unrotated_comes_first() -> None:
    turned = numbered((2, 3)).with_rotations()
    assert turned.class_names == (
        *("class0/rot000", "class1/rot000", "class0/rot090", "class1/rot090"),
        *("class0/rot180", "class1/rot180", "class0/rot270", "class1/rot270"),
    )
    assert turned.counts == (2, 3) * 4
    assert torch.equal(turned.pixels[:5], numbered().pixels)


def test_rotations_turn_each_image_by_quarter_turns() -> None:
    images = numbered((1, 2), size=3)
    turned = images.with_rotations()
    for quarter in range(4):
        for i in range(3):
            by_hand = np.rot90(images.pixels[i, 0].numpy(), quarter)
            assert np.array_equal(turned.pixels[3 * quarter + i, 0].numpy(), by_hand)


def test_mirror_images_are_classes_of_their_own_behind_the_others() -> None:
    images = numbered((1, 2), size=3)
    both = images.with_mirror_images()
    assert both.class_names == ("class0", "class1", "class0/mirrored", "class1/mirrored")
    assert both.counts == (1, 2, 1, 2)
    assert torch.equal(both.pixels[:3], images.pixels)
    assert np.array_equal(both.pixels[4, 0].numpy(), images.pixels[1, 0].numpy()[::-1])


def test_turns_and_mirror_images_are_all_eight_symmetries_of_a_square() -> None:
    images = numbered((1,), size=3).with_rotations().with_mirror_images()
    one = numbered((1,), size=3).pixels[0, 0].numpy()
    symmetries = {np.rot90(way, k).tobytes() for way in (one, one.T) for k in range(4)}
    assert {pixels[0].numpy().tobytes() for pixels in images.pixels} == symmetries and len(symmetries) == 8


def test_the_first_classes_are_had_with_all_their_images() -> None:
    images = numbered((1, 2, 3), size=3)
    first = images.first(2)
    assert (first.class_names, first.counts) == (images.class_names[:2], (1, 2))
    assert torch.equal(first.pixels, images.pixels[:3])
    assert torch.equal(images.first(3).pixels, images.pixels)
    for classes in (0, 4):
        with pytest.raises(ValueError, match=f"the first {classes} of 3 classes cannot be had"):
            images.first(classes)


def test_rotations_do_not_touch_the_original() -> None:
    images = numbered()
    images.with_rotations().pixels.zero_()
    assert torch.equal(images.pixels, numbered().pixels)


def test_split_hash_is_the_sha256_of_the_sorted_names_one_a_line() -> None:
    assert split_hash(["b", "a/2", "a/1"]) == hashlib.sha256(b"a/1\na/2\nb\n").hexdigest()
    # printf 'a/1\na/2\nb\n' | sha256sum
    assert split_hash(["b", "a/2", "a/1"]) == "7b8a1ba6cde17f4654152988d0782923618fa88798a580f4d56ca34445183cbf"


def test_split_hash_depends_on_the_names_and_not_on_their_order() -> None:
    assert split_hash(["x", "y"]) == split_hash(iter(("y", "x")))
    assert split_hash(["x", "y"]) != split_hash(["x", "z"])
    assert split_hash(["x", "y"]) != split_hash(["xy"])


def test_split_hash_encodes_names_as_utf8() -> None:
    assert split_hash(["ב"]) == hashlib.sha256(b"\xd7\x91\n").hexdigest()
