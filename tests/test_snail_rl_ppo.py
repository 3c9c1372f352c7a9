"""PPO: its formulas by hand, that it learns, and that a run goes on to the bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from snail.rl import PPO, Agent, Bandits, Environment, RL2Agent, SNAILAgent, TabularMDPs, Trials, ppo, roll_out
from snail.rl.ppo import advantages_of, ppo_loss
from snail.rl.scoring import score
from snail.rl.strategies import Random, play

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*weights_only. was not set"),
]

ADAM = partial(torch.optim.Adam, lr=0.01)
SMALL = partial(SNAILAgent, features=4)


def trainer(**changed: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1}
    return Trainer(**(quiet | changed))


# -- advantages ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """gamma 1/2, lambda 1/2; surprises 1 + 2/2 - 1 = 1, 0 + 4/2 - 2 = 0, 3 - 4 = -1."""
    rewards, values = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    found = advantages_of(rewards, values, gamma=0.5, lambda_=0.5)
    assert found.tolist() == [[1 + 0 / 4 - 1 / 16, 0 - 1 / 4, -1]]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
def test_advantages_equal_the_sum(gamma: float, lambda_: float) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 4, 9, dtype=torch.float64)
    found = advantages_of(rewards, values, gamma=gamma, lambda_=lambda_)
    after = torch.cat([values[:, 1:], torch.zeros(4, 1)], dim=1)
    surprise = rewards + gamma * after - values
    for t in range(9):
        due = sum((gamma * lambda_) ** k * surprise[:, t + k] for k in range(9 - t))
        torch.testing.assert_close(found[:, t], due, rtol=0, atol=1e-12)
    if lambda_ == 1:
        for t in range(9):
            rest = sum(gamma**k * rewards[:, t + k] for k in range(9 - t))
            torch.testing.assert_close(found[:, t], rest - values[:, t], rtol=0, atol=1e-12)


def test_what_an_episode_leads_to_in_the_next_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial is one thing to learn from: nothing is cut where an episode ends."""
    given: list[tuple[Tensor, Tensor, Tensor]] = []

    def watched(agent: Agent, trials: Trials, advantages: Tensor, targets: Tensor, **how: float) -> Any:
        given.append((trials.rewards, trials.values, targets))
        assert trials.dones[:, 9].all()
        return ppo_loss(agent, trials, advantages, targets, **how)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    trainer().fit(PPO(SMALL, TabularMDPs(4, 2), ADAM, iterations=1, epochs=1, minibatches=1, gamma=1.0, lambda_=1.0))
    ((rewards, _, targets),) = given
    torch.testing.assert_close(targets, rewards.flip(1).cumsum(1).flip(1))


# -- the loss ------------------------------------------------------------------------------------------------------


class Said(Agent):
    """Answers what it is told to."""

    def __init__(self, probabilities: Tensor, values: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.answer = probabilities.log(), values

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer


def test_the_loss_by_hand() -> None:
    """Ratios 2, 2, 1/2, 1/2 with advantages 1, -1, 1, -1 and a clip of 0.2 count as 1.2, -2, 0.5, -0.8."""
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.2, 0.8], [0.2, 0.8]], dtype=torch.float64)[None]
    before = torch.tensor([[0.4, 0.4, 0.4, 0.4]], dtype=torch.float64)
    actions, advantages = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[1.0, -1, 1, -1]]).double()
    values, targets = torch.tensor([[1.0, 1, 1, 1]]).double(), torch.tensor([[1.0, 2, 3, 0]]).double()
    trials = Trials(torch.zeros(1, 4, 1), actions, values, actions.bool(), before.log(), values)
    loss, logs = ppo_loss(
        Said(probabilities, values), trials, advantages, targets, clip=0.2, entropy=0.1, value_coefficient=0.5
    )
    entropy = -(0.8 * torch.tensor(0.8).double().log() + 0.2 * torch.tensor(0.2).double().log())
    due = {"policy_loss": -(1.2 - 2 + 0.5 - 0.8) / 4, "value_loss": 0.5 * (0 + 1 + 4 + 1) / 4, "clipped": 1.0}
    for name, value in due.items():
        assert float(logs[name]) == pytest.approx(value, abs=1e-7), name
    assert float(logs["entropy"]) == pytest.approx(float(entropy), abs=1e-7)
    assert float(logs["kl"]) == pytest.approx(((2 + 2 + 0.5 + 0.5) / 4 - 1) - 0.0, abs=1e-7)  # logs of ratios cancel
    assert float(loss) == pytest.approx(due["policy_loss"] + 0.5 * due["value_loss"] - 0.1 * float(entropy), abs=1e-7)


