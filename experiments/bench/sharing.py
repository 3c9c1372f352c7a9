"""``snail bench sharing``: what reading a shared past once gains over reading it anew for every answer.

Two ways to the same numbers are timed in turn, A B A B ..., on one model in one process, so that what else the machine
does falls on both. What is quoted is their ratio. Before a pair is timed it must agree in float64.

Axes: ``b`` episode, ``s`` support items, ``q`` query items, ``n`` ways, ``t`` step, ``c`` channels.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from snail import SNAIL, AttentionBlock, Block, Conv4, Episode, Learner, Stack, TCBlock, serialize

from ..options import whole_number
from .common import BenchParser, about_run, compare, largest_difference, write_report

__all__ = ["OneQueryASequence", "main", "markdown_table", "read_again", "read_on"]

SETTINGS = ((5, 1), (5, 5), (20, 5))  # ways, shots
QUERIES = (1, 15)  # a class
CLASSES = 40  # in a batch, unless --episodes is given: 8 episodes of 5 ways, 2 of 20


# -- a training step -------------------------------------------------------------------------------------------------


class OneQueryASequence(Learner):
    """A SNAIL read the plain way: each query at the end of a sequence of its own, with its own copy of the support.

    Args:
        snail: The network, whose parts are used without its own shortcut.

    Shape:
        ``(b, s, *item), (b, s), (b, q, *item) -> (b, q, n)``, the logits of ``snail`` (in evaluation mode: in training
        batch norm sees every copy).
    """

    def __init__(self, snail: SNAIL) -> None:
        super().__init__()
        self.snail = snail

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        """See ``Learner.forward``."""
        b, q = query_x.shape[:2]
        items = torch.cat([support_x.repeat_interleave(q, 0), query_x.flatten(0, 1).unsqueeze(1)], dim=1)
        labels = F.pad(support_y.repeat_interleave(q, 0), (0, 1), value=-1)  # (b q, s + 1), the query's unknown
        embedded = self.snail.embedding(items.flatten(0, 1)).unflatten(0, items.shape[:2])
        answers: Tensor = self.snail.network(serialize(embedded, labels, self.snail.ways))
        return answers[:, -1].reshape(b, q, self.snail.ways)


def _time_training(ways: int, shots: int, queries: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time a training step with ``queries`` a class: over one support an episode, against one query a sequence."""
    b = options.episodes or max(1, CLASSES // ways)
    snail = SNAIL(Conv4(), 64, ways, shots)
    plain = OneQueryASequence(snail)
    optimizer = torch.optim.Adam(snail.parameters())
    support_y, query_y = (torch.rand(b, ways * each).argsort() % ways for each in (shots, queries))
    support_x, query_x = (torch.rand(*y.shape, 1, 28, 28) for y in (support_y, query_y))
    whole = Episode(support_x, support_y, query_x, query_y, ways=ways)
    fits = max(1, min(ways * queries, options.sample_images // (ways * shots + 1) // b))  # queries an episode
    sample = Episode(support_x, support_y, query_x[:, :fits], query_y[:, :fits], ways=ways)

    with torch.no_grad():
        exact = copy.deepcopy(plain).double().eval()
        few = support_x[:2].double(), support_y[:2], query_x[:2, :2].double()
        difference = largest_difference(exact.snail(*few), exact(*few), "one support and one query a sequence")

    def seconds_per_query(learner: Learner, episode: Episode) -> float:
        """The update is made once for the whole batch, so that each of its queries bears the same share of it."""
        optimizer.zero_grad()
        start = time.perf_counter()
        torch.autograd.backward(learner.loss(episode)[0])
        middle = time.perf_counter()
        optimizer.step()
        return (middle - start) / episode.query_y.numel() + (time.perf_counter() - middle) / query_y.numel()

    setting = {"ways": ways, "shots": shots, "queries_per_class": queries, "episodes": b}
    setting |= {"queries": query_y.numel(), "sample": sample.query_y.numel(), "max_difference": difference}
    return setting | compare(
        lambda: seconds_per_query(snail, whole), lambda: seconds_per_query(plain, sample), pairs=options.pairs
    )


# -- a stream --------------------------------------------------------------------------------------------------------


def read_on(network: Block, x: Tensor) -> Tensor:
    """Read ``x`` ``(b, t, c)`` one step at a time with a state: ``(b, t, out_channels)``."""
    state, outputs = None, []
    for i in range(x.shape[1]):
        y, state = network.step(x[:, i : i + 1], state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def read_again(network: Block, x: Tensor, positions: Sequence[int]) -> Tensor:
    """The output at each of the ``positions`` of ``x`` ``(b, t, c)``, each time by reading all up to it."""
    return torch.cat([network(x[:, : i + 1])[:, -1:] for i in positions], dim=1)


@torch.no_grad()
def _time_stream(options: argparse.Namespace) -> dict[str, Any]:
    """Time a step of a sequence that is read on, against reading all of it again (mean over some positions)."""
    convolutions = TCBlock(64, options.length, 128)
    network = Stack(convolutions, AttentionBlock(convolutions.out_channels, 256, 128))
    x = torch.randn(1, options.length, 64)
    parts = min(options.length, options.positions)
    positions = [(2 * i + 1) * options.length // (2 * parts) for i in range(parts)]  # the middles of equal parts

    exact, exact_x = copy.deepcopy(network).double(), x.double()
    difference = largest_difference(
        read_on(exact, exact_x)[:, positions],
        read_again(exact, exact_x, positions),
        "a stream read on and read again",
    )

    def seconds_per_step(read: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        steps = read().shape[1]
        return (time.perf_counter() - start) / steps

    return {"length": options.length, "positions": positions, "max_difference": difference} | compare(
        lambda: seconds_per_step(lambda: read_on(network, x)),
        lambda: seconds_per_step(lambda: read_again(network, x, positions)),
        pairs=options.pairs,
    )


# -- what is printed -------------------------------------------------------------------------------------------------


def _row(name: str, queries: str, timing: dict[str, Any], sample: str) -> str:
    ratio = f"{timing['ratio']:.2f} ({timing['ratio_min']:.2f}-{timing['ratio_max']:.2f})"
    shared, plain, pairs = f"{timing['shared_ms']:.3f}", f"{timing['plain_ms']:.3f}", str(len(timing["pairs"]))
    return _line(name, queries, shared, plain, ratio, pairs, sample)


def _line(name: str, queries: str, shared: str, plain: str, ratio: str, pairs: str, sample: str) -> str:
    return f"{name:<15}{queries:>15}{shared:>17}{plain:>16}{ratio:>25}{pairs:>7}  {sample}"


def markdown_table(report: dict[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    rows = [
        (
            f"{t['ways']}-way {t['shots']}-shot, {t['queries_per_class']} a class",
            t,
            f"{t['sample']} of {t['queries']} queries",
        )
        for t in report["training"]
    ]
    stream = report["stream"]
    positions = f"{len(stream['positions'])} of {stream['length']:,} positions"
    rows.append((f"a step of a stream of {stream['length']:,}", stream, positions))
    lines = [
        "| " + " | ".join(("", "shared, ms", "plain, ms", "ratio (spread)", "plain way timed on")) + " |",
        "| --- " * 5 + "|",
    ]
    for name, t, sample in rows:
        ratio = f"{t['ratio']:.1f} ({t['ratio_min']:.1f} to {t['ratio_max']:.1f})"
        lines.append(f"| {name} | {t['shared_ms']:.2f} | {t['plain_ms']:.2f} | {ratio} | {sample} |")
    pairs = len(stream["pairs"])
    where = f"{report['hardware']}, torch {report['versions']['torch']}"
    facts = f"{where}, median of {pairs} pairs, load {report['load']} in the minute before."
    return "\n".join([*lines, "", facts])


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "sharing",
        f"""Time on the CPU, in float32, what reading a shared past once gains over reading it anew.

training step   SNAIL with Conv4 on 28x28 random images: all queries of an episode over one support, against one
                query a sequence with its own copy of the support; forward, loss, backward and Adam, per query
streamed step   a sequence read step by step with a state, against recomputing the whole at each step

The two are first checked to agree, then timed in turn; OMP_NUM_THREADS sets the threads of both
({torch.get_num_threads()} now). Run it on a machine that does nothing else; only ratios carry over to another.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--pairs", type=whole_number, default=7, help="how often both ways are timed" + default)
    add("--episodes", type=whole_number, help=f"episodes in a batch (default: {CLASSES} // ways)")
    add("--sample_images", type=whole_number, default=1600, help="most images the plain way embeds at once, one query "
        "an episode at least; where all queries need more, a part of them is timed" + default)  # fmt: skip
    add("--length", type=whole_number, default=1000, help="steps of the stream" + default)
    add("--positions", type=whole_number, default=20, help="positions at which the stream is read again" + default)
    return parser.read(argv, pairs=2, episodes=2, length=32, positions=2)


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench sharing``.

    Args:
        argv: The command line behind ``bench sharing``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or the two ways of a pair do not agree.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    torch.manual_seed(0)
    report = about_run(options) | {"training": []}

    head = ("ratio median (min-max)", "pairs", "plain way timed on")
    print("\n" + _line("training step", "queries a class", "shared ms/query", "plain ms/query", *head), flush=True)
    for ways, shots in SETTINGS[:1] if options.quick else SETTINGS:
        for queries in QUERIES[:1] if options.quick else QUERIES:
            row = _time_training(ways, shots, queries, options)
            report["training"].append(row)
            sample = f"{row['sample']} of {row['queries']} queries"
            print(_row(f"{ways}-way {shots}-shot", f"{queries}", row, sample), flush=True)

    print("\n" + _line("streamed step", "", "shared ms/step", "plain ms/step", *head), flush=True)
    row = report["stream"] = _time_stream(options)
    print(_row(f"{row['length']:,} steps", "", row, f"{len(row['positions'])} of {row['length']:,} positions"))

    write_report(report, options.output)
    return 0
