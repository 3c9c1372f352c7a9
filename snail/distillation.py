"""An embedding that learns to be another's, such as a wider one that would be too much to answer with.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``c`` channels of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .episodes import Episode
from .learner import EmbeddingLearner, answer_loss, precise

__all__ = ["imitation_loss"]


def imitation_loss(learner: EmbeddingLearner, teacher: nn.Module, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
    """How far the embeddings of a learner are from a teacher's of the same items; labels do not count.

    It says of every item where it belongs, in numbers as many as channels, which an answer that is right already says
    no more. The "hints" of Romero et al., 2015 (section 2.2), here of the last layer.

    Args:
        learner: Its embedding is trained, and nothing behind that.
        teacher: Any module ``(items, *item) -> (items, c)``, with c that of the learner; it is not trained. In
            evaluation mode it says the same of an item whatever is beside it.
        episode: A batch of episodes.

    Returns:
        The mean squared distance, and the accuracy in [0, 1] of the learner's answers.

    Raises:
        ValueError: If the two embeddings differ in their channels.
    """
    support, query = learner.embed(episode.support_x, episode.query_x)
    own = precise(torch.cat([support, query], dim=1))  # (b, s + q, c)
    items = torch.cat([episode.support_x, episode.query_x], dim=1)
    with torch.no_grad():
        theirs = precise(teacher(items.flatten(0, 1)))
        theirs = theirs.view(*items.shape[:2], theirs.shape[-1])
        _, logs = answer_loss(learner.answer(support, episode.support_y, query), episode)
    if own.shape != theirs.shape:
        raise ValueError(
            f"the teacher's embedding has {theirs.shape[-1]} channels and the learner's {own.shape[-1]}; "
            f"give both as many, for instance with out_features"
        )
    return (own - theirs).square().sum(-1).mean(), logs
