"""Layers that are differentiated twice at little cost, for one task or many under ``vmap``.

The inner loop differentiates through its own gradients. Beside convolutions that time goes into these two: torch writes
the second derivative of batch norm as some twenty passes over the maps, of which the closed form here needs five; and
pooling, like batch norm, is several times slower where the layout of the maps is lost on the way. On a GPU small
convolutions of which each task has weights of its own are slow themselves.

Axes: ``i`` item, ``c`` channel, ``b`` task under ``vmap``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["batch_norm", "conv2d", "max_pool2d"]


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Convolve ``x`` ``(i, c, h, w)`` as one product of matrices, of what each place sees and the weights.

    For weights that differ from task to task: ``vmap`` makes one batch of products of them, but of ``torch.conv2d``
    groups of channels, which are slower on a GPU while they are small.

    Args:
        x: ``(i, c, h, w)``.
        weight: ``(o, c, kh, kw)``.
        bias: ``(o,)``; 0 if not given.
        stride: Along h and w.
        padding: Zeros on either side, likewise.

    Returns:
        ``(i, o, *)``.
    """
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).permute(0, 2, 3, 1)
    seen = x.unfold(1, weight.shape[2], stride[0]).unfold(2, weight.shape[3], stride[1])  # (i, h, w, c, kh, kw)
    i, h, w = seen.shape[:3]
    y = seen.reshape(i * h * w, -1) @ weight.flatten(1).T
    return (y if bias is None else y + bias).view(i, h, w, -1).permute(0, 3, 1, 2)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, channels_last: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each channel by the mean and the variance of ``x`` itself, then scale and shift it.

    Args:
        x: ``(i, c, *)``.
        weight: ``(c,)``; 1 if not given.
        bias: ``(c,)``; 0 if not given.
        eps: Is added to the variance.
        channels_last: Whether maps of many tasks are laid out so.

    Returns:
        The normalised ``(i, c, *)``, and as constants the mean and the (biased) variance, each ``(c,)``.
    """
    kept = torch.promote_types(x.dtype, torch.float32)
    weight = torch.ones(x.shape[1], dtype=kept, device=x.device) if weight is None else weight
    bias = torch.zeros(x.shape[1], dtype=kept, device=x.device) if bias is None else bias
    y, mean, scale = _BatchNorm.apply(x, weight, bias, eps, channels_last)
    return y, mean, scale.square().reciprocal() - eps


class _BatchNorm(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, channels_last: bool) -> Any:
        return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.eps, _ = inputs
        _, mean, scale = output
        ctx.mark_non_differentiable(mean, scale)
        ctx.save_for_backward(x, weight, mean, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *constants: Tensor) -> Any:
        return *_BatchNormGradient.apply(gradient, *ctx.saved_tensors, ctx.eps), None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, channels_last: bool) -> Any:
        tasks = info.batch_size
        folded = _side_by_side(x, dims[0], tasks, channels_last)
        weights = [
            (one.expand(tasks, -1) if dim is None else one.movedim(dim, 0)).flatten()
            for one, dim in ((weight, dims[1]), (bias, dims[2]))
        ]
        y, mean, scale = _BatchNorm.apply(folded, *weights, eps, channels_last)
        return (y.unflatten(1, (tasks, -1)), mean.view(tasks, -1), scale.view(tasks, -1)), (1, 0, 0)


class _BatchNormGradient(Function):
    """From the gradient by what batch norm gives: those by ``x``, ``weight`` and ``bias``."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Any:
        return _gradient(_laid_out_as(x, gradient), x, weight, mean, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        gradient, x, weight, mean, scale, ctx.eps = inputs
        _, by_weight, by_bias = output
        ctx.save_for_backward(gradient, x, weight, mean, scale, by_weight, by_bias)

    @staticmethod
    def backward(ctx: Any, u: Tensor, u_weight: Tensor, u_bias: Tensor) -> Any:
        if torch.is_grad_enabled():
            return *_second_derivative_step_by_step(ctx, u, u_weight, u_bias), None, None, None
        # With z = (x - mean) scale, g the gradient, w the weight, n numbers in a channel and ~ for means over them,
        # forward gave  w scale (g - ~g - z ~(g z)),  n ~(g z)  and  n ~g.  Their product with u, u_weight and u_bias is
        # n (w scale (~(u g) - ~u ~g - ~(u z) ~(g z)) + u_weight ~(g z) + u_bias ~g),  of which the gradients are:
        g, x, w, mean, scale, by_weight, by_bias = ctx.saved_tensors
        u, g = _laid_out_as(x, u), _laid_out_as(x, g)
        n = x.numel() // x.shape[1]
        mean_g, mean_gz = by_bias / n, by_weight / n
        by_g, sum_uz, sum_u = _gradient(u, x, w, mean, scale, ctx.eps)  # has the form of the gradient itself
        mean_uz, mean_u = sum_uz / n, sum_u / n
        mean_ug = (u * g).sum([0, *range(2, x.ndim)], dtype=mean_uz.dtype) / n
        inner = mean_ug - mean_u * mean_g - mean_uz * mean_gz
        a, v = -w * scale.square(), u_weight * scale
        of_u, of_g, of_z = a * mean_gz, a * mean_uz + v, a * (inner - 2 * mean_uz * mean_gz) - v * mean_gz
        shift = -of_u * mean_u - of_g * mean_g - of_z * scale * mean
        by_x = _channels(shift, x).addcmul(_channels(of_z * scale, x), x)
        by_x.addcmul_(_channels(of_u, x), u).addcmul_(_channels(of_g, x), g)
        by_g = by_g.addcmul_(_channels(v, x), x).add_(_channels(u_bias - v * mean, x))
        return by_g, by_x, n * scale * inner, None, None, None


def _gradient(gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> Any:
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(gradient, x, weight, None, None, mean, scale, True, eps, [True, True, True])


def _second_derivative_step_by_step(ctx: Any, *along: Tensor) -> tuple[Tensor, ...]:
    """By the gradient, ``x`` and ``weight``, such that a third derivative can be taken: the slow way."""
    # Each is a variable of its own here, although one may have come from another.
    gradient, x, weight = (
        one.view_as(one) if one.requires_grad else one.detach().requires_grad_() for one in ctx.saved_tensors[:3]
    )
    var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
    bias = torch.zeros_like(mean, requires_grad=True)
    normal = (x - _channels(mean, x)) * _channels((var + ctx.eps).rsqrt(), x)
    y = normal * _channels(weight, x) + _channels(bias, x)
    first = torch.autograd.grad(y, (x, weight, bias), gradient, create_graph=True)
    return torch.autograd.grad(first, (gradient, x, weight), along, create_graph=True)


def _channels(numbers: Tensor, maps: Tensor) -> Tensor:
    """A number for each channel, to be combined with maps."""
    return numbers.to(maps.dtype).view(-1, *(1,) * (maps.ndim - 2))


def max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    channels_last: bool = False,
) -> Any:
    """See ``torch.nn.functional.max_pool2d``; ``channels_last`` says how maps of many tasks are laid out."""
    options = (kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    pooled, indices = _MaxPool.apply(x, options, channels_last)
    return (pooled, indices) if return_indices else pooled


class _MaxPool(Function):
    @staticmethod
    def forward(x: Tensor, options: tuple[Any, ...], channels_last: bool) -> Any:
        return torch.ops.aten.max_pool2d_with_indices(x, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.options, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *constants: Tensor) -> Any:
        return _MaxPoolGradient.apply(gradient, *ctx.saved_tensors, ctx.options), None, None

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, options: tuple[Any, ...], channels_last: bool) -> Any:
        folded = _side_by_side(x, dims[0], info.batch_size, channels_last)
        pooled, indices = _MaxPool.apply(folded, options, channels_last)
        return tuple(out.unflatten(1, (info.batch_size, -1)) for out in (pooled, indices)), (1, 1)


class _MaxPoolGradient(Function):
    """From the gradient by what pooling gives: that by what it takes."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor, indices: Tensor, options: tuple[Any, ...]) -> Tensor:
        backward: Any = torch.ops.aten.max_pool2d_with_indices_backward
        by_x: Tensor = backward(_laid_out_as(x, gradient), x, *options, indices)
        return by_x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        u = _laid_out_as(indices, u)
        # Each maximum's own number, taken along the axes of the map where they lie in memory.
        if _is_channels_last(indices):
            places = indices.permute(0, 2, 3, 1)
            taken = u.permute(0, 2, 3, 1).flatten(1, 2).gather(1, places.flatten(1, 2))
            return taken.view(places.shape).permute(0, 3, 1, 2), None, None, None
        return u.flatten(2).gather(2, indices.flatten(2)).view(indices.shape), None, None, None


def _side_by_side(x: Tensor, dim: int | None, tasks: int, channels_last: bool) -> Tensor:
    """The channels of all tasks beside each other, ``(i, b c, *)``, which is how a grouped convolution leaves them."""
    maps = x.expand(tasks, *x.shape) if dim is None else x.movedim(dim, 0)
    folded = maps.transpose(0, 1).flatten(1, 2)
    return folded.contiguous(memory_format=torch.channels_last) if channels_last and folded.ndim == 4 else folded


def _is_channels_last(maps: Tensor) -> bool:
    return maps.ndim == 4 and not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last)


def _laid_out_as(maps: Tensor, other: Tensor) -> Tensor:
    return other.contiguous(memory_format=torch.channels_last if _is_channels_last(maps) else torch.contiguous_format)
