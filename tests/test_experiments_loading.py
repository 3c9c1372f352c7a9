"""What a run left can be used from Python, and handed on without what only training needs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snail import MAML, SNAIL, Conv4, ProtoNet, evaluate
from snail.datasets import Glyphs, Omniglot
from snail.experiments.cli import main
from snail.experiments.loading import load_run, load_teacher, start_from
from snail.experiments.runs import STARTED_KEY, TEACHER_KEY, read_checkpoint, training_facts
from snail.files import file_hash
from snail.pretrained import WEIGHTS
from snail.results import read_results, results_markdown

KeepRun = Callable[..., Path]
EMBEDDING = {"class_path": "snail.Conv4", "init_args": {"filters": 4}}
SNAIL_CONFIG = {"class_path": "snail.SNAIL", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64}}
GLYPHS = {
    "class_path": "snail.datasets.Glyphs",
    "init_args": {"glyph_seed": 3, "ways": 3, "eval_shots": [1, 2], "test_episodes": 4},
}
QUICK = ["--trainer.max_epochs=1", "--data.steps_per_epoch=2", "--data.batch_size=2", "--data.val_episodes=2"]
QUICK += ["--data.test_episodes=2", "--trainer.accelerator=cpu", "--keep_memory=false", "--data.glyph_seed=3"]


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
    output = tmp_path / "kept" / WEIGHTS
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
    loaded = SNAIL.from_pretrained(output.parent)
    assert not loaded.training and (loaded.ways, loaded.max_shots) == (3, 2)
    assert all(torch.equal(value, new[key]) for key, value in loaded.state_dict().items())
    assert start_from(ProtoNet(Conv4(filters=4)), Glyphs(glyph_seed=3), output)["steps"] == 7
    assert main(["fit", "--ckpt_path", str(output)]) == 1
    assert "holds weights only; a run can begin with them: --start_from" in capfd.readouterr().err


def test_what_is_exported_of_training_is_told_with_every_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_epochs=1", "--data.steps_per_epoch=1", "--data.batch_size=1", "--data.val_episodes=2"]
    quick += ["--data.test_episodes=2", "--trainer.accelerator=cpu", "--model.learner.embedding.filters=4"]
    assert main(["fit", "--name=one", "--keep_memory=false", *quick]) == 0
    trained, scored = Path("runs/one"), Path("weights")
    scored.mkdir()
    assert main(["export", "--ckpt_path=runs/one", f"--output={scored / WEIGHTS}"]) == 0
    assert main(["test", "--ckpt_path=weights"]) == 0
    before, after = ([r for r in read_results([f / "results.json"]) if "training" in r] for f in (trained, scored))
    assert [r["training"] for r in after] == [r["training"] for r in before]
    assert [(r["accuracy"], r["shots"]) for r in after] == [(r["accuracy"], r["shots"]) for r in before]
    assert {r["checkpoint"] for r in after} == {file_hash(scored / WEIGHTS)}
    assert isinstance(SNAIL.from_pretrained("weights"), SNAIL)


def test_a_file_that_cannot_be_written_is_refused_beforehand(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--ckpt_path", str(run), "--output", f"no/such/folder/{WEIGHTS}"]) == 1
    assert "must name a file in a folder that exists" in capfd.readouterr().err


# -- beginning with the weights of another run ---------------------------------------------------------------------


def test_a_learner_starts_from_the_parts_of_a_run_that_are_built_alike(run: Path) -> None:
    given = load_run(run).learner.state_dict()
    torch.manual_seed(1)
    of_more_ways = SNAIL(Conv4(filters=4), 64, ways=7, max_shots=2)
    before = {name: value.clone() for name, value in of_more_ways.state_dict().items()}
    facts = start_from(of_more_ways, Glyphs(glyph_seed=3), run)
    for name, value in of_more_ways.state_dict().items():
        # Some biases of the other layers have the shape of those that were given; half a network is not taken.
        assert torch.equal(value, (given if name.startswith("embedding.") else before)[name])
    assert facts["parts"] == ["embedding"]
    assert (facts["run"], facts["steps"], facts["checkpoint"]) == ("run", 7, file_hash(run / "best.ckpt"))


def test_an_embedding_serves_another_learner(run: Path) -> None:
    learner = ProtoNet(Conv4(filters=4))
    assert start_from(learner, Glyphs(glyph_seed=3), run)["parts"] == ["embedding"]
    assert torch.equal(learner.embedding.layers[0].weight, load_run(run).learner.embedding.layers[0].weight)


def test_a_run_that_shares_no_weight_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="no part of MAML is built as one of"):
        start_from(MAML(Conv4(filters=4), 64, ways=2), Glyphs(glyph_seed=3), run)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"split": "random"}, {"split": "vinyals"}, "was trained on the split random of omniglot"),
        ({"train_on_validation": True}, {}, "was trained on training and validation characters"),
        ({"train_on_validation": True}, {"train_on_validation": True}, ""),
        ({"train_on_validation": True}, {"val_episodes": 0}, ""),
        ({}, {"train_on_validation": True}, ""),
        ({}, {}, ""),
    ],
)
def test_no_run_starts_from_one_that_has_seen_what_it_is_scored_on(
    before: dict[str, Any], after: dict[str, Any], said: str, tmp_path: Path, keep_run: KeepRun
) -> None:
    data = {"class_path": "snail.datasets.Omniglot", "init_args": before}
    net = {"class_path": "snail.ProtoNet", "init_args": {"embedding": EMBEDDING}}
    kept = keep_run(tmp_path / "before", ProtoNet(Conv4(filters=4)), net, data)
    learner = ProtoNet(Conv4(filters=4))
    if not said:
        assert start_from(learner, Omniglot(**after), kept)["parts"] == ["embedding"]
        return
    with pytest.raises(ValueError, match=said):
        start_from(learner, Omniglot(**after), kept)
    assert start_from(learner, Glyphs(), kept)["parts"] == ["embedding"]  # another data set has other classes


def test_what_a_run_began_with_counts_as_seen(tmp_path: Path, keep_run: KeepRun) -> None:
    net = {"class_path": "snail.ProtoNet", "init_args": {"embedding": EMBEDDING}}
    first = {"class_path": "snail.datasets.Omniglot", "init_args": {"split": "random"}}
    seen = keep_run(tmp_path / "first", ProtoNet(Conv4(filters=4)), net, first)
    between = keep_run(tmp_path / "between", ProtoNet(Conv4(filters=4)), net, GLYPHS)
    content = torch.load(between / "best.ckpt", weights_only=True)
    content[STARTED_KEY] = start_from(ProtoNet(Conv4(filters=4)), Glyphs(), seen)
    torch.save(content, between / "best.ckpt")
    with pytest.raises(ValueError, match="first was trained on the split random of omniglot"):
        start_from(ProtoNet(Conv4(filters=4)), Omniglot(split="vinyals"), between)
    assert start_from(ProtoNet(Conv4(filters=4)), Omniglot(split="random"), between)["started_from"]["run"] == "first"


def test_fit_starts_from_a_run_and_every_record_tells_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [*QUICK, "--model.learner.embedding.filters=4", "--model.optimizer.lr=0", "--data.queries=1"]
    assert main(["fit", "--name=after", f"--start_from={run}", *quick]) == 0
    assert ", begun with embedding of run;" in capfd.readouterr().out
    kept = read_checkpoint(Path("runs/after/last.ckpt"))
    began = training_facts(kept)["started_from"]
    assert (began["run"], began["steps"]) == ("run", 7)
    given = load_run(run).learner.state_dict()["embedding.layers.0.weight"]
    assert torch.equal(kept["state_dict"]["learner.embedding.layers.0.weight"], given)  # the rate is 0
    shutil.rmtree(run)  # to go on, and to be scored, a run needs no other
    assert main(["fit", "--ckpt_path=runs/after", "--trainer.max_epochs=2"]) == 0
    assert training_facts(read_checkpoint(Path("runs/after/last.ckpt")))["started_from"] == began
    records = [r for r in read_results([Path("runs/after/results.json")]) if "training" in r]
    assert records and all(record["training"]["started_from"] == began for record in records)
    assert ", begun with run of unknown training" in results_markdown(records)


@pytest.mark.parametrize("shots", [2, 3])
def test_a_learner_that_starts_whole_keeps_its_layers_whatever_its_own_start(
    shots: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    still = [*QUICK, "--model.learner.embedding.filters=4", "--model.optimizer.lr=0", "--model.learner.start=matching"]
    of_as_many_ways = ["--data.ways=3", f"--data.train_shots=[1,{shots}]", "--data.eval_shots=[1]"]
    assert main(["fit", "--name=after", f"--start_from={run}", *still, *of_as_many_ways]) == 0
    after = read_checkpoint(Path("runs/after/last.ckpt"))["state_dict"]
    given = load_run(run).learner.state_dict()
    kept = [torch.equal(value, after[f"learner.{n}"]) for n, value in given.items() if n.startswith("network.blocks.1")]
    assert all(kept) is (shots == 2)  # for more shots it is built otherwise


def test_an_embedding_grows_from_a_narrower_one(run: Path) -> None:
    learner = ProtoNet(Conv4(filters=[5, 6, 4, 7]))
    facts = start_from(learner, Glyphs(glyph_seed=3), run)
    assert facts["parts"] == ["embedding"]
    images = torch.rand(3, 1, 28, 28)
    given = load_run(run).learner
    torch.testing.assert_close(learner.eval().embedding(images), given.embedding(images))


# -- learning from another run -------------------------------------------------------------------------------------


def test_fit_learns_from_a_run_and_every_record_tells_of_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = [*QUICK, "--model.learner=snail.ProtoNet", "--model.learner.embedding=snail.Conv4"]
    quick += ["--model.learner.embedding.filters=4"]
    assert main(["fit", "--name=pupil", f"--start_from={run}", f"--teacher={run}", *quick]) == 0
    assert ", begun with embedding of run, taught by run;" in capfd.readouterr().out
    last = Path("runs/pupil/last.ckpt")
    assert set(read_checkpoint(last)["state_dict"]) == {f"learner.{n}" for n in ProtoNet(Conv4(filters=4)).state_dict()}
    taught = training_facts(read_checkpoint(last))["teacher"]
    assert (taught["run"], taught["steps"], taught["checkpoint"]) == ("run", 7, file_hash(run / "best.ckpt"))
    assert main(["fit", "--ckpt_path=runs/pupil", "--trainer.max_epochs=2"]) == 0
    assert training_facts(read_checkpoint(last))["teacher"] == taught
    shutil.rmtree(run)  # to be scored, a run needs no teacher
    assert main(["test", "--ckpt_path=runs/pupil"]) == 0
    records = [r for r in read_results([Path("runs/pupil/results.json")]) if "training" in r]
    assert records and all(record["training"]["teacher"] == taught for record in records)
    assert main(["fit", "--ckpt_path=runs/pupil", "--trainer.max_epochs=3"]) == 1
    assert "run does not exist" in capfd.readouterr().err


def test_a_run_that_goes_on_trusts_for_its_teacher_what_it_is_told_to(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trusted: list[list[str]] = []

    def load(*args: Any, trust: list[str]) -> Any:
        trusted.append(trust)
        return load_teacher(*args, trust=trust)

    monkeypatch.setattr("snail.experiments.trainer_cli.load_teacher", load)
    quick = [*QUICK, "--model.learner=snail.ProtoNet", "--model.learner.embedding=snail.Conv4"]
    quick += ["--model.learner.embedding.filters=4"]
    assert main(["fit", "--name=pupil", f"--teacher={run}", "--trust=one", *quick]) == 0
    assert main(["fit", "--ckpt_path=runs/pupil", "--trainer.max_epochs=2", "--trust=two"]) == 0
    assert trusted == [["one"], ["two"]]


def test_a_teacher_with_embeddings_of_another_width_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--data.glyph_seed=3", "--trainer.accelerator=cpu", "--keep_memory=false"]
    quick += ["--model.learner=snail.ProtoNet", "--model.learner.embedding=snail.Conv4"]
    assert main(["fit", f"--teacher={run}", *quick, "--model.learner.embedding.out_features=9"]) == 1
    assert "the teacher's embedding has 64 channels and the learner's 9" in capfd.readouterr().err


def test_no_run_learns_from_one_that_has_seen_what_it_is_scored_on(tmp_path: Path, keep_run: KeepRun) -> None:
    net = {"class_path": "snail.ProtoNet", "init_args": {"embedding": EMBEDDING}}
    data = {"class_path": "snail.datasets.Omniglot", "init_args": {"split": "random"}}
    seen = keep_run(tmp_path / "seen", ProtoNet(Conv4(filters=4)), net, data)
    pupil = keep_run(tmp_path / "pupil", ProtoNet(Conv4(filters=4)), net, GLYPHS)
    with pytest.raises(ValueError, match="seen was trained on the split random of omniglot"):
        load_teacher(Omniglot(split="vinyals"), seen)
    content = torch.load(pupil / "best.ckpt", weights_only=True)
    _, content[TEACHER_KEY] = load_teacher(Omniglot(split="random"), seen)
    torch.save(content, pupil / "best.ckpt")
    with pytest.raises(ValueError, match="seen was trained on the split random of omniglot"):  # nor from its pupil
        start_from(ProtoNet(Conv4(filters=4)), Omniglot(split="vinyals"), pupil)


def test_a_teacher_needs_an_embedding(tmp_path: Path, keep_run: KeepRun) -> None:
    net = {"class_path": "snail.MAML", "init_args": {"embedding": EMBEDDING, "embedding_dim": 64}}
    kept = keep_run(tmp_path / "maml", MAML(Conv4(filters=4), 64, ways=2), net, GLYPHS, ways=2)
    with pytest.raises(ValueError, match="holds MAML, which has no embedding to learn from"):
        load_teacher(Glyphs(), kept)


def test_starting_from_what_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--start_from=runs/none"]) == 1
    assert "runs/none does not exist" in capfd.readouterr().err
    assert not Path("runs").exists()
