"""Episode samplers: an episode is a pure function of its data, its shape, a seed and its index.

Nothing is carried from one draw to the next, so episodes are the same on any number of workers, processes or
restarts. Axes: ``b`` episode, ``n`` ways, ``k`` shots, ``s`` support items, ``q`` query items.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from snail.episodes import Episode

from .images import Images, split_hash

__all__ = ["EpisodeSampler", "Episodes", "Sampler"]


class Sampler(ABC):
    """Draws the episodes of a part of a data set, each a function of its index.

    Args:
        name: The data set and, behind the first slash, its split, such as ``"omniglot/vinyals/test"``.
        hash: What tells the split from another of this name.
        ways: Classes n in an episode; ``None`` for regression.
        shots: Support items k of each class, or of the episode for regression.
        queries: Query items, likewise.
        seed: Any integer from 0.

    Attributes:
        facts: All of this, as it identifies the episodes in a result.

    Raises:
        ValueError: If a size is not positive, or the seed negative.
    """

    def __init__(self, name: str, hash: str, *, ways: int | None, shots: int, queries: int, seed: int) -> None:
        for what, value, least in (("ways", ways, 1), ("shots", shots, 1), ("queries", queries, 1), ("seed", seed, 0)):
            if value is not None and value < least:
                raise ValueError(f"{what} is {value}; it must be at least {least}")
        dataset, _, split = name.partition("/")
        self.shots, self.queries = shots, queries
        self.facts: dict[str, Any] = {"dataset": dataset, "split": split, "split_hash": hash, "ways": ways}
        self.facts |= {"shots": shots, "queries": queries, "seed": seed}

    @abstractmethod
    def draw(self, start: int, stop: int) -> Episode:
        """Episodes ``start`` to ``stop - 1`` as one batch."""


def generator_key(identity: str) -> int:
    """The key of a random generator for whatever has this identity."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], "little")


