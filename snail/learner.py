"""What every meta-learner is: a support set and unlabelled queries go in, an answer for each query comes out.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``n`` ways, ``c`` channels of an embedding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .episodes import Episode
from .pretrained import Weights, build, find_weights

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EmbeddingLearner", "Learner", "answer_loss", "name_network", "precise"]


class Learner(nn.Module, ABC):
    """A meta-learner. ``learner(support_x, support_y, query_x)`` answers; ``learner.loss(episode)`` trains.

    In evaluation mode the answer to one query must not depend on another, unless ``transductive`` is true, and then
    every result says so.
    """

    transductive: bool = False
    """Whether one query's answer depends on the other queries of its episode."""

    half_precision: bool = True
    """Whether it keeps its accuracy where most of it is computed in half precision."""
    needs_training: bool = True
    """Whether it has to be trained before it is worth scoring."""

    ways: int | None = None
    """The number of classes that it answers; ``None`` if it takes any."""

    max_shots: int | None = None
    """The most examples of a class that it takes; ``None`` if it takes any number."""

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path) -> Self:
        """A trained learner of this class, in evaluation mode, on the CPU.

        Args:
            name_or_path: A ``weights.safetensors`` (``snail export`` writes one), its folder, or the name of a result
                that ships with a checkout of the repository, such as ``omniglot_random_5way``.

        Raises:
            FileNotFoundError: If there is no such file; weights are not part of the wheel.
            ValueError: If it cannot be read, or holds another learner.
        """
        path = find_weights(name_or_path)
        weights = Weights.read(path)
        learner = build(weights.learner)
        if not isinstance(learner, cls):
            raise ValueError(f"{path} holds the weights of {type(learner).__name__}, not of {cls.__name__}")
        learner.load_state_dict(weights.state)
        return learner.eval()

    @property
    def batch_norm(self) -> str:
        """How batch norm is used when episodes are scored, as printed beside every result."""
        return "transductive" if self.transductive else "inductive"

    @property
    def note(self) -> str:
        """What results say beside the learner's name, such as an addition to its training; usually nothing."""
        return ""

    @property
    def network_name(self) -> str:
        """What the network is, as told in results, such as ``Conv-4 of 64, strided``; nothing if there is none."""
        return ""

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Facts of each answer that is scored, such as the number of inner steps; the last is that of ``forward``."""
        return [{}]

    @abstractmethod
    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """Answer each query.

        Args:
            support_x: ``(b, s, *item)``.
            support_y: ``(b, s)`` integers in ``[0, n)``, or ``(b, s, d)`` for regression.
            query_x: ``(b, q, *item)``.

        Returns:
            Logits ``(b, q, n)``, or values ``(b, q, d)`` for regression.
        """

    def answers(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """One answer for each of ``variants``, ``(v, b, q, n)``; the arguments are those of ``forward``."""
        answer: Tensor = self(support_x, support_y, query_x)
        return answer.unsqueeze(0)

    def attention(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor | None:
        """How much each answer owes to each support item, ``(b, q, s)``, to be looked at; ``None`` if none can tell."""
        return None

    def begin(self, items: Tensor) -> None:
        """Look at some training items ``(i, *item)`` before the first step is taken; most learners need not."""

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise on a batch of episodes, and what is worth logging beside it.

        By default the mean over all queries of the cross-entropy (of the squared error for regression).
        """
        return answer_loss(self(episode.support_x, episode.support_y, episode.query_x), episode)


def name_network(network: nn.Module) -> str:
    """A network's own ``description``, else the name of its class."""
    return str(getattr(network, "description", type(network).__name__))


def precise(numbers: Tensor) -> Tensor:
    """In single precision at least: a sum of many numbers in half precision loses too much."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def answer_loss(answer: Tensor, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
    """How wrong an answer is, as a scalar to minimise, and what is worth logging beside it.

    Args:
        answer: Logits ``(b, q, n)``, or values ``(b, q, d)`` for regression.
        episode: Holds the truth.

    Returns:
        The mean over all queries of the cross-entropy (of the squared error for regression), and for classification
        the accuracy in [0, 1].
    """
    if episode.ways is None:
        return F.mse_loss(precise(answer), episode.query_y), {}
    loss = F.cross_entropy(precise(answer).flatten(0, 1), episode.query_y.flatten().long())
    return loss, {"accuracy": (answer.detach().argmax(-1) == episode.query_y).float().mean()}


class EmbeddingLearner(Learner):
    """A learner that embeds each item by itself and answers from the embeddings alone.

    In evaluation mode an item's embedding does not depend on its episode, so that a pool of images can be embedded
    once and every episode gathers from it (``snail.evaluate`` does).

    Args:
        embedding: Any module ``(items, *item) -> (items, c)``.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    @property
    def network_name(self) -> str:
        """See ``Learner.network_name``."""
        return name_network(self.embedding)

    @abstractmethod
    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """Answer ``(b, q, n)`` from embedded support ``(b, s, c)``, its labels ``(b, s)`` and queries ``(b, q, c)``."""

    def embed(self, support_x: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor]:
        """Embed ``(b, s, *item)`` and ``(b, q, *item)``, together, as ``(b, s, c)`` and ``(b, q, c)``."""
        items = torch.cat([support_x, query_x], dim=1)
        embedded = self.embedding(items.flatten(0, 1)).unflatten(0, items.shape[:2])
        support, query = embedded.tensor_split([support_x.shape[1]], dim=1)
        return support, query

    def attention(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor | None:
        """See ``Learner.attention``: a softmax over how near the embeddings are, minus the squared distance."""
        support, query = self.embed(support_x, query_x)
        return (-torch.cdist(precise(query), precise(support)).square()).softmax(-1)

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """See ``Learner.forward``."""
        support, query = self.embed(support_x, query_x)
        return self.answer(support, support_y, query)
