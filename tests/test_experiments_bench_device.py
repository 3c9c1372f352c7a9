"""``snail bench device``: what is counted, what is read from a profile, and that all ways take the same step."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snail.experiments.bench import common, device, floor, trace
from snail.experiments.bench.device import TOLERANCE, WAYS, Setting, Step, Way, markdown_table
from snail.experiments.bench.trace import STEP
from snail.experiments.cli import main as snail

SNAIL = Setting("SNAIL", 2, 1, episodes=2, filters=4)
MAML = Setting("MAML", 2, 1, episodes=2, filters=4)
EAGER = Way("float32")


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock that is a second later at each look."""
    now = itertools.count()
    monkeypatch.setattr(floor.time, "perf_counter", lambda: float(next(now)))
    return now


# -- a step ------------------------------------------------------------------------------------------------------------


def test_settings_and_ways_are_those_asked_for() -> None:
    assert [(s.title, s.episodes, s.units, s.unit) for s in device.SETTINGS] == [
        ("SNAIL, 5-way 5-shot", 32, 160, "queries"),
        ("SNAIL, 20-way 5-shot", 32, 640, "queries"),
        ("MAML, 5-way 1-shot", 32, 32, "tasks"),
    ]
    assert [way.name for way in WAYS] == [
        "eager, float32", "eager, bfloat16", "compiled, float32", "compiled, bfloat16",
        "CUDA graph, float32", "CUDA graph, bfloat16",
        "compiled, CUDA graph, float32", "compiled, CUDA graph, bfloat16",
    ]  # fmt: skip
    maml = device.SETTINGS[2].build()
    assert maml.network_name == "Conv-4 of 64, strided"
    assert (maml.note, maml.batch_norm) == ("1 step of sgd at 0.4", "transductive")


