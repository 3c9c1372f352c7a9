"""``snail bench device``: how well a training step uses the device that it runs on.

A step draws the indices of its episodes on the CPU, copies them to the device, gathers and scales the images there,
and goes forward, backward and one step of Adam. Each way of running it has a fresh process of its own, must give the
gradient of the first way, and is held against a floor that no way of computing the same step gets below:

operations  those of the matrix products and convolutions of the step, forward and backward, second derivatives
            included, at the rate that a big matrix product of the same dtype reaches on this device;
bytes       what these products write, each number written once and read once, and the parameters and the optimiser's
            state, each number read once and written once by the update, at the rate of a big copy on this device. What
            lies between two products, such as batch norm, can be fused with them and is not counted. Gradients are
            among what products write.

The floor is the longer of the two times. It is of work and memory alone: starting kernels one by one takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from snail import MAML, SNAIL, Conv4, Episode, Learner
from snail.datasets import EpisodeSampler, Images
from snail.inner_loop import GradientLearner

from ..cli import main as snail
from ..levers import bf16_is_fast, keep_memory
from ..options import whole_number
from .common import BenchParser, about_run, write_report
from .floor import count, floor, rates, seconds_each
from .processes import Process, peak_memory
from .trace import SHARE, one_line, profile, synchronisations

__all__ = ["WAYS", "Setting", "Step", "ValidationClock", "Way", "main", "markdown_table", "train"]

WARMUP = 3  # steps at most before anything is timed
PROFILED = 3  # steps at most under the profiler
CLASSES, IMAGES = 200, 20  # of the pool that episodes are drawn from
TOLERANCE = {"float32": 0.05, "bfloat16": 0.5}  # of the gradient, relatively; that of other images differs by 1
CONFIG, RUN, SEEN = "omniglot_5way", "bench_device", "validations"

MEANING = {
    "ms": "median wall time of a step: indices drawn on the CPU and copied, images gathered and scaled, forward, loss, "
    "backward, Adam; each timing is a block of steps between two synchronisations",
    "difference": "of the gradient on one batch to that of eager float32, relative to its length",
    "memory_mib": "on a GPU the most that torch allocated; on a CPU what the peak of the process grew by",
    "operations": "multiplications and additions of matrix products and convolutions, forward and backward, second "
    "derivatives included",
    "product_bytes": "what these products write, each number written once and read once",
    "update_bytes": "parameters and the optimiser's state, each number read once and written once",
    "floor": "the longer of operations at the rate of a big matrix product of the same dtype and bytes at the rate of "
    "a big copy, both the best of some measured in this run; float32 products on a GPU also as TF32",
    "events": "kernels and copies on a GPU, operators on a CPU, of a step in the profile",
    "synchronisations": "in one step: warnings of torch.cuda.set_sync_debug_mode, and waits in the profile",
}
"""What the fields of a report hold."""


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a training step computes; one query a class.

    Args:
        learner: ``SNAIL`` with its Conv-4, or ``MAML``, exact, with one inner step and the paper's strided Conv-4.
        ways: Classes of an episode.
        shots: Support items of each class.
        episodes: In a step.
        filters: Channels of Conv-4.
    """

    learner: str
    ways: int
    shots: int
    episodes: int = 32
    filters: int = 64

    @property
    def title(self) -> str:
        """What the setting is called in tables."""
        return f"{self.learner}, {self.ways}-way {self.shots}-shot"

    @property
    def unit(self) -> str:
        """What is counted a second."""
        return "queries" if self.learner == "SNAIL" else "tasks"

    @property
    def units(self) -> int:
        """How many of them are in a step."""
        return self.episodes * (self.ways if self.learner == "SNAIL" else 1)

    @property
    def ways_to_run(self) -> tuple[Way, ...]:
        """Those that there are for the learner; the others must agree with the first."""
        return WAYS if self.learner == "SNAIL" else tuple(w for w in WAYS if w.dtype == "float32" and not w.compiled)

    def build(self, *, record: bool = False) -> Learner:
        """The learner, always with the same weights; ``record`` is MAML's."""
        torch.manual_seed(0)
        if self.learner == "SNAIL":
            return SNAIL(Conv4(filters=self.filters), 64, self.ways, self.shots)
        network = Conv4(filters=self.filters, out_features=None, strided=True)
        return MAML(network, self.filters, self.ways, inner_rate=0.4, batch_norm="transductive", record=record)


