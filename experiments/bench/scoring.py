"""``snail bench scoring``: what embedding each test image once gains over embedding it anew for every query.

Two ways to the same scores are timed in turn, A B A B ...: ``snail.evaluate`` as it is, which embeds a pool of images
once and reads each episode's support once, and one query a sequence, each with its own copy of the support. What is
quoted is their ratio. Before they are timed they must give each episode of the sample the same score in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snail import SNAIL, Conv4, Learner, evaluate
from snail.datasets import Episodes, Glyphs, ImageData, Omniglot
from snail.evaluation import Scorer

from ..options import whole_number
from .common import BenchParser, about_run, compare, largest_difference, write_report
from .sharing import OneQueryASequence

__all__ = ["CountedEmbedding", "check_scores", "main", "markdown_table", "time_scoring"]

WAYS, SHOTS, QUERIES = 5, 1, 1  # queries a class
ASKED = 10  # times as fast
EMBEDDED_AT_ONCE = 512  # images; as many as `snail.evaluate` takes, and faster than more for the plain way too


class CountedEmbedding(nn.Module):
    """An embedding that counts the images that go through it, and the seconds that they take.

    Args:
        embedding: Any module from ``(items, *item)`` to ``(items, c)``.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.reset()

    def reset(self) -> None:
        """Count from 0."""
        self.images, self.seconds = 0, 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Embed ``(items, *item)`` as ``(items, c)``."""
        start = time.perf_counter()
        embedded: Tensor = self.embedding(images)
        self.images, self.seconds = self.images + len(images), self.seconds + time.perf_counter() - start
        return embedded


@torch.no_grad()
def check_scores(snail: SNAIL, sample: Episodes) -> dict[str, float]:
    """Check in float64 that both ways answer alike, and give each episode of a sample the same score.

    Returns:
        ``max_difference`` of the logits of the first batch, and ``accuracy`` on the sample in percent.

    Raises:
        ValueError: If they do not.
    """
    plain = OneQueryASequence(copy.deepcopy(snail).double()).eval()
    few = next(iter(sample)).map_items(Tensor.double)
    inputs = few.support_x, few.support_y, few.query_x
    logits = plain.snail(*inputs)
    difference = largest_difference(logits, plain(*inputs), "one support and one query a sequence")
    *_, bias = plain.snail.network.parameters()
    bias.sub_(logits.mean((0, 1)))  # an untrained network would say nearly the same to all, and any scores would agree
    ours, theirs = (_scores(learner, sample) for learner in (plain.snail, plain))
    if not torch.equal(ours, theirs):
        raise ValueError(f"the two ways give {int((ours != theirs).sum())} of {len(ours)} episodes different scores")
    return {"max_difference": difference, "accuracy": 100 * float(ours.mean())}


def _scores(learner: Learner, episodes: Episodes) -> Tensor:
    scorer = Scorer(learner, episodes.images)
    return torch.cat([scorer(batch)[-1] for batch in episodes.drawn])


def time_scoring(data: ImageData, options: argparse.Namespace) -> dict[str, Any]:
    """Time the scoring of test episodes both ways.

    Args:
        data: Whose test images are scored.
        options: ``episodes`` that our way scores, ``sample`` that the plain way scores, and ``pairs``.

    Returns:
        What ``common.compare`` gives, in milliseconds of an episode; ``max_difference`` and ``accuracy`` of
        ``check_scores``; the images that each way embedded; the share of our time that embedding took, in each pair
        and at the median.

    Raises:
        ValueError: If the two ways do not agree.
    """
    embedding = CountedEmbedding(Conv4())
    snail = SNAIL(embedding, 64, WAYS, SHOTS)
    episodes = data.episodes("test", ways=WAYS, shots=SHOTS, queries=QUERIES, count=options.episodes, seed=0)
    at_once = EMBEDDED_AT_ONCE // (WAYS * QUERIES * (WAYS * SHOTS + 1))
    sample = replace(episodes, count=options.sample, batch_size=at_once)
    row: dict[str, Any] = {"data": data.dataset, "split_hash": episodes.facts["split_hash"]}
    row |= {"ways": WAYS, "shots": SHOTS, "queries_per_class": QUERIES}
    row |= {"episodes": episodes.count, "sample": sample.count} | check_scores(snail, sample)

    shares: list[float] = []

    def seconds_per_episode(learner: Learner, what: Episodes, images: str) -> float:
        embedding.reset()
        start = time.perf_counter()
        evaluate(learner, what)
        seconds = time.perf_counter() - start
        row[images] = embedding.images
        if learner is snail:
            shares.append(embedding.seconds / seconds)
        return seconds / what.count

    plain = OneQueryASequence(snail)
    row |= compare(
        lambda: seconds_per_episode(snail, episodes, "images"),
        lambda: seconds_per_episode(plain, sample, "sample_images"),
        pairs=options.pairs,
    )
    shares = shares[1:]  # of the pairs that count
    return row | {"embedding_share": statistics.median(shares), "embedding_shares": shares}


# -- what is printed -------------------------------------------------------------------------------------------------


def markdown_table(report: dict[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    row = report["scoring"]
    episodes, sample = row["episodes"], row["sample"]
    shared, plain = (row[way] * episodes / 1000 for way in ("shared_ms", "plain_ms"))
    ratio = f"{row['ratio']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
    name = f"{row['data']}, {row['ways']}-way {row['shots']}-shot, {row['queries_per_class']} a class"
    images = f"{row['images']:,} against {row['sample_images'] * episodes // sample:,}"
    lines = [
        f"| {episodes:,} episodes | here, s | one query a sequence, s | ratio (spread) | asked | images embedded |",
        "| --- " * 6 + "|",
        f"| {name} | {shared:.1f} | {plain:.1f} | {ratio} | at least {ASKED} | {images} |",
    ]
    where = f"{report['hardware']}, torch {report['versions']['torch']}{', memory kept' * report['keep_memory']}"
    return "\n".join(
        [*lines, "",
         f"One query a sequence was timed on {sample:,} of the episodes and scaled to all. "
         f"Embedding took {100 * row['embedding_share']:.0f} % of the time here.",
         f"{where}, median of {len(row['pairs'])} pairs, load {report['load']} in the minute before."]
    )  # fmt: skip


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "scoring",
        f"""Time the scoring of {WAYS}-way {SHOTS}-shot test episodes with {QUERIES} query a class on the
