"""``snail bench maml``: a meta-step of exact MAML as this package does it, against the ways of others.

Every way runs in a fresh process of its own, so that its peak memory is its own and nothing that one way leaves behind
serves another. The processes take turns, A B C A B C ..., so that what else the machine does falls on all alike. Before
they are timed, their meta-gradients must agree in float64.

Batch norm is transductive (each batch's own statistics) because that is what all ways can compute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from snail import MAML, Conv4, Episode

from ..levers import keep_memory
from ..options import whole_number
from .common import BenchParser, about_run, largest_difference, ratios_to, take_turns, write_report
from .processes import Process, peak_memory

__all__ = ["PEERS", "WAYS", "Setting", "main", "markdown_table", "meta_gradient", "plain_loop"]

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways, inner steps
TASKS = {5: 32, 20: 8}  # of a meta-step
SWEEP = (1, 2, 4, 8, 16)  # tasks at once
OURS, RECOMPUTED = "package", "package, recomputed"
FASTEST_OPTION = "--model.learner.init_args.tasks_at_once N"


@dataclass(frozen=True)
class Setting:
    """What a meta-step computes.

    Args:
        ways: Classes of a task; one support item and one query for each.
        steps: Inner steps.
        tasks: Tasks of a meta-step.
        filters: Channels of Conv-4.
        rate: The rate of the inner steps.
    """

    ways: int
    steps: int
    tasks: int
    filters: int = 64
    rate: float = 0.1

    def network(self) -> nn.Module:
        """The network, the same one for every way."""
        torch.manual_seed(0)
        return Conv4(filters=self.filters, out_features=self.ways)

    def episode(self) -> Episode:
        """The tasks, the same ones for every way: random images, each class once in a random order."""
        generator = torch.Generator().manual_seed(0)
        x = [torch.rand(self.tasks, self.ways, 1, 28, 28, generator=generator) for _ in range(2)]
        y = [torch.rand(self.tasks, self.ways, generator=generator).argsort() for _ in range(2)]
        return Episode(x[0], y[0], x[1], y[1], self.ways)


# -- the ways: each takes a network and gives what adds an episode's meta-gradient to it -----------------------------

Backward = Callable[[Episode], None]


def package_learner(network: nn.Module, setting: Setting, **options: Any) -> MAML:
    """This package's learner; ``options`` are those of ``snail.MAML``."""
    options |= {"steps": setting.steps, "inner_rate": setting.rate, "batch_norm": "transductive"}
    return MAML(network, ways=setting.ways, **options)


def package(network: nn.Module, setting: Setting, **options: Any) -> Backward:
    """As this package does it; ``options`` are those of ``snail.MAML``."""
    learner = package_learner(network, setting, **options)
    return lambda episode: torch.autograd.backward(learner.loss(episode)[0])


def _tasks(episode: Episode) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(episode.support_x, episode.support_y, episode.query_x, episode.query_y, strict=True)


def plain_loop(network: nn.Module, setting: Setting) -> Backward:
    """As one writes it by hand: a loop over tasks with ``functional_call`` and ``torch.autograd.grad``."""
    network.train()

    def backward(episode: Episode) -> None:
        for support_x, support_y, query_x, query_y in _tasks(episode):
            weights: dict[str, Tensor] = dict(network.named_parameters())
            for _ in range(setting.steps):
                loss = F.cross_entropy(functional_call(network, weights, (support_x,)), support_y)
                gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {
                    name: weight - setting.rate * gradient
                    for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
                }
            loss = F.cross_entropy(functional_call(network, weights, (query_x,)), query_y)
            torch.autograd.backward(loss / len(episode))

    return backward