SETTINGS = (Setting("SNAIL", 5, 5), Setting("SNAIL", 20, 5), Setting("MAML", 5, 1))


@dataclass(frozen=True)
class Way:
    """How a step is run.

    Args:
        dtype: ``float32``, or ``bfloat16``: autocast to it.
        compiled: Whether the learner is compiled (``torch.compile``).
        graph: Whether forward, loss and backward are captured as a CUDA graph and replayed; MAML does so by itself.
    """

    dtype: str
    compiled: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        """What the way is called in tables."""
        how = [word for word, so in (("compiled", self.compiled), ("CUDA graph", self.graph)) if so]
        return f"{', '.join(how) or 'eager'}, {self.dtype}"


WAYS = tuple(
    Way(dtype, compiled, graph) for graph in (False, True) for compiled in (False, True) for dtype in TOLERANCE
)
"""Every way of SNAIL. MAML takes gradients within its forward pass, so it is not compiled, and stays in float32."""


def reason_against(way: Way, device: str, backend: str | None) -> str | None:
    """Why a way cannot be run, or is not asked for; ``None`` if it is to be run.

    Args:
        way: The way.
        device: ``cuda`` or ``cpu``.
        backend: Of ``torch.compile``; ``None`` if nothing is to be compiled.
    """
    if way.dtype == "bfloat16" and not bf16_is_fast(device):
        return "this device does not multiply bfloat16 in hardware"
    if way.graph and device != "cuda":
        return "CUDA graphs need a GPU"
    if way.compiled and backend is None:
        return "torch.compile takes minutes to start; --compile adds it"
    return None


# -- a step ------------------------------------------------------------------------------------------------------------


class Step:
    """A training step, to be called again and again, each time on the next episodes.

    Args:
        setting: What it computes.
        way: How.
        device: ``cuda`` or ``cpu``.
        backend: Of ``torch.compile``.
    """

    def __init__(self, setting: Setting, way: Way, device: str, backend: str | Callable[..., Any] = "inductor") -> None:
        self.setting, self.device = setting, device
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (CLASSES * IMAGES, 1, 28, 28), dtype=torch.uint8, generator=generator)
        images = Images(pixels, tuple(map(str, range(CLASSES))), (IMAGES,) * CLASSES)
        self.sampler = EpisodeSampler(images, "random/train", ways=setting.ways, shots=setting.shots, queries=1, seed=0)
        self.images = images.to(device)
        self.learner = setting.build(record=way.graph).to(device)
        self.optimizer = torch.optim.Adam(self.learner.parameters())
        self.batches = 1  # drawn so far; the gradient that ways are compared by is on the first
        if way.compiled:
            self.learner.compile(backend=backend)
        self.autocast = partial(torch.autocast, device, dtype=torch.bfloat16, enabled=way.dtype == "bfloat16")
        self.backward = self._captured() if way.graph and setting.learner == "SNAIL" else self._eager

    def __call__(self) -> None:
        """Take a step."""
        self.backward(self.draw(self.batches))
        self.optimizer.step()
        self.batches += 1

    def draw(self, batch: int) -> Episode:
        """The episodes of a batch, as indices on the CPU."""
        start = batch * self.setting.episodes
        return self.sampler.draw(start, start + self.setting.episodes)

    def gradient(self) -> Tensor:
        """The gradient on the first batch, as one float32 vector on the CPU; takes no step."""
        self.backward(self.draw(0))
        gradients = [parameter.grad for parameter in self.learner.parameters() if parameter.grad is not None]
        return torch.cat([gradient.detach().flatten().float().cpu() for gradient in gradients])

    def _eager(self, drawn: Episode) -> None:
        self.learner.zero_grad()
        self._forward_and_backward(drawn.to(self.device, non_blocking=True))

    def _forward_and_backward(self, drawn: Episode) -> None:
        batch = drawn.map_items(self.images.take)
        with self.autocast():
            loss, _ = self.learner.loss(batch)
        torch.autograd.backward(loss)

    def _captured(self) -> Callable[[Episode], None]:
        """What copies a batch to where the graph reads it and replays the graph."""
        static = self.draw(1).to(self.device)
        self._forward_and_backward(static)  # what is made at the first call, such as compiled code, is made here
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # a capture must follow calls on a stream other than the first
            for _ in range(WARMUP):
                self.learner.zero_grad()
                self._forward_and_backward(static)
        torch.cuda.current_stream().wait_stream(side)
        self.learner.zero_grad()  # the gradients are then made within the graph, and overwritten at each replay
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward_and_backward(static)

        def replay(drawn: Episode) -> None:
            moved = drawn.to(self.device, non_blocking=True)
            for part in ("support_x", "support_y", "query_x", "query_y"):
                getattr(static, part).copy_(getattr(moved, part))
            graph.replay()

        return replay


