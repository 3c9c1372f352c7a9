"""The strategies of the textbooks, played as a learned agent is: what SNAIL is measured against in section 5.2.

Each is a ``Player`` that plays all trials of an environment at once. Ties are broken at random. The chance that a
player uses is a function of its seed and of the number of times that it has begun, so that playing again with a new
player of the same seed gives the same actions.
"""

from __future__ import annotations

from . import bandits, mdps
from .bandits import UCB1, EpsilonGreedy, Gittins, Greedy, LikeliestThompson, OptimisticThompson, Thompson
from .gittins import bayes_optimal_value, gittins_index
from .mdps import OPSRL, PSRL, UCRL2, KnownMDP, MDPEpsilonGreedy, MDPGreedy
from .players import Player, Random, choose, play

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

GRIDS = bandits.GRIDS | mdps.GRIDS
"""The constants to choose among for each strategy that has one."""
