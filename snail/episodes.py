"""A few-shot episode, or a batch of them: a labelled support set and the queries to be answered from it.

Axes: ``b`` episode, ``s`` support items (ways times shots), ``q`` query items, ``n`` ways.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Episode"]


@dataclass(eq=False)
class Episode:
    """A batch of episodes. Items are images, or indices into a pool of images, or embeddings: any tensors.

    Args:
        support_x: ``(b, s, *item)``.
        support_y: ``(b, s)``, integers in ``[0, ways)``; or ``(b, s, d)``, floating, for regression.
        query_x: ``(b, q, *item)``.
        query_y: ``(b, q)`` or ``(b, q, d)``, likewise; what is to be answered, never read to answer.
        ways: Number of classes; ``None`` for regression.

    Raises:
        ValueError: If shapes, dtypes or (on the CPU, before any transfer) label values do not fit.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    ways: int | None

    def __post_init__(self) -> None:
        for part, x, y in (
            ("support", self.support_x, self.support_y),
            ("query", self.query_x, self.query_y),
        ):
            if x.ndim < 2 or y.ndim < 2 or x.shape[:2] != y.shape[:2]:
                raise ValueError(
                    f"{part}_x of shape {tuple(x.shape)} and {part}_y of shape {tuple(y.shape)} must begin with the "
                    f"same (episodes, items)"
                )
            if x.shape[0] == 0 or x.shape[1] == 0:
                raise ValueError(f"the {part} is empty: {part}_x has shape {tuple(x.shape)}")
            self._check_labels(part, y)
        if self.support_x.shape[0] != self.query_x.shape[0]:
            raise ValueError(
                f"{self.support_x.shape[0]} episodes in the support but {self.query_x.shape[0]} in the query"
            )
        if self.support_x.shape[2:] != self.query_x.shape[2:]:
            raise ValueError(
                f"support items of shape {tuple(self.support_x.shape[2:])} but query items of shape "
                f"{tuple(self.query_x.shape[2:])}"
            )

    def _check_labels(self, part: str, y: Tensor) -> None:
        if self.ways is None:
            if y.ndim != 3 or not y.is_floating_point():
                raise ValueError(
                    f"{part}_y of shape {tuple(y.shape)} and dtype {y.dtype}; regression (ways=None) needs floating "
                    f"(b, items, d)"
                )
            return
        if self.ways < 1:
            raise ValueError(f"ways is {self.ways}; it must be at least 1")
        if y.ndim != 2 or y.is_floating_point() or y.dtype == torch.bool:
            raise ValueError(
                f"{part}_y of shape {tuple(y.shape)} and dtype {y.dtype}; classification needs integers (b, items)"
            )
        if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < self.ways:
            raise ValueError(
                f"{part}_y runs from {int(y.min())} to {int(y.max())}; {self.ways} ways allow 0 to {self.ways - 1}"
            )

    def __len__(self) -> int:
        """Number of episodes b."""
        return self.support_x.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Episode:
        """The same episodes on ``device``; with ``non_blocking`` a GPU is not waited for."""
        tensors: tuple[Tensor, ...] = (self.support_x, self.support_y, self.query_x, self.query_y)
        if non_blocking and torch.device(device).type == "cuda":  # from other memory the copy would wait
            tensors = tuple(t.pin_memory() if t.device.type == "cpu" else t for t in tensors)
        support_x, support_y, query_x, query_y = (t.to(device, non_blocking=non_blocking) for t in tensors)
        return Episode(support_x, support_y, query_x, query_y, self.ways)

    def map_items(self, function: Callable[[Tensor], Tensor]) -> Episode:
        """The same episodes with ``function`` applied to ``support_x`` and ``query_x``."""
        return replace(self, support_x=function(self.support_x), query_x=function(self.query_x))
