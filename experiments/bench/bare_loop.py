"""A bare training loop from the very checkpoint that ``snail fit`` began with, on the same batches."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from snail import SNAIL, Episode
from snail.datasets import ImageData
from snail.datasets.module import TrainingBatches

from ..levers import keep_memory
from ..loading import load_run
from .common import largest_difference
from .sharing import OneQueryASequence
from .watched import EPOCHS

__all__ = ["Loop"]


def training_batches(data: ImageData) -> Iterator[Episode]:
    """The batches that ``snail fit`` trains on, from its first step on, with their images."""
    samplers = {
        shots: data.sampler("train", ways=data.train_ways, shots=shots, queries=data.queries, seed=data.seed)
        for shots in data.train_shots
    }
    order = {"seed": data.seed, "batch_size": data.batch_size, "length": data.steps_per_epoch}
    drawn = TrainingBatches(samplers, **order, accumulate=1, rank=0, world=1, position=lambda: 0)
    return (batch.map_items(data.images("train").take) for batch in drawn)


def sample_queries(batch: Episode, images: int) -> Episode:
    """As many queries of each episode as can be read one a sequence with ``images`` images at once, at least one."""
    b, support = batch.support_y.shape
    fits = max(1, images // (support + 1) // b)
    return Episode(batch.support_x, batch.support_y, batch.query_x[:, :fits], batch.query_y[:, :fits], batch.ways)


@dataclass(frozen=True)
class Loop:
    """A bare training loop on what a command trains; to be called in a process of its own.

    Args:
        checkpoint: What the command started from.
        levers: Those to take, as ``levers_taken`` tells them.
        warmup: Steps at the start that are not timed, at least 1.
        seconds: How long steps are timed.
        images: If given, queries are read one a sequence, with at most so many images of 28x28, or pixels as many, at
            once (one query an episode at least); where all queries need more, a part of them is timed.
    """

    checkpoint: Path
    levers: Mapping[str, Any]
    warmup: int
    seconds: float
    images: int | None = None

    def __call__(self) -> dict[str, Any]:
        """Run it: ``step_ms`` of each step on a whole batch, as it follows from the ``sample`` of its ``queries``.

        Raises:
            ValueError: If the logits of one query a sequence are not those of the learner itself.
        """
        if self.levers["memory_kept"]:
            keep_memory()
        run = load_run(self.checkpoint, trust=["snail"])  # its config names the callback too
        data = cast(ImageData, run.data)
        layout = torch.channels_last if self.levers["channels_last"] else torch.contiguous_format
        network = run.learner.train().to(memory_format=layout)
        learner, told = network, dict[str, Any]()
        if self.images is not None:
            learner = OneQueryASequence(cast(SNAIL, network))
            told["max_difference"] = difference_of_ways(learner, next(training_batches(data)))
        optimizer = torch.optim.Adam(network.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(EPOCHS * data.steps_per_epoch))
        half = {"bf16-mixed": True, "32-true": False}[self.levers["precision"]]
        source, losses, times = training_batches(data), list[float](), list[float]()
        for step in itertools.count(1):
            start = time.perf_counter()
            batch = next(source)
            drawn = time.perf_counter()
            sample = batch
            if self.images is not None:
                pixels = math.prod(batch.query_x.shape[-2:])
                sample = sample_queries(batch, self.images * 28 * 28 // pixels)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = learner.loss(sample)[0]
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            computed = time.perf_counter()
            optimizer.step()
            schedule.step()
            end = time.perf_counter()
            if step <= self.warmup:
                losses.append(loss.item())
                begun = end
                continue
            # Drawing and the update are done once for the whole batch: each query bears the same share of them.
            part = sample.query_y.numel() / batch.query_y.numel()
            times.append(round(1000 * ((computed - drawn) / part + (drawn - start) + (end - computed)), 3))
            if end - begun >= self.seconds:
                break
        told |= {"queries": batch.query_y.numel(), "sample": sample.query_y.numel()}
        return told | {"step_ms": times, "losses": losses, "threads": torch.get_num_threads()}


def _cosine(steps: int, warmup: int = 100) -> Callable[[int], float]:
    """The default schedule of ``snail.FewShot``."""
    return lambda step: min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def difference_of_ways(plain: OneQueryASequence, batch: Episode) -> float:
    """The largest difference between the logits of the plain way and of its SNAIL, on some queries of a batch.

    Raises:
        ValueError: If they differ in float64 and evaluation mode.
    """
    exact = copy.deepcopy(plain).double().eval()
    few = batch.support_x[:2].double(), batch.support_y[:2], batch.query_x[:2, :2].double()
    return largest_difference(exact.snail(*few), exact(*few), "one support and one query a sequence")
