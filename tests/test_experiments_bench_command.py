"""``snail bench``: one of the benchmarks by name, or all of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from snail.experiments.bench.command import KINDS
from snail.experiments.cli import main


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The benchmarks that are run, and their options; none measures anything."""
    calls: list[tuple[str, list[str]]] = []

    def instead(name: str, argv: Sequence[str]) -> int:
        calls.append((name, list(argv)))
        return 0

    for kind in KINDS:
        module = import_module(f"snail.experiments.bench.{kind}")
        monkeypatch.setattr(module, "main", lambda argv, kind=kind: instead(kind, argv))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_benchmark_is_run_by_its_name(kind: str, called: list[tuple[str, list[str]]]) -> None:
    assert main(["bench", kind, "--pairs", "3"]) == 0
    assert called == [(kind, ["--pairs", "3"])]


def test_without_a_name_all_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, called: list[tuple[str, list[str]]]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--quick", "--output", "numbers"]) == 0
    assert called == [(kind, ["--output", str(Path("numbers") / f"{kind}.json"), "--quick"]) for kind in KINDS]
    assert (tmp_path / "numbers").is_dir()


@pytest.mark.parametrize("kind", KINDS)
def test_every_benchmark_shows_an_earlier_report_and_explains_itself(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"snail.experiments.bench.{kind}")
    kept = Path(module.__file__).parents[1] / "results" / "bench" / f"{kind}.json"
    if kept.exists():  # of one that was not run yet the page says so, which another test looks at
        assert main(["bench", kind, "--show", str(kept)]) == 0
        assert capfd.readouterr().out.strip() == module.markdown_table(json.loads(kept.read_text())).strip()
    with pytest.raises(SystemExit):
        main(["bench", kind, "--help"])
    assert f"usage: snail bench {kind}" in capfd.readouterr().out


def test_what_there_is_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = capfd.readouterr().out
    assert all(f"  {kind} " in out for kind in KINDS)
    assert main(["bench", "speed"]) == 1
    assert "there is no benchmark 'speed'; choose one of fit, " in capfd.readouterr().err
