"""``snail bench rl``: what playing step by step with a state gains over reading a trial anew at each of its steps.

Two ways to the same actions are timed in turn, A B A B ..., on one agent in one environment. What is quoted is their
ratio. Before a pair is timed it must agree in float64.

Axes: ``b`` trial, ``t`` step, ``c`` channels.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from snail.rl import Agent, Bandits, Environment, SNAILAgent, roll_out

from ..options import whole_number
from .common import BenchParser, about_run, compare, largest_difference, write_report

__all__ = ["main", "markdown_table", "play_again", "time_playing"]

STEPS = (100, 1000)  # of a trial
ARMS = 10


@torch.no_grad()
def play_again(agent: Agent, environment: Environment, inputs: Tensor, positions: Sequence[int]) -> Tensor:
    """Act at some steps of trials, each time by reading all of the trial up to there.

    Args:
        agent: Plays.
        environment: Takes the actions, of new trials.
        inputs: ``(b, t, c)``, what the agent reads.
        positions: The steps, at most ``environment.steps``.

    Returns:
        The logarithm of each action's probability, ``(b, positions, A)``.
    """
    environment.reset()
    said = []
    for i in positions:
        of_actions = agent.policy(inputs[:, : i + 1])[:, -1].log_softmax(-1)
        environment.step(torch.multinomial(of_actions.exp(), 1)[:, 0])
        said.append(of_actions)
    return torch.stack(said, dim=1)


def time_playing(steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time an environment step both ways: a whole roll-out, values included, and some steps of the plain way.

    Args:
        steps: Steps of a trial.
        options: ``trials`` side by side, ``positions`` at which the plain way is timed, and ``pairs``.

    Returns:
        What ``common.compare`` gives, in milliseconds of a step of one trial; the setting; ``steps_per_second`` and
        ``plain_steps_per_second``; ``max_difference``.

    Raises:
        ValueError: If the two ways do not agree.
    """
    environment, agent = Bandits(options.trials, ARMS, steps), SNAILAgent(0, ARMS, steps)
    parts = min(steps, options.positions)
    positions = [(2 * i + 1) * steps // (2 * parts) for i in range(parts)]  # the middles of equal parts

    few, exact = Bandits(2, ARMS, steps), copy.deepcopy(agent).double()
    played = roll_out(exact, few)
    chosen = played.actions[:, positions, None]
    again = play_again(exact, few, played.inputs, positions).gather(-1, chosen)[..., 0]
    difference = largest_difference(
        played.log_probabilities[:, positions], again, "a trial played on and one that is read again"
    )

    inputs = roll_out(agent, environment).inputs

    def seconds_per_step(play: Callable[[], Any], count: int) -> float:
        start = time.perf_counter()
        play()
        seconds = time.perf_counter() - start
        return seconds / (count * environment.trials)

    row: dict[str, Any] = {"steps": steps, "arms": ARMS, "trials": options.trials, "positions": positions}
    row |= {"max_difference": difference} | compare(
        lambda: seconds_per_step(lambda: roll_out(agent, environment), steps),
        lambda: seconds_per_step(lambda: play_again(agent, environment, inputs, positions), parts),
        pairs=options.pairs,
    )
    return row | {"steps_per_second": 1000 / row["shared_ms"], "plain_steps_per_second": 1000 / row["plain_ms"]}


# -- what is printed -------------------------------------------------------------------------------------------------


def markdown_table(report: dict[str, Any]) -> str:
    """The table of a report, as the README shows it."""
    lines = [
        "| trials of | here, steps a second | read again, steps a second | ratio (spread) | plain way timed on |",
        "| --- " * 5 + "|",
    ]
    for row in report["playing"]:
        ratio = f"{row['ratio']:.1f} ({row['ratio_min']:.1f} to {row['ratio_max']:.1f})"
        rates = f"{row['steps_per_second']:,.0f} | {row['plain_steps_per_second']:,.0f}"
        timed = f"{len(row['positions'])} of {row['steps']:,} steps"
        lines.append(f"| {row['steps']:,} steps | {rates} | {ratio} | {timed} |")
    row = report["playing"][0]
    what = (
        f"SNAIL on bandits of {row['arms']} arms, {row['trials']} trials side by side; the roll-out also reads values."
    )
    where = f"{report['hardware']}, torch {report['versions']['torch']}{', memory kept' * report['keep_memory']}"
    return "\n".join(
        [*lines, "", what, f"{where}, median of {len(row['pairs'])} pairs, load {report['load']} in the minute before."]
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = BenchParser(
        "rl",
        f"""Time the steps that an agent plays in an environment on the CPU, in float32: a roll-out of bandits with a
state that is read on, against reading the whole trial again at each step.

The two are first checked to agree, then timed in turn, the plain way at some steps of the trial; OMP_NUM_THREADS sets
the threads of both ({torch.get_num_threads()} now). Run it on a machine that does nothing else.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--pairs", type=whole_number, default=5, help="how often both ways are timed" + default)
    add("--trials", type=whole_number, default=20, help="trials side by side" + default)
    add("--positions", type=whole_number, default=20, help="steps at which the plain way is timed" + default)
    return parser.read(argv, pairs=1, trials=2, positions=2)


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench rl``.

    Args:
        argv: The command line behind ``bench rl``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If an option is wrong, or the two ways do not agree.
    """
    options = _options(argv)
    if options.show is not None:
        print(markdown_table(json.loads(options.show.read_text())))
        return 0
    torch.manual_seed(0)
    report = about_run(options) | {"playing": []}
    for steps in STEPS[:1] if options.quick else STEPS:
        report["playing"].append(time_playing(steps, options))
    print("\n" + markdown_table(report))
    write_report(report, options.output)
    return 0
