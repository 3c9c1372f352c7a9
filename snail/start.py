"""First weights with which SNAIL answers as a learner of the textbooks does, before any training.

As a matching network (Vinyals et al., 2016), every example counts by how near it is to the query; as a prototypical
one (Snell et al., 2017), every class by how near its mean is. The way from one to the other is what a class varies by:

    |q - mean of k|^2  =  mean of |q - k|^2  -  mean of |k - mean of k|^2

SNAIL reads its examples one after the other and knows no mean until the last; but what each is away from the mean so
far adds up to the same, if it is weighted by j / (j - 1) at the j-th (Welford, 1962), which ``VARIANCE`` stands for.

Axes: ``c`` channels of the embedding, ``n`` ways, ``d`` directions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .blocks import AttentionBlock, DenseBlock, Stack, TCBlock

__all__ = ["STARTS", "Start", "begin_as_matching_network", "begin_as_prototypical_network"]

SMALL = 0.1
"""What embeddings are multiplied by before they are squared: tanh is nearly straight there."""
SOFT = 0.1
"""What squared distances are multiplied by where a softmax is to be so soft that it adds up means."""
VARIANCE = 1.4
"""The middle of j / (j - 1) for classes of up to 5 shots, the first of which is never away from itself."""


def begin_as_matching_network(network: Stack, c: int, n: int, items: Tensor | None = None) -> None:
    """Set weights so that the answer is 10 times ``softmax(-|q - k|^2 / 2) labels``, read by the second attention.

    Products of queries and keys make a squared distance if squares are among their channels. The first layer of
    convolutions makes those (``_square``), which is why embeddings are looked at from an origin in their midst. The
    other layers stay as they are, and the answer does not yet look at them.

    Args:
        network: SNAIL's: attention, convolutions, attention, convolutions, attention, linear layer.
        c: Channels of the embedding, the first of the input; if the first convolutions have fewer pairs of filters,
            distances are those along as many directions.
        n: Ways, the next channels of the input; no more than the second attention reads.
        items: Some embeddings ``(i, c)``. Their mean is the origin, and directions that there is no room for are those
            in which they differ least; if not given, the origin is zero and directions are chosen at random.
    """
    _compare(network, c, n, items, nearness=0.5, sure=10)


def begin_as_prototypical_network(network: Stack, c: int, n: int, items: Tensor | None = None) -> None:
    """Set weights so that, of classes with as many examples each, the likeliest is the one with the nearest mean.

    Nearly so, that is, and 40 times what is read of each is the answer.

    The first attention reads the mean so far of each example's own class, the second layer of convolutions makes what
    the example is away from it, squared, and the second attention adds that to minus the squared distance, of which
    it takes a softmax so soft that a class is read by its mean logit. For embeddings that were trained with a
    prototypical loss, and hence have distances for which that is soft.

    Args:
        network: See ``begin_as_matching_network``.
        c: See there.
        n: Ways; no more than the first attention compares.
        items: See there.
    """
    attention, convolutions = cast(AttentionBlock, network.blocks[0]), cast(TCBlock, network.blocks[1])
    _compare(network, c, n, items, nearness=SOFT, sure=40)
    if len(convolutions.blocks) < 2:
        return  # built for a single example, which is its class's mean
    size, weight, bias = attention.key_size, attention.project.weight, attention.project.bias
    query, key, value = weight[:size], weight[size : 2 * size], weight[2 * size :]
    layer = cast(DenseBlock, convolutions.blocks[1])
    with torch.no_grad():
        directions = _widest(min(attention.value_size, c), c, items).to(weight)  # (d, c)
        d, shift = len(directions), _shift(directions, items)
        weight.zero_(), bias.zero_()
        query[:n, c : c + n] = key[:n, c : c + n] = 4 * size**0.25 * torch.eye(n)  # 16 more for the same label
        value[:d, :c], bias[2 * size : 2 * size + d] = directions, -shift
        away = weight.new_zeros(d, layer.conv.taps.in_features)
        away[:, :c], away[:, c + n : c + n + d] = directions, -torch.eye(d)
        squares = _square(layer, away, -shift)
        compare = cast(AttentionBlock, network.blocks[2])
        one, pairs = compare.key_size**0.25, _pairs(cast(DenseBlock, convolutions.blocks[0]))
        compare.project.weight[compare.key_size + pairs, squares] = SOFT * VARIANCE * one / SMALL**2


def _compare(network: Stack, c: int, n: int, items: Tensor | None, *, nearness: float, sure: float) -> None:
    """``sure`` times ``softmax(-nearness |q - k|^2) labels``, read by the second attention."""
    convolutions, attention, last = (network.blocks[i] for i in (1, 2, -1))
    layer = cast(DenseBlock, cast(TCBlock, convolutions).blocks[0])
    attention, last = cast(AttentionBlock, attention), cast(nn.Linear, last)
    pairs, label = _pairs(layer), slice(c, c + n)
    with torch.no_grad():
        directions = _widest(pairs, c, items if c > pairs else None).to(layer.conv.bias)
        shift = _shift(directions, items)
        seen = directions.new_zeros(pairs, layer.conv.taps.in_features)
        seen[:, :c] = directions
        squares = _square(layer, seen, -shift)

        size, weight, bias = attention.key_size, attention.project.weight, attention.project.bias
        query, key, value = weight[:size], weight[size : 2 * size], weight[2 * size :]
        weight[: 2 * size].zero_(), bias.zero_()
        one = size**0.25  # a channel that is this in query and key adds 1 to the logit
        near = 2 * nearness
        query[:pairs, :c], key[:pairs, :c] = near * one * directions, one * directions
        bias[:pairs], bias[size : size + pairs] = -near * one * shift, -one * shift
        bias[pairs] = bias[size + pairs + 1] = one
        key[pairs, squares] = query[pairs + 1, squares] = -nearness * one / SMALL**2
        # What carries a label has 16 more, or a query, which is nearest to itself, would read itself.
        bias[pairs + 2], key[pairs + 2, label] = 4 * one, 4 * one
        value[:n].zero_()
        value[:n, label] = torch.eye(n)
        last.weight.zero_(), last.bias.zero_()
        last.weight[:, attention.project.in_features :][:, :n] = sure * torch.eye(n)


def _square(layer: DenseBlock, weight: Tensor, bias: Tensor) -> slice:
    """Have a layer make ``SMALL^2 (weight x + bias)^2``; the sum over these of its channels, which are returned.

    A gated pair ``tanh(a) sigmoid(2 a) + tanh(-a) sigmoid(-2 a)`` is ``tanh(a)^2``, for small a its square.
    """
    d, filters, conv = len(weight), _pairs(layer) * 2, layer.conv
    now = conv.taps.weight[-2 * filters :]  # tanh, then gates, of the present step
    for first, factor in ((0, 1), (d, -1), (filters, 2), (filters + d, -2)):
        rows = slice(first, first + d)
        conv.taps.weight[rows].zero_()
        now[rows], conv.bias[rows] = factor * SMALL * weight, factor * SMALL * bias
    return slice(conv.taps.in_features, conv.taps.in_features + 2 * d)


def _pairs(layer: DenseBlock) -> int:
    return (layer.out_channels - layer.conv.taps.in_features) // 2


def _shift(directions: Tensor, items: Tensor | None) -> Tensor:
    """Where the origin is along each direction."""
    return directions.new_zeros(len(directions)) if items is None else directions @ items.mean(0).to(directions)


def _widest(d: int, c: int, items: Tensor | None) -> Tensor:
    """The ``d`` directions, of length 1 and at right angles, in which items differ most: ``(d, c)``."""
    if items is None:
        return nn.init.orthogonal_(torch.empty(d, c))
    return cast(Tensor, torch.linalg.eigh(torch.cov(items.double().T)).eigenvectors.T[-d:])


class Start(NamedTuple):
    """How SNAIL can begin: with how many ways at most, what sets its weights, and what results say of it."""

    most_ways: int
    set_weights: Callable[..., None]
    note: str


STARTS = {
    "matching": Start(128, begin_as_matching_network, "begun as a matching network"),
    "prototypes": Start(64, begin_as_prototypical_network, "begun as a prototypical network"),
}
