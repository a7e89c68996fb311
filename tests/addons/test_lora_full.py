"""LoRAs and their relatives on every weight of the published architectures, at full width, against float64 written out."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from safetensors.torch import save_file

from minisd.addons.lora_file import open_addon, part_of
from minisd.addons.lora_names import targets, written_names
from minisd.models.family import SD1, SD2, SDXL
from minisd.workbench import blueprint

RANK, ALPHA = 4, 3.0
FAMILIES = {"SD 1.5": (blueprint.sd15, SD1), "SD 2.1": (blueprint.sd21, SD2), "SDXL": (blueprint.sdxl, SDXL)}
NAMES = {
    "LoRA": ("lora_up.weight", "lora_down.weight"),
    "DoRA": ("lora_up.weight", "lora_down.weight", "dora_scale"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w2"),
}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def parts_of(kind: str, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    out, columns = shape[0], torch.Size(shape[1:]).numel()
    if kind == "LoKr":
        return [noise(2, 2, seed=seed), noise(out // 2, shape[1] // 2, *shape[2:], seed=seed + 1)]
    if kind == "LoHa":
        return [noise(*size, seed=seed + i) for i, size in enumerate([(out, RANK), (RANK, columns)] * 2)]
    up = noise(out, RANK, *(1 for _ in shape[2:]), seed=seed)
    magnitude = [noise(out, *(1 for _ in shape[1:]), seed=seed + 2)] if kind == "DoRA" else []
    return [up, noise(RANK, *shape[1:], seed=seed + 1), *magnitude]


def wanted(kind: str, parts: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    a, b, *rest = (part.double() for part in parts)
    if kind == "LoKr":
        return torch.einsum("ab,cd...->acbd...", a, b).reshape(weight.shape)
    if kind == "LoHa":
        return (ALPHA / RANK * (a @ b) * (rest[0] @ rest[1])).reshape(weight.shape)
    change = (ALPHA / RANK * (a.flatten(1) @ b.flatten(1))).reshape(weight.shape)
    if kind == "LoRA":
        return change
    whole = weight.double() + change
    return rest[0] * whole / whole.flatten(1).norm(dim=1).reshape(rest[0].shape) - weight.double()


@pytest.mark.slow
@pytest.mark.xdist_group("full width")  # one at a time: up to 11 GB
@pytest.mark.parametrize("name", ["SD 1.5", *(pytest.param(name, marks=pytest.mark.seldom) for name in ("SD 2.1", "SDXL"))])
def test_every_weight(name, tmp_path):
    shapes_of, family = FAMILIES[name]
    shapes = shapes_of()
    named = written_names(targets(shapes, family), family, "kohya").items()
    matrices = [(target, word) for target, word in named if len(shapes[target.key]) > 1 and "embedding" not in target.key]
    tensors, made = {}, {}
    for i, (target, word) in enumerate(matrices):
        shape = tuple(part_of(torch.empty(shapes[target.key], device="meta"), target).shape)
        kind = list(NAMES)[i % len(NAMES)]
        parts = parts_of(kind, shape, 10 * i)
        made[word] = (kind, parts, shape)
        tensors |= {f"{word}.{end}": part for end, part in zip(NAMES[kind], parts, strict=True)}
        tensors[f"{word}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "lora.safetensors")
    addon = open_addon(tmp_path / "lora.safetensors", shapes, family)
    assert not addon.misfits
    assert len(addon.changes) == len(made) > 300
    for i, change in enumerate(addon.changes):
        kind, parts, shape = made[change.module]
        weight = noise(*shape, seed=i)
        assert relative_error(addon.change_of(change, weight, 1.0, "paper"), wanted(kind, parts, weight)) <= 1e-6, change.module
