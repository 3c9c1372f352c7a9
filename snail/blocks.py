"""The building blocks of SNAIL (Mishra et al., ICLR 2018, section 3.1): causal convolutions and causal attention.

Axes, in this file and in every shape below:
    b  episode (or any batch)    t  step    q  one of several alternatives for the next step    c  channels

Every block reads ``(b, t, c)`` and answers ``(b, t, out_channels)``: the input first, what the block adds behind
it. Three ways to read give the same numbers:

    y = block(x)                      # a whole sequence
    y, state = block.step(x, state)   # piece by piece, pieces of any length; state=None at the start
    y = block.branch(x, state)        # x (b, q, c): each item by itself the one next step; the state stays as it was

Where the paper leaves a choice:
    dilations     its pseudo-code prints 2, 4, 8, ..., its prose wants every past step in view. We start at 1;
                  ``dilation_start=2`` gives the print, whose convolutions reach even offsets only.
    attention     a step attends to itself and to all before it.
    projections   keys, queries and values are affine; the two gates of a DenseBlock have their own weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["AttentionBlock", "Block", "CausalConv1d", "DenseBlock", "Stack", "TCBlock"]


class Block(nn.Module, ABC):
    """A causal map from ``(b, t, c)`` to ``(b, t, out_channels)`` that can also be read in pieces and branched."""

    out_channels: int

    @abstractmethod
    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Read on: ``x`` of ``(b, t, c)``, any ``t >= 1``, behind ``state``; the output and the state after it."""

    @abstractmethod
    def branch(self, x: Tensor, state: Any) -> Tensor:
        """Read each item of ``x`` ``(b, q, c)`` by itself as the step after ``state`` (from ``step``)."""

    def forward(self, x: Tensor) -> Tensor:
        """Read the whole sequence ``(b, t, c)``."""
        return self.step(x)[0]


class Stack(Block):
    """Blocks one behind the other, themselves a block.

    A module without ``step``, such as ``nn.Linear`` or ``nn.LayerNorm``, must act on each step by itself.

    Args:
        *blocks: The blocks and step-wise modules, first to last.
        in_channels: Channels of each step; needed only where no module tells its width, as in an empty stack.

    Shape:
        ``(b, t, c) -> (b, t, out_channels)``, any ``t >= 1``.

    Raises:
        ValueError: If ``out_channels`` cannot be known.
    """

    def __init__(self, *blocks: nn.Module, in_channels: int | None = None) -> None:
        super().__init__()
        widths = [getattr(block, "out_channels", getattr(block, "out_features", None)) for block in blocks]
        known = [width for width in [in_channels, *widths] if width is not None]
        if not known:
            raise ValueError(f"none of the {len(blocks)} modules tells its width; give in_channels")
        self.out_channels = int(known[-1])
        self.blocks = nn.ModuleList(blocks)

    def step(self, x: Tensor, state: Sequence[Any] | None = None) -> tuple[Tensor, list[Any]]:
        """See ``Block.step``; the state is a list, one entry a module."""
        after: list[Any] = []
        for block, before in zip(self.blocks, [None] * len(self.blocks) if state is None else state, strict=True):
            if isinstance(block, Block):
                x, before = block.step(x, before)
            else:
                x = block(x)
            after.append(before)
        return x, after

    def branch(self, x: Tensor, state: Sequence[Any]) -> Tensor:
        """See ``Block.branch``."""
        for block, before in zip(self.blocks, state, strict=True):
            x = block.branch(x, before) if isinstance(block, Block) else block(x)
        return x