class EpisodeSampler(Sampler):
    """Draws episodes of image indices.

    In each episode the classes are drawn at random and numbered in the order of the draw, so a class carries every
    label equally often; its images are drawn without repetition, and support and queries are each shuffled.

    Args:
        images: The split to draw from.
        name: The data set and, behind the first slash, its split, such as ``"omniglot/vinyals/test"``; part of what
            seeds the draw.
        ways: Classes n in an episode.
        shots: Support images k of each class.
        queries: Query images of each class; an episode has ``q = ways * queries``.
        seed: Any integer from 0.
        fixed_labels: Whether each class keeps one label in all episodes, which a learner can then know by heart instead
            of reading the support: a trap, to be seen.
        max_queries: Most queries of an episode, drawn among those of all its classes; all of them if not given.

    Raises:
        ValueError: If the split has too few classes, or a class too few images, or a size is not positive.
    """

    def __init__(
        self,
        images: Images,
        name: str,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int,
        fixed_labels: bool = False,
        max_queries: int | None = None,
    ) -> None:
        if max_queries is not None and max_queries < 1:
            raise ValueError(f"max_queries is {max_queries}; it must be at least 1")
        hash = split_hash(images.class_names)
        super().__init__(name, hash, ways=ways, shots=shots, queries=queries, seed=seed)
        if ways > len(images.class_names):
            raise ValueError(f"{ways} ways are asked of {name!r}, which has {len(images.class_names)} classes")
        scarcest = int(np.argmin(images.counts))
        if shots + queries > images.counts[scarcest]:
            raise ValueError(
                f"{shots} shots and {queries} queries need {shots + queries} images a class, but class "
                f"{images.class_names[scarcest]!r} of {name!r} has {images.counts[scarcest]}"
            )
        self.ways, self.fixed_labels, self.max_queries = ways, fixed_labels, max_queries
        self._key = generator_key(f"{name}|{hash}|{ways}|{shots}|{queries}|{seed}")
        self._counts = np.array(images.counts, dtype=np.uint64)
        self._first = np.concatenate([[0], np.cumsum(self._counts)[:-1]]).astype(np.int64)
        # How many random numbers an episode uses: classes, images of each, order of support, order of queries.
        per_class = shots + queries
        self._uses = (ways, ways * per_class, ways * shots, ways * queries)
        self._blocks = -(-sum(self._uses) // 4)  # the generator counts in blocks of four

    def draw(self, start: int, stop: int) -> Episode:
        """Episodes ``start`` to ``stop - 1`` as one batch, its items int64 indices ``(b, s)`` and ``(b, q)``."""
        b, n, k = stop - start, self.ways, self.shots
        numbers = np.random.Philox(key=self._key, counter=start * self._blocks).random_raw(b * self._blocks * 4)
        numbers = numbers.reshape(b, -1)
        for_classes, for_images, for_support, for_queries = np.split(
            numbers[:, : sum(self._uses)], np.cumsum(self._uses)[:-1], axis=1
        )
        classes = self._classes(for_classes)  # (b, n)
        chosen = _distinct(for_images.reshape(b, n, -1), self._counts[classes], k + self.queries)
        chosen += self._first[classes][..., None]  # (b, n, k + queries), now indices into the pool
        labels = np.broadcast_to(np.arange(n)[:, None], chosen.shape)
        support = _shuffled(chosen[..., :k], labels[..., :k], for_support)
        query = _shuffled(chosen[..., k:], labels[..., k:], for_queries)
        asked = (some[:, : self.max_queries] for some in query)
        support_x, support_y, query_x, query_y = map(torch.from_numpy, (*support, *asked))
        return Episode(support_x, support_y, query_x, query_y, n)

    def _classes(self, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Random numbers ``(b, n)`` to the classes ``(b, n)`` that carry labels 0 to n - 1."""
        b, n, classes = len(numbers), self.ways, len(self._counts)
        if not self.fixed_labels:
            return _distinct(numbers, np.full(b, classes, dtype=np.uint64), n)
        label = np.arange(n)  # is carried by classes label, label + n, label + 2 n ...
        carriers = ((classes - label - 1) // n + 1).astype(np.uint64)
        return label + n * (numbers % carriers).astype(np.int64)


def _distinct(numbers: NDArray[np.uint64], sizes: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """``count`` different integers below ``sizes`` ``(...)``, each order equally likely: ``(..., count)``.

    ``numbers`` ``(..., count)`` are random. The j-th is drawn among the size - j that are left: it skips past each
    smaller one that was taken before.
    """
    drawn = np.empty((*sizes.shape, count), dtype=np.int64)
    taken = np.empty_like(drawn)  # what was drawn before, kept in rising order
    for j in range(count):
        value = (numbers[..., j] % (sizes - np.uint64(j))).astype(np.int64)
        for i in range(j):
            value += value >= taken[..., i]
        drawn[..., j] = value
        taken[..., j] = value
        for i in range(j, 0, -1):  # one pass of insertion keeps `taken` sorted
            low, high = (
                np.minimum(taken[..., i - 1], taken[..., i]),
                np.maximum(taken[..., i - 1], taken[..., i]),
            )
            taken[..., i - 1], taken[..., i] = low, high
    return drawn


def _shuffled(
    items: NDArray[np.int64], labels: NDArray[np.int64], numbers: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Items and labels ``(b, n, each)`` in one random order an episode, ``(b, n * each)``."""
    order = np.argsort(numbers, axis=1, kind="stable")
    b = len(order)
    return (
        np.take_along_axis(items.reshape(b, -1), order, axis=1),
        np.take_along_axis(labels.reshape(b, -1), order, axis=1),
    )


@dataclass(frozen=True, eq=False)
class Episodes:
    """A fixed number of seeded episodes of a split, such as those that a result is quoted on.

    Iterating yields batches of ready episodes, images as floats in [0, 1]. ``snail.evaluate`` reads them as they are
    drawn instead and embeds each image once.

    Args:
        drawn_by: Draws them.
        count: Number of episodes E; indices 0 to E - 1.
        images: The pool that the items are indices into; ``None`` if the items are in the episodes.
        batch_size: Episodes in a batch.

    Raises:
        ValueError: If ``count`` or ``batch_size`` is not positive.
    """

    drawn_by: Sampler  # not `sampler`, by which Lightning would take this for a DataLoader
    count: int
    images: Images | None = None
    batch_size: int = 100

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"{self.count} episodes in batches of {self.batch_size}; both must be at least 1")

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the episodes in a result."""
        return {**self.drawn_by.facts, "episodes": self.count}

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Episode]:
        """Batches of ready episodes."""
        return map(self._ready, self.drawn)

    def __getitem__(self, index: int) -> Episode:
        """The single episode ``index`` as a batch of one, ready."""
        if not 0 <= index < self.count:
            raise IndexError(f"episode {index} of {self.count}")
        return self._ready(self.drawn_by.draw(index, index + 1))

    def _ready(self, batch: Episode) -> Episode:
        return batch if self.images is None else batch.map_items(self.images.take)

    @property
    def drawn(self) -> DrawnBatches:
        """The batches as they are drawn, with indices into ``images`` for items where there are images."""
        return DrawnBatches(self)


@dataclass(frozen=True, eq=False)
class DrawnBatches:
    """The batches of ``episodes`` as they are drawn; where several processes share them, those of one.

    Batches are dealt out one by one, whole, so that each is scored as a single process would. Every process has equally
    many, as collective operations need: who has none left repeats one, and says so.

    Args:
        episodes: What is drawn.
        rank: Which of the processes this is.
        world: Number of processes.
    """

    episodes: Episodes
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.episodes) // self.world)

    @property
    def starts(self) -> list[int | None]:
        """The index of each batch's first episode; ``None`` for a batch that is repeated and does not count."""
        dealt = (turn * self.world + self.rank for turn in range(len(self)))
        return [i * self.episodes.batch_size if i < len(self.episodes) else None for i in dealt]

    def __iter__(self) -> Iterator[Episode]:
        """Batches of episodes, in the order of their index."""
        for start in self.starts:
            start = start or 0
            yield self.episodes.drawn_by.draw(start, min(start + self.episodes.batch_size, self.episodes.count))


def choose_shots(shots: Sequence[int], seed: int, step: int) -> int:
    """The number of shots that all of optimiser step ``step`` uses, one of ``shots``, each equally likely."""
    digest = hashlib.sha256(f"shots|{seed}|{step}".encode()).digest()
    return shots[int.from_bytes(digest[:8], "little") % len(shots)]
