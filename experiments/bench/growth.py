"""``snail bench growth``: how time and memory of a step grow with the length of a sequence and the size of an episode.

Every point runs in a fresh process, so that its peak memory is its own. Slopes are fitted on log-log axes and told
beside those of what theory says, over the same sizes.

Axes: ``b`` episode, ``t`` step, ``c`` channels.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from snail import MAML, SNAIL, AttentionBlock, Block, Conv4, Episode, Learner, Stack, TCBlock

from ..levers import keep_memory
from ..options import check_picture, whole_number
from .common import BenchParser, about_run, write_report
from .processes import Process, peak_memory

__all__ = ["CURVES", "Curve", "Growth", "Job", "Work", "main", "markdown_table", "measure", "slope"]

WAYS, EMBEDDING = 5, 64  # of the network that reads sequences
LENGTHS = (6, 26, 101, 316, 1000, 3162, 10_000)
LARGE = 1000  # slopes over lengths are fitted from here on, where what grows the most counts the most
TASKS = 4  # of a meta-step
PIECE = 64  # steps that are read at once to get to a state, few enough not to count in the peak
SHORTEST = 0.1  # seconds; shorter work is repeated for as long within each measurement
ASKED = (10_000, 8)  # length, GiB


# -- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is measured at a point.

    Args:
        run: Does it once.
        modules: Whose weights it uses.
    """

    run: Callable[[], None]
    modules: Sequence[nn.Module]

    def weights(self) -> int:
        """Bytes of the weights, and of the gradients that they have."""
        parameters = [parameter for module in self.modules for parameter in module.parameters()]
        kept = [*parameters, *(parameter.grad for parameter in parameters if parameter.grad is not None)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _blocks(length: int, kind: type[Block] | None) -> list[tuple[Block, int]]:
    """The paper's network for sequences of a length, or its blocks of a kind; each with the channels that it reads."""
    with torch.device("meta"):  # what is not measured takes no memory
        network = SNAIL(nn.Identity(), EMBEDDING, WAYS, max_shots=math.ceil((length - 1) / WAYS)).network
    found, channels = [], EMBEDDING + WAYS
    for block in network.blocks if kind else [network]:
        if isinstance(block, kind or Stack):
            found.append((block.to_empty(device="cpu"), channels))
        channels = getattr(block, "out_channels", channels)
    for block, _ in found:
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.01)
    return found


def train(length: int, kind: type[Block] | None = None) -> Work:
    """Forward, cross-entropy at the last position and backward, of the network or of its blocks of a kind."""
    blocks = _blocks(length, kind)
    inputs = [torch.randn(1, length, channels, requires_grad=True) for _, channels in blocks]
    label = torch.zeros(1, dtype=torch.long)

    def run() -> None:
        for x, (block, _) in zip(inputs, blocks, strict=True):
            x.grad = None
            block.zero_grad()
        answers = [block(x)[:, -1] for x, (block, _) in zip(inputs, blocks, strict=True)]
        torch.autograd.backward([F.cross_entropy(answer, label) for answer in answers])

    return Work(run, [block for block, _ in blocks])


def read(length: int) -> Work:
    """Read a whole sequence without gradient."""
    ((network, channels),) = _blocks(length, None)
    x = torch.randn(1, length, channels)

    @torch.no_grad()
    def run() -> None:
        network(x)

    return Work(run, [network])


@torch.no_grad()
def read_on(length: int, kind: type[Block] | None = None) -> Work:
    """Read the last step of a sequence behind the state of those before it, without gradient."""
    blocks = _blocks(length, kind)
    states = []
    for block, channels in blocks:
        state = None
        for start in range(0, length - 1, PIECE):
            _, state = block.step(torch.randn(1, min(PIECE, length - 1 - start), channels), state)
        states.append((block, torch.randn(1, 1, channels), state))

    @torch.no_grad()
    def run() -> None:
        for block, last, state in states:
            block.step(last, state)

    return Work(run, [block for block, _ in blocks])


def _learn(learner: Learner, tasks: int, shots: int, queries: int) -> Work:
    """Loss and backward on random images, ``queries`` a class."""
    ways = learner.ways or WAYS
    support_y, query_y = (torch.rand(tasks, ways * each).argsort() % ways for each in (shots, queries))
    support_x, query_x = (torch.rand(*y.shape, 1, 28, 28) for y in (support_y, query_y))
    episode = Episode(support_x, support_y, query_x, query_y, ways)

    def run() -> None:
        learner.zero_grad()
        torch.autograd.backward(learner.loss(episode)[0])

    return Work(run, [learner])


