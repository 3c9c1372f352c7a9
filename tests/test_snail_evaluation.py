import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snail import SNAIL, Conv4, Episode, Learner, NearestNeighbour, Result, evaluate, evaluation
from snail.datasets import Episodes, EpisodeSampler, Images
from snail.datasets.images import split_hash
from snail.datasets.sampler import DrawnBatches
from snail.evaluation import Scorer, Scoring, machine


def noise(classes: int = 5, images: int = 6, size: int = 3) -> Images:
    """Images of which those of a class resemble each other a little."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randint(60, 196, (classes, 1, 1, size, size), generator=generator)
    pixels = centre + torch.randint(-60, 60, (classes, images, 1, size, size), generator=generator)
    return Images(pixels.flatten(0, 1).byte(), tuple(f"class{i}" for i in range(classes)), (images,) * classes)


def episodes(images: Images | None = None, **changed: Any) -> Episodes:
    images = images or noise()
    settings = {"name": "made-up/halves/test", "ways": 3, "shots": 2, "queries": 2, "seed": 4}
    settings |= {"count": 20, "batch_size": 8} | changed
    count, batch_size = settings.pop("count"), settings.pop("batch_size")
    return Episodes(EpisodeSampler(images, **settings), count, images, batch_size)


class Spoken(Learner):
    """Answers what the query item says, so that accuracies are known by hand."""

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return nn.functional.one_hot(query_x.long(), 3).float()


def spoken(rows: list[list[int]]) -> Episode:
    """Episodes whose queries all belong to class 0, and are answered with ``rows``."""
    answers = torch.tensor(rows)
    support = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Episode(support, support, answers, torch.zeros_like(answers), ways=3)


class Counting(nn.Module):
    """An embedding that keeps every image which passes."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.passed.append(images)
        return images.flatten(1)


class Crowd(NearestNeighbour):
    """A transductive learner: it first takes the mean of all queries of the episode away."""

    transductive = True

    def answer(self, support: Tensor, support_y: Tensor, query: Tensor) -> Tensor:
        return super().answer(support, support_y, query - query.mean(1, keepdim=True))


# -- a result ----------------------------------------------------------------------------------------------------


def test_ci_matches_hand_value() -> None:
    # Percent 50, 100, 75, 25: mean 62.5, squared deviations 156.25, 1406.25, 156.25, 1406.25, s^2 = 3125 / 3.
    result = Result.of(torch.tensor([0.5, 1.0, 0.75, 0.25]))
    assert result.accuracy == 62.5
    assert result.ci95 == pytest.approx(1.96 * math.sqrt(3125 / 3) / 2)
    assert result.ci95 == pytest.approx(31.6294, abs=1e-4)
    assert result.episodes == 4


def test_ci_of_single_queries_is_the_binomial_one() -> None:
    # 9,907 of 10,000 episodes of one query: 1.96 sqrt(p (1 - p) / E), the unit that SNAIL's table is printed in.
    result = Result.of(torch.tensor([1.0] * 9907 + [0.0] * 93))
    assert result.accuracy == pytest.approx(99.07)
    assert result.ci95 == pytest.approx(100 * 1.96 * math.sqrt(0.9907 * 0.0093 / 9999))
    assert str(result) == "99.07 ± 0.19 %"


def test_result_of_equal_accuracies_has_no_width() -> None:
    assert Result.of(torch.tensor([1.0, 1.0, 1.0])).ci95 == 0


def test_result_of_one_episode_has_no_interval() -> None:
    result = Result.of(torch.tensor([0.25]))
    assert result.accuracy == 25
    assert math.isnan(result.ci95)


def test_result_of_no_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no episode to score"):
        Result.of(torch.empty(0))


def test_result_does_not_lose_digits_of_many_episodes() -> None:
    third = torch.full((30_000,), 1 / 3, dtype=torch.float64)
    assert Result.of(third).accuracy == pytest.approx(100 / 3, abs=1e-10)


def test_result_record_is_flat() -> None:
    record = Result(90.0, 1.5, 7, {"dataset": "made-up"}).record()
    assert record == {"dataset": "made-up", "accuracy": 90.0, "ci95": 1.5, "episodes": 7}


# -- evaluate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[3], [1, 1, 1], [2, 1], [1, 2]], ids=str)
def test_evaluate_takes_the_episode_for_its_unit_not_the_batch_nor_the_query(sizes: list[int]) -> None:
    # Accuracies 100, 50, 0: mean 50, s = 50. Batches of 2 and 1 would give (75 + 0) / 2.
    batches = spoken([[0, 0], [0, 2], [1, 1]])
    fields = zip(
        *(getattr(batches, n).split(sizes) for n in ("support_x", "support_y", "query_x", "query_y")), strict=True
    )
    result = evaluate(Spoken(), [Episode(*tensors, ways=3) for tensors in fields])
    assert (result.accuracy, result.episodes) == (50, 3)
    assert result.ci95 == pytest.approx(1.96 * 50 / math.sqrt(3))


