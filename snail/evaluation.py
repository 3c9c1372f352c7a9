"""How episodes are scored. There is one evaluation, and this is it.

Axes: ``v`` variant of an answer, ``b`` episode, ``s`` support items, ``q`` query items, ``m`` images of a pool, ``c``
channels of an embedding.
"""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .episodes import Episode
from .learner import EmbeddingLearner, Learner

__all__ = [
    "METRICS",
    "Metric",
    "Result",
    "Scorer",
    "Scoring",
    "as_parameters",
    "describe",
    "evaluate",
    "evaluate_each",
    "hardware",
    "machine",
    "metric_in",
]


@dataclass(frozen=True)
class Metric:
    """What episodes are scored by: all that differs between one such measure and another is said here.

    Attributes:
        name: In records and logs.
        title: For people.
        higher_is_better: Whether more of it is better.
        scale: What a score is multiplied by before it is kept.
        digits: Digits behind the point.
        unit: What stands behind a figure.
        tag: What stands behind the unit where nothing near it says which metric it is.
        ends: The least and the most that is possible; ``None`` if there is no most.
    """

    name: str
    title: str
    higher_is_better: bool
    scale: float
    digits: int
    unit: str
    tag: str
    ends: tuple[float, float] | None

    def better(self, one: float, other: float) -> bool:
        """Whether ``one`` is better than ``other``; anything is better than what is not a number."""
        return math.isnan(other) or (one > other if self.higher_is_better else one < other)

    def text(self, *figures: float | None) -> str:
        """A figure, or a mean and half of its interval, such as ``90.00 ± 1.00 %``; ``?`` for what is not known."""
        shown = ("?" if figure is None else f"{figure:.{self.digits}f}" for figure in figures)
        return " ± ".join(shown) + self.unit


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "accuracy", True, 100, 2, " %", "", (0, 100)),
        Metric("mse", "mean squared error", False, 1, 3, "", " MSE", None),
    )
}
"""The metrics by name."""


def metric_in(names: Container[str], prefix: str = "") -> Metric | None:
    """The metric that is among the names of a record, or behind ``val/`` among those that were logged."""
    return next((metric for metric in METRICS.values() if prefix + metric.name in names), None)


class ImagePool(Protocol):
    """Images that episodes of indices point into."""

    def __len__(self) -> int:
        """Number of images m."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """The images at ``indices``, ``(*indices.shape, *item)``, on the device of the indices."""
        ...


def as_parameters(numbers: Tensor, learner: Learner) -> Tensor:
    """Floating numbers in the dtype of the learner's parameters; others, or without parameters, as they are."""
    parameter = next(learner.parameters(), None)
    return numbers if parameter is None or not numbers.is_floating_point() else numbers.to(parameter.dtype)


