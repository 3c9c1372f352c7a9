"""Training and scoring on two processes (gloo, on the CPU) are those of one: the same weights, the same episodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 40
OPTIONS = [
    "--data.ways=2", "--data.train_shots=[1,2]", "--data.eval_shots=[1]", f"--data.steps_per_epoch={STEPS}",
    "--data.val_episodes=0", "--data.test_episodes=250", "--trainer.max_epochs=1", "--trainer.log_every_n_steps=4",
    "--trainer.precision=64-true", "--trainer.accelerator=cpu", "--model.schedule=constant", "--model.warmup=0",
    "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1", "--checkpoint_minutes=0.002",
    # No batch norm: each process takes its own statistics.
    "--model.learner.embedding=torch.nn.Flatten", "--model.learner.embedding_dim=784",
    "--model.learner.prototype_loss=0",
]  # fmt: skip
TWO = ["--trainer.devices=2"]


def start(folder: Path, *argv: str, by: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, *by, "-m", "snail.experiments", *argv]
    environment = {key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(folder: Path, *argv: str, by: tuple[str, ...] = ()) -> str:
    process = start(folder, *argv, by=by)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def weights(folder: Path, name: str) -> dict[str, Any]:
    checkpoint = torch.load(folder / "runs" / name / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    state: dict[str, Any] = checkpoint["state_dict"]
    return state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder: Path) -> str:
    """What the command prints that trains ``runs/two`` on two processes, four episodes on each."""
    return run(folder, "fit", *OPTIONS, *TWO, "--data.batch_size=4", "--name=two")


def test_two_processes_take_the_steps_of_one_over_the_joined_batch(folder: Path, two: str) -> None:
    assert ", 2 processes; run folder runs/two\n" in two
    assert two.count("run folder") == 1 and two.count("SNAIL, untrained") == 1  # one process speaks
    run(folder, "fit", *OPTIONS, "--data.batch_size=8", "--name=one")
    one, both = weights(folder, "one"), weights(folder, "two")
    for name in one:
        torch.testing.assert_close(both[name], one[name], rtol=0, atol=1e-12, msg=lambda text, name=name: name + text)
    assert json.loads((folder / "runs" / "two" / "results.json").read_text())[-1]["training"]["processes"] == 2


def test_two_processes_score_the_episodes_of_one(folder: Path, two: str) -> None:
    """250 episodes are three batches: one process has a batch more, the other repeats one that does not count."""
    records = []
    for devices in ("1", "2"):
        (folder / "runs" / "two" / "results.json").unlink(missing_ok=True)
        run(folder, "test", "--ckpt_path=runs/two", f"--trainer.devices={devices}")
        (record,) = json.loads((folder / "runs" / "two" / "results.json").read_text())
        assert record.pop("processes") == int(devices)
        record.pop("seconds")
        records.append(record)
    assert records[0] == records[1]
    assert records[0]["episodes"] == 250


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until_saved(process: subprocess.Popen[str], run_folder: Path) -> None:
    """Wait until steps were taken and kept, some of the epoch's."""
    while not (run_folder / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def gone(pids: list[int], seconds: float = 60) -> Iterator[bool]:
    for pid in pids:
        end = time.monotonic() + seconds
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            if state == "Z":
                break
            time.sleep(0.1)
        yield time.monotonic() < end


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found through /proc")
def test_a_killed_process_ends_the_other_and_the_run_goes_on(folder: Path, two: str) -> None:
    argv = [*OPTIONS, *TWO, "--data.batch_size=4", "--name=killed"]
    process = start(folder, "fit", *argv)
    until_saved(process, folder / "runs" / "killed")
    (child,) = children(process.pid)
    os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "another process of this training ended" in err or f"Child process with PID {child} terminated" in err
    reached = torch.load(folder / "runs" / "killed" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < STEPS
    run(folder, "fit", *argv, "--ckpt_path=last")
    for name, tensor in weights(folder, "killed").items():
        assert torch.equal(tensor, weights(folder, "two")[name]), name


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are found through /proc")
def test_where_the_first_process_is_killed_the_other_ends_and_says_why(folder: Path) -> None:
    process = start(folder, "fit", *OPTIONS, *TWO, "--data.batch_size=4", "--name=headless")
    until_saved(process, folder / "runs" / "headless")
    (child,) = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)  # the child holds the other end of the pipe until it ends
    assert all(gone([child]))
    assert "another process of this training ended" in err


def test_torchrun_starts_the_processes_too(folder: Path) -> None:
    by = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    out = run(folder, "fit", *OPTIONS, *TWO, "--data.batch_size=4", "--name=elastic", by=by)
    assert out.count("run folder runs/elastic\n") == 1
    assert not (folder / "runs" / "elastic-2").exists()
    assert (folder / "runs" / "elastic" / "results.json").exists()
