"""Learners that compare a query's embedding with those of the support: the baselines that nobody should skip.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``n`` ways, ``c`` channels of an embedding.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .episodes import Episode
from .learner import EmbeddingLearner, answer_loss, precise

__all__ = ["MatchingNetwork", "NearestNeighbour", "ProtoNet", "prototype_logits", "prototypes", "shifted_logits"]


def prototypes(support: Tensor, support_y: Tensor, ways: int) -> Tensor:
    """The mean of each class (Snell et al., 2017, equation 1).

    Args:
        support: ``(b, s, c)``, with at least one item of each class.
        support_y: ``(b, s)``, integers in ``[0, ways)``.
        ways: Number of classes n.

    Returns:
        ``(b, n, c)``.
    """
    members = F.one_hot(support_y.long(), ways).to(support.dtype)  # (b, s, n)
    return members.transpose(1, 2) @ support / members.sum(1).unsqueeze(-1)


def prototype_logits(support: Tensor, support_y: Tensor, query: Tensor, ways: int) -> Tensor:
    """Minus the squared distance of each query ``(b, q, c)`` to each of ``prototypes``: logits ``(b, q, n)``."""
    return -(query.unsqueeze(2) - prototypes(support, support_y, ways).unsqueeze(1)).square().sum(-1)


def shifted_logits(query: Tensor, centres: Tensor) -> Tensor:
    """Minus the squared distance of each query ``(b, q, c)`` to each of ``(b, n, c)``, but for what all n share.

    Their softmax is that of ``prototype_logits``. A matrix product, in single precision at least, for half cannot tell
    near ones apart: for losses with many classes.
    """
    # What all embeddings share does not count, but rounding would: an optimiser that scales gradients, such as Adam,
    # makes whole steps of its noise, and where they lead there is more of it.
    query, centres = precise(query), precise(centres)
    origin = centres.detach().mean(1, keepdim=True)
    query, centres = query - origin, centres - origin
    with torch.autocast(query.device.type, enabled=False):
        return 2 * query @ centres.transpose(1, 2) - centres.square().sum(-1).unsqueeze(1)


class ProtoNet(EmbeddingLearner):
    """Prototypical network (Snell et al., 2017): a query belongs to the class whose mean embedding is nearest.

    Distances are squared Euclidean ones, as in the paper (section 2.3); with the plain distance accuracy is lower.
    Nothing depends on the number of ways, so it may be trained on more ways than it is scored on, which helps.

    Args:
        embedding: Any module from ``(items, *item)`` to ``(items, c)``.
        scale: What squared distances are multiplied by before the softmax, 1 in the paper. They grow with the number
            of channels; a wide embedding begins with answers that are far too sure, and learns faster with less.
        in_turn: Whether in training every example of a class is in turn among its support, and all others are asked:
            an episode of k shots and q queries a class is k + q episodes for the price of one. Not in the paper.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)``, n one more than the largest label in the support.

    Raises:
        ValueError: If ``scale`` is not positive.
    """

    def __init__(self, embedding: nn.Module, *, scale: float = 1.0, in_turn: bool = False) -> None:
        super().__init__(embedding)
        self.scale, self.in_turn = _positive(scale), in_turn

    @property
    def note(self) -> str:
        """See ``Learner.note``; it tells of a scale other than the paper's, and of examples that support in turn."""
        told = [] if self.scale == 1 else [f"scale {self.scale:g}"]
        return ", ".join(told + ["examples in turn"] * self.in_turn)

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Learner.loss``; with ``in_turn`` the mean over all choices of k neighbours in the ring of a class.

        Raises:
            ValueError: If with ``in_turn`` classes differ in their numbers of examples.
        """
        if not self.in_turn:
            return super().loss(episode)
        support, query = self.embed(episode.support_x, episode.query_x)
        with torch.no_grad():
            _, logs = answer_loss(self.answer(support, episode.support_y, query), episode)
        examples = _by_class(torch.cat([support, query], dim=1), episode)  # (b, n, k + q, c)
        b, n, m, _ = examples.shape
        k, losses = support.shape[1] // n, []
        truth = torch.arange(n, device=query.device).repeat_interleave(m - k).repeat(b)
        for first in range(m):
            members, asked = examples.roll(-first, dims=2).tensor_split([k], dim=2)
            logits = self.scale * shifted_logits(asked.flatten(1, 2), precise(members).mean(2))
            losses.append(F.cross_entropy(logits.flatten(0, 1), truth))
        return torch.stack(losses).mean(), logs

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """See ``EmbeddingLearner.answer``."""
        return self.scale * prototype_logits(precise(support), support_y, precise(query), _ways(support_y))


class MatchingNetwork(EmbeddingLearner):
    """Matching network (Vinyals et al., 2016, equation 1): a query's label is a weighted mean of the support's.

    The weights are a softmax over the support of how alike the embeddings are. The paper's full-context embeddings
    (an LSTM over the support) are not included. Nothing depends on the number of ways.

    Args:
        embedding: Any module from ``(items, *item)`` to ``(items, c)``.
        similarity: ``cosine``, as in the paper; or ``euclidean``, minus the squared distance, with which others found
            the paper's Omniglot figures easier to reach.
        scale: What similarities are multiplied by before the softmax, 1 in the paper. Cosines end at 1, so that with it
            no answer is ever sure; a larger one trains faster.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)``, logarithms of probabilities, n one more than the largest
        label in the support.

    Raises:
        ValueError: If ``similarity`` is another word, or ``scale`` is not positive.
    """

    def __init__(
        self, embedding: nn.Module, *, similarity: Literal["cosine", "euclidean"] = "cosine", scale: float = 1.0
    ) -> None:
        super().__init__(embedding)
        if similarity not in ("cosine", "euclidean"):
            raise ValueError(f"similarity is {similarity!r}; choose cosine or euclidean")
        self.similarity, self.scale = similarity, _positive(scale)

    @property
    def note(self) -> str:
        """See ``Learner.note``; it tells of a similarity or a scale other than the paper's."""
        told = [] if self.similarity == "cosine" else [self.similarity]
        return ", ".join(told + ([] if self.scale == 1 else [f"scale {self.scale:g}"]))

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """See ``EmbeddingLearner.answer``."""
        support, query = precise(support), precise(query)
        if self.similarity == "cosine":
            alike = F.normalize(query, dim=-1) @ F.normalize(support, dim=-1).transpose(1, 2)  # (b, q, s)
        else:
            alike = -_distances(query, support).square()
        other_class = ~F.one_hot(support_y.long(), _ways(support_y)).bool().unsqueeze(1)  # (b, 1, s, n)
        weights = (self.scale * alike).log_softmax(-1).unsqueeze(-1)
        return weights.masked_fill(other_class, -torch.inf).logsumexp(2)


