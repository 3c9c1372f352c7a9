"""miniImageNet in the forms that it goes around in: find which one lies in a folder, and read it class after class.

A form is recognised by its files alone. What each is, and who has it:

    csv        ``train.csv`` (``filename,label``; Ravi & Larochelle) and a folder of images
    folders    a folder for each class, below ``train``, ``val`` and ``test`` or all 100 below one
    pickle     ``mini-imagenet-cache-train.pkl``: all images as one array (Ren et al.; learn2learn)
    hdf5       ``train_data.hdf5`` and ``train_labels.json`` (torchmeta)
    parquet    tables with the bytes of an image and its label in each row (hubs of data sets)
    imagenet   the folder of ImageNet's training images, of which the csv files tell 600 a class
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from .decoding import is_picture, open_picture, pixels_of, resized
from .images import PARTS
from .prepared import Pixels, Source

__all__ = ["IMAGES", "SIZE", "find_source", "mini_imagenet_classes"]

SIZE = 84  # pixels a side
IMAGES = 600  # of each class
OTHER_NAMES = {"val": ("val", "validation", "valid")}  # of a part, in files' names
EXPECTED = (
    "{part}.csv with a folder of images; a folder for each class below {part}/, or for all 100 classes; "
    "mini-imagenet-cache-{part}.pkl; {part}_data.hdf5 with {part}_labels.json; {part}*.parquet; or ImageNet's training "
    "folder with {part}.csv"
)


@cache
def mini_imagenet_classes() -> dict[str, tuple[str, ...]]:
    """The WordNet ids of the 64 training, 16 validation and 20 test classes, sorted."""
    text = resources.files("snail.datasets").joinpath("mini_imagenet_classes.txt").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for line in text.splitlines():
        if not line.startswith("#"):
            part, *names = line.split()
            found[part] += names
    return {part: tuple(sorted(names)) for part, names in found.items()}


def find_source(root: Path, part: str) -> Source:
    """The images of a part in whatever form they lie in ``root``.

    Args:
        root: A folder.
        part: ``train``, ``val`` or ``test``.

    Raises:
        FileNotFoundError: If there is none; it says what lies there and what could.
        ValueError: If there are several, or what is there is damaged.
    """
    found = [source for form in FORMS if (source := form(root, part)) is not None]
    if len(found) > 1:
        raise ValueError(
            f"{root} holds the {part} classes of miniImageNet {len(found)} times: as "
            f"{' and as '.join(source.found for source in found)}; move all but one elsewhere"
        )
    if not found:
        there = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else []
        holds = f"holds {', '.join(there)}" if there else "is empty" if root.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"the {part} classes of miniImageNet are not in {root}, which {holds}; one of these is needed: "
            f"{EXPECTED.format(part=part)}"
        )
    return found[0]


def to_pixels(picture: Any) -> Pixels:
    """A picture as miniImageNet has it: 84x84, squeezed, in colours."""
    return pixels_of(resized(picture, SIZE, mode="RGB", crop=False))


# -- images in files -------------------------------------------------------------------------------------------------


def _of_files(found: str, files: dict[str, list[Path]]) -> Source:
    names = sorted(files)

    def read(i: int) -> Iterator[Pixels]:
        return (to_pixels(open_picture(path)) for path in files[names[i]])

    return Source(found, tuple(names), tuple(len(files[name]) for name in names), read)


def _csv_rows(path: Path) -> dict[str, list[str]]:
    """The file names of each class."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no table ({error}); is it the file of Ravi & Larochelle?") from error
    if not rows or not {"filename", "label"} <= set(rows[0]):
        raise ValueError(f"{path} has no columns filename and label; is it the file of Ravi & Larochelle?")
    files: dict[str, list[str]] = {}
    for row in rows:
        name, label = row["filename"], row["label"]
        if not name or not label:
            raise ValueError(f"{path} has a line of {name!r} and {label!r}; a file name and a label are needed")
        if name == ".." or Path(name).name != name:
            raise ValueError(f"{path} names {name!r}, which is not the bare name of a file")
        files.setdefault(label, []).append(name)
    return files


