"""A benchmark's ways in fresh processes of their own, so that what one leaves behind serves no other."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Process", "fresh", "peak_memory"]


def peak_memory() -> int | None:
    """The most memory in bytes that this process had so far; ``None`` where the system does not tell."""
    # On Linux what `getrusage` tells begins with the peak of the process that started this one.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Process:
    """A way in a process of its own.

    Args:
        way: What it is called in errors.
        serve: Called there with a pipe and ``job``; a string that it sends is an error. Of a module, not a closure.
        job: What it does.
    """

    def __init__(self, way: str, serve: Callable[[Connection, Any], None], job: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.way = way
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_tell_errors, args=(serve, other, job), daemon=True)
        self.process.start()
        other.close()  # so that the end of the process is noticed here

    def receive(self) -> Any:
        """What the process sends next.

        Raises:
            RuntimeError: If it failed or ended.
        """
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            raise RuntimeError(f"the process of the way {self.way!r} ended with exit code {code}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"the way {self.way!r} failed with {answer}")
        return answer

    def ask(self, what: str) -> Any:
        """Send ``what``: what the process sends back."""
        with contextlib.suppress(ConnectionError):  # it ended; `receive` tells why
            self.pipe.send(what)
        return self.receive()

    def step(self) -> float:
        """Take a step: its seconds."""
        return float(self.ask("step"))

    def end(self) -> None:
        """End the process, also if it hangs."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _tell_errors(serve: Callable[[Connection, Any], None], pipe: Connection, job: Any) -> None:
    try:
        serve(pipe, job)
    except Exception as error:  # told to the process that waits
        pipe.send(f"{type(error).__name__}: {error}")


def _serve(pipe: Connection, job: Callable[[], dict[str, Any]]) -> None:
    pipe.send(job())


def fresh(way: str, job: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a job returns that is called in a fresh process; ``way`` is what it is called in errors."""
    process = Process(way, _serve, job)
    try:
        answer: dict[str, Any] = process.receive()
        process.process.join(timeout=60)  # killed at its end, it would leave its semaphores behind
        return answer
    finally:
        process.end()
