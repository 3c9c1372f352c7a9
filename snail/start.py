"""First weights with which SNAIL answers as a matching network (Vinyals et al., 2016) before any training.

Axes: ``c`` channels of the embedding, ``n`` ways.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .blocks import AttentionBlock, DenseBlock, Stack, TCBlock

__all__ = ["begin_as_matching_network"]

SMALL = 0.1
"""What embeddings are multiplied by before they are squared: tanh is nearly straight there."""


def begin_as_matching_network(network: Stack, c: int, n: int, origin: Tensor | None = None) -> None:
    """Set weights so that the answer is 10 times ``softmax(-|q - k|^2 / 2) labels``, read by the second attention.

    Products of queries and keys make a squared distance if squares are among their channels. The first layer of
    convolutions makes those: a gated pair ``tanh(a) sigmoid(2 a) + tanh(-a) sigmoid(-2 a)`` is ``tanh(a)^2``, for small
    a its square, which is why embeddings are looked at from an origin in their midst. The other layers stay as they
    are, and the answer does not yet look at them.

    Args:
        network: SNAIL's: attention, convolutions, attention, convolutions, attention, linear layer.
        c: Channels of the embedding, the first of the input; if the first convolutions have fewer pairs of filters,
            distances are those along as many random directions.
        n: Ways, the next channels of the input; no more than the second attention reads.
        origin: The mean embedding ``(c,)``; zero if not given.
    """
    convolutions, attention, last = (network.blocks[i] for i in (1, 2, -1))
    layer = cast(DenseBlock, cast(TCBlock, convolutions).blocks[0])
    attention, last, conv = cast(AttentionBlock, attention), cast(nn.Linear, last), layer.conv
    filters, label = layer.out_channels - conv.taps.in_features, slice(c, c + n)
    pairs, squares = filters // 2, slice(conv.taps.in_features, layer.out_channels)
    with torch.no_grad():
        directions = nn.init.orthogonal_(conv.bias.new_empty(pairs, c))
        shift = 0 if origin is None else directions @ origin.to(directions)
        conv.taps.weight.zero_(), conv.bias.zero_()
        now = conv.taps.weight[-2 * filters :]  # tanh, then gates, of the present step
        for i, factor in enumerate((1, -1, 2, -2)):
            now[i * pairs : (i + 1) * pairs, :c] = factor * SMALL * directions
            conv.bias[i * pairs : (i + 1) * pairs] = -factor * SMALL * shift

        size, weight, bias = attention.key_size, attention.project.weight, attention.project.bias
        query, key, value = weight[:size], weight[size : 2 * size], weight[2 * size :]
        weight[: 2 * size].zero_(), bias.zero_()
        one = size**0.25  # a channel that is this in query and key adds 1 to the logit
        query[:pairs, :c] = key[:pairs, :c] = one * directions
        bias[:pairs] = bias[size : size + pairs] = -one * shift
        bias[pairs] = bias[size + pairs + 1] = one
        key[pairs, squares] = query[pairs + 1, squares] = -one / (2 * SMALL**2)
        # What carries a label has 16 more, or a query, which is nearest to itself, would read itself.
        bias[pairs + 2], key[pairs + 2, label] = 4 * one, 4 * one
        value[:n].zero_()
        value[:n, label] = torch.eye(n)
        last.weight.zero_(), last.bias.zero_()
        last.weight[:, attention.project.in_features :][:, :n] = 10 * torch.eye(n)
