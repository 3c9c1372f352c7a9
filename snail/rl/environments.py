"""Environments of the paper's section 5.2 as batches of tensors: Bernoulli bandits and tabular MDPs.

A trial is what a meta-learner has with one task: ``steps`` steps, in one or several episodes. Axes, in this file and in
every shape below:
    b  trial, side by side    s  state, S of them    a  action or arm, A of them    o  observation

Nothing is carried from one draw to the next: the tasks are a function of the seed and the number of resets, and the
chance in rewards and transitions is a function of these and the step. Players with one seed therefore meet the same
tasks and the same luck, on any device and after any restart, and a larger batch begins with the trials of a smaller.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bandits", "Environment", "TabularMDPs", "value_iteration"]


class Environment(ABC):
    """``trials`` trials side by side, all of them ``steps`` steps long.

    Attributes:
        trials: How many, b.
        actions: Actions A in every step.
        observation_size: Channels o of an observation; 0 where there is nothing to see.
        steps: Steps T of a trial.
        device: Where all tensors are.
        facts: What identifies the trials in a result, as JSON can hold it.
    """

    trials: int
    actions: int
    observation_size: int
    steps: int
    device: torch.device
    facts: dict[str, Any]

    @abstractmethod
    def reset(self) -> Tensor:
        """Begin new trials with newly drawn tasks; the first observation ``(b, o)``, float32."""

    @abstractmethod
    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Act; ``action`` is ``(b,)``, int64.

        Returns:
            The next observation ``(b, o)``, float32; the reward ``(b,)``, float32; and whether an episode has ended
            ``(b,)``, bool, in which case the observation is the first of the next episode. The trial itself ends,
            unannounced, after ``steps`` steps.

        Raises:
            RuntimeError: If no trial is under way.
            ValueError: If the actions are not ``trials`` int64 numbers below ``actions``; the last is not looked at on
                an accelerator, where it would cost a wait.
        """

    @abstractmethod
    def reseed(self, seed: int) -> None:
        """Begin again as an environment made with this seed; ``reset`` comes next.

        Raises:
            ValueError: If the seed is negative.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Where the trials stand, as integers and tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state_dict`` of an environment of the same settings stood.

        Raises:
            ValueError: If the state is one of other settings.
        """


