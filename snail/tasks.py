"""Run one network for many tasks at once, each task with weights of its own.

Any ``nn.Module`` goes in as it is. While it runs, a few of its operations mean something else: batch norm takes the
statistics that the task calls for, and attention takes a path that can be differentiated twice.

Axes: ``b`` task (an episode), ``i`` items of a task, ``c`` channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from .second_order import batch_norm, conv2d, max_pool2d

__all__ = ["Statistics", "batch_norm_layers", "run_tasks", "side_by_side"]

T = TypeVar("T")

Statistics = dict[str, tuple[Tensor, Tensor]]
"""Mean and variance of each batch-norm layer, by the layer's name."""


def batch_norm_layers(network: nn.Module) -> dict[str, _BatchNorm]:
    """The batch-norm layers of a network by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}


def run_tasks(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    items: Tensor,
    *,
    shared: Mapping[str, Tensor] | None = None,
    counted: int | None = None,
    averages: Statistics | None = None,
    find: bool = False,
) -> tuple[Tensor, Statistics]:
    """The network's output for each task, under the task's own weights.

    Args:
        network: Any module from ``(i, *item)`` to ``(i, *out)``. The averages of its batch-norm layers do not change.
        weights: Parameters that differ from task to task, by name, each ``(b, *shape)``. What is not named is the
            network's own, the same for all.
        items: ``(b, i, *item)``.
        shared: Parameters to use for all tasks in the place of the network's own.
        counted: Batch norm takes the statistics of the first so many items of each task and normalises all by them; by
            default of all.
        averages: Statistics for batch norm to use in the place of the items' own.
        find: Whether the statistics that batch norm finds are wanted.

    Returns:
        The output ``(b, i, *out)``, and with ``find`` the statistics that batch norm found, each ``(b, c)`` and without
        a gradient; the variance is the unbiased one, as torch keeps it.

    Raises:
        ValueError: If batch norm has a single value a channel to take statistics of.
    """

    def one(own: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Statistics]:
        share = 1.0 if counted is None else counted / len(x)
        mode = _TaskOperations(network, own, share, averages, find, alone=len(items) == 1)
        # The network sees no parameter itself: torch takes a lock where a gradient ends, and two threads that use the
        # same parameter, one of them in a Function of Python's, can wait for each other without end.
        given = {**(shared or {}), **own}
        others = {name: one.view_as(one) for name, one in network.named_parameters() if name not in given}
        with mode:
            output = functional_call(network, {**others, **given}, (x,))
        return output, mode.found

    # Fused attention has no second derivative; the plain path has.
    with sdpa_kernel(SDPBackend.MATH), _layers_in_evaluation(network):
        if len(items) > 1:
            outputs: tuple[Tensor, Statistics] = vmap(one, randomness="different")(dict(weights), items)
            return outputs
        # One task alone is run as it is, which takes fewer calls.
        output, found = one({name: weight.squeeze(0) for name, weight in weights.items()}, items.squeeze(0))
        return output.unsqueeze(0), {name: (mean[None], var[None]) for name, (mean, var) in found.items()}


@contextlib.contextmanager
def _layers_in_evaluation(network: nn.Module) -> Iterator[None]:
    """Batch-norm layers in evaluation mode, in which they change nothing in themselves."""
    modes = {layer: layer.training for layer in batch_norm_layers(network).values()}
    for layer in modes:
        layer.training = False
    try:
        yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


class _TaskOperations(TorchFunctionMode):
    """What some operations mean while a network runs for one task.

    Batch norm and pooling are those of ``second_order``: with weights of each task torch's own batch norm has a second
    derivative under ``vmap`` that is silently wrong, and elsewhere a slow one. On a GPU so are small convolutions by
    weights of each task.
    """

    products_on = ("cuda",)
    """Devices on which a convolution of many tasks, each with weights of its own, is done as a product of matrices."""
    most_numbers = 1_000_000
    """In one matrix of a task. On an H200 it took a fifth to a third less time up to there, and more with more."""

    def __init__(
        self,
        network: nn.Module,
        own: Mapping[str, Tensor],
        share: float,
        averages: Statistics | None,
        find: bool,
        alone: bool,
    ) -> None:
        super().__init__()
        self.own = () if alone else tuple(map(id, own.values()))
        self.share = share  # of the items that statistics are taken of; they come first
        self.averages = averages
        self.find = find
        self.alone = alone
        self.found: Statistics = {}
        self.channels_last = any(_lies_channels_last(parameter) for parameter in network.parameters())
        # A layer is known by its buffer, which is what the operation is called with.
        self.names = {id(layer.running_mean): name for name, layer in batch_norm_layers(network).items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called in the place of every torch operation."""
        kwargs = dict(kwargs or {})
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func is F.conv2d and id(kwargs.get("weight", args[1:] and args[1])) in self.own:
            return self._conv2d(*args, **kwargs)
        if func is F.max_pool2d:
            return max_pool2d(self._laid_out(args[0]), *args[1:], **kwargs, channels_last=self.channels_last)
        if func in (torch.Tensor.contiguous, torch.Tensor.to):  # vmap knows no other memory format than the plain one
            kwargs.pop("memory_format", None)
        if func is F.adaptive_avg_pool2d and args[1:] in ((1,), ((1, 1),)):  # slow under vmap, and the same as this
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **kwargs)

    def _conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> Tensor:
        plain = groups == 1 and tuple(_pair(dilation)) == (1, 1) and input.ndim == 4 and not isinstance(padding, str)
        if plain and input.device.type in self.products_on:
            down, right = _pair(stride)
            places = input[:, 0].numel() // (down * right)  # or so
            if places * weight[0].numel() <= self.most_numbers:
                return conv2d(input, weight, bias, (down, right), _pair(cast(Any, padding)))
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        name = None if running_mean is None else self.names.get(id(running_mean))
        if self.averages is not None:
            if name is None or name not in self.averages:
                raise ValueError(
                    "batch norm called as a function keeps no averages; take batch_norm='inductive', or make it a layer"
                )
            return _normalise(input, *self.averages[name], weight, bias, eps)
        counted = input[: round(self.share * len(input))]
        values = counted.numel() // counted.shape[1]
        if values < 2:
            raise ValueError(
                f"batch norm has {values} value a channel in a support of {len(counted)} item, of which there are no "
                f"statistics; give more shots or ways, or take batch_norm='running'"
            )
        if len(counted) == len(input):
            output, mean, var = batch_norm(self._laid_out(input), weight, bias, eps, channels_last=self.channels_last)
        else:
            var, mean = torch.var_mean(counted, [0, *range(2, input.ndim)], correction=0)
            output = _normalise(input, mean, var, weight, bias, eps)
        if self.find and name is not None:
            self.found[name] = mean.detach(), var.detach() * (values / (values - 1))
        return output

    def _laid_out(self, maps: Tensor) -> Tensor:
        """Maps of a task alone; those of several are laid out where ``vmap`` puts them side by side."""
        alone = self.channels_last and self.alone and maps.ndim == 4
        return maps.contiguous(memory_format=torch.channels_last) if alone else maps


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _lies_channels_last(weight: Tensor) -> bool:
    """Whether a convolution's weights are laid out so, on a CPU, where it matters."""
    last = weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    return last and weight.device.type == "cpu"


