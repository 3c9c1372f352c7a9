"""``snail bench fit``: both ways train the same, and every number of the report and its tables comes from them."""

from __future__ import annotations

import itertools
import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from snail import SNAIL, Conv4, Episode
from snail.datasets import Glyphs, MiniImageNet
from snail.experiments.bench import bare_loop, fit, watched
from snail.experiments.bench.bare_loop import Loop
from snail.experiments.bench.fit import LEAST_RATIO, PLAIN, Setting, markdown_table
from snail.experiments.bench.watched import TIMED, Command, Enough, Watch
from snail.experiments.loading import load_run
from snail.experiments.runs import KeepConfig

PLAINLY = ("--trainer.precision=32-true", "--keep_memory=false")  # nothing of this process is changed
SMALL = (*PLAINLY, "--model.learner.embedding.filters=4")
TINY = (
    *("--data=snail.datasets.Glyphs", "--data.ways=3", "--data.train_shots=[1,2]", "--data.eval_shots=[1]"),
    *("--data.batch_size=2", "--data.queries=2", "--model.learner.prototype_loss=1", *TIMED, *SMALL),
)


@pytest.fixture(autouse=True)
def back_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands change the folder of their process, which is that of the tests here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Command, dict[str, Any], str]:
    """A command that took a step behind four that warm up, what it told, and what its terminal was shown."""
    command, shown = Command(TINY, tmp_path_factory.mktemp("timed"), warmup=4, seconds=0.0), []

    class Shown(watched._Terminal):
        def write(self, text: str) -> int:
            shown.append(text)
            return len(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(command.folder)
        patch.setattr(watched, "_Terminal", Shown)
        patch.setattr(watched, "bf16_is_fast", lambda accelerator: False)
        told = command()
    return command, told, "".join(shown)


# -- the command, watched ----------------------------------------------------------------------------------------------


def test_a_command_tells_its_steps_and_levers(timed: tuple[Command, dict[str, Any], str]) -> None:
    _, told, shown = timed
    (step_ms,), peak, losses = told.pop("step_ms"), told.pop("peak_memory"), told.pop("losses")
    assert step_ms > 0 and (peak is None or peak > 0) and len(losses) == 4
    shots = told.pop("shots")
    told |= {"step_ms": [step_ms], "losses": losses}  # for other tests
    assert set(shots) <= {1, 2}
    assert {key: told[key] for key in told.keys() - {"step_ms", "losses"}} == {
        "levers": {
            "precision": "32-true",
            "memory_kept": False,
            "channels_last": True,
            "lacking": ["bf16 in hardware"],
        },
        "threads": torch.get_num_threads(),
        "steps": 5,
        "train_shots": [1, 2],
        "parts": ["train"],
        "data_bytes": 1000 * 20 * 28 * 28,
        "data_resident": None,
    }
    assert "training" in shown  # the progress bar was live


def test_a_command_that_fails_or_ends_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="snail: error: warmup is -1 steps"):
        Command((*TINY, "--model.warmup=-1"), tmp_path, seconds=0.0)()
    short = (*TINY, "--trainer.max_epochs=1", "--data.steps_per_epoch=1", "--data.test_episodes=1")
    with pytest.raises(RuntimeError, match="training ended before its steps were timed"):
        Command(short, tmp_path, seconds=0.0)()


def test_steps_are_timed_from_end_to_end_behind_the_warmup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.5, 3.0, 4.5])
    monkeypatch.setattr(watched.time, "perf_counter", lambda: next(clock))
    data = SimpleNamespace(images=Glyphs().images, train_shots=range(1, 4))
    keeps = KeepConfig(tmp_path, "keep_memory: false\n", {})
    trainer: Any = SimpleNamespace(callbacks=[keeps], datamodule=data, precision="32-true", lightning_module=Conv4())
    module: Any = trainer.lightning_module
    y, watch = torch.tensor([[0, 1, 2] * 2]), Watch(tmp_path, warmup=2, seconds=3.0)
    batch = Episode(torch.zeros(1, 6, 1), y, torch.zeros(1, 6, 1), y, ways=3)
    with pytest.raises(Enough):
        for step in range(5):
            watch.on_train_batch_end(trainer, module, {"loss": torch.tensor(step / 2)}, batch, step)
    told = json.loads((tmp_path / watched.NOTED).read_text())
    assert (told["steps"], told["step_ms"], told["losses"], told["shots"]) == (5, [1500, 500, 1500], [0, 0.5], [2])


