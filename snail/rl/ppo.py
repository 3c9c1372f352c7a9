"""Proximal policy optimisation of agents that learn within a trial, as a Lightning module.

Schulman et al., 2017, in the place of the paper's TRPO, which it approximates with first-order steps: the loss of a
step is ``-min(r A, clip(r, 1 - e, 1 + e) A)``, r the ratio of the action's probability to what it was when it was
taken. Advantages A are generalised advantage estimates (Schulman et al., 2016).

What is one episode to ordinary PPO is one *trial* here, as in RL² (Duan et al., 2016): the agent is to explore in one
episode for the sake of the next, so that returns and advantages run on over the ends of episodes, and a minibatch
consists of whole trials. After its last step a trial has nothing more to give; its length is known, so that this is an
end and not a cut.

Axes: ``b`` trial, ``t`` step of T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from ..module import generator_states, set_generator_states
from .agents import Agent, Trials, roll_out
from .environments import Environment
from .scoring import TEST_SEED, TEST_TRIALS, play_rounds

__all__ = ["PPO", "advantages_of", "ppo_loss"]


def advantages_of(rewards: Tensor, values: Tensor, *, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantage estimates, ``A_t = sum_k (gamma lambda)^k d_{t+k}``, ``d_t = r_t + gamma V_{t+1} - V_t``.

    The sum runs to the end of the trial, behind which the value is 0, whatever episodes end within.

    Args:
        rewards: ``(b, t)``.
        values: ``(b, t)``.
        gamma: Discount of a step.
        lambda_: 0 looks one step ahead, 1 at everything that came.

    Returns:
        ``(b, t)``.
    """
    advantages, ahead, after = torch.empty_like(values), torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * after - values[:, t]
        advantages[:, t] = ahead = surprise + gamma * lambda_ * ahead
        after = values[:, t]
    return advantages


