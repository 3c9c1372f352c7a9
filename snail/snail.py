"""SNAIL, the simple neural attentive meta-learner (Mishra et al., ICLR 2018), for few-shot classification.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``n`` ways, ``k`` shots, ``c`` channels of the embedding.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AttentionBlock, Block, Stack, TCBlock
from .episodes import Episode
from .learner import EmbeddingLearner, answer_loss, precise
from .metric import prototypes, shifted_logits
from .sequences import serialize
from .start import STARTS

__all__ = ["SNAIL"]


class SNAIL(EmbeddingLearner):
    """Reads an episode as a sequence of labelled examples and answers an unlabelled one at the last position.

    The paper's network (section 5.1 and figure 2): attention 64/32, temporal convolutions of 128, attention 256/128,
    temporal convolutions of 128, attention 512/256, a linear layer to ``ways`` logits. An episode's support is read
    once; each query is then a branch of its own, as if it alone stood at the last position, so that an episode costs
    s + q positions and equals q separate sequences.

    Args:
        embedding: Any module from ``(items, *item)`` to ``(items, embedding_dim)``.
        embedding_dim: Channels c of the embedding.
        ways: Classes in an episode. Taken from the data on the command line.
        max_shots: Most examples of a class the network is built for; one model serves every shot up to it. Taken
            from the data on the command line.
        dilation_start: First dilation of the temporal convolutions: 1 sees every step, 2 is the paper's printed one.
        layers: ``all`` as in the paper; ``attention`` or ``convolutions`` leaves the others out, to see what they do.
        prototype_loss: Weight of a second loss in training, the prototypical one on the embedding of the same
            episodes. The paper has none (0); it leaves the way that SNAIL answers as it is.
        prototypes: Which prototypes the second loss has a query choose among: those of its own ``episode``, or of all
            episodes of the ``batch``, which is harder and so teaches more. A class that happens to be in two of them
            counts as two there.
        start: Where training begins: with ``random`` layers; or ``matching``, with layers set so that they answer as a
            matching network does, or ``prototypes``, as a prototypical network does, for an embedding that was
            trained for one (``snail/start.py``). All of them are there and are trained as otherwise. ``begin`` puts
            them in the midst of the embeddings, which the command does before the first step.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, ways)``, raw logits.

    Raises:
        ValueError: If a size is not positive, or an episode holds more than ``ways * max_shots`` support items.
    """

    ways: int
    max_shots: int

    def __init__(
        self,
        embedding: nn.Module,
        embedding_dim: int,
        ways: int,
        max_shots: int,
        *,
        dilation_start: int = 1,
        layers: Literal["all", "attention", "convolutions"] = "all",
        prototype_loss: float = 0.0,
        prototypes: Literal["episode", "batch"] = "episode",
        start: Literal["random", "matching", "prototypes"] = "random",
    ) -> None:
        super().__init__(embedding)
        for what, size in (("embedding_dim", embedding_dim), ("ways", ways), ("max_shots", max_shots)):
            if size < 1:
                raise ValueError(f"{what} is {size}; it must be at least 1")
        if prototype_loss < 0:
            raise ValueError(f"prototype_loss is {prototype_loss}; it must be at least 0")
        self.ways = ways
        self.max_shots = max_shots
        self.embedding_dim = embedding_dim
        for what, word, words in (
            ("layers", layers, ("all", "attention", "convolutions")),
            ("prototypes", prototypes, ("episode", "batch")),
            ("start", start, ("random", *STARTS)),
        ):
            if word not in words:
                raise ValueError(f"{what} is {word!r}; choose {', '.join(words[:-1])} or {words[-1]}")
        self.prototype_loss, self.prototypes = prototype_loss, prototypes
        seq_len = ways * max_shots + 1
        blocks: list[AttentionBlock | TCBlock] = []
        channels = embedding_dim + ways
        for key_size, value_size, filters in ((64, 32, 128), (256, 128, 128), (512, 256, None)):
            if layers != "convolutions":
                blocks.append(AttentionBlock(channels, key_size, value_size))
                channels = blocks[-1].out_channels
            if layers != "attention" and filters is not None:
                blocks.append(TCBlock(channels, seq_len, filters, dilation_start=dilation_start))
                channels = blocks[-1].out_channels
        self.layers, self.start = layers, start
        self.network = Stack(*blocks, nn.Linear(channels, ways))
        if start in STARTS:
            most, set_weights, _ = STARTS[start]
            if layers != "all" or ways > most:
                raise ValueError(
                    f"start is {start!r}, which needs all layers (here {layers}) and at most {most} ways (here {ways})"
                )
            set_weights(self.network, embedding_dim, ways)

    def begin(self, items: Tensor) -> None:
        """See ``Learner.begin``; a start as another learner takes its origin from these items' embeddings."""
        if self.start in STARTS:
            with torch.no_grad():  # as in training, by the items' own statistics, and without keeping them
                embedded = copy.deepcopy(self.embedding).train()(items)
            STARTS[self.start].set_weights(self.network, self.embedding_dim, self.ways, embedded)

    @property
    def note(self) -> str:
        """See ``Learner.note``; it tells of what is left out and of a second loss."""
        told = [] if self.layers == "all" else [f"{self.layers} alone"]
        if self.prototype_loss:
            told.append(f"prototype loss {self.prototype_loss:g}" + " over the batch" * (self.prototypes == "batch"))
        if self.start in STARTS:
            told.append(STARTS[self.start].note)
        return ", ".join(told)

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Learner.loss``: the cross-entropy at the last position, as in the paper, and the second loss if any."""
        if not self.prototype_loss:
            return super().loss(episode)
        support, query = self.embed(episode.support_x, episode.query_x)
        loss, logs = answer_loss(self.answer(support, episode.support_y, query), episode)
        second = self._prototype_loss(precise(support), precise(query), episode)
        return loss + self.prototype_loss * second, logs | {"loss_at_last_position": loss.detach()}

    def _prototype_loss(self, support: Tensor, query: Tensor, episode: Episode) -> Tensor:
        centres, truth = prototypes(support, episode.support_y, self.ways), episode.query_y  # (b, n, c), (b, q)
        if self.prototypes == "batch":  # as one episode of all classes
            first = self.ways * torch.arange(len(episode), device=query.device).unsqueeze(1)
            centres, query, truth = (t.flatten(0, 1).unsqueeze(0) for t in (centres, query, first + truth))
        return F.cross_entropy(shifted_logits(query, centres).flatten(0, 1), truth.flatten().long())

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        """See ``EmbeddingLearner.answer``."""
        _, state = self.network.step(self._sequence(support, support_y))
        return self.network.branch(serialize(query, None, self.ways), state)

    def attention(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor | None:
        """See ``Learner.attention``: the mean over the three attention blocks; ``None`` if they are left out."""
        support, query = self.embed(support_x, query_x)
        _, state = self.network.step(self._sequence(support, support_y))
        x, weights = serialize(query, None, self.ways), []
        for block, before in zip(self.network.blocks, state, strict=True):
            if isinstance(block, AttentionBlock):
                weights.append(block.branch_weights(x, before)[..., :-1])
            x = block.branch(x, before) if isinstance(block, Block) else block(x)
        return torch.stack(weights).mean(0) if weights else None

    def _sequence(self, support: Tensor, support_y: Tensor) -> Tensor:
        if support.shape[-1] != self.embedding_dim:
            raise ValueError(
                f"the embedding has {support.shape[-1]} channels, but embedding_dim is {self.embedding_dim}; set it so"
            )
        if support.shape[1] > self.ways * self.max_shots:
            raise ValueError(
                f"an episode of {support.shape[1]} support items is longer than this SNAIL was built for: "
                f"{self.ways} ways x {self.max_shots} shots; build it with a larger max_shots"
            )
        return serialize(support, support_y, self.ways)
