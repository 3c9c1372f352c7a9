"""Reading other people's pickles without running what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_pickle"]


def read_pickle(path: Path) -> Any:
    """What a pickle of arrays, numbers, text and plain containers holds.

    Raises:
        ValueError: If it holds anything else, which could run code, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # what a damaged pickle raises has no base class
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is not read: {why}; only pickles of arrays and plain containers are, as others can run code"
        ) from error


class _Unpickler(pickle.Unpickler):
    """A pickle calls functions by name; here it gets those of ``ADMITTED`` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """See ``pickle.Unpickler``."""
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


# numpy's own dtype, array and scalar take a pickle's word for what its bytes are. Said to be objects, they are used as
# addresses in memory, which is a way to run code. What stands in for them here knows numbers and text alone.


class _DType:
    def __init__(self, name: str, *_: Any) -> None:
        self.dtype: np.dtype[Any] = np.dtype(name)
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"it holds an array of {name!r}, neither numbers nor text")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, kind, fortran, data = state
        array = np.frombuffer(_raw(data), kind.dtype).reshape(shape)  # it fits the bytes
        told: Any = (1, array.shape, array.dtype, bool(fortran), _raw(data))
        super().__setstate__(told)


def _reconstruct(*_: Any) -> _Array:
    return np.ndarray.__new__(_Array, (0,), np.uint8)


def _scalar(kind: _DType, data: bytes | str) -> Any:
    return np.frombuffer(_raw(data), kind.dtype, count=1)[0]


def _from_buffer(data: Any, kind: _DType, shape: Any, order: Any, axes: Any = None) -> np.ndarray[Any, Any]:
    array = np.frombuffer(data, kind.dtype)
    return array.reshape(shape, order="C").transpose(axes) if order == "K" else array.reshape(shape, order=order)


def _raw(data: bytes | str) -> bytes:
    """Python 2 did not tell bytes from text."""
    return data.encode("latin1") if isinstance(data, str) else data


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 stands bytes on in the older formats of pickles."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError(f"it holds bytes in the encoding {encoding!r}")
    return text.encode(encoding)


ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "ndarray",  # an argument alone; called, it would take any bytes for objects
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
}
for _home in ("numpy.core", "numpy._core"):  # numpy 1 and 2
    ADMITTED[f"{_home}.multiarray", "_reconstruct"] = _reconstruct
    ADMITTED[f"{_home}.multiarray", "scalar"] = _scalar
    ADMITTED[f"{_home}.numeric", "_frombuffer"] = _from_buffer
for _home in ("builtins", "__builtin__"):  # Python 3 and 2; the older formats have no words for these
    for _kind in (bytearray, bytes, complex, frozenset, set):
        ADMITTED[_home, _kind.__name__] = _kind
