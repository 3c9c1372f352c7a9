"""The strategies of the textbooks, played as a learned agent is: what SNAIL is measured against in section 5.2.

Each is a ``Player`` that plays all trials of an environment at once. Those for bandits believe that each arm's
probability is uniform in [0, 1], those for Markov decision processes (MDPs) that their rewards are Normal with a mean
from Normal(1, 1) and their transitions from a flat Dirichlet: how the tasks are in fact drawn, the best they can
believe. The MDP players plan anew at the start of each episode.

Ties between arms are broken at random. The chance that a player uses is a function of its seed and of the number of
times that it has begun, so that playing again with a new player of the same seed gives the same actions.

Axes as in ``environments``: ``b`` trial, ``s`` state, ``a`` action or arm, ``T`` steps, ``H`` steps of an episode.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .environments import Bandits, Environment, TabularMDPs, key, value_iteration

__all__ = [
    "GRIDS",
    "OPSRL",
    "PSRL",
    "UCB1",
    "UCRL2",
    "EpsilonGreedy",
    "Gittins",
    "Greedy",
    "KnownMDP",
    "LikeliestThompson",
    "MDPEpsilonGreedy",
    "MDPGreedy",
    "OptimisticThompson",
    "Player",
    "Random",
    "Thompson",
    "bayes_optimal_value",
    "choose",
    "gittins_index",
    "play",
]

GRID = 401  # charges at which the gain of an arm is computed; between two of them it is taken for straight


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
        self.epsilon = _probability(epsilon)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        best = super().act(observation)
        if self.epsilon == 0:
            return best
        return torch.where(self._uniform(len(best)) < self.epsilon, self._anything(), best)


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
        self.constant, self.textbook = _not_negative("constant", constant), textbook

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
        self.samples = _positive("samples", samples)

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
        self.discount = None if discount is None else _discount(discount)

    def begin(self, environment: Environment) -> None:
        """See ``Player.begin``."""
        super().begin(environment)
        self._table = gittins_index(environment.steps, self.discount).to(environment.device)

    def _index(self) -> Tensor:
        table = self._table if self.discount is not None else self._table[self.environment.steps - self.now - 1]
        return table[self.pulls.long(), self.wins.long()]


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
    _positive("steps", steps)
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
    depth = steps + math.ceil(math.log(1e-4) / math.log(_discount(discount)))
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
    _positive("arms", arms)

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

    return value((), _positive("steps", steps))


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
        self.epsilon = _probability(epsilon)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Player.act``."""
        best = super().act(observation)
        if self.epsilon == 0:
            return best
        return torch.where(self._uniform(len(best)) < self.epsilon, self._anything(), best)


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
        self.samples = _positive("samples", samples)

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
        self.constant = _not_negative("constant", constant)

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


# What ``choose`` had to choose from for the defaults, on other seeds than results are quoted on. Those for bandits are
# best for 10 arms and 100 steps; in 10 steps an epsilon of 0 and a UCB1 of 0.05 are better, by less than 0.1 in return.
# Those for MDPs are best for 10 episodes of 10 steps, save epsilon: 0 is best there, the default the least above it.
GRIDS: dict[Callable[[Any], Player], tuple[Any, ...]] = {
    EpsilonGreedy: (0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
    UCB1: (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    LikeliestThompson: (1, 2, 5, 7, 10, 20),
    Gittins: (0.9, 0.95, 0.99, 0.995),
    MDPEpsilonGreedy: (0.0, 0.02, 0.05, 0.1, 0.2, 0.3),
    OPSRL: (1, 2, 3, 5, 10, 20),
    UCRL2: (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
}


def _positive(what: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{what} is {value}; it must be at least 1")
    return value


def _not_negative(what: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{what} is {value}; it must be at least 0")
    return value


def _probability(epsilon: float) -> float:
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is {epsilon}; it must be from 0 to 1")
    return epsilon


def _discount(discount: float) -> float:
    if not 0 < discount < 1:
        raise ValueError(f"discount is {discount}; it must be between 0 and 1")
    return discount
