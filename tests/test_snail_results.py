import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from snail import Result
from snail.results import (
    IDENTITY,
    merge_results,
    outcomes,
    read_results,
    results_markdown,
    results_table,
    trainings_before,
)


def row(**changed: Any) -> dict[str, Any]:
    facts = {"dataset": "made-up", "split": "all/test", "split_hash": "00", "learner": "SNAIL", "checkpoint": "11"}
    facts |= {"ways": 5, "shots": 1, "queries": 1, "episodes": 100, "seed": 0, "batch_norm": "inductive"}
    return facts | {"accuracy": 90.0, "ci95": 1.0} | changed


def test_merge_results_makes_the_file_and_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "results.json"
    assert merge_results(path, [row()]) == [row()]
    assert json.loads(path.read_text()) == [row()]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_merge_results_replaces_the_same_measurement_and_keeps_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge_results(path, [row(), row(shots=5), row(ways=20)])
    merged = merge_results(path, [row(shots=5, accuracy=95.0), row(seed=1)])
    assert merged == [row(), row(shots=5, accuracy=95.0), row(ways=20), row(seed=1)]
    assert json.loads(path.read_text()) == merged


@pytest.mark.parametrize("key", IDENTITY)
def test_merge_results_keeps_apart_what_differs_in(key: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge_results(path, [row()])
    assert merge_results(path, [row(**{key: "another"})]) == [row(), row(**{key: "another"})]


@pytest.mark.parametrize("key", ["accuracy", "ci95", "seconds", "hardware", "versions"])
def test_merge_results_takes_a_repetition_for_the_same_in_spite_of(key: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge_results(path, [row()])
    assert merge_results(path, [row(**{key: "another"})]) == [row(**{key: "another"})]


def test_merge_results_takes_records_without_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    bare = {key: value for key, value in row().items() if key != "checkpoint"}
    merge_results(path, [bare])
    assert merge_results(path, [bare, row()]) == [bare, row()]


def test_merge_results_reads_back_one_episode(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge_results(path, [row(**Result.of(torch.tensor([1.0])).record())])
    (again,) = merge_results(path, [])
    assert again["ci95"] is None  # JSON has no NaN
    assert "100.00 ± ? %" in results_table([again])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b'[{"dataset": "made-', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"dataset": "made-up"}', "does not hold a list of results"),
        (b"[1, 2]", "does not hold a list of results"),
        (b"[\xff\xfe]", "is not valid JSON"),
    ],
    ids=["cut short", "empty", "no list", "no records", "not text"],
)
def test_merge_results_refuses_a_damaged_file_and_leaves_it(damage: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"results\.json {message}.*; move it away"):
        merge_results(path, [row()])
    assert path.read_bytes() == damage
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Path, Path, str]]]:
    """Die at the moment of the renaming, having noted it and what was to be renamed."""
    moves = []

    def replace(self: Path, target: Path) -> None:
        moves.append((self, Path(target), self.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", replace)
    yield moves


def test_merge_results_killed_before_the_renaming_leaves_the_old_file(
    tmp_path: Path, killed: list[tuple[Path, Path, str]]
) -> None:
    path = tmp_path / "results.json"
    old = json.dumps([row()])
    path.write_text(old)
    with pytest.raises(KeyboardInterrupt):
        merge_results(path, [row(seed=1)])
    assert path.read_text() == old
    ((beside, target, content),) = killed
    assert (beside.parent, target) == (tmp_path, path)  # a renaming within a folder is one step
    assert json.loads(content) == [row(), row(seed=1)]


def test_merge_results_works_after_a_kill(tmp_path: Path, killed: list[tuple[Path, Path, str]]) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt):
        merge_results(path, [row()])
    assert not path.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", Path.rename)
        assert merge_results(path, [row(seed=1)]) == [row(seed=1)]


def test_read_results_reads_files_in_order_and_passes_over_missing_ones(tmp_path: Path) -> None:
    one, other, missing = (tmp_path / f"{name}.json" for name in ("one", "other", "missing"))
    merge_results(one, [row()])
    merge_results(other, [row(seed=1), row(seed=2)])
    assert read_results([other, missing, one]) == [row(seed=1), row(seed=2), row()]
    with pytest.raises(FileNotFoundError, match=r"there is no .*missing\.json"):
        read_results([one, missing], must_exist=True)


def test_results_table_mentions_every_row() -> None:
    rows = [
        row(),
        row(
            learner="MAML", shots=5, accuracy=98.765, ci95=0.125, episodes=10_000, batch_norm="transductive", run="one"
        ),
        row(versions={"commit": "0a1b"}, dataset="omniglot", split="vinyals/test", ways=20),
    ]
    head, rule, *lines = (line.rstrip() for line in results_table(rows).splitlines())
    assert head.startswith(
        "learner  data                   ways  shots  accuracy (95 % interval)  episodes  batch norm"
    )
    assert head.endswith("seed  run  commit")
    assert set(rule) == {"-"}
    assert lines == [
        "SNAIL    made-up all/test       5     1      90.00 ± 1.00 %            100       inductive     0",
        "MAML     made-up all/test       5     5      98.77 ± 0.12 %            10,000    transductive  0     one",
        "SNAIL    omniglot vinyals/test  20    1      90.00 ± 1.00 %            100       inductive     0"
        + 10 * " "
        + "0a1b",
    ]


def test_tables_of_nothing_say_so() -> None:
    assert results_table([]) == results_markdown([]) == "no results"


def test_results_markdown_has_a_table_a_data_set_a_line_a_run_and_a_column_a_setting() -> None:
    training = {"steps": 3500, "seconds": 2520.4, "hardware": "a processor"}
    later = training | {"started_from": {"run": "embedding", "steps": 10, "seconds": 60, "hardware": "two processors"}}
    snail = {"dataset": "omniglot", "split": "vinyals/test", "training": training}
    records = [
        row(),
        row(**snail, ways=20, shots=1, accuracy=93.0, run="wide", versions={"commit": "0a1b"}),
        row(**snail, ways=5, shots=5, accuracy=98.765, ci95=0.125, published="99.78 ± 0.09", run="narrow"),
        row(**snail, ways=5, shots=5, accuracy=97.0, learner="MAML", inner_steps=3, batch_norm="transductive"),
        row(**snail | {"training": later}, ways=5, shots=5, accuracy=96.0),
    ]
    assert results_markdown(records).splitlines() == [
        "**made-up all/test**: accuracy in % ± 95 % interval",
        "",
        "| learner | 5-way 1-shot | batch norm | episodes |",
        "| --- | --- | --- | --- |",
        "| SNAIL | 90.00 ± 1.00 | inductive | 100 |",
        "",
        "**omniglot vinyals/test**: accuracy in % ± 95 % interval (published)",
        "",
        "| learner | inner steps | 5-way 5-shot | 20-way 1-shot | batch norm | episodes | trained | run | commit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| SNAIL |  | 98.77 ± 0.12 (99.78 ± 0.09) | 93.00 ± 1.00 | inductive | 100 | "
        "3,500 steps, 42 min on a processor | wide, narrow | 0a1b |",
        "| MAML | 3 | 97.00 ± 1.00 |  | transductive | 100 | 3,500 steps, 42 min on a processor |  |  |",
        "| SNAIL |  | 96.00 ± 1.00 |  | inductive | 100 | 3,500 steps, 42 min on a processor, "
        "begun with embedding of 10 steps, 1 min on two processors |  |  |",
    ]


def test_what_came_before_a_training_is_told_together() -> None:
    def trained(run: str, before: dict[str, Any] | None = None, **more: str) -> dict[str, Any]:
        facts = {"run": run, "steps": 1000, "seconds": 600, "hardware": "a GPU", **more}
        return facts if before is None else facts | {"started_from": before}

    first = trained("first", on="all classes", note="mirror images too, distorted")
    second = trained("second", first, on="all classes", note="distorted", hardware="a CPU")
    last = results_markdown([row(training=trained("third", second))]).splitlines()[-1]
    assert (
        "| 1,000 steps, 10 min on a GPU, begun with second, after first of 2,000 steps, all classes, distorted, "
        "mirror images too, 20 min on a CPU and a GPU |"
    ) in last
    del first["seconds"]
    last = results_markdown([row(training=trained("third", second))]).splitlines()[-1]
    assert "begun with second, after first of unknown training |" in last


def test_a_teacher_is_told_of_once_with_what_came_before_it() -> None:
    def trained(name: str, **before: dict[str, Any]) -> dict[str, Any]:
        return {"run": name, "checkpoint": name, "steps": 1000, "seconds": 600, "hardware": "a GPU", **before}

    first = trained("first")
    teacher = trained("teacher", started_from=trained("growing", started_from=first))
    pupil = trained("pupil", started_from=first, teacher=teacher)
    told = results_markdown([row(training=trained("last", started_from=pupil))]).splitlines()[-1]
    assert (
        "| 1,000 steps, 10 min on a GPU, begun with pupil, after first of 2,000 steps, 20 min on a GPU, "
        "taught by teacher, after growing of 2,000 steps, 20 min on a GPU |"
    ) in told
    assert [run["run"] for run in trainings_before(pupil)] == ["first", "teacher", "growing", "first"]


def test_results_markdown_of_regression_has_a_line_for_each_number_of_inner_steps() -> None:
    def wave(shots: int, inner_steps: int, mse: float) -> dict[str, Any]:
        record = row(ways=None, shots=shots, inner_steps=inner_steps, mse=mse, ci95=0.1)
        del record["accuracy"]
        return record

    assert results_markdown([wave(10, 1, 0.5), wave(5, 0, 3.0), wave(5, 1, 0.75)]).splitlines()[2:] == [
        "| learner | inner steps | 5-shot | 10-shot | batch norm | episodes |",
        "| --- | --- | --- | --- | --- | --- |",
        "| SNAIL | 1 | 0.750 ± 0.100 | 0.500 ± 0.100 | inductive | 100 |",
        "| SNAIL | 0 | 3.000 ± 0.100 |  | inductive | 100 |",
    ]


def test_outcomes_leave_out_the_stages_of_the_same_learner_and_network() -> None:
    def record(run: str, *before: str, learner: str = "ProtoNet", network: str = "Conv-4") -> dict[str, Any]:
        training: dict[str, Any] = {}
        for name in reversed(before):
            training = {"started_from": {"run": name} | training}
        return {"learner": learner, "network": network, "run": run, "training": training}

    records = [
        record("first"),
        record("second", "first"),
        record("third", "second", "first"),
        record("alone"),
        record("wide", network="Conv-4 of 96"),
        record("other", "third", "second", "first", learner="SNAIL"),
        record("grown", "wide"),
        {"learner": "NearestNeighbour", "network": "pixels"},
    ]
    assert outcomes(records) == records[2:]
    assert outcomes(records[:1]) == records[:1]
