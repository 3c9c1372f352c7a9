"""The README is what people run first: its snippets, commands and numbers are checked against the code."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from snail import SNAIL, Conv4, Learner, evaluate
from snail.datasets import Omniglot, mini_imagenet
from snail.experiments.bench.command import KINDS
from snail.experiments.cli import SHIPPED, main
from snail.experiments.loading import load_run
from snail.experiments.pictures import results_hash
from snail.experiments.published import with_published
from snail.experiments.rl import read_returns
from snail.experiments.rl_classical import BAYES, by_setting, picture_hash, read_classical
from snail.files import file_hash
from snail.pretrained import WEIGHTS
from snail.results import read_results
from snail.rl import TabularMDPs, value_iteration
from snail.rl.strategies import bayes_optimal_value

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "experiments" / "README.md").read_text()
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


def between(name: str, text: str = README) -> str:
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert found, name
    return found.group(1).strip()


def printed(argv: list[str]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0
    return out.getvalue().strip()


def test_readme_is_under_200_lines() -> None:
    assert len(README.splitlines()) < 200


def drawings(folder: Path, classes: int = 5) -> None:
    """What a reader of the README has: a folder ``few`` with one for each class, and a folder ``new``."""
    for i in range(classes):
        (folder / "few" / f"class{i}").mkdir(parents=True)
        (folder / "new").mkdir(exist_ok=True)
        picture = Image.new("L", (30, 30), 255)
        picture.paste(0, (4 * i, 4, 4 * i + 9, 26))
        picture.save(folder / "few" / f"class{i}" / "0.png")
        picture.save(folder / "new" / f"{i}.png")


def photographs(folder: Path, names: Iterable[str], images: int) -> None:
    """A folder for each class, tiny photographs of noise in it."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for j in range(images):
            noise = np.random.default_rng(list(f"{name} {j}".encode())).integers(0, 256, (84, 84, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{j}.jpg")


@pytest.fixture
def glyphs_run(tmp_path: Path, keep_run: Callable[..., Path]) -> None:
    """A checkpoint of the built-in config, as it is before training."""
    init_args = {"embedding": {"class_path": "snail.Conv4"}, "embedding_dim": 64}
    learner = SNAIL(Conv4(), 64, ways=5, max_shots=5)
    named = {"class_path": "snail.SNAIL", "init_args": init_args}
    data = {"class_path": "snail.datasets.Glyphs"}
    keep_run(tmp_path / "runs" / "glyphs_5way", learner, named, data, ways=5, max_shots=5)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_readme_snippet_runs(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glyphs_run: None) -> None:
    monkeypatch.chdir(tmp_path)
    drawings(tmp_path)
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
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "omniglot-py").symlink_to(omniglot_root / "omniglot-py")
    monkeypatch.setattr(mini_imagenet, "IMAGES", 12)
    for part, names in mini_imagenet.mini_imagenet_classes().items():
        photographs(tmp_path / "data" / "mini_imagenet" / part, names, images=12)
    photographs(tmp_path / "photos", map(str, range(40)), images=8)
    drawings(tmp_path)
    ran = 0
    for command in COMMANDS:
        program, *argv = shlex.split(command)
        if program != "snail":
            assert program in ("pip", "pytest")  # the gate runs these
            continue
        short = (
            [] if "--help" in argv else {"fit": SHORT, "test": SHORT[-2:-1], "validate": SHORT[-2:-1]}.get(argv[0], [])
        )
        if "--help" in argv:
            with pytest.raises(SystemExit):
                main(argv)
        else:
            assert main([*argv, *short]) == 0, command
        ran += 1
    assert ran >= 11
    assert (tmp_path / "predictions.csv").exists() and (tmp_path / "sheet.png").exists()
    assert (tmp_path / "runs" / "glyphs_5way" / "results.json").exists()
    assert (tmp_path / "runs" / "omniglot_5way" / "results.json").exists()


def test_the_gate_runs_the_readmes_test_command() -> None:
    gate = (ROOT / ".ci" / "run").read_text()
    install, run = next(line for line in SHELL if line.endswith("pytest")).split(" && ")
    assert install.removeprefix("pip install ") in gate and f"\n{run}\n" in gate


def test_readme_results_are_what_the_command_prints() -> None:
    outcomes = [
        "results",
        "--markdown",
        "--outcomes",
        *(f"--data={name}" for name in ("omniglot", "mini_imagenet", "glyphs")),
    ]
    assert between(f"snail {' '.join(outcomes)}") == printed(outcomes)
    assert between("snail results --markdown", MEASURED) == printed(["results", "--markdown"])
    assert between("snail rl results --markdown", MEASURED) == printed(["rl", "results", "--markdown"])
    assert f"can expect more than {bayes_optimal_value(5, 10):.3f}" in " ".join(MEASURED.split())


CLASSICAL = SHIPPED / "results" / "rl" / "classical.json"


def test_classical_rows_are_what_the_file_holds_and_the_picture_is_of_them() -> None:
    shown = between("snail rl classical", MEASURED)
    assert shown == printed(["rl", "classical", "--show", str(CLASSICAL)])
    with Image.open(CLASSICAL.with_suffix(".png")) as picture:
        agents = read_returns(sorted(SHIPPED.glob("results/rl/*/results.json")))
        assert picture.info["Source"] == picture_hash(read_classical([CLASSICAL]), agents)


def test_classical_rows_are_of_the_trials_that_agents_were_tested_on() -> None:
    groups = by_setting(read_classical([CLASSICAL]), read_returns(sorted(SHIPPED.glob("results/rl/*/results.json"))))
    assert [len(records) for records, _ in groups] == [11, 10, 12]
    for records, agents in groups:
        for record in (*records, *agents):
            assert record["trials"] == 10_000 and record["seed"] == 1_000_000
            if record.get("strategy") != BAYES:
                assert record["optimal"] == pytest.approx(records[0]["optimal"], rel=1e-6), record


def test_what_the_page_says_of_value_iteration() -> None:
    mdps, said = TabularMDPs(10_000, 10, seed=1_000_000), " ".join(MEASURED.split())
    mdps.reset()
    exact, discounted = (
        float(value_iteration(discount * mdps.transitions, mdps.rewards, 10)[0][0, :, 0].mean())
        for discount in (1, 0.99)
    )
    assert f"a return of 159.1, which is {100 * 159.1 / (10 * exact):.1f} % here" in said
    assert f"exact value iteration gives {exact:.1f}" in said and f"a discount of 0.99, {discounted:.1f}" in said


def test_readme_results_have_everything_that_is_needed_to_get_them_again() -> None:
    for path in SHIPPED.glob("results/*/results.json"):
        assert (path.parent / "config.yaml").is_file()
        for record in json.loads(path.read_text()):
            for key in ("dataset", "split", "split_hash", "shots", "queries", "episodes", "seed", "learner", "network"):
                assert record[key] is not None
            assert (record["ways"] is None) == ("mse" in record)  # regression alone has no ways
            assert record["ci95"] > 0 and record["batch_norm"] and record["hardware"] and record["versions"]


def test_the_picture_of_the_results_is_of_these_results() -> None:
    records = [with_published(record) for record in read_results(sorted(SHIPPED.glob("results/*/results.json")))]
    with Image.open(SHIPPED / "results" / "results.png") as picture:
        assert picture.info["Source"] == results_hash(records)
    assert "](experiments/results/results.png)" in README


KEPT = sorted(SHIPPED.glob(f"results/*/{WEIGHTS}"))


@pytest.mark.parametrize("weights", KEPT, ids=[path.parent.name for path in KEPT])
def test_kept_weights_are_those_that_were_scored(weights: Path, omniglot_root: Path) -> None:
    records = read_results([weights.parent / "results.json"])
    assert {record["checkpoint"] for record in records} == {file_hash(weights)}
    run = load_run(weights)
    if records[0]["dataset"] != "omniglot":
        return
    learner = Learner.from_pretrained(weights)
    data = Omniglot(omniglot_root, split=run.data.split)
    for record in records:
        shape = {key: record[key] for key in ("ways", "shots", "queries", "seed")}
        score = evaluate(learner, data.episodes("test", **shape, count=400))
        assert abs(score.mean - record["accuracy"]) < 2.5 * score.ci95 + 0.1, record


def test_kept_weights_are_small_enough_for_a_repository() -> None:
    assert sum(path.stat().st_size for path in KEPT) < 64e6


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_measured_is_what_the_file_holds(kind: str) -> None:
    path = SHIPPED / "results" / "bench" / f"{kind}.json"
    if not path.exists():
        (told,) = (paragraph for paragraph in MEASURED.split("\n\n") if f"`snail bench {kind}`" in paragraph)
        assert "not run yet" in told
        return
    report = json.loads(path.read_text())
    assert report["quick"] is False
    assert between(f"snail bench {kind}", MEASURED) == import_module(f"snail.experiments.bench.{kind}").markdown_table(
        report
    )


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "experiments" / "README.md"], ids=["README", "measured"])
def test_what_a_page_points_to_is_there(page: Path) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    assert targets
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_rates_are_what_their_runs_measured() -> None:
    files = sorted((SHIPPED / "results" / "rates").glob("*.csv"))
    assert len(files) == 4
    for path in files:
        with path.open(newline="") as file:
            last = [row for row in csv.DictReader(file) if row["val/accuracy"]][-1]
        config = yaml.safe_load(path.with_suffix(".yaml").read_text())
        rate = path.stem.removeprefix("rate_")
        assert config["model"]["optimizer"]["init_args"]["lr"] == float(rate)
        assert config["data"]["init_args"]["train_on_validation"] is False
        scores = " | ".join(f"{float(last[f'val/accuracy_{shots}shot']):.2f}" for shots in (1, 5))
        assert f"| {rate} | {scores} |" in MEASURED