def test_evaluate_takes_episodes_of_different_query_counts_alike() -> None:
    result = evaluate(Spoken(), [spoken([[0, 0, 0, 0, 0, 0]]), spoken([[1]])])
    assert result.accuracy == 50


def test_evaluate_without_an_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="there is no episode to score"):
        evaluate(Spoken(), [])


def test_evaluate_takes_a_generator() -> None:
    assert evaluate(Spoken(), (spoken([[0, 1]]) for _ in range(4))).episodes == 4


def test_evaluate_embeds_each_image_once() -> None:
    index = torch.arange(700)  # more than are embedded at a time
    pixels = torch.stack([index // 256, index % 256], dim=1).byte().reshape(-1, 1, 1, 2)
    images = Images(pixels, tuple(map(str, range(70))), (10,) * 70)
    embedding = Counting()
    evaluate(NearestNeighbour(3, embedding), episodes(images, count=300))
    passed = (torch.cat(embedding.passed) * 255).round().long().flatten(1) @ torch.tensor([256, 1])
    assert sorted(passed.tolist()) == list(range(700))


def test_evaluate_of_a_pool_equals_evaluate_of_its_items() -> None:
    pooled = evaluate(NearestNeighbour(3), episodes())
    plain = evaluate(NearestNeighbour(3), list(episodes()))
    by_hand = []
    for episode in episodes():
        for support_x, support_y, query_x, query_y in zip(
            episode.support_x, episode.support_y, episode.query_x, episode.query_y, strict=True
        ):
            distances = ((query_x.flatten(1)[:, None] - support_x.flatten(1)[None]) ** 2).sum(-1)
            by_hand.append(float((support_y[distances.argmin(1)] == query_y).double().mean()))
    assert len(by_hand) == 20
    assert 0 < sum(by_hand) / 20 < 1
    assert pooled.accuracy == plain.accuracy == pytest.approx(100 * sum(by_hand) / 20)
    assert pooled.ci95 == plain.ci95


def test_evaluate_of_snail_with_batch_norm_equals_one_query_at_a_time() -> None:
    torch.manual_seed(0)
    learner = SNAIL(Conv4(filters=4, image_size=16, out_features=4), 4, ways=3, max_shots=2)
    here = episodes(noise(size=16), count=4)
    single = [
        Episode(e.support_x, e.support_y, e.query_x[:, i : i + 1], e.query_y[:, i : i + 1], ways=3)
        for e in here
        for i in range(6)
    ]
    assert evaluate(learner, here).accuracy == pytest.approx(evaluate(learner, single).accuracy)


def test_inductive_bn_query_independent() -> None:
    torch.manual_seed(0)
    learner = SNAIL(Conv4(filters=4, image_size=16, out_features=4), 4, ways=3, max_shots=2).eval()
    episode = next(iter(episodes(noise(size=16), count=2)))
    changed = episode.query_x.clone()
    changed[:, 1:] = 1 - changed[:, 1:]
    with torch.no_grad():
        whole = learner(episode.support_x, episode.support_y, episode.query_x)
        others = learner(episode.support_x, episode.support_y, changed)
        alone = learner(episode.support_x, episode.support_y, episode.query_x[:, :1])
    torch.testing.assert_close(whole[:, :1], others[:, :1])
    torch.testing.assert_close(whole[:, :1], alone)
    assert not torch.allclose(whole[:, 1:], others[:, 1:])


def test_transductive_differs() -> None:
    episode = next(iter(episodes()))
    learner = Crowd(3)
    whole = learner(episode.support_x, episode.support_y, episode.query_x)
    alone = learner(episode.support_x, episode.support_y, episode.query_x[:, :1])
    assert not torch.allclose(whole[:, :1], alone)


def test_transductive_learner_is_scored_on_items_and_says_so() -> None:
    embedding = Counting()
    result = evaluate(Crowd(3, embedding), episodes(count=20, batch_size=8))
    assert [len(images) for images in embedding.passed] == [8 * 12, 8 * 12, 4 * 12]
    assert {images.shape[1:] for images in embedding.passed} == {(1, 3, 3)}
    assert result.record()["batch_norm"] == "transductive"
    assert result.accuracy == evaluate(Crowd(3), list(episodes())).accuracy


def test_evaluate_does_not_read_the_labels_of_queries_to_answer() -> None:
    # The same logits for the right and for turned labels: the two accuracies of 2-way guesses add up to one.
    plain = list(episodes(ways=2))
    turned = [Episode(e.support_x, e.support_y, e.query_x, 1 - e.query_y, ways=2) for e in plain]
    here, there = evaluate(NearestNeighbour(2), plain), evaluate(NearestNeighbour(2), turned)
    assert here.accuracy + there.accuracy == pytest.approx(100)


class Failing(Spoken):
    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        raise ArithmeticError


@pytest.mark.parametrize("works", [True, False])
def test_evaluate_puts_every_mode_back(works: bool) -> None:
    learner = Spoken() if works else Failing()
    learner.frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()).eval()
    learner.moving = nn.Dropout().train()
    learner.train(False).training = True  # the learner trains, with parts of it frozen
    learner.moving.train()
    before = [module.training for module in learner.modules()]
    assert before == [True, False, False, False, True]
    with contextlib.nullcontext() if works else pytest.raises(ArithmeticError):
        evaluate(learner, [spoken([[0]])] * 2)
    assert [module.training for module in learner.modules()] == before


def test_evaluate_runs_in_evaluation_mode_and_moves_no_statistics() -> None:
    torch.manual_seed(0)
    learner = NearestNeighbour(3, nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten())).train()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    results = [evaluate(learner, some) for some in (episodes(), episodes(), list(episodes()))]
    assert len({result.accuracy for result in results}) == 1  # no dropout
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())


