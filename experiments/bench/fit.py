"""``snail bench fit``: what training costs through ``snail fit`` as a user runs it, in time and in memory.

Every measurement has a fresh process of its own, and the processes of two ways take turns, A B A B ..., so that what
else the machine does falls on both. A callback watches the command from within (``watched.py``); a bare loop then
starts from the very checkpoint that the command began with, so that both train the same model on the same batches
(``bare_loop.py``).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from snail import Conv4
from snail.datasets.mini_imagenet import prepared_paths
from snail.datasets.mini_imagenet_reader import IMAGES, SIZE, mini_imagenet_classes
from snail.datasets.prepared import Pixels, Source, prepare

from ..options import whole_number
from .bare_loop import Loop
from .common import BenchParser, about_run, ratios_to, write_report
from .processes import fresh
from .watched import TIMED, Command

__all__ = ["Setting", "main", "markdown_table"]


@dataclass(frozen=True)
class Setting:
    """What is trained in the first part.

    Args:
        image_size: Height and width in pixels: 28, grey, or 84, in colours.
        ways: Classes of an episode.
        shots: Support items of each class.
        queries_per_class: Query items of each class.
        episodes: In a batch.
    """

    image_size: int
    ways: int
    shots: int
    queries_per_class: int
    episodes: int

    @property
    def name(self) -> str:
        """What the setting is called in tables."""
        return (
            f"{self.image_size}x{self.image_size}, {self.ways}-way {self.shots}-shot, {self.queries_per_class} a class"
        )

    def options(self) -> list[str]:
        """The options of ``snail fit``, but for the data set."""
        options = [f"--data.ways={self.ways}", f"--data.train_shots=[{self.shots},{self.shots}]"]
        options += [f"--data.eval_shots=[{self.shots}]", f"--data.queries={self.queries_per_class}"]
        options += [f"--data.batch_size={self.episodes}"]
        if self.image_size == SIZE:
            embedding: dict[str, Any] = {"in_channels": 3, "image_size": SIZE, "out_features": None}
            options += [
                f"--model.learner.embedding={json.dumps({'class_path': 'snail.Conv4', 'init_args': embedding})}"
            ]
            options += [f"--model.learner.embedding_dim={Conv4(**embedding).out_channels}"]
        return options


LEAST_RATIO = {
    Setting(28, 5, 1, 1, episodes=32): 8,
    Setting(28, 5, 5, 1, episodes=32): 15,
    Setting(28, 20, 5, 1, episodes=8): 45,
    Setting(SIZE, 5, 5, 15, episodes=4): 10,
}
"""How many times faster than the plain way ``snail fit`` is asked to be, per query trained."""
MOST_LOOP = 1.10
"""How much longer than a bare loop a step of ``snail fit`` may take."""
MOST_GIB = {
    "snail fit": 2,
    "snail fit --config omniglot_5way": 4,
    "snail fit --config omniglot_5way --data.ways 20": 8,
    "snail fit --config mini_imagenet_snail": None,
}
"""Whole commands, and what their peak memory is to stay under."""

SCORED = ("--data.val_episodes=100", "--data.test_episodes=100")  # of a command run to its end: a batch of each
SAME_LOSS = 0.05  # how far apart, relatively, the losses may be of two ways that do the same in half precision
PLAIN = {"precision": "32-true", "memory_kept": False, "channels_last": False}


# -- the parts ---------------------------------------------------------------------------------------------------------


def write_noise(root: Path, images: int = IMAGES) -> None:
    """Write what ``snail.datasets.MiniImageNet`` takes for its training and validation images: noise, as much as those.

    Args:
        root: Where.
        images: Of each class.
    """
    generator = np.random.default_rng(0)

    def noise(_: int) -> Pixels:
        return generator.integers(0, 256, (images, 3, SIZE, SIZE), dtype=np.uint8)

    for part in ("train", "val"):
        names = mini_imagenet_classes()[part]
        source = Source("noise", names, (images,) * len(names), noise)
        prepare(source, prepared_paths(root, part)[0], image_shape=(3, SIZE, SIZE))


def _images(size: int, options: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    """What images of a size there are: what they are called, and the options of ``snail fit`` for them."""
    if size == SIZE:
        root = options.mini_imagenet or folder / "noise"
        if not root.exists():
            write_noise(root)
        name = "noise" if options.mini_imagenet is None else "miniImageNet"
        return name, ["--data=snail.datasets.MiniImageNet", f"--data.root={root}"]
    if options.omniglot is None:
        return "Glyphs", ["--data=snail.datasets.Glyphs"]
    return "Omniglot", ["--data=snail.datasets.Omniglot", f"--data.root={options.omniglot}"]


def _batch_size(options: argparse.Namespace) -> list[str]:
    return [] if options.episodes is None else [f"--data.batch_size={options.episodes}"]


def time_fit(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Time ``snail fit`` and the plain way, per query trained: a row for each of ``LEAST_RATIO``.

    Raises:
        RuntimeError: If one of them fails, or the two do not agree.
    """
    for setting, asked in list(LEAST_RATIO.items())[: 1 if options.quick else None]:
        setting = replace(setting, episodes=options.episodes or setting.episodes)
        data, given = _images(setting.image_size, options, folder)
        command = Command((*given, *setting.options(), *TIMED), folder, warmup=3, seconds=options.seconds)
        loop = Loop(command.checkpoint, PLAIN, command.warmup, options.seconds, options.sample_images)
        pairs = [{"fit": fresh("snail fit", command), "plain": fresh("plain", loop)} for _ in range(options.pairs)]
        queries, sample = (pairs[0]["plain"][key] for key in ("queries", "sample"))
        fit, plain = ([statistics.mean(pair[way]["step_ms"]) / queries for pair in pairs] for way in ("fit", "plain"))
        row = asdict(setting) | {"name": setting.name, "data": data, "queries": queries, "sample": sample}
        row |= {"fit_ms": statistics.median(fit), "plain_ms": statistics.median(plain)} | ratios_to(fit, plain)
        yield row | {"asked": asked, "pairs": pairs}


