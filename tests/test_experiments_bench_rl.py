"""``snail bench rl``: both ways say the same, and the table is made of what was measured."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from snail.experiments.bench import common, rl
from snail.experiments.bench.rl import markdown_table, play_again, time_playing
from snail.rl import Bandits, SNAILAgent, roll_out


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def small() -> Namespace:
    return Namespace(trials=3, positions=2, pairs=2)


def test_reading_again_says_what_playing_did() -> None:
    agent, environment = SNAILAgent(0, 3, 6, features=4).double(), Bandits(4, 3, 6)
    trials = roll_out(agent, environment)
    said = play_again(agent, environment, trials.inputs, range(6)).gather(-1, trials.actions[..., None])[..., 0]
    assert float((said - trials.log_probabilities).abs().max()) < 1e-12


def test_times_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))  # each look at the clock is a second later
    monkeypatch.setattr(rl, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    row = time_playing(8, small())
    assert row["positions"] == [2, 6] and (row["steps"], row["trials"]) == (8, 3)
    assert row["pairs"] == [{"shared_ms": 1000 / (8 * 3), "plain_ms": 1000 / (2 * 3)}] * 2
    assert row["ratio"] == pytest.approx(4)
    assert (row["steps_per_second"], row["plain_steps_per_second"]) == pytest.approx((24, 6))
    assert row["max_difference"] <= common.TOLERANCE


def test_ways_that_say_different_things_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rl, "play_again", lambda *given: play_again(*given) + 1e-6)
    with pytest.raises(ValueError, match="a trial played on and one that is read again differ by"):
        rl.main(["--quick", "--output", str(tmp_path / "times.json")])
    assert not list(tmp_path.iterdir())


def test_quick_writes_every_number_and_the_table_is_made_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rl, "STEPS", (16, 32))
    path = tmp_path / "times.json"
    assert rl.main(["--quick", "--output", str(path)]) == 0
    printed, report = capfd.readouterr().out, json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "playing",
    }  # fmt: skip
    (row,) = report["playing"]
    assert (row["steps"], row["trials"], len(row["pairs"])) == (16, 2, 1)
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("shared_ms", "plain_ms", "ratio"))
    assert markdown_table(report) in printed
    assert rl.main(["--show", str(path)]) == 0
    assert capfd.readouterr().out == markdown_table(report) + "\n"


def test_the_table_tells_steps_a_second() -> None:
    row = {"steps": 1000, "arms": 10, "trials": 20, "positions": [25, 75], "pairs": [{}] * 3}
    row |= {"steps_per_second": 12345.6, "plain_steps_per_second": 67.8, "ratio": 182, "ratio_min": 170.04}
    row |= {"ratio_max": 190}
    report = {"playing": [row], "hardware": "a processor", "versions": {"torch": "2.9"}, "load": 0.1}
    assert markdown_table(report | {"keep_memory": False}).splitlines() == [
        "| trials of | here, steps a second | read again, steps a second | ratio (spread) | plain way timed on |",
        "| --- | --- | --- | --- | --- |",
        "| 1,000 steps | 12,346 | 68 | 182.0 (170.0 to 190.0) | 2 of 1,000 steps |",
        "",
        "SNAIL on bandits of 10 arms, 20 trials side by side; the roll-out also reads values.",
        "a processor, torch 2.9, median of 3 pairs, load 0.1 in the minute before.",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs", "0"], "argument --pairs: 0 is not a whole number of at least 1"),
        (["--trials=x"], "argument --trials: x is not a whole number of at least 1"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--position", "5"], "unrecognized arguments: --position 5"),
    ],
)
def test_bad_options_are_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as error:
        rl.main(argv)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        rl.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("roll-out", "--trials", "--quick", "OMP_NUM_THREADS"))