@runtime_checkable
class KnownEpisodes(Protocol):
    """Episodes with what identifies them."""

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies them in a result."""
        ...

    @property
    def images(self) -> ImagePool | None:
        """The pool that items are indices into; ``None`` if the episodes carry their items themselves."""
        ...

    @property
    def drawn(self) -> Iterable[Episode]:
        """Batches of the episodes, indices left as they are."""
        ...


@dataclass(frozen=True)
class Result:
    """The score of a learner on E episodes, with what is needed to get it again.

    Attributes:
        mean: Mean over the episodes of the episode's accuracy, in percent; or of its mean squared error.
        ci95: Half of the 95 % interval, 1.96 s / sqrt(E), s with E - 1, in the same unit.
        episodes: Number of episodes E.
        facts: Data set, split and its hash, ways, shots, queries, seed, learner, batch-norm mode, versions, device,
            seconds and whatever else was known.
        metric: ``accuracy``, or ``mse`` for regression.
        mistakes: How often each image of the pool was a query, and how often of these it was answered wrongly,
            ``(2, m)``; ``None`` where it is not known which images were asked.
    """

    mean: float
    ci95: float
    episodes: int
    facts: dict[str, Any] = field(default_factory=dict)
    metric: str = "accuracy"
    mistakes: Tensor | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, scores: Tensor, *, metric: str = "accuracy", mistakes: Tensor | None = None, **facts: Any) -> Result:
        """From the score of each episode, ``(E,)``, accuracies in [0, 1]. One episode has no interval: it is NaN.

        Raises:
            ValueError: If there is no episode.
        """
        count = scores.numel()
        if count == 0:
            raise ValueError("there is no episode to score")
        scaled = scores.double() * METRICS[metric].scale
        half = 1.96 * float(scaled.std(correction=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(scaled.mean()), half, count, facts, metric, mistakes)

    @property
    def accuracy(self) -> float:
        """The mean accuracy in percent.

        Raises:
            AttributeError: If this is a result of regression.
        """
        if self.metric != "accuracy":
            raise AttributeError(f"a result of regression has no accuracy ({self}); read its mean")
        return self.mean

    @property
    def half_of_mistakes(self) -> int | None:
        """On how few images at least half of the mistakes were made; ``None`` if that is not known."""
        if self.mistakes is None:
            return None
        most_first = self.mistakes[1].sort(descending=True).values
        return int((2 * (most_first.cumsum(0) - most_first) < most_first.sum()).sum())

    def record(self) -> dict[str, Any]:
        """A flat dictionary, as stored in ``results.json``; an interval that is NaN is ``None`` there."""
        interval, few = None if math.isnan(self.ci95) else self.ci95, self.half_of_mistakes
        known = {} if few is None else {"half_of_mistakes": few}
        return {**self.facts, "episodes": self.episodes, self.metric: self.mean, "ci95": interval, **known}

    def __str__(self) -> str:
        metric = METRICS[self.metric]
        return metric.text(self.mean, self.ci95) + metric.tag


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
        """The score of each variant of the learner's answer on each episode of a batch, ``(v, b)``; see ``each``."""
        return self.each(episode).mean(-1)

    def each(self, episode: Episode) -> Tensor:
        """The score of each variant of the learner's answer to each query of a batch, ``(v, b, q)``.

        Returns:
            1 where it is right and 0 where it is not; for regression squared errors, averaged over output dimensions.

        Raises:
            ValueError: If the learner's answers are not of the shape that is due.
        """
        support_x, support_y, query_x = episode.support_x, episode.support_y, episode.query_x
        if self.pool is not None and isinstance(self.learner, EmbeddingLearner) and not self.learner.transductive:
            if self._embedded is None:
                self._embedded = self._embed(self.pool, self.learner, support_x.device)
            answers = self.learner.answer(self._embedded[support_x], support_y, self._embedded[query_x]).unsqueeze(0)
        else:
            if self.pool is not None:
                support_x, query_x = self.pool.take(support_x), self.pool.take(query_x)
            given = (as_parameters(x, self.learner) for x in (support_x, support_y, query_x))
            answers = self.learner.answers(*given)
        regression = episode.ways is None
        due = (len(self.learner.variants), *episode.query_y.shape)
        if (answers.shape if regression else answers.shape[:-1]) != due:
            raise ValueError(
                f"{type(self.learner).__name__} answers with shape {tuple(answers.shape)}, but "
                f"{due if regression else (*due, episode.ways)} is due for {len(episode)} episodes"
            )
        precise = torch.float32 if answers.device.type == "mps" else torch.float64
        if regression:
            return (answers.to(precise) - episode.query_y.to(precise)).square().mean(-1)
        return (answers.argmax(-1) == episode.query_y).to(precise)

    @torch.no_grad()
    def _embed(self, pool: ImagePool, learner: EmbeddingLearner, device: torch.device) -> Tensor:
        """Embeddings of all images, ``(m, c)``."""
        starts = range(0, len(pool), self.chunk)
        some = (torch.arange(i, min(i + self.chunk, len(pool)), device=device) for i in starts)
        return torch.cat([learner.embedding(as_parameters(pool.take(indices), learner)) for indices in some])