def time_loop(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Time ``snail fit`` and a bare loop that does the same, per step: one row.

    Raises:
        ValueError: If their losses differ.
        RuntimeError: If one of them fails.
    """
    given = ["--config=glyphs_5way", "--checkpoint_minutes=0.05", *_batch_size(options)]
    command = Command((*given, *TIMED), folder, warmup=10, seconds=options.seconds)
    pairs, fit, bare = [], [], []
    for _ in range(options.pairs):
        ours = fresh("snail fit", command)
        theirs = fresh("bare loop", Loop(command.checkpoint, ours["levers"], command.warmup, options.seconds))
        check_losses(ours["losses"], theirs["losses"])
        both = list(zip(ours["step_ms"], theirs["step_ms"], strict=False))  # the steps on batches that both came to
        fit.append(statistics.mean(ms for ms, _ in both))
        bare.append(statistics.mean(ms for _, ms in both))
        pairs.append({"steps": len(both), "fit": ours, "bare": theirs})
    shots = f"{min(ours['train_shots'])} to {max(ours['train_shots'])} shots"
    row = {"name": f"28x28, 5-way, {shots}", "data": "Glyphs", "steps": [pair["steps"] for pair in pairs]}
    row |= {"fit_ms": statistics.median(fit), "bare_ms": statistics.median(bare)} | ratios_to(bare, fit)
    yield row | {"asked": MOST_LOOP, "pairs": pairs}


def check_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Refuse two ways whose losses in the first steps show that they do not train the same.

    Raises:
        ValueError: If they differ by more than half precision can make of it.
    """
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if not abs(one - other) <= SAME_LOSS * abs(one):  # not a number is refused too
            raise ValueError(
                f"the loss of step {step} is {one:.6f} in snail fit and {other:.6f} in the bare loop, so that timing "
                f"them would compare different things"
            )


def measure_memory(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Measure the peak memory of whole commands, cut to few steps: a row for each of ``MOST_GIB``.

    Raises:
        RuntimeError: If one fails, or was cut so short that it did not see every number of shots.
    """
    for name, asked in list(MOST_GIB.items())[: 1 if options.quick else None]:
        given = name.split()[2:]
        data, images = ("Glyphs", []) if not given else _images(SIZE if "mini_" in name else 28, options, folder)
        cut = ["--trainer.max_epochs=1", f"--data.steps_per_epoch={options.steps}", *SCORED, *_batch_size(options)]
        seen = fresh(name, Command((*given, *images, *cut), folder))
        if seen["shots"] != seen["train_shots"]:
            raise RuntimeError(
                f"{options.steps} steps of {name!r} have seen {seen['shots']} shots instead of {seen['train_shots']}; "
                f"set more --steps"
            )
        yield {"name": name, "data": data, "asked": asked} | seen


PARTS = {"fit": time_fit, "loop": time_loop, "memory": measure_memory}
"""What is measured, by name."""


# -- what is printed ---------------------------------------------------------------------------------------------------


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _spread(row: Mapping[str, Any], digits: int) -> str:
    ratio, least, most = (f"{row[key]:.{digits}f}" for key in ("ratio", "ratio_min", "ratio_max"))
    return f"{ratio} ({least} to {most})"


def _fit_cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row['fit_ms']:.2f}", f"{row['plain_ms']:.2f}", _spread(row, 1), f"at least {row['asked']}"]
    return [row["name"], row["data"], *times, f"{row['sample']} of {row['queries']} queries"]


def _loop_cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row['fit_ms']:.2f}", f"{row['bare_ms']:.2f}", _spread(row, 2), f"at most {row['asked']:.2f}"]
    return [row["name"], row["data"], *times, f"{min(row['steps'])} to {max(row['steps'])}"]


def _memory_cells(row: Mapping[str, Any]) -> list[str]:
    peak = "not told" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.2f}"
    asked = "" if row["asked"] is None else f"under {row['asked']}"
    resident = "not mapped" if row["data_resident"] is None else f"{row['data_resident'] / 2**20:,.0f}"
    return [f"`{row['name']}`", row["data"], peak, asked, f"{row['data_bytes'] / 2**20:,.0f}", resident]


_RATIO = ("ratio (spread)", "asked")
TABLES: dict[str, tuple[Sequence[str], Callable[[Mapping[str, Any]], list[str]]]] = {
    "fit": (
        (
            "a query trained, SNAIL with Conv-4",
            "images",
            "`snail fit`, ms",
            "plain way, ms",
            *_RATIO,
            "plain way timed on",
        ),
        _fit_cells,
    ),
    "loop": (("a training step", "images", "`snail fit`, ms", "bare loop, ms", *_RATIO, "steps timed"), _loop_cells),
    "memory": (
        ("whole command", "images", "peak memory, GiB", "asked", "arrays of images, MiB", "mapped and resident, MiB"),
        _memory_cells,
    ),
}


def _head(part: str) -> list[str]:
    head, _ = TABLES[part]
    return [_line(head), _line(["---"] * len(head))]


def _row(part: str, row: Mapping[str, Any]) -> str:
    return _line(TABLES[part][1](row))


def _levers(report: Mapping[str, Any]) -> str:
    """A sentence on what the commands of a report did to be faster, and what the machine lacks for it."""
    told = [row["levers"] for row in report.get("memory", [])]
    told += [pair["fit"]["levers"] for part in ("fit", "loop") for row in report.get(part, []) for pair in row["pairs"]]
    names = (("memory_kept", ", memory kept"), ("channels_last", ", channels last"))
    taken = {f"precision {each['precision']}" + "".join(text for key, text in names if each[key]) for each in told}
    lacking = {what for each in told for what in each["lacking"]}
    lacks = f"; this machine lacks {' and '.join(sorted(lacking))}" if lacking else ""
    return f"Levers that `snail fit` took by itself: {' or '.join(sorted(taken))}{lacks}."


def markdown_table(report: Mapping[str, Any]) -> str:
    """The tables of a report, as the README shows them."""
    tables = [[*_head(part), *(_row(part, row) for row in report[part]), ""] for part in TABLES if part in report]
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("torch", "lightning"))
    pairs = f"{report['pairs']} pairs of processes that time {report['seconds']} s each"
    facts = f"{report['hardware']}, {versions}, median of {pairs}, load {report['load']} in the minute before."
    return "\n".join([*itertools.chain(*tables), _levers(report), facts])


# -- the command -------------------------------------------------------------------------------------------------------


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"there is no part {name!r}; choose some of {', '.join(PARTS)}")
    return names


def _folder(text: str) -> Path:
    path = Path(text).expanduser().resolve()  # processes work elsewhere
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder; give the folder that holds the images")
    return path


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "fit",
        f"""Measure training through `snail fit` as a user runs it on a CPU: with progress bar,
logs and checkpoints.

fit       per query trained, against the plain way: the same SNAIL on the same batches in a bare loop, one query a
          sequence with its own copy of the support, float32, torch's defaults
loop      per step, against a bare loop that does the same with the same levers: what Lightning's loop costs
memory    the peak of whole commands, with validation and, on the built-in data, the test; pages of mapped files
          count while they are in memory

Each measurement has a fresh process, and ways take turns. Where Omniglot's folder is not given, the built-in images
take its place; where miniImageNet's is not, 1 GB of noise in a temporary folder. Run it on a machine that does
nothing else; only ratios carry over to another. OMP_NUM_THREADS sets the threads of all processes
({torch.get_num_threads()} now).""",
        quick="first of each part only, smaller defaults: a trial, not a measurement",
        keeps_memory=False,
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--part", type=_parts, action="extend", metavar="PART", help="fit, loop or memory alone; may be repeated, or "
        "several with commas (default: all)")  # fmt: skip
    add("--omniglot", type=_folder, metavar="DIR", help="Omniglot's folder; the built-in images if not given")
    add("--mini_imagenet", type=_folder, metavar="DIR", help="miniImageNet's folder; noise if not given")
    add("--pairs", type=whole_number, default=5, help="how often both ways are timed" + default)
    add("--seconds", type=whole_number, default=10, help="how long a process times its steps" + default)
    add("--episodes", type=whole_number, help="episodes in every batch (default: as users have them)")
    add("--sample_images", type=whole_number, default=1600, help="most images of 28x28, or pixels as many, that the "
        "plain way embeds at once, one query an episode at least; where all queries need more, a part of them is timed"
        + default)  # fmt: skip
    add("--steps", type=whole_number, default=40, help="training steps of a command whose memory is measured" + default)
    return parser.read(argv, pairs=1, seconds=1, episodes=2, steps=10)


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench fit``.

    Args:
        argv: The command line behind ``bench fit``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or two ways do not train the same.
        RuntimeError: If a way fails.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    report = about_run(options)  # its dtype and kept memory are those of the plain way
    report["versions"]["lightning"] = version("lightning")
    report |= {"pairs": options.pairs, "seconds": options.seconds}
    with tempfile.TemporaryDirectory() as folder:
        for part in (part for part in PARTS if part in (options.part or PARTS)):
            report[part] = []
            print("\n" + "\n".join(_head(part)), flush=True)
            for row in PARTS[part](options, Path(folder)):
                report[part].append(row)
                print(_row(part, row), flush=True)
    print("\n" + _levers(report))
    write_report(report, options.output)
    return 0
