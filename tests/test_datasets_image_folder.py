"""People's own folders: classes from folders or a seed, any picture, broken files named, files that change."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snail import NearestNeighbour, evaluate
from snail.datasets import ImageFolder, image_folder, prepared
from snail.datasets.image_folder import class_folders

COLOURS = {"ant": (255, 0, 0), "bee": (0, 255, 0), "cat": (0, 0, 255), "dog": (255, 255, 0), "elk": (0, 255, 255)}


def fill(folder: Path, classes: dict[str, tuple[int, int, int]] = COLOURS, images: int = 3) -> Path:
    formats = ("png", "jpg", "bmp", "webp", "JPEG")
    for name, colour in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(images):
            picture = Image.new("RGB", (30 + 7 * i, 50), colour)
            picture.save(folder / name / f"{i}.{formats[i % len(formats)]}")
    return folder


def means(data: ImageFolder, part: str) -> dict[str, list[int]]:
    images, found, start = data.images(part), {}, 0
    for name, count in zip(images.class_names, images.counts, strict=True):
        colour = images.pixels[start : start + count].float().mean((0, 2, 3)).round().int().tolist()
        found[name], start = colour, start + count
    return found


def test_pictures_of_any_size_and_format_become_images(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path / "pets"), image_size=16, shares=(0, 0, 1))
    images = data.images("test")
    assert images.pixels.shape == (15, 3, 16, 16) and images.counts == (3,) * 5
    for name, colour in means(data, "test").items():
        assert max(abs(a - b) for a, b in zip(colour, COLOURS[name], strict=True)) <= 3  # JPEG


def test_grey_is_one_channel(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path / "pets"), image_size=16, grey=True, shares=(0, 0, 1))
    assert data.images("test").pixels.shape == (15, 1, 16, 16)


def test_classes_are_split_by_a_seed_and_no_class_is_in_two_parts(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {f"class{i}": (i, i, i) for i in range(25)}, images=1)
    parts = {part: ImageFolder(root, image_size=8).files(part) for part in ("train", "val", "test")}
    assert [len(classes) for classes in parts.values()] == [16, 4, 5]
    assert len(set().union(*parts.values())) == 25
    again = {part: ImageFolder(root, image_size=8).files(part) for part in parts}
    assert again == parts
    other = ImageFolder(root, image_size=8, split_seed=1)
    assert other.files("test").keys() != parts["test"].keys()
    assert (ImageFolder(root).split, other.split) == ("seed0", "seed1")


def test_a_new_class_moves_few_others(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {f"class{i}": (i, i, i) for i in range(25)}, images=1)
    before = ImageFolder(root).files("train").keys()
    fill(root, {"new": (9, 9, 9)}, images=1)
    assert len(before - ImageFolder(root).files("train").keys()) <= 1


def test_folders_say_which_classes_are_for_what(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    fill(root / "train", {name: COLOURS[name] for name in ("ant", "bee", "cat")})
    fill(root / "test", {name: COLOURS[name] for name in ("dog", "elk")})
    data = ImageFolder(root, image_size=8)
    assert data.split == "folders" and data.dataset == "pets"
    assert (data.images("train").class_names, data.images("test").class_names) == (
        ("ant", "bee", "cat"),
        ("dog", "elk"),
    )
    with pytest.raises(FileNotFoundError, match=r"has train and test, but no folder val"):
        data.images("val")


def test_episodes_of_a_folder_are_scored(tmp_path: Path) -> None:
    data = ImageFolder(fill(tmp_path / "pets"), image_size=8, shares=(0, 0, 1))
    result = evaluate(NearestNeighbour(5), data.episodes("test", shots=1, count=20))
    assert result.accuracy == 100
    assert (result.facts["dataset"], result.facts["split"]) == ("pets", "seed0/test")


def test_hidden_files_and_folders_and_what_is_no_picture_do_not_count(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"ant": (1, 1, 1), "bee": (2, 2, 2)}, images=2)
    (root / ".hidden").mkdir()
    Image.new("RGB", (8, 8)).save(root / ".hidden" / "0.png")
    (root / "ant" / "notes.txt").write_text("not a picture")
    (root / "ant" / "._0.png").write_text("left by another system")
    (root / "empty").mkdir()
    assert {name: len(files) for name, files in class_folders(root).items()} == {"ant": 2, "bee": 2}


def test_an_empty_folder_says_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no folder with pictures .*one for each class is needed"):
        ImageFolder(tmp_path).images("train")
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder"):
        ImageFolder(tmp_path / "nowhere").images("train")


def test_broken_files_are_named_and_left_out_only_on_request(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets")
    (root / "bee" / "1.jpg").write_bytes(b"not a picture")
    whole = (root / "cat" / "2.bmp").read_bytes()
    (root / "cat" / "2.bmp").write_bytes(whole[: len(whole) // 2])
    strict = ImageFolder(root, image_size=8, shares=(0, 0, 1))
    with pytest.raises(ValueError, match=r"2 of 15 files .*bee/1\.jpg, .*cat/2\.bmp; remove them, or .*skip_broken"):
        strict.images("test")
    lenient = ImageFolder(root, image_size=8, shares=(0, 0, 1), skip_broken=True)
    with pytest.warns(UserWarning, match=r"left out.*bee/1\.jpg, .*cat/2\.bmp"):
        assert lenient.images("test").counts == (3, 2, 2, 3, 3)


def test_what_goes_wrong_with_whole_files_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*args: object, **how: object) -> None:
        raise ValueError("another process changed it")

    monkeypatch.setattr(prepared, "prepare", prepare)
    with pytest.raises(ValueError, match=r"^another process changed it$"):
        ImageFolder(fill(tmp_path / "pets"), image_size=8, shares=(0, 0, 1)).images("test")


def test_images_are_kept_and_made_again_only_when_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "pets")
    opened: list[Path] = []
    real = image_folder.open_picture
    monkeypatch.setattr(image_folder, "open_picture", lambda path: opened.append(path) or real(path))

    def load() -> torch.Tensor:
        opened.clear()
        return ImageFolder(root, image_size=8, shares=(0, 0, 1)).images("test").pixels

    first = load()
    assert len(opened) == 15
    assert torch.equal(load(), first) and not opened
    Image.new("RGB", (20, 20), (10, 20, 30)).save(root / "ant" / "0.png")
    os.utime(root / "ant" / "0.png", (1, 1))
    assert load()[0, :, 0, 0].tolist() == [10, 20, 30] and len(opened) == 15
    (root / "elk" / "0.png").unlink()
    assert len(load()) == 14


def test_a_folder_that_cannot_be_written_is_kept_in_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "pets")
    real = prepared.prepare

    def prepare(source: object, path: Path, **how: object) -> None:
        if root in path.parents:
            raise PermissionError(path)
        real(source, path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared, "prepare", prepare)
    assert len(ImageFolder(root, image_size=8, shares=(0, 0, 1)).images("test")) == 15
    assert not (root / ".snail").exists()
    assert list((tmp_path / "cache" / "snail").glob("test_8_*.npy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size is 0 pixels"),
        ({"shares": (1, -1, 1)}, r"shares are \[1, -1, 1\]"),
        ({"shares": (0, 0, 0)}, "one at least must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, **options)  # type: ignore[arg-type]


def test_a_part_without_a_class_says_so(tmp_path: Path) -> None:
    root = fill(tmp_path / "pets", {"ant": (1, 1, 1)})
    with pytest.raises(FileNotFoundError, match=r"no class of .* is for val"):
        ImageFolder(root).images("val")


def test_pictures_are_cut_not_squeezed(tmp_path: Path) -> None:
    picture = np.zeros((10, 30, 3), np.uint8)
    picture[:, 10:20] = 255
    pixels = ImageFolder(tmp_path, image_size=10).to_pixels(Image.fromarray(picture))
    assert pixels.shape == (3, 10, 10) and pixels.min() == 255
