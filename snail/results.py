"""How results are written down, read again and shown: ``results.json``, a list of flat records."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .evaluation import METRICS, Metric, metric_in
from .records import markdown_rows, merge_records, read_records, text_table

__all__ = [
    "learner_label",
    "merge_results",
    "outcomes",
    "read_results",
    "record_text",
    "results_markdown",
    "results_table",
    "trainings_before",
]

R = TypeVar("R", bound=Mapping[str, Any])

IDENTITY = (
    "dataset",
    "split",
    "split_hash",
    "learner",
    "network",
    "inner_steps",
    "note",
    "checkpoint",
    "batch_norm",
    "precision",
    "ways",
    "shots",
    "queries",
    "episodes",
    "seed",
)
"""What makes two records the same measurement, so that the later replaces the earlier."""


def read_results(paths: Iterable[Path], *, must_exist: bool = False) -> list[dict[str, Any]]:
    """The records of some ``results.json`` files, in order.

    Raises:
        ValueError: If a file is not a list of records.
        FileNotFoundError: If ``must_exist`` and one is missing.
    """
    return read_records(paths, _fault, written_by="snail test", must_exist=must_exist)


def _fault(record: Mapping[str, Any]) -> str | None:
    if missing := [key for key in NEEDED if key not in record]:
        return f"without {missing[0]!r}"
    return f"without any of {', '.join(METRICS)}" if metric_in(record) is None else None


def merge_results(path: Path, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Write ``records`` into the list at ``path``, each in the place of an earlier one of the same identity.

    The file is written beside and renamed, so that a kill leaves the old or the new one.

    Returns:
        All records now in the file.

    Raises:
        ValueError: If the file is there but is not a list of records.
    """
    return merge_records(path, read_results([path]), records, IDENTITY)


def outcomes(records: Iterable[R]) -> list[R]:
    """Records without stages: without runs that another among them, of the same learner and network, goes on from."""
    records = list(records)
    stages = {
        (record["learner"], record.get("network"), before["run"])
        for record in records
        for before in _chain(record.get("training", {}))
    }
    return [r for r in records if (r["learner"], r.get("network"), r.get("run")) not in stages]


NEEDED = ("dataset", "split", "learner", "shots", "episodes", "ci95", "batch_norm")
"""What every record has, beside one of the metrics."""


def learner_label(record: Mapping[str, Any]) -> str:
    """The learner's name with the note on it, such as ``SNAIL, untrained``."""
    return ", ".join(str(record[key]) for key in ("learner", "note") if record.get(key))


def record_text(record: Mapping[str, Any]) -> str:
    """A record in a line, such as ``90.00 ± 1.00 %  SNAIL, 5-way 1-shot, glyphs seed0/test, 1,000 episodes``."""
    metric = metric_in(record) or METRICS["accuracy"]
    ways = "" if record.get("ways") is None else f"{record['ways']}-way "
    steps = "" if record.get("inner_steps") is None else f"{record['inner_steps']} inner steps, "
    return (
        f"{metric.text(record[metric.name], record['ci95'])}{metric.tag}  {learner_label(record)}, "
        f"{ways}{record['shots']}-shot, {steps}{record['dataset']} {record['split']}, {record['episodes']:,} episodes"
    )


Cell = Callable[[Mapping[str, Any]], str]


def _told(key: str) -> Cell:
    """What a record says under a key, or nothing."""
    return lambda record: "" if record.get(key) is None else str(record[key])


def _score(metric: Metric) -> Cell:
    return lambda record: metric.text(record[metric.name], record["ci95"]) if metric.name in record else ""


def _commit(record: Mapping[str, Any]) -> str:
    return str(record.get("versions", {}).get("commit", ""))


WHERE_FROM: dict[str, Cell] = {"run": _told("run"), "commit": _commit}
"""Which run a record is of, and which code scored it."""
COLUMNS: dict[str, Cell] = {
    "learner": learner_label,
    "data": lambda r: f"{r['dataset']} {r['split']}",
    "ways": _told("ways"),
    "shots": _told("shots"),
    "inner steps": _told("inner_steps"),
    **{f"{metric.title} (95 % interval)": _score(metric) for metric in METRICS.values()},
    "paper": _told("published"),
    "episodes": lambda r: f"{r['episodes']:,}",
    "batch norm": _told("batch_norm"),
    "seed": _told("seed"),
    **WHERE_FROM,
}