class NearestNeighbour(EmbeddingLearner):
    """Answers with the label of the nearest support item. It has nothing to learn.

    Args:
        ways: Number of classes n.
        embedding: What distances are measured in; by default the pixels themselves.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)``: minus the distance to the nearest item of each class,
        minus infinity for a class without one.
    """

    needs_training = False
    ways: int

    def __init__(self, ways: int, embedding: nn.Module | None = None) -> None:
        super().__init__(nn.Flatten() if embedding is None else embedding)
        self.ways = ways

    @property
    def network_name(self) -> str:
        """See ``Learner.network_name``."""
        return "pixels" if isinstance(self.embedding, nn.Flatten) else super().network_name

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """See ``EmbeddingLearner.answer``."""
        distance = _distances(query, support).unsqueeze(-1)  # (b, q, s, 1)
        other_class = ~F.one_hot(support_y.long(), self.ways).bool().unsqueeze(1)  # (b, 1, s, n)
        return -distance.masked_fill(other_class, float("inf")).amin(dim=2)


def _by_class(items: Tensor, episode: Episode) -> Tensor:
    """Support and queries ``(b, s + q, c)``, sorted by their label: ``(b, n, (s + q) / n, c)``."""
    labels, n = torch.cat([episode.support_y, episode.query_y], dim=1), _ways(episode.support_y)
    counts = F.one_hot(labels.long(), n).sum(1)
    if not bool((counts == counts[0, 0]).all()):
        raise ValueError(
            f"in_turn needs equally many examples of each class, but these have from {int(counts.min())} to "
            f"{int(counts.max())}; leave data.max_queries out"
        )
    order = labels.argsort(dim=1, stable=True).unsqueeze(-1)
    return items.gather(1, order.expand_as(items)).reshape(len(items), n, -1, items.shape[-1])


def _distances(query: Tensor, support: Tensor) -> Tensor:
    """``(b, q, c)`` against ``(b, s, c)``: ``(b, q, s)``."""
    # Differences squared, not a matrix product: exact, and the same however many queries there are.
    return torch.cdist(query, support, compute_mode="donot_use_mm_for_euclid_dist")


def _positive(scale: float) -> float:
    if scale <= 0:
        raise ValueError(f"scale is {scale:g}; it must be positive")
    return scale


def _ways(support_y: Tensor) -> int:
    """How many classes there are: every class has an example in the support, so the largest label tells."""
    return int(support_y.max()) + 1