def _csv_form(root: Path, part: str) -> Source | None:
    table = root / f"{part}.csv"
    if not table.is_file():
        return None
    rows = _csv_rows(table)
    listed = [file for members in rows.values() for file in members]
    for folder in (root / "images", root, root / part):
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        missing = [file for file in listed if file not in there]
        if len(missing) == len(listed):
            continue
        if missing:
            raise ValueError(
                f"{len(missing)} of the images that {table} lists are not in {folder}, such as {missing[0]}; unpack "
                f"all of them there"
            )
        files = {name: [folder / file for file in members] for name, members in rows.items()}
        return _of_files(f"{table.name} and images in {folder.name}/", files)
    return None


def _class_folders(folder: Path, names: Sequence[str] | None = None) -> dict[str, list[Path]]:
    """The images of each class folder below ``folder``; of the classes ``names`` alone if they are given."""
    found = {}
    for below in sorted(folder.iterdir()) if folder.is_dir() else ():
        wanted = re.fullmatch(r"n\d{8}", below.name) if names is None else below.name in names
        if wanted and below.is_dir() and (images := sorted(path for path in below.iterdir() if is_picture(path))):
            found[below.name] = images
    return found


def _folders_form(root: Path, part: str) -> Source | None:
    classes = mini_imagenet_classes()
    for name in OTHER_NAMES.get(part, (part,)):
        files = _class_folders(root / name)
        if len(files) > sum(map(len, classes.values())):  # ImageNet's own, beside its training images
            continue
        if files and max(map(len, files.values())) <= IMAGES:
            return _of_files(f"a folder for each class in {name}/", files)
    for folder in (root, root / "images"):
        files = _class_folders(folder, classes[part])
        if files and max(map(len, files.values())) <= IMAGES:
            return _of_files(f"a folder for each class in {folder.name}/", files)
    return None


IMAGENET_FOLDERS = ("", "train", "ILSVRC2012_img_train", "ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train")


def _imagenet_form(root: Path, part: str) -> Source | None:
    for below in IMAGENET_FOLDERS:
        files = _class_folders(root / below, mini_imagenet_classes()[part])
        if max(map(len, files.values()), default=0) <= IMAGES:
            continue
        table = root / f"{part}.csv"
        if not table.is_file():
            raise FileNotFoundError(
                f"{root / below} holds more than {IMAGES} images of a class, as ImageNet does; which of them are in "
                f"miniImageNet is told by {table.name} (Ravi & Larochelle, github.com/twitter-research/"
                f"meta-learning-lstm): put it into {root}"
            )
        chosen = {}
        for name, rows in _csv_rows(table).items():
            # "n0153282900000005.jpg" is the fifth image of the class by the number at the end of its name.
            by_number = sorted(files.get(name, ()), key=lambda path: _number(path.stem.rpartition("_")[2], path))
            places = [_number(Path(row).stem.removeprefix(name), f"{row} in {table}") for row in rows]
            if not 1 <= min(places) <= max(places) <= len(by_number):
                raise ValueError(
                    f"{table} asks for the images {min(places)} to {max(places)} of class {name}, of which "
                    f"{root / below} holds {len(by_number)}; is it the whole of ImageNet's training images?"
                )
            chosen[name] = [by_number[place - 1] for place in places]
        return _of_files(f"ImageNet's training images in {below or root.name}/", chosen)
    return None


def _number(text: str, where: object) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{where} does not end in the number of an image")
    return int(text)


# -- images in arrays and tables -------------------------------------------------------------------------------------


def _of_arrays(found: str, classes: dict[str, Any], take: Callable[[Any], Any]) -> Source:
    """``take`` gives the images of what stands for a class, ``(images, h, w, c)``."""
    names = sorted(classes)

    def read(i: int) -> Iterator[Pixels]:
        return (np.asarray(image).transpose(2, 0, 1) for image in take(classes[names[i]]))

    return Source(found, tuple(names), tuple(len(classes[name]) for name in names), read)


