"""Omniglot as one array: find the drawings, decode them once, split the characters.

The source is in ``root/omniglot-py``, as torchvision has it too: the zips ``images_background.zip`` and
``images_evaluation.zip``, or the folders that are extracted from them.
"""

import io
import zipfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from snail.files import replacing

from .decoding import ink_of
from .download import RemoteFile, download
from .prepared import cache_places

Drawings = npt.NDArray[np.uint8]

FOLDER = "omniglot-py"
PARTS = {"images_background": 964, "images_evaluation": 659}  # the number of characters in each
ARCHIVES = {
    part: RemoteFile(
        name=f"{part}.zip",
        addresses=(
            f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{part}.zip",
            f"https://github.com/brendenlake/omniglot/raw/master/python/{part}.zip",
        ),
        size=None,
        hash=md5,
        hash_kind="md5",
    )
    for part, md5 in (
        ("images_background", "68d2efa1b9178cc56df9314c21c6e718"),
        ("images_evaluation", "6b91aef0f799c5bb55b94e3f2daec811"),
    )
}
DRAWINGS = 20  # of each character
SIZE = 28  # pixels a side, from 105
SPLITS = ("vinyals", "random")

_VINYALS = {  # an entry is an alphabet or a single character; all that is not listed is for training
    "val": ["Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)"],
    "test": ["Kannada", "Keble", "Malayalam", "Manipuri", "Mongolian", "Old_Church_Slavonic_(Cyrillic)"]
    + ["Oriya", "Sylheti", "Syriac_(Serto)", "Tengwar", "Tibetan", "ULOG"]
    + [f"Gurmukhi/character{number}" for number in (42, 43, 44, 45)],
}
_BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)  # what bad bytes cause
_CACHE_FORMAT = 1  # raise it when the decoded pixels or the layout of the file change


def read_omniglot(root: Path, *, progress: bool = True) -> tuple[list[str], Drawings]:
    """Read all of Omniglot, background and evaluation pooled, from a cache where there is one.

    The first call decodes 32,460 drawings (seconds) and leaves a cache of 25 MB in ``root/omniglot-py`` or,
    where that cannot be written, in ``$XDG_CACHE_HOME/snail`` (``~/.cache/snail``), or nowhere.

    Args:
        root: the folder that holds ``omniglot-py``.
        progress: show a progress bar while decoding, if standard error is a terminal.

    Returns:
        The sorted class names ``"Alphabet/characterNN"`` (1,623), and their drawings in the order of the
        file names, uint8 ``(1623, 20, 28, 28)``: grey levels, ink 255 on 0.

    Raises:
        FileNotFoundError: a part is there neither as a folder nor as a zip.
        ValueError: a part is not complete, or a zip or a PNG file is damaged.
    """
    caches = _cache_paths(root)
    if all(any(source.exists() for source in _sources(root, part)) for part in PARTS):
        for cache in caches:  # only here: a cache must not outlive its data
            if (cached := _load(cache)) is not None:
                return cached
    names, images = _decode_all([_find(root, part) for part in PARTS], progress)
    for cache in caches:
        try:
            _save(cache, names, images)
            break
        except OSError:  # read-only, or full: try the next place, and at last do without
            continue
    return names, images


def download_omniglot(root: Path) -> None:
    """Fetch the zips of those parts of Omniglot that are complete neither as a folder nor as a zip.

    Args:
        root: the folder that is to hold ``omniglot-py``.

    Raises:
        RuntimeError: the download, or writing what it brought, failed.
    """
    for part in PARTS:
        trouble = ""
        try:
            _find(root, part)
            continue
        except ValueError as error:
            trouble = f"{error}; but "
        except OSError:
            pass
        try:
            download(ARCHIVES[part], root / FOLDER)
        except RuntimeError as err:
            archives = " and ".join(archive.name for archive in ARCHIVES.values())
            raise RuntimeError(f"{trouble}Omniglot is in {archives}, and {err}") from err


