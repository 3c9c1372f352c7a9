from __future__ import annotations

from typing import Any

import pytest

from snail.experiments.published import with_published
from snail.results import results_markdown


def record(**changed: Any) -> dict[str, Any]:
    known: dict[str, Any] = {"dataset": "omniglot", "split": "vinyals/test", "ways": 5, "shots": 1, "learner": "MAML"}
    known |= {"batch_norm": "transductive", "accuracy": 95.5, "ci95": 0.6, "episodes": 1000}
    known |= {"training": {"steps": 3000, "seconds": 3120.0, "hardware": "a processor"}}
    return known | changed


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        ({}, "98.7 ± 0.4"),
        ({"ways": 20, "learner": "FirstOrderMAML"}, "89.4 ± 0.5"),
        ({"ways": 20, "shots": 5, "learner": "ProtoNet", "batch_norm": "inductive"}, "98.9"),
        ({"learner": "Reptile", "batch_norm": "inductive"}, "95.39 ± 0.09"),
        ({"learner": "Reptile"}, "97.68 ± 0.04"),
        ({"learner": "ANIL"}, None),
        ({"shots": 3}, None),
        ({"dataset": "glyphs"}, None),
        ({"split": "vinyals/val"}, None),
        ({"dataset": "sinusoid", "shots": 5, "ways": None, "inner_steps": 10}, "0.35"),
        ({"dataset": "sinusoid", "shots": 10, "ways": None, "inner_steps": 10}, None),
        ({"dataset": "sinusoid", "shots": 5, "ways": None, "inner_steps": 0}, None),
    ],
)
def test_published_figures_are_those_of_the_setting(changed: dict[str, Any], figure: str | None) -> None:
    assert with_published(record(**changed)).get("published") == figure


def test_what_was_not_trained_has_no_published_figure() -> None:
    untrained = record()
    del untrained["training"]
    assert with_published(untrained) == untrained


def test_steps_taken_stand_beside_those_of_the_paper() -> None:
    given = record()
    line = results_markdown([with_published(given)]).splitlines()[-1]
    assert line.endswith("| 3,000 of the paper's 60,000 steps, 52 min on a processor |")
    assert "published_steps" not in given["training"]  # the record itself stays as it was


def test_classes_trained_on_are_told() -> None:
    training = {**record()["training"], "on": "training and validation characters"}
    line = results_markdown([with_published(record(learner="ProtoNet", training=training))])
    assert "| 3,000 steps, training and validation characters, 52 min on a processor |" in line
