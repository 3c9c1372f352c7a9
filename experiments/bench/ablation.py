"""``snail bench ablation``: what each part of the network and of its training is worth, on validation classes.

Each variant is a training through ``snail fit`` from the same seed on as many episodes, and differs from the base in
what its name says. What was trained already stands in the output and is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snail import SNAIL, Conv4

from ..options import whole_number
from ..pictures import draw_ablation
from .common import BenchParser, about_run, write_report
from .training import QUICK, train

__all__ = ["BASE", "VARIANTS", "main", "markdown_table"]

LEARNER = "--model.learner.init_args"
BASE = (
    *("--trainer.max_epochs=4", "--data.batch_size=32", "--data.queries=2", "--data.val_episodes=2000"),
    *(f"{LEARNER}.prototype_loss=1", f"{LEARNER}.prototypes=batch"),
)
VARIANTS: dict[str, tuple[str, ...]] = {
    "base: attention and convolutions, dilations 1, 2, 4, ..., labels new in each episode, 1 to 5 shots": (),
    "attention alone": (f"{LEARNER}.layers=attention",),
    "convolutions alone": (f"{LEARNER}.layers=convolutions",),
    "dilations 2, 4, 8, ... as printed": (f"{LEARNER}.dilation_start=2",),
    "each class keeps its label": ("--data.fixed_labels=true",),
    "1 shot alone": ("--data.train_shots=[1,1]",),
    "5 shots alone": ("--data.train_shots=[5,5]",),
    "1 query a class, not 2": ("--data.queries=1",),
    "5 queries a class, not 2": ("--data.queries=5",),
    "prototypical loss over an episode's classes": (f"{LEARNER}.prototypes=episode",),
    "no prototypical loss": (f"{LEARNER}.prototype_loss=0",),
    "float32, not bfloat16": ("--trainer.precision=32-true",),
}
"""What is varied, and the options of ``snail fit`` that do it; the first is what the others are compared with."""


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table of a report, as the docs show it."""
    lines = [
        "| trained with | training classes, % | 1-shot, % | 5-shot, % | mean, against the base | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base = report["variants"][0]["accuracy"][-1]
    for variant in report["variants"]:
        shots = " | ".join(f"{variant['by_shots'][k][-1]:.2f}" for k in ("1", "5"))
        mean = variant["accuracy"][-1]
        against = f"{mean:.2f}" if variant is report["variants"][0] else f"{mean - base:+.2f}"
        seen = "" if variant["on_training_classes"] is None else f"{variant['on_training_classes']:.1f}"
        lines.append(f"| {variant['name']} | {seen} | {shots} | {against} | {variant['seconds'] / 60:.0f} |")
    first = report["variants"][0]
    where = f"{report['hardware']}, torch {report['versions']['torch']}"
    lines += ["", f"{first['steps'][-1]:,} steps each, on {first['data']}. {where}."]
    return "\n".join(lines)


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = BenchParser(
        "ablation",
        """Train SNAIL through `snail fit` with one thing changed at a time, and validate it on classes it was not
trained on. Further options are those of `snail fit`, for all variants; by default the built-in data are trained on.
A variant that stands in the output with the same options is not trained again.""",
        quick="a few steps only: a trial, not a measurement",
        keeps_memory=False,
    )
    add = parser.add_argument
    add("--picture", type=Path, help="the outcome as a PNG; drawn again of an earlier output too (default: beside the "
        "output)")  # fmt: skip
    add("--threads", type=whole_number, help="OMP_NUM_THREADS of the runs (default: as it is)")
    add("--only", type=whole_number, help="how many variants to train, the base first (default: all)")
    options, rest = parser.read_known(argv)
    return options, [*BASE, *(QUICK if options.quick else ()), *rest]


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench ablation``.

    Args:
        argv: The command line behind ``bench ablation``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong.
        RuntimeError: If a run fails.
    """
    options, rest = _options(argv)
    if options.show is not None:
        report = json.loads(options.show.read_text())
        print(markdown_table(report))
        if options.picture is not None:
            draw_ablation(report["variants"], options.picture)
        return 0
    if options.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    report = about_run(SNAIL(Conv4(), 64, 5, 5), options)
    report = {key: value for key, value in report.items() if key not in ("dtype", "keep_memory")}
    known: dict[tuple[str, ...], Any] = {}
    if options.output.exists():
        known = {tuple(v["options"]): v for v in json.loads(options.output.read_text())["variants"]}
    report["variants"] = []
    for name, changed in list(VARIANTS.items())[: options.only]:
        asked = [*rest, *changed]
        if tuple(asked) not in known:
            print(f"training: {name}", flush=True)
            known[tuple(asked)] = {"options": asked, **train(f"({name})", asked)}
        report["variants"].append({"name": name, **known[tuple(asked)]})
        write_report(report, options.output)
    picture = options.output.with_suffix(".png") if options.picture is None else options.picture
    draw_ablation(report["variants"], picture)
    print(f"\n{markdown_table(report)}\n\n{picture}")
    return 0
