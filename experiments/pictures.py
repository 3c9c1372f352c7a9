"""The pictures of a run: how it learned, and what it was asked and answered."""

from __future__ import annotations

import bisect
import csv
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.ticker import LogLocator

from snail import Episode, Result
from snail.datasets import Episodes, Images
from snail.evaluation import METRICS, as_parameters, metric_in
from snail.learner import Learner
from snail.results import learner_label

__all__ = [
    "Dot",
    "draw_ablation",
    "draw_answers",
    "draw_curves",
    "draw_episodes",
    "draw_growth",
    "draw_images",
    "draw_learning_curve",
    "draw_mistakes",
    "draw_precisions",
    "draw_results",
    "draw_returns",
    "draw_strategies",
    "results_hash",
]

BLUE, ORANGE, GREY = "#0b5fa5", "#d9661f", "#8a8a8a"


def draw_learning_curve(metrics: Path, picture: Path, *, chance: float | None, title: str) -> None:
    """Training loss over optimiser steps, and validation score where there was any, from a run's ``metrics.csv``.

    Args:
        metrics: The file to read.
        picture: The PNG to write.
        chance: What guessing scores, drawn as a line; ``None`` for no line.
        title: What the run is called.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))

    def column(key: str) -> tuple[list[float], list[float]]:
        points = [(float(row["step"]), float(row[key])) for row in rows if row.get(key)]
        return [x for x, _ in points], [y for _, y in points]

    heads = list(rows[0]) if rows else []
    metric = metric_in(heads, "val/") or METRICS["accuracy"]
    prefix, suffix = f"val/{metric.name}_", "shot"
    shots = sorted(int(key.removeprefix(prefix).removesuffix(suffix)) for key in heads if key.startswith(prefix))
    panels = 2 if shots else 1
    figure = Figure(figsize=(4.5 * panels, 3.6), layout="constrained")
    left, *validation = figure.subplots(1, panels, squeeze=False)[0]
    losses = column("train/loss")
    left.plot(*losses, color=GREY, linewidth=1, marker="." if len(losses[0]) < 2 else "")
    left.set(title="training loss", xlabel="optimiser step", ylim=(0, None))
    for axes in validation:
        for number, color in zip(shots, (BLUE, ORANGE, *[GREY] * len(shots)), strict=False):
            axes.plot(*column(f"{prefix}{number}{suffix}"), color=color, marker=".", label=f"{number}-shot")
        if chance is not None:
            axes.axhline(chance, color=GREY, linestyle=":", label="chance")
        axes.set(title=", ".join(filter(None, (f"validation {metric.title}", metric.unit.strip()))))
        axes.set(xlabel="optimiser step", **({"ylim": metric.ends} if metric.ends else {"yscale": "log"}))
        axes.legend(loc="lower right" if metric.higher_is_better else "upper right", frameon=False)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def draw_returns(metrics: Path, picture: Path, *, published: float | None, title: str) -> None:
    """Mean return and entropy over the iterations of a run of ``snail rl``, from its ``metrics.csv``.

    Args:
        metrics: The file to read.
        picture: The PNG to write.
        published: The published mean return, drawn as a line; ``None`` for no line.
        title: What the run is called.
    """
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/return")]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    steps = [float(row["step"]) for row in rows]
    for axes, key, what in zip(figure.subplots(1, 2), ("return", "entropy"), ("mean return", "entropy"), strict=True):
        axes.plot(steps, [float(row[f"train/{key}"]) for row in rows], color=BLUE, linewidth=1)
        axes.set(title=f"{what}, training trials", xlabel="iteration")
        axes.spines[["top", "right"]].set_visible(False)
    if published is not None:
        figure.axes[0].axhline(published, color=ORANGE, linestyle=":", label="published")
        figure.axes[0].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


class Dot(NamedTuple):
    """A line of ``draw_strategies``: a player's mean return, its 95 % interval, and the published figure."""

    name: str
    value: float
    interval: float | None
    published: float | None
    trained: bool = False