def episode_step(ways: int = WAYS, shots: int = 1, queries: int = 1) -> Work:
    """A training step of SNAIL with Conv-4 on one episode."""
    return _learn(SNAIL(Conv4(), EMBEDDING, ways, shots), 1, shots, queries)


def meta_step(steps: int, *, recompute: bool) -> Work:
    """A meta-step of exact MAML, 1-shot, 1 query a class, with some inner steps."""
    network = Conv4(out_features=None, strided=True)
    return _learn(MAML(network, EMBEDDING, WAYS, steps=steps, inner_rate=0.1, recompute=recompute), TASKS, 1, 1)


# -- what theory says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growth:
    """What a cost is made of in theory, as a function of a size.

    Args:
        name: As it is written.
        terms: Whose sum it is, each with a factor of its own that is not known.
    """

    name: str
    terms: tuple[Callable[[float], float], ...]

    def __add__(self, other: Growth) -> Growth:
        return Growth(f"{self.name} + {other.name}", self.terms + other.terms)

    def slopes(self, sizes: Sequence[float]) -> tuple[float, float]:
        """The least and the largest slope that it can have over some sizes: those of its terms."""
        each = [slope([(size, term(size)) for size in sizes]) for term in self.terms]
        return min(each), max(each)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of a line through ``(size, cost)``, all positive, on log-log axes, by least squares."""
    return statistics.linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope


CONSTANT = Growth("1", (lambda n: 1,))
LINEAR = Growth("n", (lambda n: n,))
SQUARE = Growth("n²", (lambda n: n**2,))
LOG = Growth("log² n", (lambda n: math.log2(n) ** 2,))
DENSE = Growth("n log² n", (lambda n: n * math.log2(n) ** 2,))  # a dense layer for each doubling, wider and wider
WIDEST = Growth("n log n", (lambda n: n * math.log2(n),))  # what the last of them reads


def _images(of: Callable[[float], float]) -> Growth:
    return Growth("images", (of,))


# -- the curves ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """How the cost of some work grows.

    Args:
        setting: What does the work, and on what.
        axis: What grows.
        title: What is done.
        work: Gets it ready for a size.
        time: What theory says of the time.
        memory: What theory says of the memory beyond the weights and their gradients.
        sizes: Where it is measured; over lengths those of the command.
        drawn: Whether the picture shows it.
    """

    setting: str
    axis: str
    title: str
    work: Callable[[int], Work]
    time: Growth
    memory: Growth
    sizes: Sequence[int] = ()
    drawn: bool = True

    @property
    def fitted_from(self) -> int:
        """The least size that slopes are fitted to."""
        return LARGE if self.axis == "length" else 1


_over_length = partial(Curve, "the paper's network", "length")

CURVES = {
    "training": _over_length("training step", train, DENSE + SQUARE, DENSE + LINEAR),
    "convolutions": _over_length("training step, convolutions alone", partial(train, kind=TCBlock), DENSE, DENSE),
    "attention": _over_length(
        "training step, attention alone", partial(train, kind=AttentionBlock), SQUARE, LINEAR + WIDEST
    ),
    "reading": _over_length("reading all again", read, DENSE + SQUARE, LINEAR + WIDEST),
    "step": _over_length("reading one further step", read_on, LINEAR + LOG, LINEAR),
    "step_convolutions": _over_length(
        "one further step, convolutions alone", partial(read_on, kind=TCBlock), LOG, LINEAR, drawn=False
    ),
    "step_attention": _over_length(
        "one further step, attention alone", partial(read_on, kind=AttentionBlock), LINEAR, LINEAR, drawn=False
    ),
    "ways": Curve(
        "SNAIL with Conv-4, 1-shot, 1 query a class", "ways", "training step",
        lambda n: episode_step(ways=n), _images(lambda n: 2 * n), _images(lambda n: 2 * n), (5, 10, 20, 40),
    ),
    "shots": Curve(
        "SNAIL with Conv-4, 5-way, 1 query a class", "shots", "training step",
        lambda n: episode_step(shots=n), _images(lambda n: n + 1), _images(lambda n: n + 1), (1, 2, 5, 10),
    ),
    "queries": Curve(
        "SNAIL with Conv-4, 5-way 5-shot", "queries a class", "training step",
        lambda n: episode_step(shots=5, queries=n), _images(lambda n: 5 + n), _images(lambda n: 5 + n), (1, 5, 15, 45),
    ),
    "inner_steps": Curve(
        "MAML, 4 tasks of 5-way 1-shot", "inner steps", "meta-step",
        partial(meta_step, recompute=False), LINEAR, LINEAR, (1, 2, 5, 10),
    ),
    "inner_steps_recomputed": Curve(
        "MAML, 4 tasks of 5-way 1-shot", "inner steps", "meta-step, recomputed",
        partial(meta_step, recompute=True), LINEAR, CONSTANT, (1, 2, 5, 10),
    ),
}  # fmt: skip
"""What is measured, by its name in the report."""


# -- a process for each point ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a process is to measure: a point of a curve, and the machine's options, alike for all.

    Args:
        curve: Its name in ``CURVES``.
        size: The point.
        repeats: How often it is timed.
        threads: Of torch.
        keep_memory: Whether freed memory is kept.
    """

    curve: str
    size: int
    repeats: int
    threads: int
    keep_memory: bool