def test_evaluate_computes_no_gradients() -> None:
    class Asking(Spoken):
        def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(support_x, support_y, query_x)

    evaluate(Asking(), [spoken([[0]])])
    assert torch.is_grad_enabled()


def test_evaluate_leaves_the_episodes_as_they_were() -> None:
    given, fresh = list(episodes()), list(episodes())
    evaluate(NearestNeighbour(3), given)
    for one, other in zip(given, fresh, strict=True):
        assert all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("support_x", "support_y", "query_y"))


def test_record_carries_what_is_needed_to_get_it_again() -> None:
    learner = NearestNeighbour(3, nn.Sequential(nn.Flatten(), nn.Linear(9, 2)))
    record = evaluate(learner, episodes(), checkpoint="abc").record()
    expected = {
        "dataset": "made-up",
        "split": "halves/test",
        "split_hash": split_hash(f"class{i}" for i in range(5)),
        "learner": "NearestNeighbour",
        "checkpoint": "abc",
        "ways": 3,
        "shots": 2,
        "queries": 2,
        "episodes": 20,
        "seed": 4,
        "batch_norm": "inductive",
        "parameters": 20,
        "device": "cpu",
    }
    assert {key: record.get(key) for key in expected} == expected
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["python"] == platform.python_version()
    assert record["versions"]["snail"] != "unknown"
    assert record["seconds"] >= 0
    assert 0 < record["accuracy"] < 100
    assert record["ci95"] > 0
    assert json.loads(json.dumps(record)) == record


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_results_name_the_commit_of_the_code_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*command: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *who, *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit() -> str | None:
        evaluation._commit.cache_clear()
        return machine("cpu")["versions"].get("commit")

    code = tmp_path / "code.py"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "__file__", str(code))
        code.write_text("a = 1")
        assert commit() is None
        git("init")
        assert commit() is None  # in somebody's checkout, but not of it
        git("add", "code.py")
        git("commit", "-m", "one")
        assert commit() == git("rev-parse", "--short=12", "HEAD")
        code.write_text("a = 2")
        assert commit() == git("rev-parse", "--short=12", "HEAD") + "-dirty"
        patch.setenv("PATH", "")
        assert commit() is None
    evaluation._commit.cache_clear()


def test_evaluate_does_not_write_into_the_episodes_facts() -> None:
    here = episodes()
    evaluate(NearestNeighbour(3), here, checkpoint="abc")
    assert "checkpoint" not in here.facts
    assert "learner" not in here.facts


def test_record_of_plain_episodes_carries_what_the_caller_says() -> None:
    record = evaluate(Spoken(), [spoken([[0]])] * 2, dataset="made by hand", seed=3).record()
    assert (record["dataset"], record["seed"], record["learner"]) == ("made by hand", 3, "Spoken")
    assert record["episodes"] == 2


