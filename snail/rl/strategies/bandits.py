"""Strategies for Bernoulli bandits. They believe that each arm's probability is uniform in [0, 1].

Axes: ``b`` trial, ``A`` arms.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..environments import Bandits, Environment
from .gittins import gittins_index
from .players import Player, between_0_and_1, not_negative, positive, probability

__all__ = ["GRIDS", "UCB1", "EpsilonGreedy", "Gittins", "Greedy", "LikeliestThompson", "OptimisticThompson", "Thompson"]


class _BanditPlayer(Player):
    """Counts what each arm paid and pulls the arm of the highest index.

    Attributes:
        wins: How often each arm has paid, ``(b, A)``.
        pulls: How often each was pulled, likewise.
        now: Pulls so far in a trial.
    """

    def begin(self, environment: Environment) -> None:
        """See ``Player.begin``.

        Raises:
            TypeError: If the environment is not ``Bandits``.
        """
        if not isinstance(environment, Bandits):
            raise TypeError(f"{type(self).__name__} plays Bandits, not {type(environment).__name__}")
        super().begin(environment)
        self.wins = torch.zeros(environment.trials, environment.actions, device=environment.device)
        self.pulls = torch.zeros_like(self.wins)
        self.now = 0

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        return self._best(self._index())

    def learn(self, action: Tensor, observation: Tensor, reward: Tensor, done: Tensor) -> None:
        """See ``Player.learn``."""
        self.wins.scatter_add_(1, action[:, None], reward[:, None])
        self.pulls.scatter_add_(1, action[:, None], torch.ones_like(reward)[:, None])
        self.now += 1

    @property
    def _expected(self) -> Tensor:
        """What is to be expected of each arm, ``(b, A)``: the mean of its posterior."""
        return (self.wins + 1) / (self.pulls + 2)

    def _sampled(self) -> Tensor:
        """A probability of each arm from its posterior, ``(b, A)``."""
        wins, losses = self.wins.cpu().numpy() + 1, (self.pulls - self.wins).cpu().numpy() + 1
        return self._tensor(self._random.beta(wins, losses))

    @abstractmethod
    def _index(self) -> Tensor:
        """The index ``(b, A)`` of each arm."""


class Greedy(_BanditPlayer):
    """The arm of the highest expected probability."""

    def _index(self) -> Tensor:
        return self._expected


class EpsilonGreedy(Greedy):
    """Any arm with probability ``epsilon``, otherwise as ``Greedy``.

    Args:
        epsilon: From 0 to 1.
        seed: Any integer from 0.

    Raises:
        ValueError: If ``epsilon`` is not a probability, or the seed negative.
    """

    def __init__(self, epsilon: float = 0.01, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.epsilon = probability(epsilon)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        return self._explored(super().act(observation), self.epsilon)


class UCB1(_BanditPlayer):
    """The arm of the highest upper confidence bound, mean + constant × √(2 ln t / n) (Auer et al., 2002).

    Args:
        constant: How wide the bound is, at least 0; Auer et al. prove theirs for 1.
        textbook: Whether every arm must first be pulled once, and the mean is that of its n pulls, as Auer et al. have
            it. Otherwise each arm begins with two pulls of which one paid, which the published numbers need: with as
            many arms as steps, the textbook's player does no better than a random one.
        seed: Any integer from 0.

    Raises:
        ValueError: If the constant or the seed is negative.
    """

    def __init__(self, constant: float = 0.2, *, textbook: bool = False, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.constant, self.textbook = not_negative("constant", constant), textbook

    def _index(self) -> Tensor:
        if self.textbook:
            pulls, mean = self.pulls, self.wins / self.pulls.clamp(min=1)
        else:
            pulls, mean = self.pulls + 2, self._expected
        bound = mean + self.constant * (2 * math.log(max(self.now, 1)) / pulls).sqrt()
        return bound.masked_fill(pulls == 0, math.inf)


class Thompson(_BanditPlayer):
    """The arm that is best in a draw from the posterior (Thompson, 1933)."""

    def _index(self) -> Tensor:
        return self._sampled()


class OptimisticThompson(_BanditPlayer):
    """As ``Thompson``, but no arm is drawn worse than is expected of it (May et al., 2012)."""

    def _index(self) -> Tensor:
        return self._sampled().maximum(self._expected)


class LikeliestThompson(_BanditPlayer):
    """As ``Thompson``, with the draw of all arms that is the likeliest of ``samples``.

    By this the authors of RL² got what they report as optimistic Thompson sampling.

    Args:
        samples: Draws to choose among.
        seed: Any integer from 0.

    Raises:
        ValueError: If ``samples`` is not positive, or the seed negative.
    """

    def __init__(self, samples: int = 20, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.samples = positive("samples", samples)

    def _index(self) -> Tensor:
        losses = self.pulls - self.wins
        chosen, highest = torch.empty(0), torch.empty(0)
        for sample in range(self.samples):
            drawn = self._sampled()
            likelihood = (torch.xlogy(self.wins, drawn) + torch.xlogy(losses, 1 - drawn)).sum(dim=1, keepdim=True)
            if sample == 0:
                chosen, highest = drawn, likelihood
            else:
                chosen = torch.where(likelihood > highest, drawn, chosen)
                highest = highest.maximum(likelihood)
        return chosen


class Gittins(_BanditPlayer):
    """The arm of the highest Gittins index; see ``gittins_index``.

    Args:
        discount: Of the index for trials without end, below 1; if not given, the index is that for the steps that are
            left, which knows when the trial ends.
        seed: Any integer from 0.

    Raises:
        ValueError: If the discount is not between 0 and 1, or the seed negative.
    """

    def __init__(self, discount: float | None = None, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.discount = None if discount is None else between_0_and_1(discount)

    def begin(self, environment: Environment) -> None:
        """See ``Player.begin``."""
        super().begin(environment)
        self._table = gittins_index(environment.steps, self.discount).to(environment.device)

    def _index(self) -> Tensor:
        table = self._table if self.discount is not None else self._table[self.environment.steps - self.now - 1]
        return table[self.pulls.long(), self.wins.long()]


# Of what ``choose`` has to choose, on other seeds than results are quoted on (``snail rl classical``); the defaults are
# best for 10 arms and 100 steps, save epsilon: 0 is best there, the default the least above it.
GRIDS: dict[Any, tuple[Any, ...]] = {
    EpsilonGreedy: (0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
    UCB1: (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    LikeliestThompson: (1, 2, 5, 7, 10, 20),
    Gittins: (0.9, 0.95, 0.99, 0.995),
}
