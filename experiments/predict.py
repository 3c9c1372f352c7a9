"""``snail predict``: sort unlabelled pictures into classes of which a few pictures each are given."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from snail import Learner
from snail.datasets import ImageData
from snail.datasets.decoding import is_picture, open_picture
from snail.datasets.image_folder import class_folders
from snail.files import replacing

from .loading import load_run
from .options import OptionParser, check_output

__all__ = ["Prediction", "Predictions", "main", "predict"]

TOGETHER = 200  # queries answered in one pass
DRAWN = 8  # queries in the picture


@dataclass(frozen=True)
class Prediction:
    """What is answered to a picture.

    Attributes:
        file: The picture.
        label: The class: the name of its folder.
        probability: How sure, in [0, 1].
        runner_up: The class that comes next; empty if there is but one.
        runner_up_probability: How likely that one is.
    """

    file: Path
    label: str
    probability: float
    runner_up: str
    runner_up_probability: float


@dataclass(frozen=True)
class Predictions:
    """Answers to pictures, with what is needed to look at them.

    Args:
        each: One answer a picture.
        classes: The names of the classes.
        queries: The pictures as the network saw them, ``(q, c, h, w)``.
        support: The labelled ones, ``(s, c, h, w)``.
        support_y: Their classes, ``(s,)``.
        attention: How much each answer owes to each labelled picture, ``(q, s)``; ``None`` if the learner cannot tell.
        ink: Whether the pictures are ink, 1 on 0.
    """

    each: tuple[Prediction, ...]
    classes: tuple[str, ...]
    queries: Tensor
    support: Tensor
    support_y: Tensor
    attention: Tensor | None
    ink: bool

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.each)

    def __iter__(self) -> Iterator[Prediction]:
        """One answer a picture, in the order of the files' names."""
        return iter(self.each)

    def draw(self, picture: Path) -> None:
        """Draw the first answers, each beside the labelled pictures that it owes its answer to the most."""
        from .pictures import draw_answers

        some = self.each[:DRAWN]
        draw_answers(
            self.queries[:DRAWN],
            [f"{answer.label}  {answer.probability:.0%}" for answer in some],
            self.support,
            [self.classes[label] for label in self.support_y.tolist()],
            None if self.attention is None else self.attention[:DRAWN],
            picture,
            title="answered, and what was looked at most"
            if self.attention is not None
            else "answered, and the classes",
            ink=self.ink,
        )

    def write_csv(self, path: Path) -> None:
        """Write a table, a line a picture."""
        with replacing(path, newline="") as file:
            table = csv.writer(file)
            table.writerow([field.name for field in fields(Prediction)])
            table.writerows(astuple(answer) for answer in self.each)


def predict(run: Path | str, support: Path | str, query: Path | str, *, trust: Iterable[str] = ()) -> Predictions:
    """Sort the pictures of a folder into classes that are shown by a few pictures each. Nothing is trained.

    Args:
        run: A run's folder, or a checkpoint.
        support: A folder that holds one for each class, with a few pictures in it; the folders' names are the classes.
        query: A folder of pictures.
        trust: Packages besides snail, torch and torchvision whose classes the run's config may name.

    Raises:
        FileNotFoundError: If there is no checkpoint, no class or no picture.
        ValueError: If a picture cannot be read, or the checkpoint does not take as many classes or pictures of one.
    """
    loaded = load_run(run, trust=trust)
    learner, data = loaded.learner, loaded.data
    if not isinstance(data, ImageData):
        raise ValueError(f"{loaded.checkpoint} was trained on {data.dataset}, which are no images")
    folders = class_folders(Path(support))
    check_support(learner, {name: len(files) for name, files in folders.items()}, Path(support))
    files = sorted(path for path in Path(query).iterdir() if is_picture(path)) if Path(query).is_dir() else []
    if not files:
        raise FileNotFoundError(f"{query} holds no picture; a folder of pictures is needed")
    labelled = [(path, label) for label, name in enumerate(folders) for path in folders[name]]
    # A reader of sequences was trained on classes in a random order; this one is always the same.
    order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0)).tolist()
    support_x = _read([labelled[i][0] for i in order], data)
    support_y = torch.tensor([labelled[i][1] for i in order])
    query_x = _read(files, data)
    logits, attention = _answer(learner, support_x, support_y, query_x)
    names = tuple(folders)
    each = tuple(_prediction(path, row, names) for path, row in zip(files, logits.softmax(-1), strict=True))
    return Predictions(each, names, query_x, support_x, support_y, attention, data.ink)


