"""Published figures, printed beside ours: accuracy in percent with the 95 % interval that the paper gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["published"]

# (learner, data set, ways, shots). SNAIL: Mishra et al., 2018, table 1; MAML: Finn et al., 2017, table 1; first-order
# MAML: Nichol et al., 2018; ANIL: Raghu et al., 2020. All on random splits of Omniglot.
FIGURES = {
    ("SNAIL", "omniglot", 5, 1): "99.07 ± 0.16",
    ("SNAIL", "omniglot", 5, 5): "99.78 ± 0.09",
    ("SNAIL", "omniglot", 20, 1): "97.64 ± 0.30",
    ("SNAIL", "omniglot", 20, 5): "99.36 ± 0.18",
    ("MAML", "omniglot", 5, 1): "98.7 ± 0.4",
    ("MAML", "omniglot", 5, 5): "99.9 ± 0.1",
    ("MAML", "omniglot", 20, 1): "95.8 ± 0.3",
    ("MAML", "omniglot", 20, 5): "98.9 ± 0.2",
    ("FirstOrderMAML", "omniglot", 5, 1): "98.3 ± 0.5",
    ("FirstOrderMAML", "omniglot", 5, 5): "99.2 ± 0.2",
    ("FirstOrderMAML", "omniglot", 20, 1): "89.4 ± 0.5",
    ("FirstOrderMAML", "omniglot", 20, 5): "97.9 ± 0.1",
    ("ANIL", "omniglot", 20, 1): "96.2 ± 0.5",
    ("ANIL", "omniglot", 20, 5): "98.0 ± 0.3",
}


def published(record: Mapping[str, Any]) -> str | None:
    """The published figure for a record's learner and setting; ``None`` if there is none or it was not trained."""
    if "training" not in record or not str(record["split"]).endswith("/test"):
        return None
    return FIGURES.get((record["learner"], record["dataset"], record["ways"], record["shots"]))
