"""``snail bench ablation``: what each part of the network and of its training is worth, on validation classes.

Each variant is a training through ``snail fit`` from the same seed on as many episodes, and differs from the base in
what its name says. What was trained already stands in the output and is not trained again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import whole_number
from ..pictures import draw_ablation
from .common import write_report
from .training import TrainingParser, about_trainings, train

__all__ = ["BASE", "VARIANTS", "main", "markdown_table"]

LEARNER = "--model.learner.init_args"
BASE = (
    *("--trainer.max_epochs=2", "--data.steps_per_epoch=200", "--data.batch_size=16", "--data.queries=2"),
    *("--data.val_episodes=2000", "--trainer.precision=32-true"),
    *(f"{LEARNER}.prototype_loss=1", f"{LEARNER}.prototypes=batch"),
)
# A batch of few classes has each of them more than once, among which the loss over the batch could not choose.
FEW_CLASSES = ("--data.train_classes=50", f"{LEARNER}.prototypes=episode")
VARIANTS: dict[str, tuple[str, ...]] = {
    "base": (),
    "attention alone": (f"{LEARNER}.layers=attention",),
    "convolutions alone": (f"{LEARNER}.layers=convolutions",),
    "dilations 2, 4, 8, ... as printed": (f"{LEARNER}.dilation_start=2",),
    "each class keeps its label": ("--data.fixed_labels=true",),
    "50 training classes": FEW_CLASSES,
    "50 training classes, each keeps its label": (*FEW_CLASSES, "--data.fixed_labels=true"),
    "1 shot alone": ("--data.train_shots=[1,1]",),
    "5 shots alone": ("--data.train_shots=[5,5]",),
    "1 query an episode, not 10": ("--data.max_queries=1",),
    "bfloat16, not float32": ("--trainer.precision=bf16-mixed",),
    "25 queries an episode, not 10": ("--data.queries=5",),
    "prototypical loss over an episode's classes": (f"{LEARNER}.prototypes=episode",),
    "no prototypical loss": (f"{LEARNER}.prototype_loss=0",),
    "begun as a matching network": (f"{LEARNER}.start=matching",),
    "images distorted": ("--data.distortion=1",),
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
    parser = TrainingParser(
        "ablation",
        """Train SNAIL through `snail fit` with one thing changed at a time, and validate it on classes it was not
trained on. Further options are those of `snail fit`, for all variants; by default the built-in data are trained on.
A variant that stands in the output with the same options, of this machine, is not trained again.""",
    )
    parser.add_argument("--only", type=whole_number, help="how many variants to train, the base first (default: all)")
    options, rest = parser.read_trainings(argv)
    report = _measured(options, [*BASE, *rest]) if options.show is None else json.loads(options.show.read_text())
    print(markdown_table(report))
    if options.picture is not None:
        draw_ablation(report["variants"], options.picture)
    return 0


def _measured(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    report = about_trainings(options)
    known: dict[tuple[str, ...], Any] = {}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if _platform(before) == _platform(report):
            known = {tuple(variant["options"]): variant for variant in before["variants"]}
    report["variants"] = []
    for name, changed in list(VARIANTS.items())[: options.only]:
        asked = (*argv, *changed)
        if asked not in known:
            print(f"training: {name}", flush=True)
            known[asked] = {"options": list(asked), **train(f"({name})", asked)}
        report["variants"].append(known[asked] | {"name": name})
        write_report(report, options.output)  # after each, so that none is lost
    return report


def _platform(report: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """What must be alike for trainings to stand in one table; the commit may change while others are trained."""
    return report["hardware"], {key: value for key, value in report["versions"].items() if key != "commit"}
