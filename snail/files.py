"""Writing a file so that a kill leaves the old one or the new one, never a part; and telling a file by its hash."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["file_hash", "replacing"]


@contextmanager
def replacing(path: Path, mode: str = "w", **how: Any) -> Iterator[IO[Any]]:
    """Open a file beside ``path`` to write; if all goes well, it takes the name ``path`` in one step.

    Args:
        path: The file to make or replace; its folder is made where it is missing.
        mode: ``"w"`` or ``"wb"``.
        **how: As for ``open``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open(mode, **how) as file:
            yield file
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def file_hash(path: Path, kind: str = "sha256") -> str:
    """The hash of a file's content, in hex.

    Args:
        path: The file.
        kind: As ``hashlib`` calls it; downloads are often told by their ``md5``.
    """
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()
