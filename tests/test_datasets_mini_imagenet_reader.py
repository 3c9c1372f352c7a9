import csv
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from snail.datasets import mini_imagenet_reader as reader
from snail.datasets.images import split_hash
from snail.datasets.mini_imagenet_reader import PARTS, find_source, mini_imagenet_classes, to_pixels
from snail.datasets.prepared import Source

CLASSES = {
    "train": ("n01532829", "n01558993", "n01704323"),
    "val": ("n01855672", "n02091244"),
    "test": ("n01930112", "n01981276"),
}
HASHES = {
    "train": "617600f7f3ba9b5cd319a6f963a478694cd6bf38252aa16d1acf7e8ce4f106ab",
    "val": "71592e7d268aa1975f457323419b113ee0a951e7fa321828c94ade452cf84bc4",
    "test": "cb594248f5c9fe821ad946d77870e379d19145031abd9e8661322fd3449b3274",
}
DRAWN = 5  # images of each class that is drawn here


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miniImageNet of a few classes of a few images."""
    monkeypatch.setattr(reader, "mini_imagenet_classes", lambda: CLASSES)
    monkeypatch.setattr(reader, "IMAGES", DRAWN)


def draw(root: Path, part: str) -> Path:
    """A part as a csv file and images of noise, no two alike."""
    (root / "images").mkdir(exist_ok=True)
    lines = ["filename,label"]
    for name in reversed(CLASSES[part]):
        for number in (3, 4, 10, 13, 110)[:DRAWN]:
            file = f"{name}{number:08d}.jpg"
            noise = np.random.default_rng([int(name[1:]), number]).integers(256, size=(84, 84, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / "images" / file)
            lines.append(f"{file},{name}")
    (root / f"{part}.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn"), "val")


@pytest.fixture(params=["drawn", "real"])
def given(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``val.csv`` and images, of noise and of the real miniImageNet."""
    root: Path = request.getfixturevalue("drawn" if request.param == "drawn" else "mini_imagenet_root")
    if request.param == "real":
        monkeypatch.setattr(reader, "IMAGES", 600)
    return root


