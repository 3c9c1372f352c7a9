"""Weights come back with their learner, from this package's own classes only, and damage is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from snail import MAML, SNAIL, Conv4, Learner, ProtoNet, pretrained
from snail.pretrained import WEIGHTS, Weights, build, find_weights

EMBEDDING = {"class_path": "snail.Conv4", "init_args": {"filters": 4}}
DESCRIBED = {
    "class_path": "snail.SNAIL",
    "init_args": {"embedding": EMBEDDING, "embedding_dim": 64, "ways": 3, "max_shots": 2},
}


def learner() -> SNAIL:
    torch.manual_seed(0)
    return SNAIL(Conv4(filters=4), 64, ways=3, max_shots=2)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    Weights(learner().state_dict(), DESCRIBED, {"steps": 3}).write(tmp_path / WEIGHTS)
    return tmp_path / WEIGHTS


@pytest.mark.parametrize("kind", [SNAIL, Learner])
def test_a_learner_comes_back_ready_to_answer(kind: type[Learner], kept: Path) -> None:
    loaded, expected = kind.from_pretrained(kept), learner().state_dict()
    assert isinstance(loaded, SNAIL) and not loaded.training
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert Weights.read(kept).about == {"steps": 3}


def test_others_read_the_tensors_as_they_are(kept: Path) -> None:
    learner().load_state_dict(load_file(kept))


def test_state_that_is_no_tensor_comes_back(tmp_path: Path) -> None:
    maml = MAML(Conv4(filters=4), 64, ways=2)
    maml.meta_steps = 5
    described = {"class_path": "snail.MAML", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64, "ways": 2}}
    Weights(maml.state_dict(), described).write(tmp_path / WEIGHTS)
    assert MAML.from_pretrained(tmp_path).meta_steps == 5


def test_half_precision_takes_half_the_space_and_comes_back_in_single(kept: Path, tmp_path: Path) -> None:
    Weights(learner().state_dict(), DESCRIBED).write(tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.51 * kept.stat().st_size
    loaded = SNAIL.from_pretrained(tmp_path / "half.safetensors")
    for name, value in learner().state_dict().items():
        rounded = value.half().float() if value.dtype == torch.float32 else value
        assert torch.equal(loaded.state_dict()[name], rounded)


def test_another_learner_than_asked_for_is_refused(kept: Path) -> None:
    with pytest.raises(ValueError, match="holds the weights of SNAIL, not of ProtoNet"):
        ProtoNet.from_pretrained(kept)


@pytest.mark.parametrize(
    "class_path",
    ["subprocess.Popen", "snail.learner.sys", "snail.evaluate", "snail.Episode", "snail.__class__", "SNAIL", None],
)
def test_nothing_but_this_packages_networks_is_built(class_path: str | None, tmp_path: Path) -> None:
    described: dict[str, Any] = {"class_path": class_path, "init_args": {"args": ["touch", str(tmp_path / "ran")]}}
    for each in (described, {"class_path": "snail.ProtoNet", "init_args": {"embedding": described}}):
        with pytest.raises(ValueError, match="is none of this package's networks"):
            build(each)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "other", "no text", "empty"])
def test_damage_is_one_sentence(damage: str, kept: Path) -> None:
    content = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        save_file({"x": torch.zeros(1)}, kept)
    elif damage == "no text":
        save_file({"x": torch.zeros(1)}, kept, {"learner": "{", "about": json.dumps({}), "state": json.dumps({})})
    else:
        kept.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be read as weights of a learner"):
        SNAIL.from_pretrained(kept)


def test_a_kill_while_writing_leaves_the_old_file(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kept.read_bytes()
    with pytest.raises(TypeError):
        Weights(learner().state_dict(), DESCRIBED, {"no plain value": Path()}).write(kept)
    assert kept.read_bytes() == before


def test_names_are_those_of_a_checkout_and_elsewhere_the_file_that_is_needed_is_told(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "KEPT", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match=r"such as experiments/results/some_run/weights.safetensors of a check"):
        SNAIL.from_pretrained("some_run")
    (tmp_path / "results" / "some_run").mkdir(parents=True)
    kept.rename(tmp_path / "results" / "some_run" / WEIGHTS)
    assert find_weights("some_run") == tmp_path / "results" / "some_run" / WEIGHTS
    with pytest.raises(FileNotFoundError, match="here are some_run"):
        SNAIL.from_pretrained("another")
