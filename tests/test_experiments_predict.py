"""A checkpoint sorts people's own pictures, says what it can take, and can be used from Python."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from snail import (
    MAML,
    SNAIL,
    AttentionBlock,
    Conv4,
    Learner,
    MatchingNetwork,
    NearestNeighbour,
    ProtoNet,
    serialize,
)
from snail.experiments.cli import main
from snail.experiments.loading import load_run
from snail.experiments.predict import predict

KeepRun = Callable[..., Path]
SHADES = {"black": 0, "dark": 60, "grey": 120, "light": 180, "white": 255}
EMBEDDING = {"class_path": "snail.Conv4", "init_args": {"filters": 4, "in_channels": 3, "image_size": 16}}
LEARNERS: dict[str, dict[str, Any]] = {
    "snail": {"class_path": "snail.SNAIL", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64}},
    "protonet": {"class_path": "snail.ProtoNet", "init_args": {"embedding": {"class_path": "torch.nn.Flatten"}}},
    "maml": {"class_path": "snail.MAML", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64}},
}


DATA = {"class_path": "snail.datasets.ImageFolder", "init_args": {"root": "unused", "image_size": 16}}


@pytest.fixture
def by_pixels(tmp_path: Path, keep_run: KeepRun) -> Path:
    return keep_run(tmp_path / "by_pixels", ProtoNet(torch.nn.Flatten()), LEARNERS["protonet"], DATA)


@pytest.fixture
def snail_run(tmp_path: Path, keep_run: KeepRun) -> Path:
    torch.manual_seed(0)
    learner = SNAIL(Conv4(3, filters=4, image_size=16), 64, ways=3, max_shots=2)
    return keep_run(tmp_path / "snail_run", learner, LEARNERS["snail"], DATA, ways=3, max_shots=2)


def pictures(folder: Path, shades: dict[str, int] = SHADES, shots: int = 2) -> tuple[Path, Path]:
    """A folder of labelled pictures and one of unlabelled ones, called by their truth."""
    for name, shade in shades.items():
        (folder / "support" / name).mkdir(parents=True)
        (folder / "query").mkdir(exist_ok=True)
        for i in range(shots):
            Image.new("L", (20 + i, 30), shade).save(folder / "support" / name / f"{i}.png")
        Image.new("RGB", (40, 40), (max(shade - 9, 0),) * 3).save(folder / "query" / f"{name}.jpg")
    return folder / "support", folder / "query"


def test_pictures_are_sorted_into_the_classes_that_are_shown(by_pixels: Path, tmp_path: Path) -> None:
    found = predict(by_pixels, *pictures(tmp_path / "mine"))
    assert [answer.file.stem for answer in found] == sorted(SHADES)
    for answer in found:
        assert answer.label == answer.file.stem
        assert 1 >= answer.probability >= answer.runner_up_probability >= 0
        assert answer.runner_up != answer.label
    assert found.attention is not None
    torch.testing.assert_close(found.attention.sum(1), torch.ones(5))
    for row, answer in zip(found.attention, found, strict=True):  # what it owes its answer to is of its class
        assert found.classes[int(found.support_y[row.argmax()])] == answer.label


def test_the_answers_are_those_of_the_learner(snail_run: Path, tmp_path: Path) -> None:
    few = {name: SHADES[name] for name in ("black", "grey", "white")}
    found = predict(snail_run, *pictures(tmp_path / "mine", few))
    learner = load_run(snail_run).learner
    with torch.no_grad():
        logits = learner(found.support[None], found.support_y[None], found.queries[None])[0]
    best = logits.softmax(-1).max(-1)
    assert [answer.label for answer in found] == [found.classes[i] for i in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor([answer.probability for answer in found]), best.values)
    again = predict(snail_run, tmp_path / "mine" / "support", tmp_path / "mine" / "query")
    assert tuple(again) == tuple(found)


def test_the_command_writes_a_table_and_a_picture(
    by_pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    support, query = pictures(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    command = ["predict", "--ckpt_path", str(by_pixels), "--support", str(support), "--query", str(query)]
    assert main(command) == 0
    printed = capfd.readouterr().out
    assert "white.jpg  white 100%, then light 0%" in printed and "table: predictions.csv" in printed
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == sorted(SHADES)
    assert rows[0].keys() == {"file", "label", "probability", "runner_up", "runner_up_probability"}
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 300 and picture.height > 300


@pytest.mark.parametrize("shots", [1, 5])
def test_a_learner_of_any_number_of_classes_takes_any(shots: int, by_pixels: Path, tmp_path: Path) -> None:
    few = {name: SHADES[name] for name in ("black", "white")}
    assert [answer.label for answer in predict(by_pixels, *pictures(tmp_path / "mine", few, shots))] == [
        "black",
        "white",
    ]


@pytest.mark.parametrize(
    ("names", "shots", "holds"),
    [
        (("black", "white"), 1, "2 classes with up to 1 pictures"),
        (("black", "dark", "grey", "white"), 1, "4 classes"),
        (("black", "grey", "white"), 3, "3 classes with up to 3 pictures"),
    ],
)
def test_what_a_checkpoint_does_not_take_is_refused_and_what_it_takes_is_said(
    names: tuple[str, ...], shots: int, holds: str, snail_run: Path, tmp_path: Path
) -> None:
    mine = pictures(tmp_path / "mine", {name: SHADES[name] for name in names}, shots)
    with pytest.raises(ValueError, match=rf"{holds}.*this SNAIL takes 3 classes with 1 to 2 pictures each"):
        predict(snail_run, *mine)


def test_one_class_is_no_choice(by_pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes 2 classes or more with any number of pictures each"):
        predict(by_pixels, *pictures(tmp_path / "mine", {"black": 0}))


def test_classes_may_be_shown_by_unequally_many_pictures(snail_run: Path, tmp_path: Path) -> None:
    few = {name: SHADES[name] for name in ("black", "grey", "white")}
    support, query = pictures(tmp_path / "mine", few)
    (support / "grey" / "1.png").unlink()
    assert len(predict(snail_run, support, query)) == 3


def test_a_gradient_learner_adapts_and_cannot_tell_what_it_owes_its_answer_to(
    tmp_path: Path, keep_run: KeepRun
) -> None:
    torch.manual_seed(0)
    learner = MAML(Conv4(3, filters=4, image_size=16), 64, ways=2)
    run = keep_run(tmp_path / "maml", learner, LEARNERS["maml"], DATA, ways=2)
    few = {name: SHADES[name] for name in ("black", "white")}
    found = predict(run, *pictures(tmp_path / "mine", few))
    assert found.attention is None
    found.draw(tmp_path / "answers.png")
    assert (tmp_path / "answers.png").stat().st_size > 1000


def test_queries_of_a_transductive_learner_stay_together(tmp_path: Path, keep_run: KeepRun) -> None:
    torch.manual_seed(0)
    learner = MAML(Conv4(3, filters=4, image_size=16), 64, ways=2, batch_norm="transductive").eval()
    init_args = {**LEARNERS["maml"]["init_args"], "batch_norm": "transductive"}
    run = keep_run(tmp_path / "maml", learner, {"class_path": "snail.MAML", "init_args": init_args}, DATA, ways=2)
    few = {name: SHADES[name] for name in ("black", "white")}
    found = predict(run, *pictures(tmp_path / "mine", few))
    together = learner(found.support[None], found.support_y[None], found.queries[None])[0].softmax(-1).amax(-1)
    torch.testing.assert_close(torch.tensor([answer.probability for answer in found]), together)


def test_folders_without_pictures_are_told(by_pixels: Path, tmp_path: Path) -> None:
    support, query = pictures(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no picture"):
        predict(by_pixels, support, tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"query holds no folder with pictures"):
        predict(by_pixels, query, query)
    (query / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as a picture"):
        predict(by_pixels, support, query)


# -- what an answer owes to each support item ------------------------------------------------------------------------


def test_attention_of_snail_is_that_of_its_blocks_and_leaves_itself_out() -> None:
    torch.manual_seed(0)
    learner = SNAIL(torch.nn.Flatten(), 4, ways=2, max_shots=2).double().eval()
    support_x, support_y = torch.rand(1, 4, 4, dtype=torch.double), torch.tensor([[0, 1, 1, 0]])
    query_x = torch.rand(1, 3, 4, dtype=torch.double)
    weights = learner.attention(support_x, support_y, query_x)
    assert weights.shape == (1, 3, 4)
    assert weights.min() > 0 and weights.sum(-1).max() < 1  # the rest is what a query reads of itself
    alone = learner.attention(support_x, support_y, query_x[:, 1:2])
    torch.testing.assert_close(alone, weights[:, 1:2])
    # Block after block, read as whole sequences with the query at the end.
    x = serialize(torch.cat([support_x, query_x[:, :1]], 1), torch.tensor([[0, 1, 1, 0, -1]]), 2)
    seen = []
    for block in learner.network.blocks:
        if isinstance(block, AttentionBlock):
            seen.append(block.weights(x)[:, -1:, :-1])
        x = block(x)
    torch.testing.assert_close(torch.stack(seen).mean(0), weights[:, :1])


@pytest.mark.parametrize(
    "learner", [ProtoNet(torch.nn.Flatten()), MatchingNetwork(torch.nn.Flatten()), NearestNeighbour(2)]
)
def test_attention_of_embeddings_is_nearness(learner: Learner) -> None:
    support_x, support_y = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]]), torch.tensor([[0, 1, 1]])
    weights = learner.attention(support_x, support_y, torch.tensor([[[0.9, 0.0]]]))
    assert weights is not None
    torch.testing.assert_close(weights[0, 0], (-torch.tensor([0.9, 0.1, 2.1]).square()).softmax(0))
