"""``snail bench precision``: two runs of the command that differ in their precision alone, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snail.experiments.bench import precision
from snail.experiments.cli import main


def run(name: str, *accuracy: float) -> dict[str, Any]:
    test = [{"shots": shots, "accuracy": 90.0 + shots, "ci95": 0.5, "episodes": 4} for shots in (1, 5)]
    steps = list(range(100, 100 * (len(accuracy) + 1), 100))
    return {"precision": name, "steps": steps, "accuracy": list(accuracy), "seconds": 90.0, "test": test}


def test_the_table_lays_the_curves_beside_each_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = {"runs": [run("bf16-mixed", 71.5, 94.25), run("32-true", 70, 94.5)], "hardware": "a processor"}
    report |= {"versions": {"torch": "2.9"}, "load": 0.1}
    expected = [
        "| validation accuracy, % | bf16-mixed | 32-true |",
        "| --- | --- | --- |",
        "| step 100 | 71.50 | 70.00 |",
        "| step 200 | 94.25 | 94.50 |",
        "| test, 1-shot | 91.00 ± 0.50 | 91.00 ± 0.50 |",
        "| test, 5-shot | 95.00 ± 0.50 | 95.00 ± 0.50 |",
        "",
        "a processor, torch 2.9, load 0.1 in the minute before.",
    ]
    assert precision.markdown_table(report).splitlines() == expected
    path, picture = tmp_path / "report.json", tmp_path / "curves.png"
    path.write_text(json.dumps(report))
    assert main(["bench", "precision", "--show", str(path), "--picture", str(picture)]) == 0
    assert capfd.readouterr().out.splitlines() == expected and picture.stat().st_size > 1000


def test_quick_trains_in_both_precisions(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.json"
    assert main(["bench", "precision", "--quick", "--output", str(path), "--data.ways=2"]) == 0
    report = json.loads(path.read_text())
    assert [run["precision"] for run in report["runs"]] == list(precision.PRECISIONS)
    for run in report["runs"]:
        assert run["steps"] == [2, 4] and len(run["accuracy"]) == 2 and run["seconds"] > 0
        assert [(record["shots"], record["episodes"]) for record in run["test"]] == [(1, 4), (5, 4)]
    assert report["options"][-1] == "--data.ways=2" and report["quick"] is True
    assert precision.markdown_table(report) in capfd.readouterr().out
    assert path.with_suffix(".png").exists()


def test_a_run_that_fails_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "times.json"
    assert main(["bench", "precision", "--quick", "--output", str(output), "--data.ways=999"]) == 1
    err = capfd.readouterr().err
    assert "snail fit in bf16-mixed failed: " in err and "999 ways are asked" in err and err.count("\n") == 1
    assert not output.exists()
