"""The pictures of batches judged by what they were asked for, and counted by the model that drew them.

The tiny checkpoints have a judge here.  For others there are torchmetrics' CLIP score and FID, whose weights must be at hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...errors import UsageError, shown
from ...pictures.init import open_picture

PICTURES = (".png", ".jpg", ".webp")
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
PARTS = ("shape", "colour", "background", "all")


@dataclass
class Score:
    """Of one model.  judged: pictures whose prompts the judge understands; right: of these, by PARTS."""

    pictures: int = 0
    judged: int = 0
    right: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    clip: float | None = None  # mean of 100 times the cosine of picture and prompt
    fid: float | None = None  # to the pictures of a folder; less is nearer

    def facts(self) -> dict[str, Any]:
        shares = {name: self.right[name] / self.judged if self.judged else None for name in PARTS}
        return {"pictures": self.pictures, "judged": self.judged, **shares, "clip": self.clip, "fid": self.fid}


def drawn(folders: Iterable[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every picture below some folders, with its recipe.  Raises UsageError where there is none."""
    for folder in folders:
        count = 0
        for path in sorted(Path(folder).glob("[!.]*/*")):
            if path.suffix not in PICTURES or not (recipe := recipe_beside(path)):
                continue
            count += 1
            yield path, recipe
        if not count:
            raise UsageError(f"score {shown(folder, 300)}: expected a folder of minisd batch with pictures in it, found none")


def recipe_beside(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.with_name(f"{path.name.removesuffix(path.suffix)}.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def scored(folders: Iterable[str], metrics: Mapping[str, Any] | None = None) -> dict[str, Score]:
    """Scores by model.  metrics: of torchmetrics, by "clip" (update(images, texts)) and "fid" (update(images, real=False)); they
    are handed uint8 (1, 3, H, W), and computed and reset for each model in turn.  Raises UsageError.
    """
    from .judge import asked_for, judge

    found: dict[str, Score] = {}
    by_model: dict[str, list[tuple[Path, str]]] = {}
    for path, recipe in drawn(folders):
        model, prompt = (shown(str(recipe.get(name) or ""), limit) for name, limit in (("model", 200), ("prompt", 10_000)))
        score = found.setdefault(model, Score())
        score.pictures += 1
        by_model.setdefault(model, []).append((path, prompt))
        if (wanted := asked_for(prompt)) is not None and model.startswith("tiny"):
            seen = judge(open_picture("score", path)) or ("nothing",) * 3
            marks = [one == other for one, other in zip(wanted, seen, strict=True)]
            score.judged += 1
            for name, mark in zip(PARTS, [*marks, all(marks)], strict=True):
                score.right[name] += mark
    for name, metric in (metrics or {}).items():
        for model, pictures in by_model.items():
            setattr(found[model], name, measured(name, metric, pictures))
    return found


def measured(name: str, metric: Any, pictures: Iterable[tuple[Path, str]]) -> float:
    import numpy as np
    import torch

    metric.reset()
    for path, prompt in pictures:
        pixels = torch.from_numpy(np.array(open_picture("score", path).convert("RGB"))).permute(2, 0, 1)[None]  # (1, 3, H, W)
        metric.update(pixels, [prompt]) if name == "clip" else metric.update(pixels, real=False)
    return float(metric.compute())


def metrics_of(clip: str | None, real: str | None) -> dict[str, Any]:
    """torchmetrics' CLIP score by a model of transformers (a folder, or a cached name), and FID to the pictures of a folder.

    Nothing is downloaded.  Raises UsageError, which says what is missing.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, Any] = {}
    try:
        if clip is not None:
            from torchmetrics.multimodal import CLIPScore

            found["clip"] = CLIPScore(clip)  # type: ignore[arg-type]
        if real is not None:
            found["fid"] = distance_to(Path(real))
    except ModuleNotFoundError as error:
        raise UsageError(f"score: needs {error.name}, which is not there; pip install 'minisd[score]'") from None
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"score: weights that are not at hand: {shown(' '.join(str(error).split()), 300)}") from None
    return found


def distance_to(real: Path) -> Any:
    import numpy as np
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if not weights.exists():
        raise UsageError(f"score: FID needs {INCEPTION} of torch-fidelity, expected it in {weights.parent}")
    metric = FrechetInceptionDistance(reset_real_features=False)
    for path in sorted(path for path in real.rglob("*") if path.suffix in PICTURES):
        with Image.open(path) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]
        metric.update(pixels, real=True)
    return metric


def as_text(scores: Mapping[str, Score]) -> str:
    """A line for each model."""
    rows: list[tuple[str, ...]] = [("model", "pictures", "judged", *PARTS, "CLIP", "FID")]
    for model, score in scores.items():
        facts = score.facts()
        shares = ["-" if facts[name] is None else f"{facts[name]:.1%}" for name in PARTS]
        others = ["-" if facts[name] is None else f"{facts[name]:.2f}" for name in ("clip", "fid")]
        rows.append((model or "unknown", f"{score.pictures:,}", f"{score.judged:,}", *shares, *others))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
