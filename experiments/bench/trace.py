"""What happens in a training step on the device: which share of its time is work, and where the CPU waits for it."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from .floor import synchronise

__all__ = ["SHARE", "STEP", "busy_time", "one_line", "profile", "read_trace", "synchronisations"]

STEP = "training step"  # what a step is called in a profile
WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}  # categories of a trace
SHARE = {
    "cuda": "time in which a kernel or a copy runs on the GPU, in the profile, over the time of a step without it",
    "cpu": "time in which an operator runs on the calling thread, over the time of the same steps in the profile",
}
"""What the share of a step's time is that is told, by device."""


def busy_time(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of some intervals ``(start, end)``."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def read_trace(events: Iterable[Mapping[str, Any]], device: str) -> dict[str, Any]:
    """What is in a trace of some steps, each marked as ``STEP``.

    Args:
        events: ``traceEvents`` of the Chrome trace that torch.profiler exports, times in microseconds.
        device: ``cuda``: kernels and copies on the GPU count; ``cpu``: operators on the thread that takes the steps.

    Returns:
        A step's ``busy_ms``, in which at least one of them runs; how many ``events`` these are; ``profiled_ms``, the
        wall time; on a GPU ``synchronisations``, how often the CPU waits for it.

    Raises:
        ValueError: If nothing ran.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    marks = [event for event in timed if event.get("cat") == "user_annotation" and event.get("name") == STEP]
    threads = {mark["tid"] for mark in marks}
    if device == "cuda":
        counted = [event for event in timed if event.get("cat") in ON_GPU]
    else:
        counted = [event for event in timed if event.get("cat") == "cpu_op" and event["tid"] in threads]
    if not marks or not counted:
        raise ValueError(f"the profile holds {len(marks)} steps and {len(counted)} events on {device}")
    steps, ran, waits = (
        [(event["ts"], event["ts"] + event["dur"]) for event in each]
        for each in (marks, counted, (event for event in timed if event.get("name") in WAITS))
    )
    within = [wait for wait in waits if any(start <= wait[0] < end for start, end in steps)]
    wall = max(end for _, end in steps) - min(start for start, _ in steps)
    n = len(steps)
    found = {"busy_ms": busy_time(ran) / 1000 / n, "events": len(ran) / n, "profiled_ms": wall / 1000 / n}
    return found | {"synchronisations": len(within) / n if device == "cuda" else None}


def profile(step: Callable[[], object], device: str, *, steps: int, ms: float) -> dict[str, Any]:
    """Profile some steps.

    Args:
        step: Takes a step.
        device: ``cuda`` or ``cpu``.
        steps: How many.
        ms: What a step takes without the profiler.

    Returns:
        What ``read_trace`` finds, and ``share``, of which ``SHARE`` tells what it is.

    Raises:
        ValueError: If the profiler saw nothing.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    synchronise(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with record_function(STEP):
                step()
        synchronise(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = read_trace(json.loads(path.read_bytes())["traceEvents"], device)
    return found | {"share": found["busy_ms"] / (ms if device == "cuda" else found["profiled_ms"])}


def synchronisations(step: Callable[[], object]) -> list[str]:
    """Where in a step torch says that the CPU waits for the GPU: a line for each time, with its place in the code."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it does not find all
            told.clear()
            step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    found = [warning for warning in told if "called a synchronizing" in str(warning.message)]
    return [f"{Path(each.filename).name}:{each.lineno}: {one_line(each.message)}" for each in found]


def one_line(text: object) -> str:
    """A text on one line, cut where it is long."""
    return " ".join(str(text).split())[:400]
