"""What several test files need: real data where there is some, one thread, nothing written outside of ``tmp_path``."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from snail.datasets import glyphs


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