def check_support(learner: Learner, counts: dict[str, int], support: Path) -> None:
    """Refuse what a learner cannot take, and say what it can.

    Raises:
        ValueError: If there are too many or too few classes, or too many pictures of one.
    """
    least = 2 if learner.ways is None else learner.ways
    ways_fit = len(counts) == learner.ways if learner.ways is not None else len(counts) >= least
    shots_fit = learner.max_shots is None or max(counts.values()) <= learner.max_shots
    if not ways_fit or not shots_fit:
        ways = f"{learner.ways} classes" if learner.ways is not None else "2 classes or more"
        shots = f"1 to {learner.max_shots}" if learner.max_shots is not None else "any number of"
        most = max(counts, key=lambda name: counts[name])
        raise ValueError(
            f"{support} holds {len(counts)} classes with up to {counts[most]} pictures ({most}), but this "
            f"{type(learner).__name__} takes {ways} with {shots} pictures each; give it such, or another checkpoint"
        )


def _read(files: Sequence[Path], data: ImageData) -> Tensor:
    pixels = np.stack([data.to_pixels(open_picture(path)) for path in files])
    return torch.from_numpy(pixels).float().div_(255)


def _answer(learner: Learner, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> tuple[Tensor, Tensor | None]:
    support = support_x.unsqueeze(0), support_y.unsqueeze(0)
    # Queries of a transductive learner help each other, so they must stay together.
    size = len(query_x) if learner.transductive else TOGETHER
    logits, attention = [], []
    with torch.no_grad():
        for some in torch.split(query_x, size):
            logits.append(learner(*support, some.unsqueeze(0))[0].float())
            attention.append(learner.attention(*support, some.unsqueeze(0)))
    known = [weights[0].float() for weights in attention if weights is not None]
    return torch.cat(logits), torch.cat(known) if known else None


def _prediction(file: Path, probabilities: Tensor, names: Sequence[str]) -> Prediction:
    best, *others = probabilities.argsort(descending=True).tolist()
    next_best = others[0] if others else None
    return Prediction(
        file,
        names[best],
        float(probabilities[best]),
        "" if next_best is None else names[next_best],
        0.0 if next_best is None else float(probabilities[next_best]),
    )


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = OptionParser(
        prog="snail predict",
        allow_abbrev=False,
        description="""Sort the pictures of a folder into classes of which a few pictures each are given, with a trained
run; nothing is trained. Pictures may have any size and format.""",
    )
    add, default = parser.add_argument, " (default: %(default)s)"
    add("--ckpt_path", required=True, metavar="RUN", help="a run's folder, such as runs/omniglot_5way, or a checkpoint")
    add("--support", type=Path, required=True, metavar="DIR", help="holds a folder for each class, with a few pictures")
    add("--query", type=Path, required=True, metavar="DIR", help="a folder of pictures without labels")
    add("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="table to write" + default)
    add("--picture", type=Path, metavar="FILE", help="picture to write (default: the table's name with .png)")
    add("--trust", action="append", default=[], metavar="PACKAGE", help="a package that the run's config may name")
    options = parser.parse_args(argv)
    check_output(options.output)
    return options


def main(argv: Sequence[str]) -> int:
    """Run ``snail predict``.

    Args:
        argv: The command line behind ``predict``.

    Returns:
        The exit status, 0.
    """
    options = _options(argv)
    found = predict(options.ckpt_path, options.support, options.query, trust=options.trust)
    width = max(len(answer.file.name) for answer in found)
    for answer in found:
        print(
            f"{answer.file.name:<{width}}  {answer.label} {answer.probability:.0%}, "
            f"then {answer.runner_up} {answer.runner_up_probability:.0%}"
        )
    found.write_csv(options.output)
    picture = options.picture or options.output.with_suffix(".png")
    found.draw(picture)
    print(f"table: {options.output}\npicture of the first {min(len(found), DRAWN)}: {picture}")
    return 0
