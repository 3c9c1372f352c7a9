"""Work on a GPU that is the same each time, recorded once and replayed (CUDA graphs).

Where the kernels are small, to start them one by one takes longer than to run them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["Recorded"]

T = TypeVar("T")


class Recorded(Generic[T]):
    """A function of tensors on a GPU: run as it is at first, recorded for each shape, and replayed from then on.

    What it does must depend on its arguments' values in nothing but numbers on the GPU, at which it must not look. What
    it returns is written over by the next call.

    Args:
        function: Takes tensors on one GPU and returns anything that holds tensors.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self.function = function
        self._recordings: dict[Hashable, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], T]] = {}
        self._read: Hashable = None

    def __call__(self, *arguments: Tensor, reads: Iterable[Tensor] = (), depends_on: Hashable = None) -> T:
        """The function of ``arguments``.

        Args:
            arguments: Tensors, whose shapes and types choose the recording.
            reads: Other tensors that it reads, such as parameters; if they come to lie elsewhere all is recorded anew.
            depends_on: What else chooses the recording.
        """
        read = tuple((x.data_ptr(), x.requires_grad) for x in reads)
        if read != self._read:
            self._recordings, self._read = {}, read
        key = tuple((x.shape, x.dtype, x.device) for x in arguments), depends_on
        if key not in self._recordings:
            self._recordings[key] = self._record(*arguments)
        graph, given, outcome = self._recordings[key]
        for mine, argument in zip(given, arguments, strict=True):
            mine.copy_(argument)
        graph.replay()
        return outcome

    def __getstate__(self) -> dict[str, Any]:
        """All but the recordings, of which a copy makes its own."""
        return {"function": self.function, "_recordings": {}, "_read": None}

    def _record(self, *arguments: Tensor) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], T]:
        device = arguments[0].device
        given = tuple(x.clone() for x in arguments)
        # A few runs beforehand choose algorithms and take memory, on a stream of their own, as torch asks for.
        with torch.cuda.device(device), torch.random.fork_rng([device]):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.function(*given)
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            outcome = self.function(*given)
        return graph, given, outcome