class _Drawn(Environment):
    """An environment whose tasks and luck are drawn here, from its facts, the resets so far and the step."""

    def __init__(self, trials: int, steps: int, seed: int, device: torch.device | str, facts: dict[str, Any]) -> None:
        sizes = {"trials": trials} | {what: size for what, size in facts.items() if isinstance(size, int)}
        for what, size in sizes.items():
            if size < 1:
                raise ValueError(f"{what} is {size}; it must be at least 1")
        self.trials, self.steps, self.device = trials, steps, torch.device(device)
        self.facts = dict(facts)
        self.reseed(seed)

    def reseed(self, seed: int) -> None:
        """See ``Environment.reseed``."""
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        self.facts["seed"] = seed
        self._resets, self._step = 0, self.steps  # as if a trial had just ended

    def _draws(self, what: str) -> np.random.Generator:
        """The generator of what happens now."""
        return np.random.Generator(np.random.Philox(key=key(f"{self.facts}|{self._resets}|{what}")))

    def _tensor(self, numbers: Any) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)

    @abstractmethod
    def _draw_tasks(self) -> None:
        """Draw the tasks of the trials that begin."""

    def _begin(self) -> None:
        self._resets, self._step = self._resets + 1, 0
        self._draw_tasks()

    def _count(self, action: Tensor) -> None:
        """One more step; refuses what cannot be one."""
        if self._step == self.steps:
            state = f"the trials ended after {self.steps} steps" if self._resets else "no trial has begun"
            raise RuntimeError(f"{state}; call reset")
        check_action(action, self)
        self._step += 1

    def state_dict(self) -> dict[str, Any]:
        """See ``Environment.state_dict``."""
        return {"trials": self.trials, "facts": dict(self.facts), "resets": self._resets, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Environment.load_state_dict``."""
        saved, own = (state["trials"], state["facts"]), (self.trials, self.facts)
        if saved != own:
            raise ValueError(f"the state is of {saved[0]} trials of {saved[1]}, these are {own[0]} of {own[1]}")
        self._resets, self._step = state["resets"], state["step"]
        if self._resets:
            self._draw_tasks()


class Bandits(_Drawn):
    """Bernoulli bandits: each arm pays 1 with a probability of its own, uniform in [0, 1], and else 0.

    There is nothing to observe and no episode ends. In each step every arm has its luck drawn, whichever is pulled, so
    that two players who pull the same arm in the same step are paid the same.

    Args:
        trials: Trials b side by side.
        arms: Arms A.
        steps: Pulls T in a trial.
        seed: Any integer from 0.
        device: Where the tensors are.

    Attributes:
        means: The probabilities ``(b, A)`` of the trials under way, unknown to a player.

    Raises:
        ValueError: If a size is not positive, or the seed negative.
    """

    means: Tensor

    def __init__(
        self, trials: int, arms: int, steps: int, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(trials, steps, seed, device, {"environment": "bandits", "arms": arms, "steps": steps})
        self.actions, self.observation_size = arms, 0

    def _draw_tasks(self) -> None:
        self.means = self._tensor(self._draws("means").random((self.trials, self.actions), dtype=np.float32))

    @property
    def optimal(self) -> Tensor:
        """What one who knows the probabilities expects of a whole trial, ``(b,)``."""
        return self.means.amax(dim=1) * self.steps

    def reset(self) -> Tensor:
        """See ``Environment.reset``."""
        self._begin()
        return torch.zeros(self.trials, 0, device=self.device)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Environment.step``."""
        self._count(action)
        luck = self._draws(f"step {self._step}").random((self.trials, self.actions), dtype=np.float32)
        paid = (self._tensor(luck) < self.means).float()
        nothing = torch.zeros(self.trials, 0, device=self.device)
        done = torch.zeros(self.trials, dtype=torch.bool, device=self.device)
        return nothing, paid.gather(1, action[:, None])[:, 0], done


class TabularMDPs(_Drawn):
    """Random Markov decision processes with few states.

    The reward for action a in state s is Normal(mean, 1), its mean drawn from Normal(1, 1); the next state's
    distribution is drawn from a flat Dirichlet. All episodes of a trial are played in one such process, each from state
    0 on. In each step a trial has one number that decides about the reward and one that decides about the next state,
    whatever the state and the action are.

    Args:
        trials: Trials b side by side.
        episodes: Episodes in a trial.
        horizon: Steps in an episode; a trial has ``steps = episodes * horizon``.
        states: States S; the observation is the one-hot state.
        actions: Actions A.
        seed: Any integer from 0.
        device: Where the tensors are.

    Attributes:
        rewards: Mean rewards ``(b, S, A)`` of the trials under way, unknown to a player.
        transitions: Probabilities ``(b, S, A, S)`` of the next state, likewise.
        state: The state ``(b,)`` of each trial, int64.

    Raises:
        ValueError: If a size is not positive, or the seed negative.
    """

    rewards: Tensor
    transitions: Tensor
    state: Tensor

    def __init__(
        self,
        trials: int,
        episodes: int,
        *,
        horizon: int = 10,
        states: int = 10,
        actions: int = 5,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        facts = {"environment": "tabular-mdps", "episodes": episodes, "horizon": horizon}
        facts |= {"states": states, "actions": actions}
        super().__init__(trials, episodes * horizon, seed, device, facts)
        self.episodes, self.horizon, self.states = episodes, horizon, states
        self.actions, self.observation_size = actions, states

    def _draw_tasks(self) -> None:
        b, s, a = self.trials, self.states, self.actions
        self.rewards = 1 + self._tensor(self._draws("rewards").standard_normal((b, s, a), dtype=np.float32))
        # Exponential variables divided by their sum are a draw from a flat Dirichlet.
        weights = self._tensor(self._draws("transitions").standard_exponential((b, s, a, s), dtype=np.float32))
        self.transitions = weights / weights.sum(dim=-1, keepdim=True)

    @property
    def optimal(self) -> Tensor:
        """What one who knows the process expects of a whole trial, ``(b,)``; the measure that scores are shares of."""
        values, _ = value_iteration(self.transitions, self.rewards, self.horizon)
        return values[0, :, 0] * self.episodes

    def reset(self) -> Tensor:
        """See ``Environment.reset``."""
        self._begin()
        self.state = torch.zeros(self.trials, dtype=torch.int64, device=self.device)
        return self._seen()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Environment.step``."""
        self._count(action)
        noise = self._tensor(self._draws(f"reward {self._step}").standard_normal(self.trials, dtype=np.float32))
        luck = self._tensor(self._draws(f"next {self._step}").random(self.trials, dtype=np.float32))
        trial = torch.arange(self.trials, device=self.device)
        here = (trial * self.states + self.state) * self.actions + action  # of all trials, states and actions in a row
        reward = self.rewards.flatten()[here] + noise
        passed = luck[:, None] >= self.transitions.flatten(0, 2)[here].cumsum(dim=1)
        ended = self._step % self.horizon == 0
        # The sum of the probabilities may be a rounding below 1, and luck above it.
        self.state = passed.sum(dim=1).clamp(max=self.states - 1) * (not ended)
        return self._seen(), reward, torch.full((self.trials,), ended, device=self.device)

    def _seen(self) -> Tensor:
        return torch.nn.functional.one_hot(self.state, self.states).float()

    def state_dict(self) -> dict[str, Any]:
        """See ``Environment.state_dict``."""
        return super().state_dict() | ({"state": self.state.cpu()} if self._resets else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Environment.load_state_dict``."""
        super().load_state_dict(state)
        if self._resets:
            self.state = state["state"].to(self.device)


def value_iteration(transitions: Tensor, rewards: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """The best that can be done in ``horizon`` steps of known processes, exactly.

    Args:
        transitions: Probabilities ``(b, S, A, S)`` of the next state.
        rewards: Mean rewards ``(b, S, A)``.
        horizon: Steps of an episode.

    Returns:
        Values ``(horizon + 1, b, S)``, where entry h is expected from step h on, counted from 0, and the last is 0; and
        the best action ``(horizon, b, S)``, int64, in each step and state.

    Raises:
        ValueError: If ``horizon`` is not positive.
    """
    if horizon < 1:
        raise ValueError(f"horizon is {horizon}; it must be at least 1")
    values = [torch.zeros_like(rewards[..., 0])]
    policy: list[Tensor] = []
    for _ in range(horizon):
        value, action = (rewards + torch.einsum("bsan,bn->bsa", transitions, values[0])).max(dim=-1)
        values.insert(0, value)
        policy.insert(0, action)
    return torch.stack(values), torch.stack(policy)


def key(identity: str) -> int:
    """The key of the random generator, or a seed, for whatever has this identity."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:16], "little")


def check_action(action: Tensor, environment: Environment) -> None:
    """Refuse what ``Environment.step`` says it does."""
    trials, actions = environment.trials, environment.actions
    if action.shape != (trials,) or action.dtype != torch.int64:
        raise ValueError(f"actions are {tuple(action.shape)} {action.dtype}; give ({trials},) torch.int64")
    if action.device.type == "cpu" and not 0 <= int(action.min()) <= int(action.max()) < actions:
        raise ValueError(f"actions run from {int(action.min())} to {int(action.max())}; there are {actions}, from 0")
