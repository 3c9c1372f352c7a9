"""What a run left can be used from Python, and handed on without what only training needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snail import MAML, SNAIL, Conv4, evaluate
from snail.datasets import Glyphs
from snail.experiments.cli import main
from snail.experiments.loading import load_run
from snail.experiments.runs import read_checkpoint

KeepRun = Callable[..., Path]
EMBEDDING = {"class_path": "snail.Conv4", "init_args": {"filters": 4}}
SNAIL_CONFIG = {"class_path": "snail.SNAIL", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64}}
GLYPHS = {
    "class_path": "snail.datasets.Glyphs",
    "init_args": {"glyph_seed": 3, "ways": 3, "eval_shots": [1, 2], "test_episodes": 4},
}


@pytest.fixture
def run(tmp_path: Path, keep_run: KeepRun) -> Path:
    torch.manual_seed(0)
    learner = SNAIL(Conv4(filters=4), 64, ways=3, max_shots=2)
    return keep_run(tmp_path / "run", learner, SNAIL_CONFIG, GLYPHS, ways=3, max_shots=2)


def test_a_run_comes_back_with_its_weights_its_ways_and_its_data(run: Path) -> None:
    torch.manual_seed(0)
    expected = SNAIL(Conv4(filters=4), 64, ways=3, max_shots=2).state_dict()
    loaded = load_run(run)
    assert isinstance(loaded.learner, SNAIL) and (loaded.learner.ways, loaded.learner.max_shots) == (3, 2)
    assert not loaded.learner.training and loaded.checkpoint == run / "best.ckpt"
    assert all(torch.equal(value, expected[key]) for key, value in loaded.learner.state_dict().items())
    assert isinstance(loaded.data, Glyphs) and loaded.data.split == "seed3"
    result = evaluate(loaded.learner, loaded.data.episodes("test", ways=3, shots=1))
    assert result.episodes == 4


def test_a_gradient_learner_comes_back_with_the_meta_steps_it_took(tmp_path: Path, keep_run: KeepRun) -> None:
    learner = MAML(Conv4(filters=4), 64, ways=2, multi_step_loss=10)
    learner.meta_steps = 5
    init_args = {"embedding": EMBEDDING, "embedding_dim": 64, "multi_step_loss": 10}
    kept = keep_run(tmp_path / "maml", learner, {"class_path": "snail.MAML", "init_args": init_args}, GLYPHS, ways=2)
    loaded = load_run(kept).learner
    assert isinstance(loaded, MAML) and loaded.meta_steps == 5


def test_a_checkpoint_that_names_other_packages_is_refused(tmp_path: Path, keep_run: KeepRun) -> None:
    named = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "ran")]}}
    evil = keep_run(tmp_path / "evil", SNAIL(Conv4(filters=4), 64, 3, 2), named, GLYPHS)
    with pytest.raises(ValueError, match=r"names 'subprocess\.Popen'"):
        load_run(evil)
    assert not (tmp_path / "ran").exists()


def test_weights_that_do_not_fit_are_told(tmp_path: Path, keep_run: KeepRun, capfd: pytest.CaptureFixture[str]) -> None:
    kept = keep_run(tmp_path / "run", SNAIL(Conv4(filters=4), 64, 3, 2), SNAIL_CONFIG, GLYPHS, ways=4, max_shots=2)
    (tmp_path / "few" / "class").mkdir(parents=True)
    command = ["predict", "--ckpt_path", str(kept), "--support", str(tmp_path / "few"), "--query", str(tmp_path)]
    assert main(command) == 1
    assert "does not fit the model of its config" in capfd.readouterr().err


@pytest.mark.parametrize("half", [False, True])
def test_what_is_exported_is_the_same_learner_and_smaller(
    half: bool, run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "kept" / "best.ckpt"
    output.parent.mkdir()
    assert main(["export", "--ckpt_path", str(run), "--output", str(output), *["--half"] * half]) == 0
    assert capfd.readouterr().out.startswith(f"{output}: ")
    before, after = read_checkpoint(run / "best.ckpt"), read_checkpoint(output)
    assert before.keys() - after.keys() == {"optimizer_states"} and after["global_step"] == 7
    old, new = load_run(run).learner.state_dict(), load_run(output).learner.state_dict()
    for key, value in old.items():
        rounded: Any = value.half().float() if half and value.dtype == torch.float32 else value
        assert torch.equal(new[key], rounded) and new[key].dtype == value.dtype
    assert output.stat().st_size < (run / "best.ckpt").stat().st_size / (2 if half else 1)
    assert main(["test", "--ckpt_path", str(output.parent)]) == 0
    assert (output.parent / "results.json").exists()


def test_a_file_that_cannot_be_written_is_refused_beforehand(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt_path", str(run), "--output", "no/such/folder/best.ckpt"]) == 1
    assert "must name a file in a folder that exists" in capfd.readouterr().err
