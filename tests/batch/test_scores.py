"""Batches judged, by model."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from batches import write
from judge_tiny import exam
from PIL import Image
from tiny_world import Scene, draw

from minisd.batch.scores import scored
from minisd.batch.scores.judge import asked_for
from minisd.cli import main


def test_prompts_of_the_tiny_world_are_understood():
    """In every wording of scripts/tiny_world.py."""
    for wanted, prompt, _ in exam(200):
        assert asked_for(prompt) == (wanted["shape"], wanted["colour"], wanted["background"]), prompt
    for prompt in (
        "",
        "a star",
        "a red star",
        "a red star and a ring on a blue background",
        "a castle on a blue and red background",
    ):
        assert asked_for(prompt) is None, prompt


def test_a_table_of_models(tmp_path, capsys):
    """Pictures that are right or wrong by hand, of two models."""
    rng = random.Random(1)
    drawn = [("tiny", Scene("star", "red", "blue"), "a red star on a blue background")] * 3
    drawn += [("tiny", Scene("ring", "red", "blue"), "a red star on a blue background")]
    drawn += [
        ("tiny-lit", Scene("ring", "red", "blue"), "a red ring on a white background"),
        ("dream", Scene("ring", "red", "blue"), "a"),
    ]
    folder = tmp_path / "out" / "00000"
    folder.mkdir(parents=True)
    for i, (model, scene, prompt) in enumerate(drawn):
        draw(scene, rng).save(folder / f"{i}.png")
        (folder / f"{i}.json").write_text(json.dumps({"model": model, "prompt": prompt}))
    found = scored([str(tmp_path / "out")])
    assert (found["tiny"].pictures, found["tiny"].judged) == (4, 4)
    assert found["tiny"].right == {"shape": 3, "colour": 4, "background": 4, "all": 3}
    assert found["tiny-lit"].right == {"shape": 1, "colour": 1, "background": 0, "all": 0}
    assert (found["dream"].pictures, found["dream"].judged) == (1, 0)
    assert main(["score", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["tiny", "4", "4", "75.0%", "100.0%", "100.0%", "75.0%", "-", "-"]
    assert main(["score", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiny"]["all"] == 0.75


def test_metrics_see_every_picture_of_a_model(tmp_path):
    """Whatever has torchmetrics' interface."""

    class Mean:
        def reset(self):
            self.seen = []

        def update(self, pixels, texts):
            assert pixels.dtype == torch.uint8
            self.seen.append((pixels.float().mean().item(), texts[0]))

        def compute(self):
            return torch.tensor(np.mean([mean for mean, _ in self.seen]))

    for i, (model, level) in enumerate((("a", 10), ("a", 20), ("b", 60))):
        (tmp_path / "o" / "0").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / "o" / "0" / f"{i}.png")
        (tmp_path / "o" / "0" / f"{i}.json").write_text(json.dumps({"model": model, "prompt": "p"}))
    found = scored([str(tmp_path / "o")], {"clip": Mean()})
    assert (found["a"].clip, found["b"].clip) == (15, 60)


@pytest.mark.parametrize("more", [[], ["--clip", "none"], ["--fid", "."]])
def test_what_is_not_there_is_told(tmp_path, capsys, more):
    write(tmp_path / "m.jsonl", [])
    assert main(["score", str(tmp_path), *more]) == 2
    assert "minisd: error: score" in capsys.readouterr().err
