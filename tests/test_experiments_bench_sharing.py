import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snail import SNAIL, AttentionBlock, Conv4, Episode, Stack, TCBlock
from snail.experiments.bench import common, sharing
from snail.experiments.cli import main as snail

TIMING = {"shared_ms", "plain_ms", "ratio", "ratio_min", "ratio_max", "pairs", "max_difference"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small work wait long for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def learner() -> SNAIL:
    torch.manual_seed(0)
    return SNAIL(Conv4(), 64, 3, 2).double().eval()


@pytest.fixture
def episode() -> Episode:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 11, 1, 28, 28, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 2, 1, 0, 1, 1, 0, 2, 0], [2, 0, 1, 0, 2, 1, 0, 2, 2, 1, 1]])
    return Episode(images[:, :6], labels[:, :6], images[:, 6:], labels[:, 6:], ways=3)


def check_timing(record: dict[str, object]) -> None:
    assert record.keys() >= TIMING
    for field in TIMING - {"pairs", "max_difference"}:
        value = record[field]
        assert isinstance(value, int | float)
        assert math.isfinite(value)
        assert value > 0
    pairs = record["pairs"]
    assert isinstance(pairs, list)
    assert len(pairs) == 2
    assert all(pair.keys() == {"shared_ms", "plain_ms"} and min(pair.values()) > 0 for pair in pairs)


def test_quick_writes_every_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "times.json"
    assert snail(["bench", "sharing", "--quick", f"--output={path}"]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["times.json"]

    report = json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "training", "stream",
    }  # fmt: skip
    assert report["versions"].keys() - {"commit"} == {"snail", "torch", "python"}
    assert (report["device"], report["dtype"], report["keep_memory"]) == ("cpu", "float32", False)
    assert report["threads"] == torch.get_num_threads()
    assert report["quick"]

    (row,) = report["training"]
    check_timing(row)
    setting = {key: row[key] for key in row.keys() - TIMING}
    assert setting == {"ways": 5, "shots": 1, "queries_per_class": 1, "episodes": 2, "queries": 10, "sample": 10}
    check_timing(report["stream"])
    assert report["stream"].keys() - TIMING == {"length", "positions"}
    assert (report["stream"]["length"], report["stream"]["positions"]) == (32, [8, 24])

    printed = capsys.readouterr().out
    assert "5-way 1-shot" in printed
    assert "10 of 10 queries" in printed
    assert "2 of 32 positions" in printed
    assert str(path) in printed


def test_one_query_a_sequence_equals_one_support(learner: SNAIL, episode: Episode) -> None:
    plain = sharing.OneQueryASequence(learner)
    inputs = episode.support_x, episode.support_y, episode.query_x
    parameters = list(learner.parameters())
    logits, gradients = [], []
    for way in (learner, plain):
        answer = way(*inputs)
        logits.append(answer.detach())
        loss = torch.nn.functional.cross_entropy(answer.flatten(0, 1), episode.query_y.flatten())
        gradients.append(torch.autograd.grad(loss, parameters))
    assert logits[0].shape == (2, 5, 3)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-12)
    for shared, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(alone, shared, rtol=1e-10, atol=1e-12)


def test_reading_on_equals_reading_again() -> None:
    torch.manual_seed(0)
    network = Stack(TCBlock(3, 9, 4), AttentionBlock(19, 5, 2)).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    positions = [0, 4, 8]
    again = sharing.read_again(network, x, positions)
    torch.testing.assert_close(sharing.read_on(network, x)[:, positions], again, rtol=0, atol=1e-12)


def test_a_part_of_the_queries_is_timed_if_the_images_are_too_many(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    sharing.main(["--quick", "--pairs=1", "--length=2", "--positions=5", "--sample_images=30", f"--output={path}"])
    report = json.loads(path.read_text())
    assert (report["training"][0]["queries"], report["training"][0]["sample"]) == (10, 4)  # 6 images a query
    assert len(report["training"][0]["pairs"]) == 1
    assert report["stream"]["positions"] == [0, 1]


def test_compare_takes_turns_and_drops_the_first_pair() -> None:
    seconds = {"shared": iter([9.0, 0.001, 0.002, 0.004]), "plain": iter([9.0, 0.003, 0.004, 0.004])}
    turns: list[str] = []

    def measure(way: str) -> float:
        turns.append(way)
        return next(seconds[way])

    timing = common.compare(lambda: measure("shared"), lambda: measure("plain"), pairs=3)
    assert turns == ["shared", "plain"] * 4
    assert (timing["shared_ms"], timing["plain_ms"]) == (2, 4)
    assert (timing["ratio_min"], timing["ratio"], timing["ratio_max"]) == (1, 2, 3)
    assert timing["pairs"][0] == {"shared_ms": 1, "plain_ms": 3}


def test_a_wrong_way_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_support(self: sharing.OneQueryASequence, *inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.snail(inputs[0][:, :1], inputs[1][:, :1], inputs[2])  # faster, and wrong
        return answer

    monkeypatch.setattr(sharing.OneQueryASequence, "forward", no_support)
    with pytest.raises(ValueError, match="one support and one query a sequence differ by"):
        sharing.main(["--quick", "--output", str(tmp_path / "times.json")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs", "0"], "argument --pairs: 0 is not a whole number of at least 1"),
        (["--length", "long"], "argument --length: long is not a whole number of at least 1"),
        (["--episodes", "²"], "argument --episodes: ² is not a whole number of at least 1"),
        (["--pair", "5"], "unrecognized arguments: --pair 5"),
        (["--output"], "argument --output: expected one argument"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--output", "no/such/times.json"], "--output no/such/times.json must name a file in a folder that exists"),
    ],
)
def test_bad_options_are_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError) as error:
        sharing.main(argv)
    assert str(error.value) == message
    assert snail(["bench", "sharing", *argv]) == 1
    assert capsys.readouterr() == ("", f"snail: error: {message}\n")


def test_keep_memory_is_an_error_where_it_is_not_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "keep_memory", lambda: False)
    with pytest.raises(ValueError, match="leave out --keep_memory"):
        sharing.main(["--quick", "--keep_memory"])


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        sharing.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("training step", "streamed step", "--output", "--quick", "OMP_NUM_THREADS"))
