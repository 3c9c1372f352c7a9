"""Whole trainings through ``snail fit``, each in a process and a folder of its own, and what came of them."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from snail.results import read_results

from ..options import check_picture, whole_number
from ..runs import RUNS, read_checkpoint, training_facts
from .common import BenchParser, about_run

__all__ = ["TrainingParser", "about_trainings", "train"]

QUICK = (
    *("--trainer.max_epochs=2", "--data.steps_per_epoch=2", "--data.batch_size=2", "--data.val_episodes=4"),
    *("--data.test_episodes=4", "--model.learner.embedding.filters=4", "--trainer.log_every_n_steps=1"),
)
"""Options with which a training is over in a moment."""


class TrainingParser(BenchParser):
    """The options of a benchmark that trains several times; the others are those of ``snail fit``, for all of them.

    Args:
        name: What stands behind ``snail bench``.
        description: What is measured.
    """

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, quick="a few steps only: a trial, not a measurement", keeps_memory=False)
        add = self.add_argument
        add("--picture", type=Path, help="the outcome as a PNG; drawn again of an earlier output too (default: beside "
            "the output)")  # fmt: skip
        add("--threads", type=whole_number, help="OMP_NUM_THREADS of the trainings (default: as it is)")

    def read_trainings(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, checked, and those of ``snail fit``; a report is only drawn again where a picture is asked for.

        Raises:
            ValueError: If an option is wrong.
        """
        options, rest = self.read_known(argv)
        if options.picture is None and options.show is None:
            options.picture = options.output.with_suffix(".png")
        if options.picture is not None:
            check_picture(options.picture)
        if options.threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(options.threads)
        return options, [*(QUICK if options.quick else ()), *rest]


def about_trainings(options: argparse.Namespace) -> dict[str, Any]:
    """What a report tells of the machine; precision and memory are each training's own."""
    report = about_run(options)
    return {key: value for key, value in report.items() if key not in ("dtype", "keep_memory")}


def _from_here(argv: Sequence[str]) -> list[str]:
    """The options, with a relative ``--data.root`` as seen from this folder: a training runs in one of its own."""
    found, is_root = [], False
    for option in argv:
        key, equals, value = option.partition("=")
        if is_root:
            option = str(Path(option).absolute())
        elif key == "--data.root" and equals:
            option = f"{key}={Path(value).absolute()}"
        is_root = option == "--data.root"
        found.append(option)
    return found


def train(what: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run ``snail fit``.

    Args:
        what: What is special of it, for messages.
        argv: Options of ``snail fit``.

    Returns:
        The ``data`` that was trained on; the ``steps`` at which was validated; the ``accuracy`` there in percent, the
        mean over all numbers of shots, and that of each in ``by_shots``; ``on_training_classes`` the accuracy of
        training episodes between the last two validations, ``None`` if none was logged; the ``seconds`` that training
        took; and the ``test`` records, if the run tests itself.

    Raises:
        RuntimeError: If the command fails.
    """
    name = "run"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "snail.experiments", "fit", *_from_here(argv), f"--name={name}"]
        done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"snail fit {what} failed: {done.stderr.strip()}")
        run = Path(folder) / RUNS / name
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        scored = [row for row in rows if row.get("val/accuracy")]
        before = int(scored[-2]["step"]) if len(scored) > 1 else -1
        trained = [
            float(row["train/accuracy"]) for row in rows if row.get("train/accuracy") and int(row["step"]) > before
        ]
        prefix, suffix = "val/accuracy_", "shot"
        records = [record for record in read_results([run / "results.json"]) if "training" in record]
        data = yaml.safe_load((run / "config.yaml").read_text())["data"]
        split = data["init_args"].get("split")
        return {
            "data": " ".join(filter(None, (data["class_path"].rpartition(".")[2], split))),
            "steps": [int(row["step"]) + 1 for row in scored],
            "accuracy": [float(row["val/accuracy"]) for row in scored],
            "by_shots": {
                key.removeprefix(prefix).removesuffix(suffix): [float(row[key]) for row in scored]
                for key in scored[0]
                if key.startswith(prefix)
            },
            "on_training_classes": 100 * sum(trained) / len(trained) if trained else None,
            "seconds": training_facts(read_checkpoint(run / "last.ckpt"))["seconds"],
            "test": [{key: record[key] for key in ("shots", "accuracy", "ci95", "episodes")} for record in records],
        }
