"""``snail bench ablation``: trainings that differ in one thing each, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snail.experiments.bench import ablation, training
from snail.experiments.cli import main


def variant(name: str, one: float, five: float, seen: float) -> dict[str, Any]:
    shots = {"1": [50.0, one], "5": [50.0, five]}
    told = {"steps": [100, 200], "accuracy": [50.0, (one + five) / 2], "seconds": 90.0, "data": "Omniglot vinyals"}
    return {"name": name, "by_shots": shots, "on_training_classes": seen, **told}


def test_the_table_tells_what_each_change_costs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = {"variants": [variant("base", 90, 95, 92), variant("labels kept", 20, 21, 99.5)]}
    report |= {"hardware": "a processor", "versions": {"torch": "2.9"}}  # type: ignore[dict-item]
    expected = [
        "| trained with | training classes, % | 1-shot, % | 5-shot, % | mean, against the base | minutes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| base | 92.0 | 90.00 | 95.00 | 92.50 | 2 |",
        "| labels kept | 99.5 | 20.00 | 21.00 | -72.00 | 2 |",
        "",
        "200 steps each, on Omniglot vinyals. a processor, torch 2.9.",
    ]
    assert ablation.markdown_table(report).splitlines() == expected
    path, picture = tmp_path / "report.json", tmp_path / "errors.png"
    path.write_text(json.dumps(report))
    assert main(["bench", "ablation", "--show", str(path), "--picture", str(picture)]) == 0
    assert capfd.readouterr().out.splitlines() == expected and picture.stat().st_size > 1000


def test_quick_trains_each_once_and_goes_on_where_it_was_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ablation.json"
    command = ["bench", "ablation", "--quick", "--output", str(path)]
    assert main([*command, "--only=1"]) == 0
    (first,) = json.loads(path.read_text())["variants"]
    assert first["steps"] == [2, 4] and first["by_shots"].keys() == {"1", "5"} and first["data"] == "Glyphs"
    assert 0 <= first["on_training_classes"] <= 100
    assert main([*command, "--only=2"]) == 0
    report = json.loads(path.read_text())
    assert [v["name"] for v in report["variants"]] == list(ablation.VARIANTS)[:2] and report["variants"][0] == first

    def never(what: str, argv: Any) -> Any:
        raise AssertionError(f"trained again {what}")

    monkeypatch.setattr(ablation, "train", never)
    renamed = [variant | {"name": "as it was called before"} for variant in report["variants"]]
    before = {"versions": report["versions"] | {"commit": "of before"}, "variants": renamed}
    path.write_text(json.dumps(report | before))
    assert main([*command, "--only=2"]) == 0
    assert json.loads(path.read_text())["variants"] == report["variants"] and path.with_suffix(".png").exists()
    assert ablation.markdown_table(report) in capfd.readouterr().out


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_every_variant_is_one_that_the_command_takes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*ablation.BASE, *training.QUICK, *ablation.VARIANTS[name], "--trainer.accelerator=cpu"]
    assert main(["fit", *options, "--trainer.fast_dev_run=1", "--keep_memory=false"]) == 0


def test_a_root_is_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "data")
    assert training._from_here(["--data.root=data", "--a=data"]) == [f"--data.root={here}", "--a=data"]
    assert training._from_here(["--data.root", "data", "--a", "data"]) == ["--data.root", here, "--a", "data"]
