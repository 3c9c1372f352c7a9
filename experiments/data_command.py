"""``snail data``: make a data set ready once, and look at what is there."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from snail.datasets import ImageData, ImageFolder, Images, MiniImageNet, Omniglot
from snail.datasets.images import PARTS, split_hash
from snail.datasets.mini_imagenet import download_mini_imagenet, prepare_mini_imagenet
from snail.datasets.omniglot_reader import download_omniglot

from .options import OptionParser, check_output

__all__ = ["main"]

DATA = {"mini_imagenet": MiniImageNet, "omniglot": Omniglot, "folder": ImageFolder}
SHOWN_CLASSES, SHOWN_IMAGES = 8, 12  # of a part, in the contact sheet


def main(argv: Sequence[str]) -> int:
    """Run ``snail data``.

    Args:
        argv: The command line behind ``data``.

    Returns:
        The exit status: 0 if all is well, 1 if ``check`` found something wrong.

    Raises:
        FileNotFoundError: If there are no images.
        ValueError: If an option is wrong, or images are not what they should be.
    """
    options = _options(argv)
    return prepare(options) if options.action == "prepare" else check(options)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="snail data",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""prepare  decode the images once into an array that is then mapped into memory; killed, it goes on
check    tell what is there: classes, images, sizes, the split's hash, images that are in two parts, a contact sheet

mini_imagenet is read from train.csv and images/, a folder for each class, mini-imagenet-cache-*.pkl, *_data.hdf5,
*.parquet, or ImageNet's training folder with the csv files; omniglot is downloaded where it is missing; folder is a
folder of your own with a folder for each class.""",
    )
    add = parser.add_argument
    add("action", choices=("prepare", "check"))
    add("name", choices=sorted(DATA), help="the data set")
    add("--root", type=Path, required=True, metavar="DIR", help="folder that holds it, or is to hold it")
    add(
        "--from",
        type=Path,
        dest="source",
        metavar="DIR",
        help="mini_imagenet: folder that holds the images, if another",
    )
    add("--download", action="store_true", help="mini_imagenet: fetch the caches of learn2learn (1.8 GB; ImageNet's "
        "terms: research and teaching, not for profit)")  # fmt: skip
    add("--picture", type=Path, metavar="FILE", help="contact sheet to draw with check (default: none)")
    options = parser.parse_args(argv)
    if options.name != "mini_imagenet" and (options.source is not None or options.download):
        raise ValueError(f"--from and --download are for mini_imagenet, not for {options.name}")
    if options.picture is not None:
        check_output(options.picture)
    return options


def prepare(options: argparse.Namespace) -> int:
    """Make a data set ready; a part that is not there is told, and is an error only if none is."""
    root = options.root.expanduser()
    if options.name == "omniglot":
        download_omniglot(root)
    if options.download:
        download_mini_imagenet(root)
    data, missing = DATA[options.name](root=root), []
    for part in PARTS:
        try:
            if options.source is not None:
                prepare_mini_imagenet(root, part, source=options.source.expanduser())
            print(f"{part}: {_counts(data.images(part))}")
        except FileNotFoundError as error:
            missing.append(error)
            print(f"{part}: not there")
    if len(missing) == len(PARTS):
        raise missing[0]
    return 0


def check(options: argparse.Namespace) -> int:
    """Tell what is there."""
    data, found, missing = DATA[options.name](root=options.root.expanduser()), {}, None
    for part in PARTS:
        try:
            found[part] = data.images(part)
        except FileNotFoundError as error:
            missing = missing or error
            print(f"{part}: not there")
    if not found and missing is not None:
        raise missing
    hashes = {part: [_hash(image) for image in images.pixels] for part, images in found.items()}
    for part, images in found.items():
        copies = len(images) - len(set(hashes[part]))
        told = f", {copies:,} images are copies of others" if copies else ""
        print(f"{part}: {_counts(images)}{told}")
    wrong = 0
    for one, other in combinations(found, 2):
        names = set(found[one].class_names) & set(found[other].class_names)
        same = set(hashes[one]) & set(hashes[other])
        wrong += len(names) + len(same)
        print(f"{one} and {other} share {len(names) or 'no'} classes and {len(same) or 'no'} images")
    if options.picture is not None:
        _draw(found, data, options.picture)
        print(f"contact sheet: {options.picture}")
    return int(wrong > 0)


def _counts(images: Images) -> str:
    few, many = min(images.counts), max(images.counts)
    each = str(few) if few == many else f"{few} to {many}"
    _, c, h, w = images.pixels.shape
    size, split = images.pixels.numel() / 1e6, split_hash(images.class_names)[:12]
    return f"{len(images.class_names):,} classes of {each} images, {c} x {h} x {w}, {size:,.0f} MB, split hash {split}"


def _hash(image: torch.Tensor) -> bytes:
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest()


def _draw(found: dict[str, Images], data: ImageData, picture: Path) -> None:
    from .pictures import draw_images

    rows = []
    for part, images in found.items():
        first = np.concatenate([[0], np.cumsum(images.counts)[:-1]])
        for i in np.linspace(0, len(images.counts) - 1, min(SHOWN_CLASSES, len(images.counts))).round().astype(int):
            indices = torch.arange(int(first[i]), int(first[i]) + min(SHOWN_IMAGES, images.counts[i]))
            rows.append((f"{part}: {images.class_names[i]}", images.take(indices)))
    draw_images(rows, picture, title=f"{data.dataset}: some classes of each part", ink=data.ink)
