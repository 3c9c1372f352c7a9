"""``snail bench scoring``: both ways give the same scores, and the table is made of what was measured."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from snail import SNAIL, Conv4
from snail.datasets import Glyphs, glyphs
from snail.evaluation import Scorer
from snail.experiments.bench import common, scoring
from snail.experiments.bench.scoring import CountedEmbedding, check_scores, markdown_table, time_scoring

IMAGES = 120  # of the few test classes below


@pytest.fixture(autouse=True)
def few_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(glyphs.CLASSES, "test", IMAGES // 20)
    torch.manual_seed(0)


def small(episodes: int = 40, sample: int = 20, pairs: int = 2) -> Namespace:
    return Namespace(episodes=episodes, sample=sample, pairs=pairs)


def test_an_embedding_counts_what_it_embeds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([1.0, 3.0, 10.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    network = Conv4(filters=2, out_features=3).eval()
    embedding, images = CountedEmbedding(network), torch.rand(4, 1, 28, 28)
    assert torch.equal(embedding(images), network(images))
    embedding(images[:1])
    assert (embedding.images, embedding.seconds) == (5, 6.0)
    embedding.reset()
    embedding(images[:2])
    assert (embedding.images, embedding.seconds) == (2, 1.0)


def test_times_shares_and_images_are_those_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))  # each look at the clock is a second later
    monkeypatch.setattr(scoring, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    row = time_scoring(Glyphs(), small())
    # Two looks around all, two around each call of the embedding: once here, for two batches of the sample there.
    assert row["pairs"] == [{"shared_ms": 3000 / 40, "plain_ms": 5000 / 20}] * 2
    assert (row["shared_ms"], row["plain_ms"], row["ratio"]) == (75, 250, 250 / 75)
    assert row["embedding_shares"] == [1 / 3, 1 / 3] and row["embedding_share"] == 1 / 3
    assert (row["images"], row["sample_images"]) == (IMAGES, 20 * 5 * 6)
    assert (row["episodes"], row["sample"], row["data"]) == (40, 20, "glyphs")


def test_what_is_checked_leaves_the_network_as_it_was() -> None:
    learner = SNAIL(Conv4(filters=4, out_features=8), 8, 5, 1)
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    sample = Glyphs().episodes("test", ways=5, shots=1, queries=1, count=8, seed=0)
    checked = check_scores(learner, sample)
    assert checked["max_difference"] <= common.TOLERANCE and 0 < checked["accuracy"] < 100
    assert learner.training
    for name, value in learner.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_ways_that_answer_differently_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = scoring.OneQueryASequence.forward
    monkeypatch.setattr(scoring.OneQueryASequence, "forward", lambda self, *given: real(self, *given) + 1e-6)
    with pytest.raises(ValueError, match="one support and one query a sequence differ by"):
        scoring.main(["--quick", "--output", str(tmp_path / "times.json")])
    assert not list(tmp_path.iterdir())


def test_a_pool_that_is_embedded_wrongly_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers to episodes that carry their images agree, but the scores do not."""
    real = Scorer._embed

    def mixed_up(self: Scorer, *given: Any) -> Tensor:
        return real(self, *given).roll(1, 0)

    monkeypatch.setattr(Scorer, "_embed", mixed_up)
    with pytest.raises(ValueError, match=r"the two ways give \d+ of 20 episodes different scores"):
        time_scoring(Glyphs(), small())


def test_quick_writes_every_number_and_the_table_is_made_of_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "times.json"
    assert scoring.main(["--quick", "--output", str(path)]) == 0
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["times.json"]
    printed, report = capfd.readouterr().out, json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "scoring",
    }  # fmt: skip
    row = report["scoring"]
    assert (row["ways"], row["shots"], row["queries_per_class"]) == (5, 1, 1)
    assert (row["episodes"], row["sample"], len(row["pairs"])) == (100, 10, 1)
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("shared_ms", "plain_ms", "ratio"))
    assert 0 < row["embedding_share"] < 1
    assert row["split_hash"] == Glyphs().episodes("test", ways=5, shots=1).facts["split_hash"]
    assert markdown_table(report) in printed
    assert scoring.main(["--show", str(path)]) == 0
    assert capfd.readouterr().out == markdown_table(report) + "\n"


def test_omniglot_is_scored_in_the_place_of_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception): ...

    scored: list[Any] = []

    def time_nothing(data: Any, options: Namespace) -> dict[str, Any]:
        scored.append(data)
        raise Stopped

    monkeypatch.setattr(scoring, "Omniglot", lambda root: ("omniglot", root))
    monkeypatch.setattr(scoring, "time_scoring", time_nothing)
    for argv in ([], [f"--omniglot={tmp_path}"]):
        with pytest.raises(Stopped):
            scoring.main(["--quick", *argv, "--output", str(tmp_path / "times.json")])
    assert isinstance(scored[0], Glyphs) and scored[1] == ("omniglot", tmp_path)


def test_the_table_is_scaled_to_all_episodes() -> None:
    row = {"data": "omniglot", "ways": 5, "shots": 1, "queries_per_class": 1, "episodes": 10_000, "sample": 200}
    row |= {"shared_ms": 1.234, "plain_ms": 20.5, "ratio": 16.6, "ratio_min": 12.04, "ratio_max": 19, "pairs": [{}] * 3}
    row |= {"images": 8460, "sample_images": 6000, "embedding_share": 0.314}
    report = {"scoring": row, "hardware": "a processor", "versions": {"torch": "2.9"}, "load": 0.1, "keep_memory": True}
    assert markdown_table(report).splitlines() == [
        "| 10,000 episodes | here, s | one query a sequence, s | ratio (spread) | asked | images embedded |",
        "| --- | --- | --- | --- | --- | --- |",
        "| omniglot, 5-way 1-shot, 1 a class | 12.3 | 205.0 | 16.6 (12.0 to 19.0) | at least 10 "
        "| 8,460 against 300,000 |",
        "",
        "One query a sequence was timed on 200 of the episodes and scaled to all. "
        "Embedding took 31 % of the time here.",
        "a processor, torch 2.9, memory kept, median of 3 pairs, load 0.1 in the minute before.",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs", "0"], "argument --pairs: 0 is not a whole number of at least 1"),
        (["--sample=20", "--episodes=10"], "--sample 20 is more than the 10 episodes that are scored; take fewer"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--pair", "5"], "unrecognized arguments: --pair 5"),
        (["--keep_memory"], "the C library of this machine cannot be told to keep memory; leave out --keep_memory"),
    ],
)
def test_bad_options_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "keep_memory", lambda: False)
    with pytest.raises(ValueError) as error:
        scoring.main(argv)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        scoring.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("snail.evaluate", "sample", "--omniglot", "--quick", "OMP_NUM_THREADS"))
