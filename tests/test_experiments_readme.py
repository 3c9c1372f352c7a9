"""The README is what people run first: its snippets, commands and numbers are checked against the code."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from snail.experiments import benchmark, benchmark_maml
from snail.experiments.cli import SHIPPED, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [command.strip() for line in SHELL for command in line.split("&&") if command.strip()]
SHORT = [
    *("--trainer.max_epochs=1", "--trainer.precision=32-true", "--data.steps_per_epoch=2", "--data.batch_size=2"),
    *("--data.val_episodes=2", "--data.test_episodes=2", "--model.learner.embedding.filters=4"),
]


def between(name: str) -> str:
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
    assert found, name
    return found.group(1).strip()


def printed(argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0
    return out.getvalue().strip()


def test_readme_is_under_200_lines() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    if "said" in names:  # the copy task: what was read is said again
        assert names["said"][10:] == names["symbols"][0].tolist()  # type: ignore[index]


def test_readme_has_snippets_of_every_kind() -> None:
    assert len(SNIPPETS) >= 2 and any("net.step" in s for s in SNIPPETS) and any("evaluate(" in s for s in SNIPPETS)


def test_readme_commands_run_shortened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, omniglot_root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(omniglot_root)
    ran = 0
    for command in COMMANDS:
        program, *argv = shlex.split(command)
        if program != "snail":
            assert program in ("pip", "pytest")  # the gate runs these
            continue
        short = [] if "--help" in argv or argv[0] == "configs" else SHORT if argv[0] == "fit" else SHORT[-2:-1]
        if "--help" in argv:
            with pytest.raises(SystemExit):
                main(argv)
        else:
            assert main([*argv, *short]) == 0, command
        ran += 1
    assert ran >= 6
    assert (tmp_path / "runs" / "glyphs_5way" / "results.json").exists()
    assert (tmp_path / "runs" / "omniglot_5way" / "results.json").exists()


def test_the_gate_runs_the_readmes_test_command() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    install, run = next(line for line in SHELL if line.endswith("pytest")).split(" && ")
    assert install.removeprefix("pip install ") in gate and f"\n{run}\n" in gate


def test_readme_results_are_what_the_command_prints() -> None:
    assert between("snail results --markdown") == printed(["results", "--markdown"])


def test_readme_results_have_everything_that_is_needed_to_get_them_again() -> None:
    for path in SHIPPED.glob("results/*/results.json"):
        assert (path.parent / "config.yaml").is_file()
        for record in json.loads(path.read_text()):
            for key in ("dataset", "split", "split_hash", "shots", "queries", "episodes", "seed", "learner", "network"):
                assert record[key] is not None
            assert (record["ways"] is None) == ("mse" in record)  # regression alone has no ways
            assert record["ci95"] > 0 and record["batch_norm"] and record["hardware"] and record["versions"]


def test_readme_benchmark_is_what_the_file_holds() -> None:
    report = json.loads((SHIPPED / "results" / "benchmark" / "benchmark.json").read_text())
    assert report["quick"] is False
    assert between("snail benchmark") == benchmark.markdown_table(report)


def test_readme_benchmark_of_maml_is_what_the_file_holds() -> None:
    report = json.loads((SHIPPED / "results" / "benchmark" / "benchmark_maml.json").read_text())
    assert report["quick"] is False
    assert between("snail benchmark maml") == benchmark_maml.markdown_table(report)