def draw_strategies(panels: Mapping[str, Sequence[Dot]], picture: Path, *, source: str) -> None:
    """Mean returns of strategies and of trained agents, a panel for each setting.

    Args:
        panels: The lines of each setting, by its title.
        picture: The PNG to write.
        source: What the picture carries to tell what it is of.

    Raises:
        ValueError: If there is nothing to draw.
    """
    if not panels:
        raise ValueError("there are no results, so there is nothing to draw")
    lines = max(map(len, panels.values()))
    figure = Figure(figsize=(4.6 * len(panels), 0.26 * lines + 1.3), layout="constrained")
    shown: dict[str, Any] = {}
    for axes, (title, dots) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for y, dot in enumerate(dots):
            look = {"color": BLUE, "label": "trained agent"} if dot.trained else {"color": "black", "label": "strategy"}
            axes.errorbar(dot.value, -y, xerr=dot.interval, fmt="o", markersize=4, linewidth=1, zorder=2, **look)
            if dot.published is not None:  # behind and larger, for they often agree
                axes.plot(
                    dot.published, -y, "D", color=ORANGE, markerfacecolor="white", markersize=7, label="published"
                )
        axes.set_yticks([-y for y in range(len(dots))], [dot.name for dot in dots])
        axes.set(title=title, xlabel="mean return")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.4, color="#dddddd")
        axes.tick_params(length=0, labelsize=8)
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(picture, dpi=120, metadata={"Source": source})


