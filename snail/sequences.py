"""Episodes as sequences: the one place where labels enter what a network reads.

Axes: ``b`` episode, ``t`` step, ``c`` channels of the embedding, ``n`` ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["serialize"]


def serialize(embedded: Tensor, labels: Tensor | None, ways: int) -> Tensor:
    """Lay each item's label, one-hot, behind its embedding; zeros where the label is unknown.

    A 3-way 1-shot episode and its query, drawn a step a row::

                 embedding (c)      label (n = 3)
        support  [ .31 -.2 ... ]    [ 0  1  0 ]
        support  [ .87  .1 ... ]    [ 1  0  0 ]
        support  [ -.4  .9 ... ]    [ 0  0  1 ]
        query    [ .85  .2 ... ]    [ 0  0  0 ]   <- the answer is read here

    The paper (section 5.1) feeds example-label pairs; ports differ between one-hot and a scalar. We use one-hot.

    Args:
        embedded: ``(b, t, c)``, floating.
        labels: ``(b, t)``, integers in ``[0, ways)``, -1 where unknown; ``None`` if none is known.
        ways: Number of classes n.

    Returns:
        ``(b, t, c + n)``, of the embedding's dtype.

    Raises:
        ValueError: If shapes or dtypes do not fit, ``ways`` is not positive, or a label is outside ``[-1, ways)``
            (checked on the CPU only, where it costs no synchronisation).
    """
    if embedded.ndim != 3:
        raise ValueError(f"embedded has shape {tuple(embedded.shape)}; (b, t, c) is needed")
    if ways < 1:
        raise ValueError(f"ways is {ways}; it must be at least 1")
    if labels is None:
        return torch.nn.functional.pad(embedded, (0, ways))
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}; integers are needed")
    if labels.shape != embedded.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit {tuple(embedded.shape[:2])} steps")
    if labels.device.type == "cpu" and labels.numel() and not -1 <= int(labels.min()) <= int(labels.max()) < ways:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; {ways} ways allow -1 to {ways - 1}"
        )
    one_hot = labels.unsqueeze(-1) == torch.arange(ways, device=labels.device)  # -1 matches no column
    return torch.cat([embedded, one_hot.to(embedded.dtype)], dim=-1)