def test_blocks_and_evaluation_need_no_lightning() -> None:
    program = """
        import sys
        import snail, torch
        support = torch.eye(3).expand(2, 3, 3)
        labels = torch.arange(3).expand(2, 3)
        result = snail.evaluate(snail.NearestNeighbour(3), [snail.Episode(support, labels, support, labels, ways=3)])
        assert result.accuracy == 100, result
        loaded = {name.split(".")[0] for name in sys.modules}
        assert not loaded & {"lightning", "pytorch_lightning", "torchvision"}, sorted(loaded)
    """
    program = "\n".join(line.strip() for line in program.splitlines())
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_counted_by_image() -> None:
    """In a loop over queries: how often each image was asked, and how often answered wrongly."""
    known, learner = episodes(), NearestNeighbour(3)
    result = evaluate(learner, known)
    asked, wrong = torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for drawn, ready in zip(known.drawn, known, strict=True):
        said = learner(ready.support_x, ready.support_y, ready.query_x).argmax(-1)
        for image, right in zip(drawn.query_x.flatten(), (said == ready.query_y).flatten(), strict=True):
            asked[image] += 1
            wrong[image] += not right
    assert result.mistakes is not None and torch.equal(result.mistakes, torch.stack([asked, wrong]))
    assert asked.sum() == 20 * 3 * 2
    assert 100 * (1 - wrong.sum() / asked.sum()) == pytest.approx(result.accuracy)
    assert 0 < wrong.sum() < asked.sum()


@pytest.mark.parametrize(
    ("wrong", "half"), [([0, 5, 1, 4], 1), ([0, 4, 1, 4], 2), ([1, 1, 1, 1], 2), ([2, 0, 0, 2], 1), ([0, 0, 0, 0], 0)]
)
def test_half_of_mistakes_by_hand(wrong: list[int], half: int) -> None:
    mistakes = torch.tensor([[9.0] * 4, wrong])
    result = Result.of(torch.tensor([1.0]), mistakes=mistakes)
    assert result.half_of_mistakes == result.record()["half_of_mistakes"] == half


def test_mistakes_are_those_of_the_last_variant() -> None:
    known = episodes()
    results = evaluation.evaluate_each(Said(), known)
    assert results[0].mistakes is None
    asked, wrong = results[1].mistakes
    assert 100 * (1 - wrong.sum() / asked.sum()) == pytest.approx(results[1].accuracy)


def test_mistakes_are_not_known_of_items_that_episodes_carry() -> None:
    result = evaluate(Spoken(), [spoken([[0, 1]])])
    assert result.mistakes is None and result.half_of_mistakes is None
    assert "half_of_mistakes" not in result.record()


# -- several processes -----------------------------------------------------------------------------------------------


class Said(Learner):
    """Answers rightly as often as an episode's first item says, in two variants."""

    @property
    def variants(self) -> list[dict[str, Any]]:
        return [{"inner_steps": 1}, {"inner_steps": 2}]

    def forward(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        return self.answers(support_x, support_y, query_x)[-1]

    def answers(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Tensor:
        pixels = query_x.flatten(2).mean(-1, keepdim=True)  # (b, q, 1), another number for each image
        far = torch.arange(3) / 3
        return torch.stack([-(pixels - far).abs(), (pixels - far).abs()])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "batch_size"), [(20, 8), (21, 8), (16, 8), (7, 8), (13, 1)])
def test_processes_score_every_episode_once_in_order(world: int, count: int, batch_size: int) -> None:
    known = episodes(count=count, batch_size=batch_size)
    alone = Scoring(Scorer(Said(), known.images), known.facts)
    for batch in known.drawn:
        alone.add(batch)
    shares = [DrawnBatches(known, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # all have equally many, or who waits would wait for ever
    scorings = [Scoring(Scorer(Said(), known.images), known.facts, share.starts) for share in shares]
    for scoring, share in zip(scorings, shares, strict=True):
        assert len(list(share)) == len(share)
        for batch in share:
            scoring.add(batch)
    owned: list[list[Tensor]] = []  # what each process brings to each of the sums
    for scoring in scorings:
        brought: list[Tensor] = []
        scoring.results("cpu", lambda own, brought=brought: (brought.append(own), torch.ones_like(own))[1])
        owned.append(brought)
    sums = [sum(parts[1:], parts[0]) for parts in zip(*owned, strict=True)]
    ahead = iter(sums)
    scores = scorings[0].scores(lambda own: next(ahead))
    assert torch.equal(scores, alone.scores())
    assert scores.shape == (2, count) and len(scores.unique()) > 1
    ahead = iter(sums)
    result, known_result = scorings[0].results("cpu", lambda own: next(ahead))[-1], alone.results("cpu")[-1]
    assert torch.equal(result.mistakes, known_result.mistakes)
    times = sum((parts[1] for parts in owned), torch.zeros(count))
    assert torch.equal(times, torch.ones(count, dtype=times.dtype))  # none twice, none missing


def test_processes_that_are_stopped_early_score_what_they_had() -> None:
    known = episodes(count=20, batch_size=4)
    share = DrawnBatches(known, 1, 2)
    scoring = Scoring(Scorer(Said(), known.images), known.facts, share.starts)
    scoring.add(next(iter(share)))
    assert share.starts == [4, 12, None]
    assert torch.equal(scoring.scores(), Scorer(Said(), known.images)(list(known.drawn)[1]))