def test_at_first_every_ratio_is_one() -> None:
    torch.manual_seed(0)
    agent = SNAILAgent(0, 3, 6, features=4).double()
    trials = roll_out(agent, Bandits(7, 3, 6))
    advantages = torch.randn(7, 6, dtype=torch.float64)
    loss, logs = ppo_loss(agent, trials, advantages, trials.values, clip=1e-9, entropy=0.0, value_coefficient=0.0)
    assert float(logs["kl"]) == pytest.approx(0, abs=1e-12) and float(logs["clipped"]) == 0
    assert float(loss.detach()) == pytest.approx(-float(advantages.mean()), abs=1e-9)
    plain = (agent(trials.inputs)[0].log_softmax(-1).gather(-1, trials.actions[..., None])[..., 0] * advantages).mean()
    found, due = (torch.autograd.grad(x, list(agent.policy.parameters())) for x in (loss, -plain))
    for one, other in zip(found, due, strict=True):  # then its gradient is that of the policy-gradient theorem
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


# -- training ------------------------------------------------------------------------------------------------------


class FixedArm(Environment):
    """Two arms: the second pays 1 always, the first never."""

    def __init__(self, trials: int = 32) -> None:
        self.trials, self.steps, self.actions, self.observation_size = trials, 3, 2, 0
        self.device, self.facts = torch.device("cpu"), {"environment": "fixed", "seed": 0}

    def reset(self) -> Tensor:
        return torch.zeros(self.trials, 0)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.reset(), action.float(), torch.zeros(self.trials, dtype=torch.bool)

    def reseed(self, seed: int) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@pytest.mark.parametrize("kind", [SMALL, partial(RL2Agent, units=8)], ids=["SNAIL", "RL2"])
def test_an_arm_that_always_pays_is_found(kind: Any) -> None:
    torch.manual_seed(0)
    module = PPO(kind, FixedArm(), ADAM, iterations=12, minibatches=2, schedule="constant")
    trainer().fit(module)
    assert float(roll_out(module.agent, FixedArm(200)).returns.mean()) > 2.9


def test_what_pays_in_this_trial_is_learned_within_it() -> None:
    """Two arms, three pulls: 3/2 without memory, 5/3 with the best play, which leaves what did not pay."""
    torch.manual_seed(0)
    module = PPO(partial(SNAILAgent, features=8), Bandits(300, 2, 3), ADAM, iterations=20, test_trials=5000)
    run = trainer()
    run.fit(module)
    run.test(module, verbose=False)
    assert len(module.returns) == 5000 and float(module.returns.mean()) > 1.61
    assert module.optimal is not None and float(module.optimal.mean()) == pytest.approx(2, abs=0.05)


def test_an_iteration_is_a_step_of_the_trainer_and_goes_through_all_trials_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Trials] = []

    def watched(agent: Agent, trials: Trials, *given: Tensor, **how: float) -> Any:
        seen.append(trials)
        return ppo_loss(agent, trials, *given, **how)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    run, module = trainer(), PPO(SMALL, Bandits(10, 2, 3), ADAM, iterations=2, epochs=3, minibatches=4)
    run.fit(module)
    assert run.global_step == 2 and len(seen) == 2 * 3 * 4
    assert [len(trials) for trials in seen[:4]] == [3, 3, 3, 1]
    for first in range(0, 12, 4):
        together = torch.cat([trials.inputs for trials in seen[first : first + 4]])
        assert together.shape == (10, 3, 4)
        assert float(together.sum()) == pytest.approx(float(torch.cat([t.inputs for t in seen[:4]]).sum()))
    assert set(run.callback_metrics) == {
        f"train/{name}" for name in
        ("return", "loss", "policy_loss", "value_loss", "entropy", "clipped", "kl",
         "policy_gradient_norm", "value_gradient_norm")
    }  # fmt: skip


@pytest.mark.parametrize("standardise", [True, False])
def test_advantages_are_standardised_over_the_iteration(standardise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(agent: Agent, trials: Trials, advantages: Tensor, *given: Tensor, **how: float) -> Any:
        seen.append(advantages)
        return ppo_loss(agent, trials, advantages, *given, **how)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    trainer().fit(PPO(SMALL, Bandits(40, 2, 3), ADAM, iterations=1, epochs=1, standardise=standardise))
    every = torch.cat(seen)
    standard = abs(float(every.mean())) < 1e-6 and abs(float(every.std(correction=0)) - 1) < 1e-4
    assert standard is standardise


def test_the_rate_falls_in_a_line() -> None:
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer(callbacks=[Watch()]).fit(PPO(SMALL, Bandits(4, 2, 3), ADAM, iterations=4))
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    rates.clear()
    trainer(callbacks=[Watch()]).fit(PPO(SMALL, Bandits(4, 2, 3), ADAM, "constant", iterations=2))
    assert rates == [0.01, 0.01]


def test_long_gradients_of_policy_and_value_function_are_scaled_each_by_itself() -> None:
    for longest in (1e-3, 1e-6):
        torch.manual_seed(0)
        module = PPO(SMALL, Bandits(8, 2, 3), partial(torch.optim.SGD, lr=1.0), iterations=1, epochs=1, minibatches=1,
                     max_norm=longest)  # fmt: skip
        networks = (module.agent.policy, module.agent.value)
        before = [torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone() for network in networks]
        trainer().fit(module)
        after = [torch.nn.utils.parameters_to_vector(network.parameters()).detach() for network in networks]
        moved = [float((now - then).norm()) for now, then in zip(after, before, strict=True)]
        assert moved == pytest.approx([longest, longest], rel=0.1)


def test_the_weight_of_the_entropy_falls_with_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    weights: list[float] = []

    def watched(*given: Any, entropy: float, **how: float) -> Any:
        weights.append(entropy)
        return ppo_loss(*given, entropy=entropy, **how)

    monkeypatch.setattr(ppo, "ppo_loss", watched)
    for schedule in ("linear", "constant"):
        options = {"iterations": 4, "epochs": 1, "minibatches": 1, "entropy": 0.2}
        trainer().fit(PPO(SMALL, Bandits(4, 2, 3), ADAM, schedule, **options))  # type: ignore[arg-type]
    assert weights == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.2, 0.2, 0.2, 0.2])


