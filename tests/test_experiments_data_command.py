"""``snail data``: images made ready once, and told of truthfully."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snail.datasets import Images, MiniImageNet
from snail.datasets.images import split_hash
from snail.experiments import data_command
from snail.experiments.cli import main

Capture = pytest.CaptureFixture[str]


def folder(root: Path, parts: dict[str, list[int]]) -> Path:
    """A folder for each part with a class for each shade, two pictures each."""
    for part, shades in parts.items():
        for shade in shades:
            (root / part / f"{part}{shade}").mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (90, 90), (shade, i, 0)).save(root / part / f"{part}{shade}" / f"{i}.png")
    return root


def test_prepare_makes_ready_what_is_there(tmp_path: Path, capfd: Capture) -> None:
    root = folder(tmp_path / "mine", {"train": [1, 2, 3], "test": [4, 5]})
    assert main(["data", "prepare", "folder", "--root", str(root)]) == 0
    train, test = (split_hash(names)[:12] for names in (("train1", "train2", "train3"), ("test4", "test5")))
    assert capfd.readouterr().out.splitlines() == [
        f"train: 3 classes of 2 images, 3 x 84 x 84, 0 MB, split hash {train}",
        "val: not there",
        f"test: 2 classes of 2 images, 3 x 84 x 84, 0 MB, split hash {test}",
    ]
    assert sorted(path.name for path in (root / ".snail").glob("*.npy")) == ["test_84.npy", "train_84.npy"]


def test_check_tells_what_is_there_and_draws_it(tmp_path: Path, capfd: Capture) -> None:
    root, sheet = folder(tmp_path / "mine", {"train": [1, 2, 3], "test": [4, 5]}), tmp_path / "sheet.png"
    assert main(["data", "check", "folder", "--root", str(root), "--picture", str(sheet)]) == 0
    printed = capfd.readouterr().out
    assert "train: 3 classes of 2 images, 3 x 84 x 84, 0 MB, split hash " in printed
    assert "train and test share no classes and no images" in printed
    with Image.open(sheet) as picture:
        assert picture.height > 300  # five rows


def test_check_finds_images_that_are_in_two_parts_or_there_twice(tmp_path: Path, capfd: Capture) -> None:
    root = folder(tmp_path / "mine", {"train": [1, 2, 3], "test": [3, 4]})
    (root / "test" / "train1").mkdir()
    Image.new("RGB", (84, 84), (200, 0, 0)).save(root / "test" / "train1" / "0.png")
    Image.new("RGB", (84, 84), (200, 0, 0)).save(root / "test" / "train1" / "1.png")
    assert main(["data", "check", "folder", "--root", str(root)]) == 1
    printed = capfd.readouterr().out
    assert "train and test share 1 classes and 2 images" in printed
    assert "test: 3 classes of 2 images, 3 x 84 x 84, 0 MB, split hash" in printed
    assert printed.count("1 images are copies of others") == 1


def test_an_image_in_two_parts_is_wrong_also_under_another_class(tmp_path: Path, capfd: Capture) -> None:
    root = folder(tmp_path / "mine", {"train": [1, 2], "test": [2, 4]})
    assert main(["data", "check", "folder", "--root", str(root)]) == 1
    assert "train and test share no classes and 2 images" in capfd.readouterr().out


@pytest.mark.parametrize("action", ["prepare", "check"])
def test_nothing_there_is_one_sentence(action: str, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert main(["data", action, "mini_imagenet", "--root", str(tmp_path)]) == 1
    error = capfd.readouterr().err
    assert error.startswith("snail: error: the train classes of miniImageNet are not in") and "holds notes.txt" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prepare", "cifar", "--root", "x"], "invalid choice: 'cifar'"),
        (["prepare", "omniglot"], "the following arguments are required: --root"),
        (["prepare", "omniglot", "--root", "x", "--from", "y"], "--from and --download are for mini_imagenet"),
        (["prepare", "folder", "--root", "x", "--download"], "--from and --download are for mini_imagenet"),
        (
            ["check", "folder", "--root", "x", "--picture", "no/such/place.png"],
            "must name a file in a folder that exists",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(argv: list[str], message: str, capfd: Capture) -> None:
    assert main(["data", *argv]) == 1
    assert message in capfd.readouterr().err


def test_from_and_download_go_where_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    asked: list[tuple[object, ...]] = []
    few = Images.from_classes(np.zeros((2, 2, 84, 84), np.uint8), ["a", "b"])
    monkeypatch.setattr(data_command, "download_mini_imagenet", lambda root: asked.append(("download", root)))
    monkeypatch.setattr(
        data_command, "prepare_mini_imagenet", lambda root, part, source: asked.append((root, part, source))
    )
    monkeypatch.setattr(MiniImageNet, "load", lambda self, part: few)
    root = tmp_path / "root"
    assert main(["data", "prepare", "mini_imagenet", "--root", str(root), "--from", str(tmp_path), "--download"]) == 0
    assert asked == [("download", root), *((root, part, tmp_path) for part in ("train", "val", "test"))]


def test_omniglot_is_told_of(omniglot_root: Path, capfd: Capture) -> None:
    assert main(["data", "check", "omniglot", "--root", str(omniglot_root)]) == 0
    printed = capfd.readouterr().out
    assert "train: 4,112 classes of 20 images, 1 x 28 x 28, 64 MB" in printed
    assert "val and test share no classes and no images" in printed
