"""``snail bench precision``: whether training in half precision is as accurate, shown by both validation curves.

The same run twice through ``snail fit``, from the same seed on the same episodes, in a process of its own each: once in
bfloat16 where autocast takes it, once in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..pictures import draw_precisions
from .common import write_report
from .training import TrainingParser, about_trainings, train

__all__ = ["PRECISIONS", "main", "markdown_table"]

PRECISIONS = ("bf16-mixed", "32-true")


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table of a report, as the docs show it: the validation accuracy at each step, and what the test gave."""
    runs = report["runs"]
    lines = ["| validation accuracy, % | " + " | ".join(run["precision"] for run in runs) + " |"]
    lines.append("| --- " * (1 + len(runs)) + "|")
    for i, step in enumerate(runs[0]["steps"]):
        lines.append(f"| step {step:,} | " + " | ".join(f"{run['accuracy'][i]:.2f}" for run in runs) + " |")
    for i, record in enumerate(runs[0]["test"]):
        cells = [f"{run['test'][i]['accuracy']:.2f} ± {run['test'][i]['ci95']:.2f}" for run in runs]
        lines.append(f"| test, {record['shots']}-shot | " + " | ".join(cells) + " |")
    where = f"{report['hardware']}, torch {report['versions']['torch']}"
    return "\n".join([*lines, "", f"{where}, load {report['load']} in the minute before."])


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench precision``.

    Args:
        argv: The command line behind ``bench precision``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong.
        RuntimeError: If a run fails.
    """
    options, rest = TrainingParser(
        "precision",
        """Train twice through `snail fit`, in half precision and in float32, and lay both validation curves
beside each other. Further options are those of `snail fit`, such as --config omniglot_5way --data.root DIR; by default
the built-in data are trained on, and tested.""",
    ).read_trainings(argv)
    if options.show is not None:
        report = json.loads(options.show.read_text())
    else:
        report = about_trainings(options) | {"options": rest, "runs": []}
        for precision in PRECISIONS:
            print(f"training in {precision}", flush=True)
            ran = train(f"in {precision}", [*rest, f"--trainer.precision={precision}"])
            report["runs"].append({"precision": precision, **ran})
        write_report(report, options.output)
    print(markdown_table(report))
    if options.picture is not None:
        draw_precisions(report["runs"], options.picture)
    return 0