class Scoring:
    """The scores of a setting as its batches come in, and the results that they end in.

    Args:
        scorer: Scores; several settings may share it.
        known: Facts to keep in the results.
        starts: Where the batches are one process's share of ``known["episodes"]`` episodes: the index of each one's
            first episode, ``None`` for a batch that does not count.
    """

    def __init__(self, scorer: Scorer, known: Mapping[str, Any], starts: Sequence[int | None] | None = None) -> None:
        self.scorer = scorer
        self.known = known
        self.starts = starts
        self._metric = "accuracy"
        self._scores: list[Tensor] = []
        self._mistakes: Tensor | None = None
        self._seconds = 0.0

    def add(self, episode: Episode) -> None:
        """Score a batch of episodes."""
        start = time.perf_counter()
        self._metric = "mse" if episode.ways is None else "accuracy"
        each = self.scorer.each(episode)
        if self.scorer.pool is not None and self._metric == "accuracy":
            if self._mistakes is None:
                self._mistakes = each.new_zeros(2, len(self.scorer.pool))
            if self.starts is None or self.starts[len(self._scores)] is not None:
                asked_wrong = torch.stack([torch.ones_like(each[-1]), 1 - each[-1]])
                self._mistakes.index_add_(1, episode.query_x.flatten(), asked_wrong.flatten(1))
        self._scores.append(each.mean(-1))
        self._seconds += time.perf_counter() - start

    def scores(self, over_processes: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
        """The score of each variant on each episode, in the order of the episodes' index, ``(v, E)``.

        Args:
            over_processes: The sum of a tensor over the processes that share the episodes.
        """
        if not self._scores:
            return torch.empty(len(self.scorer.learner.variants), 0)
        if self.starts is None:
            return torch.cat(self._scores, dim=1)
        first, count = self._scores[0], int(self.known["episodes"])
        scores, times = first.new_zeros(len(first), count), first.new_zeros(count)
        for start, some in zip(self.starts, self._scores, strict=False):  # a trainer may have been told to stop early
            if start is not None:
                scores[:, start : start + some.shape[1]] = some
                times[start : start + some.shape[1]] = 1
        scores, times = over_processes(scores), over_processes(times)
        return scores[:, times > 0]

    def results(
        self,
        device: torch.device | str,
        over_processes: Callable[[Tensor], Tensor] = lambda own: own,
        **facts: Any,
    ) -> list[Result]:
        """One result for each variant of the learner's answer; the last one, which counts, tells of its mistakes.

        Args:
            device: Where the learner was, to be kept among the facts.
            over_processes: See ``scores``.
            **facts: Anything else to keep; it stands over what is known.

        Raises:
            ValueError: If no episode was scored.
        """
        start = time.perf_counter()
        learner, scores = self.scorer.learner, self.scores(over_processes).cpu()
        mistakes = None if self._mistakes is None else over_processes(self._mistakes).cpu()
        seconds = round(self._seconds + time.perf_counter() - start, 3)  # a device may have been still at work
        facts = {**self.known, **describe(learner, device), "seconds": seconds, **facts}
        told = [None] * (len(scores) - 1) + [mistakes]
        return [
            Result.of(one, metric=self._metric, mistakes=wrong, **(variant | facts))
            for one, variant, wrong in zip(scores, learner.variants, told, strict=True)
        ]


def evaluate(learner: Learner, episodes: Iterable[Episode] | KnownEpisodes, **facts: Any) -> Result:
    """Score a learner on episodes, on the device where the learner is.

    Args:
        learner: Any learner; its mode is put back afterwards.
        episodes: Batches of episodes, such as ``Omniglot(root).episodes("test", ...)``.
        **facts: Anything else to keep in the result.

    Returns:
        The mean over episodes of the accuracy, or for regression of the squared error, with its 95 % interval.

    Raises:
        ValueError: If there is no episode, or the learner's answers are not of the shape that is due.
    """
    return evaluate_each(learner, episodes, **facts)[-1]


def evaluate_each(learner: Learner, episodes: Iterable[Episode] | KnownEpisodes, **facts: Any) -> list[Result]:
    """``evaluate`` with a result for each of ``learner.variants``, such as one for each number of inner steps."""
    device = next((p.device for p in learner.parameters()), torch.device("cpu"))
    pool: ImagePool | None = None
    batches: Iterable[Episode]
    known: dict[str, Any] = {}
    if isinstance(episodes, KnownEpisodes):
        pool, batches, known = episodes.images, episodes.drawn, episodes.facts
    else:
        batches = episodes
    scoring = Scoring(Scorer(learner, pool), known)
    with _evaluation_mode(learner), torch.no_grad():
        for batch in batches:
            scoring.add(batch.to(device))
    return scoring.results(device, **facts)


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
    return {
        "learner": type(learner).__name__,
        "network": learner.network_name,
        "note": learner.note,
        "batch_norm": learner.batch_norm,
        "parameters": sum(p.numel() for p in learner.parameters()),
        **machine(device),
    }


def machine(device: torch.device | str) -> dict[str, Any]:
    """Facts that belong into every result: versions (of a checkout's code, the commit), kind of device, hardware."""
    try:
        own_version = version("snail-meta")
    except PackageNotFoundError:  # used from a folder that was never installed
        own_version = "unknown"
    return {
        "versions": {
            "snail": own_version,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            **({"commit": commit} if (commit := _commit()) else {}),
        },
        "device": torch.device(device).type,
        "hardware": hardware(device),
    }


@cache
def _commit() -> str | None:
    """The commit of the checkout that this package runs from, ``-dirty`` behind it if a file differs from it."""
    here = Path(__file__).resolve()

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", *command], cwd=here.parent, capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # the checkout around an environment is not ours
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


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
