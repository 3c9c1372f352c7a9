"""``snail bench growth``: what is measured is what is said, and the table is made of the points alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from snail import MAML, SNAIL, AttentionBlock, Episode, TCBlock
from snail.experiments.bench import common, growth
from snail.experiments.bench.growth import CURVES, Job, Work, markdown_table, measure, slope

DENSE_SLOPE = math.log10(1e4 * math.log2(1e4) ** 2) - math.log10(1e3 * math.log2(1e3) ** 2)


# -- slopes and theory -----------------------------------------------------------------------------------------------


def test_the_slope_is_the_exponent() -> None:
    assert slope([(n, 3 * n**2) for n in (6, 26, 101)]) == pytest.approx(2)
    assert slope([(n, 7 / n**0.5) for n in (1000, 3162, 10_000)]) == pytest.approx(-0.5)
    # Least squares: (0, 0), (1, 1), (2, 1) and (3, 4) in powers of ten, about their means 1.5 and 1.5.
    assert slope([(1, 1), (10, 10), (100, 10), (1000, 10_000)]) == pytest.approx((2.25 + 0.25 - 0.25 + 3.75) / 5)


def test_theory_is_computed_over_the_sizes() -> None:
    assert growth.DENSE.slopes([1000, 10_000]) == pytest.approx((DENSE_SLOPE, DENSE_SLOPE))
    assert growth.LOG.slopes([16, 256]) == pytest.approx((0.5, 0.5))  # 4² to 8² over 16 times
    both = growth.DENSE + growth.SQUARE
    assert both.name == "n log² n + n²"
    assert both.slopes([1000, 10_000]) == pytest.approx((DENSE_SLOPE, 2))
    assert (growth.LINEAR + growth.CONSTANT).slopes([5, 7]) == pytest.approx((0, 1))


@pytest.mark.parametrize(
    ("curve", "images"),
    [("ways", lambda n: n * 1 + n * 1), ("shots", lambda n: 5 * n + 5 * 1), ("queries", lambda n: 5 * 5 + 5 * n)],
)
def test_theory_counts_the_images_of_an_episode(curve: str, images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = CURVES[curve].sizes
    expected = slope([(n, images(n)) for n in sizes])
    for theory in (CURVES[curve].time, CURVES[curve].memory):
        assert theory.slopes(sizes) == pytest.approx((expected, expected))
    seen = episodes_seen(monkeypatch, SNAIL)
    CURVES[curve].work(sizes[1]).run()
    assert seen[0].support_x.shape[1] + seen[0].query_x.shape[1] == images(sizes[1])


# -- what is measured ------------------------------------------------------------------------------------------------


def episodes_seen(monkeypatch: pytest.MonkeyPatch, learner: type) -> list[Episode]:
    seen: list[Episode] = []
    real = learner.loss  # type: ignore[attr-defined]
    monkeypatch.setattr(learner, "loss", lambda self, episode: (seen.append(episode), real(self, episode))[1])
    return seen


def shapes(network: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in network.parameters()]


@pytest.mark.parametrize(("length", "shots"), [(6, 1), (7, 2), (26, 5), (101, 20)])
def test_the_network_is_the_papers_for_the_length(length: int, shots: int) -> None:
    expected = SNAIL(nn.Identity(), 64, 5, shots).network
    ((network, channels),) = growth._blocks(length, None)
    assert (shapes(network), channels) == (shapes(expected), 69)
    convolutions, attentions = growth._blocks(length, TCBlock), growth._blocks(length, AttentionBlock)
    assert [width for _, width in convolutions] == [101, expected.blocks[2].out_channels]
    assert [width for _, width in attentions] == [69, expected.blocks[1].out_channels, expected.blocks[3].out_channels]
    found = [shape for block, _ in convolutions + attentions for shape in shapes(block)]
    assert sorted(found) == sorted(shapes(expected)[:-2])  # all but the linear layer
    assert all(block.receptive_field >= length for block, _ in convolutions if isinstance(block, TCBlock))


@pytest.mark.parametrize("kind", [None, TCBlock, AttentionBlock])
def test_a_training_step_reads_the_sequence_and_gives_every_weight_its_gradient(
    kind: type[TCBlock] | type[AttentionBlock] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    work, read = growth.train(8, kind), inputs_seen(monkeypatch, kind or AttentionBlock)
    gradients = []
    for _ in range(2):
        work.run()
        given = [parameter.grad for module in work.modules for parameter in module.parameters()]
        gradients.append([gradient.clone() for gradient in given if gradient is not None])
        assert len(gradients[-1]) == len(given)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.equal(once, again) for once, again in zip(*gradients, strict=True))  # they do not add up
    assert all(steps == 8 and past == 0 and grad for steps, past, grad in read)
    assert len(read) == 2 * {None: 3, TCBlock: 2, AttentionBlock: 3}[kind]


def inputs_seen(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[tuple[int, int, bool]]:
    """Of each block of a kind that reads: steps, steps before them, and whether a gradient is taken."""
    seen = []
    real = kind.step  # type: ignore[attr-defined]

    def step(self: Any, x: Tensor, state: Any = None) -> Any:
        past = 0 if state is None or kind is TCBlock else state[0].shape[1]
        seen.append((x.shape[1], past, torch.is_grad_enabled() and x.requires_grad))
        return real(self, x, state)

    monkeypatch.setattr(kind, "step", step)
    return seen


def test_reading_is_of_the_whole_and_reading_on_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, on, alone = growth.read(150), growth.read_on(150), growth.read_on(150, AttentionBlock)
    seen = inputs_seen(monkeypatch, AttentionBlock)
    for work, expected in ((whole, (150, 0, False)), (on, (1, 149, False)), (alone, (1, 149, False))):
        for _ in range(2):  # the state stays as it was
            seen.clear()
            work.run()
            assert seen == [expected] * 3


def test_the_state_is_reached_in_short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = inputs_seen(monkeypatch, AttentionBlock)
    growth.read_on(150, AttentionBlock)
    assert [steps for steps, _, _ in seen] == [64, 64, 21] * 3


def test_an_episode_has_the_ways_shots_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = episodes_seen(monkeypatch, SNAIL)
    growth.episode_step(ways=3, shots=2, queries=4).run()
    (episode,) = seen
    assert (episode.support_x.shape, episode.query_x.shape) == ((1, 6, 1, 28, 28), (1, 12, 1, 28, 28))
    assert episode.ways == 3
    assert sorted(episode.support_y[0].tolist()) == [0, 0, 1, 1, 2, 2]
    assert sorted(episode.query_y[0].tolist()) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(("curve", "recompute"), [("inner_steps", False), ("inner_steps_recomputed", True)])
def test_a_meta_step_is_exact_and_of_four_tasks(curve: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = episodes_seen(monkeypatch, MAML)
    work = CURVES[curve].work(2)
    work.run()
    (learner,) = work.modules
    assert isinstance(learner, MAML)
    assert (learner.steps, learner.first_order, learner.recompute) == (2, False, recompute)
    assert seen[0].support_x.shape == seen[0].query_x.shape == (4, 5, 1, 28, 28)
    assert learner.network_name == "Conv-4 of 64, strided"


def test_weights_are_counted_with_the_gradients_that_they_have() -> None:
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    used(torch.ones(1, 3)).sum().backward()
    assert Work(lambda: None, [used, unused]).weights() == 4 * (8 + 8 + 8)


# -- a point ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", list(CURVES))
def test_every_curve_can_be_measured(curve: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SHORTEST", 0)
    size = min(CURVES[curve].sizes or growth.LENGTHS)
    point = measure(Job(curve, size, repeats=2, threads=1, keep_memory=False))
    assert point.keys() == {"curve", "size", "seconds", "memory_mib", "weights_mib", "seconds_each"}
    assert (point["curve"], point["size"], len(point["seconds_each"])) == (curve, size, 2)
    assert min(point["seconds_each"]) > 0 and min(point["seconds_each"]) <= point["seconds"]
    # The kernel counts pages in batches, so that a peak may be told a little lower than before.
    assert point["memory_mib"] is None or point["memory_mib"] > -4
    assert point["weights_mib"] > 0


def measure_nothing(monkeypatch: pytest.MonkeyPatch, *, shortest: float, seconds: list[float]) -> tuple[Any, list[str]]:
    """Measure work that does nothing, with a made-up clock: the point, and what happened."""
    happened: list[str] = []
    now, starts = [0.0], iter(seconds)

    def look() -> float:
        happened.append("clock")
        now[0] += next(starts) if happened.count("clock") % 2 == 0 else 0
        return now[0]

    peaks = iter([100 * 2**20, 130 * 2**20])

    def set_up(size: int) -> Work:
        happened.append(f"set up {size}")
        return Work(lambda: happened.append("run"), [nn.Linear(2**18, 1, bias=False)])

    def peak() -> int:
        happened.append("peak")
        return next(peaks)

    monkeypatch.setattr(growth, "SHORTEST", shortest)
    monkeypatch.setattr(growth, "_load", lambda: happened.append("load"))
    monkeypatch.setattr(growth, "time", SimpleNamespace(perf_counter=look))
    monkeypatch.setattr(growth, "peak_memory", peak)
    curve = growth.Curve("nothing", "length", "nothing", set_up, growth.LINEAR, growth.LINEAR)
    monkeypatch.setitem(CURVES, "nothing", curve)
    return measure(Job("nothing", 7, repeats=3, threads=1, keep_memory=False)), happened


def test_time_is_the_median_behind_a_warm_up_and_memory_the_growth_of_the_peak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    point, happened = measure_nothing(monkeypatch, shortest=0.1, seconds=[9, 4, 1, 2])
    assert point == {
        "curve": "nothing", "size": 7, "seconds": 2, "memory_mib": 30, "weights_mib": 1, "seconds_each": [4, 1, 2],
    }  # fmt: skip
    assert happened == ["load", "peak", "set up 7", *["clock", "run", "clock"] * 4, "peak"]


def test_short_work_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    point, happened = measure_nothing(monkeypatch, shortest=6, seconds=[2, 6, 9, 3])
    assert point["seconds_each"] == [2, 3, 1]
    assert happened.count("run") == 1 + 3 * 3


# -- the command -----------------------------------------------------------------------------------------------------


class Here:
    """A process in whose place points are made up: seconds and memory are the size."""

    jobs: list[Job]
    ended: int

    def __init__(self, name: str, serve: Any, job: Job) -> None:
        self.jobs.append(job)

    def receive(self) -> dict[str, Any]:
        job = self.jobs[-1]
        return point(job.curve, job.size, float(job.size), float(job.size))

    def end(self) -> None:
        type(self).ended += 1


def point(curve: str, size: int, seconds: float, memory: float | None, weights: float = 0) -> dict[str, Any]:
    return {
        "curve": curve, "size": size, "seconds": seconds, "memory_mib": memory, "weights_mib": weights,
        "seconds_each": [seconds],
    }  # fmt: skip


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    monkeypatch.setattr(growth, "Process", Here)
    monkeypatch.setattr(Here, "jobs", [], raising=False)
    monkeypatch.setattr(Here, "ended", 0, raising=False)
    return Here


def test_every_size_of_every_curve_has_a_process_of_its_own(here: type[Here], tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    assert growth.main(["--lengths", "50", "20", "50", "--repeats=2", "--output", str(path)]) == 0
    sizes = {name: list(curve.sizes or (20, 50)) for name, curve in CURVES.items()}
    assert [(job.curve, job.size) for job in here.jobs] == [(name, size) for name in sizes for size in sizes[name]]
    assert {(job.repeats, job.threads, job.keep_memory) for job in here.jobs} == {(2, torch.get_num_threads(), False)}
    assert here.ended == len(here.jobs)
    report = json.loads(path.read_text())
    assert [(each["curve"], each["size"]) for each in report["points"]] == [(j.curve, j.size) for j in here.jobs]
    assert report["repeats"] == 2
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "repeats", "points",
    }  # fmt: skip
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["growth.json", "growth.png"]


def test_the_process_of_a_point_is_ended_also_if_it_fails(here: type[Here], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Here) -> None:
        raise RuntimeError("the process ended")

    monkeypatch.setattr(Here, "receive", fail)
    with pytest.raises(RuntimeError, match="the process ended"):
        growth._measured(Job("training", 6, repeats=1, threads=1, keep_memory=False))
    assert here.ended == 1


def test_quick_takes_few_points(here: type[Here], tmp_path: Path) -> None:
    growth.main(["--quick", f"--output={tmp_path / 'out.json'}", f"--picture={tmp_path / 'shown.png'}"])
    assert [job.size for job in here.jobs if job.curve == "training"] == [6, 26]
    others = {job.curve: job.size for job in here.jobs[2:]}
    assert len(here.jobs) == 2 + len(others) == 1 + len(CURVES)
    assert all(size == min(CURVES[name].sizes or [6]) for name, size in others.items())
    assert {job.repeats for job in here.jobs} == {1}
    assert (tmp_path / "shown.png").is_file() and not (tmp_path / "growth.png").exists()


def test_the_lengths_reach_ten_thousand_unless_others_are_given(here: type[Here], tmp_path: Path) -> None:
    growth.main([f"--output={tmp_path / 'out.json'}"])
    sizes = [job.size for job in here.jobs if job.curve == "attention"]
    assert sizes == [6, 26, 101, 316, 1000, 3162, 10_000]


def test_quick_runs_in_fresh_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    few = {name: CURVES[name] for name in ("training", "reading", "step")}
    monkeypatch.setattr(growth, "CURVES", few)
    path = tmp_path / "growth.json"
    assert growth.main(["--quick", "--output", str(path)]) == 0
    printed, report = capfd.readouterr().out, json.loads(path.read_text())
    sizes = [(each["curve"], each["size"]) for each in report["points"]]
    assert sizes == [("training", 6), ("training", 26), ("reading", 6), ("step", 6)]
    for each in report["points"]:
        assert each["seconds"] > 0 and len(each["seconds_each"]) == 1
        if each["memory_mib"] is None:
            continue  # this system does not tell
        # At least most of its weights, but none of what torch loads: that alone is more than 100 MiB.
        assert 0.5 * each["weights_mib"] < each["memory_mib"] < 110
    assert "training step, length" in printed
    assert str(path) in printed and str(tmp_path / "growth.png") in printed
    with Image.open(tmp_path / "growth.png") as picture:
        assert picture.format == "PNG" and picture.width == 1080


def test_show_prints_the_table_and_draws_again_if_asked(
    tmp_path: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str], here: type[Here]
) -> None:
    path, picture = tmp_path / "growth.json", tmp_path / "again.png"
    path.write_text(json.dumps(report))
    assert growth.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == markdown_table(report) + "\n"
    assert [file.name for file in tmp_path.iterdir()] == ["growth.json"]
    assert growth.main(["--show", str(path), "--picture", str(picture)]) == 0
    assert capsys.readouterr().out == f"{markdown_table(report)}\nthe picture: {picture}\n"
    assert picture.is_file() and not here.jobs


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--repeats", "0"], "argument --repeats: 0 is not a whole number of at least 1"),
        (["--lengths", "6", "1"], "--lengths has 1; a sequence needs at least 2 steps"),
        (["--lengths"], "argument --lengths: expected at least one argument"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--picture", "a.txt"], "--picture a.txt must name a .png file in a folder that exists"),
        (["--picture", "no/a.png"], "--picture no/a.png must name a .png file in a folder that exists"),
        (["--repeat", "5"], "unrecognized arguments: --repeat 5"),
        (["--keep_memory"], "the C library of this machine cannot be told to keep memory; leave out --keep_memory"),
    ],
)
def test_bad_options_are_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "keep_memory", lambda: False)
    with pytest.raises(ValueError) as error:
        growth.main(argv)
    assert str(error.value) == message
    assert capsys.readouterr() == ("", "")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        growth.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("length", "inner steps", "--picture", "--quick", "OMP_NUM_THREADS"))


# -- the table and the picture ---------------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict[str, Any]:
    """Made up, the points in disorder."""
    points = [point("training", n, n**1.5 / 1e5, n / 2 + 80, 80) for n in (10_000, 100, 1000)]
    points += [point("attention", n, (n / 1e4) ** 2, None) for n in (1000, 10_000)]
    points += [point("reading", 10_000, 3, 1023.6), point("step", 10_000, 0.0125, 90)]
    points += [point("ways", n, n / 4, 8 + n**2, 8) for n in (5, 10)]
    about = {"hardware": "a processor", "versions": {"torch": "2.9"}, "load": 0.1, "keep_memory": True}
    return about | {"points": points, "repeats": 3}


def test_the_table_holds_ranges_slopes_with_theory_and_what_was_asked(report: dict[str, Any]) -> None:
    name, dense = "the paper's network", f"{DENSE_SLOPE:.2f}"
    assert markdown_table(report).splitlines() == [
        "|  | over | time | slope (theory) | memory | slope (theory) |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {name}: training step | length 100 to 10,000 | 10.00 ms to 10.00 s | 1.50 (n log² n + n²: {dense} to 2.00) "
        f"| 130 MiB to 4.96 GiB | 1.00 (n log² n + n: 1.00 to {dense}) |",
        f"| {name}: training step | length 10,000 | 10.00 s |  | 4.96 GiB (asked: under 8 GiB) |  |",
        f"| {name}: training step, attention alone | length 1,000 to 10,000 | 10.00 ms to 1.00 s "
        "| 2.00 (n²: 2.00) |  |  |",
        f"| {name}: reading all again | length 10,000 | 3.00 s |  | 1,024 MiB |  |",
        f"| {name}: reading one further step | length 10,000 | 12.50 ms |  | 90 MiB |  |",
        "| SNAIL with Conv-4, 1-shot, 1 query a class: training step | ways 5 to 10 | 1.25 s to 2.50 s "
        "| 1.00 (images: 1.00) | 33 MiB to 108 MiB | 2.00 (images: 1.00) |",
        "",
        "At length 10,000 a further step takes 12.50 ms with the state kept, and reading all again 240.0 times as "
        "long. Slopes are those on log-log axes, over lengths from 1,000 on; what each step costs at any size makes "
        "them smaller, but for the weights and their gradients, which are left out of the slopes of memory.",
        "a processor, torch 2.9, memory kept, median of 3, load 0.1 in the minute before.",
    ]


def test_nothing_is_asked_of_another_length_and_no_slope_told_of_short_ones(report: dict[str, Any]) -> None:
    kept = ("reading", "step")
    report["points"] = [each for each in report["points"] if each["size"] < 10_000 or each["curve"] in kept]
    table = markdown_table(report)
    assert "asked" not in table
    assert "| length 100 to 1,000 | 10.00 ms to 316.23 ms |  | 130 MiB to 580 MiB |  |" in table


def test_the_picture_shows_the_points(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report["points"] += [point("step_attention", 10_000, 1, 1)]  # in the table only
    for curve in ("inner_steps", "inner_steps_recomputed"):
        report["points"] += [point(curve, n, n, 2 * n) for n in (1, 2)]
    figures: list[Figure] = []
    real = Figure.savefig

    def save(self: Figure, *given: Any, **more: Any) -> None:
        figures.append(self)
        real(self, *given, **more)

    monkeypatch.setattr(Figure, "savefig", save)
    growth.draw(report, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").is_file()
    seconds, memory, *small = figures[0].axes
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in seconds.lines}  # type: ignore[union-attr]
    assert drawn.keys() == {CURVES[name].title for name in ("training", "attention", "reading", "step")}
    assert drawn["training step"] == [[n, n**1.5 / 1e5] for n in (100, 1000, 10_000)]
    assert memory.lines[0].get_xydata().tolist() == [[n, n / 2 + 80] for n in (100, 1000, 10_000)]  # type: ignore[union-attr]
    assert memory.lines[1].get_xydata().tolist() == []  # type: ignore[union-attr]  # not known
    assert {seconds.get_xscale(), seconds.get_yscale(), memory.get_yscale()} == {"log"}
    assert [axes.get_xlabel() for axes in small] == ["", "", "ways", "inner steps"]
    assert [len(axes.lines) for axes in small] == [1, 2, 1, 2]
    assert small[3].lines[1].get_xydata().tolist() == [[1, 2], [2, 4]]  # type: ignore[union-attr]