def test_longer_training_gave_what_the_page_says() -> None:
    folder = SHIPPED / "results" / "longer"
    before, longer = (json.loads((folder / f"{name}.json").read_text()) for name in ("before", "scores"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    steps = config["trainer"]["max_epochs"] * config["data"]["init_args"]["steps_per_epoch"]
    began = longer[0]["training"]["started_from"]["started_from"]
    assert (began["steps"], f"{began['seconds'] / 60:.0f} minutes") == (steps, "84 minutes")
    assert f"{steps:,} further steps, 84 minutes, before the same end" in MEASURED
    for line, learner, records in (
        ("SNAIL before", "SNAIL", before),
        ("SNAIL, 10,000 steps more", "SNAIL", longer),
        ("ProtoNet, 10,000 steps more", "ProtoNet", longer),
    ):
        cells = [
            f"{record['accuracy']:.2f} ± {record['ci95']:.2f}"
            for setting in ((5, 1), (5, 5), (20, 1), (20, 5))
            for record in records
            if (record["learner"], record["ways"], record["shots"]) == (learner, *setting)
        ]
        assert f"| {line} | {' | '.join(cells)} |" in MEASURED


def test_what_a_start_as_a_prototypical_network_changed_is_what_the_page_says() -> None:
    results = SHIPPED / "results"

    def of_5_ways_1_shot(path: Path) -> float:
        (found,) = (r["accuracy"] for r in read_results([path]) if (r["ways"], r["shots"]) == (5, 1))
        return round(found, 2)

    now = of_5_ways_1_shot(results / "omniglot_random_5way_final" / "results.json")
    before = of_5_ways_1_shot(results / "longer" / "before.json")
    pupil = of_5_ways_1_shot(results / "omniglot_random_protonet_taught" / "results.json")
    assert f"5-way 1-shot lost {before - now:.2f}" in MEASURED
    assert f"There SNAIL is {pupil - now:.2f} below the ProtoNet" in MEASURED


def test_the_teacher_was_trained_as_the_page_says() -> None:
    record = read_results([SHIPPED / "results" / "omniglot_random_protonet_taught" / "results.json"])[0]
    last = record["training"]["teacher"]
    filters = "Conv-4 of 64-96-192-256, max-pooled"
    assert {r["network"] for r in read_results([SHIPPED / "results" / last["run"] / "results.json"])} == {filters}
    assert "more filters (64, 96, 192 and 256)" in MEASURED
    assert [last["started_from"]["steps"], last["steps"]] == [3000, 240]
    assert "was trained 3,000 steps further" in MEASURED and "240 on images as they are" in MEASURED


def test_what_photographs_as_they_are_gave_is_what_the_page_says() -> None:
    for name in ("annealed", "undistorted"):
        records = read_results([SHIPPED / "results" / f"mini_imagenet_protonet_residual_{name}" / "results.json"])
        said = " / ".join(f"{record['accuracy']:.2f}" for record in sorted(records, key=lambda r: r["shots"]))
        assert said in MEASURED
    assert records[0]["training"]["steps"] == 30 and "30 steps on\n  those" in MEASURED


def test_half_of_the_mistakes_are_on_as_few_images_as_the_page_says() -> None:
    records = read_results([SHIPPED / "results" / "omniglot_random_20way_final" / "results.json"])
    (record,) = (record for record in records if record["shots"] == 5)
    cost = (100 - record["accuracy"]) / 2
    assert f"on {record['half_of_mistakes']} of the 8,460 test images, which alone cost {cost:.2f} points" in MEASURED
