"""Sinusoid regression (Finn et al., 2017, section 5.1): each task is a wave, and a few points of it are shown."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from snail.episodes import Episode

from .images import split_hash
from .module import EpisodeData
from .sampler import Sampler, generator_key

__all__ = ["Sinusoid", "SinusoidSampler"]

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
DISTRIBUTION = "y = a sin(x - p); a uniform in [0.1, 5], p in [0, pi], x in [-5, 5]"


class Sinusoid(EpisodeData):
    """Waves ``y = a sin(x - p)``: amplitude a uniform in [0.1, 5], phase p in [0, pi], inputs x in [-5, 5].

    The phase is subtracted as in the authors' code. Training, validation and test draw their own tasks. A task is the
    same whatever the number of shots, with the same queries: fewer shots are the first of more.

    Args:
        train_shots: Fewest and most points of a wave that are shown in training; a number between them is drawn for
            each optimiser step.
        queries: Query points of each wave in training.
        batch_size: Waves in a training step, on each device.
        steps_per_epoch: Optimiser steps between two validations.
        eval_shots: Numbers of points shown that are scored, each by itself.
        eval_queries: Query points of each scored wave.
        val_episodes: Waves that are validated on; 0: no validation.
        test_episodes: Waves that are tested on.
        seed: Seed of all episodes.
    """

    dataset = "sinusoid"
    split = "amplitude 0.1-5"

    def __init__(
        self,
        train_shots: tuple[int, int] = (10, 10),
        queries: int = 10,
        batch_size: int = 25,
        steps_per_epoch: int = 1000,
        eval_shots: list[int] = [5, 10, 20],  # noqa: B006 (never changed)
        eval_queries: int = 100,
        val_episodes: int = 200,
        test_episodes: int = 600,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_shots=train_shots,
            queries=queries,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            eval_shots=eval_shots,
            eval_queries=eval_queries,
            val_episodes=val_episodes,
            test_episodes=test_episodes,
            seed=seed,
        )

    def sampler(self, part: str, *, ways: int | None = None, shots: int, queries: int, seed: int) -> SinusoidSampler:
        """See ``EpisodeData.sampler``.

        Raises:
            ValueError: If there is no such part, or ``ways`` are given.
        """
        if ways is not None:
            raise ValueError(f"{ways} ways are asked of waves, which have no classes; leave ways out")
        return SinusoidSampler(self.split_name(part), shots=shots, queries=queries, seed=seed)


class SinusoidSampler(Sampler):
    """Draws waves and points on them.

    Args:
        split: Such as ``"amplitude 0.1-5/test"``; part of what seeds the draw.
        shots: Points shown, s.
        queries: Points asked for, q.
        seed: Any integer from 0.
    """

    def __init__(self, split: str, *, shots: int, queries: int, seed: int) -> None:
        hash = split_hash([f"{DISTRIBUTION}; {split}"])
        super().__init__(f"{Sinusoid.dataset}/{split}", hash, ways=None, shots=shots, queries=queries, seed=seed)
        self._key = generator_key(f"{hash}|{queries}|{seed}")  # not the shots, which share tasks and queries

    def draw(self, start: int, stop: int) -> Episode:
        """Episodes ``start`` to ``stop - 1`` as one batch, all of it float32: ``(b, s, 1)`` and ``(b, q, 1)``."""
        count = 2 + self.queries + self.shots
        # The c-th four numbers of every episode are a stream of their own: they do not depend on how many there are.
        fours = [np.random.Philox(key=self._key ^ c, counter=start) for c in range(-(-count // 4))]
        raw = np.stack([four.random_raw(4 * (stop - start)).reshape(-1, 4) for four in fours], axis=1)
        numbers = (raw.reshape(stop - start, -1)[:, :count] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        amplitude, phase = _within(AMPLITUDES, numbers[:, :1]), _within(PHASES, numbers[:, 1:2])
        x = _within(INPUTS, numbers[:, 2:])
        y = amplitude * np.sin(x - phase)
        (query_x, support_x), (query_y, support_y) = (
            torch.from_numpy(values).float().unsqueeze(-1).tensor_split([self.queries], dim=1) for values in (x, y)
        )
        return Episode(support_x, support_y, query_x, query_y, None)


def _within(ends: tuple[float, float], numbers: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    low, high = ends
    return np.asarray(low + (high - low) * numbers, dtype=np.float64)
