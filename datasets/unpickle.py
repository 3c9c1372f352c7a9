"""Reading other people's pickles without running what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_pickle"]


def _encode(text: str, encoding: str) -> bytes:
    """What Python 3 stands bytes on in the older formats of pickles."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode(encoding)


def _admitted() -> dict[tuple[str, str], Any]:
    """What arrays and plain containers are made with, by the module and name that a pickle calls it by."""
    core: Any = np._core if hasattr(np, "_core") else np.core  # numpy 2 and 1
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
        ("collections", "OrderedDict"): dict,
    }
    for home in ("numpy.core", "numpy._core"):
        names[f"{home}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        names[f"{home}.multiarray", "scalar"] = core.multiarray.scalar
        names[f"{home}.numeric", "_frombuffer"] = core.numeric._frombuffer
    return names


class _Unpickler(pickle.Unpickler):
    """A pickle calls functions by name; here it gets those of ``_admitted`` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """See ``pickle.Unpickler``."""
        try:
            return _admitted()[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def read_pickle(path: Path) -> Any:
    """What a pickle of arrays, numbers, text and plain containers holds.

    Raises:
        ValueError: If it holds anything else, which could run code, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _Unpickler(file, encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not read: {str(error) or type(error).__name__}; only pickles of arrays and plain containers "
            f"are, as others can run code"
        ) from error
