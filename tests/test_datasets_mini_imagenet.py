import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import snail.datasets
from snail.datasets import MiniImageNet, mini_imagenet, prepared
from snail.datasets import mini_imagenet_reader as reader
from snail.datasets.images import Images
from snail.datasets.mini_imagenet import prepare_mini_imagenet, prepared_paths
from snail.datasets.prepared import Source, open_prepared

CLASSES = {
    "train": ("n01532829", "n01558993", "n01704323"),
    "val": ("n01855672", "n02091244"),
    "test": ("n01930112", "n01981276"),
}
COUNT = 5  # images of each class


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miniImageNet of a few classes of a few images."""
    for module in (reader, mini_imagenet):
        monkeypatch.setattr(module, "mini_imagenet_classes", lambda: CLASSES)
        monkeypatch.setattr(module, "IMAGES", COUNT)


def noise(name: str, number: int) -> Any:
    return np.random.default_rng([int(name[1:]), number]).integers(256, size=(84, 84, 3), dtype=np.uint8)


def draw(root: Path, part: str) -> None:
    """A part as a csv file and images of noise, without loss."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = ["filename,label"]
    for name in reversed(CLASSES[part]):
        for number in range(COUNT):
            Image.fromarray(noise(name, number)).save(root / "images" / f"{name}{number:08d}.png")
            lines.append(f"{name}{number:08d}.png,{name}")
    (root / f"{part}.csv").write_text("\n".join(lines) + "\n")


def is_part(images: Images, part: str) -> bool:
    """Whether these are the images that were drawn, class after class in the order of the names."""
    expected = np.stack([noise(name, number) for name in CLASSES[part] for number in range(COUNT)])
    return (
        (images.class_names, images.counts) == (CLASSES[part], (COUNT,) * len(CLASSES[part]))
        and images.pixels.dtype == torch.uint8
        and np.array_equal(images.pixels.numpy(), expected.transpose(0, 3, 1, 2))
    )


