import contextlib
import errno
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snail.datasets import prepared
from snail.datasets.images import Images
from snail.datasets.prepared import Pixels, Source, cache_places, open_prepared, prepare

SHAPE = (3, 4, 5)
COUNTS = {"ant": 2, "bee": 3, "cow": 1}


def image(name: str, number: int) -> Pixels:
    """Every image of every class is another, and none has a zero."""
    seed = list(f"{name} {number}".encode())
    return np.random.default_rng(seed).integers(1, 256, size=SHAPE, dtype=np.uint8)


class Reading:
    """A source that knows which classes were read, and is killed before image ``kill[1]`` of class ``kill[0]``."""

    def __init__(self, counts: dict[str, int] | None = None, found: str = "here", kill: tuple[int, int] | None = None):
        self.counts = counts or COUNTS
        self.read: list[int] = []
        self.kill = kill
        self.source = Source(found, tuple(self.counts), tuple(self.counts.values()), self._images)

    def _images(self, i: int) -> Iterator[Pixels]:
        self.read.append(i)
        name = list(self.counts)[i]
        for number in range(self.counts[name] + 1):
            if self.kill == (i, number):
                raise KeyboardInterrupt
            if number < self.counts[name]:
                yield image(name, number)

    def prepare(self, path: Path) -> None:
        prepare(self.source, path, image_shape=SHAPE)

    def array(self) -> Pixels:
        return np.stack([image(name, number) for name, count in self.counts.items() for number in range(count)])

    def is_in(self, images: Images | None) -> bool:
        return (
            images is not None
            and (images.class_names, images.counts) == (self.source.class_names, self.source.counts)
            and np.array_equal(images.pixels.numpy(), self.array())
        )


