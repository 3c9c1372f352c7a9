"""Trained weights in a file of their own: safetensors, with what it takes to build their learner again.

Nothing that is read can run code: tensors, plain values, and names of this package's own classes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .files import replacing

__all__ = ["WEIGHTS", "Weights", "build", "find_weights"]

WEIGHTS = "weights.safetensors"
"""What such a file is called in a run's folder."""
KEPT = Path(__file__).resolve().parents[1] / "experiments" / "results"  # in a checkout


@dataclass(frozen=True)
class Weights:
    """Weights and what they are of.

    Args:
        state: The learner's ``state_dict``.
        learner: ``class_path`` and ``init_args`` that build the learner, as in a run's config.
        about: What else is told of them, in plain values.
    """

    state: Mapping[str, Any]
    learner: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path, *, half: bool = False) -> None:
        """Write a file that ``read`` reads.

        Args:
            path: The file.
            half: Whether numbers in single precision are rounded to half.

        Raises:
            TypeError: If anything beside tensors is no plain value.
        """
        tensors = {name: value for name, value in self.state.items() if isinstance(value, Tensor)}
        told = {
            "learner": self.learner,
            "about": self.about,
            "state": {name: value for name, value in self.state.items() if name not in tensors},
        }
        content = save(
            {
                name: (value.half() if half and value.dtype == torch.float32 else value).contiguous()
                for name, value in tensors.items()
            },
            {key: json.dumps(value) for key, value in told.items()},
        )
        with replacing(path, "wb") as file:
            file.write(content)

    @classmethod
    def read(cls, path: Path) -> Weights:
        """Read a file that ``write`` wrote.

        Raises:
            ValueError: If it is cut off, damaged or written by another program.
        """
        try:
            with safe_open(path, "pt") as file:
                told = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return cls({**tensors, **told["state"]}, told["learner"], told["about"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read as weights of a learner (cut off, damaged or written by another program: "
                f"{type(error).__name__}); use another file"
            ) from error


def build(described: Mapping[str, Any]) -> nn.Module:
    """Make a network of this package's classes from ``class_path`` and ``init_args``, in which others may stand.

    Raises:
        ValueError: If it names anything else.
    """
    package, _, name = str(described.get("class_path")).rpartition(".")
    home = sys.modules[__package__ or "snail"]
    kind = getattr(home, name) if package == "snail" and name in home.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(
            f"{described.get('class_path')!r} is none of this package's networks; build the learner yourself and give "
            f"it the weights with load_state_dict"
        )
    arguments = described.get("init_args") or {}
    made: nn.Module = kind(**{key: build(value) if _is_described(value) else value for key, value in arguments.items()})
    return made


def _is_described(value: Any) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def find_weights(name_or_path: str | Path) -> Path:
    """The file that is meant: itself, that of a run's folder, or that of a result that ships with a checkout.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(name_or_path)
    for candidate in (path, path / WEIGHTS, KEPT / path / WEIGHTS):
        if candidate.is_file():
            return candidate
    known = sorted(file.parent.name for file in KEPT.glob(f"*/{WEIGHTS}"))
    here = f"here are {', '.join(known)}" if known else "they are in a checkout of the repository, not in the wheel"
    raise FileNotFoundError(
        f"there are no weights {str(name_or_path)!r}: give a {WEIGHTS}, such as "
        f"experiments/results/{path.name}/{WEIGHTS} of a checkout, or its folder ({here})"
    )