def take_away_images(root: Path) -> None:
    shutil.rmtree(root / "images")
    for table in root.glob("*.csv"):
        table.unlink()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Training and validation classes; those for test are not there."""
    for part in ("train", "val"):
        draw(tmp_path / "data", part)
    return tmp_path / "data"


def refuse_writing(monkeypatch: pytest.MonkeyPatch, error: OSError, *folders: Path) -> list[Path]:
    """Stand in for folders that cannot be written, which the superuser could all the same; gives where it was tried."""
    tried: list[Path] = []
    prepare = prepared.prepare

    def guarded(source: Source, path: Path, **how: Any) -> None:
        tried.append(path)
        if any(path.is_relative_to(folder) for folder in folders):
            raise error
        prepare(source, path, **how)

    monkeypatch.setattr(prepared, "prepare", guarded)
    return tried


def test_miniimagenet_is_one_of_the_data_sets() -> None:
    assert "MiniImageNet" in snail.datasets.__all__
    assert (MiniImageNet.dataset, MiniImageNet.split) == ("mini_imagenet", "ravi")
    assert MiniImageNet().root == Path("data/mini_imagenet")
    assert MiniImageNet(Path("~/data")).root == Path.home() / "data"


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_is_prepared_when_it_is_used_first(root: Path, part: str) -> None:
    data = MiniImageNet(root)
    assert not (root / "prepared").exists()
    assert is_part(data.images(part), part)
    assert sorted(path.name for path in (root / "prepared").iterdir()) == [
        f"mini_imagenet_{part}.json",
        f"mini_imagenet_{part}.npy",
    ]
    about = json.loads((root / "prepared" / f"mini_imagenet_{part}.json").read_text())
    assert about["source"] == f"{part}.csv and images in images/"


def test_a_part_that_is_prepared_is_opened_without_its_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MiniImageNet(root).load("val")

    def look(*args: object) -> None:
        raise AssertionError("looked for images although there is an array")

    monkeypatch.setattr(mini_imagenet, "find_source", look)
    assert is_part(MiniImageNet(root).load("val"), "val")
    take_away_images(root)
    assert is_part(MiniImageNet(root).load("val"), "val")


def test_arrays_are_all_that_has_to_be_carried_elsewhere(root: Path, tmp_path: Path) -> None:
    MiniImageNet(root).load("val")
    shutil.copytree(root / "prepared", tmp_path / "elsewhere" / "prepared")
    shutil.rmtree(root)
    assert is_part(MiniImageNet(tmp_path / "elsewhere").load("val"), "val")


def test_an_array_that_is_damaged_is_made_anew(root: Path) -> None:
    MiniImageNet(root).load("val")
    path = root / "prepared" / "mini_imagenet_val.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert is_part(MiniImageNet(root).load("val"), "val")


def test_parts_that_are_there_are_served_and_the_missing_one_says_what_it_expects(root: Path) -> None:
    data = MiniImageNet(root)
    assert is_part(data.images("train"), "train") and is_part(data.images("val"), "val")
    with pytest.raises(
        FileNotFoundError,
        match=r"the test classes of miniImageNet are not in .*data, which holds images, prepared, train\.csv, "
        r"val\.csv; one of these is needed: test\.csv with a folder of images; .*test_data\.hdf5",
    ):
        data.images("test")
    assert is_part(data.images("val"), "val")


def test_there_are_three_parts(root: Path) -> None:
    with pytest.raises(ValueError, match="there is no part 'valid'; choose train, val or test"):
        MiniImageNet(root).images("valid")


def test_episodes_are_of_the_classes_of_their_part(root: Path) -> None:
    episodes = MiniImageNet(root, ways=2, eval_queries=2).episodes("val", shots=3, count=4)
    assert episodes.images is not None and is_part(episodes.images, "val")
    assert next(iter(episodes)).support_x.shape == (4, 2 * 3, 3, 84, 84)
    with pytest.raises(ValueError, match="mini_imagenet/ravi/val"):
        MiniImageNet(root, ways=3).episodes("val", shots=3, count=1)


def test_pictures_from_elsewhere_become_its_images() -> None:
    pixels = MiniImageNet().to_pixels(Image.new("RGBA", (200, 100), (255, 0, 0, 255)))
    assert pixels.shape == (3, 84, 84)
    assert pixels.reshape(3, -1).min(1).tolist() == pixels.reshape(3, -1).max(1).tolist() == [255, 0, 0]


def test_images_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    before = sorted(root.rglob("*"))
    assert is_part(prepare_mini_imagenet(tmp_path / "made", "val", source=root), "val")
    assert sorted(root.rglob("*")) == before
    assert is_part(MiniImageNet(tmp_path / "made").load("val"), "val")
    with pytest.raises(FileNotFoundError, match="made, which holds prepared; one of these is needed"):
        MiniImageNet(tmp_path / "made").load("train")


def test_preparing_that_was_killed_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_picture = reader.open_picture

    def killed(path: Path) -> Image.Image:
        if path.name == "n0155899300000002.png" and path.name not in opened:
            opened.append(path.name)
            raise KeyboardInterrupt
        opened.append(path.name)
        return open_picture(path)

    monkeypatch.setattr(reader, "open_picture", killed)
    with pytest.raises(KeyboardInterrupt):
        MiniImageNet(root).load("train")
    opened[:] = ["n0155899300000002.png"]
    assert is_part(MiniImageNet(root).load("train"), "train")
    assert not [name for name in opened if name.startswith("n01532829")]
    assert len(opened) == 1 + 2 * COUNT


# -- where it cannot be written --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=lambda error: errno.errorcode[error.errno],
)
def test_the_cache_of_the_user_takes_what_the_folder_does_not(
    root: Path, tmp_path: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = refuse_writing(monkeypatch, error, root)
    assert is_part(MiniImageNet(root).load("val"), "val")
    assert tried == prepared_paths(root, "val")
    assert tried[1].parent == tmp_path / "cache" / "snail" and not (root / "prepared").exists()
    take_away_images(root)
    assert is_part(MiniImageNet(root).load("val"), "val")  # at once
    assert len(tried) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_the_cache_of_the_user_is_used_for_a_folder_that_is_read_only(root: Path) -> None:
    root.chmod(0o555)
    try:
        assert is_part(MiniImageNet(root).load("val"), "val")
        assert is_part(MiniImageNet(root).load("val"), "val")
    finally:
        root.chmod(0o755)
    assert not (root / "prepared").exists()


def test_a_folder_that_is_a_file_where_arrays_would_go_does_no_harm(root: Path) -> None:
    (root / "prepared").write_text("in the way")
    assert is_part(MiniImageNet(root).load("val"), "val")
    assert is_part(MiniImageNet(root).load("val"), "val")


def test_where_nothing_can_be_written_it_is_said(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "array.npy")
    tried = refuse_writing(monkeypatch, error, tmp_path)
    with pytest.raises(PermissionError, match=r"Permission denied: 'array\.npy'"):
        MiniImageNet(root).load("val")
    assert len(tried) == 2


# -- what is not miniImageNet ----------------------------------------------------------------------------------------


def rename_class(root: Path) -> None:
    table = root / "val.csv"
    table.write_text(table.read_text().replace(",n02091244", ",n02091831"))


def take_class_away(root: Path) -> None:
    table = root / "val.csv"
    table.write_text("\n".join(row for row in table.read_text().split("\n") if not row.endswith("n02091244")))


def take_image_away(root: Path) -> None:
    rows = (root / "val.csv").read_text().splitlines()
    (root / "val.csv").write_text("\n".join(rows[:-1]))


def add_image(root: Path) -> None:
    with (root / "val.csv").open("a") as file:
        file.write("n0209124400000001.png,n02091244\n")


def merge_parts(root: Path) -> None:
    rows = [(root / f"{part}.csv").read_text().split("\n", 1)[1] for part in ("train", "val")]
    (root / "val.csv").write_text("filename,label\n" + "".join(rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            rename_class,
            r"val\.csv and images in images/: the val classes of miniImageNet are 2, but there are 2, and n0209183",
        ),
        (rename_class, r"n02091831 is not one of them$"),
        (take_class_away, r"the val classes of miniImageNet are 2, but there are 1, and n02091244 is missing$"),
        (merge_parts, r"the val classes of miniImageNet are 2, but there are 5, and n01532829 is not one of them$"),
        (take_image_away, r"val\.csv and images in images/: class n01855672 has 4 images instead of 5$"),
        (add_image, r"class n02091244 has 6 images instead of 5$"),
    ],
)
def test_what_is_not_the_whole_of_a_part_is_refused(root: Path, change: Callable[[Path], None], message: str) -> None:
    change(root)
    with pytest.raises(ValueError, match=message):
        MiniImageNet(root).load("val")
    assert not (root / "prepared").exists()


def test_of_the_real_number_of_images_none_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the whole of miniImageNet
    names = mini_imagenet.mini_imagenet_classes()["val"]
    assert len(names) == 16

    def source(*counts: int) -> Source:
        return Source("here", names, (*counts, *(600,) * (16 - len(counts))), lambda i: [])

    mini_imagenet.check_source(source(600), "val")
    for count in (599, 601):
        with pytest.raises(ValueError, match=rf"^here: class {names[1]} has {count} images instead of 600$"):
            mini_imagenet.check_source(source(600, count), "val")


def test_classes_that_are_numbers_are_counted_alone() -> None:
    def source(*names: str) -> Source:
        return Source("here", names, (COUNT,) * len(names), lambda i: [])

    mini_imagenet.check_source(source("0", "17"), "val")
    with pytest.raises(ValueError, match=r"are 2, but there are 3, and 0 is not one of them"):
        mini_imagenet.check_source(source("0", "1", "2"), "val")
    with pytest.raises(ValueError, match=r"are 2, but there are 2, and 0 is not one of them"):
        mini_imagenet.check_source(source("0", "n01855672"), "val")
    with pytest.raises(ValueError, match=r"are 2, but there are 0, and n01855672 is missing"):
        mini_imagenet.check_source(source(), "val")
    with pytest.raises(ValueError, match=r"class 1 has 4 images instead of 5"):
        mini_imagenet.check_source(Source("here", ("0", "1"), (5, 4), lambda i: []), "val")


def test_images_that_are_not_84_pixels_wide_in_an_array_are_refused(root: Path) -> None:
    import pickle

    take_away_images(root)
    held = {
        "image_data": np.zeros((2 * COUNT, 80, 80, 3), np.uint8),
        "class_dict": {name: list(range(i * COUNT, (i + 1) * COUNT)) for i, name in enumerate(CLASSES["val"])},
    }
    (root / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(
        ValueError, match=r"class 'n01855672' of mini-imagenet-cache-val\.pkl: image 1 is .*\(3, 80, 80\)"
    ):
        MiniImageNet(root).load("val")
    assert open_prepared(root / "prepared" / "mini_imagenet_val.npy") is None


# -- the real one ----------------------------------------------------------------------------------------------------


def test_the_real_images_are_prepared(
    mini_imagenet_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (reader, mini_imagenet):
        monkeypatch.setattr(module, "IMAGES", 600)
    images = prepare_mini_imagenet(tmp_path, "val", source=mini_imagenet_root)
    assert images.pixels.shape == (1200, 3, 84, 84)
    assert (images.class_names, images.counts) == (CLASSES["val"], (600, 600))
    means = images.pixels.float().mean((0, 2, 3))
    assert ((means > 80) & (means < 160)).all()  # photographs, not noise or nothing
    assert means[0] != means[2]
    assert images.pixels.flatten(1).unique(dim=0).shape[0] > 1190  # hardly one twice
    again = MiniImageNet(tmp_path).load("val")
    assert torch.equal(again.pixels, images.pixels)