def _pickle_form(root: Path, part: str) -> Source | None:
    from .unpickle import read_pickle

    for name in OTHER_NAMES.get(part, (part,)):
        path = root / f"mini-imagenet-cache-{name}.pkl"
        if not path.is_file():
            continue

        @cache
        def content(path: Path = path) -> tuple[Any, dict[str, Any]]:
            held = read_pickle(path)
            if not isinstance(held, dict) or not {"image_data", "class_dict"} <= held.keys():
                raise ValueError(f"{path} holds no image_data and class_dict; is it a cache of miniImageNet?")
            images, classes = held["image_data"], held["class_dict"]
            for label, indices in classes.items():
                if not len(indices) or not 0 <= min(indices) <= max(indices) < len(images):
                    raise ValueError(f"{path} gives class {label} images that are not among its {len(images)}")
            return images, classes

        _, classes = content()
        return _of_arrays(path.name, classes, lambda indices: content()[0][np.asarray(indices)])
    return None


def _hdf5_form(root: Path, part: str) -> Source | None:
    for folder in (root, root / "miniimagenet"):
        data, labels = folder / f"{part}_data.hdf5", folder / f"{part}_labels.json"
        if not data.is_file() or not labels.is_file():
            continue
        h5py = _optional("h5py", data)
        try:
            file = h5py.File(data, "r")
            names = json.loads(labels.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{data} or {labels.name} is damaged ({error}); make both anew") from error
        if "datasets" not in file or not set(names) <= set(file["datasets"]):
            raise ValueError(f"{data} lacks classes that {labels.name} lists; make both anew")
        return _of_arrays(f"{data.name} and {labels.name}", {n: file["datasets"][n] for n in names}, lambda d: d[:])
    return None


def _parquet_form(root: Path, part: str) -> Source | None:
    for folder in (root, root / "data"):
        for name in OTHER_NAMES.get(part, (part,)):
            if paths := sorted(folder.glob(f"{name}*.parquet")):
                return _of_tables(paths)
    return None


def _of_tables(paths: Sequence[Path]) -> Source:
    parquet = _optional("pyarrow.parquet", paths[0])
    rows: dict[str, list[tuple[int, int]]] = {}  # of each class: the file, and the row in it
    column = ""
    for number, path in enumerate(paths):
        try:
            schema = parquet.read_schema(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); get it anew") from error
        images = [name for name in ("image", "img", "bytes", "image_bytes") if name in schema.names]
        labels = [name for name in ("label", "labels", "class", "wnid") if name in schema.names]
        if not images or not labels:
            raise ValueError(f"{path} has the columns {', '.join(schema.names)}; an image and a label are needed")
        column = images[0]
        names = _names_of_labels(schema.metadata or {}, labels[0])
        for row, label in enumerate(parquet.read_table(path, columns=[labels[0]])[labels[0]].to_pylist()):
            if names and not (isinstance(label, int) and 0 <= label < len(names)):
                raise ValueError(f"{path} has the label {label!r} in row {row}, but names for 0 to {len(names) - 1}")
            rows.setdefault(names[label] if names else str(label), []).append((number, row))

    @cache
    def table(number: int) -> Any:
        return parquet.read_table(paths[number], columns=[column])[column]

    def take(places: list[tuple[int, int]]) -> Iterator[Any]:
        for number, row in places:
            value = table(number)[row].as_py()
            content = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(content, bytes):
                raise ValueError(f"{paths[number]} holds no bytes of an image in row {row} of its column {column}")
            try:
                yield to_pixels(open_picture(content)).transpose(1, 2, 0)
            except ValueError as error:
                raise ValueError(f"{paths[number]}, row {row}: {error}") from error

    return _of_arrays(f"{len(paths)} parquet file{'s' * (len(paths) > 1)} such as {paths[0].name}", rows, take)


def _names_of_labels(metadata: dict[bytes, bytes], label: str) -> list[str] | None:
    """The names that a hub's file gives its numbered labels, if it does."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label]["names"]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return None


def _optional(package: str, path: Path) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise ImportError(f"to read {path}, {name} is needed: pip install {name}") from error


FORMS = (_csv_form, _folders_form, _pickle_form, _hdf5_form, _parquet_form, _imagenet_form)
