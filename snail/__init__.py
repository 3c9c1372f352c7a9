"""SNAIL and its relatives: few-shot learning as reading a sequence.

The causal blocks stand on their own (``TCBlock``, ``AttentionBlock``); ``SNAIL`` is the paper's network made of
them; ``evaluate`` scores any learner on seeded episodes. Data sets are in ``snail.datasets``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .blocks import AttentionBlock, Block, CausalConv1d, DenseBlock, Stack, TCBlock
from .embeddings import Conv4, ResidualEmbedding
from .episodes import Episode
from .evaluation import Result, evaluate
from .learner import EmbeddingLearner, Learner
from .maml import ANIL, BOIL, MAML, FineTuning, FirstOrderMAML, ImplicitMAML, MAMLPlusPlus, MetaSGD, Reptile
from .metric import MatchingNetwork, NearestNeighbour, ProtoNet
from .sequences import serialize
from .snail import SNAIL

if TYPE_CHECKING:
    from .module import FewShot

__all__ = [
    "ANIL",
    "BOIL",
    "MAML",
    "SNAIL",
    "AttentionBlock",
    "Block",
    "CausalConv1d",
    "Conv4",
    "DenseBlock",
    "EmbeddingLearner",
    "Episode",
    "FewShot",
    "FineTuning",
    "FirstOrderMAML",
    "ImplicitMAML",
    "Learner",
    "MAMLPlusPlus",
    "MatchingNetwork",
    "MetaSGD",
    "NearestNeighbour",
    "ProtoNet",
    "Reptile",
    "ResidualEmbedding",
    "Result",
    "Stack",
    "TCBlock",
    "evaluate",
    "serialize",
]


def __getattr__(name: str) -> Any:
    """Import the Lightning module only when it is asked for: the blocks do not need Lightning."""
    if name == "FewShot":
        from .module import FewShot

        return FewShot
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
