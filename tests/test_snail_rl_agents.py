"""Agents: a step at a time and all at once are one thing, nothing looks ahead, and inputs tell of the past alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snail import AttentionBlock, Stack, TCBlock
from snail.rl import Agent, Bandits, Environment, RL2Agent, SNAILAgent, TabularMDPs, Trials, roll_out
from snail.rl.agents import GRUBlock

KINDS = (SNAILAgent, RL2Agent)


def agent(kind: type[Agent], observation_size: int = 3, actions: int = 4, steps: int = 12) -> Agent:
    torch.manual_seed(0)
    small: dict[str, int] = {"features": 8} if kind is SNAILAgent else {"units": 12}
    made: Agent = kind(observation_size, actions, steps, **small)  # type: ignore[call-arg,arg-type]
    for layer in (made.policy.blocks[-1], made.value.blocks[-1]):
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    return made.double()


# -- networks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_acting_step_by_step_equals_one_pass(kind: type[Agent]) -> None:
    made = agent(kind)
    inputs = torch.randn(5, 12, made.input_size, dtype=torch.float64)
    logits, values = made(inputs)
    state = None
    for t in range(12):
        at_t, value, state = made.act(inputs[:, t], state)
        torch.testing.assert_close(at_t.log_softmax(-1), logits[:, t].log_softmax(-1), rtol=0, atol=1e-10)
        torch.testing.assert_close(value, values[:, t], rtol=0, atol=1e-10)
    assert logits.shape == (5, 12, 4) and values.shape == (5, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_step_changes_nothing_before_it(kind: type[Agent]) -> None:
    made = agent(kind)
    inputs = torch.randn(2, 12, made.input_size, dtype=torch.float64)
    changed = inputs.clone()
    changed[:, 7] += 1
    before, after = made(inputs), made(changed)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[:, :7], other[:, :7])
        assert (
            (one[:, 7:] != other[:, 7:]).flatten(2).any(-1).all()
            if one.ndim == 3
            else (one[:, 7:] != other[:, 7:]).all()
        )


def test_snail_has_the_papers_sizes() -> None:
    made = SNAILAgent(10, 5, 100)
    for network, width, answers in ((made.policy, 32, 5), (made.value, 16, 1)):
        first, near, far, attention, last = network.blocks
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        assert isinstance(near, TCBlock) and isinstance(far, TCBlock) and isinstance(attention, AttentionBlock)
        assert first.weight.shape == (width, 10 + 5 + 2)
        assert (near.out_channels, far.out_channels) == (8 * width, 15 * width)  # 7 = ceil(log2 100) layers each
        assert near.receptive_field >= 100 and far.receptive_field >= 100
        assert (attention.key_size, attention.value_size, attention.out_channels) == (width, width, 16 * width)
        assert last.weight.shape == (answers, 16 * width)


def test_rl2_has_the_papers_sizes() -> None:
    made = RL2Agent(10, 5, 100)
    for network, units, answers in ((made.policy, 256, 5), (made.value, 128, 1)):
        first, last = network.blocks
        assert isinstance(first, GRUBlock) and isinstance(last, nn.Linear)
        assert (first.gru.input_size, first.gru.hidden_size) == (17, units)
        assert last.weight.shape == (answers, units)


@pytest.mark.parametrize("kind", KINDS)
def test_play_begins_nearly_uniform(kind: type[Agent]) -> None:
    torch.manual_seed(0)
    logits, values = kind(0, 5, 10)(torch.randn(50, 10, 7))  # type: ignore[call-arg,arg-type]
    assert (logits.softmax(-1) - 0.2).abs().max() < 0.02 and values.abs().max() < 0.05


def test_units_are_read_in_pieces_and_branched() -> None:
    torch.manual_seed(0)
    block = GRUBlock(3, 5).double()
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    whole = block(x)
    first, state = block.step(x[:, :4])
    second, _ = block.step(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=0, atol=1e-12)
    kept, branched = state.clone(), block.branch(x[:, 4:], state)
    for i in range(3):
        torch.testing.assert_close(
            branched[:, i : i + 1], block.step(x[:, 4 + i : 5 + i], state)[0], rtol=0, atol=1e-12
        )
    assert torch.equal(state, kept)


# -- trials --------------------------------------------------------------------------------------------------------


class Counting(Environment):
    """Tells the step in its observation; what it gives for an action in a step tells both."""

    def __init__(self, trials: int = 3, steps: int = 6) -> None:
        self.trials, self.steps, self.actions, self.observation_size = trials, steps, 4, 1
        self.device, self.facts = torch.device("cpu"), {"environment": "counting"}
        self.t = 0

    def reset(self) -> Tensor:
        self.t = 0
        return torch.full((self.trials, 1), 100.0)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.t += 1
        ended = torch.full((self.trials,), self.t % 3 == 0)
        return torch.full((self.trials, 1), 100.0 + self.t), 10.0 * self.t + action, ended

    def reseed(self, seed: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_of_a_step_is_made_of_the_one_before(kind: type[Agent]) -> None:
    trials = roll_out(agent(kind, 1, 4, 6), Counting())
    assert trials.inputs.shape == (3, 6, 1 + 4 + 2)
    assert torch.equal(trials.inputs[:, 0], torch.tensor([[100.0] + 6 * [0.0]], dtype=torch.float64).expand(3, -1))
    for t in range(1, 6):
        seen, taken, reward, done = trials.inputs[:, t].split([1, 4, 1, 1], dim=-1)
        assert torch.equal(seen, torch.full((3, 1), 100.0 + t, dtype=torch.float64))
        assert torch.equal(taken.argmax(-1), trials.actions[:, t - 1]) and torch.equal(taken.sum(-1), torch.ones(3))
        assert torch.equal(reward[:, 0], trials.rewards[:, t - 1])
        assert torch.equal(done[:, 0].bool(), trials.dones[:, t - 1])
    assert torch.equal(trials.rewards, 10.0 * torch.arange(1, 7) + trials.actions)
    assert trials.dones[0].tolist() == [False, False, True, False, False, True]
    assert torch.equal(trials.returns, 210.0 + trials.actions.sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_played_is_what_one_pass_says(kind: type[Agent]) -> None:
    made, environment = agent(kind, 10, 5, 20), TabularMDPs(6, 2)
    trials = roll_out(made, environment, torch.Generator().manual_seed(0))
    logits, values = made(trials.inputs)
    chosen = logits.log_softmax(-1).gather(-1, trials.actions[..., None])[..., 0]
    torch.testing.assert_close(trials.log_probabilities, chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(trials.values, values, rtol=0, atol=1e-10)
    assert not trials.inputs.requires_grad and not trials.values.requires_grad


def test_the_flag_stands_at_the_borders_of_episodes() -> None:
    trials = roll_out(agent(RL2Agent, 10, 5, 40), TabularMDPs(2, 4, horizon=10))
    assert trials.dones.nonzero()[:, 1].unique().tolist() == [9, 19, 29, 39]
    assert trials.inputs[..., -1].nonzero()[:, 1].unique().tolist() == [10, 20, 30]
    assert torch.equal(trials.inputs[:, [0, 10, 20, 30], 0], torch.ones(2, 4))  # each episode begins in state 0


def test_one_generator_plays_one_way() -> None:
    made = agent(SNAILAgent, 0, 3, 5)
    one, same, other = (
        roll_out(made, Bandits(50, 3, 5), torch.Generator().manual_seed(seed)).actions for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_actions_are_sampled_from_the_policy() -> None:
    made = agent(RL2Agent, 0, 3, 1)
    trials = roll_out(made, Bandits(4000, 3, 1), torch.Generator().manual_seed(0))
    due = made(trials.inputs[:1])[0].softmax(-1)[0, 0]
    torch.testing.assert_close(trials.actions[:, 0].bincount(minlength=3) / 4000, due.float(), rtol=0, atol=0.03)


def test_trials_are_indexed() -> None:
    trials = roll_out(agent(SNAILAgent, 0, 2, 3), Bandits(5, 2, 3))
    some = trials[torch.tensor([4, 1])]
    assert isinstance(some, Trials) and (len(trials), len(some)) == (5, 2)
    assert torch.equal(some.inputs[0], trials.inputs[4]) and torch.equal(some.rewards[1], trials.rewards[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_runs_on_any_device_and_in_another_dtype(kind: type[Agent], device: str) -> None:
    made = kind(0, 3, 8).to(device, torch.bfloat16)  # type: ignore[call-arg,arg-type]
    observation = torch.zeros(2, 0, device=device)
    logits, value, state = made.act(made.input_of(observation))
    last = torch.zeros(2, dtype=torch.int64, device=device), torch.ones(2, device=device), torch.ones(2, device=device)
    logits, value, _ = made.act(made.input_of(observation, last), state)
    assert (logits.device.type, logits.dtype, value.dtype) == (device, torch.bfloat16, torch.bfloat16)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SNAILAgent(-1, 5, 10), "observation_size is -1; it must be at least 0"),
        (lambda: SNAILAgent(0, 0, 10), "actions is 0; it must be at least 1"),
        (lambda: SNAILAgent(0, 5, 0), "steps is 0; it must be at least 1"),
        (lambda: SNAILAgent(0, 5, 10, features=1), "features is 1; it must be at least 2"),
        (lambda: RL2Agent(0, 5, units=1), "units is 1; it must be at least 2"),
        (lambda: GRUBlock(3, 0), "in_channels is 3 and units is 0; both must be at least 1"),
        (
            lambda: Agent(Stack(nn.Linear(7, 5)), Stack(nn.Linear(7, 2)), 0),
            "observation_size is 0 and the value function answers with 2 numbers; there must be at least 0 and exactly "
            "1",
        ),
        (
            lambda: roll_out(RL2Agent(0, 4), Bandits(2, 5, 10)),
            "RL2Agent was made for observations of 0 numbers and 4 actions, but Bandits has 0 and 5; make the agent "
            "with the latter",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == sentence