def _normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    along_channels = (1, -1) + (1,) * (x.ndim - 2)
    normal = (x - mean.view(along_channels)) * torch.rsqrt(var + eps).view(along_channels)
    if weight is not None:
        normal = normal * weight.view(along_channels)
    return normal if bias is None else normal + bias.view(along_channels)


def side_by_side(jobs: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Do jobs on some threads of one processor core each.

    Two small networks, each on a core of its own, are through sooner than both on two cores, one after the other.

    Args:
        jobs: Called without arguments, under the caller's autocast; job i on thread ``i % threads``. Jobs of different
            threads must not write to the same module.
        threads: How many; with 1 the jobs are done here, one after the other, on as many cores as torch uses.

    Returns:
        What each job gives, in their order.
    """
    if threads <= 1:
        return [job() for job in jobs]
    half, dtype, gradients = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()

    def some(first: int) -> list[T]:
        with torch.autocast("cpu", dtype, half), torch.set_grad_enabled(gradients):  # of each thread by itself
            return [job() for job in jobs[first::threads]]

    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Fused attention is switched off here too: the switch is the process's, and each job puts back what it found.
        with sdpa_kernel(SDPBackend.MATH):
            futures = [_pool(threads - 1).submit(some, first) for first in range(1, threads)]
            try:
                done = [some(0)]
            finally:
                wait(futures)
            done += [future.result() for future in futures]
    finally:
        torch.set_num_threads(cores)
    return [done[i % threads][i // threads] for i in range(len(jobs))]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay, and with them the memory that they have warmed up."""
    return ThreadPoolExecutor(threads, "snail", initializer=torch.set_num_threads, initargs=(1,))
