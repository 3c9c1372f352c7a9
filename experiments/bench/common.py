"""What the benchmarks share: ways measured in turn, that they agree, what is told of the machine, their options.

Two ways to the same numbers are timed in turn, A B A B ..., so that what else the machine does falls on both. What is
quoted is their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snail.evaluation import machine
from snail.files import replacing

from ..levers import keep_memory
from ..options import OptionParser, check_output

__all__ = ["BenchParser", "about_run", "compare", "largest_difference", "ratios_to", "take_turns", "write_report"]

TOLERANCE = 1e-9  # float64; different sums of the same numbers differ by 1e-15, a wrong way by far more


def compare(shared: Callable[[], float], plain: Callable[[], float], *, pairs: int) -> dict[str, Any]:
    """Measure two ways in turn, ``pairs`` times each, behind one pair that only warms up.

    Args:
        shared: Does the work our way and returns its seconds per query or step.
        plain: Likewise, the plain way.
        pairs: How often.

    Returns:
        Medians ``shared_ms`` and ``plain_ms`` in milliseconds; ``ratio``, ``ratio_min`` and ``ratio_max`` of plain to
        shared within a pair; every pair in milliseconds.
    """
    measured = take_turns({"shared_ms": shared, "plain_ms": plain}, pairs=pairs)
    return {
        **{way: statistics.median(each) for way, each in measured.items()},
        **ratios_to(measured["shared_ms"], measured["plain_ms"]),
        "pairs": [dict(zip(measured, pair, strict=True)) for pair in zip(*measured.values(), strict=True)],
    }


def take_turns(ways: Mapping[str, Callable[[], float]], *, pairs: int) -> dict[str, list[float]]:
    """Measure some ways in turn, A B C A B C ..., behind one round that only warms up.

    Args:
        ways: Each does the work and returns its seconds.
        pairs: Rounds that count.

    Returns:
        The milliseconds of each way in every round.
    """
    rounds = [{name: 1000 * way() for name, way in ways.items()} for _ in range(pairs + 1)][1:]
    return {name: [each[name] for each in rounds] for name in ways}


def ratios_to(first: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """``ratio``, ``ratio_min`` and ``ratio_max`` of a way's times to the first way's, round by round."""
    ratios = [slow / fast for fast, slow in zip(first, other, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def largest_difference(shared: Tensor, plain: Tensor, ways: str) -> float:
    """The largest difference between what two ways give.

    Args:
        shared: What our way gives, in float64.
        plain: What the other gives.
        ways: What the two are called.

    Raises:
        ValueError: If it is more than rounding.
    """
    difference = float((shared - plain).abs().max()) if shared.shape == plain.shape else float("nan")
    if not difference <= TOLERANCE:  # not a number is refused too
        raise ValueError(f"{ways} differ by {difference:.1e}, so that timing them would compare different things")
    return difference


def about_run(options: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """Facts about the machine and the run that belong into every report; a busy machine is warned of.

    Args:
        options: ``quick`` and ``keep_memory``.
        device: Where it runs.
    """
    about = machine(device)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # of the minute before
    memory = ", memory kept" if options.keep_memory else ""
    print(f"{about['hardware']}, torch {about['versions']['torch']}, float32{memory}")
    if load is not None and load > 0.5:
        print(f"load {load:.1f} in the last minute: other work slows the ways unequally; quote quiet runs only")
    report = about | {"threads": torch.get_num_threads(), "load": load, "dtype": "float32", "quick": options.quick}
    return report | {"keep_memory": options.keep_memory}


class BenchParser(OptionParser):
    """The options that every benchmark has; those of its own are added to it.

    Args:
        name: What stands behind ``snail bench``.
        description: What is measured.
        quick: What ``--quick`` means.
        keeps_memory: Whether memory can be kept in this process, or in those that it starts.
    """

    def __init__(
        self,
        name: str,
        description: str,
        *,
        quick: str = "first setting only, smaller defaults: a trial, not a measurement",
        keeps_memory: bool = True,
    ) -> None:
        super().__init__(
            prog=f"snail bench {name}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            description=description,
        )
        add, default = self.add_argument, " (default: %(default)s)"
        add("--output", type=Path, default=f"{name}.json", help="file for every number, overwritten" + default)
        add("--show", type=Path, metavar="FILE", help="measure nothing; print the table of an earlier output")
        add("--quick", action="store_true", help=quick)
        self.set_defaults(keep_memory=False)
        if keeps_memory:
            add("--keep_memory", action="store_true", help="let the C library keep freed memory (glibc), for all ways")

    def read(self, argv: Sequence[str], **quick: Any) -> argparse.Namespace:
        """The options; see ``read_known``.

        Raises:
            ValueError: Also if an option is not known.
        """
        options, rest = self.read_known(argv, **quick)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options

    def read_known(self, argv: Sequence[str], **quick: Any) -> tuple[argparse.Namespace, list[str]]:
        """The options, checked, and what is not known; memory is kept if that was asked for.

        Args:
            argv: The command line behind the benchmark's name.
            **quick: Defaults that ``--quick`` puts in the place of the usual ones.

        Raises:
            ValueError: If an option is wrong, there is no place for the output, no such device, or memory cannot be
                kept.
        """
        if "--quick" in argv:
            self.set_defaults(**quick)
        options, rest = self.parse_known_args(argv)
        if options.show is None:
            check_output(options.output)
            if options.keep_memory and not keep_memory():
                raise ValueError("the C library of this machine cannot be told to keep memory; leave out --keep_memory")
            if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
                raise ValueError("--device cuda needs a GPU that torch can use, and there is none here")
        return options, rest


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write every number of a report as JSON."""
    with replacing(path) as file:
        file.write(json.dumps(report, indent=2) + "\n")
    print(f"every number: {path}")
