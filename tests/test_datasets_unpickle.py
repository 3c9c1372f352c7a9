import builtins
import os
import pickle
import random
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snail.datasets.unpickle import read_pickle

PROTOCOLS = range(6)
ARRAYS = {
    "uint8-4d": np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3),
    "int64": np.array([-(2**62), 0, 7]),
    "big-endian": np.arange(5, dtype=">i4"),
    "float32": np.linspace(-1, 1, 7, dtype=np.float32),
    "half": np.ones(3, dtype=np.float16),
    "complex": np.array([1 + 2j]),
    "bool": np.array([True, False]),
    "text": np.array(["ant", "bee"]),
    "bytes": np.array([b"ant", b"bee"]),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "turned": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(10)[::-2],
    "empty": np.zeros((0, 84, 84, 3), dtype=np.uint8),
    "no-axes": np.array(3.5),
}
PLAIN = {
    "dict-of-lists": {"n01532829": [0, 1, 2], "n01558993": [3, 4]},
    "ordered-dict": OrderedDict([("b", 1), ("a", [2])]),
    "bytes": [b"", b"\x00\xff\n'", b"ant"],
    "bytearray": bytearray(b"\x00\xff"),
    "text": ["", "ant", "ä\n'\\", "\u65e5"],
    "numbers": [0, -1, 2**80, 1.5, float("inf"), 2j, True, None],
    "sets": [{1, 2}, frozenset({3}), (), (1,), (1, (2, 3))],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.pkl"


def read(path: Path, content: bytes) -> Any:
    path.write_bytes(content)
    return read_pickle(path)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back(path: Path, kind: str, protocol: int) -> None:
    array = ARRAYS[kind]
    held = read(path, pickle.dumps(array, protocol))
    assert isinstance(held, np.ndarray) and held.dtype == pickle.loads(pickle.dumps(array, protocol)).dtype
    np.testing.assert_array_equal(held, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_containers_come_back(path: Path, kind: str, protocol: int) -> None:
    held = read(path, pickle.dumps(PLAIN[kind], protocol))
    assert held == PLAIN[kind]
    assert list(held) == list(PLAIN[kind])  # in order


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "number", [np.uint8(200), np.int64(-5), np.float32(0.1), np.float64(0.1), np.bool_(True), np.str_("ant")], ids=repr
)
def test_numpy_scalars_come_back(path: Path, number: np.generic, protocol: int) -> None:
    held = read(path, pickle.dumps([number], protocol))[0]
    assert held == number and type(held) is type(number)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cache_of_miniimagenet_comes_back(path: Path, protocol: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(6, 84, 84, 3), dtype=np.uint8)
    classes = {"n01855672": [0, 1, 2], "n02091244": np.arange(3, 6), "n02114548": [np.int64(5)]}
    held = read(path, pickle.dumps({"image_data": images, "class_dict": classes}, protocol))
    np.testing.assert_array_equal(held["image_data"], images)
    assert {name: list(indices) for name, indices in held["class_dict"].items()} == {
        name: list(indices) for name, indices in classes.items()
    }


def test_one_array_in_two_places_comes_back_as_one(path: Path) -> None:
    array = np.arange(3)
    held = read(path, pickle.dumps({"a": array, "b": [array]}))
    assert held["a"] is held["b"][0]


@pytest.mark.parametrize("protocol", [0, 1, 2])
@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_an_older_numpy_are_read(path: Path, kind: str, protocol: int) -> None:
    content = pickle.dumps([ARRAYS[kind], np.float32(0.5)], protocol).replace(b"numpy._core", b"numpy.core")
    assert content.count(b"numpy.core.multiarray") >= 2 and b"_core" not in content
    array, number = read(path, content)
    assert array.dtype.newbyteorder("=") == ARRAYS[kind].dtype.newbyteorder("=")
    np.testing.assert_array_equal(array, ARRAYS[kind])
    assert number == 0.5


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_of_a_newer_numpy_are_read(path: Path, protocol: int) -> None:
    named = b"numpy.core" if not hasattr(np, "_core") else b"numpy._core"
    content = pickle.dumps(np.arange(3), protocol)
    assert named in content
    np.testing.assert_array_equal(read(path, content), np.arange(3))


def test_what_python_2_wrote_is_read(path: Path) -> None:
    # As CPython 2.7 and numpy 1.16 write: text of bytes, numbers in the place of truth values.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntp5\nRp6\n"
        b"(I1\n(I2\nI3\ntp7\ncnumpy\ndtype\np8\n(S'u1'\np9\nI0\nI1\ntp10\nRp11\n(I3\nS'|'\np12\nNNNI-1\nI-1\nI0\n"
        b"tp13\nbI00\nS'\\x00\\x01\\xff\\x80\\n\\x05'\np14\ntp15\nb"
    )
    scalar = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbS'"
    scalar += b"\\x07" + b"\\x00" * 7 + b"'\ntR"
    ordered = b"ccollections\nOrderedDict\n((l(lS'n01532829'\na(lI1\naaatR"
    held = read(path, b"(dS'image_data'\n" + array + b"sS'label'\n" + scalar + b"sV\\u00e4\n" + ordered + b"s.")
    np.testing.assert_array_equal(held["image_data"], np.array([[0, 1, 255], [128, 10, 5]], dtype=np.uint8))
    assert held["label"] == 7 and held["ä"] == {"n01532829": [1]}


