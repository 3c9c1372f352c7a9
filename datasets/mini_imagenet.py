"""miniImageNet (Vinyals et al., 2016; split of Ravi & Larochelle, 2017): 100 classes of 600 photographs, 84x84."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from .download import RemoteFile, download
from .images import Images
from .mini_imagenet_reader import IMAGES, SIZE, find_source, mini_imagenet_classes, to_pixels
from .module import ImageData
from .prepared import Pixels, Source, cache_places, open_prepared, prepare_in_one_of

__all__ = ["MiniImageNet", "download_mini_imagenet", "prepare_mini_imagenet"]

ARCHIVE = "https://zenodo.org/records/7978538/files"
CACHES = tuple(  # learn2learn's copies of the pickled caches of Ren et al.
    RemoteFile(
        f"mini-imagenet-cache-{name}.pkl",
        (f"{ARCHIVE}/mini-imagenet-cache-{name}.pkl?download=1", f"{ARCHIVE}/mini-imagenet-cache-{name}.pkl"),
        size,
        md5,
        "md5",
    )
    for name, size, md5 in (
        ("train", 1_145_461_190, "ee4e80dc7b716f3ceec891d199b5277a"),
        ("validation", 292_661_258, "c1145a80890b88d54a67d6e0022d53a5"),
        ("test", 353_647_539, "389b6c59d348b2e1ae9610f00a5e6724"),
    )
)
"""Their sizes and hashes are those that the archive tells; they were not fetched from where this was written."""


class MiniImageNet(ImageData):
    """miniImageNet, 64 / 16 / 20 classes, from whatever form it lies in (``snail.datasets.mini_imagenet_reader``).

    The first time that a part is used its images are decoded into one array (``snail data prepare mini_imagenet`` does
    it beforehand), which is then mapped into memory, so that a start takes no time and processes share it. Parts that
    are not there are not missed until they are asked for.

    Args:
        root: Folder that holds the images in one of their forms, or the arrays that were prepared of them.
        **kwargs: See ``ImageData``.
    """

    dataset = "mini_imagenet"
    split = "ravi"

    def __init__(self, root: Path = Path("data/mini_imagenet"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root).expanduser()

    def load(self, part: str) -> Images:
        """See ``ImageData.load``.

        Raises:
            FileNotFoundError: If the part is not there in any form.
            ValueError: If it is there twice, or is not what it should be.
        """
        for path in prepared_paths(self.root, part):
            if (images := open_prepared(path)) is not None:
                return images
        return prepare_mini_imagenet(self.root, part)

    def to_pixels(self, picture: Image.Image) -> Pixels:
        """See ``ImageData.to_pixels``: squeezed to 84x84, in colours."""
        return to_pixels(picture)


def prepared_paths(root: Path, part: str) -> list[Path]:
    """Where the array of a part is, or is to be: beside the images, or else in the user's cache."""
    return cache_places(root / "prepared", f"mini_imagenet_{part}.npy")


def prepare_mini_imagenet(root: Path, part: str, *, source: Path | None = None) -> Images:
    """Decode a part's images into one array; killed, the next call goes on.

    Args:
        root: Folder that is to hold the array.
        part: ``train``, ``val`` or ``test``.
        source: Folder that holds the images in one of their forms; ``root`` if not given.

    Raises:
        FileNotFoundError: If the part is not there in any form.
        ValueError: If it is there twice, is damaged, or is not the part of miniImageNet.
        OSError: If the array can be written nowhere.
    """
    found = find_source(root if source is None else source, part)
    check_source(found, part)
    places = prepared_paths(root, part)
    return prepare_in_one_of(places, found, image_shape=(3, SIZE, SIZE), progress=f"miniImageNet, {part}")


def download_mini_imagenet(root: Path) -> None:
    """Fetch the pickled caches of all parts into ``root``, 1.8 GB; those that are there already stay.

    The images are ImageNet's, and its terms hold: research and teaching, not for profit.

    Raises:
        RuntimeError: If they cannot be fetched.
    """
    for file in CACHES:
        download(file, root)


def check_source(source: Source, part: str) -> None:
    """Refuse what is not the whole of a part: its classes, and 600 images of each.

    Classes that have numbers for names, as in some tables, are counted alone.

    Raises:
        ValueError: If it is not.
    """
    expected, names = set(mini_imagenet_classes()[part]), set(source.class_names)
    numbered = all(name.isdigit() for name in names)
    if len(names) != len(expected) or (not numbered and names != expected):
        odd = sorted(names - expected) or sorted(expected - names)
        raise ValueError(
            f"{source.found}: the {part} classes of miniImageNet are {len(expected)}, but there are {len(names)}, and "
            f"{odd[0]} is {'not one of them' if names - expected else 'missing'}"
        )
    for name, count in zip(source.class_names, source.counts, strict=True):
        if count != IMAGES:
            raise ValueError(f"{source.found}: class {name} has {count} images instead of {IMAGES}")
