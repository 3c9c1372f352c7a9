"""``snail bench``: which benchmark to run; each has its own options, and without a name all run with their defaults."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from ..options import OptionParser

__all__ = ["KINDS", "main"]

KINDS = {
    "fit": "`snail fit` against the plain way, what its loop costs, its memory",
    "scoring": "scoring on images that are embedded once",
    "sharing": "reading an episode's support, or a stream's past, once against reading it again and again",
    "maml": "a meta-step of MAML against loops over tasks",
    "growth": "how time and memory grow with length, ways, shots, queries and inner steps",
    "device": "how well a training step uses the device, GPU or CPU",
    "precision": "training in half precision beside float32",
    "ablation": "what each part of the network and of its training is worth",
    "rl": "an agent that plays on with a state against one that reads its trial again at each step",
    "data": "episodes drawn a second, and what a training step waits for its data",
}
"""The benchmarks by name; each is the module of this name."""


def main(argv: Sequence[str]) -> int:
    """Run ``snail bench``.

    Args:
        argv: The command line behind ``bench``.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: If there is no such benchmark, an option is wrong, or ways that are compared do not agree.
    """
    if argv and not argv[0].startswith("-"):
        if argv[0] not in KINDS:
            raise ValueError(f"there is no benchmark {argv[0]!r}; choose one of {', '.join(KINDS)}")
        return _run(argv[0], argv[1:])
    kinds = "\n".join(f"  {name:<9} {what}" for name, what in KINDS.items())
    parser = OptionParser(
        prog="snail bench",
        allow_abbrev=False,
        formatter_class=RawDescriptionHelpFormatter,
        description=f"""Time this package on this machine, each time in turn with the plain way.

{kinds}

`snail bench NAME --help` tells the options of one. Without a name all run, each with its defaults.""",
    )
    parser.add_argument("--output", type=Path, default="bench", help="folder for every number (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a trial of each, not a measurement")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in KINDS:
        print(f"\n== {name}: {KINDS[name]}", flush=True)
        _run(name, ["--output", str(options.output / f"{name}.json"), *(["--quick"] if options.quick else [])])
    return 0


def _run(name: str, argv: Sequence[str]) -> int:
    module = import_module(f".{name}", __package__)  # only when asked for: torch is slow to import
    status: int = module.main(argv)
    return status
