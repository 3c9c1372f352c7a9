"""Learners that compare: the floor that anything which learns has to beat.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``n`` ways, ``c`` channels of an embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learner import EmbeddingLearner

__all__ = ["NearestNeighbour", "prototype_logits"]


def prototype_logits(support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
    """Minus the squared distance of each query to the mean of each class (Snell et al., 2017, section 2).

    Args:
        support: ``(b, s, c)``, with at least one item of each class.
        support_y: ``(b, s)``, integers in ``[0, ways)``.
        query: ``(b, q, c)``.
        ways: Number of classes n.

    Returns:
        Logits ``(b, q, n)``.
    """
    members = F.one_hot(support_y.long(), ways).to(support.dtype)  # (b, s, n)
    prototypes = members.transpose(1, 2) @ support / members.sum(1).unsqueeze(-1)  # (b, n, c)
    return -(query.unsqueeze(2) - prototypes.unsqueeze(1)).square().sum(-1)


class NearestNeighbour(EmbeddingLearner):
    """Answers with the label of the nearest support item. It has nothing to learn.

    Args:
        ways: Number of classes n.
        embedding: What distances are measured in; by default the pixels themselves.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)``: minus the distance to the nearest item of each class,
        minus infinity for a class without one.
    """

    def __init__(self, ways: int, embedding: nn.Module | None = None) -> None:
        super().__init__(nn.Flatten() if embedding is None else embedding)
        self.ways = ways

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """See ``EmbeddingLearner.answer``."""
        # Differences squared, not a matrix product: exact, and the same however many queries there are.
        distance = torch.cdist(query, support, compute_mode="donot_use_mm_for_euclid_dist").unsqueeze(
            -1
        )  # (b, q, s, 1)
        other_class = ~F.one_hot(support_y.long(), self.ways).bool().unsqueeze(1)  # (b, 1, s, n)
        return -distance.masked_fill(other_class, float("inf")).amin(dim=2)