def omniglot_split(names: Sequence[str], split: str) -> dict[str, list[str]]:
    """Split the characters into 1,028 for training, 172 for validation and 423 for test.

    Args:
        names: the class names of `read_omniglot`.
        split: ``"vinyals"`` (by whole alphabets but one, after Vinyals et al., 2016) or ``"random"``
            (characters of all alphabets, drawn once and listed in ``omniglot_random.txt``).

    Returns:
        The names under the keys ``"train"``, ``"val"`` and ``"test"``, in the order of `names`.

    Raises:
        ValueError: `split` is unknown, or lists an alphabet or a character that `names` lacks.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    table = _VINYALS if split == "vinyals" else _random_table()
    part_of = {entry: part for part, entries in table.items() for entry in entries}
    # Refused, as an alphabet in another spelling would slip from the test characters into training.
    if absent := sorted(part_of.keys() - {*names, *(name.split("/")[0] for name in names)}):
        raise ValueError(f"the names lack {len(absent)} that split {split!r} lists, such as {absent[0]!r}")
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for name in names:
        parts[part_of.get(name) or part_of.get(name.split("/")[0], "train")].append(name)
    return parts


def _random_table() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {"val": [], "test": []}
    text = resources.files("snail.datasets").joinpath("omniglot_random.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if not line.startswith("#"):
            part, alphabet, *numbers = line.split()
            table[part] += [f"{alphabet}/character{number}" for number in numbers]
    return table


def _again(source: Path) -> str:
    return f"delete {source} and run `snail fit` again, which downloads it"


def _sources(root: Path, part: str) -> tuple[Path, Path]:
    return root / FOLDER / part, root / FOLDER / f"{part}.zip"


@contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _BROKEN_ZIP as err:
        raise ValueError(f"{path} is damaged ({err!r}); {_again(path)}") from err


def _find(root: Path, part: str) -> tuple[Path, dict[str, list[str]]]:
    """The folder of a part if it is complete, else its zip, with the sorted files of each class."""
    trouble = ""
    for source in _sources(root, part):
        if source.is_dir():
            members = [path.relative_to(source).as_posix() for path in source.glob("*/*/*.png")]
        elif source.is_file():
            with _open_zip(source) as archive:
                members = archive.namelist()
        else:
            continue
        classes: dict[str, list[str]] = {}
        for member in sorted(members):
            *_, alphabet, character, file = ("", "", *PurePosixPath(member).parts)
            if file.endswith(".png") and not file.startswith("."):  # macOS adds a "._*.png" to each drawing
                classes.setdefault(f"{alphabet}/{character}", []).append(member)
        odd = sum(len(files) != DRAWINGS for files in classes.values())
        if len(classes) == PARTS[part] and not odd:
            return source, classes
        trouble = (
            f"{source} holds {len(classes)} characters, {odd} of them without exactly {DRAWINGS} drawings, "
            f"but {PARTS[part]} characters of {DRAWINGS} are expected; {_again(source)}"
        )
    if trouble:
        raise ValueError(trouble)
    raise FileNotFoundError(
        f"neither {part}/ nor {part}.zip is in {root / FOLDER}; put one there, or run `snail fit`, which downloads it"
    )


def _contents(source: Path, members: Sequence[str]) -> Generator[bytes, None, None]:
    if source.is_dir():
        yield from ((source / member).read_bytes() for member in members)
    else:
        with _open_zip(source) as archive:
            yield from map(archive.read, members)


def _decode(png: bytes) -> Drawings:
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return np.asarray(ink_of(image, SIZE))


def _decode_all(parts: Sequence[tuple[Path, dict[str, list[str]]]], progress: bool) -> tuple[list[str], Drawings]:
    names = [name for _, classes in parts for name in classes]
    images = np.empty((len(names) * DRAWINGS, SIZE, SIZE), dtype=np.uint8)
    drawings = iter(images)
    with tqdm(total=len(images), desc="decoding Omniglot", disable=None if progress else True) as bar:
        for source, classes in parts:
            members = [member for files in classes.values() for member in files]
            with closing(_contents(source, members)) as pngs:
                for member, png in zip(members, pngs, strict=True):
                    try:
                        next(drawings)[:] = _decode(png)
                    except Exception as err:  # Pillow's errors share no base class
                        raise ValueError(f"{source / member} is a broken PNG; {_again(source)}") from err
                    bar.update()
    order = sorted(range(len(names)), key=names.__getitem__)
    return [names[i] for i in order], images.reshape(-1, DRAWINGS, SIZE, SIZE)[order]


def _cache_paths(root: Path) -> list[Path]:
    return cache_places(root / FOLDER, f"omniglot_{SIZE}x{SIZE}_v{_CACHE_FORMAT}.npz")


def _load(path: Path) -> tuple[list[str], Drawings] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            names, images = [str(name) for name in stored["names"]], stored["images"]
    except Exception:  # absent, or damaged in whatever way: it is made anew
        return None
    shape = (sum(PARTS.values()), DRAWINGS, SIZE, SIZE)
    fits = images.shape == shape and images.dtype == np.uint8 and len(names) == len(images)
    return (names, images) if fits else None


def _save(path: Path, names: list[str], images: Drawings) -> None:
    with replacing(path, "wb") as file:
        np.savez(file, names=np.array(names), images=images)
