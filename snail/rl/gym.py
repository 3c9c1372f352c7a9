"""Both ways between the environments here and those of gymnasium, which is imported when first needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .environments import Environment, check_action, key

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

__all__ = ["FromGymnasium", "as_vector_env"]


def as_vector_env(environment: Environment, *, autoreset_mode: str = "NextStep") -> VectorEnv[Any, Any, Any]:
    """An environment as gymnasium's learners know it: a trial is one episode, and one sub-environment plays b of them.

    What a learner sees is all that SNAIL reads, so that one with a memory, and none without, can learn within a trial:
    the observation (o), the one-hot action before it (A), its reward (1) and whether it ended an episode (1); all but
    the first are 0 when a trial begins. All trials terminate together, after ``environment.steps`` steps, and are then
    drawn anew. ``reset`` with a seed is to begin again as an environment made with that seed.

    Args:
        environment: What to play; the vector environment plays it, not a copy.
        autoreset_mode: As in ``gymnasium.vector.AutoresetMode``. ``"NextStep"``: the step after the last ignores its
            action and begins new trials. ``"SameStep"``: the last step itself does, and leaves what it led to in
            ``infos["final_obs"]``. ``"Disabled"``: only ``reset`` does.

    Raises:
        ImportError: If gymnasium is not installed.
        ValueError: If there is no such mode.
    """
    gymnasium = _gymnasium()
    modes = gymnasium.vector.AutoresetMode
    if autoreset_mode not in (known := [mode.value for mode in modes]):
        raise ValueError(f"autoreset_mode is {autoreset_mode!r}; it must be one of {', '.join(known)}")
    mode = modes(autoreset_mode)
    trials, actions = environment.trials, environment.actions

    class Trials(gymnasium.vector.VectorEnv):  # type: ignore[misc, name-defined, unused-ignore]
        """See ``as_vector_env``."""

        def __init__(self) -> None:
            self.metadata = {"autoreset_mode": mode}
            self.num_envs = trials
            channels = environment.observation_size + actions + 2
            self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (channels,), np.float32)
            self.single_action_space = gymnasium.spaces.Discrete(actions)
            batch_space = gymnasium.vector.utils.batch_space
            self.observation_space = batch_space(self.single_observation_space, trials)
            self.action_space = batch_space(self.single_action_space, trials)
            self._step = -1  # no trial has begun

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, dict[str, Any]]:
            """Begin new trials."""
            mask = (options or {}).get("reset_mask")
            if mask is not None and not np.all(mask):
                raise ValueError(f"{np.sum(mask)} of {trials} trials are to be reset; they begin and end together")
            super().reset(seed=seed)
            if seed is not None:
                environment.reseed(seed)
            return self._begin(), {}

        def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            """Act in all trials."""
            never = np.zeros(trials, dtype=np.bool_)
            if self._step == environment.steps and mode == modes.NEXT_STEP:
                return self._begin(), np.zeros(trials), never, never.copy(), {}
            action = torch.as_tensor(np.asarray(actions), dtype=torch.int64, device=environment.device)
            seen, reward, done = environment.step(action)
            self._step += 1
            told = F.one_hot(action, environment.actions).float(), reward[:, None], done.float()[:, None]
            observation = torch.cat([seen, *told], dim=1).cpu().numpy()
            over = np.full(trials, self._step == environment.steps)
            infos: dict[str, Any] = {}
            if over.all() and mode == modes.SAME_STEP:
                final = np.empty(trials, dtype=object)
                final[:] = list(observation)
                infos = {"final_obs": final, "_final_obs": over.copy()}
                observation = self._begin()
            return observation, reward.double().cpu().numpy(), over, never, infos

        def _begin(self) -> Any:
            self._step = 0
            return F.pad(environment.reset(), (0, environment.actions + 2)).cpu().numpy()

    return Trials()


class FromGymnasium(Environment):
    """Somebody's vector environment of gymnasium, in which an agent learns within trials as in those here.

    A trial is ``steps`` steps of a sub-environment, through as many episodes as there is time for: it is reset with a
    seed of its own when the trial begins, and resets itself, without one, when an episode ends in between. So that all
    episodes of a trial are the same task, a sub-environment should draw its task when it is given a seed and keep it
    when not. An episode has ended if it is terminated or truncated.

    Where the vector environment resets itself in the step that follows (``AutoresetMode.NEXT_STEP``, gymnasium's
    default), that step is one of the trial's too: its action goes unheard and its reward is 0. ``SAME_STEP`` and
    ``DISABLED`` waste no step.

    Args:
        vector_env: The environment, of discrete actions; a Box observation is flattened, a Discrete one one-hot.
        steps: Steps T of a trial.
        seed: Any integer from 0.
        device: Where the tensors are.
        options: What is given to ``reset`` when a trial begins.

    Raises:
        ImportError: If gymnasium is not installed.
        ValueError: If the actions or observations are of another kind, ``steps`` is not positive, or the seed negative.
    """

    def __init__(
        self,
        vector_env: VectorEnv[Any, Any, Any],
        steps: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        gymnasium = _gymnasium()
        for what, value, least in (("steps", steps, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{what} is {value}; it must be at least {least}")
        spaces, seen, acts = gymnasium.spaces, vector_env.single_observation_space, vector_env.single_action_space
        if not isinstance(acts, spaces.Discrete):
            raise ValueError(f"the action space is {acts}; only Discrete ones can be played")
        if not isinstance(seen, (spaces.Box, spaces.Discrete)):
            raise ValueError(
                f"the observation space is {seen}; flatten it with gymnasium.wrappers.vector.FlattenObservation"
            )
        self.vector_env, self.options = vector_env, dict(options or {})
        self.trials, self.steps, self.device = vector_env.num_envs, steps, torch.device(device)
        self.actions, self._first_action = int(acts.n), int(acts.start)
        self._states = (int(seen.n), int(seen.start)) if isinstance(seen, spaces.Discrete) else None
        self.observation_size = self._states[0] if self._states else int(np.prod(seen.shape))
        mode = vector_env.metadata.get("autoreset_mode", gymnasium.vector.AutoresetMode.NEXT_STEP)
        self._reset_by_hand = mode == gymnasium.vector.AutoresetMode.DISABLED
        name = vector_env.spec.id if vector_env.spec else type(vector_env.unwrapped).__name__
        self.facts = {"environment": name, "steps": steps, "seed": seed}
        self._resets, self._step = 0, steps

    def reset(self) -> Tensor:
        """See ``Environment.reset``."""
        self._resets, self._step = self._resets + 1, 0
        # Sub-environments take seeds from this one on, so it leaves them room below the largest seed.
        seed = key(f"{self.facts}|{self._resets}") % 2**31
        observation, _ = self.vector_env.reset(seed=seed, options=dict(self.options))
        return self._seen(observation)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Environment.step``."""
        if self._step == self.steps:
            state = f"the trials ended after {self.steps} steps" if self._resets else "no trial has begun"
            raise RuntimeError(f"{state}; call reset")
        check_action(action, self)
        self._step += 1
        observation, reward, terminated, truncated, _ = self.vector_env.step(action.cpu().numpy() + self._first_action)
        done = np.logical_or(terminated, truncated)
        if self._reset_by_hand and done.any():
            observation, _ = self.vector_env.reset(options={"reset_mask": done})
        rewards = torch.as_tensor(np.asarray(reward), dtype=torch.float32, device=self.device)
        return self._seen(observation), rewards, torch.as_tensor(done, dtype=torch.bool, device=self.device)

    def _seen(self, observation: Any) -> Tensor:
        if self._states:
            number = torch.as_tensor(np.asarray(observation), dtype=torch.int64, device=self.device) - self._states[1]
            return F.one_hot(number, self._states[0]).float()
        # A copy, as the environment may write the next observation over this one.
        return torch.tensor(np.asarray(observation), dtype=torch.float32, device=self.device).flatten(1)

    def reseed(self, seed: int) -> None:
        """See ``Environment.reseed``."""
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be at least 0")
        self.facts["seed"], self._resets, self._step = seed, 0, self.steps

    def state_dict(self) -> dict[str, Any]:
        """See ``Environment.state_dict``; of use between trials alone, as gymnasium cannot tell where one stands."""
        return {"trials": self.trials, "facts": dict(self.facts), "resets": self._resets, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Environment.load_state_dict``.

        Raises:
            ValueError: If the state is one of other settings, or from within a trial.
        """
        saved, own = (state["trials"], state["facts"]), (self.trials, self.facts)
        if saved != own:
            raise ValueError(f"the state is of {saved[0]} trials of {saved[1]}, these are {own[0]} of {own[1]}")
        if state["step"] != self.steps:
            raise ValueError(f"the state is of step {state['step']} of {self.steps}; save it between trials")
        self._resets, self._step = state["resets"], state["step"]


def _gymnasium() -> Any:
    try:
        import gymnasium
        import gymnasium.vector
    except ImportError as error:
        raise ImportError("gymnasium is not installed; pip install gymnasium") from error
    return gymnasium