def ppo_loss(
    agent: Agent,
    trials: Trials,
    advantages: Tensor,
    targets: Tensor,
    *,
    clip: float,
    entropy: float,
    value_coefficient: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of PPO on trials, read in one pass.

    Args:
        agent: Answers anew to what it read.
        trials: As they were played.
        advantages: ``(b, t)``.
        targets: What the value function should have said, ``(b, t)``.
        clip: How far from 1 a ratio may move and still count.
        entropy: Weight of the policy's entropy, which is to be large.
        value_coefficient: Weight of half the value function's mean squared error.

    Returns:
        The loss, and its parts: ``policy_loss``, ``value_loss``, ``entropy``, the share of steps that were ``clipped``
        and ``kl``, an estimate of how far the policy is from what it was.
    """
    logits, values = agent(trials.inputs)
    of_actions = logits.log_softmax(-1)
    log_ratio = of_actions.gather(-1, trials.actions.unsqueeze(-1)).squeeze(-1) - trials.log_probabilities
    ratio = log_ratio.exp()
    policy_loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
    value_loss = 0.5 * (values - targets).square().mean()
    spread = -(of_actions.exp() * of_actions).sum(-1).mean()
    loss = policy_loss + value_coefficient * value_loss - entropy * spread
    logs = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": spread}
    logs |= {"clipped": ((ratio - 1).abs() > clip).to(ratio.dtype).mean(), "kl": (ratio - 1 - log_ratio).mean()}
    return loss, {name: value.detach() for name, value in logs.items()}


class PPO(LightningModule):
    """Trains an agent in an environment: a step of the trainer plays new trials and learns from them.

    A run is ``iterations`` such steps in one epoch of one process. Actions and minibatches are drawn with torch's own
    generators, whose states are in checkpoints with that of the environment, so that a run goes on to the bit.

    Args:
        agent: Makes the agent from the environment's observation size, actions and steps, in this order: the class,
            such as ``SNAILAgent``, or a function.
        environment: Where it plays; ``environment.trials`` trials are an iteration's batch.
        optimizer: Optimiser of all parameters, with its learning rate.
        schedule: How the learning rate and the weight of the entropy move: ``linear`` to zero over the run, so that the
            policy may end sure of itself, or ``constant``.
        iterations: Steps of the run.
        epochs: How often each iteration goes through its trials.
        minibatches: Parts into which the trials are cut each time, an optimiser step each.
        gamma: Discount of a step; RL²'s by default, as ``lambda_``.
        lambda_: See ``advantages_of``.
        clip: See ``ppo_loss``, as ``entropy`` and ``value_coefficient``.
        entropy: Weight of the policy's entropy at the beginning.
        value_coefficient: Weight of the value function's loss.
        max_norm: Longest gradient of the policy, and of the value function, whose is of the scale of returns; longer
            ones are scaled to it.
        standardise: Whether an iteration's advantages are brought to mean 0 and deviation 1.
        test_trials: Trials that a test plays.
        test_seed: Seed of these trials; the environment is left with it.

    Attributes:
        returns: The return of each trial of the last test, ``(test_trials,)``.
        optimal: What one who knows the task expects of each, where the environment tells; else ``None``.

    Raises:
        ValueError: If an option is out of its range, there are more minibatches than trials, the seed of training is
            that of the test, or there are several processes.
    """

    def __init__(
        self,
        agent: Callable[[int, int, int], Agent],
        environment: Environment,
        optimizer: Callable[[Iterable[Tensor]], Optimizer] = torch.optim.Adam,
        schedule: Literal["linear", "constant"] = "linear",
        *,
        iterations: int = 300,
        epochs: int = 4,
        minibatches: int = 4,
        gamma: float = 0.99,
        lambda_: float = 0.3,
        clip: float = 0.2,
        entropy: float = 0.01,
        value_coefficient: float = 0.5,
        max_norm: float = 0.5,
        standardise: bool = True,
        test_trials: int = TEST_TRIALS,
        test_seed: int = TEST_SEED,
    ) -> None:
        super().__init__()
        counts = {"iterations": iterations, "epochs": epochs, "minibatches": minibatches, "test_trials": test_trials}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")
        for name, share in {"gamma": gamma, "lambda_": lambda_}.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must be from 0 to 1")
        for name, weight in {"entropy": entropy, "value_coefficient": value_coefficient}.items():
            if not weight >= 0:
                raise ValueError(f"{name} is {weight}; it must be at least 0")
        for name, bound in {"clip": clip, "max_norm": max_norm}.items():
            if not bound > 0:
                raise ValueError(f"{name} is {bound}; it must be above 0")
        if minibatches > environment.trials:
            raise ValueError(
                f"{environment.trials} trials cannot be cut into {minibatches} minibatches of whole trials; "
                f"play more trials or cut fewer"
            )
        self.automatic_optimization = False
        self.agent = agent(environment.observation_size, environment.actions, environment.steps)
        self.environment = environment
        self.optimizer = optimizer
        self.schedule = schedule
        self.iterations = iterations
        self.epochs = epochs
        self.minibatches = minibatches
        self.gamma = gamma
        self.lambda_ = lambda_
        self.entropy = entropy
        self.loss_options = {"clip": clip, "value_coefficient": value_coefficient}
        self.max_norm = max_norm
        self.standardise = standardise
        self.test_trials = test_trials
        self.test_seed = test_seed
        self.returns = torch.empty(0)
        self.optimal: Tensor | None = None
        self._rounds: Iterator[tuple[Tensor, Tensor | None]] = iter(())
        self._played: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The agent's answer; see ``Agent.forward``."""
        answer: tuple[Tensor, Tensor] = self.agent(inputs)
        return answer

    def setup(self, stage: str) -> None:
        """Refuse several processes, and to train on what a test plays."""
        if stage == "fit" and self.environment.facts.get("seed") == self.test_seed:
            raise ValueError(f"training and test have one seed, {self.test_seed}, and so the same trials; change one")
        if self.trainer.world_size > 1:
            raise ValueError(
                f"{self.trainer.world_size} processes would all play the same trials; use one (--trainer.devices 1)"
            )

    def configure_optimizers(self) -> Any:
        """The optimiser with its schedule, which counts iterations."""
        optimizer = self.optimizer(self.agent.parameters())
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)}

    def _factor(self, iteration: int) -> float:
        return 1.0 if self.schedule == "constant" else max(0.0, 1 - iteration / self.iterations)

    def train_dataloader(self) -> _Count:
        """Counts iterations; what is learned from is played in ``training_step``."""
        return _Count(self.iterations)

    def training_step(self, batch: int, batch_idx: int) -> None:
        """An iteration: play, then go through the trials ``epochs`` times in ``minibatches``."""
        trials = roll_out(self.agent, self.environment)
        advantages = advantages_of(trials.rewards, trials.values, gamma=self.gamma, lambda_=self.lambda_)
        targets = advantages + trials.values
        if self.standardise:
            advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)
        steps = [which for _ in range(self.epochs) for which in torch.randperm(len(trials)).chunk(self.minibatches)]
        options = {"entropy": self.entropy * self._factor(self.global_step), **self.loss_options}
        optimizer, sums = cast(Any, self.optimizers()), dict[str, Tensor]()
        for number, which in enumerate(steps, 1):
            which = which.to(trials.actions.device)
            loss, logs = ppo_loss(self.agent, trials[which], advantages[which], targets[which], **options)
            optimizer.zero_grad()
            self.manual_backward(loss)
            for name, network in (("policy", self.agent.policy), ("value", self.agent.value)):
                logs[f"{name}_gradient_norm"] = nn.utils.clip_grad_norm_(network.parameters(), self.max_norm)
            # The trainer counts the steps of its own wrapper: one an iteration.
            (optimizer if number == len(steps) else optimizer.optimizer).step()
            for name, value in {"loss": loss.detach(), **logs}.items():
                sums[name] = sums.get(name, 0.0) + value / len(steps)
        cast(Any, self.lr_schedulers()).step()
        self._check(sums["loss"])
        logged = {f"train/{name}": value for name, value in {"return": trials.returns.mean(), **sums}.items()}
        self.log_dict(logged, batch_size=1)

    def _check(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at iteration {self.global_step}; lower the learning rate "
                f"(--model.optimizer.lr) or the longest gradient (--model.max_norm)"
            )

    # -- scoring -----------------------------------------------------------------------------------------------

    def test_dataloader(self) -> _Count:
        """Counts how often ``environment.trials`` trials are played."""
        return _Count(-(-self.test_trials // self.environment.trials))

    def on_test_epoch_start(self) -> None:
        """Begin the test's own trials."""
        self._rounds = play_rounds(
            self.environment,
            lambda now: roll_out(self.agent, now).returns,
            trials=self.test_trials,
            seed=self.test_seed,
        )
        self._played = []

    def test_step(self, batch: int, batch_idx: int) -> None:
        """Play new trials."""
        self._played.append(next(self._rounds))

    def on_test_epoch_end(self) -> None:
        """Keep the ``test_trials`` returns in ``self.returns``."""
        self._rounds = iter(())  # a module with a generator could not be copied
        self.returns = torch.cat([returns for returns, _ in self._played])
        known = [optimal for _, optimal in self._played if optimal is not None]
        self.optimal = torch.cat(known) if known else None

    # -- what else a run needs to go on exactly where it was ---------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the environment's state and that of all random generators, in tensors and plain values."""
        checkpoint["generators"] = [generator_states()]
        checkpoint["environment"] = self.environment.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put them back where training goes on; a test plays trials of its own."""
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            set_generator_states(checkpoint["generators"][0])
            self.environment.load_state_dict(checkpoint["environment"])


class _Count:
    """As many numbers as there are steps to take; where a run goes on, the trainer knows how many are left."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.steps))

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer counts. Its presence tells Lightning that the loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
