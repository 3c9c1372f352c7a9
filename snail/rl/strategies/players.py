"""What every strategy is: a player of all trials of an environment at once.

Axes: ``b`` trial, ``A`` actions, ``T`` steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..environments import Environment, key

__all__ = ["Player", "Random", "between_0_and_1", "choose", "not_negative", "play", "positive", "probability"]


class Player(ABC):
    """What acts in an environment, in all its trials at once.

    Args:
        seed: Any integer from 0.

    Raises:
        ValueError: If the seed is negative.
    """

    def __init__(self, *, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        self.seed = seed
        self._begun = 0

    def begin(self, environment: Environment) -> None:
        """New trials have begun: forget the last."""
        self._begun += 1
        self.environment = environment
        self._random = np.random.Generator(np.random.Philox(key=key(f"player|{self.seed}|{self._begun}")))

    @abstractmethod
    def act(self, observation: Tensor) -> Tensor:
        """What to do ``(b,)``, int64, on seeing ``observation`` ``(b, o)``."""

    def learn(self, action: Tensor, observation: Tensor, reward: Tensor, done: Tensor) -> None:  # noqa: B027
        """Take in what ``action`` led to, as ``Environment.step`` tells it; nothing, unless a player does."""

    def _tensor(self, numbers: Any) -> Tensor:
        return torch.from_numpy(numbers).to(self.environment.device)

    def _uniform(self, *shape: int) -> Tensor:
        return self._tensor(self._random.random(shape, dtype=np.float32))

    def _anything(self) -> Tensor:
        """Random actions ``(b,)``."""
        return self._tensor(self._random.integers(self.environment.actions, size=self.environment.trials))

    def _explored(self, best: Tensor, epsilon: float) -> Tensor:
        """Any actions with probability ``epsilon``, otherwise ``best`` ``(b,)``."""
        if epsilon == 0:
            return best
        return torch.where(self._uniform(len(best)) < epsilon, self._anything(), best)

    def _best(self, worth: Tensor) -> Tensor:
        """One of the best of the actions ``(b,)`` that are worth ``(b, A)``."""
        best = worth == worth.amax(dim=1, keepdim=True)
        return (self._uniform(*worth.shape) + best).argmax(dim=1)  # the best have 1 more than any other can


def play(environment: Environment, player: Player) -> Tensor:
    """Play newly begun trials to their end; the rewards ``(b, T)``."""
    observation = environment.reset()
    player.begin(environment)
    rewards = []
    for _ in range(environment.steps):
        action = player.act(observation)
        observation, reward, done = environment.step(action)
        player.learn(action, observation, reward, done)
        rewards.append(reward)
    return torch.stack(rewards, dim=1)


Constant = TypeVar("Constant", bound=float)


def choose(
    player: Callable[[Constant], Player], grid: Sequence[Constant], environment: Callable[[], Environment]
) -> tuple[Constant, dict[Constant, float]]:
    """The constant with which a strategy does best.

    Args:
        player: Makes a player of a constant.
        grid: The constants to try, at least one.
        environment: Makes the environment to try them in, the same each time. Results are to be quoted on another
            seed than its.

    Returns:
        The best constant, and the mean return of a trial with each.
    """
    returns = {constant: play(environment(), player(constant)).sum(dim=1).mean().item() for constant in grid}
    return max(returns, key=lambda constant: returns[constant]), returns


class Random(Player):
    """Anything, each action equally likely; plays any environment."""

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        return self._anything()


def positive(what: str, value: int) -> int:
    """The number, if it is at least 1."""
    if value < 1:
        raise ValueError(f"{what} is {value}; it must be at least 1")
    return value


def not_negative(what: str, value: float) -> float:
    """The number, if it is at least 0."""
    if not value >= 0:
        raise ValueError(f"{what} is {value}; it must be at least 0")
    return value


def probability(epsilon: float) -> float:
    """The epsilon, if it is a probability."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; it must be from 0 to 1")
    return epsilon


def between_0_and_1(discount: float) -> float:
    """The discount, if it is above 0 and below 1."""
    if not 0 < discount < 1:
        raise ValueError(f"discount is {discount}; it must be between 0 and 1")
    return discount
