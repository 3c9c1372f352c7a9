"""How episodes are scored. There is one evaluation, and this is it.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``m`` images of a pool, ``c`` channels of an embedding.
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .episodes import Episode
from .learner import EmbeddingLearner, Learner

__all__ = ["Result", "Scorer", "as_parameters", "describe", "evaluate", "hardware"]


class ImagePool(Protocol):
    """Images that episodes of indices point into."""

    def __len__(self) -> int:
        """Number of images m."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, ``(*indices.shape, *item)``, on the device of the indices."""
        ...


def as_parameters(items: Tensor, learner: Learner) -> Tensor:
    """Floating items in the dtype of the learner's parameters; other items, or without parameters, as they are."""
    parameter = next(learner.parameters(), None)
    return items if parameter is None or not items.is_floating_point() else items.to(parameter.dtype)


@runtime_checkable
class PooledEpisodes(Protocol):
    """Episodes of indices into a pool of images, with what identifies them."""

    facts: dict[str, Any]

    @property
    def images(self) -> ImagePool:
        """The pool."""
        ...

    @property
    def index_batches(self) -> Iterable[Episode]:
        """Batches of episodes whose items are indices into the pool."""
        ...


@dataclass(frozen=True)
class Result:
    """The accuracy of a learner on E episodes, with what is needed to get it again.

    Attributes:
        accuracy: Mean over the episodes of the episode's accuracy, in percent.
        ci95: Half of the 95 % interval, 1.96 s / sqrt(E), s with E - 1, in percent.
        episodes: Number of episodes E.
        facts: Data set, split and its hash, ways, shots, queries, seed, learner, batch-norm mode, versions, device,
            seconds and whatever else was known.
    """

    accuracy: float
    ci95: float
    episodes: int
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, accuracies: Tensor, **facts: Any) -> Result:
        """From the accuracy of each episode, ``(E,)`` in [0, 1]. One episode has no interval: it is NaN.

        Raises:
            ValueError: If there is no episode.
        """
        count = accuracies.numel()
        if count == 0:
            raise ValueError("there is no episode to score")
        percent = accuracies.double() * 100
        half = 1.96 * float(percent.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(percent.mean()), half, count, facts)

    def record(self) -> dict[str, Any]:
        """A flat dictionary, as stored in ``results.json``; an interval that is NaN is ``None`` there."""
        interval = None if math.isnan(self.ci95) else self.ci95
        return {**self.facts, "episodes": self.episodes, "accuracy": self.accuracy, "ci95": interval}

    def __str__(self) -> str:
        return f"{self.accuracy:.2f} ± {self.ci95:.2f} %"


class Scorer:
    """Scores batches of episodes with one learner, embedding each image of a pool once where that is exact.

    Args:
        learner: The learner, already in evaluation mode.
        pool: Where the episodes' indices point; ``None`` if the episodes carry their items themselves.
        chunk: Images embedded at a time.
    """

    def __init__(self, learner: Learner, pool: ImagePool | None = None, *, chunk: int = 512) -> None:
        self.learner = learner
        self.pool = pool
        self.chunk = chunk
        self._embedded: Tensor | None = None

    def __call__(self, episode: Episode) -> Tensor:
        """The accuracy of each episode of a batch, ``(b,)`` in [0, 1].

        Raises:
            ValueError: If the episodes are of regression.
        """
        if episode.ways is None:
            raise ValueError("episodes of regression (ways=None) have no accuracy")
        support_x, support_y, query_x = episode.support_x, episode.support_y, episode.query_x
        if self.pool is not None and isinstance(self.learner, EmbeddingLearner) and not self.learner.transductive:
            if self._embedded is None:
                self._embedded = self._embed(self.pool, self.learner, support_x.device)
            answer = self.learner.answer(self._embedded[support_x], support_y, self._embedded[query_x])
        else:
            if self.pool is not None:
                support_x, query_x = self.pool.take(support_x), self.pool.take(query_x)
            support_x, query_x = (as_parameters(x, self.learner) for x in (support_x, query_x))
            answer = self.learner(support_x, support_y, query_x)
        return (
            (answer.argmax(-1) == episode.query_y)
            .to(torch.float32 if answer.device.type == "mps" else torch.float64)
            .mean(-1)
        )

    @torch.no_grad()
    def _embed(self, pool: ImagePool, learner: EmbeddingLearner, device: torch.device) -> Tensor:
        """Embeddings of all images, ``(m, c)``."""
        starts = range(0, len(pool), self.chunk)
        some = (torch.arange(i, min(i + self.chunk, len(pool)), device=device) for i in starts)
        return torch.cat([learner.embedding(as_parameters(pool.take(indices), learner)) for indices in some])


def evaluate(
    learner: Learner,
    episodes: Iterable[Episode] | PooledEpisodes,
    **facts: Any,
) -> Result:
    """Score a learner on classification episodes, on the device where the learner is.

    Args:
        learner: Any learner; its mode is put back afterwards.
        episodes: Batches of episodes, such as ``Omniglot(root).episodes("test", ...)``.
        **facts: Anything else to keep in the result.

    Returns:
        The mean accuracy over episodes with its 95 % interval.

    Raises:
        ValueError: If there is no episode, or one of regression.
    """
    device = next((p.device for p in learner.parameters()), torch.device("cpu"))
    pool: ImagePool | None = None
    batches: Iterable[Episode]
    known: dict[str, Any] = {}
    if isinstance(episodes, PooledEpisodes):
        pool, batches, known = episodes.images, episodes.index_batches, dict(episodes.facts)
    else:
        batches = episodes
    start = time.perf_counter()
    with _evaluation_mode(learner), torch.no_grad():
        scorer = Scorer(learner, pool)
        accuracies = [scorer(batch.to(device)).cpu() for batch in batches]
    known |= describe(learner, device) | {"seconds": round(time.perf_counter() - start, 3)} | facts
    return Result.of(torch.cat(accuracies) if accuracies else torch.empty(0), **known)


@contextlib.contextmanager
def _evaluation_mode(learner: Learner) -> Iterator[None]:
    training = {module: module.training for module in learner.modules()}
    learner.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def describe(learner: Learner, device: torch.device | str) -> dict[str, Any]:
    """Facts about a learner and the machine that belong into every result."""
    try:
        own_version = version("snail-meta")
    except PackageNotFoundError:  # used from a folder that was never installed
        own_version = "unknown"
    return {
        "learner": type(learner).__name__,
        "note": learner.note,
        "batch_norm": learner.batch_norm,
        "parameters": sum(p.numel() for p in learner.parameters()),
        "versions": {
            "snail": own_version,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "device": torch.device(device).type,
        "hardware": hardware(device),
    }


def hardware(device: torch.device | str) -> str:
    """What computes on ``device``, such as the processor's name and the threads in use."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
