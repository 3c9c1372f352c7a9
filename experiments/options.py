"""What commands share in reading their options."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

__all__ = ["OptionParser", "check_output", "check_picture", "take", "whole_number"]


class OptionParser(argparse.ArgumentParser):
    """A parser of options whose errors are ``ValueError`` of one sentence."""

    def error(self, message: str) -> NoReturn:
        """See ``argparse.ArgumentParser.error``.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def whole_number(text: str) -> int:
    """An option's value that counts something.

    Raises:
        argparse.ArgumentTypeError: If it is not a whole number of at least 1.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        ValueError: If it is a folder, or in a folder that does not exist.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {path} must name a file in a folder that exists")


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written, before any work is done.

    Raises:
        ValueError: If it is no PNG, or in a folder that does not exist.
    """
    if path.suffix != ".png" or not path.parent.is_dir():
        raise ValueError(f"--picture {path} must name a .png file in a folder that exists")


def take(argv: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Take ``option VALUE`` and ``option=VALUE`` out of a command line: what is left, and the values.

    Raises:
        ValueError: If the last has no value.
    """
    left, values, rest = [], [], iter(argv)
    for arg in rest:
        if arg == option:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"{option} needs a value")
            values.append(value)
        elif arg.startswith(f"{option}="):
            values.append(arg.split("=", 1)[1])
        else:
            left.append(arg)
    return left, values
