"""``snail bench data``: how fast episodes are drawn, and how long a training step waits for them.

Two ways are timed in turn: this package's, which gathers from one array, and that of a loader that opens a file for
each item, as most do, on the same images written as PNG files. Both give the same items.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from snail import SNAIL, Conv4, Episode, Learner, ProtoNet
from snail.datasets import EpisodeSampler, Glyphs, ImageData, Images, MiniImageNet, Omniglot
from snail.datasets.images import split_hash

from ..options import whole_number
from .common import BenchParser, about_run, compare, write_report

__all__ = ["OneFileAnItem", "main", "markdown_table"]

BATCH = 32  # episodes drawn at once
SETTINGS = ((5, 1, 1), (5, 5, 15), (20, 5, 5))  # ways, shots, queries a class


class OneFileAnItem:
    """A pool of images as a folder of PNG files, each opened whenever it is asked for.

    Args:
        images: The images.
        folder: Where the files are written; those that are asked for alone, when they are first asked for.
    """

    def __init__(self, images: Images, folder: Path) -> None:
        self.images, self.folder = images, folder

    def write(self, indices: Tensor) -> None:
        """Write the files of some images."""
        for i in set(indices.flatten().tolist()):
            pixels = self.images.pixels[i].permute(1, 2, 0).squeeze(-1).numpy()
            if not self._path(i).exists():
                Image.fromarray(pixels).save(self._path(i))

    def take(self, indices: Tensor) -> Tensor:
        """See ``Images.take``."""
        each = [torch.from_numpy(self._open(i)).float() / 255 for i in indices.flatten().tolist()]
        return torch.stack(each).view(*indices.shape, *self.images.pixels.shape[1:])

    def _open(self, index: int) -> np.ndarray:
        with Image.open(self._path(index)) as picture:
            array = np.array(picture)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index}.png"


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def time_drawing(data: ImageData, setting: tuple[int, int, int], folder: Path, pairs: int) -> dict[str, Any]:
    """Time the drawing of ready episodes, images included: episodes a second of both ways.

    Raises:
        ValueError: If both do not give the same images.
    """
    ways, shots, queries = setting
    images = data.images("train")
    sampler = EpisodeSampler(images, "benchmark/train", ways=ways, shots=shots, queries=queries, seed=0)
    few = max(1, min(BATCH, 400 // (ways * (shots + queries))))  # of the slow way
    position = iter(range(0, 10**9, BATCH))
    files = OneFileAnItem(images, folder)
    sample = sampler.draw(0, few)
    files.write(sample.support_x)
    files.write(sample.query_x)
    if not torch.equal(files.take(sample.query_x), images.take(sample.query_x)):
        raise ValueError("an image read from its file differs from that in the array")

    def ours() -> float:
        start = next(position)
        return _seconds(lambda: sampler.draw(start, start + BATCH).map_items(images.take)) / BATCH

    def theirs() -> float:
        return _seconds(lambda: sampler.draw(0, few).map_items(files.take)) / few

    timing = compare(ours, theirs, pairs=pairs)
    about = {"data": data.dataset, "ways": ways, "shots": shots, "queries_per_class": queries}
    rates = {"episodes_per_second": 1000 / timing["shared_ms"], "one_file_an_item": 1000 / timing["plain_ms"]}
    return about | rates | timing


def time_waiting(data: ImageData, learner: Learner, *, steps: int, what: str) -> dict[str, Any]:
    """Time training steps with their data: the share of the time that is spent on drawing and gathering it."""
    optimizer = torch.optim.Adam(learner.parameters())
    images = data.images("train")

    def batches() -> Iterator[Episode]:
        samplers = [
            data.sampler("train", ways=data.train_ways, shots=shots, queries=data.queries, seed=0)
            for shots in data.train_shots
        ]
        for step in range(10**9):
            start = step * data.batch_size
            yield samplers[step % len(samplers)].draw(start, start + data.batch_size).map_items(images.take)

    source, waited, total = batches(), 0.0, 0.0
    for step in range(steps + 1):  # the first is not counted: what is lazily made is made then
        start = time.perf_counter()
        batch = next(source)
        middle = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(learner.loss(batch)[0])
        optimizer.step()
        if step > 0:
            waited, total = waited + middle - start, total + time.perf_counter() - start
    return {"data": data.dataset, "what": what, "steps": steps, "seconds": total, "waiting_share": waited / total}


def _line(row: dict[str, Any]) -> str:
    name = f"{row['data']}, {row['ways']}-way {row['shots']}-shot, {row['queries_per_class']} queries"
    return f"{name:<44}{row['episodes_per_second']:>12,.0f}{row['one_file_an_item']:>18,.0f}{row['ratio']:>9.1f}"


def markdown_table(report: dict[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    lines = ["| ready episodes a second | here | a file opened for each item | ratio (spread) |", "| --- " * 4 + "|"]
    for row in report["drawing"]:
        name = f"{row['data']}, {row['ways']}-way {row['shots']}-shot, {row['queries_per_class']} a class"
        ratio = f"{row['ratio']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
        lines.append(f"| {name} | {row['episodes_per_second']:,.0f} | {row['one_file_an_item']:,.0f} | {ratio} |")
    shares = "; ".join(
        f"{row['what']} {100 * row['waiting_share']:.1f} % of {row['steps']} steps" for row in report["waiting"]
    )
    pairs = len(report["drawing"][0]["pairs"])
    where = f"{report['hardware']}, torch {report['versions']['torch']}"
    return "\n".join(
        [*lines, "", f"Time of training steps spent waiting for data: {shares}.",
         f"{where}, median of {pairs} pairs, load {report['load']} in the minute before."]
    )  # fmt: skip


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "data",
        """Time how many ready episodes a second are drawn, images included, against a loader that opens a
