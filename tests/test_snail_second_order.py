"""Batch norm and max pooling that are differentiated twice: against torch's own, and finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from snail.second_order import batch_norm, max_pool2d

LAYOUTS = {"plain": torch.contiguous_format, "channels last": torch.channels_last}


def numbers(*shape: int, layout: str = "plain") -> Tensor:
    torch.manual_seed(0)
    drawn = torch.randn(*shape, dtype=torch.float64)
    return (drawn.to(memory_format=LAYOUTS[layout]) if len(shape) == 4 else drawn).requires_grad_()


def normal(x: Tensor, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor:
    return batch_norm(x, weight, bias, 1e-5, **options)[0]


def derivatives(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, its gradient by each input, and the gradients of those gradients, all along fixed directions."""
    output = function(*inputs)
    along = [
        torch.sin(torch.arange(x.numel(), dtype=x.dtype) + i).view(x.shape) for i, x in enumerate((output, *inputs))
    ]
    first = torch.autograd.grad(output, inputs, along[0], create_graph=True)
    second = torch.autograd.grad(first, inputs, along[1:], allow_unused=True)
    return [output, *first, *(s for s in second if s is not None)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 4, 4), (2, 3, 2, 2, 2)])
def test_batch_norm_and_both_derivatives_are_those_of_torch(shape: tuple[int, ...], layout: str) -> None:
    inputs = numbers(*shape, layout=layout), numbers(3), numbers(3)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)

    for ours, theirs in zip(derivatives(normal, *inputs), derivatives(torchs, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_norm_tells_the_mean_and_the_biased_variance() -> None:
    x = numbers(4, 3, 2, 2)
    _, mean, var = batch_norm(x, None, None, 1e-5)
    torch.testing.assert_close(mean, x.mean([0, 2, 3]).detach())
    torch.testing.assert_close(var, x.var([0, 2, 3], correction=0).detach())
    assert not mean.requires_grad
    assert not var.requires_grad


def test_batch_norm_without_weights_only_normalises() -> None:
    x = numbers(4, 3, 2, 2)
    torch.testing.assert_close(normal(x, None, None), F.batch_norm(x, None, None, None, None, True, 0.0, 1e-5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weights_of_each", [True, False])
def test_batch_norm_of_many_tasks_is_that_of_each(layout: str, weights_of_each: bool) -> None:
    x, last = numbers(5, 4, 3, 4, 4), layout == "channels last"
    weight, bias = (numbers(5, 3), numbers(5, 3)) if weights_of_each else (numbers(3), numbers(3))
    dims = (0, 0, 0) if weights_of_each else (0, None, None)

    def together(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return vmap(lambda *one: normal(*one, channels_last=last), dims)(x, weight, bias)

    def one_by_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        each = zip(
            *(one if dim == 0 else [one] * 5 for one, dim in zip((x, weight, bias), dims, strict=True)), strict=True
        )
        return torch.stack([normal(*one) for one in each])

    for ours, theirs in zip(
        derivatives(together, x, weight, bias), derivatives(one_by_one, x, weight, bias), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    torch.autograd.gradgradcheck(together, (x, weight, bias))


POOLINGS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 1), "ceil_mode": True},
    {"kernel_size": 2, "stride": 1, "dilation": 2},
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", POOLINGS)
def test_pooling_and_both_derivatives_are_those_of_torch(options: dict[str, Any], layout: str) -> None:
    x = numbers(4, 3, 5, 6, layout=layout)
    # Cubed, because pooling alone has no second derivative; what flows through it is what is looked at.
    ours = derivatives(lambda x: max_pool2d(x, **options).pow(3), x)
    theirs = derivatives(lambda x: F.max_pool2d(x, **options).pow(3), x)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    torch.autograd.gradgradcheck(lambda x: max_pool2d(x, **options), (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pooling_of_many_tasks_is_that_of_each(layout: str) -> None:
    x, last = numbers(5, 4, 3, 4, 4), layout == "channels last"
    together = derivatives(lambda x: vmap(lambda one: max_pool2d(one, 2, channels_last=last))(x).pow(3), x)
    one_by_one = derivatives(lambda x: torch.stack([max_pool2d(one, 2) for one in x]).pow(3), x)
    for ours, theirs in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pooling_tells_where_the_largest_was() -> None:
    x = numbers(2, 3, 4, 4)
    for ours, theirs in zip(
        max_pool2d(x, 2, return_indices=True), F.max_pool2d(x, 2, return_indices=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_layout_is_kept_through_every_derivative() -> None:
    x = numbers(4, 3, 4, 4, layout="channels last")
    for output in derivatives(lambda x, w, b: max_pool2d(normal(x, w, b), 2), x, numbers(3), numbers(3)):
        assert output.ndim < 4 or output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("asked", ["x", "x and weight"])
def test_a_third_derivative_is_right_too(asked: str) -> None:
    x, weight = numbers(4, 3), numbers(3)
    inputs = (x, weight) if asked == "x and weight" else (x,)

    def third(norm: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        total = norm(x, weight).pow(3).sum()
        for _ in range(2):
            total = sum(g.pow(2).sum() for g in torch.autograd.grad(total, inputs, create_graph=True))
        return torch.autograd.grad(total, inputs)

    def by_hand(x: Tensor, weight: Tensor) -> Tensor:  # torch's own has no third derivative
        return (x - x.mean(0)) * (x.var(0, correction=0) + 1e-5).rsqrt() * weight

    ours, theirs = third(lambda x, weight: normal(x, weight, None)), third(by_hand)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