def learn2learn(network: nn.Module, setting: Setting) -> Backward:
    """As learn2learn's ``MAML`` does it."""
    algorithms = importlib.import_module("learn2learn").algorithms
    learned = algorithms.MAML(network.train(), lr=setting.rate, first_order=False)

    def backward(episode: Episode) -> None:
        for support_x, support_y, query_x, query_y in _tasks(episode):
            learner = learned.clone()
            for _ in range(setting.steps):
                learner.adapt(F.cross_entropy(learner(support_x), support_y))
            torch.autograd.backward(F.cross_entropy(learner(query_x), query_y) / len(episode))

    return backward


def higher(network: nn.Module, setting: Setting) -> Backward:
    """As higher's ``innerloop_ctx`` does it."""
    loop = importlib.import_module("higher").innerloop_ctx
    inner = torch.optim.SGD(network.train().parameters(), lr=setting.rate)

    def backward(episode: Episode) -> None:
        for support_x, support_y, query_x, query_y in _tasks(episode):
            with loop(network, inner, copy_initial_weights=False) as (learner, optimizer):
                for _ in range(setting.steps):
                    optimizer.step(F.cross_entropy(learner(support_x), support_y))
                torch.autograd.backward(F.cross_entropy(learner(query_x), query_y) / len(episode))

    return backward


def one_task_at_once(network: nn.Module, setting: Setting) -> Backward:
    """This package's own loop over tasks."""
    return package(network, setting, tasks_at_once=1, threads=1)


def recomputed(network: nn.Module, setting: Setting) -> Backward:
    """This package's way with inner steps computed again in the backward pass."""
    return package(network, setting, recompute=True)


WAYS: dict[str, Callable[[nn.Module, Setting], Backward]] = {
    OURS: package,
    "package, 1 task at once": one_task_at_once,
    "plain loop": plain_loop,
    "learn2learn": learn2learn,
    "higher": higher,
    RECOMPUTED: recomputed,
}
"""Every way by name; the first is what the others are compared with."""
PEERS = ("learn2learn", "higher")
"""Ways that need another package, of the same name; where it cannot be imported they are left out."""


def _backward(way: str, network: nn.Module, setting: Setting) -> Backward:
    if way.isdigit():  # of the sweep
        return package(network, setting, tasks_at_once=int(way))
    return WAYS[way](network, setting)


def meta_gradient(way: str, setting: Setting) -> Tensor:
    """The meta-gradient that a way of ``WAYS``, or a number of tasks at once, gives in float64, as one vector."""
    network = setting.network().double()
    episode = setting.episode().map_items(torch.Tensor.double)
    _backward(way, network, setting)(episode)
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters() if parameter.grad is not None])


# -- a process for each way ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """What a process is to do: a way, its setting, and the machine's options, alike for all."""

    way: str
    setting: Setting
    device: str
    threads: int
    keep_memory: bool


def _serve(pipe: Connection, job: _Job) -> None:
    """Run in the process of a way: answer ``step`` with seconds, and anything else with the memory's peak."""
    torch.set_num_threads(job.threads)
    if job.keep_memory:
        keep_memory()
    if job.way in PEERS:
        importlib.import_module(job.way)
    pipe.send(meta_gradient(job.way, _small(job.setting)).tolist())
    _take_steps(pipe, job)


def _take_steps(pipe: Connection, job: _Job) -> None:
    before, on_gpu = peak_memory(), job.device == "cuda"
    network, episode = job.setting.network().to(job.device), job.setting.episode().to(job.device)
    backward = _backward(job.way, network, job.setting)
    optimizer = torch.optim.Adam(network.parameters())
    while pipe.recv() == "step":
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.zero_grad()
        backward(episode)
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - start)
    after = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    pipe.send(None if after is None else after if on_gpu or before is None else after - before)


def _small(setting: Setting) -> Setting:
    """As many inner steps on few tasks, to be compared in float64."""
    return Setting(min(setting.ways, 5), setting.steps, 3, filters=8, rate=setting.rate)