def files_of(given: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    with (given / "val.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            files.setdefault(row["label"], []).append(given / "images" / row["filename"])
    return files


@functools.cache
def pixels_of(given: Path) -> dict[str, Any]:
    """The images of each class as Pillow decodes them, ``(images, h, w, c)``."""
    found = {}
    for name, paths in files_of(given).items():
        images = []
        for path in paths:
            with Image.open(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
        found[name] = np.stack(images)
    return found


def arrays(source: Source) -> dict[str, Any]:
    return {name: np.stack(list(source.read(i))) for i, name in enumerate(source.class_names)}


# -- the forms -----------------------------------------------------------------------------------------------------


def as_csv(folder: str) -> Callable[[Path, Path], None]:
    def make(given: Path, root: Path) -> None:
        shutil.copy(given / "val.csv", root)
        (root / folder).mkdir(exist_ok=True)
        for path in (given / "images").iterdir():
            (root / folder / path.name).symlink_to(path)

    return make


def as_folders(below: str, *others: str) -> Callable[[Path, Path], None]:
    """A folder for each class below ``below``, and for ``others`` of some image."""

    def make(given: Path, root: Path) -> None:
        files = files_of(given)
        for name in others:
            files[name] = files["n01855672"][:1]
        for name, paths in files.items():
            (root / below / name).mkdir(parents=True)
            for path in reversed(paths):
                (root / below / name / path.name).symlink_to(path)

    return make


def cached(given: Path) -> dict[str, Any]:
    """What the caches of Ren et al. hold."""
    pixels, indices, start = pixels_of(given), {}, 0
    for name, images in pixels.items():
        indices[name] = list(range(start, start + len(images)))
        start += len(images)
    return {"image_data": np.concatenate(list(pixels.values())), "class_dict": indices}


def as_pickle(part: str, protocol: int, older: bool = False) -> Callable[[Path, Path], None]:
    def make(given: Path, root: Path) -> None:
        content = pickle.dumps(cached(given), protocol)
        if older:
            content = content.replace(b"numpy._core", b"numpy.core")
        (root / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)

    return make


def as_hdf5(folder: str) -> Callable[[Path, Path], None]:
    def make(given: Path, root: Path) -> None:
        h5py = pytest.importorskip("h5py")
        (root / folder).mkdir(exist_ok=True)
        with h5py.File(root / folder / "val_data.hdf5", "w") as file:
            group = file.create_group("datasets")
            for name, images in pixels_of(given).items():
                group.create_dataset(name, data=images)
        (root / folder / "val_labels.json").write_text(json.dumps(sorted(pixels_of(given))))

    return make


def table(
    path: Path, images: list[Any], labels: list[Any], *, names: list[str] | None = None, columns: str = "image label"
) -> None:
    """A parquet file as hubs have them."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image, label = columns.split()
    content = pyarrow.table({image: images, label: labels})
    if names is not None:
        feature = {"names": names, "_type": "ClassLabel"}
        info = {"info": {"features": {image: {"_type": "Image"}, label: feature}}}
        content = content.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(content, path)


def as_named_table(given: Path, root: Path) -> None:
    """Structs, and numbered labels with names in the metadata, those of other parts among them."""
    names = sorted(name for part in CLASSES.values() for name in part)
    rows = [(path, names.index(name)) for name, paths in files_of(given).items() for path in paths]
    images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in rows]
    table(root / "data" / "validation-00000-of-00001.parquet", images, [label for _, label in rows], names=names)


def as_tables_of_text(given: Path, root: Path) -> None:
    """Bytes, and labels that are text; in two files, the classes in turns."""
    first, second = files_of(given).items()
    rows = [
        (path.read_bytes(), name)
        for pair in zip(first[1], second[1], strict=True)
        for path, name in zip(pair, (first[0], second[0]), strict=True)
    ]
    for number, half in enumerate((rows[: len(rows) // 2 + 1], rows[len(rows) // 2 + 1 :])):
        images, labels = map(list, zip(*half, strict=True))
        table(root / f"val-{number}-of-2.parquet", images, labels, columns="image_bytes wnid")


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "csv": as_csv("images"),
    "csv-beside": as_csv("."),
    "csv-part": as_csv("val"),
    "folders": as_folders("val"),
    "folders-validation": as_folders("validation"),
    "folders-valid": as_folders("valid"),
    "folders-all": as_folders(".", "n01532829", "n01930112"),
    "folders-images": as_folders("images", "n01532829", "n01930112"),
    "pickle-2": as_pickle("val", 2),
    "pickle-5": as_pickle("val", 5),
    "pickle-older": as_pickle("val", 2, older=True),
    "pickle-validation": as_pickle("validation", 4),
    "hdf5": as_hdf5("."),
    "hdf5-torchmeta": as_hdf5("miniimagenet"),
    "parquet-names": as_named_table,
    "parquet-text": as_tables_of_text,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_names_and_counts(given: Path, tmp_path: Path, form: str) -> None:
    FORMS[form](given, tmp_path)
    source, expected = find_source(tmp_path, "val"), pixels_of(given)
    assert source.class_names == tuple(sorted(expected)) == CLASSES["val"]
    assert source.counts == tuple(len(expected[name]) for name in source.class_names)
    for name, images in arrays(source).items():
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, expected[name].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("form", FORMS)
def test_a_class_is_read_as_often_as_one_likes_and_image_by_image(drawn: Path, tmp_path: Path, form: str) -> None:
    FORMS[form](drawn, tmp_path)
    source = find_source(tmp_path, "val")
    first = next(iter(source.read(1)))
    assert first.shape == (3, 84, 84)
    np.testing.assert_array_equal(first, next(iter(source.read(1))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_form_of_one_part_is_not_taken_for_another(drawn: Path, tmp_path: Path, form: str, part: str) -> None:
    FORMS[form](drawn, tmp_path)
    if form in ("folders-all", "folders-images"):  # these hold every part
        assert find_source(tmp_path, part).counts == (1,)
    else:
        with pytest.raises(FileNotFoundError, match=f"the {part} classes of miniImageNet are not in"):
            find_source(tmp_path, part)


@pytest.mark.parametrize(
    ("form", "found"),
    [
        ("csv", "val.csv and images in images/"),
        ("folders-valid", "a folder for each class in valid/"),
        ("folders-images", "a folder for each class in images/"),
        ("pickle-validation", "mini-imagenet-cache-validation.pkl"),
        ("hdf5", "val_data.hdf5 and val_labels.json"),
        ("parquet-names", "1 parquet file such as validation-00000-of-00001.parquet"),
        ("parquet-text", "2 parquet files such as val-0-of-2.parquet"),
    ],
)
def test_a_source_says_what_it_is(drawn: Path, tmp_path: Path, form: str, found: str) -> None:
    FORMS[form](drawn, tmp_path)
    assert find_source(tmp_path, "val").found == found


def test_files_of_the_finder_are_no_images(drawn: Path, tmp_path: Path) -> None:
    as_folders("val")(drawn, tmp_path)
    (tmp_path / "val" / "n01855672" / "._n0185567200000003.jpg").write_bytes(b"no image")
    (tmp_path / "val" / "n01855672" / ".DS_Store").write_bytes(b"")
    (tmp_path / "val" / "n01855672" / "notes.txt").write_text("no image")
    assert find_source(tmp_path, "val").counts == (DRAWN, DRAWN)


def test_photographs_are_squeezed_to_84_pixels_in_colours() -> None:
    array = np.zeros((60, 200, 3), dtype=np.uint8)
    array[:, :50, 0] = 255  # a quarter, which a crop would lose
    made = to_pixels(Image.fromarray(array))
    assert made.shape == (3, 84, 84)
    assert made[0, :, :20].min() > 250 and made[0, :, 22:].max() < 5 and made[1:].max() == 0


# -- several, none ---------------------------------------------------------------------------------------------------


def test_several_forms_in_one_place_are_refused(drawn: Path, tmp_path: Path) -> None:
    FORMS["csv"](drawn, tmp_path)
    FORMS["pickle-2"](drawn, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds the val classes of miniImageNet 2 times: as val\.csv and images in images/ and as "
        r"mini-imagenet-cache-val\.pkl; move all but one elsewhere$",
    ):
        find_source(tmp_path, "val")


def test_a_csv_beside_folders_is_no_second_form(drawn: Path, tmp_path: Path) -> None:
    FORMS["folders"](drawn, tmp_path)
    shutil.copy(drawn / "val.csv", tmp_path)
    assert find_source(tmp_path, "val").found == "a folder for each class in val/"


def test_where_there_is_none_it_says_what_is_there_and_what_could_be(tmp_path: Path) -> None:
    needed = (
        r"; one of these is needed: val\.csv with a folder of images; .* mini-imagenet-cache-val\.pkl; val_data\.hdf5 "
        r"with val_labels\.json; val\*\.parquet; or ImageNet's training folder with val\.csv$"
    )
    with pytest.raises(
        FileNotFoundError, match=r"val classes of miniImageNet are not in .*, which does not exist" + needed
    ):
        find_source(tmp_path / "absent", "val")
    with pytest.raises(FileNotFoundError, match=r"which is empty" + needed):
        find_source(tmp_path, "val")
    for number in range(10):
        (tmp_path / f"{number}.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"which holds 0\.txt, 1\.txt, .*, 7\.txt" + needed):
        find_source(tmp_path, "val")


# -- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_csv_some_of_whose_images_are_missing_is_refused(drawn: Path, tmp_path: Path, which: int) -> None:
    FORMS["csv"](drawn, tmp_path)
    path = sorted((tmp_path / "images").iterdir())[which]
    path.unlink()
    with pytest.raises(
        ValueError,
        match=rf"^1 of the images that .*val\.csv lists are not in .*images, such as {path.name}; unpack all of them",
    ):
        find_source(tmp_path, "val")


def test_a_csv_all_of_whose_images_are_missing_does_not_count(drawn: Path, tmp_path: Path) -> None:
    shutil.copy(drawn / "val.csv", tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match=r"which holds images, val\.csv; one of these is needed"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize("name", ["../secret.jpg", "..", "/etc/passwd", "below/a.jpg", "images/../../a.jpg"])
def test_a_csv_that_names_a_file_elsewhere_is_refused(drawn: Path, tmp_path: Path, name: str) -> None:
    FORMS["csv"](drawn, tmp_path)
    with (tmp_path / "val.csv").open("a") as file:
        file.write(f"{name},n01855672\n")
    with pytest.raises(ValueError, match=rf"val\.csv names '{name}', which is not the bare name of a file"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"val\.csv has no columns filename and label; is it the file of Ravi & Larochelle\?"),
        (b"filename,label\n", r"val\.csv has no columns"),
        (b"file,class\na.jpg,n01855672\n", r"val\.csv has no columns filename and label"),
        (b"a.jpg,n01855672\nb.jpg,n01855672\n", r"val\.csv has no columns filename and label"),
        (b"filename,label\na.jpg\n", r"val\.csv has a line of 'a\.jpg' and None; a file name and a label are needed"),
        (b"filename,label\na.jpg,\n", r"val\.csv has a line of 'a\.jpg' and ''"),
        (b"filename,label\n,n01855672\n", r"val\.csv has a line of '' and 'n01855672'"),
        (b"\x89PNG\r\n\x1a\n\xff\xff", r"val\.csv is no table \(.*\); is it the file of Ravi & Larochelle\?"),
        (b'filename,label\n"' + b"a" * 200_000 + b'",b\n', r"val\.csv is no table \(field larger than"),
    ],
)
def test_a_csv_that_is_another_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "val.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_source(tmp_path, "val")


def test_a_csv_may_have_more_columns_in_any_order_and_a_mark_of_windows(drawn: Path, tmp_path: Path) -> None:
    FORMS["csv"](drawn, tmp_path)
    rows = [row.split(",") for row in (tmp_path / "val.csv").read_text().splitlines()]
    lines = [f"{label},more,{name}" for name, label in rows]
    (tmp_path / "val.csv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert find_source(tmp_path, "val").counts == (DRAWN, DRAWN)


def test_an_image_that_is_broken_is_named(drawn: Path, tmp_path: Path) -> None:
    FORMS["csv"](drawn, tmp_path)
    path = sorted((tmp_path / "images").iterdir())[1]
    path.unlink()
    path.write_bytes(b"no image")
    source = find_source(tmp_path, "val")
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read as a picture"):
        list(source.read(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: [held], r"val\.pkl holds no image_data and class_dict; is it a cache of miniImageNet\?"),
        (lambda held: {"image_data": held["image_data"]}, r"val\.pkl holds no image_data and class_dict"),
        (lambda held: {**held, "class_dict": {"a": [0, 10]}}, r"gives class a images that are not among its 10"),
        (lambda held: {**held, "class_dict": {"a": [-1, 3]}}, r"gives class a images that are not among its 10"),
        (lambda held: {**held, "class_dict": {"a": []}}, r"gives class a images that are not among its 10"),
        (lambda held: {**held, "class_dict": {"a": os.getcwd}}, r"val\.pkl is not read: it asks for \w+\.getcwd"),
    ],
)
def test_a_pickle_that_is_another_is_refused(
    drawn: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    (tmp_path / "mini-imagenet-cache-val.pkl").write_bytes(pickle.dumps(change(cached(drawn))))
    with pytest.raises(ValueError, match=message):
        find_source(tmp_path, "val")


def test_a_pickle_that_is_cut_off_is_refused(drawn: Path, tmp_path: Path) -> None:
    FORMS["pickle-2"](drawn, tmp_path)
    path = tmp_path / "mini-imagenet-cache-val.pkl"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"mini-imagenet-cache-val\.pkl is not read: .*; only pickles of arrays"):
        find_source(tmp_path, "val")


def test_hdf5_that_lacks_a_class_is_refused(drawn: Path, tmp_path: Path) -> None:
    FORMS["hdf5"](drawn, tmp_path)
    (tmp_path / "val_labels.json").write_text(json.dumps([*CLASSES["val"], "n02114548"]))
    with pytest.raises(ValueError, match=r"val_data\.hdf5 lacks classes that val_labels\.json lists; make both anew"):
        find_source(tmp_path, "val")


def test_hdf5_without_its_group_is_refused(drawn: Path, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    FORMS["hdf5"](drawn, tmp_path)
    with h5py.File(tmp_path / "val_data.hdf5", "a") as file:
        del file["datasets"]
    with pytest.raises(ValueError, match=r"val_data\.hdf5 lacks classes that val_labels\.json lists"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize("file", ["val_data.hdf5", "val_labels.json"])
@pytest.mark.parametrize("left", [0, 10])
def test_hdf5_that_is_cut_off_is_refused(drawn: Path, tmp_path: Path, file: str, left: int) -> None:
    FORMS["hdf5"](drawn, tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:left])
    with pytest.raises(ValueError, match=r"val_data\.hdf5 or val_labels\.json is damaged \(.*\); make both anew"):
        find_source(tmp_path, "val")


def test_hdf5_without_labels_does_not_count(drawn: Path, tmp_path: Path) -> None:
    FORMS["hdf5"](drawn, tmp_path)
    (tmp_path / "val_labels.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"which holds val_data\.hdf5; one of these"):
        find_source(tmp_path, "val")


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(file, format="PNG")
    return file.getvalue()


def test_a_table_whose_labels_have_no_names_gives_numbers(tmp_path: Path) -> None:
    table(tmp_path / "val.parquet", [png()] * 3, [10, 2, 10])
    source = find_source(tmp_path, "val")
    assert dict(zip(source.class_names, source.counts, strict=True)) == {"10": 2, "2": 1}


@pytest.mark.parametrize("columns", ["image label", "img labels", "bytes class", "image_bytes wnid"])
def test_a_table_may_call_its_columns_what_others_do(tmp_path: Path, columns: str) -> None:
    table(tmp_path / "val.parquet", [png()], ["n01855672"], columns=columns)
    (image,) = find_source(tmp_path, "val").read(0)
    assert image.reshape(3, -1).min(1).tolist() == [255, 0, 0]


def test_a_table_without_images_or_labels_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "val.parquet", [png()], ["a"], columns="photo label")
    with pytest.raises(ValueError, match=r"val\.parquet has the columns photo, label; an image and a label are needed"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize("label", [2, -1, None])
def test_a_table_with_a_label_that_has_no_name_is_refused(tmp_path: Path, label: int | None) -> None:
    table(tmp_path / "val.parquet", [png()] * 2, [0, label], names=["a", "b"])
    with pytest.raises(ValueError, match=rf"val\.parquet has the label {label} in row 1, but names for 0 to 1"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize("image", [None, "a.jpg", {"bytes": None, "path": "a.jpg"}, {"path": "a.jpg"}], ids=repr)
def test_a_table_that_holds_no_images_is_refused(tmp_path: Path, image: Any) -> None:
    table(tmp_path / "val.parquet", [image], ["a"])
    with pytest.raises(ValueError, match=r"val\.parquet holds no bytes of an image in row 0 of its column image"):
        list(find_source(tmp_path, "val").read(0))


def test_a_table_with_a_broken_image_says_where(tmp_path: Path) -> None:
    table(tmp_path / "val.parquet", [png(), b"no image"], ["a", "a"])
    with pytest.raises(ValueError, match=r"val\.parquet, row 1: a picture of 8 bytes cannot be read as a picture"):
        list(find_source(tmp_path, "val").read(0))


def test_a_table_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    table(tmp_path / "val.parquet", [png()], ["a"])
    path = tmp_path / "val.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"val\.parquet is damaged \(.*\); get it anew"):
        find_source(tmp_path, "val")


@pytest.mark.parametrize(
    ("package", "files", "message"),
    [
        ("h5py", ["val_data.hdf5", "val_labels.json"], r"^to read .*val_data\.hdf5, h5py is needed: pip install h5py$"),
        ("pyarrow.parquet", ["val.parquet"], r"^to read .*val\.parquet, pyarrow is needed: pip install pyarrow$"),
    ],
)
def test_where_a_package_is_missing_it_is_named(
    tmp_path: Path, package: str, files: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in files:
        (tmp_path / file).touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        find_source(tmp_path, "val")


# -- ImageNet --------------------------------------------------------------------------------------------------------


def imagenet(folder: Path, numbers: list[int], classes: tuple[str, ...] = CLASSES["val"]) -> None:
    """Tiny images whose red and green say their place in the order of their numbers, from 1, and blue the class."""
    for which, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for place, number in enumerate(sorted(numbers), start=1):
            colour = (place // 256, place % 256, which)
            # The content tells Pillow what it is; a JPEG would not keep the colours.
            Image.new("RGB", (2, 2), colour).save(folder / name / f"{name}_{number}.JPEG", format="PNG")


def listing(root: Path, places: list[int], classes: tuple[str, ...] = CLASSES["val"]) -> None:
    rows = [f"{name}{place:08d}.jpg,{name}\n" for name in classes for place in places]
    (root / "val.csv").write_text("filename,label\n" + "".join(rows))


def places_of(source: Source) -> list[list[int]]:
    found = []
    for which in range(len(source.class_names)):
        images = np.stack(list(source.read(which))).astype(int)
        assert images.shape[1:] == (3, 84, 84)
        assert (images == images[:, :, :1, :1]).all() and (images[:, 2] == which).all()
        found.append((images[:, 0, 0, 0] * 256 + images[:, 1, 0, 0]).tolist())
    return found


def test_imagenet_gives_the_images_that_the_csv_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "IMAGES", 600)
    numbers = [17 * i % 4001 for i in range(1, 621)]  # of one to four digits: by name, 1003 would come before 17
    imagenet(tmp_path / "train", numbers)
    imagenet(tmp_path / "train", numbers[:1], ("n01440764", "n01532829"))  # of no part, of another part
    chosen = [place for place in range(1, 621) if place % 31 != 7]
    assert len(chosen) == 600
    listing(tmp_path, chosen)
    source = find_source(tmp_path, "val")
    assert (source.class_names, source.counts) == (CLASSES["val"], (600, 600))
    assert places_of(source) == [chosen, chosen]


@pytest.mark.parametrize("below", reader.IMAGENET_FOLDERS)
def test_imagenet_is_found_where_it_is_unpacked(tmp_path: Path, below: str) -> None:
    imagenet(tmp_path / below, [100, 20, 3, 1000, 5, 7])
    listing(tmp_path, [1, 6])
    source = find_source(tmp_path, "val")
    assert places_of(source) == [[1, 6], [1, 6]]
    assert source.found.startswith("ImageNet's training images in ")


def test_imagenets_own_validation_folder_is_not_taken_for_that_of_miniimagenet(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    listing(tmp_path, [2])
    others = tuple(f"n0000000{i}" for i in range(sum(map(len, CLASSES.values())) + 1))
    imagenet(tmp_path / "val", [1], others)
    assert places_of(find_source(tmp_path, "val")) == [[2], [2]]


def test_imagenet_without_the_csv_says_what_is_missing(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    with pytest.raises(
        FileNotFoundError,
        match=r"train holds more than 5 images of a class, as ImageNet does; .* told by val\.csv .*: put",
    ):
        find_source(tmp_path, "val")


@pytest.mark.parametrize(("places", "asked"), [([1, 7], "1 to 7"), ([0, 3], "0 to 3")])
def test_imagenet_without_an_image_that_the_csv_asks_for_is_refused(
    tmp_path: Path, places: list[int], asked: str
) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    listing(tmp_path, places)
    with pytest.raises(
        ValueError,
        match=rf"val\.csv asks for the images {asked} of class n01855672, of which .*train holds 6; is it the whole",
    ):
        find_source(tmp_path, "val")


def test_imagenet_without_a_class_that_the_csv_asks_for_is_refused(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6], CLASSES["val"][:1])
    listing(tmp_path, [1])
    with pytest.raises(ValueError, match=r"asks for the images 1 to 1 of class n02091244, of which .* holds 0; is it"):
        find_source(tmp_path, "val")


def test_imagenet_of_which_a_class_is_unpacked_in_part_is_refused(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    (tmp_path / "train" / "n02091244" / "n02091244_6.JPEG").unlink()
    listing(tmp_path, [1, 6])
    with pytest.raises(
        ValueError, match=r"images 1 to 6 of class n02091244, of which .*train holds 5; is it the whole"
    ):
        find_source(tmp_path, "val")


def test_imagenet_with_a_csv_of_other_names_is_refused(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    (tmp_path / "val.csv").write_text("filename,label\nn01855672_17.JPEG,n01855672\n")
    with pytest.raises(ValueError, match=r"n01855672_17\.JPEG in .*val\.csv does not end in the number of an image"):
        find_source(tmp_path, "val")


def test_imagenet_with_an_image_of_another_name_is_refused(tmp_path: Path) -> None:
    imagenet(tmp_path / "train", [1, 2, 3, 4, 5, 6])
    Image.new("RGB", (2, 2)).save(tmp_path / "train" / "n01855672" / "copy.png")
    listing(tmp_path, [1])
    with pytest.raises(ValueError, match=r"copy\.png does not end in the number of an image"):
        find_source(tmp_path, "val")


# -- the classes -----------------------------------------------------------------------------------------------------


def test_the_parts_are_64_16_and_20_classes_and_have_none_in_common() -> None:
    classes = mini_imagenet_classes()
    assert {part: len(names) for part, names in classes.items()} == {"train": 64, "val": 16, "test": 20}
    together = [name for names in classes.values() for name in names]
    assert len(set(together)) == 100
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in together)
    assert all(list(names) == sorted(names) for names in classes.values())


@pytest.mark.parametrize("part", PARTS)
def test_the_classes_stay_as_they_are(part: str) -> None:
    names = mini_imagenet_classes()[part]
    assert split_hash(names) == hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
    assert split_hash(names) == HASHES[part]


@pytest.mark.parametrize("part", PARTS)
def test_the_classes_are_those_of_the_literature(part: str) -> None:
    folder = os.environ.get("SNAIL_DATA")
    file = Path(folder or "nowhere") / "splits" / f"mini_imagenet_{part}_wnids.txt"
    if not folder or not file.is_file():
        pytest.skip(f"SNAIL_DATA has no splits/{file.name}")
    names = file.read_text().split()
    assert sorted(names) == list(mini_imagenet_classes()[part])
    assert hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest() == HASHES[part]


def test_the_list_of_classes_is_part_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[1]
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = {path for pattern in setup["package-data"]["snail.datasets"] for path in (root / "datasets").glob(pattern)}
    assert root / "datasets" / "mini_imagenet_classes.txt" in packed