class Stop(Callback):
    """Saves and ends a run after some iterations, as a kill does that a checkpoint was due before."""

    def __init__(self, iteration: int, path: Path) -> None:
        self.iteration, self.path = iteration, path

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.iteration:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


@pytest.mark.parametrize("environment", [lambda: Bandits(12, 3, 5), lambda: TabularMDPs(6, 2)], ids=["bandit", "mdp"])
def test_a_run_goes_on_to_the_bit(environment: Any, tmp_path: Path) -> None:
    def module() -> PPO:
        return PPO(SMALL, environment(), ADAM, iterations=5, minibatches=3, epochs=2)

    torch.manual_seed(0)
    whole = module()
    trainer().fit(whole)
    torch.manual_seed(0)
    with pytest.raises(InterruptedError):
        trainer(callbacks=[Stop(2, tmp_path / "two.ckpt")]).fit(module())
    torch.manual_seed(99)
    resumed, run = module(), trainer()
    run.fit(resumed, ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    assert run.global_step == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_run_with_a_seed_is_repeated_to_the_bit() -> None:
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        module = PPO(SMALL, Bandits(12, 3, 5), ADAM, iterations=2)
        trainer().fit(module)
        runs.append(torch.nn.utils.parameters_to_vector(module.agent.parameters()))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_test_plays_its_own_trials() -> None:
    returns = []
    for training_seed in (0, 5):
        torch.manual_seed(0)
        module = PPO(SMALL, Bandits(4, 2, 3, seed=training_seed), ADAM, test_trials=10)
        trainer().test(module, verbose=False)
        returns.append(module.returns)
        assert module.environment.facts["seed"] == 1_000_000
    assert len(returns[0]) == 10 and torch.equal(returns[0], returns[1])


def test_an_agent_is_tested_on_the_trials_that_strategies_are_scored_on(monkeypatch: pytest.MonkeyPatch) -> None:
    class First(Random):
        """Always the first arm."""

        def act(self, observation: Tensor) -> Tensor:
            return torch.zeros(self.environment.trials, dtype=torch.int64)

    def always_first(agent: Agent, environment: Any) -> Any:
        return SimpleNamespace(returns=play(environment, First()).sum(dim=1))

    monkeypatch.setattr(ppo, "roll_out", always_first)
    module = PPO(SMALL, Bandits(4, 2, 3, seed=5), ADAM, test_trials=10)
    trainer().test(module, verbose=False)
    returns, optimal = score(Bandits(4, 2, 3), First(), trials=10, seed=1_000_000)
    assert torch.equal(module.returns, returns) and len(returns) == 10
    assert module.optimal is not None and optimal is not None and torch.equal(module.optimal, optimal)
    assert torch.equal(copy.deepcopy(module).returns, returns)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"test_trials": 0}, "test_trials is 0; it must be at least 1"),
        ({"gamma": 1.1}, "gamma is 1.1; it must be from 0 to 1"),
        ({"lambda_": -0.1}, "lambda_ is -0.1; it must be from 0 to 1"),
        ({"clip": 0.0}, "clip is 0.0; it must be above 0"),
        ({"max_norm": 0.0}, "max_norm is 0.0; it must be above 0"),
        ({"entropy": -1.0}, "entropy is -1.0; it must be at least 0"),
        (
            {"minibatches": 5},
            "4 trials cannot be cut into 5 minibatches of whole trials; play more trials or cut fewer",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        PPO(SMALL, Bandits(4, 2, 3), ADAM, **changed)
    assert str(error.value) == sentence


def test_training_on_the_tests_trials_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training and test have one seed, 7, and so the same trials; change one"):
        trainer().fit(PPO(SMALL, Bandits(4, 2, 3, seed=7), ADAM, test_seed=7))


def test_a_loss_that_is_not_a_number_ends_the_run() -> None:
    module = PPO(SMALL, Bandits(4, 2, 3), ADAM, iterations=2)
    with torch.no_grad():
        module.agent.value.blocks[-1].bias.fill_(torch.inf)  # type: ignore[union-attr,operator]
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at iteration 1; lower the learning"):
        trainer().fit(module)
