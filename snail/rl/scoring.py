"""The trials that players are scored on: the same for an agent in training's test and for any strategy.

Axes: ``b`` trial, ``e`` trial of the whole test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .environments import Bandits, Environment, TabularMDPs
from .strategies import Greedy, MDPGreedy, Player, play

__all__ = ["TEST_SEED", "TEST_TRIALS", "greedy_player", "play_rounds", "score"]

TEST_TRIALS, TEST_SEED = 10_000, 1_000_000
"""What a test plays by default."""


def play_rounds(
    environment: Environment, play: Callable[[Environment], Tensor], *, trials: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Play the trials of a test, ``environment.trials`` at a time.

    Players meet the same tasks and the same luck if the environments have the same settings, the number of trials side
    by side among them.

    Args:
        environment: Where to play; it is left with the test's seed.
        play: Plays newly begun trials and gives the return of each, ``(b,)``.
        trials: Trials in all; of the last round, those beyond are left out.
        seed: The test's own.

    Yields:
        The returns of a round, ``(b,)``, and what one who knows each task expects, or ``None`` where the environment
        does not tell; float64 on the CPU.
    """
    environment.reseed(seed)
    for left in range(trials, 0, -environment.trials):
        returns, optimal = play(environment), getattr(environment, "optimal", None)
        yield returns.double().cpu()[:left], None if optimal is None else optimal.double().cpu()[:left]


def score(environment: Environment, player: Player, *, trials: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """What a strategy earns in the trials of a test; see ``play_rounds``.

    Returns:
        The return of each trial, ``(e,)``, and what one who knows the task expects of it.
    """
    rounds = list(play_rounds(environment, lambda now: play(now, player).sum(dim=1), trials=trials, seed=seed))
    known = [optimal for _, optimal in rounds if optimal is not None]
    return torch.cat([returns for returns, _ in rounds]), torch.cat(known) if known else None


def greedy_player(environment: Environment) -> Player | None:
    """The player of an environment who never explores, with which others are compared; ``None`` if there is none."""
    if isinstance(environment, Bandits):
        return Greedy()
    return MDPGreedy() if isinstance(environment, TabularMDPs) else None
