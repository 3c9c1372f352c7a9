"""Agents that learn within a trial: SNAIL and RL² behind one interface, and trials played with them.

A trial is T steps in one task, of one episode (a bandit) or several (an MDP); the agent's state is kept across the
episodes of a trial. The input at step t tells what the agent saw, and what its last step led to:

    o_t (o)  |  one-hot a_{t-1} (A)  |  r_{t-1} (1)  |  1 if an episode ended with step t-1, else 0 (1)

so that nothing of step t itself is in it; all but o_t is zero at the first step (Mishra et al., 2018, section 5.2).

Axes: ``b`` trial, ``t`` step, ``c`` channels of an input (``o + A + 2``), ``A`` actions, ``o`` numbers of an
observation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import AttentionBlock, Block, Stack, TCBlock
from .environments import Environment

__all__ = ["Agent", "GRUBlock", "RL2Agent", "SNAILAgent", "Trials", "roll_out"]

STEPS_AT_ONCE = 2**15  # read in one pass where nothing must be kept; bounds the memory of attention over long trials


class GRUBlock(Block):
    """A layer of gated recurrent units as a block; the answer is the units alone, not behind the input.

    Args:
        in_channels: Channels of each step.
        units: Channels of the answer.

    Shape:
        ``(b, t, in_channels) -> (b, t, units)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, in_channels: int, units: int) -> None:
        super().__init__()
        if in_channels < 1 or units < 1:
            raise ValueError(f"in_channels is {in_channels} and units is {units}; both must be at least 1")
        self.out_channels = units
        self.gru = nn.GRU(in_channels, units, batch_first=True)

    def step(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See ``Block.step``; the state is that of the units, ``(1, b, units)``."""
        y, state = self.gru(x, state)
        return y, state

    def branch(self, x: Tensor, state: Tensor) -> Tensor:
        """See ``Block.branch``."""
        b, q = x.shape[:2]
        y, _ = self.gru(x.flatten(0, 1).unsqueeze(1), state.repeat_interleave(q, dim=1))
        answer: Tensor = y[:, 0].unflatten(0, (b, q))
        return answer


class Agent(nn.Module):
    """A policy and a value function, two networks of the same inputs that share nothing.

    Args:
        policy: From inputs to the logits of the actions, ``(b, t, c) -> (b, t, A)``.
        value: From inputs to the return that is to come, ``(b, t, c) -> (b, t, 1)``.
        observation_size: Numbers of an observation, 0 where there is none.

    Shape:
        ``(b, t, c) -> (b, t, A), (b, t)``, any ``t >= 1``.

    Raises:
        ValueError: If ``observation_size`` is negative or ``value`` does not answer with one number.
    """

    def __init__(self, policy: Stack, value: Stack, observation_size: int) -> None:
        super().__init__()
        if observation_size < 0 or value.out_channels != 1:
            raise ValueError(
                f"observation_size is {observation_size} and the value function answers with {value.out_channels} "
                f"numbers; there must be at least 0 and exactly 1"
            )
        self.policy = policy
        self.value = value
        self.observation_size = observation_size
        self.actions = policy.out_channels

    @property
    def input_size(self) -> int:
        """Channels of an input, ``o + A + 2``."""
        return self.observation_size + self.actions + 2

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(b, t, A)`` and values ``(b, t)`` of whole trials ``(b, t, c)`` in one pass."""
        values: Tensor = self.value(inputs)
        return self.policy(inputs), values.squeeze(-1)

    def act(self, input: Tensor, state: Any = None) -> tuple[Tensor, Tensor, Any]:
        """Read one step on.

        Args:
            input: ``(b, c)``, from ``input_of``.
            state: What this gave at the step before; ``None`` at a trial's first step.

        Returns:
            Logits ``(b, A)``, values ``(b,)`` and the state behind this step.
        """
        policy_state, value_state = (None, None) if state is None else state
        logits, policy_state = self.policy.step(input.unsqueeze(1), policy_state)
        values, value_state = self.value.step(input.unsqueeze(1), value_state)
        return logits[:, 0], values[:, 0, 0], (policy_state, value_state)

    def input_of(self, observation: Tensor, last: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """The input ``(b, c)`` at a step.

        Args:
            observation: ``(b, o)``, what is seen at this step.
            last: Action ``(b,)``, reward ``(b,)`` and end of an episode ``(b,)`` of the step before; ``None`` at the
                first.
        """
        parameter = next(self.parameters())
        observation = observation.to(parameter)
        if last is None:
            return F.pad(observation, (0, self.actions + 2))
        action, reward, done = (x.to(parameter.device) for x in last)
        taken = F.one_hot(action, self.actions).to(parameter)
        return torch.cat([observation, taken, torch.stack([reward.to(parameter), done.to(parameter)], dim=-1)], dim=-1)


class SNAILAgent(Agent):
    """SNAIL with the sizes of the paper's bandits and tabular MDPs, the value function half as wide as the policy.

        linear D ─► TCBlock(T, D) ─► TCBlock(T, D) ─► AttentionBlock(D, D) ─► linear      D = features, features // 2

    The last layers begin at a hundredth of their usual size, so that play begins nearly uniform; the paper does not
    say how its own begin.

    Args:
        observation_size: Numbers of an observation.
        actions: Number of actions A.
        steps: Steps of a trial T, all of which are in view.
        features: D of the policy; 32 in the paper.

    Shape:
        ``(b, t, o + A + 2) -> (b, t, A), (b, t)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is too small.
    """

    def __init__(self, observation_size: int, actions: int, steps: int, *, features: int = 32) -> None:
        _require(observation_size, actions, steps=steps, features=features, least={"features": 2})

        def network(width: int, answers: int) -> Stack:
            first = nn.Linear(observation_size + actions + 2, width)
            near = TCBlock(width, steps, width)
            far = TCBlock(near.out_channels, steps, width)
            attention = AttentionBlock(far.out_channels, width, width)
            return Stack(first, near, far, attention, _small(nn.Linear(attention.out_channels, answers)))

        super().__init__(network(features, actions), network(features // 2, 1), observation_size)


class RL2Agent(Agent):
    """RL² (Duan et al., 2016): gated recurrent units whose state is kept across the episodes of a trial.

    The last layers begin small, as those of ``SNAILAgent``.

    Args:
        observation_size: Numbers of an observation.
        actions: Number of actions A.
        steps: Not used; taken so that agents are made alike.
        units: Units of the policy; 256 in the paper. The value function has half as many.

    Shape:
        ``(b, t, o + A + 2) -> (b, t, A), (b, t)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is too small.
    """

    def __init__(self, observation_size: int, actions: int, steps: int = 1, *, units: int = 256) -> None:
        _require(observation_size, actions, steps=steps, units=units, least={"units": 2})

        def network(width: int, answers: int) -> Stack:
            return Stack(GRUBlock(observation_size + actions + 2, width), _small(nn.Linear(width, answers)))

        super().__init__(network(units, actions), network(units // 2, 1), observation_size)


@dataclass(frozen=True)
class Trials:
    """Trials as they were played.

    Attributes:
        inputs: What the agent read, ``(b, T, c)``.
        actions: What it did, ``(b, T)``, integers.
        rewards: What that gave, ``(b, T)``.
        dones: Whether an episode ended with the step, ``(b, T)``, Boolean.
        log_probabilities: Of the actions when they were taken, ``(b, T)``.
        values: What the value function said, ``(b, T)``.
    """

    inputs: Tensor
    actions: Tensor
    rewards: Tensor
    dones: Tensor
    log_probabilities: Tensor
    values: Tensor

    def __len__(self) -> int:
        """Number of trials b."""
        return len(self.actions)

    def __getitem__(self, which: Tensor | slice) -> Trials:
        """Some of the trials, by index or by slice."""
        return Trials(*(getattr(self, field.name)[which] for field in fields(self)))

    @property
    def returns(self) -> Tensor:
        """The sum of the rewards of each trial, not discounted, ``(b,)``."""
        return self.rewards.sum(1)


@torch.no_grad()
def roll_out(agent: Agent, environment: Environment, generator: torch.Generator | None = None) -> Trials:
    """Play new trials, each action sampled from the policy, step by step with a state.

    The values, on which no action depends, are read off afterwards in whole trials.

    Args:
        agent: Plays, where its parameters are.
        environment: Begins new trials, ``environment.trials`` of them.
        generator: Samples the actions; on the agent's device. The default is torch's own.

    Raises:
        ValueError: If the agent was made for other observations or actions than the environment's.
    """
    _check_fits(agent, environment)
    parameter, b, steps = next(agent.parameters()), environment.trials, environment.steps
    inputs = parameter.new_empty(b, steps, agent.input_size)
    rewards, log_probabilities = parameter.new_empty(b, steps), parameter.new_empty(b, steps)
    actions = torch.empty(b, steps, dtype=torch.int64, device=parameter.device)
    dones = torch.empty(b, steps, dtype=torch.bool, device=parameter.device)
    observation, last, state = environment.reset(), None, None
    for t in range(steps):
        inputs[:, t] = agent.input_of(observation, last)
        logits, state = agent.policy.step(inputs[:, t : t + 1], state)
        of_actions = logits[:, 0].log_softmax(-1)
        action = torch.multinomial(of_actions.exp(), 1, generator=generator)
        actions[:, t], log_probabilities[:, t] = action[:, 0], of_actions.gather(-1, action)[:, 0]
        observation, reward, done = environment.step(action[:, 0].to(observation.device))
        rewards[:, t], dones[:, t], last = reward, done, (action[:, 0], reward, done)
    values = torch.cat([agent.value(some) for some in torch.split(inputs, max(1, STEPS_AT_ONCE // steps))]).squeeze(-1)
    return Trials(inputs, actions, rewards, dones, log_probabilities, values)


def _check_fits(agent: Agent, environment: Environment) -> None:
    ours, theirs = (agent.observation_size, agent.actions), (environment.observation_size, environment.actions)
    if ours != theirs:
        raise ValueError(
            f"{type(agent).__name__} was made for observations of {ours[0]} numbers and {ours[1]} actions, but "
            f"{type(environment).__name__} has {theirs[0]} and {theirs[1]}; make the agent with the latter"
        )


def _require(observation_size: int, actions: int, *, least: dict[str, int], **sizes: int) -> None:
    least = {"observation_size": 0, "actions": 1, **least}
    for name, size in {"observation_size": observation_size, "actions": actions, **sizes}.items():
        if size < least.get(name, 1):
            raise ValueError(f"{name} is {size}; it must be at least {least.get(name, 1)}")


def _small(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.mul_(0.01)
        layer.bias.zero_()
    return layer