@pytest.mark.parametrize(
    ("asked", "has", "kept", "lacking"),
    [(True, True, True, []), (True, False, False, ["memory that can be kept"]), (False, True, False, [])],
)
def test_memory_is_kept_where_asked_for_and_possible(
    asked: bool, has: bool, kept: bool, lacking: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched, "keep_memory", lambda: has)
    monkeypatch.setattr(watched, "bf16_is_fast", lambda accelerator: True)
    keeps, network = (
        KeepConfig(tmp_path, f"keep_memory: {asked}\n", {}),
        Conv4().to(memory_format=torch.preserve_format),
    )
    trainer: Any = SimpleNamespace(callbacks=[keeps], precision="bf16-mixed", lightning_module=network)
    levers = {"precision": "bf16-mixed", "memory_kept": kept, "channels_last": True, "lacking": lacking}
    assert watched.levers_taken(trainer) == levers


def test_the_layout_is_that_of_the_weights() -> None:
    network = Conv4(filters=4)
    for layout, expected in ((torch.contiguous_format, False), (torch.channels_last, True)):
        assert watched.channels_last(network.to(memory_format=layout)) is expected
    assert not watched.channels_last(
        nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
    )  # with one, both are the same


def test_what_is_resident_of_a_mapped_array_is_told(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("this system does not tell")
    np.save(tmp_path / "array.npy", np.arange(2**20))
    array = torch.from_numpy(np.load(tmp_path / "array.npy", mmap_mode="c"))
    before = watched.resident_bytes(array)
    assert before is not None and before < array.nbytes // 2
    assert int(array.sum()) == 2**19 * (2**20 - 1)
    assert array.nbytes <= (watched.resident_bytes(array) or 0) <= array.nbytes + 2**16
    assert watched.resident_bytes(array + 1) is None


# -- a bare loop -------------------------------------------------------------------------------------------------------


def test_a_bare_loop_trains_what_the_command_trains(timed: tuple[Command, dict[str, Any], str]) -> None:
    command, told, _ = timed
    bare = Loop(command.checkpoint, told["levers"], warmup=4, seconds=0.0)()
    assert bare["losses"] == pytest.approx(told["losses"], rel=1e-6)
    assert len(bare["step_ms"]) == 1 and (bare["queries"], bare["sample"]) == (12, 12)
    half = Loop(command.checkpoint, told["levers"] | {"precision": "bf16-mixed"}, warmup=4, seconds=0.0)()
    assert half["losses"] != pytest.approx(told["losses"], rel=1e-6)
    fit.check_losses(told["losses"], half["losses"])


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_a_bare_loop_takes_the_levers_that_it_is_told(
    kept: bool, last: bool, timed: tuple[Command, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    monkeypatch.setattr(bare_loop, "keep_memory", lambda: seen.append("kept"))
    real = Conv4.forward

    def forward(self: Conv4, images: torch.Tensor) -> torch.Tensor:
        seen.append(watched.channels_last(self))
        return real(self, images)

    monkeypatch.setattr(Conv4, "forward", forward)
    Loop(timed[0].checkpoint, PLAIN | {"memory_kept": kept, "channels_last": last}, warmup=1, seconds=0.0)()
    assert seen == ["kept"] * kept + [last] * 2


def test_losses_that_differ_are_refused() -> None:
    fit.check_losses([1.0, 2.0], [1.01, 1.99])
    for other in ([1.0, 2.2], [1.0, 1.8], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"the loss of step 2 is .* in snail fit and"):
            fit.check_losses([1.0, 2.0], other)


def test_the_plain_way_is_one_query_a_sequence_on_a_sample_and_agrees(
    timed: tuple[Command, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    real = Conv4.forward

    def forward(self: Conv4, images: torch.Tensor) -> torch.Tensor:
        if images.dtype == torch.float32:
            read.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Conv4, "forward", forward)
    looks = itertools.count()  # each at the clock is a second later: drawn, computed, updated
    monkeypatch.setattr(bare_loop.time, "perf_counter", lambda: float(next(looks)))
    plain = Loop(timed[0].checkpoint, PLAIN, warmup=1, seconds=0.0, images=30)()
    assert plain["max_difference"] <= 1e-9
    # Of 2 episodes with 6 queries each, whose support is 3 or 6: 3 sequences of 4 images, or 2 of 7, for each.
    assert (plain["queries"], plain["sample"], read[-1]) in [(12, 6, 24), (12, 4, 28)]
    assert plain["step_ms"] == [1000 * (1 + 12 / plain["sample"] + 1)]


def test_a_sample_holds_what_fits_and_a_query_an_episode_at_least() -> None:
    x, y = torch.arange(18.0).view(2, 9, 1), torch.tensor([[0, 1, 2] * 3] * 2)
    batch = Episode(x[:, :3], y[:, :3], x[:, 3:], y[:, 3:], ways=3)
    for images, queries in ((1, 1), (15, 1), (16, 2), (48, 6), (1000, 6)):
        sample = bare_loop.sample_queries(batch, images)
        assert torch.equal(sample.support_x, batch.support_x) and torch.equal(sample.support_y, batch.support_y)
        assert torch.equal(sample.query_x, batch.query_x[:, :queries])
        assert torch.equal(sample.query_y, batch.query_y[:, :queries])


def test_a_wrong_way_is_not_timed(timed: tuple[Command, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_support(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.snail(inputs[0][:, :1], inputs[1][:, :1], inputs[2])  # faster, and wrong
        return answer

    monkeypatch.setattr(bare_loop.OneQueryASequence, "forward", no_support)
    with pytest.raises(ValueError, match="one support and one query a sequence differ by"):
        Loop(timed[0].checkpoint, PLAIN, warmup=1, seconds=0.0, images=30)()


# -- images ------------------------------------------------------------------------------------------------------------


def test_noise_has_the_shapes_of_mini_imagenet_and_84_pixels_the_network_for_it(tmp_path: Path) -> None:
    fit.write_noise(tmp_path / "noise", images=7)
    data = MiniImageNet(tmp_path / "noise")
    for part, classes in (("train", 64), ("val", 16)):
        images = data.images(part)
        assert images.pixels.shape == (classes * 7, 3, 84, 84) and images.counts == (7,) * classes
        assert images.pixels.float().mean().sub(127.5).abs() < 1 and len(set(images.class_names)) == classes
    assert not torch.equal(data.images("train").pixels[:7], data.images("train").pixels[7:14])

    options = Namespace(mini_imagenet=tmp_path / "noise", omniglot=None)
    name, given = fit._images(84, options, tmp_path)
    setting = Setting(84, 2, 1, 3, episodes=2)
    command = Command((*given, *setting.options(), *TIMED, *PLAINLY), tmp_path, seconds=0.0)
    told = command()
    run = load_run(command.checkpoint, trust=["snail"])
    assert name == "miniImageNet" and isinstance(run.data, MiniImageNet) and isinstance(run.learner, SNAIL)
    assert (run.learner.embedding_dim, run.learner.max_shots, run.learner.prototype_loss) == (64 * 25, 1, 0)
    assert (run.data.ways, run.data.queries, run.data.batch_size, told["shots"]) == (2, 3, 2, [1])
    assert told["data_resident"] is None or 0 < told["data_resident"] <= told["data_bytes"] + 2**16


def test_the_config_keeps_what_it_says_on_other_images(tmp_path: Path) -> None:
    name, given = fit._images(28, Namespace(omniglot=None), tmp_path)
    options = ("--config", "omniglot_5way", "--data.ways", "2", *given, "--data.batch_size=1", *TIMED, *SMALL)
    command = Command(options, tmp_path, seconds=0.0)
    command()
    run = load_run(command.checkpoint, trust=["snail"])
    assert name == "Glyphs" and isinstance(run.data, Glyphs) and isinstance(run.learner, SNAIL)
    assert (run.data.ways, run.data.queries, run.data.train_shots) == (2, 2, range(1, 6))
    assert run.learner.prototype_loss == 1


def test_folders_that_are_given_are_used(tmp_path: Path) -> None:
    name, given = fit._images(28, Namespace(omniglot=tmp_path / "here"), tmp_path)
    assert (name, given) == ("Omniglot", ["--data=snail.datasets.Omniglot", f"--data.root={tmp_path / 'here'}"])


# -- the parts ---------------------------------------------------------------------------------------------------------

LEVERS = {"precision": "bf16-mixed", "memory_kept": True, "channels_last": True, "lacking": []}


class Told:
    """Processes that tell what is made up, each kind of job its own, and note what they were asked."""

    def __init__(self, **answers: list[dict[str, Any]]) -> None:
        self.answers = {kind: itertools.cycle(told) for kind, told in answers.items()}
        self.jobs: list[Any] = []

    def __call__(self, way: str, job: Any) -> dict[str, Any]:
        self.jobs.append(job)
        return {"levers": LEVERS, "losses": [1.0], "train_shots": [1, 5], **next(self.answers[type(job).__name__])}


def asked_for(monkeypatch: pytest.MonkeyPatch, *argv: str, **answers: list[dict[str, Any]]) -> tuple[Namespace, Told]:
    """The options of a command line, and made-up processes in place of real ones."""
    told = Told(**answers)
    monkeypatch.setattr(fit, "fresh", told)
    monkeypatch.setattr(fit, "write_noise", lambda root: root.mkdir())
    return fit._options(argv), told


def test_ratios_to_the_plain_way_are_those_of_a_query_and_a_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = [{"step_ms": [100, 300]}, {"step_ms": [400]}, {"step_ms": [300]}]
    theirs = [{"queries": 10, "sample": 4, "step_ms": each} for each in ([2000], [2000, 4000], [6000])]
    options, told = asked_for(monkeypatch, "--pairs=3", "--seconds=7", Command=ours, Loop=theirs)
    rows = list(fit.time_fit(options, tmp_path))
    for (setting, asked), row in zip(LEAST_RATIO.items(), rows, strict=True):
        assert (row["fit_ms"], row["plain_ms"]) == (30, 300)
        assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (7.5, 10, 20)
        assert (row["asked"], row["queries"], row["sample"], row["episodes"]) == (asked, 10, 4, setting.episodes)
        assert [pair["plain"]["step_ms"] for pair in row["pairs"]] == [[2000], [2000, 4000], [6000]]
        assert [pair["fit"]["step_ms"] for pair in row["pairs"]] == [[100, 300], [400], [300]]
    assert [row["data"] for row in rows] == ["Glyphs"] * 3 + ["noise"]

    assert [type(job) for job in told.jobs] == [Command, Loop] * 12  # in turn
    assert PLAIN == {"precision": "32-true", "memory_kept": False, "channels_last": False}
    for job, other in zip(told.jobs[::2], told.jobs[1::2], strict=True):
        assert other == Loop(job.checkpoint, PLAIN, job.warmup, job.seconds, images=1600)
        assert job.seconds == 7 and job.warmup >= 1
    sizes = [next(option for option in job.options if "batch_size" in option) for job in told.jobs[::6]]
    assert sizes == [f"--data.batch_size={episodes}" for episodes in (32, 32, 8, 4)]
    assert f"--data.root={tmp_path / 'noise'}" in told.jobs[-2].options


def test_the_loop_is_timed_on_the_batches_that_both_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [{"step_ms": [11.0, 22.0, 1000.0]}, {"step_ms": [20.0]}]
    theirs = [{"step_ms": [10.0, 20.0]}, {"step_ms": [10.0, 1.0]}]
    options, told = asked_for(monkeypatch, "--pairs=2", Command=ours, Loop=theirs)
    (row,) = fit.time_loop(options, tmp_path)
    assert row["steps"] == [2, 1] and (row["fit_ms"], row["bare_ms"]) == (18.25, 12.5)
    assert [row[key] for key in ("ratio_min", "ratio", "ratio_max")] == pytest.approx([1.1, 1.55, 2])
    command, loop, *_ = told.jobs
    assert loop == Loop(command.checkpoint, LEVERS, command.warmup, command.seconds)
    assert "--checkpoint_minutes=0.05" in command.options
    assert not any("batch_size" in option for option in command.options)

    options, _ = asked_for(monkeypatch, Command=[{"step_ms": [1.0]}], Loop=[{"step_ms": [1.0], "losses": [1.2]}])
    with pytest.raises(ValueError, match=r"step 1 is 1\.000000 in snail fit and 1\.200000 in the bare"):
        next(fit.time_loop(options, tmp_path))


def test_memory_is_that_of_commands_with_every_number_of_shots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"shots": [1, 5], "peak_memory": 2**30, "data_bytes": 7, "data_resident": None}
    given = [f"--{name}={tmp_path}" for name in ("omniglot", "mini_imagenet")]
    options, told = asked_for(monkeypatch, *given, "--steps=3", Command=[seen])
    rows = list(fit.measure_memory(options, tmp_path))
    assert [row["name"] for row in rows] == list(fit.MOST_GIB)
    assert [(row["data"], row["asked"]) for row in rows] == [
        ("Glyphs", 2), ("Omniglot", 4), ("Omniglot", 8), ("miniImageNet", None),
    ]  # fmt: skip
    assert all(row["peak_memory"] == 2**30 and row["data_bytes"] == 7 for row in rows)
    built_in, *_, twenty, photographs = (job.options for job in told.jobs)
    assert not any(option.split("=")[0] in ("--config", "--data") for option in built_in)
    assert twenty[:4] == ("--config", "omniglot_5way", "--data.ways", "20")
    assert photographs[:2] == ("--config", "mini_imagenet_snail") and f"--data.root={tmp_path}" in photographs
    assert all(job.seconds is None and "--data.steps_per_epoch=3" in job.options for job in told.jobs)

    options, _ = asked_for(monkeypatch, "--steps=3", Command=[seen | {"shots": [5]}])
    with pytest.raises(
        RuntimeError, match=r"3 steps of 'snail fit' have seen \[5\] shots instead of \[1, 5\]; set more"
    ):
        next(fit.measure_memory(options, tmp_path))


# -- the command -------------------------------------------------------------------------------------------------------


def test_quick_writes_every_number_and_the_tables_are_made_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "fresh", lambda way, job: job())
    monkeypatch.setattr(fit, "TIMED", (*TIMED, *SMALL))
    monkeypatch.setattr(fit, "SCORED", ("--data.val_episodes=4", "--data.test_episodes=4", *SMALL))
    path = tmp_path / "fit.json"
    assert fit.main(["--quick", f"--output={path}"]) == 0
    printed, report = capsys.readouterr().out, json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "dtype", "quick", "keep_memory", "pairs", "seconds",
        "fit", "loop", "memory",
    }  # fmt: skip
    assert (report["quick"], report["pairs"], report["seconds"]) == (True, 1, 1)
    assert report["versions"].keys() - {"commit"} == {"snail", "torch", "python", "lightning"}
    for row, other, asked in ((report["fit"][0], "plain", 8), (report["loop"][0], "bare", 1.1)):
        (pair,) = row["pairs"]
        assert all(ms > 0 for way in ("fit", other) for ms in pair[way]["step_ms"])
        assert pair["fit"]["threads"] == pair[other]["threads"] == torch.get_num_threads()
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("fit_ms", f"{other}_ms", "ratio"))
        assert row["asked"] == asked
    assert report["fit"][0]["pairs"][0]["plain"]["max_difference"] <= 1e-9
    assert [report["fit"][0][key] for key in ("episodes", "queries", "sample")] == [2, 10, 10]
    (row,) = report["memory"]
    assert row["shots"] == row["train_shots"] == [1, 2, 3, 4, 5] and row["parts"] == ["train", "val", "test"]
    assert row["peak_memory"] is None or row["peak_memory"] > row["data_bytes"] == 1300 * 20 * 28 * 28
    lines = markdown_table(report).splitlines()
    assert set(lines[:-1]) < set(printed.splitlines())  # as they were measured
    assert fit.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == markdown_table(report) + "\n"


def test_a_part_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {"shots": [1, 5], "peak_memory": 2**30, "data_bytes": 7, "data_resident": None}
    _, told = asked_for(monkeypatch, Command=[seen])
    assert fit.main(["--quick", "--part", "memory", f"--output={tmp_path / 'fit.json'}"]) == 0
    report = json.loads((tmp_path / "fit.json").read_text())
    assert report.keys() & set(fit.PARTS) == {"memory"}
    assert [row["name"] for row in report["memory"]] == ["snail fit"] and len(told.jobs) == 1


def test_a_fresh_process_trains_the_same(timed: tuple[Command, dict[str, Any], str], tmp_path: Path) -> None:
    told = fit.fresh("snail fit", replace(timed[0], folder=tmp_path))
    assert told["losses"] == pytest.approx(timed[1]["losses"], rel=1e-5)
    assert (told["threads"], told["steps"], len(told["step_ms"])) == (1, 5, 1)
    assert Path.cwd() == tmp_path  # the folder of this process is its own


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pairs=0"], "argument --pairs: 0 is not a whole number of at least 1"),
        (["--seconds=0.5"], "argument --seconds: 0.5 is not a whole number of at least 1"),
        (["--part=fit,all"], "argument --part: there is no part 'all'; choose some of fit, loop, memory"),
        (["--omniglot", "no/such"], "argument --omniglot: no/such is no folder; give the folder that holds the images"),
        (["--quick", "--pair", "5"], "unrecognized arguments: --pair 5"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
    ],
)
def test_bad_options_are_one_sentence(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        fit.main(argv)
    assert str(error.value) == message


def test_parts_are_named_once_or_often() -> None:
    assert fit._options(["--part=memory", "--part", "fit,loop"]).part == ["memory", "fit", "loop"]
    assert fit._options([]).part is None


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        fit.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("plain way", "bare loop", "peak", "--output", "--quick", "OMP_NUM_THREADS"))


# -- the tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict[str, Any]:
    ratio = {"ratio": 7.94, "ratio_min": 7.5, "ratio_max": 8.26}
    timed = {"data": "Glyphs", "pairs": [{"fit": {"levers": LEVERS}}]}
    fit_row = {"name": "28x28, 5-way", "fit_ms": 1.234, "plain_ms": 9.8, "sample": 32, "queries": 160, "asked": 8}
    loop_row = {"name": "1 to 5 shots", "fit_ms": 105.0, "bare_ms": 100.0, "steps": [90, 100], "asked": 1.1}
    memory_row = {"data": "noise", "levers": LEVERS, "data_bytes": 2**30 + 2**20}
    return {
        "hardware": "a processor, 2 threads",
        "versions": {"torch": "2.9", "lightning": "2.6"},
        "load": 0.25,
        "pairs": 5,
        "seconds": 10,
        "fit": [fit_row | timed | ratio],
        "loop": [loop_row | timed | {"ratio": 1.05, "ratio_min": 1.0, "ratio_max": 1.104}],
        "memory": [
            memory_row | {"name": "snail fit", "asked": 2, "peak_memory": 3 * 2**29, "data_resident": None},
            memory_row | {"name": "snail x", "asked": None, "peak_memory": None, "data_resident": 2**20},
        ],
    }


def test_the_tables_hold_what_was_measured_beside_what_was_asked(report: dict[str, Any]) -> None:
    assert markdown_table(report).splitlines() == [
        "| a query trained, SNAIL with Conv-4 | images | `snail fit`, ms | plain way, ms | ratio (spread) | asked | "
        "plain way timed on |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 28x28, 5-way | Glyphs | 1.23 | 9.80 | 7.9 (7.5 to 8.3) | at least 8 | 32 of 160 queries |",
        "",
        "| a training step | images | `snail fit`, ms | bare loop, ms | ratio (spread) | asked | steps timed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 to 5 shots | Glyphs | 105.00 | 100.00 | 1.05 (1.00 to 1.10) | at most 1.10 | 90 to 100 |",
        "",
        "| whole command | images | peak memory, GiB | asked | arrays of images, MiB | mapped and resident, MiB |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `snail fit` | noise | 1.50 | under 2 | 1,025 | not mapped |",
        "| `snail x` | noise | not told |  | 1,025 | 1 |",
        "",
        "Levers that `snail fit` took by itself: precision bf16-mixed, memory kept, channels last.",
        "a processor, 2 threads, torch 2.9, lightning 2.6, median of 5 pairs of processes that time 10 s each, "
        "load 0.25 in the minute before.",
    ]


def test_levers_that_were_not_taken_or_are_lacking_are_told(report: dict[str, Any]) -> None:
    plainly = PLAIN | {"lacking": ["memory that can be kept", "bf16 in hardware"]}
    memory = {"memory": [report["memory"][0] | {"levers": plainly}]}
    timed = {"fit": [report["fit"][0] | {"pairs": [{"fit": {"levers": plainly}}]}]}
    for part in fit.PARTS:
        del report[part]
    sentences = [markdown_table(report | only).splitlines()[-2] for only in (memory, timed)]
    assert (
        sentences[0]
        == sentences[1]
        == (
            "Levers that `snail fit` took by itself: precision 32-true; this machine lacks bf16 in hardware and memory "
            "that can be kept."
        )
    )