file for each item, and which share of a training step's time its data takes: SNAIL on small grey images, a prototypical
network with Conv-4 on miniImageNet. One process, no workers.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--omniglot", type=Path, metavar="DIR", help="Omniglot's folder; left out if not given")
    add("--mini_imagenet", type=Path, metavar="DIR", help="miniImageNet's folder; left out if not given")
    add("--pairs", type=whole_number, default=7, help="how often both ways are timed" + default)
    add("--steps", type=whole_number, default=20, help="training steps that are timed" + default)
    return parser.read(argv, pairs=1, steps=1)


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench data``.

    Args:
        argv: The command line behind ``bench data``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or the two ways do not agree.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    sets: list[ImageData] = [Glyphs(queries=2)]
    if options.omniglot is not None:
        sets.append(Omniglot(options.omniglot, queries=2))
    if options.mini_imagenet is not None:
        sets.append(MiniImageNet(options.mini_imagenet, train_ways=20, queries=5, batch_size=1))
    torch.manual_seed(0)
    report = about_run(options) | {"drawing": [], "waiting": []}
    print(f"\n{'ready episodes a second':<44}{'here':>12}{'a file an item':>18}{'ratio':>9}", flush=True)
    for data in sets:
        for setting in SETTINGS[:1] if options.quick else SETTINGS:
            with tempfile.TemporaryDirectory() as folder:
                row = time_drawing(data, setting, Path(folder), options.pairs)
            row["split_hash"] = split_hash(data.images("train").class_names)
            report["drawing"].append(row)
            print(_line(row), flush=True)
    for data in sets:
        photographs = isinstance(data, MiniImageNet)
        learner: Learner = (
            ProtoNet(Conv4(3, image_size=84, out_features=None)) if photographs else SNAIL(Conv4(), 64, 5, 5)
        )
        what = f"{type(learner).__name__} on {data.dataset}"
        row = time_waiting(data, learner, steps=options.steps, what=what)
        report["waiting"].append(row)
        print(f"{what}: {100 * row['waiting_share']:.1f} % of {row['seconds']:.1f} s waited for data", flush=True)
    write_report(report, options.output)
    return 0
