"""Strategies for tabular Markov decision processes (MDPs), which plan anew at the start of each episode.

They believe that mean rewards are from Normal(1, 1) and transitions from a flat Dirichlet: how the tasks are in fact
drawn, the best that they can believe. Axes: ``b`` trial, ``S`` states, ``A`` actions, ``H`` steps of an episode.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..environments import Environment, TabularMDPs, value_iteration
from .players import Player, not_negative, positive, probability

__all__ = ["GRIDS", "OPSRL", "PSRL", "UCRL2", "KnownMDP", "MDPEpsilonGreedy", "MDPGreedy"]


class _MDPPlayer(Player):
    """Counts what happened in each state and follows a plan ``(H, b, S)`` that is made at the start of an episode.

    Attributes:
        visits: How often each action was taken in each state, ``(b, S, A)``.
        earned: What it earned in all, likewise.
        seen: To which state it led, how often, ``(b, S, A, S)``; not at the end of an episode, where none is seen.
    """

    environment: TabularMDPs

    def __init__(self, *, prior_mean: float = 1.0, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.prior_mean = prior_mean

    def begin(self, environment: Environment) -> None:
        """See ``Player.begin``.

        Raises:
            TypeError: If the environment is not ``TabularMDPs``.
        """
        if not isinstance(environment, TabularMDPs):
            raise TypeError(f"{type(self).__name__} plays TabularMDPs, not {type(environment).__name__}")
        super().begin(environment)
        b, s, a = environment.trials, environment.states, environment.actions
        self.visits = torch.zeros(b, s, a, device=environment.device)
        self.earned = torch.zeros_like(self.visits)
        self.seen = torch.zeros(b, s, a, s, device=environment.device)
        self._trial = torch.arange(b, device=environment.device)
        self._now = 0

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        self._state = observation.argmax(dim=1)
        if self._now % self.environment.horizon == 0:
            self._policy = self._plan()
        return self._policy[self._now % self.environment.horizon, self._trial, self._state]

    def learn(self, action: Tensor, observation: Tensor, reward: Tensor, done: Tensor) -> None:
        """See ``Player.learn``."""
        here = (self._trial, self._state, action)
        self.visits[here] += 1
        self.earned[here] += reward
        self.seen[(*here, observation.argmax(dim=1))] += (~done).float()
        self._now += 1

    @property
    def _expected_rewards(self) -> Tensor:
        """The mean of the posterior of mean rewards, ``(b, S, A)``; their precision is 1 + visits."""
        return (self.prior_mean + self.earned) / (1 + self.visits)

    @property
    def _expected_transitions(self) -> Tensor:
        """The mean of the posterior of transitions, ``(b, S, A, S)``."""
        weights = 1 + self.seen
        return weights / weights.sum(dim=-1, keepdim=True)

    def _sampled(self) -> tuple[Tensor, Tensor]:
        """Transitions ``(b, S, A, S)`` and mean rewards ``(b, S, A)`` from the posterior."""
        normal = self._tensor(self._random.standard_normal(self.visits.shape, dtype=np.float32))
        rewards = self._expected_rewards + normal / (1 + self.visits).sqrt()
        weights = self._random.standard_gamma(1 + self.seen.cpu().numpy(), dtype=np.float32)
        transitions = self._tensor(weights)
        return transitions / transitions.sum(dim=-1, keepdim=True), rewards

    @abstractmethod
    def _plan(self) -> Tensor:
        """What to do in an episode, ``(H, b, S)``, int64."""


class KnownMDP(_MDPPlayer):
    """The best that one can do who knows the processes."""

    def _plan(self) -> Tensor:
        task = self.environment
        return value_iteration(task.transitions, task.rewards, task.horizon)[1]


class MDPGreedy(_MDPPlayer):
    """Plans as if what is expected of the process were true.

    Args:
        prior_mean: What mean reward is expected of an action that was never taken. They are in fact drawn around 1;
            players who expect 0 explore less, and come near the published numbers.
        seed: Any integer from 0.

    Raises:
        ValueError: If the seed is negative.
    """

    def _plan(self) -> Tensor:
        return value_iteration(self._expected_transitions, self._expected_rewards, self.environment.horizon)[1]


class MDPEpsilonGreedy(MDPGreedy):
    """Any action with probability ``epsilon``, otherwise as ``MDPGreedy``.

    Args:
        epsilon: From 0 to 1.
        prior_mean: As of all players of MDPs, see ``MDPGreedy``.
        seed: Any integer from 0.

    Raises:
        ValueError: If ``epsilon`` is not a probability, or the seed negative.
    """

    def __init__(self, epsilon: float = 0.02, *, prior_mean: float = 1.0, seed: int = 0) -> None:
        super().__init__(prior_mean=prior_mean, seed=seed)
        self.epsilon = probability(epsilon)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        return self._explored(super().act(observation), self.epsilon)


class PSRL(_MDPPlayer):
    """Posterior sampling (Strens, 2000; Osband et al., 2013): plans in a process drawn from the posterior.

    Args:
        prior_mean: As of all players of MDPs, see ``MDPGreedy``.
        seed: Any integer from 0.

    Raises:
        ValueError: If the seed is negative.
    """

    def _plan(self) -> Tensor:
        transitions, rewards = self._sampled()
        return value_iteration(transitions, rewards, self.environment.horizon)[1]


class OPSRL(_MDPPlayer):
    """Optimistic posterior sampling: each action is worth the most that it is in any of several drawn processes.

    Args:
        samples: Processes drawn for an episode; 1 is ``PSRL``.
        prior_mean: As of all players of MDPs, see ``MDPGreedy``.
        seed: Any integer from 0.

    Raises:
        ValueError: If ``samples`` is not positive, or the seed negative.
    """

    def __init__(self, samples: int = 10, *, prior_mean: float = 1.0, seed: int = 0) -> None:
        super().__init__(prior_mean=prior_mean, seed=seed)
        self.samples = positive("samples", samples)

    def _plan(self) -> Tensor:
        most: Tensor | None = None
        for _ in range(self.samples):
            transitions, rewards = self._sampled()
            after, _ = value_iteration(transitions, rewards, self.environment.horizon)
            worth = rewards + torch.einsum("bsan,hbn->hbsa", transitions, after[1:])
            most = worth if most is None else most.maximum(worth)
        assert most is not None
        return most.argmax(dim=-1)


class UCRL2(_MDPPlayer):
    """Plans in the best process that what was seen makes credible (Jaksch et al., 2010), here for a fixed horizon.

    After n visits a mean reward may be higher than observed by constant × √(4 ln(2 S A t / δ) / n), and transitions
    differ, added up over states, by √S times that; δ is 0.05 and t the steps so far. What is observed is counted
    together with the prior, as all players here do; an action not yet taken counts as taken once.

    Args:
        constant: How wide the bounds are, at least 0.
        prior_mean: As of all players of MDPs, see ``MDPGreedy``.
        seed: Any integer from 0.

    Raises:
        ValueError: If the constant or the seed is negative.
    """

    def __init__(self, constant: float = 0.02, *, prior_mean: float = 1.0, seed: int = 0) -> None:
        super().__init__(prior_mean=prior_mean, seed=seed)
        self.constant = not_negative("constant", constant)

    def _plan(self) -> Tensor:
        _, s, a = self.visits.shape
        width = self.constant * (4 * math.log(2 * s * a * (self._now + 1) / 0.05) / self.visits.clamp(min=1)).sqrt()
        rewards, transitions = self._expected_rewards + width, self._expected_transitions
        moved = (width * math.sqrt(s) / 2).unsqueeze(-1)  # probability that may go from the worst states to the best
        value = torch.zeros_like(rewards[..., 0])
        policy: list[Tensor] = []
        for _ in range(self.environment.horizon):
            value, order = value.sort(dim=-1, descending=True)
            likely = transitions.gather(-1, order[:, None, None].expand_as(transitions))
            # The best state gains; what is then beyond 1, in the order of their values, is lost by the worst.
            upto = (likely.cumsum(dim=-1) + moved).clamp(max=1)
            upto[..., -1] = 1
            hopeful = torch.diff(upto, dim=-1, prepend=torch.zeros_like(moved))
            value, action = (rewards + torch.einsum("bsan,bn->bsa", hopeful, value)).max(dim=-1)
            policy.insert(0, action)
        return torch.stack(policy)


# Of what ``choose`` had to choose, on other seeds than results are quoted on; the defaults are best for 10 episodes of
# 10 steps, save epsilon: 0 is best there, the default the least above it.
GRIDS: dict[Any, tuple[Any, ...]] = {
    MDPEpsilonGreedy: (0.0, 0.02, 0.05, 0.1, 0.2, 0.3),
    OPSRL: (1, 2, 3, 5, 10, 20),
    UCRL2: (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
}