class CausalConv1d(Block):
    """Convolution over steps that looks back only: output t is made of inputs t, t - d, ..., t - (kernel_size - 1) d.

    Steps before the first count as zeros. The state holds what past inputs add to later outputs, already
    projected, so that a branch costs one tap however wide the kernel is.

    Args:
        in_channels: Channels of each step.
        out_channels: Channels of the answer.
        kernel_size: Taps; 2 in all of the paper's experiments.
        dilation: Steps between two taps.

    Shape:
        ``(b, t, in_channels) -> (b, t, out_channels)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 2, dilation: int = 1) -> None:
        super().__init__()
        _require_positive(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, dilation=dilation
        )
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.receptive_field = (kernel_size - 1) * dilation + 1
        # One matrix applies all taps: rows [i * out_channels, (i + 1) * out_channels) are tap i, the oldest first.
        self.taps = nn.Linear(in_channels, kernel_size * out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = 1 / math.sqrt(in_channels * kernel_size)  # torch's default for a convolution of this fan-in
        nn.init.uniform_(self.taps.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def step(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """See ``Block.step``; the state is ``(b, receptive_field - 1, (kernel_size - 1) * out_channels)`` in pieces."""
        past, now = self.taps(x).tensor_split([-self.out_channels], dim=-1)
        # Pieces stay apart: a step reads the oldest, and copies nothing of what lies between.
        past = [F.pad(past, (0, 0, self.receptive_field - 1, 0))] if state is None else [*state, past]
        return self._add_past(now + self.bias, past, x.shape[1]), _without_first(past, x.shape[1])

    def branch(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """See ``Block.branch``."""
        y = F.linear(x, self.taps.weight[-self.out_channels :], self.bias)
        return self._add_past(y, state, 1)

    def _add_past(self, y: Tensor, past: list[Tensor], steps: int) -> Tensor:
        """Add what the older taps found to ``steps`` outputs; the first reaches back to the start of ``past``."""
        for tap in range(self.kernel_size - 1):
            column = tap * self.out_channels
            found = _first(_without_first(past, tap * self.dilation), steps)
            y = y + found[..., column : column + self.out_channels]
        return y


class DenseBlock(Block):
    """A gated causal convolution, its answer behind its input: ``concat(x, tanh(conv_f x) * sigmoid(conv_g x))``.

    Args:
        in_channels: Channels of each step.
        dilation: Steps between the two taps.
        filters: Channels that are appended.

    Shape:
        ``(b, t, in_channels) -> (b, t, in_channels + filters)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, in_channels: int, dilation: int, filters: int) -> None:
        super().__init__()
        _require_positive(in_channels=in_channels, dilation=dilation, filters=filters)
        self.out_channels = in_channels + filters
        self.conv = CausalConv1d(in_channels, 2 * filters, dilation=dilation)  # f and g, each with its own weights
        self.receptive_field = self.conv.receptive_field

    def step(self, x: Tensor, state: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """See ``Block.step``; the state is the convolution's."""
        y, state = self.conv.step(x, state)
        return self._append(x, y), state

    def branch(self, x: Tensor, state: list[Tensor]) -> Tensor:
        """See ``Block.branch``."""
        return self._append(x, self.conv.branch(x, state))

    @staticmethod
    def _append(x: Tensor, y: Tensor) -> Tensor:
        f, g = y.chunk(2, dim=-1)
        return torch.cat([x, (torch.tanh(f) * torch.sigmoid(g)).to(x.dtype)], dim=-1)


class TCBlock(Stack):
    """Dense causal convolutions whose dilations double until every one of ``seq_len`` steps is in view.

        x ─┬───────────────┬───────────────┬─ ... ─► concat: (b, t, in_channels + layers * filters)
           └─ Dense, d = 1 ┴─ Dense, d = 2 ┴─ ...         layers = ceil(log2(seq_len))

    Args:
        in_channels: Channels of each step.
        seq_len: Longest sequence that the last step must see end to end; longer ones are read too, and then the
            last ``receptive_field`` steps count.
        filters: Channels that each dense layer appends.
        dilation_start: First dilation. 1 reaches every step; 2 is the paper's pseudo-code as printed, which leaves
            every second step out of reach.

    Shape:
        ``(b, t, in_channels) -> (b, t, out_channels)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is not positive.
    """

    def __init__(self, in_channels: int, seq_len: int, filters: int, *, dilation_start: int = 1) -> None:
        _require_positive(in_channels=in_channels, seq_len=seq_len, filters=filters, dilation_start=dilation_start)
        layers = (seq_len - 1).bit_length()  # ceil(log2(seq_len)), in integers
        dilations = [dilation_start * 2**i for i in range(layers)]
        super().__init__(
            *(DenseBlock(in_channels + i * filters, d, filters) for i, d in enumerate(dilations)),
            in_channels=in_channels,
        )
        self.receptive_field = 1 + sum(dilations)


class AttentionBlock(Block):
    """One head of soft attention over the steps so far, its read laid behind the input.

    ``concat(x, softmax(mask(Q K^T / sqrt(key_size))) V)``; the weights of a step over its keys sum to one. The
    softmax is written out because fused attention has no second derivative, which gradient-based learners need. A long
    sequence is read ``rows`` steps at a time, and their weights are computed again in the backward pass: time grows
    with the square of the length, but memory with the length (where a second derivative is asked, with its square).

    Args:
        in_channels: Channels of each step.
        key_size: Channels of keys and queries.
        value_size: Channels of the read, which are appended.

    Shape:
        ``(b, t, in_channels) -> (b, t, in_channels + value_size)``, any ``t >= 1``.

    Raises:
        ValueError: If a size is not positive.
    """

    rows = 1024

    def __init__(self, in_channels: int, key_size: int, value_size: int) -> None:
        super().__init__()
        _require_positive(in_channels=in_channels, key_size=key_size, value_size=value_size)
        self.out_channels = in_channels + value_size
        self.key_size = key_size
        self.value_size = value_size
        self.project = nn.Linear(in_channels, 2 * key_size + value_size)  # query, key and value of a step

    def weights(self, x: Tensor) -> Tensor:
        """How much each step of ``x`` ``(b, t, c)`` reads of each: ``(b, t, t)``, rows sum to one, future zero."""
        query, key, _ = self._project(x)
        return self._attend(query, key)

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """See ``Block.step``; the state is all keys ``(b, t, key_size)`` and values ``(b, t, value_size)`` so far."""
        query, key, value = self._project(x)
        if state is not None:
            key, value = torch.cat([state[0], key], dim=1), torch.cat([state[1], value], dim=1)
        read = self._read(query, key, value)
        return torch.cat([x, read.to(x.dtype)], dim=-1), (key, value)

    def branch(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """See ``Block.branch``."""
        query, key, value = self._project(x)
        weights = self._attend_past_and_self(query, key, state[0]).to(value.dtype)
        past, own = weights.tensor_split([-1], dim=-1)
        read = past @ state[1] + own * value
        return torch.cat([x, read.to(x.dtype)], dim=-1)

    def branch_weights(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """How much each item of a branch reads of each of the t steps before it and, last, of itself: (b, q, t + 1)."""
        query, key, _ = self._project(x)
        return self._attend_past_and_self(query, key, state[0])

    def _read(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the last ``t`` steps, whose queries are given, read of all ``s`` values: ``(b, t, value_size)``."""
        t, s = query.shape[1], key.shape[1]
        if t <= self.rows:
            return self._attend(query, key).to(value.dtype) @ value
        reads = []
        for first in range(0, t, self.rows):
            end = min(first + self.rows, t)
            seen = s - t + end  # keys up to the last of these steps
            given = query[:, first:end], key[:, :seen], value[:, :seen]
            reads.append(checkpoint(self._read, *given, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(reads, dim=1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.project(x).split([self.key_size, self.key_size, self.value_size], dim=-1)
        return query / math.sqrt(self.key_size), key, value

    @staticmethod
    def _attend_past_and_self(query: Tensor, key: Tensor, past_keys: Tensor) -> Tensor:
        past_logits = query @ past_keys.transpose(1, 2)  # (b, q, t)
        own_logit = (query * key).sum(-1, keepdim=True)  # (b, q, 1): an item sees itself, never its siblings
        return torch.cat([past_logits, own_logit], dim=-1).softmax(dim=-1)

    @staticmethod
    def _attend(query: Tensor, key: Tensor) -> Tensor:
        """Weights of the last ``t`` steps, whose queries are given, over all ``s`` keys: ``(b, t, s)``."""
        logits = query @ key.transpose(1, 2)
        t, s = logits.shape[-2:]
        if t > 1:  # a single last step has no future to hide
            future = torch.ones(t, s, dtype=torch.bool, device=logits.device).triu(s - t + 1)
            logits = logits.masked_fill(future, float("-inf"))
        return logits.softmax(dim=-1)


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1")


def _first(pieces: Sequence[Tensor], steps: int) -> Tensor:
    """The first steps of what lies in pieces one behind the other, each ``(b, any, c)``."""
    found: list[Tensor] = []
    for piece in pieces:
        found.append(piece[:, :steps])
        steps -= found[-1].shape[1]
        if steps == 0:
            break
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _without_first(pieces: Sequence[Tensor], steps: int) -> list[Tensor]:
    """All but the first steps of what lies in pieces, as pieces."""
    for i, piece in enumerate(pieces):
        if steps < piece.shape[1]:
            return [piece[:, steps:], *pieces[i + 1 :]]
        steps -= piece.shape[1]
    return []
