"""Images prepared once: a split as one uint8 array on disk that is mapped into memory, not read.

Processes that map the same file share its pages, and nothing is decoded again. Axes: ``m`` image, ``c`` colour
channels, ``h`` and ``w`` pixels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from snail.files import file_hash, replacing

from .images import Images

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_open_memmap: Any = np.lib.format.open_memmap  # which numpy has types for it differs

__all__ = ["Pixels", "Source", "cache_places", "open_prepared", "prepare", "prepare_in_one_of"]

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
    Where another process is making the same one, it is waited for.

    Args:
        source: Where the images are.
        path: The ``.npy`` to make.
        image_shape: ``(c, h, w)`` of every image.
        progress: What a progress bar on standard error is called; none if empty or where that is no terminal.

    Raises:
        ValueError: If an image has another shape or is not uint8, or a class another number of images than the source
            said.
        OSError: If the array cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (sum(source.counts), *image_shape)
    fresh = _About(FORMAT, source.found, list(source.class_names), list(source.counts), list(shape))
    part, part_about = path.with_suffix(".npy.part"), path.with_suffix(".json.part")
    with _alone(part) as alone:
        if alone:
            array, done = _begin(part, part_about, fresh)
            with tqdm(
                total=len(array), initial=sum(source.counts[:done]), desc=progress, disable=None if progress else True
            ) as bar:
                for i in range(done, len(source.counts)):
                    _write_class(array, source, i, bar)
                    array.flush()
                    _write_about(part_about, replace(fresh, done=i + 1))
            del array
            whole = replace(fresh, done=len(source.counts), sha256=file_hash(part))
            path.unlink(missing_ok=True)  # an older array, which is not what is now said of it
            _write_about(path.with_suffix(".json"), whole)  # killed before the renaming, nothing is done again
            part.replace(path)
            part_about.unlink(missing_ok=True)
            return
    made = _read_about(path.with_suffix(".json"))  # by the process that was waited for, unless it was killed
    if made is None or not path.is_file() or replace(made, sha256="") != replace(fresh, done=len(source.counts)):
        prepare(source, path, image_shape=image_shape, progress=progress)


def prepare_in_one_of(
    places: Sequence[Path], source: Source, *, image_shape: tuple[int, int, int], progress: str = ""
) -> Images:
    """``prepare`` in the first of some places that can be written, and open the array.

    Raises:
        ValueError: If the images are not what the source said.
        OSError: If none can be written.
    """
    for path in places:
        try:
            prepare(source, path, image_shape=image_shape, progress=progress)
            break
        except OSError:  # read-only, or full: the next place
            if path == places[-1]:
                raise
    images = open_prepared(path)
    assert images is not None  # it was just made
    return images


def open_prepared(path: Path, *, of: str | None = None) -> Images | None:
    """The images of an array that ``prepare`` made, mapped into memory; ``None`` where there is none that is whole.

    Args:
        path: The ``.npy``.
        of: What its source was ``found`` as; an array of another source does not count. Any source if not given.
    """
    about = _read_about(path.with_suffix(".json"))
    if about is None or about.format != FORMAT or not about.sha256 or of not in (None, about.source):
        return None
    # Copy on write: the pages are those of the file, and what torch might write never reaches it.
    array = _mapped(path, "c")
    if array is None or list(array.shape) != about.shape:
        return None
    try:
        return Images(torch.from_numpy(array), tuple(about.class_names), tuple(about.counts))
    except (TypeError, ValueError):  # the facts do not fit
        return None


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


@contextmanager
def _alone(part: Path) -> Iterator[bool]:
    """Hold the file that is being made. False if another process held it, which is waited for."""
    if fcntl is None:
        yield True
        return
    with part.open("ab") as file:
        waited = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_EX)
            waited = True
        except OSError:  # a file system without locks
            pass
        yield not waited


def _begin(part: Path, part_about: Path, fresh: _About) -> tuple[np.memmap[Any, Any], int]:
    """The array to be filled, and how many classes of the same source are in it."""
    before, shape = _read_about(part_about), tuple(fresh.shape)
    begun = _mapped(part, "r")
    if begun is not None and begun.shape == shape:
        for done in range(len(fresh.counts), 0, -1):
            if before == replace(fresh, done=done):
                return _open_memmap(part, mode="r+"), done
    del begun  # Windows cuts no file off that is mapped
    part_about.unlink(missing_ok=True)  # it tells of another array, or of one that is finished
    array = _open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a signal that kills once it is written to
        try:
            with part.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                part.unlink()
                raise
    return array, 0


def _write_class(array: NDArray[np.uint8], source: Source, i: int, bar: tqdm[Any]) -> None:
    name, count = source.class_names[i], source.counts[i]
    start, read = sum(source.counts[:i]), 0
    for image in source.read(i):
        if read == count or image.shape != array.shape[1:] or image.dtype != np.uint8:
            raise ValueError(
                f"class {name!r} of {source.found}: image {read + 1} is {image.dtype} of shape {image.shape}, but "
                f"{count} images of uint8 {array.shape[1:]} are expected"
            )
        array[start + read] = image
        read += 1
        bar.update()
    if read != count:
        raise ValueError(f"class {name!r} of {source.found} gave {read} images, not {count}")


def _mapped(path: Path, mode: str) -> NDArray[Any] | None:
    """The array in a file; ``None`` if there is none that is whole. One of objects, a pickle, is none."""
    try:
        array: NDArray[Any] = _open_memmap(path, mode=mode)
    except Exception:  # what numpy raises on a damaged file has no base class
        return None
    return array


def _write_about(path: Path, about: _About) -> None:
    with replacing(path) as file:
        file.write(json.dumps(asdict(about), indent=1) + "\n")


def _read_about(path: Path) -> _About | None:
    try:
        return _About(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