@pytest.mark.parametrize("setting", [SNAIL, MAML], ids=["SNAIL", "MAML"])
def test_a_step_is_one_of_adam_on_the_next_episodes(setting: Setting) -> None:
    step = Step(setting, EAGER, "cpu")
    learner = setting.build()
    optimizer = torch.optim.Adam(learner.parameters())
    for start in (2, 4):  # the first two episodes are what ways are compared on
        step()
        optimizer.zero_grad()
        batch = step.sampler.draw(start, start + 2).map_items(lambda i: step.images.pixels[i].float() / 255)
        torch.autograd.backward(learner.loss(batch)[0])
        optimizer.step()
    for ours, expected in zip(step.learner.parameters(), learner.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert step.images.pixels.dtype == torch.uint8


def test_the_gradient_is_of_the_first_episodes_and_takes_no_step() -> None:
    step = Step(SNAIL, EAGER, "cpu")
    learner = SNAIL.build()
    torch.autograd.backward(learner.loss(step.sampler.draw(0, 2).map_items(step.images.take))[0])
    expected = torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])
    for _ in range(2):
        torch.testing.assert_close(step.gradient(), expected, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler hides the warnings that it causes, but not from this filter
def test_compiled_is_equal_to_eager() -> None:
    graphs: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return module.forward

    compiled = Step(SNAIL, Way("float32", compiled=True), "cpu", backend).gradient()
    assert graphs
    torch.testing.assert_close(compiled, Step(SNAIL, EAGER, "cpu").gradient(), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near_and_other_images_are_far() -> None:
    setting = Setting("SNAIL", 5, 1, episodes=4, filters=8)
    expected = Step(setting, EAGER, "cpu").gradient()
    seen: list[torch.dtype] = []
    half = Step(setting, Way("bfloat16"), "cpu")
    half.learner.embedding.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert 0 < relative(half.gradient(), expected) < TOLERANCE["bfloat16"]
    assert set(seen) == {torch.bfloat16}
    other = Step(setting, EAGER, "cpu")
    other.backward(other.draw(1))
    gradients = [p.grad.flatten() for p in other.learner.parameters() if p.grad is not None]
    assert relative(torch.cat(gradients), expected) > 1.5 * TOLERANCE["bfloat16"]


class Replayed(Step):
    """A step whose graph, captured and replayed without a GPU, runs what was captured on what then lies there."""

    def _forward_and_backward(self, drawn: Any) -> None:
        self.calls = [*getattr(self, "calls", []), drawn]
        super()._forward_and_backward(drawn)


def test_a_captured_step_is_replayed_on_new_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[bool] = []

    class Graph:
        def replay(self) -> None:
            assert captured == [True]
            step.learner.zero_grad()
            Step._forward_and_backward(step, step.calls[-1])

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        assert isinstance(graph, Graph)
        assert all(parameter.grad is None for parameter in building[0].learner.parameters())
        yield
        captured.append(True)

    building: list[Step] = []
    monkeypatch.setattr(Replayed, "draw", lambda self, batch: (building.append(self), Step.draw(self, batch))[1])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    step = Replayed(SNAIL, Way("float32", graph=True), "cpu")
    assert len({id(drawn) for drawn in step.calls}) == 1
    torch.testing.assert_close(step.gradient(), Step(SNAIL, EAGER, "cpu").gradient(), rtol=1e-5, atol=1e-6)


def test_a_block_of_steps_is_timed_between_two_synchronisations(
    seconds: Iterator[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    assert floor.seconds_each(lambda: order.append("step"), "cuda", 4) == 0.25
    assert order == ["wait", *["step"] * 4, "wait"]
    assert floor.seconds_each(lambda: order.append("step"), "cpu", 1) == 1
    assert order.count("wait") == 2


# -- the floor ---------------------------------------------------------------------------------------------------------


def linear_step() -> tuple[Callable[[], None], torch.optim.Optimizer]:
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.Adam(layer.parameters())

    def step() -> None:
        torch.autograd.backward(layer(torch.ones(5, 3)).sum())
        optimizer.step()

    return step, optimizer


def test_the_counts_of_a_linear_layer_are_those_by_hand() -> None:
    assert floor.count(*linear_step()) == {
        "operations": 2 * 5 * 3 * 4 + 2 * 4 * 5 * 3,  # forward; the gradient of the weight, none of the input
        "product_bytes": 2 * 4 * (5 * 4 + 4 * 3),  # the output and that gradient
        "update_bytes": 2 * 4 * (3 * (12 + 4) + 2),  # parameters and two averages of each, two numbers of steps
    }


def test_parameters_that_are_not_updated_and_half_precision_are_counted_so() -> None:
    layer, idle = nn.Linear(3, 4, bias=False), nn.Linear(100, 100)
    optimizer = torch.optim.SGD([*layer.parameters(), *idle.parameters()])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            answer = layer(torch.ones(5, 3))
        torch.autograd.backward(answer.float().sum())
        optimizer.step()

    counts = floor.count(step, optimizer)
    assert counts["product_bytes"] == 2 * 2 * (5 * 4 + 4 * 3)
    assert counts["update_bytes"] == 2 * 4 * 12


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_in_groups_are_counted_by_group(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(6, 9, 3, groups=3, bias=False)
    x = torch.ones(2, 6, 5, 5, requires_grad=True)
    counts = floor.count(lambda: torch.autograd.backward(layer(x).sum()), torch.optim.SGD(layer.parameters()))
    places = 5 * 5 if transposed else 3 * 3  # at which the 3x3 kernels of 2 by 3 channels lie, in each of 3 groups
    assert counts["operations"] == 3 * (2 * 2 * places * 3 * 3 * 3 * 2 * 3)


def test_tasks_are_all_counted_however_many_threads_there_are() -> None:
    torch.set_num_threads(2)
    try:
        counted = [device._count_step(Setting("MAML", 5, 1, n, filters=4), EAGER, "cpu") for n in (1, 5)]
    finally:
        torch.set_num_threads(1)
    assert counted[1]["operations"] == 5 * counted[0]["operations"] > 0
    convolutions = 2 * 5 * 9 * 4 * (14**2 + 4 * (7**2 + 4**2 + 2**2))  # once through the network, for five images
    # At first order: support and query forward, and two gradients for each.
    assert counted[0]["operations"] > 6 * convolutions


def test_a_step_in_which_nothing_is_seen_has_no_floor() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no matrix product was seen"):
        floor.count(lambda: torch.autograd.backward(weight.sum()), torch.optim.SGD([weight]))


def test_the_floor_is_the_longer_time() -> None:
    counts = {"operations": 6_000, "product_bytes": 300, "update_bytes": 100}
    reached = {"float32": 2e6, "bfloat16": 12e6, "copy": 4e5}
    assert floor.floor(counts, "float32", reached) == {
        "operations_ms": 3.0, "bytes_ms": 1.0, "ms": 3.0, "binds": "operations",
    }  # fmt: skip
    assert floor.floor(counts, "bfloat16", reached) == {
        "operations_ms": 0.5, "bytes_ms": 1.0, "ms": 1.0, "binds": "bytes",
    }  # fmt: skip


@pytest.mark.usefixtures("seconds")
@pytest.mark.parametrize("half", [True, False])
def test_rates_are_work_over_the_shortest_time(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "bf16_is_fast", lambda accelerator: half)
    times = iter([5.0, 4.0, 6.0, *([5.0, 2.0, 3.0] if half else []), 0.5, 0.25, 1.0])
    monkeypatch.setattr(floor, "seconds_each", lambda work, where, count: (work(), next(times))[1])
    assert floor.rates("cpu", size=4, copied=100, times=3) == {
        "size": 4, "copied": 100, "float32": 2 * 4**3 / 4, "bfloat16": 2 * 4**3 / 2 if half else None, "copy": 800.0,
    }  # fmt: skip


# -- the profile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(5, 6), (1, 3)], 3),
        ([(1, 3), (2, 5)], 4),
        ([(1, 9), (2, 3), (4, 10)], 9),
        ([(1, 2), (2, 3), (1, 2)], 2),
    ],
)
def test_busy_time_is_the_length_of_the_union(intervals: list[tuple[float, float]], expected: float) -> None:
    assert trace.busy_time(intervals) == expected


def event(cat: str, name: str, start: float, end: float, thread: int = 7) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": 1000 * start, "dur": 1000 * (end - start), "tid": thread}


TRACE = [
    event("user_annotation", STEP, 0, 10),
    event("user_annotation", STEP, 12, 20),
    event("user_annotation", "Optimizer.step#Adam.step", 0, 20),
    event("gpu_user_annotation", STEP, 0, 40),
    {"ph": "s", "cat": "fwdbwd", "name": "a flow", "ts": 3, "tid": 7},
    {"ph": "M", "name": "process_name"},
    event("cpu_op", "aten::linear", 1, 4),
    event("cpu_op", "aten::addmm", 2, 3),
    event("cpu_op", "aten::linear", 13, 18),
    event("cpu_op", "aten::linear", 0, 20, thread=8),
    event("kernel", "gemm", 5, 8, thread=70),
    event("kernel", "gemm", 7, 9, thread=71),
    event("gpu_memcpy", "Memcpy HtoD", 15, 16, thread=70),
    event("gpu_memset", "Memset", 24, 30, thread=70),
    event("cuda_runtime", "cudaStreamSynchronize", 2, 3),
    event("cuda_runtime", "cudaStreamSynchronize", 11, 12),
    event("cuda_runtime", "cudaEventSynchronize", 13, 14, thread=9),
    event("cuda_runtime", "cudaLaunchKernel", 13, 14),
    event("cuda_runtime", "cudaDeviceSynchronize", 20, 30),
]


def test_a_trace_of_the_cpu_tells_of_operators_on_the_calling_thread() -> None:
    assert trace.read_trace(TRACE, "cpu") == {
        "busy_ms": 4.0, "events": 1.5, "profiled_ms": 10.0, "synchronisations": None,
    }  # fmt: skip


def test_a_trace_of_a_gpu_tells_of_kernels_and_copies_and_of_waiting_within_steps() -> None:
    assert trace.read_trace(TRACE, "cuda") == {
        "busy_ms": 5.5, "events": 2.0, "profiled_ms": 10.0, "synchronisations": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["kernel", "user_annotation"])
def test_a_trace_that_tells_nothing_is_refused(missing: str) -> None:
    rest = [each for each in TRACE if each.get("cat") not in (missing, "gpu_memcpy", "gpu_memset")]
    with pytest.raises(ValueError, match="the profile holds"):
        trace.read_trace(rest, "cuda")


def test_the_operators_of_a_step_are_found_in_its_profile() -> None:
    found = trace.profile(lambda: torch.ones(4).add(1), "cpu", steps=2, ms=1e-9)
    assert found["events"] >= 2
    assert 0 < found["busy_ms"] <= found["profiled_ms"]
    assert found["share"] == found["busy_ms"] / found["profiled_ms"]


def test_kernels_are_held_against_the_time_without_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profiler(contextlib.nullcontext[Any]):
        def __init__(self, activities: Sequence[Any]) -> None:
            super().__init__(self)
            assert set(activities) == {torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA}

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": TRACE}))

    order: list[str] = []
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    found = trace.profile(lambda: order.append("step"), "cuda", steps=2, ms=11.0)
    assert order == ["wait", "step", "step", "wait"]
    assert (found["busy_ms"], found["share"]) == (5.5, 0.5)


@pytest.fixture
def sync_modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The modes that were set, after the one before."""
    modes: list[Any] = [2]

    def set_mode(mode: Any) -> None:
        modes.append(mode)
        warnings.warn("a prototype that does not detect all; called a synchronizing operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return modes


@pytest.mark.filterwarnings("ignore:a prototype")  # of what puts the mode back
def test_each_warning_of_a_synchronisation_is_kept_with_its_place(sync_modes: list[Any]) -> None:
    def step() -> None:
        assert sync_modes[-1] == "warn"
        for _ in range(2):  # at the same place
            warnings.warn("called a synchronizing CUDA operation\n(at some place)", UserWarning, stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = trace.synchronisations(step)
    line = step.__code__.co_firstlineno + 3
    assert found == [f"{Path(__file__).name}:{line}: called a synchronizing CUDA operation (at some place)"] * 2
    assert sync_modes == [2, "warn", 2]


@pytest.mark.filterwarnings("ignore:a prototype")
def test_the_mode_is_put_back_if_the_step_fails(sync_modes: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        trace.synchronisations(lambda: 1 / 0)
    assert sync_modes == [2, "warn", 2]


# -- a process for each way --------------------------------------------------------------------------------------------


class Pipe(list[Any]):
    """Keeps what is sent."""

    send = list.append


def job(setting: Setting = SNAIL, way: Way = EAGER, **changed: Any) -> device._Job:
    options = {"device": "cpu", "backend": "eager", "steps": 2, "timings": 3, "threads": 1, "keep_memory": False}
    return device._Job(setting, way, **(options | changed))


def test_a_way_sends_its_times_and_then_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.004, 0.001, 0.002])
    monkeypatch.setattr(device, "seconds_each", lambda step, where, count: (step(), next(times))[1])
    monkeypatch.setattr(device, "peak_memory", iter([5 * 2**20, 12 * 2**20]).__next__)
    sent: Any = Pipe()
    device._serve(sent, job())
    timed, counts, waits, profile = sent
    assert timed == {
        "ms": 2.0, "per_second": 1000 * 4 / 2, "ms_each": [4.0, 1.0, 2.0], "difference": 0.0, "memory_mib": 7.0,
    }  # fmt: skip
    assert counts == device._count_step(SNAIL, EAGER, "cpu")
    assert waits is None
    assert profile.keys() == {"busy_ms", "events", "profiled_ms", "synchronisations", "share"}
    assert 0 < profile["share"] <= 1


def test_what_cannot_be_measured_is_told_and_the_rest_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no counting here")

    monkeypatch.setattr(device, "_count_step", fail)
    sent: Any = Pipe()
    device._serve(sent, job(MAML, steps=1, timings=1))
    assert sent[1] == "OSError: no counting here"
    assert sent[3]["share"] > 0


def test_a_way_with_another_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for gradients, refused in (
        ([[1.0, 1.04], [1.0, 1.0]], False),
        ([[1.0, 1.2], [1.0, 1.0]], True),
        ([[1.0, math.nan], [1.0, 1.0]], True),
    ):
        given = iter(map(torch.tensor, gradients))
        monkeypatch.setattr(Step, "gradient", lambda self, given=given: next(given))
        with pytest.raises(ValueError, match="gradient differs by") if refused else contextlib.nullcontext():
            device._time(job(steps=1, timings=1))


class Here:
    """A process that sends what a test made up; a string is an error."""

    sent: dict[str, list[Any]]
    ended: list[str]

    def __init__(self, way: str, serve: Any, job: device._Job) -> None:
        self.way = way
        self.rest = iter(self.sent.get(way, self.sent[""]))

    def receive(self) -> Any:
        answer = next(self.rest)
        if isinstance(answer, str):
            raise RuntimeError(f"the way {self.way!r} failed with {answer}")
        return answer

    def end(self) -> None:
        self.ended.append(self.way)


TIMED = {"ms": 8.0, "per_second": 500.0, "ms_each": [8.0], "difference": 0.0, "memory_mib": 1.0}
COUNTS = {"operations": 4_000_000, "product_bytes": 1_000, "update_bytes": 1_000}
PROFILE = {"busy_ms": 4.0, "events": 3.0, "profiled_ms": 9.0, "synchronisations": 2.0, "share": 0.5}
RATES = {"size": 2, "copied": 8, "float32": 1e9, "bfloat16": 4e9, "copy": 1e9}
ABOUT = {"hardware": "a device", "versions": {"snail": "0", "torch": "2.9"}, "load": 0.5, "dtype": "float32"}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    """Ways on a GPU that is made up."""
    monkeypatch.setattr(device, "Process", Here)
    monkeypatch.setattr(Here, "sent", {"": [TIMED, COUNTS, ["a.py:1: told"], PROFILE]}, raising=False)
    monkeypatch.setattr(Here, "ended", [], raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "bf16_is_fast", lambda accelerator: True)
    monkeypatch.setattr(device, "rates", lambda where, **options: RATES)
    monkeypatch.setattr(device, "about_run", lambda options, where: {**ABOUT, "device": where, "keep_memory": False})
    return Here


def test_all_ways_of_all_settings_are_run_on_a_gpu(here: type[Here], tmp_path: Path) -> None:
    lost = "SNAIL, 20-way 5-shot: CUDA graph, float32"
    here.sent[lost] = ["RuntimeError: it cannot\n  be captured"]
    half = "MAML, 5-way 1-shot: CUDA graph, float32"
    here.sent[half] = [TIMED, "ValueError: nothing seen", ["a.py:1: told"] * 3, "ValueError: no profile"]
    path = tmp_path / "report.json"
    assert device.main(["--output", str(path)]) == 0
    report = json.loads(path.read_text())
    asked = [(setting, way) for setting in device.SETTINGS[:2] for way in WAYS]
    asked += [(device.SETTINGS[2], EAGER), (device.SETTINGS[2], Way("float32", graph=True))]
    names = [f"{setting.title}: {way.name}" for setting, way in asked]
    assert here.ended == names
    assert [f"{row['title']}: {row['way']}" for row in report["rows"]] == [name for name in names if name != lost]
    assert report["left_out"] == {lost: f"the way {lost!r} failed with RuntimeError: it cannot be captured"}
    assert (report["device"], report["steps"], report["timings"]) == ("cuda", 20, 7)
    assert "dtype" not in report
    assert report["versions"]["cuda"] == torch.version.cuda

    first, second = report["rows"][:2]
    assert first == {
        **asdict(device.SETTINGS[0]), "title": "SNAIL, 5-way 5-shot", "unit": "queries", "units": 160,
        "way": "eager, float32", "dtype": "float32", **TIMED, "not_measured": {}, "counts": COUNTS, "profile": PROFILE,
        "synchronisations": ["a.py:1: told"], "distance": 2.0,
        "floor": {"operations_ms": 4.0, "bytes_ms": 0.002, "ms": 4.0, "binds": "operations"},
    }  # fmt: skip
    assert (second["floor"]["ms"], second["distance"]) == (1.0, 8.0)
    last = report["rows"][-1]
    assert (last["counts"], last["profile"], last["floor"], last["distance"]) == (None, None, None, None)
    assert last["not_measured"] == {
        "counts": f"the way {half!r} failed with ValueError: nothing seen",
        "profile": f"the way {half!r} failed with ValueError: no profile",
    }
    assert markdown_table(report).splitlines()[-4].endswith("| ? | 3 | ? | ? | 1 |")


def test_an_error_of_every_way_is_an_error(here: type[Here], tmp_path: Path) -> None:
    here.sent[""] = ["OSError: no"]
    with pytest.raises(RuntimeError, match=r"no way could be run: the way 'SNAIL, 5-way 5-shot: eager, float32' fail"):
        device.main(["--quick", "--output", str(tmp_path / "report.json")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("where", "half", "backend", "expected"),
    [
        ("cpu", True, None, ["eager, float32", "eager, bfloat16"]),
        ("cpu", False, "eager", ["eager, float32", "compiled, float32"]),
        ("cuda", False, None, ["eager, float32", "CUDA graph, float32"]),
        ("cuda", True, "inductor", [way.name for way in WAYS]),
    ],
)
def test_ways_that_cannot_be_run_are_left_out_with_a_reason(
    where: str, half: bool, backend: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "bf16_is_fast", lambda accelerator: half and accelerator == where)
    reasons = {way.name: device.reason_against(way, where, backend) for way in WAYS}
    assert [name for name, reason in reasons.items() if reason is None] == expected
    assert set(reasons.values()) <= {
        None, "this device does not multiply bfloat16 in hardware", "CUDA graphs need a GPU",
        "torch.compile takes minutes to start; --compile adds it",
    }  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------


def test_quick_writes_every_number_and_the_table_is_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    small = (Setting("SNAIL", 5, 1, filters=4), Setting("SNAIL", 20, 5))  # without a process for MAML
    monkeypatch.setattr(device, "SETTINGS", small)
    monkeypatch.setattr(device, "bf16_is_fast", lambda accelerator: False)  # a process less
    path = tmp_path / "report.json"
    assert device.main(["--quick", "--device=cpu", f"--output={path}"]) == 0
    printed, report = capfd.readouterr().out, json.loads(path.read_text())
    assert report.keys() == {
        "versions", "device", "hardware", "threads", "load", "quick", "keep_memory", "steps", "timings", "network",
        "meaning", "left_out", "rates", "rows", "training",
    }  # fmt: skip
    assert (report["device"], report["quick"], report["training"]) == ("cpu", True, None)
    assert report["meaning"]["share"] == trace.SHARE["cpu"]
    (row,) = report["rows"]
    assert (row["learner"], row["ways"], row["episodes"], row["way"]) == ("SNAIL", 5, 2, "eager, float32")
    assert len(report["left_out"]) == len(WAYS) - 1
    assert row["not_measured"] == {}
    assert (len(row["ms_each"]), row["difference"], row["synchronisations"]) == (1, 0, None)
    assert row["floor"] == floor.floor(row["counts"], "float32", report["rates"])
    assert row["distance"] == row["ms"] / row["floor"]["ms"]
    for name in ("ms", "per_second", "distance"):
        assert math.isfinite(row[name]) and row[name] > 0
    assert 0 < row["profile"]["share"] <= 1
    assert row["memory_mib"] is None or row["memory_mib"] >= 0
    table = markdown_table(report)
    assert table in printed
    assert "left out: SNAIL, 5-way 1-shot: CUDA graph, float32 (CUDA graphs need a GPU)" in printed
    assert device.main(["--show", str(path)]) == 0
    assert capfd.readouterr().out == table + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps=0"], "argument --steps: 0 is not a whole number of at least 1"),
        (["--timings", "many"], "argument --timings: many is not a whole number of at least 1"),
        (["--target", "0"], "argument --target: 0 is not a percentage above 0 and up to 100"),
        (["--target", "most"], "argument --target: most is not a percentage above 0 and up to 100"),
        (["--target", "nan"], "argument --target: nan is not a percentage above 0 and up to 100"),
        (["--pairs=2"], "unrecognized arguments: --pairs=2"),
        (["--device", "cuda"], "--device cuda needs a GPU that torch can use, and there is none here"),
        (["--output", "."], "--output . must name a file in a folder that exists"),
        (["--train"], "--train needs --omniglot DIR, where Omniglot is or is to be downloaded to"),
        (["--keep_memory"], "the C library of this machine cannot be told to keep memory; leave out --keep_memory"),
    ],
)
def test_bad_options_are_one_sentence(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(common, "keep_memory", lambda: False)
    with pytest.raises(ValueError) as error:
        device.main(argv)
    assert str(error.value) == message


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        device.main(["--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("floor", "SNAIL", "MAML", "--output", "--train", "--quick", "runs/"))


# -- whole training ----------------------------------------------------------------------------------------------------


def test_training_is_that_of_the_config_and_each_validation_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[str] = []
    small = ["--trainer.max_epochs=2", "--data.batch_size=1", "--data.val_episodes=4", "--data.test_episodes=4"]
    small += ["--data.steps_per_epoch=1", "--model.learner.embedding.filters=4", "--keep_memory=false"]

    def on_built_in_data(argv: list[str]) -> int:
        given.extend(argv)
        rest = argv[argv.index("--trainer.accelerator") : argv.index("--trainer.max_steps")]
        return snail(["fit", *small, *rest])

    monkeypatch.setattr(device, "snail", on_built_in_data)
    training = device.train(tmp_path / "omniglot", "cpu", target=1, steps=300)
    assert given[:7] == [
        "fit", "--config", "omniglot_5way", "--name", "bench_device", "--data.root", str(tmp_path / "omniglot"),
    ]  # fmt: skip
    assert given[7:11] == ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert given[-4:] == ["--trainer.max_steps", "300", "--data.steps_per_epoch", "250"]
    first, second = training["validations"]
    assert (first["step"], second["step"]) == (1, 2)
    assert 0 < first["seconds"] < second["seconds"] < training["seconds"]
    with (tmp_path / "runs" / "glyphs_5way" / "metrics.csv").open() as file:
        columns, *rows = (line.split(",") for line in file.read().splitlines())
    logged = [float(row[columns.index("val/accuracy")]) for row in rows if row[columns.index("val/accuracy")]]
    assert [validation["accuracy"] for validation in training["validations"]] == pytest.approx(logged)
    assert training["reached"] == first


@pytest.mark.parametrize(("target", "reached"), [(50.0, 0), (80.0, 1), (90.0, 1), (90.5, None)])
def test_the_target_is_reached_at_the_first_validation_that_is_as_good(
    target: float, reached: int | None, monkeypatch: pytest.MonkeyPatch, seconds: Iterator[int]
) -> None:
    validations = [
        {"step": 250 * (i + 1), "seconds": 1.5 * i, "accuracy": accuracy}
        for i, accuracy in enumerate((60.0, 90.0, 85.0, 90.0))
    ]

    def write(argv: list[str]) -> int:
        (callback,) = json.loads(argv[argv.index("--trainer.callbacks") + 1])
        assert callback["class_path"] == "snail.experiments.bench.device.ValidationClock"
        (Path(callback["init_args"]["folder"]) / device.SEEN).write_text(json.dumps(validations))
        assert "--trainer.max_steps" not in argv
        return 0

    monkeypatch.setattr(device, "snail", write)
    training = device.train(Path("omniglot"), "cuda", target=target)
    expected = None if reached is None else validations[reached]
    assert training == {
        "config": "omniglot_5way", "seconds": 1.0, "target": target, "validations": validations, "reached": expected,
    }  # fmt: skip


@pytest.mark.parametrize("fails", [True, False])
def test_a_training_that_fails_leaves_the_other_numbers(
    fails: bool, here: type[Here], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    asked: list[Any] = []

    def training(root: Path, where: str, *, target: float, steps: int | None) -> dict[str, Any]:
        asked.append((root, where, target, steps))
        return {"config": "c", "seconds": 2.0, "target": target, "validations": [], "reached": None}

    if fails:
        monkeypatch.setattr(device, "snail", lambda argv: 130)
    else:
        monkeypatch.setattr(device, "train", training)
    options = ["--train", "--omniglot", "somewhere", "--target", "92.5", "--train_steps", "7"]
    assert device.main(["--quick", "--output", str(path), *options]) == 0
    report = json.loads(path.read_text())
    assert len(report["rows"]) > 1
    if fails:
        assert report["training"] is None
        assert report["left_out"]["training"] == "snail fit ended with status 130"
    else:
        assert asked == [(Path("somewhere"), "cuda", 92.5, 7)]
        assert (
            "`snail fit --config c`: 92.5 % in validation not reached; the whole command took 2 s."
            in markdown_table(report)
        )


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> dict[str, Any]:
    first = {"title": "SNAIL, 5-way 5-shot", "way": "eager, float32", "unit": "queries", "per_second": 12345.6}
    first |= {"ms": 12.96, "memory_mib": 2345.6, "distance": 8.04, "floor": {"ms": 1.6119, "binds": "operations"}}
    first |= {"synchronisations": ["a.py:1: told"] * 3, "profile": {"share": 0.4567, "synchronisations": 2.0}}
    second = {"title": "MAML, 5-way 1-shot", "way": "eager, float32", "unit": "tasks", "per_second": 0.4567}
    second |= {"ms": 70071.6, "memory_mib": None, "distance": None, "floor": None}
    second |= {"synchronisations": None, "profile": {"share": 0.999, "synchronisations": 4.5}}
    return {
        "device": "cuda", "hardware": "a GPU", "versions": {"snail": "0", "torch": "2.9", "cuda": "13.0"},
        "load": 0.25, "keep_memory": False, "steps": 20, "timings": 7, "rows": [first, second], "training": None,
        "rates": {"size": 8192, "float32": 3.456e14, "bfloat16": None, "copy": 2.5e12},
    }  # fmt: skip


def test_the_table_of_a_gpu(report: dict[str, Any]) -> None:
    assert markdown_table(report).splitlines() == [
        "|  | way | a second | ms a step | in kernels | synchronisations | floor, ms (what binds) | times the floor | "
        "peak memory, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| SNAIL, 5-way 5-shot | eager, float32 | 12,346 queries | 13 | 46 % | 3 | 1.61 (operations) | 8.04 | 2,346 |",
        "| MAML, 5-way 1-shot | eager, float32 | 0.457 tasks | 70,072 | 100 % | 4.5 | ? | ? | ? |",
        "",
        "Reached here: float32 346 TFLOP/s in products of 8,192 rows, 2.5e+03 GB/s in a copy.",
        "a GPU, torch 2.9, cuda 13.0, median of 7 timings of 20 steps, load 0.25 in the minute before.",
    ]


def test_the_table_of_a_cpu_with_a_training(report: dict[str, Any]) -> None:
    validations = [
        {"step": 1250, "seconds": 61.4, "accuracy": 97.25},
        {"step": 3500, "seconds": 90.0, "accuracy": 98.5},
    ]
    training = {"config": "omniglot_5way", "target": 97.0, "seconds": 1234.5, "validations": validations}
    report["training"] = {**training, "reached": validations[0]}
    report |= {"device": "cpu", "keep_memory": True}
    for row in report["rows"]:
        row |= {"synchronisations": None, "profile": None}
    lines = markdown_table(report).splitlines()
    assert "| in operators |" in lines[0]
    assert lines[2].endswith("| 13 | ? | not on this device | 1.61 (operations) | 8.04 | 2,346 |")
    assert lines[5] == (
        "`snail fit --config omniglot_5way`: 97 % in validation after 61 s (step 1,250); the whole command took "
        "1,234 s and ended at 98.50 % (step 3,500)."
    )
    assert lines[-1].startswith("a GPU, torch 2.9, cuda 13.0, memory kept, median of")


# -- a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_every_way_runs_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    monkeypatch.setattr(device, "SETTINGS", (Setting("SNAIL", 5, 1, filters=8), Setting("MAML", 5, 1, filters=8)))
    assert device.main(["--quick", "--device=cuda", f"--output={path}"]) == 0
    report = json.loads(path.read_text())
    ways = {f"{row['title']}: {row['way']}" for row in report["rows"]}
    assert {f"{which}, 5-way 1-shot: CUDA graph, float32" for which in ("SNAIL", "MAML")} <= ways
    for row in report["rows"]:
        assert row["not_measured"] == {}
        assert row["profile"]["share"] > 0 and row["memory_mib"] > 0 and row["distance"] > 0
        assert isinstance(row["synchronisations"], list)