CPU, in float32: snail.evaluate, which embeds each test image once and reads each support once, against one query
a sequence, which embeds and reads its support and itself anew.

The two are first checked to give the same scores, then timed in turn, the plain way on a sample of the episodes;
OMP_NUM_THREADS sets the threads of both ({torch.get_num_threads()} now). Run it on a machine that does nothing
else.""",
        quick="smaller defaults: a trial, not a measurement",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--omniglot", type=Path, metavar="DIR", help="score on Omniglot, in this folder, in the place of glyphs")
    add("--pairs", type=whole_number, default=5, help="how often both ways are timed" + default)
    add("--episodes", type=whole_number, default=10_000, help="episodes that are scored" + default)
    add("--sample", type=whole_number, default=200, help="episodes that the plain way is timed on" + default)
    options = parser.read(argv, pairs=1, episodes=100, sample=10)
    if options.sample > options.episodes:
        raise ValueError(
            f"--sample {options.sample} is more than the {options.episodes} episodes that are scored; take fewer"
        )
    return options


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench scoring``.

    Args:
        argv: The command line behind ``bench scoring``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or the two ways do not agree.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    torch.manual_seed(0)
    data = Glyphs() if options.omniglot is None else Omniglot(options.omniglot)
    report = about_run(options)
    report["scoring"] = time_scoring(data, options)
    print("\n" + markdown_table(report))
    write_report(report, options.output)
    return 0
