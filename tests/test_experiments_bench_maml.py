import contextlib
import io
import json
import math
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from snail.experiments.bench import common, maml, processes
from snail.experiments.bench.maml import OURS, PEERS, RECOMPUTED, WAYS, Setting, markdown_table, meta_gradient
from snail.experiments.cli import main as snail


def small(steps: int = 1) -> Setting:
    return Setting(ways=3, steps=steps, tasks=2, filters=4)


# -- the ways agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("way", [*list(WAYS)[1:], "1", "2"])
def test_every_way_gives_the_meta_gradient_of_the_package(way: str, steps: int) -> None:
    if way in PEERS:
        pytest.importorskip(way, exc_type=ImportError)
    expected = meta_gradient(OURS, small(steps))
    assert expected.dtype == torch.float64
    assert len(expected) == sum(parameter.numel() for parameter in small().network().parameters())
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(meta_gradient(way, small(steps)), expected, rtol=0, atol=1e-11)


def test_the_meta_gradient_depends_on_the_setting_alone() -> None:
    first = meta_gradient(OURS, small())
    torch.manual_seed(1)
    assert torch.equal(meta_gradient(OURS, small()), first)
    assert not torch.allclose(meta_gradient(OURS, small(2)), first, rtol=0, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------------------------


def without_the_last(network: nn.Module, setting: Setting) -> maml.Backward:
    list(network.parameters())[-1].requires_grad_(False)
    return maml.package(network, setting)


WRONG = {"first order": partial(maml.package, first_order=True), "a weight left out": without_the_last}


class Here:
    """A way in this process, which knows what a test put in place, with times and memory made up."""

    seconds: dict[str, Iterator[float]]
    memory: dict[str, int | None]
    ended: list[str]

    def __init__(self, way: str, serve: Any, job: Any) -> None:
        self.job = job

    def receive(self) -> list[float]:
        if self.job.way == "broken":
            raise RuntimeError("the way 'broken' failed")
        gradient: list[float] = meta_gradient(self.job.way, small()).tolist()
        return gradient

    def step(self) -> float:
        return next(self.seconds[self.job.way])

    def ask(self, what: str) -> int | None:
        assert what == "stop"
        return self.memory[self.job.way]

    def end(self) -> None:
        self.ended.append(self.job.way)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(maml, "Process", Here)
    for made_up in ("seconds", "memory"):
        monkeypatch.setattr(Here, made_up, {}, raising=False)
    monkeypatch.setattr(Here, "ended", [], raising=False)
    return Here


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_way_is_not_timed(
    wrong: str, here: type[Here], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(maml, "WAYS", {OURS: WAYS[OURS], wrong: WRONG[wrong]})
    with pytest.raises(ValueError, match=f"the meta-gradients of 'package' and '{wrong}' differ by"):
        maml.main(["--quick", "--output", str(tmp_path / "times.json")])
    assert sorted(here.ended) == sorted([OURS, wrong])
    assert not list(tmp_path.iterdir())


def test_times_are_those_of_a_task_and_ratios_those_of_a_round(here: type[Here]) -> None:
    here.seconds = {OURS: iter([9.0, 0.002, 0.004, 0.008]), "plain loop": iter([9.0, 0.006, 0.004, 0.032])}
    here.memory = {OURS: 3 * 2**20, "plain loop": None}
    options = Namespace(device="cpu", keep_memory=False, pairs=3)
    measured = maml.measure([OURS, "plain loop"], small(), options, {})
    assert list(measured) == [OURS, "plain loop"]
    assert measured[OURS]["ms_each"] == [1, 2, 4]  # 2 tasks; the first round warms up
    assert [measured[OURS][key] for key in ("ms", "ratio", "ratio_min", "ratio_max")] == [2, 1, 1, 1]
    assert [measured["plain loop"][key] for key in ("ms", "ratio", "ratio_min", "ratio_max")] == [3, 3, 1, 4]
    assert (measured[OURS]["memory_mib"], measured["plain loop"]["memory_mib"]) == (3, None)
    assert measured[OURS]["max_difference"] == 0
    assert measured["plain loop"]["max_difference"] < 1e-11
    assert sorted(here.ended) == [OURS, "plain loop"]


def test_a_broken_way_is_an_error_and_a_broken_peer_is_left_out(
    here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Namespace(device="cpu", keep_memory=False, pairs=1)
    with pytest.raises(RuntimeError, match="the way 'broken' failed"):
        maml.measure([OURS, "broken"], small(), options, {})
    monkeypatch.setattr(maml, "PEERS", ("broken",))
    here.seconds, here.memory = {OURS: iter([1.0, 1.0])}, {OURS: 0}
    left_out: dict[str, str] = {}
    assert list(maml.measure([OURS, "broken"], small(), options, left_out)) == [OURS]
    assert left_out == {"broken": "the way 'broken' failed"}
    assert sorted(here.ended) == sorted([OURS, "broken"] * 2)


def test_a_process_that_ended_is_an_error_that_names_its_way() -> None:
    process = processes.Process(OURS, maml._serve, maml._Job(OURS, small(), "cpu", 1, False))
    try:
        process.process.kill()
        process.process.join()
        for answer in (process.receive, process.step):
            with pytest.raises(RuntimeError, match="the process of the way 'package' ended with exit code"):
                answer()
    finally:
        process.end()


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of a quick run, and what it printed."""
    path, out = tmp_path_factory.mktemp("quick") / "times.json", io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(maml, "SWEEP", (2, 4))  # a process less; 4 are more than there are
        assert snail(["bench", "maml", "--quick", f"--output={path}"]) == 0
    return path, out.getvalue()


def test_quick_writes_every_field(quick: tuple[Path, str]) -> None:
    path, _ = quick
    assert [file.name for file in path.parent.iterdir()] == ["times.json"]
    report = json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "network", "left_out",
        "settings",
    }  # fmt: skip
    assert (report["device"], report["dtype"], report["keep_memory"], report["quick"]) == (
        "cpu",
        "float32",
        False,
        True,
    )
    assert report["threads"] == torch.get_num_threads()

    (row,) = report["settings"]
    timings, sweep = row.pop("timings"), row.pop("sweep")
    assert row == {
        "ways": 5, "steps": 1, "tasks": 2, "filters": 64, "rate": 0.1, "shots": 1, "queries_per_class": 1,
        "tasks_at_once": 2,
    }  # fmt: skip
    assert timings.keys() | report["left_out"].keys() == WAYS.keys() - {RECOMPUTED}
    assert report["left_out"].keys() == set(PEERS) - timings.keys()
    assert report["versions"].keys() - {"commit"} == {"snail", "torch", "python"} | (set(PEERS) & timings.keys())
    assert sweep.keys() == {"2"}
    for timing in (*timings.values(), *sweep.values()):
        assert timing.keys() == {
            "ms", "ratio", "ratio_min", "ratio_max", "memory_mib", "max_difference", "ms_each",
        }  # fmt: skip
        assert timing["ms_each"] == [timing["ms"]]
        assert all(math.isfinite(timing[key]) and timing[key] > 0 for key in ("ms", "ratio", "ratio_min", "ratio_max"))
        assert timing["memory_mib"] is None or timing["memory_mib"] >= 0
        assert timing["max_difference"] <= common.TOLERANCE
    for first in (timings[OURS], sweep["2"]):
        assert (first["ratio"], first["ratio_min"], first["ratio_max"], first["max_difference"]) == (1, 1, 1, 0)


def test_quick_leaves_out_what_cannot_be_imported(quick: tuple[Path, str]) -> None:
    report = json.loads(quick[0].read_text())
    for peer in (peer for peer in PEERS if find_spec(peer) is None):
        why = f"ModuleNotFoundError: No module named '{peer}'"
        assert report["left_out"][peer] == f"the way '{peer}' failed with {why}"


def test_quick_prints_the_ways(quick: tuple[Path, str]) -> None:
    path, printed = quick
    report = json.loads(path.read_text())
    assert "5-way 1-shot, 1 step, 2 tasks\n" in printed
    lines = [line.strip() for line in printed.splitlines()]
    for name in (*report["settings"][0]["timings"], "tasks_at_once 2"):
        assert any(line.startswith(f"{name}  ") for line in lines), name
    assert [line for line in lines if line.startswith("left out: ")] == [
        f"left out: {reason}" for reason in report["left_out"].values()
    ]
    assert lines[-2:] == [maml.fastest(report), f"every number: {path}"]


def test_show_prints_the_tables_of_a_file(quick: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert snail(["bench", "maml", "--show", str(quick[0])]) == 0
    assert capsys.readouterr() == (markdown_table(json.loads(quick[0].read_text())) + "\n", "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs=0"], "argument --pairs: 0 is not a whole number of at least 1"),
        (["--tasks", "many"], "argument --tasks: many is not a whole number of at least 1"),
        (["--episodes=2"], "unrecognized arguments: --episodes=2"),
        (["--quick", "--pair", "5"], "unrecognized arguments: --pair 5"),
        (["--output"], "argument --output: expected one argument"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--device", "cuda"], "--device cuda needs a GPU that torch can use, and there is none here"),
        (
            ["--keep_memory"],
            "the C library of this machine cannot be told to keep memory; leave out --keep_memory",
        ),
    ],
)
def test_bad_options_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "keep_memory", lambda: False)
    assert snail(["bench", "maml", *argv]) == 1
    assert capsys.readouterr() == ("", f"snail: error: {message}\n")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        maml.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("meta-step", "learn2learn", "--output", "--quick", "OMP_NUM_THREADS"))


# -- the tables ------------------------------------------------------------------------------------------------------


def timing(ms: float, memory: float | None, *spread: float) -> dict[str, object]:
    middle, least, most = spread or (1.0, 1.0, 1.0)
    return {
        "ms": ms, "ratio": middle, "ratio_min": least, "ratio_max": most, "memory_mib": memory,
        "max_difference": 0.0, "ms_each": [ms, ms, ms],
    }  # fmt: skip


@pytest.fixture
def report() -> dict[str, Any]:
    one_step = {
        "timings": {
            "plain loop": timing(3.0, 99.6, 1.504, 1.2, 2.046),
            OURS: timing(2.004, 1234.5),
        },
        "sweep": {"1": timing(2.5, 10.0), "2": timing(1.5, 10.0), "16": timing(2.0, 10.0)},
    }
    five_steps = {
        "timings": {
            OURS: timing(10.0, None),
            RECOMPUTED: timing(15.0, 7.0, 1.5, 1.25, 1.75),
        },
        "sweep": {"1": timing(7.125, 10.0), "2": timing(8.0, 10.0)},
    }
    return {
        "device": "cpu",
        "hardware": "a processor, 2 threads",
        "versions": {"snail": "0", "torch": "2.9", "python": "3", "higher": "0.2.1"},
        "load": 0.25,
        "keep_memory": False,
        "settings": [
            {"ways": 5, "steps": 1, "tasks": 32, "tasks_at_once": 8, **one_step},
            {"ways": 20, "steps": 5, "tasks": 8, "tasks_at_once": 2, **five_steps},
        ],
    }


def test_the_table_holds_ratios_with_spread_and_memory_and_the_sentence_what_was_fastest(
    report: dict[str, Any],
) -> None:
    assert markdown_table(report).splitlines() == [
        "|  | package, ms a task | plain loop | package, recomputed |",
        "| --- | --- | --- | --- |",
        "| 5-way 1-shot, 1 step, 32 tasks, 8 at once | 2.00, 1,234 MiB | 1.50 (1.20 to 2.05), 100 MiB |  |",
        "| 20-way 1-shot, 5 steps, 8 tasks, 2 at once | 10.00 |  | 1.50 (1.25 to 1.75), 7 MiB |",
        "",
        "Fastest tasks at once here: 2 for 5-way 1-shot, 1 step; 1 for 20-way 1-shot, 5 steps; "
        "`--model.learner.init_args.tasks_at_once N` sets it.",
        "a processor, 2 threads, torch 2.9, higher 0.2.1, median of 3 pairs, load 0.25 in the minute before.",
    ]


def test_kept_memory_and_a_gpu_are_told(report: dict[str, Any]) -> None:
    report |= {"keep_memory": True, "device": "cuda"}
    *_, fastest, facts = markdown_table(report).splitlines()
    assert fastest == maml.fastest(report)
    assert "higher 0.2.1, memory kept, median of 3 pairs" in facts


# -- memory ----------------------------------------------------------------------------------------------------------

GROWTH = """\
from snail.experiments.bench.processes import peak_memory

held, peak = [], peak_memory()
while peak is not None and peak_memory() == peak:  # until what is held is the peak: imports may have freed some
    held.append(bytearray(b"x") * 2**26)
before = peak_memory()
held.append(bytearray(b"x") * 2**26)
after = peak_memory()
held.clear()
print(None if peak is None else [after - before, after - peak_memory()])
"""


def test_peak_memory_grows_by_what_is_used_and_never_falls() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.replace("None", "null"))
    if told is None:
        pytest.skip("this system does not tell")
    grown, fallen = told
    # The kernel counts pages in batches for each processor, so that a little may be missing.
    assert 60 * 2**20 <= grown <= 80 * 2**20
    assert abs(fallen) <= 4 * 2**20