def measure(job: Job) -> dict[str, Any]:
    """Measure a point in this process.

    Returns:
        ``curve`` and ``size``; ``seconds``, the median of ``seconds_each``, once the work has been done to warm up;
        ``memory_mib``, by how much the process's peak memory grew, ``None`` where the system does not tell; and
        ``weights_mib``, what weights and their gradients have of it.
    """
    torch.manual_seed(0)
    _load()
    before = peak_memory()
    work = CURVES[job.curve].work(job.size)
    times = max(1, round(SHORTEST / _seconds(work.run, 1)))
    each = [_seconds(work.run, times) for _ in range(job.repeats)]
    after = peak_memory()
    memory = None if before is None or after is None else round((after - before) / 2**20, 2)
    point = {"curve": job.curve, "size": job.size, "seconds": statistics.median(each), "memory_mib": memory}
    return point | {"weights_mib": round(work.weights() / 2**20, 2), "seconds_each": each}


def _load() -> None:
    """Do a little of everything, so that what torch loads when it is first asked for it is not counted."""
    attention = AttentionBlock(6, 2, 2)
    attention.rows = 1  # as long sequences are read
    with torch.device("meta"):
        snail = SNAIL(nn.Identity(), 1, 1, 1)
    snail.embedding = Conv4(filters=1, out_features=1)
    snail.network = Stack(TCBlock(2, 3, 2), attention, nn.Linear(8, 1))
    for learner in (snail, MAML(Conv4(filters=1, out_features=None, strided=True), 1, 1, recompute=True)):
        _learn(learner, 1, 1, 2).run()