# -- a process for each way --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a process is to do: a way of a setting, and how it is measured, alike for all."""

    setting: Setting
    way: Way
    device: str
    backend: str
    steps: int
    timings: int
    threads: int
    keep_memory: bool

    @property
    def name(self) -> str:
        return f"{self.setting.title}: {self.way.name}"


PARTS = ("counts", "synchronisations", "profile")
"""What a process sends behind its times; an error in one of them leaves the others as they are."""


def _serve(pipe: Connection, job: _Job) -> None:
    """Run in the process of a way: send its times and memory, then each of ``PARTS``."""
    torch.set_num_threads(job.threads)
    if job.keep_memory:
        keep_memory()
    step, timed = _time(job)
    pipe.send(timed)
    on_gpu = job.device == "cuda"
    parts: tuple[Callable[[], Any], ...] = (
        lambda: _count_step(job.setting, job.way, job.device),
        lambda: synchronisations(step) if on_gpu else None,
        lambda: profile(step, job.device, steps=min(PROFILED, job.steps), ms=timed["ms"]),
    )
    for part in parts:
        try:
            pipe.send(part())
        except Exception as error:  # told instead; what else can be measured still is
            pipe.send(f"{type(error).__name__}: {error}")


def _count_step(setting: Setting, way: Way, device: str) -> dict[str, int]:
    """``count`` of a step that is run as it is written."""
    step = Step(setting, Way(way.dtype), device)
    if isinstance(step.learner, GradientLearner):
        step.learner.tasks_at_once = setting.episodes  # in one thread, which is all that is seen
    return count(step, step.optimizer)


def _time(job: _Job) -> tuple[Step, dict[str, Any]]:
    """A step of a way and its times, once its gradient is known to be that of the first way.

    Raises:
        ValueError: If it is not.
    """
    before, on_gpu = peak_memory(), job.device == "cuda"
    step = Step(job.setting, job.way, job.device, job.backend)
    gradient = step.gradient()
    for _ in range(min(WARMUP, job.steps)):
        step()
    each = [1000 * seconds_each(step, job.device, job.steps) for _ in range(job.timings)]
    after = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    memory = None if after is None else after if on_gpu or before is None else after - before
    # Only now, when memory was looked at, is there another step beside this one.
    expected = Step(job.setting, WAYS[0], job.device).gradient()
    difference = float((gradient - expected).norm() / expected.norm())
    if not difference <= TOLERANCE[job.way.dtype]:  # not a number is refused too
        raise ValueError(
            f"its gradient differs by {100 * difference:.3g} % from that of {WAYS[0].name!r}, so that timing it would "
            f"compare different things"
        )
    ms = statistics.median(each)
    timed = {"ms": ms, "per_second": 1000 * job.setting.units / ms, "ms_each": each, "difference": difference}
    return step, timed | {"memory_mib": None if memory is None else round(memory / 2**20, 1)}


def _measure(job: _Job) -> dict[str, Any]:
    """What the process of a way sends; parts that could not be measured are ``None``, and ``not_measured`` says why.

    Raises:
        RuntimeError: If the way cannot be run or does not agree.
    """
    process = Process(job.name, _serve, job)
    try:
        row: dict[str, Any] = {**asdict(job.setting), "unit": job.setting.unit, "units": job.setting.units}
        row |= {"title": job.setting.title, "way": job.way.name, "dtype": job.way.dtype, **process.receive()}
        row["not_measured"] = {}
        for part in PARTS:
            try:
                row[part] = process.receive()
            except RuntimeError as error:
                row[part], row["not_measured"][part] = None, one_line(error)
    finally:
        process.end()
    return row


# -- whole training ----------------------------------------------------------------------------------------------------


class ValidationClock(Callback):
    """Notes when each validation of a training ends, and what it scored.

    Args:
        folder: Where it writes that, at the end of training.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.began = time.perf_counter()
        self.seen: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at it."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            accuracy = float(trainer.callback_metrics["val/accuracy"])  # known once the device is there
            seconds = time.perf_counter() - self.began
            self.seen.append({"step": trainer.global_step, "seconds": seconds, "accuracy": accuracy})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what was seen."""
        (Path(self.folder) / SEEN).write_text(json.dumps(self.seen))


