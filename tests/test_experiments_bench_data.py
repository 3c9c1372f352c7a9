"""``snail bench data``: both ways give the same images, and the report holds every number that it prints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from snail import NearestNeighbour
from snail.datasets import Glyphs
from snail.experiments.bench import data as data_bench
from snail.experiments.bench.data import OneFileAnItem, markdown_table, time_drawing, time_waiting
from snail.experiments.cli import main


def test_files_hold_what_the_array_holds(tmp_path: Path) -> None:
    images = Glyphs().images("test")
    files = OneFileAnItem(images, tmp_path)
    indices = torch.tensor([[3, 700], [3999, 0]])
    files.write(indices)
    assert len(list(tmp_path.iterdir())) == 4
    assert torch.equal(files.take(indices), images.take(indices))


def test_ways_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OneFileAnItem.take
    monkeypatch.setattr(OneFileAnItem, "take", lambda self, indices: real(self, indices) / 2)
    with pytest.raises(ValueError, match="differs from that in the array"):
        time_drawing(Glyphs(), (5, 1, 1), tmp_path, pairs=1)


def test_the_share_of_waiting_is_that_of_the_time_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(1000))  # each look at the clock is a second later: one for data, one for the rest
    monkeypatch.setattr(data_bench.time, "perf_counter", lambda: float(next(now)))
    learner = NearestNeighbour(5, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 4)))
    row = time_waiting(Glyphs(batch_size=2), learner, steps=3, what="a trial")
    assert row == {"data": "glyphs", "what": "a trial", "steps": 3, "seconds": 6.0, "waiting_share": 0.5}


def test_quick_writes_every_number_and_the_table_is_made_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "times.json"
    assert main(["bench", "data", "--quick", "--output", str(path)]) == 0
    printed, report = capfd.readouterr().out, json.loads(path.read_text())
    (row,), (waiting,) = report["drawing"], report["waiting"]
    assert (row["data"], row["ways"], row["shots"], row["queries_per_class"]) == ("glyphs", 5, 1, 1)
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("episodes_per_second", "one_file_an_item", "ratio"))
    assert 0 < waiting["waiting_share"] < 1 and report["quick"] is True
    assert "glyphs, 5-way 1-shot, 1 queries" in printed and "SNAIL on glyphs" in printed
    assert main(["bench", "data", "--show", str(path)]) == 0
    assert capfd.readouterr().out.strip() == markdown_table(report)


def test_the_table_holds_rates_ratios_and_shares() -> None:
    row = {"data": "omniglot", "ways": 5, "shots": 1, "queries_per_class": 1, "pairs": [{}, {}]}
    row |= {"episodes_per_second": 12345.6, "one_file_an_item": 210.4, "ratio": 58.7, "ratio_min": 50, "ratio_max": 60}
    report = {"drawing": [row], "hardware": "a processor", "versions": {"torch": "2.9"}, "load": 0.1}
    report |= {"waiting": [{"what": "SNAIL on omniglot", "steps": 250, "waiting_share": 0.0123}]}
    assert markdown_table(report).splitlines() == [
        "| ready episodes a second | here | a file opened for each item | ratio (spread) |",
        "| --- | --- | --- | --- |",
        "| omniglot, 5-way 1-shot, 1 a class | 12,346 | 210 | 58.7 (50.0 to 60.0) |",
        "",
        "Time of training steps spent waiting for data: SNAIL on omniglot 1.2 % of 250 steps.",
        "a processor, torch 2.9, median of 2 pairs, load 0.1 in the minute before.",
    ]


def test_bad_options_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "data", "--pairs", "0"]) == 1
    assert "0 is not a whole number of at least 1" in capfd.readouterr().err
