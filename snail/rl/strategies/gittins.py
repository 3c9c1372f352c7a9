"""Bernoulli bandits solved by dynamic programming: the Gittins index of an arm, and the value of the best play."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from .players import between_0_and_1, positive

__all__ = ["bayes_optimal_value", "gittins_index"]

GRID = 401  # charges at which the gain of an arm is computed; between two of them it is taken for straight


@cache
def gittins_index(steps: int, discount: float | None = None) -> Tensor:
    """The Gittins index of an arm that pays 1 with a probability uniform in [0, 1], by dynamic programming.

    It is the charge for a pull at which one who may stop at any time just about begins. With a discount, one may pull
    for ever; this is what Gittins (1979) proves optimal for many arms, and what is tabled in books. Without, one may
    pull as often as there are steps left, undiscounted: the finite-horizon index, which is not exactly optimal.

    Args:
        steps: Steps of a trial.
        discount: Of rewards, between 0 and 1, if any.

    Returns:
        ``(steps, steps)``: the index after that many pulls, of which that many paid. Without a discount ``(steps,
        steps, steps)``: first the number of steps left after the next. Entries that no trial comes to are NaN. The
        tensor is kept and given to all who ask: it must not be written to.

    Raises:
        ValueError: If ``steps`` is not positive, or the discount not between 0 and 1.
    """
    positive("steps", steps)
    if discount is None:
        table = torch.full((steps, steps, steps), math.nan)
        gain = torch.zeros(steps + 1, steps + 1, GRID, dtype=torch.float64)
        for left in range(steps):
            after = steps - left  # states of fewer pulls than this can have as many steps left
            go = _go_on(gain[: after + 1, : after + 1], 1.0)
            table[left, :after, :after] = _break_even(go).float()
            gain = go.clamp(min=0)
        return table
    # Without end means: until what comes is discounted to one part in 10,000, and then a mean is known for good.
    depth = steps + math.ceil(math.log(1e-4) / math.log(between_0_and_1(discount)))
    mean = (torch.arange(depth + 1, dtype=torch.float64) + 1) / (depth + 2)
    row = (mean[:, None] - _charges()).clamp(min=0) / (1 - discount)
    table = torch.full((steps, steps), math.nan)
    for pulls in range(depth - 1, -1, -1):
        go = _pull(row, pulls, discount)
        if pulls < steps:
            table[pulls, : pulls + 1] = _break_even(go).float()
        row = go.clamp(min=0)
    return table


def _charges() -> Tensor:
    return torch.linspace(0, 1, GRID, dtype=torch.float64)


def _pull(after: Tensor, pulls: int, discount: float) -> Tensor:
    """What is gained by one more pull ``(pulls + 1, charges)``, a row for each number of wins; then ``after``."""
    mean = ((torch.arange(pulls + 1, dtype=torch.float64) + 1) / (pulls + 2))[:, None]
    return mean - _charges() + discount * (mean * after[1 : pulls + 2] + (1 - mean) * after[: pulls + 1])


def _go_on(after: Tensor, discount: float) -> Tensor:
    """``_pull`` for all numbers of pulls at once: ``(k + 1, k + 1, charges)`` to ``(k, k, charges)``."""
    k = torch.arange(after.shape[0] - 1, dtype=torch.float64)
    mean = ((k + 1) / (k[:, None] + 2)).unsqueeze(-1)  # pulls, wins; beyond 1 where there are more wins than pulls
    return mean - _charges() + discount * (mean * after[1:, 1:] + (1 - mean) * after[1:, :-1])


def _break_even(gain: Tensor) -> Tensor:
    """The charge at which the gain, falling along ``(..., charges)``, is 0; NaN where it does not become so."""
    last = ((gain > 0).sum(dim=-1, keepdim=True) - 1).clamp(0, GRID - 2)  # the last charge with a gain
    high, low = gain.gather(-1, last)[..., 0], gain.gather(-1, last + 1)[..., 0]
    charge = (last[..., 0] + high / (high - low)) / (GRID - 1)
    return charge.where((high >= 0) & (low <= 0), math.nan)


def bayes_optimal_value(arms: int, steps: int) -> float:
    """What the best of all players can expect of a Bernoulli bandit of uniform probabilities, exactly.

    Goes through all that can be known of the arms, whatever their order; 5 arms and 10 steps take a second or two.

    Args:
        arms: Arms A.
        steps: Pulls T in a trial.

    Raises:
        ValueError: If a number is not positive.
    """
    positive("arms", arms)

    @cache
    def value(known: tuple[tuple[int, int], ...], left: int) -> float:
        """Of ``left`` steps where the arms that were pulled have ``known`` wins and losses."""
        if left == 0:
            return 0.0
        best = 0.0
        options = set(known) | ({(0, 0)} if len(known) < arms else set())
        for wins, losses in options:
            others = list(known)
            if (wins, losses) in known:
                others.remove((wins, losses))
            won = value(tuple(sorted([*others, (wins + 1, losses)])), left - 1)
            lost = value(tuple(sorted([*others, (wins, losses + 1)])), left - 1)
            mean = (wins + 1) / (wins + losses + 2)
            best = max(best, mean * (1 + won) + (1 - mean) * lost)
        return best

    return value((), positive("steps", steps))
