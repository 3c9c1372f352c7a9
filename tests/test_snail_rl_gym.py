"""Environments here as gymnasium's, and gymnasium's as ours."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from snail.rl import Bandits, FromGymnasium, TabularMDPs, as_vector_env
from snail.rl.strategies import Random, play

gymnasium = pytest.importorskip("gymnasium")


class Corridor(gymnasium.Env):  # type: ignore[misc, name-defined, unused-ignore]
    """Doors 1 and 2, one of which pays, drawn if there is a seed; episodes of 3 steps, which the observation counts."""

    def __init__(self, observe: str = "box") -> None:
        self.discrete = observe == "discrete"
        box = gymnasium.spaces.Box(0, 9, (1, 2), np.float64)
        self.observation_space = gymnasium.spaces.Discrete(4, start=1) if self.discrete else box
        self.action_space = gymnasium.spaces.Discrete(2, start=1)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.door = int(self.np_random.integers(1, 3))
        self.bonus = (options or {}).get("bonus", getattr(self, "bonus", 0.0))
        self.steps = 0
        return self._seen(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert action in (1, 2)
        self.steps += 1
        return self._seen(), float(action == self.door) + self.bonus, False, self.steps == 3, {}

    def _seen(self) -> Any:
        return self.steps + 1 if self.discrete else np.array([[self.steps, self.door]], dtype=np.float64)


def corridors(mode: str = "SameStep", observe: str = "box", trials: int = 6) -> Any:
    makers = [lambda: Corridor(observe)] * trials
    return gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode(mode))


def zeros(environment: Any, step: int = 0) -> Tensor:
    return torch.full((environment.trials,), 0)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_bandits_as_a_vector_environment(mode: str) -> None:
    theirs, ours = as_vector_env(Bandits(4, 3, 5, seed=2), autoreset_mode=mode), Bandits(4, 3, 5, seed=2)
    assert isinstance(theirs, gymnasium.vector.VectorEnv) and theirs.num_envs == 4
    assert theirs.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode(mode)
    assert theirs.single_action_space == gymnasium.spaces.Discrete(3)
    assert theirs.single_observation_space.shape == (3 + 2,)
    for trial in range(2):
        if trial == 0 or mode == "Disabled":
            observation, infos = theirs.reset()
        elif mode == "NextStep":
            observation, reward, terminated, truncated, infos = theirs.step(np.array([2, 2, 2, 2]))
            assert not reward.any() and not terminated.any() and not truncated.any()
        assert infos == {} or mode == "SameStep"
        ours.reset()
        assert observation in theirs.observation_space and not observation.any()
        for step in range(1, 6):
            action = np.array([0, 1, 2, step % 3])
            observation, reward, terminated, truncated, infos = theirs.step(action)
            assert np.array_equal(reward, ours.step(torch.from_numpy(action))[1].double().numpy())
            assert terminated.all() == terminated.any() == (step == 5) and not truncated.any()
            if step == 5 and mode == "SameStep":
                assert not observation.any() and infos["_final_obs"].all()
            told = np.stack(list(infos["final_obs"])) if step == 5 and mode == "SameStep" else observation
            assert told in theirs.observation_space
            assert np.array_equal(told[:, :3], np.eye(3)[action])
            assert np.array_equal(told[:, 3], reward) and not told[:, 4].any()
    if mode == "Disabled":
        with pytest.raises(RuntimeError, match=r"^the trials ended after 5 steps; call reset$"):
            theirs.step(action)


def test_mdps_tell_their_state_and_the_end_of_an_episode() -> None:
    theirs = as_vector_env(TabularMDPs(3, 2, horizon=2, states=4, actions=2))
    observation, _ = theirs.reset()
    assert np.array_equal(observation, [[1, 0, 0, 0, 0, 0, 0, 0]] * 3)
    told = [theirs.step(np.array([1, 0, 1]))[0] for _ in range(4)]
    assert [step[:, -1].tolist() for step in told] == [[0] * 3, [1] * 3, [0] * 3, [1] * 3]
    assert np.array_equal(told[1][:, :4], [[1, 0, 0, 0]] * 3)
    assert np.array_equal(told[0][:, 4:6], [[0, 1], [1, 0], [0, 1]])


def test_a_seed_begins_again() -> None:
    environment = Bandits(4, 3, 5)
    theirs, fresh = as_vector_env(environment), Bandits(4, 3, 5, seed=9)
    theirs.reset()
    theirs.reset(seed=9)
    fresh.reset()
    assert torch.equal(environment.means, fresh.means) and environment.facts == fresh.facts
    theirs.reset()
    assert not torch.equal(environment.means, fresh.means)


def test_there_and_back() -> None:
    environment = FromGymnasium(as_vector_env(Bandits(300, 3, 5), autoreset_mode="SameStep"), 10)
    assert environment.observation_size == 5 and environment.actions == 3 and environment.trials == 300
    rewards = play(environment, Random())
    assert abs(rewards.mean() - 0.5) < 0.1


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_their_environments_as_ours(mode: str) -> None:
    environment = FromGymnasium(corridors(mode), 7)
    assert (environment.trials, environment.actions, environment.observation_size) == (6, 2, 2)
    assert environment.facts == {"environment": "SyncVectorEnv", "steps": 7, "seed": 0}
    first = environment.reset()
    assert first.shape == (6, 2) and first.dtype == torch.float32
    door = first[:, 1]
    assert set(door.tolist()) == {1.0, 2.0}
    for step in range(1, 8):
        action = torch.full((6,), step % 2)
        observation, reward, done = environment.step(action)
        assert torch.equal(reward, (door == action + 1).float())
        assert (reward.dtype, done.dtype) == (torch.float32, torch.bool)
        assert done.tolist() == [step % 3 == 0] * 6
        assert observation[:, 0].tolist() == [step % 3] * 6
        assert torch.equal(observation[:, 1], door)  # the task stays through the episodes of a trial
    environment.reset()
    environment.reset()
    assert not torch.equal(environment.reset()[:, 1], door)  # and does not to the next


def test_the_step_that_resets_is_one_of_the_trials() -> None:
    environment = FromGymnasium(corridors("NextStep"), 4)
    environment.reset()
    steps = [environment.step(zeros(environment)) for _ in range(4)]
    assert [done.all().item() for _, _, done in steps] == [False, False, True, False]
    assert [observation[0, 0].item() for observation, _, _ in steps] == [1, 2, 3, 0]
    assert not steps[3][1].any()


def test_discrete_observations_are_one_hot() -> None:
    environment = FromGymnasium(corridors(observe="discrete"), 4)
    assert environment.observation_size == 4
    assert torch.equal(environment.reset(), torch.eye(4)[[0] * 6])
    assert torch.equal(environment.step(zeros(environment))[0], torch.eye(4)[[1] * 6])


def test_seeds_and_states() -> None:
    first, second, other = (FromGymnasium(corridors(trials=30), 2, seed=seed) for seed in (0, 0, 1))
    one = first.reset()
    assert torch.equal(one, second.reset())
    assert not torch.equal(one, other.reset())
    first.step(zeros(first))
    state = first.state_dict()
    with pytest.raises(ValueError, match=r"^the state is of step 1 of 2; save it between trials$"):
        second.load_state_dict(state)
    first.step(zeros(first))
    restored = FromGymnasium(corridors(trials=30), 2)
    restored.load_state_dict(first.state_dict())
    again = first.reset()
    assert torch.equal(again, restored.reset()) and not torch.equal(again, one)
    with pytest.raises(ValueError, match=r"^the state is of 30 trials of .*'seed': 0}, these are 30 of .*'seed': 1}$"):
        other.load_state_dict(state)
    other.reseed(0)
    assert torch.equal(other.reset(), one)


def test_options_are_given_when_a_trial_begins() -> None:
    environment = FromGymnasium(corridors(), 7, options={"bonus": 10.0})
    assert play(environment, Random()).min() >= 10
    assert play(environment, Random()).min() >= 10


def test_cart_pole() -> None:
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    vector_env = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})
    environment = FromGymnasium(vector_env, 60)
    assert environment.facts["environment"] == "CartPole-v1" and environment.observation_size == 4
    environment.reset()
    done = torch.stack([environment.step(zeros(environment))[2] for _ in range(60)])
    assert (done.sum(dim=0) >= 5).all()


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^autoreset_mode is 'never'; it must be one of NextStep, SameStep, Disabled$"
    ):
        as_vector_env(Bandits(1, 1, 1), autoreset_mode="never")
    with pytest.raises(RuntimeError, match=r"^no trial has begun; call reset$"):
        as_vector_env(Bandits(2, 1, 1)).step(np.array([0, 0]))
    theirs = as_vector_env(Bandits(2, 1, 1), autoreset_mode="Disabled")
    with pytest.raises(ValueError, match=r"^1 of 2 trials are to be reset; they begin and end together$"):
        theirs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match=r"^steps is 0; it must be at least 1$"):
        FromGymnasium(corridors(), 0)
    with pytest.raises(ValueError, match=r"^seed is -1; it must be at least 0$"):
        FromGymnasium(corridors(), 1, seed=-1)
    environment = FromGymnasium(corridors(), 1)
    with pytest.raises(ValueError, match=r"^seed is -1; it must be at least 0$"):
        environment.reseed(-1)
    with pytest.raises(RuntimeError, match=r"^no trial has begun; call reset$"):
        environment.step(zeros(environment))
    environment.reset()
    with pytest.raises(ValueError, match=r"^actions run from 0 to 2; there are 2, from 0$"):
        environment.step(torch.tensor([0, 0, 0, 0, 0, 2]))
    environment.step(zeros(environment))
    with pytest.raises(RuntimeError, match=r"^the trials ended after 1 steps; call reset$"):
        environment.step(zeros(environment))


def test_spaces_that_cannot_be_played() -> None:
    with pytest.raises(ValueError, match=r"^the action space is Box\(.*\); only Discrete ones can be played$"):
        FromGymnasium(gymnasium.make_vec("Pendulum-v1", 2, vectorization_mode="sync"), 5)
    vector_env = corridors()
    vector_env.single_observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Discrete(2)})
    with pytest.raises(ValueError, match=r"^the observation space is Dict\(.*\); flatten it with gymnasium.wrappers"):
        FromGymnasium(vector_env, 5)


def test_without_gymnasium_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    vector_env = corridors()
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for call in (lambda: as_vector_env(Bandits(1, 1, 1)), lambda: FromGymnasium(vector_env, 5)):
        with pytest.raises(ImportError, match=r"^gymnasium is not installed; pip install gymnasium$"):
            call()
