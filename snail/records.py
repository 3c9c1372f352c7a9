"""Lists of flat records as JSON files, and rows of text as tables: what results of every kind are kept and shown by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import replacing

__all__ = ["markdown_rows", "merge_records", "read_records", "text_table"]


def read_records(
    paths: Iterable[Path],
    fault: Callable[[Mapping[str, Any]], str | None],
    *,
    written_by: str,
    must_exist: bool = False,
) -> list[dict[str, Any]]:
    """The records of some files, in order; a file that is not there has none.

    Args:
        paths: The files.
        fault: What is wrong with a record, such as ``without 'seed'``; ``None`` if nothing is.
        written_by: The command that writes such files, for messages.
        must_exist: Whether every file has to be there.

    Raises:
        ValueError: If a file is not a list of such records.
        FileNotFoundError: If ``must_exist`` and one is missing.
    """
    records: list[dict[str, Any]] = []
    for path in paths:
        if not path.exists():
            if must_exist:
                raise FileNotFoundError(f"there is no {path}; `{written_by}` writes it")
            continue
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}); move it away and run again") from error
        if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
            raise ValueError(f"{path} does not hold a list of results; move it away and run again")
        if faults := [told for record in found if (told := fault(record)) is not None]:
            raise ValueError(f"{path} has a record {faults[0]}; move it away and run again")
        records += found
    return records


def merge_records(
    path: Path, before: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], identity: Sequence[str]
) -> list[dict[str, Any]]:
    """Write ``before`` and ``records`` to a file, each record in the place of an earlier one that is alike.

    The file is written beside and renamed, so that a kill leaves the old or the new one.

    Args:
        path: The file.
        before: What it holds.
        records: What is added.
        identity: The keys in which two records of the same measurement are alike.

    Returns:
        All records now in the file.
    """
    merged = {tuple(json.dumps(record.get(key)) for key in identity): dict(record) for record in [*before, *records]}
    with replacing(path) as file:
        file.write(json.dumps(list(merged.values()), indent=2) + "\n")
    return list(merged.values())


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the heads first, as a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown_rows(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows, the heads first, as the lines of a table in markdown."""
    return [f"| {' | '.join(row)} |" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]]]