def results_table(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as a table for a terminal, a line each, in the order given; an empty column is left out."""
    cells = [[head, *map(cell, records)] for head, cell in COLUMNS.items()] if (records := list(records)) else []
    rows = _without_empty_columns(cells)
    if not rows:
        return "no results"
    return text_table(rows)


ABOUT_RUN: dict[str, Cell] = {
    "learner": learner_label,
    "network": _told("network"),
    "inner steps": _told("inner_steps"),
    "batch norm": _told("batch_norm"),
    "episodes": lambda r: f"{r['episodes']:,}",
    "trained": lambda r: _trained(r.get("training", {})),
}
"""What a line of the markdown tables tells beside its scores; records that are alike in it share a line.

The line ends with where each of them is from."""


def results_markdown(records: Iterable[Mapping[str, Any]]) -> str:
    """Records as markdown: a table for each data set, a line for each run, a column for each number of ways and shots.

    A score stands with its 95 % interval and, in brackets, the published figure if it is known. Tables and lines are
    in the order in which they first appear; a column that is empty throughout is left out.
    """
    tables: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        data = f"{record['dataset']} {record['split']}"
        tables.setdefault((data, (metric_in(record) or METRICS["accuracy"]).name), []).append(record)
    texts = []
    for (data, name), found in tables.items():
        metric = METRICS[name]
        published = " (published)" if any(record.get("published") for record in found) else ""
        unit = f" in {metric.unit.strip()}" if metric.unit else ""
        lines = [f"**{data}**: {metric.title}{unit} ± 95 % interval{published}", "", *_run_lines(found, metric)]
        texts.append("\n".join(lines))
    return "\n\n".join(texts) or "no results"


def _run_lines(records: Sequence[Mapping[str, Any]], metric: Metric) -> list[str]:
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        lines.setdefault(tuple(cell(record) for cell in ABOUT_RUN.values()), []).append(record)
    about = [[head, *column] for head, column in zip(ABOUT_RUN, zip(*lines, strict=True), strict=True)]
    scored = [{_shape(record): _score_and_published(record, metric) for record in line} for line in lines.values()]
    shapes = sorted({_shape(record) for record in records})
    scores = [[_shape_text(*shape), *(scores.get(shape, "") for scores in scored)] for shape in shapes]
    sources = [
        [head, *(", ".join(dict.fromkeys(filter(None, map(cell, line)))) for line in lines.values())]
        for head, cell in WHERE_FROM.items()
    ]
    front = 1 + list(ABOUT_RUN).index("inner steps")
    return markdown_rows(_without_empty_columns([*about[:front], *scores, *about[front:], *sources]))


def _score_and_published(record: Mapping[str, Any], metric: Metric) -> str:
    score = metric.text(record[metric.name], record["ci95"]).removesuffix(metric.unit)
    return score + (f" ({record['published']})" if record.get("published") else "")


def _shape(record: Mapping[str, Any]) -> tuple[int, int]:
    return record.get("ways") or 0, record["shots"]


def _shape_text(ways: int, shots: int) -> str:
    return f"{ways}-way {shots}-shot" if ways else f"{shots}-shot"


def _without_empty_columns(columns: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Columns, the head of each first, as rows."""
    return list(zip(*(column for column in columns if any(column[1:])), strict=True))


TRAINED = {"steps", "seconds", "hardware"}
"""What is known of a training if anything is."""


def _trained(training: Mapping[str, Any]) -> str:
    """How long, on what and where; then the same of all that came before, and of all teachers, each told together."""
    if not training.keys() >= TRAINED:
        return ""
    told, known = _trainings([training]), set[str]()
    for how, runs in (("begun with", _chain(training)), ("taught by", trainings_before(training))):
        new = {run.get("checkpoint", run["run"]): run for run in runs}
        new = {key: run for key, run in new.items() if key not in known}
        known |= new.keys()
        if new:
            told += f", {how} {', after '.join(run['run'] for run in new.values())} of {_trainings([*new.values()])}"
    return told


def _chain(training: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    before = training.get("started_from")
    while before:
        yield before
        before = before.get("started_from")


def trainings_before(training: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All that is known of the runs which a training began with or was taught by, and of theirs."""
    for before in filter(None, map(training.get, ("started_from", "teacher"))):
        yield before
        yield from trainings_before(before)


def _trainings(trainings: Sequence[Mapping[str, Any]]) -> str:
    if not all(training.keys() >= TRAINED for training in trainings):
        return "unknown training"
    first = trainings[0]
    published = f" of the paper's {first['published_steps']:,}" if "published_steps" in first else ""
    notes = ", ".join(training[key] for key in ("on", "note") for training in trainings if training.get(key))
    how = "".join(f", {note}" for note in dict.fromkeys(notes.split(", ")) if note)
    hardware = " and ".join(dict.fromkeys(training["hardware"] for training in trainings))
    steps, seconds = (sum(training[key] for training in trainings) for key in ("steps", "seconds"))
    return f"{steps:,}{published} steps{how}, {seconds / 60:.0f} min on {hardware}"
