"""Bandits and tabular MDPs: what is drawn, what it depends on, and the exact best that can be done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from snail.rl.environments import Bandits, Environment, TabularMDPs, value_iteration

MAKERS: dict[str, Callable[..., Environment]] = {
    "bandits": lambda trials=6, seed=0, device="cpu": Bandits(trials, 3, 8, seed=seed, device=device),
    "mdps": lambda trials=6, seed=0, device="cpu": TabularMDPs(
        trials, 2, horizon=4, states=5, actions=3, seed=seed, device=device
    ),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def actions(environment: Environment, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (environment.steps, environment.trials)
    return list(torch.randint(environment.actions, shape, generator=generator).to(environment.device))


def run(environment: Environment, some: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [environment.step(action) for action in some]


def same(first: Sequence[tuple[Tensor, ...]], second: Sequence[tuple[Tensor, ...]]) -> bool:
    return all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))


def tasks(environment: Environment) -> list[Tensor]:
    if isinstance(environment, Bandits):
        return [environment.means]
    assert isinstance(environment, TabularMDPs)
    return [environment.rewards, environment.transitions]


@makers
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_shapes_and_types(make: Callable[..., Environment], device: str) -> None:
    environment = make(device=device)
    assert environment.trials == 6 and environment.actions == 3 and environment.steps == 8
    first = environment.reset()
    for observation, reward, done in [(first, None, None), *run(environment, actions(environment, 0))]:
        assert observation.shape == (6, environment.observation_size) and observation.dtype == torch.float32
        assert observation.device.type == device
        if reward is not None and done is not None:
            assert reward.shape == done.shape == (6,)
            assert (reward.dtype, done.dtype) == (torch.float32, torch.bool)
            assert reward.device.type == done.device.type == device


@makers
def test_tasks_depend_on_the_seed_and_the_resets_alone(make: Callable[..., Environment]) -> None:
    first, second, other = make(), make(), make(seed=1)
    for environment in (first, second, other):
        environment.reset()
    run(first, actions(first, 1))
    run(second, actions(second, 2)[:3])  # neither what is done nor how much of it
    before = tasks(first)
    for environment in (first, second, other):
        environment.reset()
    for a, b, c, d in zip(tasks(first), tasks(second), tasks(other), before, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c) and not torch.equal(a, d)


@makers
def test_a_larger_batch_begins_with_the_trials_of_a_smaller(make: Callable[..., Environment]) -> None:
    small, large = make(trials=6), make(trials=9)
    small.reset(), large.reset()
    some = actions(large, 0)
    for few, many in zip(run(small, [action[:6] for action in some]), run(large, some), strict=True):
        assert all(torch.equal(a, b[:6]) for a, b in zip(few, many, strict=True))


@makers
@pytest.mark.parametrize("steps", [0, 3, 8])
def test_a_saved_state_goes_on_identically(make: Callable[..., Environment], steps: int) -> None:
    environment, restored = make(), make()
    environment.reset()
    some = actions(environment, 0)
    run(environment, some[:steps])
    restored.load_state_dict(environment.state_dict())
    assert same(run(environment, some[steps:]), run(restored, some[steps:]))
    assert torch.equal(environment.reset(), restored.reset())
    assert same(run(environment, some), run(restored, some))


@makers
def test_a_state_before_the_first_reset(make: Callable[..., Environment]) -> None:
    environment, restored = make(), make()
    restored.reset()
    restored.load_state_dict(environment.state_dict())
    environment.reset(), restored.reset()
    assert all(torch.equal(a, b) for a, b in zip(tasks(environment), tasks(restored), strict=True))


@makers
def test_reseeding_is_beginning_again(make: Callable[..., Environment]) -> None:
    environment, fresh = make(seed=1), make(seed=4)
    environment.reset()
    environment.reseed(4)
    environment.reset(), fresh.reset()
    assert environment.facts == fresh.facts
    assert same(run(environment, actions(fresh, 0)), run(fresh, actions(fresh, 0)))


def test_bandits_draw_every_arms_luck_whatever_is_pulled() -> None:
    first, second = Bandits(500, 4, 5), Bandits(500, 4, 5)
    first.reset(), second.reset()
    for one, two in zip(actions(first, 1), actions(second, 2), strict=True):
        alike = one == two
        assert 0 < alike.sum() < 500
        assert torch.equal(first.step(one)[1][alike], second.step(two)[1][alike])


def test_arms_pay_as_often_as_their_means_say() -> None:
    bandits = Bandits(200, 3, 400, seed=3)
    bandits.reset()
    arm = torch.arange(200) % 3
    paid = torch.stack([bandits.step(arm)[1] for _ in range(400)])
    assert set(paid.flatten().tolist()) == {0.0, 1.0}
    mean = bandits.means[torch.arange(200), arm]
    error = (mean * (1 - mean) / 400).sqrt()
    assert ((paid.mean(dim=0) - mean).abs() <= 4.5 * error).all()
    assert ((paid.mean(dim=0) - mean).abs() <= error).float().mean() > 0.6  # 68 % are to be


def test_means_are_uniform() -> None:
    bandits = Bandits(20_000, 2, 1)
    bandits.reset()
    counts = torch.histc(bandits.means, bins=10, min=0, max=1)
    assert ((counts - 4000).abs() < 4 * (4000 * 0.9) ** 0.5).all()


def test_mdps_are_drawn_as_they_should_be() -> None:
    mdps = TabularMDPs(2000, 1, states=4, actions=5)
    mdps.reset()
    n = mdps.rewards.numel()
    assert abs(mdps.rewards.mean() - 1) < 4 / n**0.5
    assert abs(mdps.rewards.var() - 1) < 4 * (2 / n) ** 0.5
    torch.testing.assert_close(mdps.transitions.sum(dim=-1), torch.ones(2000, 4, 5))
    # Of a flat Dirichlet over 4: mean 1/4, variance 3/80, covariance -1/80; so the variables of 40,000 draws.
    p = mdps.transitions.flatten(0, 2)
    assert (p.mean(dim=0) - 1 / 4).abs().max() < 4 * (3 / 80 / len(p)) ** 0.5
    torch.testing.assert_close(torch.cov(p.T), torch.eye(4) / 20 - 1 / 80, atol=0.001, rtol=0)
    assert (p[:, 0] > 0.5).float().mean() == pytest.approx(0.5**3, abs=0.007)  # (1 - x)^3 is above x


def test_rewards_and_next_states_follow_the_process() -> None:
    mdps = TabularMDPs(500, 5, horizon=4, states=3, actions=2, seed=2)
    mdps.reset()
    mdps.rewards[:], mdps.transitions[:] = mdps.rewards[0].clone(), mdps.transitions[0].clone()
    rewards: dict[tuple[int, int], list[Tensor]] = {}
    seen = torch.zeros(3, 2, 3)
    for action in actions(mdps, 5):
        state = mdps.state
        observation, reward, done = mdps.step(action)
        for s, a in itertools.product(range(3), range(2)):
            here = (state == s) & (action == a)
            rewards.setdefault((s, a), []).append(reward[here])
            seen[s, a] += observation[here & ~done].sum(dim=0)
    for s, a in itertools.product(range(3), range(2)):
        own = torch.cat(rewards[s, a])
        assert abs(own.mean() - mdps.rewards[0, s, a]) < 4 / len(own) ** 0.5
        assert abs(own.var() - 1) < 4 * (2 / len(own)) ** 0.5
        p, n = mdps.transitions[0, s, a], seen[s, a].sum()
        assert ((seen[s, a] / n - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


def test_episodes_end_and_begin_in_state_0() -> None:
    mdps = TabularMDPs(50, 3, horizon=4)
    assert mdps.steps == 12 and mdps.observation_size == 10 and mdps.actions == 5
    first = torch.nn.functional.one_hot(torch.zeros(50, dtype=torch.int64), 10).float()
    assert torch.equal(mdps.reset(), first)
    for step, (observation, _, done) in enumerate(run(mdps, actions(mdps, 0)), start=1):
        assert (observation.sum(dim=1) == 1).all()
        assert done.tolist() == [step % 4 == 0] * 50
        assert torch.equal(observation, first) == (step % 4 == 0)


def test_bandits_never_end_an_episode() -> None:
    bandits = Bandits(5, 2, 6)
    bandits.reset()
    assert not any(done.any() for _, _, done in run(bandits, actions(bandits, 0)))


def test_value_iteration_is_the_best_of_all_policies() -> None:
    mdps = TabularMDPs(3, 1, horizon=3, states=2, actions=2)
    mdps.reset()
    values, policy = value_iteration(mdps.transitions, mdps.rewards, 3)
    assert values.shape == (4, 3, 2) and policy.shape == (3, 3, 2)
    assert (values[3] == 0).all()
    best = torch.full((3, 2), -torch.inf)
    for choice in itertools.product(range(2), repeat=6):  # an action for each step and state
        plan = torch.tensor(choice).view(3, 2)
        value = torch.zeros(3, 2)
        for step in (2, 1, 0):
            s = torch.arange(2)
            here, there = mdps.rewards[:, s, plan[step]], mdps.transitions[:, s, plan[step]]
            value = here + (there @ value.unsqueeze(-1)).squeeze(-1)
        best = best.maximum(value)
        for trial in range(3):
            if torch.equal(policy[:, trial], plan):
                torch.testing.assert_close(values[0, trial], value[trial])
    torch.testing.assert_close(values[0], best)


def test_value_iteration_agrees_with_a_roll_out() -> None:
    mdps = TabularMDPs(40, 200, horizon=5, states=4, actions=3)
    mdps.reset()
    values, policy = value_iteration(mdps.transitions, mdps.rewards, 5)
    torch.testing.assert_close(mdps.optimal, 200 * values[0, :, 0])
    total, trial = torch.zeros(40, 200), torch.arange(40)
    for step in range(mdps.steps):
        _, reward, _ = mdps.step(policy[step % 5, trial, mdps.state])
        total[:, step // 5] += reward
    error = total.std(dim=1) / 200**0.5
    assert ((total.mean(dim=1) - values[0, :, 0]).abs() < 4 * error).all()


def test_the_optimum_of_bandits_is_the_best_arm_throughout() -> None:
    bandits = Bandits(4, 3, 7)
    bandits.reset()
    assert torch.equal(bandits.optimal, bandits.means.max(dim=1).values * 7)


def test_facts_identify_the_trials() -> None:
    assert Bandits(4, 3, 7, seed=2).facts == {"environment": "bandits", "arms": 3, "steps": 7, "seed": 2}
    facts = {"environment": "tabular-mdps", "episodes": 2, "horizon": 10, "states": 10, "actions": 5, "seed": 0}
    assert TabularMDPs(4, 2).facts == facts


@makers
def test_what_is_refused(make: Callable[..., Environment]) -> None:
    environment = make()
    with pytest.raises(RuntimeError, match=r"^no trial has begun; call reset$"):
        environment.step(torch.zeros(6, dtype=torch.int64))
    environment.reset()
    with pytest.raises(ValueError, match=r"^actions are \(5,\) torch.int64; give \(6,\) torch.int64$"):
        environment.step(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^actions are \(6,\) torch.float32; give \(6,\) torch.int64$"):
        environment.step(torch.zeros(6))
    with pytest.raises(ValueError, match=r"^actions run from 0 to 3; there are 3, from 0$"):
        environment.step(torch.tensor([0, 0, 0, 0, 0, 3]))
    with pytest.raises(ValueError, match=r"^actions run from -1 to 0; there are 3, from 0$"):
        environment.step(torch.tensor([0, 0, 0, 0, 0, -1]))
    run(environment, actions(environment, 0))  # a refused step does not count
    with pytest.raises(RuntimeError, match=r"^the trials ended after 8 steps; call reset$"):
        environment.step(torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^the state is of 6 trials of .*'seed': 0}, these are 6 of .*'seed': 1}$"):
        make(seed=1).load_state_dict(environment.state_dict())
    with pytest.raises(ValueError, match=r"^trials is 0; it must be at least 1$"):
        make(trials=0)
    with pytest.raises(ValueError, match=r"^seed is -1; it must be at least 0$"):
        make(seed=-1)
    with pytest.raises(ValueError, match=r"^seed is -2; it must be at least 0$"):
        environment.reseed(-2)


@pytest.mark.parametrize("what", ["episodes", "horizon", "states", "actions"])
def test_sizes_of_mdps(what: str) -> None:
    sizes: dict[str, Any] = {"episodes": 1, what: 0}
    with pytest.raises(ValueError, match=rf"^{what} is 0; it must be at least 1$"):
        TabularMDPs(1, **sizes)


def test_sizes_of_bandits_and_horizons() -> None:
    with pytest.raises(ValueError, match=r"^arms is 0; it must be at least 1$"):
        Bandits(1, 0, 1)
    with pytest.raises(ValueError, match=r"^steps is 0; it must be at least 1$"):
        Bandits(1, 1, 0)
    with pytest.raises(ValueError, match=r"^horizon is 0; it must be at least 1$"):
        value_iteration(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1), 0)