def train(root: Path, device: str, *, target: float, steps: int | None = None) -> dict[str, Any]:
    """Train on Omniglot by ``snail fit``, as a user does.

    Args:
        root: Omniglot's folder.
        device: ``cuda`` or ``cpu``.
        target: Validation accuracy in percent that is waited for.
        steps: Optimiser steps; as many as the config has if not given.

    Returns:
        ``seconds`` of the whole command; ``validations`` with their ``step``, ``seconds`` since training began and
        ``accuracy`` in percent; the first of them that ``reached`` the target, or ``None``.

    Raises:
        RuntimeError: If the command fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        clock = {"class_path": f"{ValidationClock.__module__}.ValidationClock", "init_args": {"folder": folder}}
        argv = ["fit", "--config", CONFIG, "--name", RUN, "--data.root", str(root)]
        argv += ["--trainer.accelerator", device, "--trainer.devices", "1", "--trainer.callbacks", json.dumps([clock])]
        if steps is not None:
            argv += ["--trainer.max_steps", str(steps), "--data.steps_per_epoch", str(min(steps, 250))]
        start = time.perf_counter()
        status = snail(argv)
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"snail fit ended with status {status}")
        validations = json.loads((Path(folder) / SEEN).read_text())
    reached = next((validation for validation in validations if validation["accuracy"] >= target), None)
    return {"config": CONFIG, "seconds": seconds, "target": target, "validations": validations, "reached": reached}


# -- what is printed ---------------------------------------------------------------------------------------------------


def _cells(row: Mapping[str, Any], device: str) -> list[str]:
    profiled, memory, bound = row["profile"], row["memory_mib"], row["floor"]
    return [
        row["title"],
        row["way"],
        f"{_figure(row['per_second'])} {row['unit']}",
        _figure(row["ms"]),
        "?" if profiled is None else f"{100 * profiled['share']:.0f} %",
        _waits(row) if device == "cuda" else "not on this device",
        "?" if bound is None else f"{_figure(bound['ms'])} ({bound['binds']})",
        "?" if bound is None else _figure(row["distance"]),
        "?" if memory is None else f"{memory:,.0f}",
    ]


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _waits(row: Mapping[str, Any]) -> str:
    """How often a step waits for the GPU, by whichever found more."""
    told, profiled = row["synchronisations"], row["profile"]
    found = [] if told is None else [len(told)]
    found += [] if profiled is None else [profiled["synchronisations"]]
    return f"{max(found):g}" if found else "?"


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table of a report, as documents show it."""
    kernels = "in kernels" if report["device"] == "cuda" else "in operators"
    head = [
        "",
        "way",
        "a second",
        "ms a step",
        kernels,
        "synchronisations",
        "floor, ms (what binds)",
        "times the floor",
    ]
    lines = [[*head, "peak memory, MiB"], ["---"] * (len(head) + 1)]
    lines += [_cells(row, report["device"]) for row in report["rows"]]
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    reached = report["rates"]
    products = ", ".join(f"{dtype} {reached[dtype] / 1e12:.3g}" for dtype in TOLERANCE if reached[dtype] is not None)
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in report["versions"] if name != "snail")
    facts = [
        f"Reached here: {products} TFLOP/s in products of {reached['size']:,} rows, {reached['copy'] / 1e9:.3g} GB/s "
        f"in a copy.",
        f"{report['hardware']}, {versions}{', memory kept' if report['keep_memory'] else ''}, median of "
        f"{report['timings']} timings of {report['steps']} steps, load {report['load']} in the minute before.",
    ]
    return "\n".join([*table, "", *([_training(report["training"])] if report["training"] else []), *facts])


def _training(training: Mapping[str, Any]) -> str:
    reached, last = training["reached"], training["validations"][-1:]
    when = f"after {reached['seconds']:,.0f} s (step {reached['step']:,})" if reached else "not reached"
    end = f" and ended at {last[0]['accuracy']:.2f} % (step {last[0]['step']:,})" if last else ""
    return (
        f"`snail fit --config {training['config']}`: {training['target']:g} % in validation {when}; the whole command "
        f"took {training['seconds']:,.0f} s{end}."
    )


# -- the command -------------------------------------------------------------------------------------------------------


