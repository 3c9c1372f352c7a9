"""What several test files need: real data where there is some, one thread, nothing written outside of ``tmp_path``."""

from __future__ import annotations

import csv
import functools
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from snail import Learner
from snail.datasets import glyphs
from snail.experiments.runs import CONFIG_KEY, LINKED_KEY


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and sums are the same to the bit only on as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def glyphs_drawn_once() -> Iterator[None]:
    """The built-in characters are a pure function of a few numbers, which takes a second; many tests call it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glyphs, "draw_glyphs", functools.cache(glyphs.draw_glyphs))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves a cache in the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def omniglot_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real Omniglot in a folder that keeps its cache; skips where ``SNAIL_DATA`` does not point to it."""
    data = os.environ.get("SNAIL_DATA")
    source = Path(data or "nowhere").resolve() / "omniglot" / "omniglot-py"
    if not data or not source.is_dir():
        pytest.skip("set SNAIL_DATA to a folder with omniglot/omniglot-py to test on the real Omniglot")
    root = tmp_path_factory.mktemp("omniglot")
    (root / "omniglot-py").mkdir()
    for file in source.iterdir():
        (root / "omniglot-py" / file.name).symlink_to(file)
    return root


@pytest.fixture(scope="session")
def mini_imagenet_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of the real miniImageNet, as its csv file and images; skips where ``SNAIL_DATA`` has none."""
    data = os.environ.get("SNAIL_DATA")
    source = Path(data or "nowhere").resolve() / "mini_imagenet"
    if not data or not (source / "val.tar").is_file():
        pytest.skip("set SNAIL_DATA to a folder with mini_imagenet/val.tar to test on the real miniImageNet")
    with (source / "val.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = list(dict.fromkeys(row["label"] for row in rows))[:2]
    kept = {row["filename"]: row["label"] for row in rows if row["label"] in classes}
    root = tmp_path_factory.mktemp("mini_imagenet")
    (root / "images").mkdir()
    (root / "val.csv").write_text("filename,label\n" + "".join(f"{name},{label}\n" for name, label in kept.items()))
    missing = set(kept)
    with tarfile.open(source / "val.tar") as archive:
        for member in archive:
            name = Path(member.name).name
            if name in missing and (content := archive.extractfile(member)) is not None:
                (root / "images" / name).write_bytes(content.read())
                missing.remove(name)
            if not missing:
                break
    assert not missing
    return root


KeepRun = Callable[..., Path]


@pytest.fixture(scope="session")
def keep_run() -> KeepRun:
    """Writes a run's ``best.ckpt`` as training leaves it, without the training."""

    def keep(
        folder: Path, learner: Learner, learner_config: dict[str, Any], data_config: dict[str, Any], **linked: int
    ) -> Path:
        config = {"model": {"learner": learner_config}, "data": data_config, "name": folder.name}
        content = {
            "state_dict": {f"learner.{key}": value for key, value in learner.state_dict().items()},
            CONFIG_KEY: yaml.safe_dump(config),
            LINKED_KEY: linked,
            "global_step": 7,
            "pytorch-lightning_version": "2.6.4",
            "optimizer_states": [{"momenta": torch.zeros(100_000)}],
        }
        folder.mkdir(parents=True)
        torch.save(content, folder / "best.ckpt")
        return folder

    return keep
