"""People's own images: a folder for each class, of any pictures that Pillow reads."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .decoding import EXTENSIONS, is_picture, open_picture, pixels_of, resized
from .images import PARTS, Images
from .module import ImageData
from .prepared import Pixels, Source, cache_places, open_prepared, prepare_in_one_of

__all__ = ["ImageFolder", "class_folders"]


class ImageFolder(ImageData):
    """A folder for each class, below ``root/train``, ``root/val`` and ``root/test`` or all below ``root``.

    Where the folders do not say which classes are for what, a seed does. Pictures may be of any size and format; they
    are cut to a square, in colours or grey, and kept as one array that is made anew when files change.

    Args:
        root: The folder.
        image_size: Height and width in pixels of the images that are made of the pictures.
        grey: Whether images are grey, ``c = 1``; otherwise RGB, ``c = 3``.
        shares: How many of the classes are for training, validation and test, relative to each other, where folders
            do not say.
        split_seed: Decides which, likewise.
        skip_broken: Whether files that cannot be read are left out, with a warning that names them.
        **kwargs: See ``ImageData``.
    """

    dataset = "folder"

    def __init__(
        self,
        root: Path,
        image_size: int = 84,
        grey: bool = False,
        shares: tuple[float, float, float] = (0.64, 0.16, 0.2),
        split_seed: int = 0,
        skip_broken: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1:
            raise ValueError(f"image_size is {image_size} pixels; it must be at least 1")
        if min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"shares are {list(shares)}; none may be negative, and one at least must be positive")
        self.root = Path(root).expanduser()
        self.image_size, self.grey, self.shares = image_size, grey, shares
        self.split_seed, self.skip_broken = split_seed, skip_broken
        self.dataset = self.root.resolve().name or "folder"
        self.split = "folders" if self._parts_given() else f"seed{split_seed}"  # what says which classes are for what

    def _parts_given(self) -> list[str]:
        return [part for part in PARTS if (self.root / part).is_dir()]

    def to_pixels(self, picture: Image.Image) -> Pixels:
        """See ``ImageData.to_pixels``: the middle square, in colours or grey."""
        return pixels_of(resized(picture, self.image_size, mode="L" if self.grey else "RGB", crop=True))

    def files(self, part: str) -> dict[str, list[Path]]:
        """The files of each class of a part.

        Raises:
            FileNotFoundError: If there is no class.
        """
        if given := self._parts_given():
            if part not in given:
                raise FileNotFoundError(f"{self.root} has {' and '.join(given)}, but no folder {part}")
            return class_folders(self.root / part)
        classes = class_folders(self.root)
        return {name: classes[name] for name in self._drawn(sorted(classes))[part]}

    def _drawn(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The classes of each part; a class's place in the order depends on its name and the seed alone."""
        order = sorted(names, key=lambda name: hashlib.sha256(f"{self.split_seed}|{name}".encode()).digest())
        total, ends, reached = sum(self.shares), [0], 0.0
        for share in self.shares:
            reached += share
            ends.append(round(len(order) * reached / total))
        return {part: sorted(order[ends[i] : ends[i + 1]]) for i, part in enumerate(PARTS)}

    def load(self, part: str) -> Images:
        """See ``ImageData.load``.

        Raises:
            FileNotFoundError: If there is no class.
            ValueError: If a file cannot be read, unless ``skip_broken``.
        """
        files = self.files(part)
        if not files:
            raise FileNotFoundError(f"no class of {self.root} is for {part}: {self.split} with shares {self.shares}")
        fingerprint = self._fingerprint(files)
        places = cache_places(self.root / ".snail", f"{part}_{self.image_size}{'_grey' if self.grey else ''}.npy")
        for path in places:
            if (images := open_prepared(path, of=fingerprint)) is not None:
                return images
        if self.skip_broken:
            files = _without_broken(files)
        shape = (1 if self.grey else 3, self.image_size, self.image_size)
        source = self._source(files, fingerprint)
        try:
            return prepare_in_one_of(places, source, image_shape=shape, progress=f"{self.dataset}, {part}")
        except ValueError as error:
            broken = [path for paths in files.values() for path in _broken(paths)]
            if not broken:  # something else is wrong
                raise
            count = sum(map(len, files.values()))
            raise ValueError(
                f"{len(broken)} of {count} files in {self.root} cannot be read as pictures, such as "
                f"{', '.join(map(str, broken[:5]))}; remove them, or leave them out with skip_broken "
                f"(--data.skip_broken true)"
            ) from error

    def _source(self, files: dict[str, list[Path]], fingerprint: str) -> Source:
        names = sorted(files)

        def read(i: int) -> Iterator[Pixels]:
            return (self.to_pixels(open_picture(path)) for path in files[names[i]])

        return Source(fingerprint, tuple(names), tuple(len(files[name]) for name in names), read)

    def _fingerprint(self, files: dict[str, list[Path]]) -> str:
        """What the images are and depend on: each file's name, size and time, and what is made of them."""
        digest = hashlib.sha256(f"{self.image_size}|{self.grey}|{self.skip_broken}".encode())
        for path in (path for name in sorted(files) for path in files[name]):
            facts = path.stat()
            digest.update(f"{path.relative_to(self.root)}|{facts.st_size}|{facts.st_mtime_ns}\n".encode())
        return f"{self.root}, as of {digest.hexdigest()[:16]}"


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The pictures in each folder below ``folder``, sorted by name; hidden folders and files do not count.

    Raises:
        FileNotFoundError: If there is no picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; a folder that holds one for each class is needed")
    found = {}
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.name.startswith("."):
            pictures = sorted(path for path in below.iterdir() if is_picture(path))
            if pictures:
                found[below.name] = pictures
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no folder with pictures ({', '.join(sorted(EXTENSIONS))}); one for each class is needed"
        )
    return found


def _broken(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        try:
            open_picture(path)
        except ValueError:
            yield path


def _without_broken(files: dict[str, list[Path]]) -> dict[str, list[Path]]:
    broken = {path for paths in files.values() for path in _broken(paths)}
    if broken:
        told = ", ".join(str(path) for path in sorted(broken))
        warnings.warn(f"left out, as they cannot be read as pictures: {told}", stacklevel=3)
    kept = {name: [path for path in paths if path not in broken] for name, paths in files.items()}
    return {name: paths for name, paths in kept.items() if paths}
