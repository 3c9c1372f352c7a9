"""A trained learner out of a run, ready to be used from Python; and a run's weights, to be kept or handed on."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jsonargparse import ArgumentParser
from torch import nn

from snail import Conv4, EmbeddingLearner, Learner
from snail.datasets import EpisodeData
from snail.files import file_hash
from snail.pretrained import WEIGHTS, Weights
from snail.results import trainings_before

from .options import OptionParser, check_output
from .runs import (
    LINKED_KEY,
    about_weights,
    checkpoint_config,
    config_in,
    find_checkpoint,
    read_checkpoint,
    training_facts,
)

__all__ = ["Run", "export", "load_run", "load_teacher", "main", "start_from"]


@dataclass(frozen=True)
class Run:
    """What a run left.

    Args:
        learner: In evaluation mode, on the CPU.
        data: What it was trained on, as it was set up; nothing of it is read until it is asked for.
        checkpoint: Where the weights came from.
    """

    learner: Learner
    data: EpisodeData
    checkpoint: Path


def load_run(path: Path | str, *, trust: Iterable[str] = ()) -> Run:
    """Load what a run's best checkpoint holds, else its last one.

    Args:
        path: A run's folder, or a checkpoint.
        trust: Packages besides snail, torch and torchvision whose classes its config may name.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read, names what is not trusted, or does not fit its own config.
    """
    checkpoint = find_checkpoint(Path(path), prefer="best.ckpt")
    content = read_checkpoint(checkpoint)
    config = checkpoint_config(content, checkpoint, trust)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Learner, "learner")
    parser.add_subclass_arguments(EpisodeData, "data")
    learner = _described(config, content)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    made = instantiate(parser.parse_object({"learner": learner, "data": config["data"]}))
    weights = {key.removeprefix("learner."): value for key, value in content["state_dict"].items()}
    made.learner.load_state_dict(weights)
    return Run(cast(Learner, made.learner).eval(), made.data, checkpoint)


def start_from(learner: Learner, data: EpisodeData, path: Path | str, *, trust: Iterable[str] = ()) -> dict[str, Any]:
    """Give a learner the parts of a run's that are built alike, such as the embedding; the others stay as they are.

    So an embedding that one learner was trained with serves another, or that of a model of 5 ways one of 20. Half a
    part would be worse than none; but a part that knows how (``Conv4.grow_from``) grows from a narrower one.

    Args:
        learner: Of any class.
        data: What it will be trained, validated and tested on.
        path: A run's folder, or a checkpoint.
        trust: See ``load_run``.

    Returns:
        The run's name, the checkpoint's hash, the parts of the learner that have its weights or grew from them,
        what its training took.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read, shares no part, or was trained on what the learner will be scored on.
    """
    run = load_run(path, trust=trust)
    facts = _facts(run, data)
    given, own = run.learner.state_dict(), learner.state_dict()
    shapes = [{name: getattr(value, "shape", None) for name, value in state.items()} for state in (given, own)]
    parts = [part for part in dict.fromkeys(name.split(".")[0] for name in own) if _alike(part, *shapes)]
    learner.load_state_dict({name: given[name] for name in own if name.split(".")[0] in parts}, strict=False)
    parts += [name for name, part in learner.named_children() if name not in parts and _grow(part, name, given)]
    if not parts:
        raise ValueError(f"no part of {type(learner).__name__} is built as one of {run.checkpoint}")
    return facts | {"parts": [part for part in parts if part != "_extra_state"]}  # counters, which are no part


def load_teacher(data: EpisodeData, path: Path | str, *, trust: Iterable[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """The embedding of a run, for another to learn from (``FewShot.learn_from``).

    Args:
        data: What that other will be trained, validated and tested on.
        path: A run's folder, or a checkpoint.
        trust: See ``load_run``.

    Returns:
        The embedding; the run's name, the checkpoint's hash, what its training took.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read, has no embedding, or was trained on what the other will be scored on.
    """
    run = load_run(path, trust=trust)
    if not isinstance(run.learner, EmbeddingLearner):
        raise ValueError(f"{run.checkpoint} holds {type(run.learner).__name__}, which has no embedding to learn from")
    return run.learner.embedding, _facts(run, data)


def _facts(run: Run, data: EpisodeData) -> dict[str, Any]:
    """Which run it is and what its training took; one that has seen what ``data`` is scored on is refused."""
    facts: dict[str, Any] = {"run": run.checkpoint.resolve().parent.name, "checkpoint": file_hash(run.checkpoint)}
    facts |= training_facts(read_checkpoint(run.checkpoint))
    facts |= {"dataset": run.data.dataset, "split": run.data.split, **run.data.training_notes}
    for seen in (facts, *trainings_before(facts)):
        _check_unseen(seen, data)
    return facts


def _alike(part: str, *shapes: dict[str, Any]) -> bool:
    first, second = ({name: s for name, s in some.items() if name.split(".")[0] == part} for some in shapes)
    return first == second


def _grow(part: nn.Module, name: str, given: dict[str, Any]) -> bool:
    start = f"{name}."
    narrower = {key.removeprefix(start): value for key, value in given.items() if key.startswith(start)}
    return isinstance(part, Conv4) and part.grow_from(narrower)


def _check_unseen(before: Mapping[str, Any], data: EpisodeData) -> None:
    """Refuse what was trained on classes that ``data`` validates or tests on."""
    if before.get("dataset") != data.dataset:
        return
    if before["split"] != data.split:
        raise ValueError(
            f"{before['run']} was trained on the split {before['split']} of {data.dataset}, some of whose classes are "
            f"validated or tested on in {data.split}; use a run on the same split"
        )
    if before.get("on") and not data.trained_on and data.eval_episodes["val"]:
        raise ValueError(
            f"{before['run']} was trained on {before['on']}, so that validation would tell nothing; give "
            f"--data.train_on_validation true, or --data.val_episodes 0"
        )


def _described(config: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of a run's learner, with what the data told it."""
    learner = dict(config["model"]["learner"])
    return learner | {"init_args": {**learner.get("init_args", {}), **checkpoint.get(LINKED_KEY, {})}}


