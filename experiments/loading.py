"""A trained learner out of a run, ready to be used from Python, without a trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jsonargparse import ArgumentParser

from snail import Learner
from snail.datasets import EpisodeData

from .runs import LINKED_KEY, checkpoint_config, find_checkpoint, read_checkpoint

__all__ = ["Run", "load_run"]


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
    learner, data = dict(config["model"]["learner"]), config["data"]
    learner["init_args"] = {**learner.get("init_args", {}), **content.get(LINKED_KEY, {})}  # what the data told it
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    made = instantiate(parser.parse_object({"learner": learner, "data": data}))
    weights = {key.removeprefix("learner."): value for key, value in content["state_dict"].items()}
    made.learner.load_state_dict(weights)
    return Run(cast(Learner, made.learner).eval(), made.data, checkpoint)