# -- refused -----------------------------------------------------------------------------------------------------------


class Call:
    """Unpickled by Python's own unpickler, it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def touching(file: Path) -> dict[str, Call]:
    python = f"open({str(file)!r}, 'w').close()"
    return {
        "posix.system": Call(os.system, f"touch '{file}'"),
        "builtins.eval": Call(eval, python),
        "builtins.exec": Call(exec, python),
        "builtins.open": Call(open, str(file), "w"),
        "builtins.__import__": Call(__import__, "os"),
        "builtins.getattr": Call(getattr, b"", "decode"),
        "subprocess.check_call": Call(subprocess.check_call, ["touch", str(file)]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(file)]),
        "numpy.load": Call(np.load, str(file)),
        "numpy.fromfile": Call(np.fromfile, str(file)),
        "pathlib": Call(Path, str(file)),
        "pickle": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch '{file}'"))),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", touching(Path()))
def test_a_pickle_that_would_call_anything_else_is_refused_and_calls_nothing(
    tmp_path: Path, path: Path, name: str, protocol: int
) -> None:
    touched = tmp_path / "touched"
    held = {"image_data": np.zeros(3), "class_dict": touching(touched)[name]}
    with pytest.raises(ValueError, match=r"cache\.pkl is not read: it asks for \S+; only pickles of arrays and plain"):
        read(path, pickle.dumps(held, protocol))
    assert not touched.exists()


def test_such_a_pickle_would_have_run_its_command(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(touching(tmp_path / "touched")["posix.system"]))  # the trap is one
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"cos\nsystem\n(S'touch FILE'\ntR.", "os.system"),
        (b"cposix\nsystem\n(S'touch FILE'\ntR.", "posix.system"),
        (b"(S'touch FILE'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'touch FILE'\no.", "os.system"),
        (b"c__builtin__\neval\n(S\"open('FILE', 'w')\"\ntR.", "__builtin__.eval"),
        (b"c__builtin__\nexecfile\n(S'FILE'\ntR.", "__builtin__.execfile"),
        (b"ccommands\ngetoutput\n(S'touch FILE'\ntR.", "commands.getoutput"),
        (b"ccopy_reg\n_reconstructor\n(tR.", "copy_reg._reconstructor"),
        (b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n(dtR.", "numpy.testing._private.utils.runstring"),
        (b"cnumpy.f2py\ncompile\n(S'1'\ntR.", "numpy.f2py.compile"),
        (b"cnumpy\nload\n(S'FILE'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n(S'FILE'\ntR.", "numpy.core.multiarray.fromfile"),
        (b"c_codecs\nlookup\n(S'hex'\ntR.", "_codecs.lookup"),
        (b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.", "numpy.ndarray.__class__"),
        (b"\x80\x04\x8c\x07_codecs\x8c\x12encode.__globals__\x93.", "_codecs.encode.__globals__"),
        (b"\x80\x02cos\nsystem\n\x81.", "os.system"),
    ],
)
def test_a_pickle_made_by_hand_is_refused_and_calls_nothing(
    tmp_path: Path, path: Path, content: bytes, asked: str
) -> None:
    touched = tmp_path / "touched"
    with pytest.raises(ValueError, match=rf"cache\.pkl is not read: it asks for {asked}; only"):
        read(path, content.replace(b"FILE", str(touched).encode()))
    assert not touched.exists()


def test_text_is_encoded_by_no_codec_but_those_of_bytes(path: Path) -> None:
    content = b"c_codecs\nencode\n(VQUJD\nS'rot13'\ntR."
    with pytest.raises(ValueError, match=r"it holds bytes in the encoding 'rot13'"):
        read(path, content)


OBJECTS = np.array([{"a": 1}, None], dtype=object)
DTYPE = b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR"
DTYPE_THAT_LIES = DTYPE + b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
FIELDS = b"cnumpy\ndtype\n(S'V8'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt(dS'a'\n(" + DTYPE + b"I0\ntsI8\nI1\nI0\ntb"
DISGUISED = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nN(S'a'\nt(dS'a'\n(" + DTYPE + b"I0\ntsI-1\nI-1\nI63\ntb"
ADDRESSES = b"C\x08" + bytes(8)  # null, which numpy takes for None; any other would be followed
BEGUN = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(OBJECTS, 2),
        pickle.dumps(OBJECTS, 5),
        b"cnumpy\nndarray\n((I1\nt" + DTYPE + ADDRESSES + b"tR.",
        b"cnumpy\nndarray\n((I1\ntccollections\nOrderedDict\n" + ADDRESSES + b"tR.",
        BEGUN + b"(I1\n(I1\nt" + DTYPE + b"I00\n" + ADDRESSES + b"tb.",
        BEGUN + b"(I1\n(I1\nt" + DTYPE_THAT_LIES + b"I00\n" + ADDRESSES + b"tb.",
        BEGUN + b"(I1\n(I1\nt" + FIELDS + b"I00\n" + ADDRESSES + b"tb.",
        BEGUN + b"(I1\n(I8\nt" + DISGUISED + b"I00\n" + ADDRESSES + b"tb.",
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + ADDRESSES + b"tR.",
        b"cnumpy.core.multiarray\nscalar\n(" + FIELDS + ADDRESSES + b"tR.",
        b"cnumpy.core.numeric\n_frombuffer\n(" + ADDRESSES + DTYPE + b"(I1\ntS'C'\ntR.",
        pickle.dumps(np.zeros(2, dtype=[("a", np.int64), ("b", object)]), 2),
        b"cnumpy\ndtype\n(c__builtin__\nset\nI0\nI1\ntR.",
    ],
    ids=[
        *(
            "objects-2",
            "objects-5",
            "called",
            "called-by-type",
            "bytes-for-objects",
            "dtype-that-lies",
            "fields",
            "disguised",
            "scalar",
        ),
        *("scalar-of-fields", "buffer", "objects-in-fields", "by-type"),
    ],
)
def test_bytes_are_never_taken_for_objects(path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"cache\.pkl is not read: .*; only pickles of arrays and plain containers"):
        read(path, content)


@pytest.mark.parametrize(
    "shape", ["I3\n", "I-5\nI2\nI2\nI-3\n", f"I{2**32}\nI{2**32}\n", f"I{2**62}\nI4\n", "F2.0\n", ""]
)
def test_an_array_does_not_reach_beyond_its_bytes(path: Path, shape: str) -> None:
    content = BEGUN + f"(I1\n({shape}tcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS''\ntb.".encode()
    with pytest.raises(ValueError, match=r"cache\.pkl is not read"):
        read(path, content)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_that_is_cut_off_anywhere_is_refused(path: Path, protocol: int) -> None:
    content = pickle.dumps(
        {"image_data": ARRAYS["uint8-4d"], "class_dict": {"a": [1, 2], "b": [np.float32(3)]}}, protocol
    )
    for length in range(len(content)):
        with pytest.raises(ValueError, match=r"cache\.pkl is not read: .*; only pickles of arrays"):
            read(path, content[:length])


def test_random_bytes_are_refused_or_harmless(path: Path) -> None:
    draw = random.Random(0)
    others = bytes(byte for byte in range(256) if byte not in b"rj")  # these ask for memory by gigabytes, in vain
    refused = 0
    for _ in range(500):
        content = bytes(draw.choices(others, k=draw.randrange(1, 60)))
        try:
            read(path, content)
        except ValueError as error:
            assert str(error).startswith(f"{path} is not read: ")
            refused += 1
    assert refused > 480


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_pickle_with_any_byte_changed_is_refused_or_harmless(path: Path, protocol: int) -> None:
    draw = random.Random(protocol)
    content = pickle.dumps([ARRAYS["uint8-4d"][0, 0], {"a": [1]}, np.float32(3)], protocol)
    others = bytes(byte for byte in range(256) if byte not in b"rj")
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] = draw.choice(others)
        try:
            repr(read(path, bytes(changed)))
        except ValueError as error:
            assert str(error).startswith(f"{path} is not read: ")


@pytest.mark.parametrize(
    "content",
    [b"\x80\x04\x8e" + b"\xff" * 8, b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f", b"\x80\x09N.", b"PP\n.", b"(dg0\n.", b"N"],
    ids=["bytes", "bytearray", "protocol", "persistent", "memo", "no-end"],
)
def test_odd_pickles_are_refused_as_others_are(path: Path, content: bytes) -> None:
    with pytest.raises(
        ValueError, match=r"cache\.pkl is not read: .+; only pickles of arrays and plain containers are"
    ):
        read(path, content)


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pkl"):
        read_pickle(tmp_path / "absent.pkl")


def test_reading_leaves_pythons_own_functions_as_they_were(path: Path) -> None:
    before = dict(vars(builtins))
    with pytest.raises(ValueError, match="is not read"):
        read(path, b"c__builtin__\nset\n(N(dS'__doc__'\nNstb.")
    assert vars(builtins) == before
