import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_datasets_download import Web, missing, serving, whole

from snail.datasets import omniglot_reader as reader
from snail.datasets.download import RemoteFile
from snail.datasets.images import split_hash

CHARACTERS = """
Alphabet_of_the_Magi 20 Angelic 20 Anglo-Saxon_Futhorc 29 Arcadian 26 Armenian 41 Asomtavruli_(Georgian) 40
Atemayar_Qelisayer 26 Atlantean 26 Aurek-Besh 26 Avesta 26 Balinese 24 Bengali 46
Blackfoot_(Canadian_Aboriginal_Syllabics) 14 Braille 26 Burmese_(Myanmar) 34 Cyrillic 33 Early_Aramaic 22
Futurama 26 Ge_ez 26 Glagolitic 45 Grantha 43 Greek 24 Gujarati 48 Gurmukhi 45 Hebrew 22
Inuktitut_(Canadian_Aboriginal_Syllabics) 16 Japanese_(hiragana) 52 Japanese_(katakana) 47 Kannada 41 Keble 26
Korean 40 Latin 26 Malay_(Jawi_-_Arabic) 40 Malayalam 47 Manipuri 40 Mkhedruli_(Georgian) 41 Mongolian 30
N_Ko 33 Ojibwe_(Canadian_Aboriginal_Syllabics) 14 Old_Church_Slavonic_(Cyrillic) 45 Oriya 46 Sanskrit 42
Sylheti 28 Syriac_(Estrangelo) 23 Syriac_(Serto) 23 Tagalog 17 Tengwar 25 Tibetan 42 Tifinagh 55 ULOG 26
"""
NAMES = [
    f"{alphabet}/character{number:02d}"
    for alphabet, count in zip(CHARACTERS.split()[::2], CHARACTERS.split()[1::2], strict=True)
    for number in range(1, int(count) + 1)
]
HASHES = {
    ("vinyals", "train"): "189c10b6479a07e808302b5f1ada00d995589557373e68ebe3e718780196ed0a",
    ("vinyals", "val"): "8b1baec8706cbc2c2f1d23874a30a50ac8f589502ea36e213c3c3cf14d30a189",
    ("vinyals", "test"): "af119b10f318ddb7afdf5108b360887823cf06da68d846c7e5de7286492976d7",
    ("random", "train"): "789444fb20e418678f736460a45840bdb7fa1017528ca024e6f1c79796103f0e",
    ("random", "val"): "16756c8e6f016d952dff5e11bbed9a06b1b601293d6c0e4a2439e2ae3b6292c7",
    ("random", "test"): "a37d5b4e8d1427336ea6cc041f4a14b52f8fd435d8e0d1cededc5418d5748991",
}
SMALL = {  # background and evaluation alternate in the sorted order
    "images_background": ["Beta/character01", "Beta/character02", "Delta/character01"],
    "images_evaluation": ["Alpha/character01", "Gamma/character01"],
}
SMALL_NAMES = sorted(name for names in SMALL.values() for name in names)


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def stroke(at: int) -> Image.Image:
    """A drawing as Omniglot has them, 105x105 and one bit, with one stroke four pixels wide."""
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line([(at, 20), (at, 80)], fill=0, width=4)
    return image


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five characters of two drawings as extracted folders; the user's cache is empty."""
    monkeypatch.setattr(reader, "PARTS", {part: len(names) for part, names in SMALL.items()})
    monkeypatch.setattr(reader, "DRAWINGS", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, names in SMALL.items():
        for name in names:
            folder = tmp_path / "data" / "omniglot-py" / part / name
            folder.mkdir(parents=True)
            for drawing in (2, 1):  # not in the order in which they are to be read
                stroke(10 + 15 * SMALL_NAMES.index(name) + 6 * drawing).save(folder / f"0001_0{drawing}.png")
    return tmp_path / "data"


def zip_up(root: Path, part: str) -> Path:
    """Put the folder of a part into a zip and take it away."""
    folder = root / "omniglot-py" / part
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*"), reverse=True):
            file.write(path, path.relative_to(folder.parent))
    shutil.rmtree(folder)
    return archive


def local_cache(root: Path) -> Path:
    return next((root / "omniglot-py").glob("*.npz"))


def refuse_writing(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Stand in for read-only folders, which the superuser could write to all the same."""
    save = reader._save

    def guarded(path: Path, names: list[str], images: reader.Drawings) -> None:
        if any(path.is_relative_to(folder) for folder in folders):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        save(path, names, images)

    monkeypatch.setattr(reader, "_save", guarded)


def refuse_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(png: bytes) -> reader.Drawings:
        raise AssertionError("decoded although there is a cache")

    monkeypatch.setattr(reader, "_decode", decode)


def test_read_orders_classes_and_drawings(root: Path) -> None:
    names, images = reader.read_omniglot(root)
    assert names == SMALL_NAMES
    assert images.shape == (5, 2, 28, 28) and images.dtype == np.uint8
    columns = images.sum(axis=2, dtype=np.int64).argmax(axis=-1)  # where each vertical stroke is
    assert columns.ravel().tolist() == sorted(set(columns.ravel().tolist()))


def test_read_draws_ink_on_zero(root: Path) -> None:
    _, images = reader.read_omniglot(root)
    assert images.max(axis=(2, 3)).min() > 150
    assert images[:, :, :4].max() == 0 and images[:, :, -4:].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_decode_draws_ink_255_on_0(mode: str) -> None:
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).rectangle([(30, 30), (59, 59)], fill=0)  # 8 of 28 pixels each way, from the 8th on
    drawing = reader._decode(png_of(image.convert(mode)))
    assert drawing.shape == (28, 28) and drawing.dtype == np.uint8
    assert drawing[9:15, 9:15].min() == 255
    assert drawing[:7].max() == drawing[17:].max() == drawing[:, :7].max() == drawing[:, 17:].max() == 0


def test_decode_smooths_the_edges() -> None:
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line([(20, 10), (70, 95)], fill=0, width=3)
    assert len(np.unique(reader._decode(png_of(image)))) > 10  # nearest neighbour would leave two levels


def test_decode_commutes_with_quarter_turns() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(105, 105), dtype=np.uint8))
    turned = reader._decode(png_of(image.transpose(Image.Transpose.ROTATE_90)))
    np.testing.assert_allclose(turned, np.rot90(reader._decode(png_of(image))), rtol=0, atol=2)


@pytest.mark.parametrize("zipped", [["images_background"], ["images_evaluation"], list(SMALL)])
def test_read_gives_the_same_from_folders_and_zips(root: Path, zipped: list[str]) -> None:
    names, images = reader.read_omniglot(root)
    local_cache(root).unlink()
    for part in zipped:
        zip_up(root, part)
    names_again, images_again = reader.read_omniglot(root)
    assert names_again == names
    np.testing.assert_array_equal(images_again, images)


def test_read_takes_the_zip_where_the_folder_is_incomplete(root: Path) -> None:
    backup = root.parent / "backup"
    shutil.copytree(root / "omniglot-py" / "images_background", backup)
    zip_up(root, "images_background")
    shutil.copytree(backup, root / "omniglot-py" / "images_background")
    (root / "omniglot-py" / "images_background" / "Beta" / "character01" / "0001_01.png").unlink()
    names, images = reader.read_omniglot(root)
    assert names == SMALL_NAMES and images.any(axis=(2, 3)).all()


@pytest.mark.parametrize("as_zip", [False, True])
def test_read_passes_over_files_of_the_finder(root: Path, as_zip: bool) -> None:
    folder = root / "omniglot-py" / "images_background"
    (folder / "Beta" / "character01" / "._0001_01.png").write_bytes(b"no drawing")
    (folder / ".DS_Store").write_bytes(b"")
    if as_zip:
        zip_up(root, "images_background")
    assert reader.read_omniglot(root)[0] == SMALL_NAMES


def test_read_is_silent_off_a_terminal(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reader.read_omniglot(root, progress=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda folder: shutil.rmtree(folder / "Delta"), "2 characters, 0 of them"),
        (lambda folder: (folder / "Delta/character01/0001_02.png").unlink(), "3 characters, 1 of them"),
        (lambda folder: shutil.copytree(folder / "Delta", folder / "Zeta"), "4 characters, 0 of them"),
    ],
    ids=["a-character-less", "a-drawing-less", "a-character-more"],
)
def test_read_refuses_wrong_counts(root: Path, change: Callable[[Path], None], found: str, as_zip: bool) -> None:
    change(root / "omniglot-py" / "images_background")
    if as_zip:
        zip_up(root, "images_background")
    source = r"images_background\.zip" if as_zip else "images_background"
    with pytest.raises(ValueError, match=rf"{source} holds {found} .* 3 characters of 2 .*; delete .*{source}"):
        reader.read_omniglot(root)


def test_read_refuses_an_empty_folder(root: Path) -> None:
    shutil.rmtree(root / "omniglot-py" / "images_evaluation")
    (root / "omniglot-py" / "images_evaluation").mkdir()
    with pytest.raises(ValueError, match="images_evaluation holds 0 characters"):
        reader.read_omniglot(root)


def test_read_refuses_a_truncated_zip(root: Path) -> None:
    archive = zip_up(root, "images_evaluation")
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged .*; delete .* run .snail fit. again"):
        reader.read_omniglot(root)


def test_read_refuses_a_zip_with_damaged_contents(root: Path) -> None:
    archive = zip_up(root, "images_evaluation")
    with zipfile.ZipFile(archive) as file:
        info = next(info for info in file.infolist() if info.filename.endswith(".png"))
    content = bytearray(archive.read_bytes())
    start = info.header_offset + 30 + len(info.filename)
    content[start : start + info.compress_size] = b"\xff" * info.compress_size
    archive.write_bytes(content)
    with pytest.raises(ValueError, match=r"images_evaluation\.zip is damaged"):
        reader.read_omniglot(root)


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("length", [0, 20, 60])
def test_read_names_a_broken_png(root: Path, length: int, as_zip: bool) -> None:
    file = root / "omniglot-py" / "images_background" / "Delta" / "character01" / "0001_02.png"
    file.write_bytes(file.read_bytes()[:length])
    if as_zip:
        zip_up(root, "images_background")
    with pytest.raises(ValueError, match=r"Delta.character01.0001_02\.png is a broken PNG; delete"):
        reader.read_omniglot(root)
    assert not list(root.rglob("*.npz")) and not list(root.rglob("*.tmp"))


def test_read_refuses_a_missing_root(root: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"neither images_background/ nor .*absent.*snail fit., which downloads it"
    ):
        reader.read_omniglot(root / "absent")


def test_read_refuses_a_missing_part(root: Path) -> None:
    shutil.rmtree(root / "omniglot-py" / "images_evaluation")
    with pytest.raises(FileNotFoundError, match=r"neither images_evaluation/ nor images_evaluation\.zip"):
        reader.read_omniglot(root)


def test_cache_serves_the_second_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, images = reader.read_omniglot(root)
    assert local_cache(root).is_file() and not list(root.rglob("*.tmp"))
    assert not (root.parent / "cache").exists()
    refuse_decoding(monkeypatch)
    names_again, images_again = reader.read_omniglot(root)
    assert names_again == names and type(names_again[0]) is str
    np.testing.assert_array_equal(images_again, images)
    images_again += 1  # an array of one's own, not a view of the file


def test_cache_goes_to_the_user_where_root_is_read_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, root)
    _, images = reader.read_omniglot(root)
    assert len(list((root.parent / "cache" / "snail").iterdir())) == 1
    assert not list(root.rglob("*.npz"))
    refuse_decoding(monkeypatch)
    np.testing.assert_array_equal(reader.read_omniglot(root)[1], images)


def test_cache_of_the_user_is_not_served_for_another_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = root.parent / "other"
    shutil.copytree(root, other)
    stroke(99).save(other / "omniglot-py" / "images_evaluation" / "Alpha" / "character01" / "0001_01.png")
    refuse_writing(monkeypatch, root, other)
    _, images = reader.read_omniglot(root)
    _, images_of_other = reader.read_omniglot(other)
    assert (images != images_of_other).any()
    np.testing.assert_array_equal(reader.read_omniglot(root)[1], images)


def test_cache_is_done_without_where_nothing_is_writable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writing(monkeypatch, root.parent)
    for _ in range(2):
        assert reader.read_omniglot(root)[0] == SMALL_NAMES
    assert not list(root.parent.rglob("*.npz"))


def test_cache_does_without_a_home_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    refuse_writing(monkeypatch, root)
    assert reader.read_omniglot(root)[0] == SMALL_NAMES


def test_cache_leaves_nothing_beside_when_the_disk_is_full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert reader.read_omniglot(root)[0] == SMALL_NAMES
    assert not [path for path in root.parent.rglob("*") if path.suffix in (".tmp", ".npz")]


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replaced(**arrays: object) -> Callable[[Path], None]:
    whole = {"names": np.array(SMALL_NAMES), "images": np.zeros((5, 2, 28, 28), np.uint8)}
    return lambda path: np.savez(path, **(whole | arrays))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps(Trap())),
        half,
        flipped,
        replaced(images=np.zeros((5, 2, 28, 28), np.float32)),
        replaced(images=np.zeros((5, 2, 27, 28), np.uint8)),
        replaced(names=np.array(SMALL_NAMES[:-1])),
        replaced(names=np.array([Trap()], dtype=object)),
    ],
    ids=["empty", "pickle", "half", "flipped", "dtype", "shape", "names", "objects"],
)
def test_cache_is_made_anew_where_it_is_damaged(
    root: Path, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, images = reader.read_omniglot(root)
    damage(local_cache(root))
    names_again, images_again = reader.read_omniglot(root)
    assert names_again == names
    np.testing.assert_array_equal(images_again, images)
    refuse_decoding(monkeypatch)
    np.testing.assert_array_equal(reader.read_omniglot(root)[1], images)


def test_cache_of_another_format_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.read_omniglot(root)
    monkeypatch.setattr(reader, "_CACHE_FORMAT", reader._CACHE_FORMAT + 1)
    refuse_decoding(monkeypatch)
    with pytest.raises(ValueError, match="broken PNG"):  # it goes to decode again
        reader.read_omniglot(root)


def test_cache_does_not_outlive_its_data(root: Path) -> None:
    reader.read_omniglot(root)
    shutil.rmtree(root / "omniglot-py" / "images_background")
    with pytest.raises(FileNotFoundError, match="images_background"):
        reader.read_omniglot(root)


@pytest.fixture
def web(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A server that has the zips of the small Omniglot, to which the addresses point."""
    monkeypatch.setitem(sys.modules, "torchvision", None)  # it is not needed
    shutil.copytree(root, root.parent / "server")
    with serving() as server:
        archives = {}
        for part in SMALL:
            content = zip_up(root.parent / "server", part).read_bytes()
            addresses = server.address(f"/{part}.zip", whole(content)), server.address(f"/other/{part}.zip", missing)
            archives[part] = RemoteFile(f"{part}.zip", addresses, None, hashlib.md5(content).hexdigest(), "md5")
        monkeypatch.setattr(reader, "ARCHIVES", archives)
        yield server


@pytest.mark.parametrize("as_zip", [False, True])
def test_download_does_nothing_where_all_is_there(root: Path, as_zip: bool, web: Web) -> None:
    for part in SMALL if as_zip else ():
        zip_up(root, part)
    reader.download_omniglot(root)
    assert web.asked == []


def test_download_fetches_both_parts(root: Path, web: Web, tmp_path: Path) -> None:
    reader.download_omniglot(tmp_path / "new")
    assert web.asked == [("/images_background.zip", None), ("/images_evaluation.zip", None)]
    files = {path.name for path in (tmp_path / "new" / "omniglot-py").iterdir()}
    assert files == {"images_background.zip", "images_evaluation.zip"}
    names, images = reader.read_omniglot(tmp_path / "new")
    assert names == SMALL_NAMES
    np.testing.assert_array_equal(images, reader.read_omniglot(root)[1])
    reader.download_omniglot(tmp_path / "new")
    assert len(web.asked) == 2


def test_download_fetches_what_is_damaged(root: Path, web: Web) -> None:
    half(zip_up(root, "images_evaluation"))
    reader.download_omniglot(root)
    assert web.asked == [("/images_evaluation.zip", None)]
    assert reader.read_omniglot(root)[0] == SMALL_NAMES


def test_download_fetches_the_zip_where_the_folder_is_incomplete(root: Path, web: Web) -> None:
    shutil.rmtree(root / "omniglot-py" / "images_background" / "Delta")
    reader.download_omniglot(root)
    assert web.asked == [("/images_background.zip", None)]
    assert reader.read_omniglot(root)[0] == SMALL_NAMES


def test_download_that_fails_leaves_what_is_damaged_and_tells_what_was_wrong_with_it(root: Path, web: Web) -> None:
    archive = zip_up(root, "images_evaluation")
    half(archive)
    before = archive.read_bytes()
    web.answers["/images_evaluation.zip"] = [whole(b"PK, but not the zip")]
    with pytest.raises(RuntimeError, match=r"images_evaluation\.zip is damaged .*; but Omniglot is in .* sent another"):
        reader.download_omniglot(root)
    assert archive.read_bytes() == before
    assert list(archive.parent.glob(".*")) == []


def test_download_that_fails_tells_how_incomplete_is_what_is_there(root: Path, web: Web) -> None:
    shutil.rmtree(root / "omniglot-py" / "images_background" / "Delta")
    web.answers["/images_background.zip"] = [missing]
    with pytest.raises(RuntimeError, match=r"images_background holds 2 characters, .*; but Omniglot is in "):
        reader.download_omniglot(root)


def test_download_failure_names_the_remedy(root: Path, web: Web, tmp_path: Path) -> None:
    web.answers["/images_background.zip"] = [missing]
    address, other = reader.ARCHIVES["images_background"].addresses
    with pytest.raises(RuntimeError) as caught:
        reader.download_omniglot(tmp_path / "new")
    assert str(caught.value) == (
        "Omniglot is in images_background.zip and images_evaluation.zip, and images_background.zip could not be "
        f"downloaded: {address} answered 404 Not Found; {other} answered 404 Not Found; fetch images_background.zip by "
        f"hand from {address} (md5 {reader.ARCHIVES['images_background'].hash}) and put it into "
        f"{tmp_path / 'new' / 'omniglot-py'}"
    )
    assert not (tmp_path / "new").exists()


def test_download_says_that_the_folder_cannot_be_written(root: Path, web: Web, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"a file")  # in which even the superuser can make no folder
    with pytest.raises(
        RuntimeError, match=r"images_background\.zip cannot be downloaded, as .*taken/omniglot-py cannot"
    ):
        reader.download_omniglot(tmp_path / "taken")


def test_archives_are_those_of_the_original() -> None:
    assert list(reader.ARCHIVES) == list(reader.PARTS)
    for part, archive in reader.ARCHIVES.items():
        assert archive.name == f"{part}.zip"
        for address in archive.addresses:
            assert re.fullmatch(
                rf"https://(raw\.)?github(usercontent)?\.com/brendenlake/omniglot/.*/{part}\.zip", address
            )


@pytest.mark.parametrize("split", reader.SPLITS)
def test_split_covers_all_names_once(split: str) -> None:
    parts = reader.omniglot_split(NAMES, split)
    assert {part: len(names) for part, names in parts.items()} == {"train": 1028, "val": 172, "test": 423}
    assert sorted(name for names in parts.values() for name in names) == sorted(NAMES)


@pytest.mark.parametrize(("split", "part"), HASHES)
def test_split_stays_as_it_is(split: str, part: str) -> None:
    assert split_hash(reader.omniglot_split(NAMES, split)[part]) == HASHES[split, part]


def test_split_vinyals_divides_only_gurmukhi() -> None:
    parts = reader.omniglot_split(NAMES, "vinyals")
    alphabets = {part: {name.split("/")[0] for name in names} for part, names in parts.items()}
    assert alphabets["train"] & alphabets["test"] == {"Gurmukhi"}
    assert not alphabets["val"] & (alphabets["train"] | alphabets["test"])
    assert [name for name in parts["test"] if name.startswith("Gurmukhi")] == [
        f"Gurmukhi/character{number}" for number in range(42, 46)
    ]


def test_split_keeps_the_order_of_the_names() -> None:
    forward, backward = (reader.omniglot_split(names, "random")["val"] for names in (NAMES, NAMES[::-1]))
    assert forward == backward[::-1] == sorted(forward)


def test_split_refuses_an_unknown_split() -> None:
    with pytest.raises(ValueError, match=r"split must be one of vinyals, random, got 'lake'"):
        reader.omniglot_split(NAMES, "lake")


@pytest.mark.parametrize(
    ("split", "absent"),
    [("vinyals", "Keble"), ("vinyals", "Gurmukhi/character42"), ("random", "Angelic/character01")],
)
def test_split_refuses_names_that_lack_what_it_lists(split: str, absent: str) -> None:
    names = [name for name in NAMES if not name.startswith(absent)]
    with pytest.raises(ValueError, match=rf"lack 1 that split '{split}' lists, such as '{absent}'"):
        reader.omniglot_split(names, split)


def test_split_hash_ends_every_line() -> None:
    # printf 'a\nb\n' | sha256sum
    expected = "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"
    assert split_hash(["b", "a"]) == split_hash(iter(["a", "b"])) == expected


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("SNAIL_DATA")
    if not folder or not (Path(folder) / "omniglot" / "omniglot-py").is_dir():
        pytest.skip("SNAIL_DATA names no folder with omniglot/omniglot-py")
    return Path(folder)


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], reader.Drawings]]:
    """All of Omniglot, by links: the superuser could write a cache even into a read-only folder."""
    folder = tmp_path_factory.mktemp("real") / "omniglot-py"
    folder.mkdir()
    for path in (data / "omniglot" / "omniglot-py").iterdir():
        if path.stem in reader.PARTS:
            (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
        yield reader.read_omniglot(folder.parent)


def test_read_reads_the_real_data(real: tuple[list[str], reader.Drawings]) -> None:
    names, images = real
    assert names == sorted(NAMES)
    assert images.shape == (1623, 20, 28, 28) and images.dtype == np.uint8
    assert images.max(axis=(2, 3)).min() > 100  # each drawing has ink
    assert 15 < images.mean() < 30
    first = names.index("Braille/character01")
    np.testing.assert_array_equal(images[first, 2], images[first, 18])  # twice the same, in the original too


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_split_vinyals_is_that_of_the_literature(
    part: str, data: Path, real: tuple[list[str], reader.Drawings]
) -> None:
    file = data / "splits" / "omniglot_vinyals" / f"{part}.txt"
    if not file.is_file():
        pytest.skip(f"SNAIL_DATA has no {file.name} of the split")
    expected = {line.rpartition("/")[0] for line in file.read_text().split()}  # a line for each rotation
    assert reader.omniglot_split(real[0], "vinyals")[part] == sorted(expected)