def measure(
    ways: Sequence[str], setting: Setting, options: argparse.Namespace, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Time some ways in turn.

    Args:
        ways: Names in ``WAYS``, or numbers of tasks at once.
        setting: What they compute.
        options: Of the command.
        left_out: Where the reason is put if a peer cannot run.

    Returns:
        For each way the median ``ms`` of a task, the ratio to the first way with its spread, the peak ``memory_mib``,
        ``max_difference`` to the first way's meta-gradient in float64, and ``ms_each`` of all rounds.

    Raises:
        ValueError: If the meta-gradients differ.
        RuntimeError: If a way other than a peer fails.
    """
    processes, gradients = {}, {}
    with contextlib.ExitStack() as stack:
        for way in ways:
            job = _Job(way, setting, options.device, torch.get_num_threads(), options.keep_memory)
            processes[way] = Process(way, _serve, job)
            stack.callback(processes[way].end)
        for way in ways:
            try:
                gradients[way] = torch.tensor(processes[way].receive(), dtype=torch.float64)
            except RuntimeError as error:
                if way not in PEERS:
                    raise
                left_out[way] = str(error)
                del processes[way]
        first = gradients[ways[0]]
        differences = {
            way: largest_difference(first, gradient, f"the meta-gradients of {ways[0]!r} and {way!r}")
            for way, gradient in gradients.items()
        }
        times = take_turns({way: process.step for way, process in processes.items()}, pairs=options.pairs)
        memory = {}
        for way, process in processes.items():
            memory[way] = process.ask("stop")
    measured: dict[str, dict[str, Any]] = {}
    for way, each in times.items():
        each = [ms / setting.tasks for ms in each]
        measured[way] = {"ms": statistics.median(each), **ratios_to(times[ways[0]], times[way])}
        measured[way] |= {"memory_mib": None if memory[way] is None else round(memory[way] / 2**20, 1)}
        measured[way] |= {"max_difference": differences[way], "ms_each": each}
    return measured


# -- what is printed -------------------------------------------------------------------------------------------------


def _memory(timing: Mapping[str, Any]) -> str:
    return "" if timing["memory_mib"] is None else f"{timing['memory_mib']:,.0f}"


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['ways']}-way 1-shot, {row['steps']} step{'s' * (row['steps'] > 1)}"


def _print_row(name: str, timing: Mapping[str, Any]) -> None:
    ratio = f"{timing['ratio']:.2f} ({timing['ratio_min']:.2f}-{timing['ratio_max']:.2f})"
    print(f"  {name:<26}{timing['ms']:>12.2f}{ratio:>26}{_memory(timing):>18}{len(timing['ms_each']):>8}", flush=True)


def tasks_at_once(setting: Setting, device: str) -> int:
    """How many tasks the package computes together if nothing is said."""
    learner = package_learner(setting.network(), setting)
    return min(setting.tasks, learner.tasks_together(setting.episode().support_x.to(device)))


def fastest(report: Mapping[str, Any]) -> str:
    """A sentence on how many tasks at once were fastest in each setting, and how to set that."""
    best = [(min(row["sweep"], key=lambda n: row["sweep"][n]["ms"]), _title(row)) for row in report["settings"]]
    parts = [f"{n} for {title}" for n, title in best]
    return f"Fastest tasks at once here: {'; '.join(parts)}; `{FASTEST_OPTION}` sets it."


def markdown_table(report: Mapping[str, Any]) -> str:
    """The ways of a report as a table, as the README shows it."""
    rows = report["settings"]
    ways = [way for way in WAYS if any(way in row["timings"] for row in rows)]
    lines = [_markdown_line(["", *(f"{way}, ms a task" if way == OURS else way for way in ways)])]
    lines += [_markdown_line(["---"] * (1 + len(ways)))]
    for row in rows:
        cells = [f"{_title(row)}, {row['tasks']} tasks, {row['tasks_at_once']} at once"]
        for way in ways:
            timing = row["timings"].get(way)
            if timing is None:
                cells.append("")
                continue
            spread = f"{timing['ratio']:.2f} ({timing['ratio_min']:.2f} to {timing['ratio_max']:.2f})"
            memory = f", {_memory(timing)} MiB" if _memory(timing) else ""
            cells.append((f"{timing['ms']:.2f}" if way == OURS else spread) + memory)
        lines.append(_markdown_line(cells))
    return "\n".join([*lines, "", fastest(report), _facts(report)])


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _facts(report: Mapping[str, Any]) -> str:
    versions = ", ".join(
        f"{name} {report['versions'][name]}" for name in ("torch", *PEERS) if name in report["versions"]
    )
    memory = ", memory kept" if report["keep_memory"] else ""
    pairs = len(report["settings"][0]["timings"][OURS]["ms_each"])
    load = f"load {report['load']} in the minute before"
    return f"{report['hardware']}, {versions}{memory}, median of {pairs} pairs, {load}."


# -- the command -----------------------------------------------------------------------------------------------------


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "maml",
        f"""Time a meta-step of exact MAML (forward, loss, backward, Adam; float32) as this package does it,
against its own loop over tasks, a loop written by hand with functional_call, learn2learn and higher.

Conv-4 of 64 channels on 28x28 random images, 5-way and 20-way 1-shot, 1 query a class, 1 and 5 inner steps,
batch norm by each batch's own statistics. Then a sweep over how many tasks are computed at once, and what
recompute=True costs in time and spares in memory.

Every way runs in a process of its own, so that its peak memory is its own; the ways are first checked to agree
on the meta-gradient, then timed in turn. learn2learn and higher take part where they can be imported:
pip install 'snail-meta[bench]' brings higher, while learn2learn 0.2 builds up to Python 3.10 only.
OMP_NUM_THREADS sets the threads of all ({torch.get_num_threads()} now). Run it on a machine that does nothing else.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--pairs", type=whole_number, default=7, help="how often every way is timed" + default)
    meta_batch = ", ".join(f"{tasks} at {ways} ways" for ways, tasks in TASKS.items())
    add("--tasks", type=whole_number, help=f"tasks of a meta-step (default: {meta_batch})")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where it runs" + default)
    return parser.read(argv, pairs=1, tasks=2)


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench maml``.

    Args:
        argv: The command line behind ``bench maml``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or two ways do not agree.
        RuntimeError: If a way fails.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    report = about_run(options, options.device)
    report |= {"network": Conv4().description, "left_out": {}, "settings": []}
    head = ("ms a task", "ratio median (min-max)", "peak memory, MiB", "pairs")
    print(f"\n  {'':<26}{head[0]:>12}{head[1]:>26}{head[2]:>18}{head[3]:>8}")
    for ways, steps in SETTINGS[:1] if options.quick else SETTINGS:
        setting = Setting(ways, steps, options.tasks or TASKS[ways])
        row: dict[str, Any] = {**asdict(setting), "shots": 1, "queries_per_class": 1}
        row["tasks_at_once"] = tasks_at_once(setting, options.device)
        report["settings"].append(row)
        print(f"{_title(row)}, {setting.tasks} tasks", flush=True)
        taking_part = [way for way in WAYS if way not in report["left_out"] and (way != RECOMPUTED or steps > 1)]
        row["timings"] = measure(taking_part, setting, options, report["left_out"])
        for way, timing in row["timings"].items():
            _print_row(way, timing)
        counts = [str(n) for n in SWEEP if n <= setting.tasks]
        row["sweep"] = measure(counts, setting, options, report["left_out"])
        for n, timing in row["sweep"].items():
            _print_row(f"tasks_at_once {n}", timing)
    timed = report["settings"][0]["timings"]
    report["versions"] |= {way: version(way) for way in PEERS if way in timed}
    for reason in report["left_out"].values():
        print(f"left out: {reason}")
    print("\n" + fastest(report))
    write_report(report, options.output)
    return 0
