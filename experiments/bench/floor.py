"""How long a training step takes at least: what it cannot do without, at the rates that the device really reaches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..levers import bf16_is_fast

__all__ = ["count", "floor", "rates", "seconds_each", "synchronise"]


# -- what a step cannot do without -------------------------------------------------------------------------------------


def _convolution_backward(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **kwargs: Any,
) -> int:
    """Operations of a convolution's two gradients, each as many as forward; torch's own count takes groups for one."""
    forward = 2 * x[0] * prod(weight) * prod((x if transposed else grad_out)[2:])
    return sum(output_mask[:2]) * forward


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that matrix products and convolutions write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            each = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            self.bytes += sum(tensor.nbytes for tensor in each if isinstance(tensor, Tensor))
        return outputs


def count(step: Callable[[], object], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What a step cannot do without.

    Args:
        step: Goes forward and backward and takes a step of ``optimizer``, all of it begun in this thread.
        optimizer: Of the parameters.

    Returns:
        ``operations`` of its matrix products and convolutions; ``product_bytes``: what these write, written once and
        read once; ``update_bytes``: the parameters that have a gradient and the optimiser's state of them, read once
        and written once.

    Raises:
        ValueError: If no operation was seen.
    """
    gradients = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=gradients) as counter, _Written() as written:
        step()
    operations = counter.get_total_flops()
    if not operations:
        raise ValueError("no matrix product was seen in the step; its operations cannot be counted")
    updated = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [value for p in updated for value in optimizer.state[p].values() if isinstance(value, Tensor)]
    update = 2 * sum(tensor.nbytes for tensor in [*updated, *state])
    return {"operations": operations, "product_bytes": 2 * written.bytes, "update_bytes": update}


# -- what the device reaches -------------------------------------------------------------------------------------------


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_each(work: Callable[[], object], device: str, times: int) -> float:
    """The seconds that ``work`` takes, by a block of ``times`` between two synchronisations."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - start) / times


def rates(device: str, *, size: int, copied: int, times: int) -> dict[str, Any]:
    """What the device reaches, each the best of some measurements.

    Args:
        device: ``cuda`` or ``cpu``.
        size: Rows and columns of the matrices that are multiplied.
        copied: Bytes that are copied.
        times: How often each is measured.

    Returns:
        ``size`` and ``copied``; ``float32`` and ``bfloat16``: operations a second in a matrix product (``None`` if the
        device does not multiply it in hardware); ``copy``: bytes a second, read and written both counted.
    """

    def best(work: Callable[[], object]) -> float:
        work()
        return min(seconds_each(work, device, 1) for _ in range(times))

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        return 2 * size**3 / best(lambda: torch.mm(a, b, out=out))

    reached: dict[str, Any] = {"size": size, "copied": copied, "float32": product(torch.float32)}
    if device == "cuda":  # convolutions take TF32 unless told otherwise
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        reached["float32"] = max(reached["float32"], product(torch.float32))
        torch.set_float32_matmul_precision(before)
    reached["bfloat16"] = product(torch.bfloat16) if bf16_is_fast(device) else None
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return reached | {"copy": 2 * copied / best(lambda: target.copy_(source))}


def floor(counts: Mapping[str, int], dtype: str, reached: Mapping[str, Any]) -> dict[str, Any]:
    """The time in milliseconds that a step takes at least.

    Args:
        counts: From ``count``.
        dtype: Of its products.
        reached: From ``rates``.

    Returns:
        ``operations_ms`` and ``bytes_ms``, the longer of them as ``ms``, and which that is as ``binds``.
    """
    times = {
        "operations": 1000 * counts["operations"] / reached[dtype],
        "bytes": 1000 * (counts["product_bytes"] + counts["update_bytes"]) / reached["copy"],
    }
    binds = max(times, key=lambda name: times[name])
    return {"operations_ms": times["operations"], "bytes_ms": times["bytes"], "ms": times[binds], "binds": binds}
