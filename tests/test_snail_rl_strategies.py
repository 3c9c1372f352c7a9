"""The strategies of the textbooks: against exact values, against each other, and what they refuse."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from snail.rl.environments import Bandits, Environment, TabularMDPs, value_iteration
from snail.rl.strategies import (
    GRIDS,
    OPSRL,
    PSRL,
    UCB1,
    UCRL2,
    EpsilonGreedy,
    Gittins,
    Greedy,
    KnownMDP,
    LikeliestThompson,
    MDPEpsilonGreedy,
    MDPGreedy,
    OptimisticThompson,
    Player,
    Random,
    Thompson,
    bayes_optimal_value,
    choose,
    gittins_index,
    play,
)

TRIALS = 4000
BANDIT_PLAYERS: dict[str, Callable[[], Player]] = {
    "greedy": Greedy,
    "epsilon-greedy": EpsilonGreedy,
    "ucb1": UCB1,
    "thompson": Thompson,
    "optimistic": OptimisticThompson,
    "likeliest": lambda: LikeliestThompson(3),
    "gittins": Gittins,
    "gittins 0.9": lambda: Gittins(0.9),
    "textbook ucb1": lambda: UCB1(1.0, textbook=True),
}
MDP_PLAYERS: dict[str, Callable[[], Player]] = {
    "greedy": MDPGreedy,
    "epsilon-greedy": MDPEpsilonGreedy,
    "psrl": PSRL,
    "opsrl": lambda: OPSRL(3),
    "ucrl2": UCRL2,
    "known": KnownMDP,
}


@functools.cache
def bandit_returns(name: str, arms: int = 2, steps: int = 8) -> Tensor:
    player = Random() if name == "random" else BANDIT_PLAYERS[name]()
    return play(Bandits(TRIALS, arms, steps, seed=5), player).sum(dim=1)


@functools.cache
def mdp_rewards(name: str) -> Tensor:
    player = Random() if name == "random" else MDP_PLAYERS[name]()
    return play(TabularMDPs(150, 8, horizon=6, states=4, actions=3, seed=5), player)


def error(numbers: Tensor) -> float:
    return float(numbers.std() / len(numbers) ** 0.5)


def test_random_play_earns_half() -> None:
    returns = bandit_returns("random")
    assert play(Bandits(3, 2, 8), Random()).shape == (3, 8)
    assert abs(returns.mean() - 4) < 4 * error(returns)


@pytest.mark.parametrize("name", BANDIT_PLAYERS)
def test_every_bandit_player_is_better_than_chance_and_none_than_bayes(name: str) -> None:
    returns, optimum = bandit_returns(name), bayes_optimal_value(2, 8)
    better = returns - bandit_returns("random")
    assert better.mean() > 4 * error(better)
    assert returns.mean() < optimum + 4 * error(returns)


def test_gittins_comes_close_to_bayes() -> None:
    assert abs(bandit_returns("gittins").mean() - bayes_optimal_value(2, 8)) < 4 * error(bandit_returns("gittins"))
    regret = bayes_optimal_value(2, 8) - 4
    assert bayes_optimal_value(2, 8) - bandit_returns("thompson").mean() < 0.5 * regret


@pytest.mark.parametrize(
    ("arms", "steps", "value"),
    [(1, 7, 3.5), (2, 1, 0.5), (2, 2, 13 / 12), (3, 2, 13 / 12), (5, 1, 0.5)],  # a third arm is of no use in two steps
)
def test_bayes_optimal_by_hand(arms: int, steps: int, value: float) -> None:
    assert bayes_optimal_value(arms, steps) == pytest.approx(value, abs=1e-12)


def test_bayes_optimal_grows_with_arms_until_there_is_one_for_each_step() -> None:
    values = [bayes_optimal_value(arms, 6) for arms in (1, 2, 3, 6, 7)]
    assert values[:4] == sorted(set(values[:4])) and values[3] == values[4]


@pytest.mark.parametrize(("discount", "index"), [(0.9, 0.7029), (0.95, 0.7614), (0.99, 0.8699)])
def test_gittins_index_as_published(discount: float, index: float) -> None:
    assert gittins_index(1, discount)[0, 0].item() == pytest.approx(index, abs=6e-5)  # Gittins, Glazebrook & Weber


def test_gittins_index_of_known_arms_is_their_mean() -> None:
    table = gittins_index(200, 0.5)
    assert table[199, 99].item() == pytest.approx(100 / 201, abs=0.002)
    assert table[2, 2] > table[2, 1] > table[2, 0]
    assert table[1, 0] < 1 / 2 < table[0, 0]
    assert table[2, 0].isfinite() and table[0, 1:].isnan().all()


def test_finite_gittins_index_by_hand() -> None:
    table = gittins_index(3)
    assert table.shape == (3, 3, 3)
    # One step: the mean. Two: go on only after a win, so charge c with (1/2 - c) + 1/2 (2/3 - c) = 0.
    assert table[0, 0, 0].item() == pytest.approx(1 / 2)
    assert table[0, 2, 1].item() == pytest.approx(1 / 2)
    assert table[1, 0, 0].item() == pytest.approx(5 / 9)
    assert (table[2, 0, 0] > table[1, 0, 0]) and table[2, 1].isnan().all()


def test_epsilon_of_0_is_greedy_and_of_1_is_random() -> None:
    assert torch.equal(actions(EpsilonGreedy(0), Bandits(60, 4, 9)), actions(Greedy(), Bandits(60, 4, 9)))
    mdps = functools.partial(TabularMDPs, 30, 3)
    assert torch.equal(play(mdps(), MDPEpsilonGreedy(0)), play(mdps(), MDPGreedy()))
    counts = actions(EpsilonGreedy(1), Bandits(1000, 4, 9)).bincount(minlength=4)
    assert ((counts - 2250).abs() < 4 * (9000 * 3 / 16) ** 0.5).all()


def test_one_sample_is_plain_sampling() -> None:
    likeliest, plain = LikeliestThompson(1), Thompson()
    assert torch.equal(actions(likeliest, Bandits(50, 3, 9)), actions(plain, Bandits(50, 3, 9)))
    assert torch.equal(play(TabularMDPs(50, 3), OPSRL(1)), play(TabularMDPs(50, 3), PSRL()))


def test_ucb1_without_width_is_greedy() -> None:
    assert torch.equal(actions(UCB1(0), Bandits(50, 3, 9)), actions(Greedy(), Bandits(50, 3, 9)))


def test_textbook_ucb1_pulls_every_arm_first() -> None:
    pulled = actions(UCB1(textbook=True), Bandits(50, 6, 6))
    assert (pulled.view(50, 6).sort(dim=1).values == torch.arange(6)).all()


def test_ucrl2_without_width_is_greedy() -> None:
    same = torch.isclose(play(TabularMDPs(50, 3), UCRL2(0)), play(TabularMDPs(50, 3), MDPGreedy()), atol=1e-4)
    assert same.all(dim=1).float().mean() > 0.95  # but where a rounding decides


def test_ucrl2_hopes_for_the_best_that_is_credible() -> None:
    mdps, player = TabularMDPs(1, 1, horizon=2, states=2, actions=1), UCRL2(0.1)
    mdps.reset()
    player.begin(mdps)
    rewards = torch.tensor([[[0.0], [9.0]]])  # state 1 pays
    player.visits[:], player.earned = torch.tensor(100.0), rewards * 101 - 1
    player.seen[:] = torch.tensor([49.0, 49.0])
    plans: list[Tensor] = []
    seen = torch.einsum

    def spy(equation: str, transitions: Tensor, value: Tensor) -> Tensor:
        plans.append(transitions)
        return seen(equation, transitions, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "einsum", spy)
        player._plan()
    width = 0.1 * (4 * torch.tensor(2 * 2 * 1 / 0.05).log() / 100).sqrt() * 2**0.5
    torch.testing.assert_close(plans[1][0, :, 0], torch.tensor([[0.5 + width / 2, 0.5 - width / 2]] * 2))
    assert all(torch.allclose(plan.sum(dim=-1), torch.ones(1, 2, 1)) for plan in plans)


@pytest.mark.parametrize("name", MDP_PLAYERS)
def test_every_mdp_player_is_better_than_chance_and_none_than_one_who_knows(name: str) -> None:
    returns, known = mdp_rewards(name).sum(dim=1), mdp_rewards("known").sum(dim=1)
    better, worse = returns - mdp_rewards("random").sum(dim=1), known - returns
    assert better.mean() > 4 * error(better)
    assert name == "known" or worse.mean() > 4 * error(worse)


def test_who_knows_the_process_scores_1() -> None:
    mdps = TabularMDPs(150, 8, horizon=6, states=4, actions=3, seed=5)
    mdps.reset()
    score = mdp_rewards("known").sum(dim=1) / mdps.optimal.mean()
    assert abs((mdp_rewards("known").sum(dim=1) - mdps.optimal).mean()) < 4 * error(score) * mdps.optimal.mean()


def test_psrl_learns() -> None:
    rewards = mdp_rewards("psrl").view(150, 8, 6).sum(dim=2)
    gain = rewards[:, -2:].mean(dim=1) - rewards[:, :2].mean(dim=1)
    assert gain.mean() > 4 * error(gain)


def test_what_mdp_players_believe() -> None:
    mdps, player = TabularMDPs(2, 300, horizon=3, states=2, actions=2), PSRL()
    play(mdps, player)
    assert player.visits.sum() == 2 * 900 and player.seen.sum() == 2 * 600  # no next state is seen at the end
    often = player.visits > 100
    assert often.any()
    assert (player._expected_rewards - mdps.rewards)[often].abs().max() < 0.4
    assert (player._expected_transitions - mdps.transitions)[often].abs().max() < 0.2
    transitions, rewards = player._sampled()
    torch.testing.assert_close(transitions.sum(dim=-1), torch.ones(2, 2, 2))
    assert (rewards - player._expected_rewards)[often].abs().max() < 0.5


def test_before_anything_is_seen_the_posterior_is_the_prior() -> None:
    mdps, player = TabularMDPs(1000, 1, states=3, actions=2), PSRL(prior_mean=4.0)
    mdps.reset()
    player.begin(mdps)
    transitions, rewards = player._sampled()
    assert abs(rewards.mean() - 4) < 4 / rewards.numel() ** 0.5
    assert abs(rewards.var() - 1) < 4 * (2 / rewards.numel()) ** 0.5
    p = transitions.flatten(0, 2)[:, 0]
    assert abs(p.mean() - 1 / 3) < 4 * (1 / 18 / len(p)) ** 0.5 and abs(p.var() - 1 / 18) < 0.003


@pytest.mark.parametrize("name", BANDIT_PLAYERS)
def test_bandit_players_play_alike_with_one_seed_and_forget_between_trials(name: str) -> None:
    first, second = BANDIT_PLAYERS[name](), BANDIT_PLAYERS[name]()
    one, two = Bandits(20, 3, 6), Bandits(20, 3, 6)
    assert torch.equal(actions(first, one), actions(second, two))
    assert torch.equal(play(one, first), play(two, second))
    assert getattr(first, "pulls").sum() == 20 * 6  # noqa: B009


def test_choose_finds_the_best_constant() -> None:
    best, returns = choose(EpsilonGreedy, (1.0, 0.0, 0.5), lambda: Bandits(500, 3, 10))
    assert best == 0.0 and list(returns) == [1.0, 0.0, 0.5]
    assert returns[0.0] > returns[0.5] > returns[1.0]
    assert returns[0.0] == play(Bandits(500, 3, 10), EpsilonGreedy(0.0)).sum(dim=1).mean()


def test_every_grid_fits_its_player_and_holds_its_default() -> None:
    for kind, grid in GRIDS.items():
        assert all(isinstance(kind(constant), Player) for constant in grid) and len(grid) == len(set(grid))
        default = next(iter(inspect.signature(kind).parameters.values())).default
        assert default is None or default in grid


def test_planning_is_value_iteration() -> None:
    mdps, player = TabularMDPs(4, 1), KnownMDP()
    play(mdps, player)
    assert torch.equal(player._plan(), value_iteration(mdps.transitions, mdps.rewards, 10)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("name", BANDIT_PLAYERS)
def test_bandit_players_play_alike_on_an_accelerator(name: str) -> None:
    here, there = Bandits(50, 3, 9), Bandits(50, 3, 9, device="cuda")
    same = play(here, BANDIT_PLAYERS[name]()) == play(there, BANDIT_PLAYERS[name]()).cpu()
    assert same.all(dim=1).float().mean() > 0.9


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Random(seed=-1), r"^seed is -1; it must be at least 0$"),
        (lambda: EpsilonGreedy(1.5), r"^epsilon is 1.5; it must be from 0 to 1$"),
        (lambda: MDPEpsilonGreedy(float("nan")), r"^epsilon is nan; it must be from 0 to 1$"),
        (lambda: UCB1(-1.0), r"^constant is -1.0; it must be at least 0$"),
        (lambda: UCRL2(-1.0), r"^constant is -1.0; it must be at least 0$"),
        (lambda: LikeliestThompson(0), r"^samples is 0; it must be at least 1$"),
        (lambda: OPSRL(0), r"^samples is 0; it must be at least 1$"),
        (lambda: Gittins(1.0), r"^discount is 1.0; it must be between 0 and 1$"),
        (lambda: gittins_index(3, 0.0), r"^discount is 0.0; it must be between 0 and 1$"),
        (lambda: gittins_index(0), r"^steps is 0; it must be at least 1$"),
        (lambda: bayes_optimal_value(0, 1), r"^arms is 0; it must be at least 1$"),
        (lambda: bayes_optimal_value(1, 0), r"^steps is 0; it must be at least 1$"),
    ],
)
def test_what_is_refused(make: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def test_players_of_one_kind_do_not_play_the_other() -> None:
    with pytest.raises(TypeError, match=r"^Greedy plays Bandits, not TabularMDPs$"):
        play(TabularMDPs(1, 1), Greedy())
    with pytest.raises(TypeError, match=r"^PSRL plays TabularMDPs, not Bandits$"):
        play(Bandits(1, 1, 1), PSRL())


def actions(player: Player, environment: Environment) -> Tensor:
    """What is done in new trials, all steps of a trial one after the other."""
    done = []

    def act(observation: Tensor) -> Tensor:
        done.append(type(player).act(player, observation))
        return done[-1]

    player.act = act  # type: ignore[method-assign]
    play(environment, player)
    del player.act
    return torch.stack(done, dim=1).flatten()
