from pathlib import Path

import pytest
import torch

from snail.experiments import levers


@pytest.mark.parametrize(
    ("told", "fast"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_tile amx_bf16", True),
        ("vendor_id : AuthenticAMD\nflags : avx2", False),
        (None, False),
    ],
)
def test_bf16_is_fast_on_processors_that_gain_by_it(
    told: str | None, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if told is not None:
        (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(levers, "CPU_INFO", str(tmp_path / "cpuinfo"))
    assert levers.bf16_is_fast("cpu") is fast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert levers.bf16_is_fast("auto") is fast


def test_bf16_is_not_fast_on_an_accelerator_that_nothing_is_known_of() -> None:
    assert not levers.bf16_is_fast("mps")