def killed(reading: Reading, path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        reading.prepare(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "val.npy"


def test_prepared_images_come_back_as_they_were_given(path: Path) -> None:
    reading = Reading()
    reading.prepare(path)
    assert reading.is_in(open_prepared(path))
    assert sorted(file.name for file in path.parent.iterdir()) == ["val.json", "val.npy"]
    assert reading.read == [0, 1, 2]


def test_facts_of_prepared_images_stand_beside_them(path: Path) -> None:
    Reading().prepare(path)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about == {
        "format": 1,
        "source": "here",
        "class_names": ["ant", "bee", "cow"],
        "counts": [2, 3, 1],
        "shape": [6, *SHAPE],
        "done": 3,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    np.testing.assert_array_equal(np.load(path), Reading().array())  # any tool reads it


def test_there_are_no_images_where_nothing_was_prepared(path: Path) -> None:
    assert open_prepared(path) is None


def test_an_array_of_another_source_does_not_count(path: Path) -> None:
    Reading(found="state 1").prepare(path)
    assert Reading().is_in(open_prepared(path, of="state 1"))
    assert open_prepared(path, of="state 2") is None


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list the mappings of a process")
def test_opened_images_are_a_mapping_of_the_file(path: Path) -> None:
    Reading().prepare(path)
    images = open_prepared(path)
    assert images is not None
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in mapped]
    assert any(start <= images.pixels.data_ptr() < stop for start, stop in ranges)
    assert {line[1][3] for line in mapped} == {"p"}  # private: what is written is the process's own


def test_writing_to_opened_images_does_not_change_the_file(path: Path) -> None:
    Reading().prepare(path)
    before = path.read_bytes()
    images = open_prepared(path)
    assert images is not None
    images.pixels.zero_()
    assert path.read_bytes() == before
    assert Reading().is_in(open_prepared(path))


def test_two_processes_see_the_same_images_whatever_one_writes(path: Path) -> None:
    Reading().prepare(path)
    images = open_prepared(path)
    assert images is not None
    images.pixels[0] = 0
    code = (
        "import hashlib, pathlib, sys; from snail.datasets.prepared import open_prepared; "
        "print(hashlib.sha256(open_prepared(pathlib.Path(sys.argv[1])).pixels.numpy().tobytes()).hexdigest())"
    )
    told = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == hashlib.sha256(Reading().array().tobytes()).hexdigest()


def test_images_that_lie_in_memory_in_another_order_are_written_right(path: Path) -> None:
    given = np.arange(60, dtype=np.uint8).reshape(4, 5, 3).transpose(2, 0, 1)
    prepare(Source("here", ("a",), (1,), lambda i: [given]), path, image_shape=SHAPE)
    np.testing.assert_array_equal(np.load(path)[0], given)


def test_prepare_is_silent_off_a_terminal(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare(Reading().source, path, image_shape=SHAPE, progress="val")
    assert capfd.readouterr() == ("", "")


# -- killed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kill", [(i, number) for i, count in enumerate(COUNTS.values()) for number in range(count + 1)]
)
def test_killed_in_a_class_the_next_goes_on_at_that_class(path: Path, kill: tuple[int, int]) -> None:
    at_once = path.parent / "at_once.npy"
    Reading().prepare(at_once)
    killed(Reading(kill=kill), path)
    assert open_prepared(path) is None and not path.exists()
    again = Reading()
    again.prepare(path)
    assert again.read == list(range(kill[0], 3))
    assert again.is_in(open_prepared(path))
    assert path.read_bytes() == at_once.read_bytes()
    assert path.with_suffix(".json").read_bytes() == at_once.with_suffix(".json").read_bytes()


def test_killed_again_and_again_it_comes_to_an_end(path: Path) -> None:
    read = []
    for kill in ((0, 1), (1, 0), (1, 3), (2, 1), None):
        reading = Reading(kill=kill)
        with contextlib.suppress(KeyboardInterrupt):
            reading.prepare(path)
        read += reading.read
    assert read == [0, 0, 1, 1, 1, 2, 2]
    assert Reading().is_in(open_prepared(path))


@contextlib.contextmanager
def killed_at(step: int, *, after: bool) -> Iterator[list[str]]:
    """Kill before or after the ``step``-th time that a file is hashed, renamed or taken away; gives these steps."""
    steps: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **how: Any) -> Any:
            steps.append(function.__name__)
            mine = len(steps) == step
            if mine and not after:
                raise KeyboardInterrupt
            outcome = function(*args, **how)
            if mine:
                raise KeyboardInterrupt
            return outcome

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(prepared, "file_hash", counted(prepared.file_hash))
        with contextlib.suppress(KeyboardInterrupt):
            yield steps


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_killed_between_any_two_steps_nothing_false_is_said_and_little_is_done_again(
    tmp_path: Path, older: bool, after: bool
) -> None:
    old = Reading({"ape": 2, "bat": 3, "cat": 1}, found="there")  # of the same shape
    for step in itertools.count(1):
        path = tmp_path / f"{step}" / "val.npy"
        if older:
            old.prepare(path)
        first, second = Reading(), Reading()
        with killed_at(step, after=after) as steps:
            first.prepare(path)
        opened = open_prepared(path)
        assert opened is None or first.is_in(opened) or (older and old.is_in(opened)), steps
        if not first.is_in(opened):
            second.prepare(path)
            assert first.is_in(open_prepared(path)), steps
            assert sorted(file.name for file in path.parent.iterdir() if file.name[0] != ".") == ["val.json", "val.npy"]
        if "file_hash" in steps:  # every class was in the array
            assert second.read == [], steps
        if len(steps) < step:
            break
    assert steps.count("file_hash") == 1 and steps.count("replace") == 5  # three classes, the facts, the array


@pytest.mark.parametrize(
    "other",
    [
        Reading({"ant": 2, "fly": 3, "cow": 1}),
        Reading({"ant": 3, "bee": 2, "cow": 1}),
        Reading({"ant": 2, "bee": 3}),
        Reading(found="there"),
    ],
    ids=["names", "counts", "classes", "found"],
)
def test_another_source_does_not_go_on_with_what_was_begun(path: Path, other: Reading) -> None:
    killed(Reading(kill=(2, 0)), path)
    other.read.clear()
    other.prepare(path)
    assert other.read == list(range(len(other.counts)))
    assert other.is_in(open_prepared(path))


def test_what_another_source_wrote_over_is_read_again(path: Path) -> None:
    killed(Reading(kill=(2, 0)), path)
    killed(Reading({"ape": 2, "bat": 3, "cat": 1}, kill=(0, 1)), path)
    again = Reading()
    again.prepare(path)
    assert again.read == [0, 1, 2]
    assert again.is_in(open_prepared(path))


def test_what_was_said_of_a_finished_array_is_not_believed_of_the_next(path: Path) -> None:
    Reading().prepare(path)
    about = replace(prepared._About(**json.loads(path.with_suffix(".json").read_text())), sha256="")
    prepared._write_about(path.with_suffix(".json.part"), about)  # killed before it was taken away
    killed(Reading(kill=(0, 1)), path)
    again = Reading()
    again.prepare(path)
    assert again.read == [0, 1, 2]
    assert again.is_in(open_prepared(path))


@pytest.mark.parametrize("left", [0, 40, 200])
def test_an_array_that_was_cut_off_is_begun_anew(path: Path, left: int) -> None:
    killed(Reading(kill=(2, 0)), path)
    part = path.with_suffix(".npy.part")
    part.write_bytes(part.read_bytes()[:left])
    Reading().prepare(path)
    assert Reading().is_in(open_prepared(path))


def test_a_second_process_waits_for_the_first_and_reads_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    path.parent.mkdir()
    flock, first, second = fcntl.flock, Reading(), Reading()
    other = path.with_suffix(".npy.part").open("ab")  # a lock belongs to an open file, so that one process can do
    flock(other, fcntl.LOCK_EX)

    def waiting(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:  # now the first comes to its end
            monkeypatch.setattr(fcntl, "flock", flock)
            other.close()
            first.prepare(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", waiting)
    second.prepare(path)
    assert (first.read, second.read) == ([0, 1, 2], [])
    assert second.is_in(open_prepared(path))


@pytest.mark.parametrize("found", ["here", "there"])
def test_a_second_process_does_what_the_first_did_not(path: Path, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    path.parent.mkdir()
    flock, first, second = fcntl.flock, Reading(found=found, kill=(2, 0) if found == "here" else None), Reading()
    other = path.with_suffix(".npy.part").open("ab")
    flock(other, fcntl.LOCK_EX)

    def waiting(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX:
            monkeypatch.setattr(fcntl, "flock", flock)
            other.close()
            with contextlib.suppress(KeyboardInterrupt):
                first.prepare(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", waiting)
    second.prepare(path)
    assert second.read == ([2] if found == "here" else [0, 1, 2])
    assert second.is_in(open_prepared(path, of="here"))


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot be asked for room")
def test_a_full_disk_is_an_error_before_anything_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def full(file: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        reading = Reading()
        with pytest.raises(OSError, match="No space left"):
            reading.prepare(path)
    assert reading.read == [] and list(path.parent.iterdir()) == []
    reading.prepare(path)
    assert asked == [path.stat().st_size]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot be asked for room")
def test_a_file_system_that_cannot_be_asked_for_room_or_locked_is_written_all_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr("fcntl.flock", unsupported)
    Reading().prepare(path)
    assert Reading().is_in(open_prepared(path))


def test_a_system_without_locks_prepares_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "fcntl", None)
    killed(Reading(kill=(1, 1)), path)
    again = Reading()
    again.prepare(path)
    assert again.read == [1, 2] and again.is_in(open_prepared(path))


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([image("bee", 0)] * 2, r"class 'bee' of here gave 2 images, not 3"),
        ([], r"class 'bee' of here gave 0 images, not 3"),
        (
            [image("bee", 0)] * 4,
            r"class 'bee' of here: image 4 is uint8 of shape \(3, 4, 5\), but 3 images of uint8 \(3, 4, 5\) are expect",
        ),
        (
            [image("bee", 0), image("bee", 1)[:, :, :4]],
            r"class 'bee' of here: image 2 is uint8 of shape \(3, 4, 4\), but 3 images of uint8 \(3, 4, 5\) are",
        ),
        ([image("bee", 0)[0]], r"image 1 is uint8 of shape \(4, 5\), but"),
        ([image("bee", 0) / np.float32(255)], r"class 'bee' of here: image 1 is float32 of shape \(3, 4, 5\), but"),
    ],
    ids=["too-few", "none", "too-many", "width", "no-colours", "floats"],
)
def test_a_class_that_is_not_as_was_said_is_refused(path: Path, given: list[Pixels], message: str) -> None:
    whole = Reading()

    def read(i: int) -> list[Pixels]:
        return given if i == 1 else [image(list(COUNTS)[i], number) for number in range(whole.source.counts[i])]

    with pytest.raises(ValueError, match=message):
        prepare(replace(whole.source, read=read), path, image_shape=SHAPE)
    assert open_prepared(path) is None and not path.exists()
    whole.prepare(path)  # mended, it goes on
    assert whole.read == [1, 2] and whole.is_in(open_prepared(path))


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return pytest.fail, ("a pickle was loaded",)


def facts(**changed: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = path.with_suffix(".json")
        about.write_text(json.dumps({**json.loads(about.read_text()), **changed}))

    return change


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.with_suffix(".json").write_bytes(content) and None


def without(key: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        about = json.loads(path.with_suffix(".json").read_text())
        del about[key]
        path.with_suffix(".json").write_text(json.dumps(about))

    return change


def cut(length: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:length]) and None


def of_objects(path: Path) -> None:
    array = np.empty((6, *SHAPE), dtype=object)
    array[:] = Trap()
    np.save(path, array, allow_pickle=True)


def as_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, Reading().array())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.with_suffix(".json").unlink(), id="no-json"),
        pytest.param(written(b""), id="json-empty"),
        pytest.param(written(b'{"format": 1, "sou'), id="json-half"),
        pytest.param(written(b"\xff\xfe\x00"), id="json-bytes"),
        pytest.param(written(b"\0" * 300), id="json-zeros"),
        pytest.param(written(b"[1, 2]"), id="json-list"),
        pytest.param(written(b"null"), id="json-null"),
        pytest.param(written(b"3"), id="json-number"),
        pytest.param(without("counts"), id="no-counts"),
        pytest.param(facts(extra=1), id="unknown-fact"),
        pytest.param(facts(format=2), id="format"),
        pytest.param(facts(sha256=""), id="not-whole"),
        pytest.param(facts(shape=[6, 3, 5, 4]), id="shape"),
        pytest.param(facts(shape=None), id="no-shape"),
        pytest.param(facts(counts=[2, 3, 2]), id="sum-of-counts"),
        pytest.param(facts(counts=None), id="null-counts"),
        pytest.param(facts(counts=["2", "3", "1"]), id="counts-of-text"),
        pytest.param(facts(counts=[2, 4, 0]), id="empty-class"),
        pytest.param(facts(class_names=["a", "b"]), id="too-few-names"),
        pytest.param(facts(class_names=["a", "b", "a"]), id="a-name-twice"),
        pytest.param(facts(class_names=[["a"], ["b"], ["c"]]), id="names-of-lists"),
        pytest.param(facts(class_names=7), id="number-for-names"),
        pytest.param(lambda path: path.unlink(), id="no-npy"),
        pytest.param(cut(0), id="npy-empty"),
        pytest.param(cut(5), id="npy-half-a-magic"),
        pytest.param(cut(60), id="npy-half-a-header"),
        pytest.param(cut(128), id="npy-header-alone"),
        pytest.param(cut(-1), id="npy-a-byte-less"),
        pytest.param(lambda path: path.write_bytes(b"\xff" * 1000), id="npy-bytes"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps(Trap())), id="npy-pickle"),
        pytest.param(of_objects, id="npy-objects"),
        pytest.param(as_npz, id="npz"),
        pytest.param(lambda path: np.save(path, np.zeros((6, *SHAPE), np.float32)), id="npy-floats"),
        pytest.param(lambda path: np.save(path, np.zeros((6, *SHAPE), np.int8)), id="npy-signed"),
        pytest.param(lambda path: np.save(path, np.zeros((5, *SHAPE), np.uint8)), id="npy-fewer"),
    ],
)
def test_what_is_damaged_is_not_opened_and_made_anew(path: Path, damage: Callable[[Path], object]) -> None:
    Reading().prepare(path)
    damage(path)
    assert open_prepared(path) is None
    Reading().prepare(path)
    assert Reading().is_in(open_prepared(path))


def test_a_header_with_any_byte_changed_raises_nothing(path: Path) -> None:
    Reading().prepare(path)
    content = path.read_bytes()
    for place in range(128):
        for byte in {0, 0xFF, ord("("), ord("'"), ord("\\"), content[place] ^ 1} - {content[place]}:
            path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            open_prepared(path)
    path.write_bytes(content)
    assert Reading().is_in(open_prepared(path))


# -- places ------------------------------------------------------------------------------------------------------------


def test_places_are_the_folder_and_then_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    here, user = cache_places(tmp_path / "data", "val.npy")
    assert here == tmp_path / "data" / "val.npy"
    assert user.parent == tmp_path / "xdg" / "snail"
    assert user.name.startswith("val_") and user.suffix == ".npy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_places(tmp_path / "data", "val.npy")[1] == tmp_path / "home" / ".cache" / "snail" / user.name


def test_places_in_the_cache_differ_by_folder_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data").mkdir()
    data, link, other = (cache_places(tmp_path / name, "val.npy")[1] for name in ("data", "link", "other"))
    assert data == link != other


def test_there_is_one_place_where_there_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_places(tmp_path, "val.npy") == [tmp_path / "val.npy"]