def _percentage(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not a percentage above 0 and up to 100")
    return value


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "device",
        """Show how well a training step of SNAIL and of exact MAML uses this device: steps a second, the
share of the time in which the device computes, how often the CPU waits for it, and how far the time is from the floor
that the step's operations and bytes set, at the rates that the device reaches here.

Conv-4 on 28x28 random images, 1 query a class: SNAIL 5-way and 20-way 5-shot, MAML 5-way 1-shot with one inner step.
Each way of running the step, in a process of its own: as it is written, compiled, and as a CUDA graph, in float32 and
with autocast to bfloat16. What cannot be run is left out, and the report says why.

On a CPU run it on a machine that does nothing else.""",
        quick="without SNAIL 20-way, smaller defaults: a trial, not a measurement",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cuda", "cpu"), default=here, help="where it runs" + default)
    add("--episodes", type=whole_number, default=32, help="episodes (tasks of MAML) of a step" + default)
    add("--steps", type=whole_number, help="steps of a timing (default: 20 on a GPU, 2 on a CPU)")
    add("--timings", type=whole_number, default=7, help="how often every way is timed" + default)
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="also what torch.compile makes of it, on a "
        "CPU too, where that takes minutes to start; by which backend (default: inductor)")  # fmt: skip
    add("--train", action="store_true", help=f"also the whole training of {CONFIG}, by snail fit, as runs/{RUN}, which "
        "snail test takes with --trust snail, because of the clock in its config")  # fmt: skip
    add("--omniglot", type=Path, metavar="DIR", help="Omniglot's folder, for --train")
    add("--target", type=_percentage, default=97.0, help="validation accuracy in %% to wait for" + default)
    add("--train_steps", type=whole_number, metavar="N", help="end training after so many steps")
    options = parser.read(argv, episodes=2, steps=1, timings=1)
    if options.show is None and options.train and options.omniglot is None:
        raise ValueError("--train needs --omniglot DIR, where Omniglot is or is to be downloaded to")
    on_gpu = options.device == "cuda"
    options.steps = options.steps or (20 if on_gpu else 2)
    if on_gpu and not options.quick:
        options.compile = options.compile or "inductor"
    return options


def _rates(options: argparse.Namespace) -> dict[str, Any]:
    sizes = {"size": 8192, "copied": 2**30} if options.device == "cuda" else {"size": 2048, "copied": 2**28}
    if options.quick:
        sizes = {"size": 512, "copied": 2**24}
    reached = rates(options.device, **sizes, times=options.timings)
    torch.cuda.empty_cache()  # the processes of the ways need the memory
    return reached


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench device``.

    Args:
        argv: The command line behind ``bench device``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong.
        RuntimeError: If no way can be run.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    device = options.device
    report = about_run(options, device)
    del report["dtype"]  # each way has its own
    if device == "cuda":
        report["versions"]["cuda"] = torch.version.cuda
    report |= {"steps": options.steps, "timings": options.timings, "network": Conv4().description}
    report |= {"meaning": {**MEANING, "share": SHARE[device]}, "left_out": {}, "rates": _rates(options), "rows": []}
    for setting in (setting for setting in SETTINGS if setting.ways == 5 or not options.quick):
        setting = replace(setting, episodes=options.episodes)
        for way in setting.ways_to_run:
            job = _Job(setting, way, device, options.compile or "", options.steps, options.timings,
                       torch.get_num_threads(), options.keep_memory)  # fmt: skip
            if reason := reason_against(way, device, options.compile):
                report["left_out"][job.name] = reason
                continue
            try:
                row = _measure(job)
            except RuntimeError as error:
                report["left_out"][job.name] = one_line(error)
                continue
            row["floor"] = row["counts"] and floor(row["counts"], way.dtype, report["rates"])
            row["distance"] = row["floor"] and row["ms"] / row["floor"]["ms"]
            report["rows"].append(row)
            print("  ".join(_cells(row, device)), flush=True)
    if not report["rows"]:
        raise RuntimeError(f"no way could be run: {'; '.join(report['left_out'].values())}")
    report["training"] = None
    if options.train:
        try:
            report["training"] = train(options.omniglot, device, target=options.target, steps=options.train_steps)
        except (OSError, RuntimeError) as error:
            report["left_out"]["training"] = one_line(error)
    for name, reason in report["left_out"].items():
        print(f"left out: {name} ({reason})")
    print("\n" + markdown_table(report))
    write_report(report, options.output)
    return 0
