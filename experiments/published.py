"""Published figures, printed beside ours: accuracy in percent with the 95 % interval that the paper gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["published"]

# (learner, data set, ways, shots). Mishra et al., 2018, table 1; Omniglot on a random split of 1,200 / 423.
FIGURES = {
    ("SNAIL", "omniglot", 5, 1): "99.07 ± 0.16",
    ("SNAIL", "omniglot", 5, 5): "99.78 ± 0.09",
    ("SNAIL", "omniglot", 20, 1): "97.64 ± 0.30",
    ("SNAIL", "omniglot", 20, 5): "99.36 ± 0.18",
}


def published(record: Mapping[str, Any]) -> str | None:
    """The published figure for a record's learner and setting; ``None`` if there is none or it was not trained."""
    if "training" not in record or not str(record["split"]).endswith("/test"):
        return None
    return FIGURES.get((record["learner"], record["dataset"], record["ways"], record["shots"]))
