"""Images prepared once: a split as one uint8 array on disk that is mapped into memory, not read.

Processes that map the same file share its pages, and nothing is decoded again. Axes: ``m`` image, ``c`` colour
channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from snail.files import file_hash, replacing

from .images import Images

__all__ = ["Pixels", "Source", "cache_places", "describe_prepared", "open_prepared", "prepare"]

Pixels = NDArray[np.uint8]
"""One image, ``(c, h, w)``."""
FORMAT = 1  # raised when the layout of the files changes


@dataclass(frozen=True, eq=False)
class Source:
    """The images of a split wherever they lie, to be read class after class.

    Args:
        found: What they lie in, for messages, such as ``"train.csv and images/"``.
        class_names: One name a class.
        counts: Number of images of each class.
        read: Gives the images of class ``i``, each ``(c, h, w)``, one after the other.
    """

    found: str
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    read: Callable[[int], Iterable[Pixels]]


@dataclass(frozen=True)
class _About:
    """What stands beside an array, and while it is being made how far it is."""

    format: int
    source: str
    class_names: list[str]
    counts: list[int]
    shape: list[int]
    done: int = 0  # classes that are in the array
    sha256: str = ""  # of the array file, once it is whole


def prepare(source: Source, path: Path, *, image_shape: tuple[int, int, int], progress: str = "") -> None:
    """Write a source's images as one array, ``path`` with a ``.json`` of the same name beside it.

    Killed, it goes on where it was: each class is kept once it is whole. The array has its name only once it is whole.

    Args:
        source: Where the images are.
        path: The ``.npy`` to make.
        image_shape: ``(c, h, w)`` of every image.
        progress: What a progress bar on standard error is called; none if empty or where that is no terminal.

    Raises:
        ValueError: If an image has another shape, or a class another number of images than the source said.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (sum(source.counts), *image_shape)
    fresh = _About(FORMAT, source.found, list(source.class_names), list(source.counts), list(shape))
    part, part_about = path.with_suffix(".npy.part"), path.with_suffix(".json.part")
    before = _read_about(part_about)
    resumed = part.is_file() and before is not None and before == _About(**{**asdict(fresh), "done": before.done})
    done = before.done if resumed and before is not None else 0
    array = np.lib.format.open_memmap(part, mode="r+" if resumed else "w+", dtype=np.uint8, shape=shape)  # type: ignore[no-untyped-call]
    if array.shape != shape:
        raise ValueError(f"{part} is not what was begun; delete it and run again")
    with tqdm(
        total=len(array), initial=sum(source.counts[:done]), desc=progress, disable=None if progress else True
    ) as bar:
        for i in range(done, len(source.counts)):
            start, stop = sum(source.counts[:i]), sum(source.counts[: i + 1])
            position = start
            for image in source.read(i):
                if position == stop or image.shape != image_shape:
                    raise ValueError(
                        f"class {source.class_names[i]!r} of {source.found}: image {position - start + 1} has shape "
                        f"{image.shape}, but {stop - start} images of {image_shape} are expected"
                    )
                array[position] = image
                position += 1
                bar.update()
            if position != stop:
                raise ValueError(
                    f"class {source.class_names[i]!r} of {source.found} gave {position - start} images, not "
                    f"{stop - start}"
                )
            array.flush()
            _write_about(part_about, _About(**{**asdict(fresh), "done": i + 1}))
    del array
    whole = _About(**{**asdict(fresh), "done": len(source.counts), "sha256": file_hash(part)})
    _write_about(path.with_suffix(".json"), whole)  # first: killed before the renaming, nothing is done again
    part.replace(path)
    part_about.unlink(missing_ok=True)


def open_prepared(path: Path) -> Images | None:
    """The images of an array that ``prepare`` made, mapped into memory; ``None`` where there is none that is whole."""
    about = _read_about(path.with_suffix(".json"))
    if about is None or about.format != FORMAT or not about.sha256:
        return None
    try:
        # Copy on write: the pages are those of the file, and what torch might write never reaches it.
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):
        return None
    if list(array.shape) != about.shape or array.dtype != np.uint8:
        return None
    return Images(torch.from_numpy(array), tuple(about.class_names), tuple(about.counts))


def describe_prepared(path: Path) -> dict[str, Any]:
    """What is known of an array that ``prepare`` made: its source, classes, counts, shape and hash."""
    about = _read_about(path.with_suffix(".json"))
    return {} if about is None else asdict(about)


def cache_places(folder: Path, file: str) -> list[Path]:
    """Where a file that was made of what lies in ``folder`` is kept: there, or in the user's cache.

    The second, for a folder that cannot be written, is ``$XDG_CACHE_HOME/snail`` (``~/.cache/snail``).
    """
    paths = [folder / file]
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home folder
        return paths
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # one folder's cache is not another's
    return [*paths, user / "snail" / f"{Path(file).stem}_{key}{Path(file).suffix}"]


def _write_about(path: Path, about: _About) -> None:
    with replacing(path) as file:
        file.write(json.dumps(asdict(about), indent=1) + "\n")


def _read_about(path: Path) -> _About | None:
    try:
        return _About(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