def _seconds(run: Callable[[], None], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def _serve(pipe: Connection, job: Job) -> None:
    """Run in the process of a point."""
    torch.set_num_threads(job.threads)
    if job.keep_memory:
        keep_memory()
    pipe.send(measure(job))


def _measured(job: Job) -> dict[str, Any]:
    process = Process(f"{job.curve} at {job.size}", _serve, job)
    try:
        point: dict[str, Any] = process.receive()
    finally:
        process.end()
    return point


# -- what is printed -------------------------------------------------------------------------------------------------


def _time(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.2f} ms"


def _memory(mib: float | None) -> str:
    return "" if mib is None else f"{mib / 1024:,.2f} GiB" if mib >= 1024 else f"{mib:,.0f} MiB"


def _from_to(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _slope(points: Sequence[tuple[float, float | None]], theory: Growth) -> str:
    """The slope of some points with that of the theory; nothing where none can be fitted."""
    known = [(size, cost) for size, cost in points if cost is not None and cost > 0]
    if len(known) < max(2, len(points)):
        return ""
    least, most = theory.slopes([size for size, _ in known])
    return f"{slope(known):.2f} ({theory.name}: {_from_to(f'{least:.2f}', f'{most:.2f}')})"


def _beyond_weights(point: Mapping[str, Any]) -> float | None:
    return None if point["memory_mib"] is None else point["memory_mib"] - point["weights_mib"]


def _points(report: Mapping[str, Any], curve: str) -> list[dict[str, Any]]:
    """The points of a curve, the smallest first."""
    return sorted((point for point in report["points"] if point["curve"] == curve), key=lambda point: point["size"])


def _row(curve: Curve, points: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = points[0], points[-1]
    fitted = [point for point in points if point["size"] >= curve.fitted_from]
    return [
        f"{curve.setting}: {curve.title}",
        f"{curve.axis} {_from_to(format(first['size'], ','), format(last['size'], ','))}",
        _from_to(_time(first["seconds"]), _time(last["seconds"])),
        _slope([(point["size"], point["seconds"]) for point in fitted], curve.time),
        _from_to(_memory(first["memory_mib"]), _memory(last["memory_mib"])),
        _slope([(point["size"], _beyond_weights(point)) for point in fitted], curve.memory),
    ]


def markdown_table(report: Mapping[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    head = ("", "over", "time", "slope (theory)", "memory", "slope (theory)")
    rows = [_row(curve, points) for name, curve in CURVES.items() if (points := _points(report, name))]
    longest, step, again = (_points(report, name)[-1] for name in ("training", "step", "reading"))
    asked = f" (asked: under {ASKED[1]} GiB)" if longest["size"] == ASKED[0] else ""
    memory = _memory(longest["memory_mib"]) + asked
    rows.insert(1, [rows[0][0], f"length {longest['size']:,}", _time(longest["seconds"]), "", memory, ""])
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    facts = f"{report['hardware']}, torch {report['versions']['torch']}{', memory kept' * report['keep_memory']}"
    return "\n".join(
        [*lines, "",
         f"At length {step['size']:,} a further step takes {_time(step['seconds'])} with the state kept, and reading "
         f"all again {again['seconds'] / step['seconds']:,.1f} times as long. Slopes are those on log-log axes, over "
         f"lengths from {LARGE:,} on; what each step costs at any size makes them smaller, but for the weights and "
         f"their gradients, which are left out of the slopes of memory.",
         f"{facts}, median of {report['repeats']}, load {report['load']} in the minute before."]
    )  # fmt: skip


def draw(report: Mapping[str, Any], picture: Path) -> None:
    """Draw the curves of a report.

    Args:
        report: What was measured.
        picture: The PNG to write.
    """
    from ..pictures import draw_growth  # matplotlib is slow to import, and each point's process would

    panels: dict[tuple[str, str], dict[str, list[tuple[float, float, float | None]]]] = {}
    for name, curve in CURVES.items():
        points = [(point["size"], point["seconds"], point["memory_mib"]) for point in _points(report, name)]
        if curve.drawn and points:
            panels.setdefault((curve.setting, curve.axis), {})[curve.title] = points
    draw_growth(panels, picture, title="How the cost of a step grows")


# -- the command -----------------------------------------------------------------------------------------------------


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "growth",
        f"""Measure on the CPU, in float32, how time and peak memory of a step grow.

length         the paper's network on one sequence: a training step (forward, loss at the last position, backward)
               of all of it, of its convolutions and of its attention alone; without gradient one further step with
               the state kept, against reading all again
ways, shots, queries a class
               a training step of SNAIL with Conv-4 on one episode of 28x28 random images
inner steps    a meta-step of exact MAML, {TASKS} tasks of {WAYS}-way 1-shot, also with inner steps computed again

Each point runs in a process of its own. OMP_NUM_THREADS sets their threads ({torch.get_num_threads()} now). Run it on a
machine that does nothing else; only slopes and memory carry over to another.""",
        quick="tiny lengths, the first point of most curves: a trial",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--picture", type=Path, help="file of the picture, overwritten; drawn again of an earlier output "
        "too (default: growth.png beside the output)")  # fmt: skip
    add("--lengths", type=whole_number, nargs="+", default=LENGTHS, metavar="N", help="of the sequences" + default)
    add("--repeats", type=whole_number, default=3, help="how often each point is timed" + default)
    options = parser.read(argv, lengths=LENGTHS[:2], repeats=1)
    if options.show is None:
        options.picture = options.picture or options.output.parent / "growth.png"
    if min(options.lengths) < 2:
        raise ValueError(f"--lengths has {min(options.lengths)}; a sequence needs at least 2 steps")
    if options.picture:
        check_picture(options.picture)
    return options


def _jobs(options: argparse.Namespace) -> list[Job]:
    machine = (options.repeats, torch.get_num_threads(), options.keep_memory)
    jobs: list[Job] = []
    for name, curve in CURVES.items():
        sizes = sorted(set(curve.sizes or options.lengths))
        if options.quick and jobs:
            sizes = sizes[:1]
        jobs += [Job(name, size, *machine) for size in sizes]
    return jobs


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench growth``.

    Args:
        argv: The command line behind ``bench growth``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong.
        RuntimeError: If the process of a point fails.
    """
    options = _options(argv)
    if options.show is not None:
        report = json.loads(options.show.read_text())
        print(markdown_table(report))
    else:
        report = about_run(options)
        report |= {"repeats": options.repeats, "points": []}
        print(f"\n{'':<52}{'size':>8}{'time':>14}{'memory':>12}", flush=True)
        for job in _jobs(options):
            point = _measured(job)
            report["points"].append(point)
            name = f"{CURVES[job.curve].title}, {CURVES[job.curve].axis}"
            told = _time(point["seconds"]), _memory(point["memory_mib"])
            print(f"{name:<52}{job.size:>8,}{told[0]:>14}{told[1]:>12}", flush=True)
        write_report(report, options.output)
    if options.picture is not None:
        draw(report, options.picture)
        print(f"the picture: {options.picture}")
    return 0
