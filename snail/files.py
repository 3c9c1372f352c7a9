"""Writing a file so that a kill leaves the old one or the new one, never a part."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

__all__ = ["replacing"]


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
