"""The README's Python samples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import minisd
from minisd.library.places import tiny_checkpoint

SAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("sample", range(len(SAMPLES)))
def test_sample(sample, tmp_path, monkeypatch, tiny):
    """Their file names are those of a user: here they are the tiny checkpoint and its style."""
    monkeypatch.chdir(tmp_path)
    for name in ("v1-5-pruned-emaonly.safetensors", "a.safetensors", "old.ckpt", "better-vae.safetensors"):
        Path(name).symlink_to(tiny_checkpoint())
    Path("b.safetensors").symlink_to(tiny_checkpoint().with_name("tiny-lit.safetensors"))
    given = {"x": torch.randn(1, 4, 8, 8), "t": torch.tensor([500.0]), "pixels": torch.zeros(1, 3, 64, 64), "pipe": tiny}
    exec(SAMPLES[sample], given)
    written = {"out.png"} if sample == 0 else {"mix.safetensors", "new.safetensors", "changed.safetensors"}
    assert written <= {path.name for path in tmp_path.iterdir()}


def test_stream_takes_a_request(tiny):
    steps = list(tiny.stream(minisd.Request("a red circle", steps=2, width=32, height=32)))
    assert [step.index for step in steps] == [0, 1]