def draw_episodes(
    learner: Learner, episodes: Episodes, picture: Path, *, title: str, ink: bool = False, rows: int = 4
) -> None:
    """A few 1-query episodes: the support with its labels, each query with the answer and how sure it was.

    Args:
        learner: Answers.
        episodes: The first ``rows`` of them are drawn, their first three queries each.
        picture: The PNG to write.
        title: What the picture shows.
        ink: Whether the images are ink, 1 on 0, to be drawn dark on light.
        rows: Number of episodes.
    """
    rows, questions = min(rows, episodes.count), 3
    shown = [episodes[i] for i in range(rows)]
    support_items, queries = shown[0].support_x.shape[1], min(questions, shown[0].query_x.shape[1])
    columns = min(support_items, 10)
    device = next((p.device for p in learner.parameters()), torch.device("cpu"))
    figure = Figure(figsize=(0.95 * (columns + queries + 0.4), 1.3 * rows + 0.6), layout="constrained")
    widths = [1] * columns + [0.4] + [1] * queries
    grid = figure.subplots(
        rows, len(widths), squeeze=False, width_ratios=widths, subplot_kw={"xticks": (), "yticks": ()}
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, episode in zip(grid, shown, strict=True):
        with torch.no_grad():
            asked = episode.map_items(lambda items: as_parameters(items, learner)).to(device)
            answer = learner(asked.support_x, asked.support_y, asked.query_x)
        sure = answer[0].float().softmax(-1).cpu()
        order = episode.support_y[0].argsort(stable=True)[:columns]
        for axes, item in zip(row, order.tolist(), strict=False):
            _image(axes, episode.support_x[0, item], str(int(episode.support_y[0, item])), "black", ink=ink)
        for item in range(queries):
            said, truth = int(sure[item].argmax()), int(episode.query_y[0, item])
            text = f"{said}  {sure[item, said]:.0%}" if said == truth else f"{said}, is {truth}"
            color = BLUE if said == truth else ORANGE
            _image(row[columns + 1 + item], episode.query_x[0, item], text, color, ink=ink)
    grid[0][0].annotate("support", (0, 1.45), xycoords="axes fraction", color=GREY)
    grid[0][columns + 1].annotate("queries, answered", (0, 1.45), xycoords="axes fraction", color=GREY)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def draw_answers(
    queries: torch.Tensor,
    answers: Sequence[str],
    support: torch.Tensor,
    labels: Sequence[str],
    weights: torch.Tensor | None,
    picture: Path,
    *,
    title: str,
    ink: bool = False,
    beside: int = 4,
) -> None:
    """Unlabelled images with their answers, and beside each the labelled ones that it owes its answer to the most.

    Args:
        queries: ``(q, c, h, w)``.
        answers: What to write on each.
        support: ``(s, c, h, w)``.
        labels: The class of each.
        weights: How much each answer owes to each support image, ``(q, s)``; ``None`` where that is not known, and
            then the first ones are drawn.
        picture: The PNG to write.
        title: What the picture shows.
        ink: Whether the images are ink, 1 on 0, to be drawn dark on light.
        beside: Support images beside each.
    """
    rows, beside = len(queries), min(beside, len(support))
    figure = Figure(figsize=(1.5 * (beside + 1.4), 1.6 * rows + 0.6), layout="constrained")
    widths = [1, 0.4, *[1] * beside]
    grid = figure.subplots(
        rows, len(widths), squeeze=False, width_ratios=widths, subplot_kw={"xticks": (), "yticks": ()}
    )
    for axes in grid.flat:
        axes.axis("off")
    for i, row in enumerate(grid):
        _image(row[0], queries[i], answers[i], BLUE, ink=ink)
        most = range(beside) if weights is None else weights[i].argsort(descending=True)[:beside].tolist()
        for axes, item in zip(row[2:], most, strict=True):
            text = labels[item] if weights is None else f"{labels[item]}  {float(weights[i, item]):.0%}"
            _image(axes, support[item], text, "black", ink=ink)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def draw_images(rows: Sequence[tuple[str, torch.Tensor]], picture: Path, *, title: str, ink: bool = False) -> None:
    """A contact sheet: a row of images for each class.

    Args:
        rows: What each class is called, and some of its images, ``(m, c, h, w)``.
        picture: The PNG to write.
        title: What the picture shows.
        ink: Whether the images are ink, 1 on 0, to be drawn dark on light.
    """
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(0.9 * columns + 1.5, 0.9 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, subplot_kw={"xticks": (), "yticks": ()})
    for axes in grid.flat:
        axes.axis("off")
    for line, (name, images) in zip(grid, rows, strict=True):
        for axes, image in zip(line, images, strict=False):
            _image(axes, image, "", "black", ink=ink)
        line[0].annotate(name, (-0.1, 0.5), xycoords="axes fraction", ha="right", va="center", fontsize=8)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def draw_mistakes(
    result: Result, images: Images, picture: Path, *, title: str, ink: bool = False, rows: int = 8, columns: int = 8
) -> None:
    """The images that were mistaken most often, each before others of its class.

    Args:
        result: Knows its mistakes.
        images: What was asked.
        picture: The PNG to write.
        title: What was tested.
        ink: Whether the images are ink, 1 on 0, to be drawn dark on light.
        rows: Most images that are told of.
        columns: Images in a row.
    """
    asked, wrong = cast(torch.Tensor, result.mistakes).int().tolist()
    ends, sheet = list(itertools.accumulate(images.counts)), []
    for item in sorted((i for i in range(len(images)) if wrong[i]), key=lambda i: -wrong[i])[:rows]:
        which = bisect.bisect_right(ends, item)
        others = [i for i in range(ends[which] - images.counts[which], ends[which]) if i != item]
        name = f"{images.class_names[which]}\n{wrong[item]} of {asked[item]} wrong"
        sheet.append((name, images.take(torch.tensor([item, *others[: columns - 1]]))))
    setting = f"{result.facts['ways']}-way {result.facts['shots']}-shot"
    title += f", {setting}: half of the mistakes are on {result.half_of_mistakes:,} of {len(images):,} images"
    draw_images(sheet, picture, title=f"{title}\nfirst one that was mistaken, then others of its class", ink=ink)


def draw_curves(episodes: Episode, answers: torch.Tensor, labels: Sequence[str], picture: Path, *, title: str) -> None:
    """Regression of one number from another: each task's true curve, the points shown, and what was answered.

    Args:
        episodes: Tasks with items and labels of one number; the queries are drawn as lines, so there must be many.
        answers: ``(v, b, q, 1)``, a line each.
        labels: What each of the v lines is called.
        picture: The PNG to write.
        title: What the picture shows.
    """
    tasks = len(episodes)
    figure = Figure(figsize=(3.4 * tasks, 3.2), layout="constrained")
    order = episodes.query_x[..., 0].argsort(dim=1)
    query_x, query_y = (t[..., 0].gather(1, order).cpu() for t in (episodes.query_x, episodes.query_y))
    shades = [str(0.75 - 0.75 * i / max(1, len(labels) - 1)) for i in range(len(labels) - 1)]  # darker and darker
    for task, axes in enumerate(figure.subplots(1, tasks, squeeze=False)[0]):
        axes.plot(query_x[task], query_y[task], color=ORANGE, linewidth=3, alpha=0.5, label="true")
        for line, label, color in zip(answers, labels, [*shades, BLUE], strict=True):
            answer = line[task, :, 0].detach().float().cpu().gather(0, order[task].cpu())
            axes.plot(query_x[task], answer, color=color, linewidth=1.2, label=label)
        shown = (episodes.support_x[task, :, 0].cpu(), episodes.support_y[task, :, 0].cpu())
        axes.plot(*shown, "o", color=ORANGE, markersize=5, label="shown")
        axes.spines[["top", "right"]].set_visible(False)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _image(axes: Axes, image: torch.Tensor, text: str, color: str, *, ink: bool) -> None:
    shown = 1 - image if ink else image
    axes.imshow(shown.permute(1, 2, 0).squeeze(-1).cpu().numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(text, fontsize=9, color=color, pad=2)


def draw_growth(
    panels: Mapping[tuple[str, str], Mapping[str, Sequence[tuple[float, float, float | None]]]],
    picture: Path,
    *,
    title: str,
) -> None:
    """How time and memory grow with some sizes: with the first large and on logarithmic axes, with the others small.

    Args:
        panels: For each kind of work and the size that grows, its lines by name: points of size, seconds and MiB, which
            may be ``None``.
        picture: The PNG to write.
        title: What the picture shows.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1))[:, 0]
    large = top.subplots(1, 2)
    small = bottom.subplots(2, max(1, len(panels) - 1), sharex="col", squeeze=False)
    styles = [(BLUE, "-"), (GREY, "-"), (ORANGE, "-"), (GREY, ":"), (BLUE, ":")]
    for ((work, size), lines), pair in zip(panels.items(), [large, *small.T], strict=False):
        for (name, points), (color, dashes) in zip(lines.items(), styles, strict=False):
            for axes, cost in zip(pair, (1, 2), strict=True):
                known = [(point[0], point[cost]) for point in points if point[cost]]
                axes.plot([x for x, _ in known], [y for _, y in known], ".", linestyle=dashes, color=color, label=name)
        if pair is large:
            for axes, what in zip(pair, ("seconds", "MiB"), strict=True):
                axes.set(xscale="log", yscale="log", xlabel=size, title=f"{work}: {what}")
            top.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
            continue
        pair[0].set_title(work.replace(", ", "\n", 1), fontsize=9)
        pair[1].set_xlabel(size)
        for axes in pair:
            axes.set(xlim=(0, None), ylim=(0, None))
        if len(lines) > 1:
            pair[0].set_ylim(0, 1.7 * pair[0].get_ylim()[1])  # room for the legend
            pair[0].legend(loc="upper left", fontsize=8, frameon=False)
    small[0, 0].set_ylabel("seconds")
    small[1, 0].set_ylabel("MiB")
    for axes in (*large, *small.flat):
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda number, _: f"{number:,g}")
            axis.set_minor_formatter("")
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def draw_precisions(runs: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """The validation accuracy of one training in several precisions.

    Args:
        runs: Each with its ``precision``, and the ``steps`` at which it had which ``accuracy`` in percent.
        picture: The PNG to write.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run, color in zip(runs, (BLUE, ORANGE, GREY), strict=False):
        axes.plot(run["steps"], run["accuracy"], color=color, marker=".", label=run["precision"])
    axes.set(title="validation accuracy, %", xlabel="optimiser step")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=120)


def draw_ablation(variants: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """How often each variant of a training errs in the end, on new classes and on those it was trained on.

    Args:
        variants: Each with its ``name``, the accuracies ``by_shots`` and ``on_training_classes`` in percent.
        picture: The PNG to write.
    """
    figure = Figure(figsize=(9, 0.3 * len(variants) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = [-i for i in range(len(variants))]
    for shots, color in (("1", BLUE), ("5", ORANGE)):
        errors = [max(0.02, 100 - variant["by_shots"][shots][-1]) for variant in variants]
        axes.plot(errors, places, "o", color=color, label=f"new classes, {shots}-shot")
        axes.axvline(errors[0], color=color, linestyle=":", linewidth=1)
    seen = [math.nan if v["on_training_classes"] is None else v["on_training_classes"] for v in variants]
    errors = [max(100 - accuracy, 0.02) for accuracy in seen]  # what is unknown stays so
    axes.plot(errors, places, "D", color=GREY, markerfacecolor="white", label="training classes")
    _error_axis(axes)
    axes.set_yticks(places, [variant["name"] for variant in variants])
    figure.legend(loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    figure.savefig(picture, dpi=120)


def _error_axis(axes: Axes) -> None:
    axes.set(xscale="log", xlabel="error, %")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if high / low < 3000 else (1,)))
    axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    axes.xaxis.set_minor_formatter("")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4, color="#dddddd")
    axes.tick_params(length=0, labelsize=8)


def draw_results(records: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """How often each learner errs in each setting, beside the published figure, with 95 % intervals.

    Args:
        records: Those with an accuracy are drawn; what is published of one stands in it.
        picture: The PNG to write.

    Raises:
        ValueError: If there is none.
    """
    drawn = [record for record in records if "accuracy" in record]
    if not drawn:
        raise ValueError("there is no accuracy among the results, so there is nothing to draw")
    data = {(r["dataset"], r["split"]): None for r in drawn}
    lines = {(*where, learner_label(r)): r for where in data for r in drawn if (r["dataset"], r["split"]) == where}
    place = {line: -i for i, line in enumerate(lines)}
    short = [(dataset, split, record["learner"]) for (dataset, split, _), record in lines.items()]
    names = [  # the learner's alone, unless there are two of them
        f"{name if short.count((dataset, split, name)) == 1 else label}, {dataset} {split.removesuffix('/test')}"
        for (dataset, split, label), (_, _, name) in zip(lines, short, strict=True)
    ]
    settings = sorted({(r["ways"], r["shots"]) for r in drawn})
    figure = Figure(figsize=(2.4 * len(settings) + 3, 0.24 * len(lines) + 1.4), layout="constrained")
    grid = figure.subplots(1, len(settings), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (ways, shots) in zip(grid, settings, strict=True):
        here = [r for r in drawn if (r["ways"], r["shots"]) == (ways, shots)]
        for record in here:
            y = place[record["dataset"], record["split"], learner_label(record)]
            ours = 100 - record["accuracy"], record["ci95"]
            _score_with_interval(axes, *ours, y, color=BLUE, fmt="o", label="here")
            if record.get("published"):
                figure_, _, interval = record["published"].partition(" ± ")
                style = {"color": ORANGE, "fmt": "D", "markerfacecolor": "white", "label": "published"}
                _score_with_interval(axes, 100 - float(figure_), float(interval or 0), y, **style)
        axes.set_title(f"{ways}-way {shots}-shot")
        _error_axis(axes)
    grid[0].set_yticks(list(place.values()), names)
    shown: dict[str, Any] = {}
    for axes in grid:
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(picture, dpi=120, metadata={"Source": results_hash(records)})


def results_hash(records: Sequence[Mapping[str, Any]]) -> str:
    """What a picture of results carries in its ``Source``, to tell whether it is of these, in whatever order."""
    told = ("dataset", "split", "learner", "note", "ways", "shots", "accuracy", "ci95", "published")
    drawn = [json.dumps([record.get(key) for key in told]) for record in records if "accuracy" in record]
    return hashlib.sha256("\n".join(sorted(drawn)).encode()).hexdigest()


def _score_with_interval(axes: Axes, error: float, interval: float, y: float, **style: Any) -> None:
    error, least = max(error, 0.02), 0.01  # a logarithmic axis has no zero
    low = min(interval, error - least)
    axes.errorbar(error, y, xerr=[[low], [interval]], markersize=4, linewidth=1, **style)
