"""A look at a config that came with a checkpoint, before anything in it is acted on.

A parser that makes classes from their names would call whatever a config names. Only classes of trusted packages that
are networks, optimisers, data or environments may be named in one that came from elsewhere.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule

from snail.rl import Environment

__all__ = ["check_config"]

TRUSTED = ("snail", "torch", "torchvision")
KINDS = (torch.nn.Module, torch.optim.Optimizer, LightningDataModule, Environment)
OPTIONS = {"name", "start_from", "teacher", "checkpoint_minutes", "keep_memory", "channels_last"}
SECTIONS = {"seed_everything", "trainer", "model", "data", *OPTIONS}
FREE_TEXT = {
    "name",
    "start_from",
    "teacher",
    "data.init_args.root",
}  # never read as the name of anything to import, or as a config
DEEPEST = 30


def check_config(config: Any, source: Path, trust: Iterable[str] = ()) -> dict[str, Any]:
    """Refuse a config that could make the program import or call what it should not.

    Args:
        config: As loaded by ``yaml.safe_load``.
        source: Where it came from, for messages.
        trust: Packages besides snail, torch and torchvision whose names the user allows.

    Returns:
        The config.

    Raises:
        ValueError: If it names what is not a network, an optimiser, data or an environment of a trusted package, hides
            a config in a string, points to a file, or is no config of a run.
    """
    if not isinstance(config, dict) or not config.keys() <= SECTIONS:
        raise ValueError(
            f"the config in {source} is not that of a snail run: it needs {', '.join(sorted(SECTIONS))} only"
        )
    for key, value in _strings(config, source):
        if key in FREE_TEXT:
            continue
        if "\n" in value or isinstance(_as_yaml(value), (dict, list)):
            raise ValueError(
                f"the config in {source} hides a config in the text at {key} ({value[:60]!r}); it is not read"
            )
        if value.endswith((".yaml", ".yml", ".json")) or Path(value).is_file():
            raise ValueError(f"the config in {source} points to another file at {key} ({value!r}); it is not read")
        if key.endswith("class_path") or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
            _check_class(value, key, source, set(trust))
    return config


def _check_class(name: str, key: str, source: Path, trust: set[str]) -> None:
    package = name.split(".", 1)[0]
    if package in trust:
        return
    if package not in TRUSTED:
        raise ValueError(
            f"the config in {source} names {name!r} at {key}; "
            f"if you trust the package {package!r}, add --trust {package}"
        )
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        found = None
    own = isinstance(found, type) and found.__module__.split(".", 1)[0] in {*TRUSTED, *trust}
    if not own or not issubclass(found, KINDS):
        raise ValueError(f"the config in {source} names {name!r} at {key}, which is no network, optimiser or data set")


def _as_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _strings(value: Any, source: Path, key: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Every string in a nested config with the keys that lead to it."""
    if depth > DEEPEST:
        raise ValueError(f"the config in {source} is nested more than {DEEPEST} deep at {key[:60]}")
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str) or "." in name:
                raise ValueError(f"the config in {source} has the key {name!r}; keys are words without a dot")
            yield from _strings(inner, source, f"{key}.{name}" if key else name, depth + 1)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner, source, key, depth + 1)
    elif isinstance(value, str):
        yield key, value
