"""Meta reinforcement learning: environments, the strategies of the textbooks, agents that learn, and PPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import strategies
from .agents import Agent, RL2Agent, SNAILAgent, Trials, roll_out
from .environments import Bandits, Environment, TabularMDPs, value_iteration
from .gym import FromGymnasium, as_vector_env

if TYPE_CHECKING:
    from .ppo import PPO

__all__ = [
    "PPO",
    "Agent",
    "Bandits",
    "Environment",
    "FromGymnasium",
    "RL2Agent",
    "SNAILAgent",
    "TabularMDPs",
    "Trials",
    "as_vector_env",
    "roll_out",
    "strategies",
    "value_iteration",
]


def __getattr__(name: str) -> Any:
    """Import the Lightning module only when it is asked for."""
    if name == "PPO":
        from .ppo import PPO

        return PPO
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
