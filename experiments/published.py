"""Published figures, printed beside ours: accuracy in percent with the 95 % interval that the paper gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["published"]

# (learner, data set, ways, shots). Mishra et al., 2018, tables 1 and 2; Omniglot on a random split of 1,200 / 423.
FIGURES = {
    ("SNAIL", "omniglot", 5, 1): "99.07 ± 0.16",
    ("SNAIL", "omniglot", 5, 5): "99.78 ± 0.09",
    ("SNAIL", "omniglot", 20, 1): "97.64 ± 0.30",
    ("SNAIL", "omniglot", 20, 5): "99.36 ± 0.18",
    ("SNAIL", "mini_imagenet", 5, 1): "55.71 ± 0.99",
    ("SNAIL", "mini_imagenet", 5, 5): "68.88 ± 0.92",
}


def published(record: Mapping[str, Any]) -> str | None:
    """The published figure for a record's learner and setting; ``None`` if there is none or it was not trained."""
    if "training" not in record:
        return None
    learner = str(record["learner"]).split(",")[0]
    return FIGURES.get((learner, record["dataset"], record["ways"], record["shots"]))