def export(path: Path | str, output: Path, *, half: bool = False) -> None:
    """Write a run's weights, with its config and what training took, as safetensors.

    Such a file is scored and predicts like a checkpoint, ``Learner.from_pretrained`` reads it, and a run can begin with
    it (``start_from``) but not go on from it.

    Args:
        path: A run's folder, or a checkpoint.
        output: The file to write.
        half: Whether weights are rounded to half precision, half the size; accuracies are then those of the rounded.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it cannot be read or holds no config.
    """
    checkpoint = find_checkpoint(Path(path), prefer="best.ckpt")
    content = read_checkpoint(checkpoint)
    weights = {key.removeprefix("learner."): value for key, value in content["state_dict"].items()}
    learner = _described(config_in(content, checkpoint), content)
    Weights(weights, learner, about_weights(content)).write(output, half=half)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="snail export",
        allow_abbrev=False,
        description="""Write weights, config and what training took of a run as safetensors, to be kept or handed on,
scored, predicted with, to begin another run with (--start_from), and for from_pretrained in Python.""",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="RUN", help="a run's folder, or a checkpoint")
    add("--output", type=Path, required=True, metavar="FILE", help=f"file to write, such as somewhere/{WEIGHTS}")
    add("--half", action="store_true", help="round weights to half precision: half the size")
    options = parser.parse_args(argv)
    check_output(options.output)
    return options


def main(argv: Sequence[str]) -> int:
    """Run ``snail export``.

    Args:
        argv: The command line behind ``export``.

    Returns:
        The exit status, 0.
    """
    options = _options(argv)
    export(options.ckpt_path, options.output, half=options.half)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
    return 0
