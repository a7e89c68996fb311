"""What each kind of add-on changes, against the formula written out in float64, and against peft."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minisd.addons.lora_formulas import delta

OUT, IN, RANK = 12, 8, 4
SHAPES = [(OUT, IN), (OUT, IN, 1, 1), (OUT, IN, 3, 3)]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


GENERATOR = torch.Generator().manual_seed(0)


def single(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.float() for name, part in parts.items()}


def near(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_lora(shape, alpha):
    weight = randn(*shape)
    parts = {"up": randn(OUT, RANK, *(1 for _ in shape[2:])), "down": randn(RANK, *shape[1:])}
    expected = torch.zeros(shape, dtype=torch.float64)
    for r in range(RANK):
        expected += parts["up"].reshape(OUT, RANK)[:, r].reshape(-1, *(1 for _ in shape[1:])) * parts["down"][r]
    if alpha:
        parts["alpha"] = torch.tensor(alpha)
        expected *= alpha / RANK
    near(delta("LoRA", single(parts), weight.float()), expected)


def test_lora_of_one_dimensionality_on_a_weight_of_another():
    up, down = randn(OUT, RANK), randn(RANK, IN)
    for shape in ((OUT, IN), (OUT, IN, 1, 1)):
        expected = (up @ down).reshape(shape)
        for parts in ({"up": up, "down": down}, {"up": up[:, :, None, None], "down": down[:, :, None, None]}):
            near(delta("LoRA", single(parts), randn(*shape).float()), expected)


def tucker(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """(p, q, kh, kw), (O, p), (q, I): one kernel place after the other."""
    places = [outer @ core[:, :, y, x] @ inner for y in range(core.shape[2]) for x in range(core.shape[3])]
    return torch.stack(places, dim=-1).reshape(len(outer), inner.shape[1], *core.shape[2:])


def test_tucker_cores():
    weight, core = randn(OUT, IN, 3, 3), randn(RANK, RANK, 3, 3)
    parts = {"up": randn(OUT, RANK, 1, 1), "mid": core, "down": randn(RANK, IN, 1, 1), "alpha": torch.tensor(2.0)}
    expected = tucker(core, parts["up"][:, :, 0, 0], parts["down"][:, :, 0, 0]) / 2
    near(delta("LoRA", single(parts), weight.float()), expected)

    other = randn(RANK, RANK, 3, 3)
    parts = {f"hada_w{n}_a": randn(RANK, OUT) for n in "12"} | {f"hada_w{n}_b": randn(RANK, IN) for n in "12"}
    parts |= {"hada_t1": core, "hada_t2": other}
    halves = [tucker(t, parts[f"hada_w{n}_a"].T, parts[f"hada_w{n}_b"]) for n, t in (("1", core), ("2", other))]
    near(delta("LoHa", single(parts), weight.float()), halves[0] * halves[1])

    core = randn(RANK, RANK, 3, 3)
    parts = {"lokr_w1": randn(3, 2), "lokr_t2": core, "lokr_w2_a": randn(RANK, 4), "lokr_w2_b": randn(RANK, 4)}
    parts["alpha"] = torch.tensor(1.0)
    second = tucker(core, parts["lokr_w2_a"].T, parts["lokr_w2_b"])
    near(delta("LoKr", single(parts), weight.float()), kronecker(parts["lokr_w1"], second) / RANK)


def kronecker(first: Tensor, second: Tensor) -> Tensor:
    """d[a B + b, c D + d] = w1[a, c] w2[b, d], entry by entry."""
    (a_, c_), (b_, d_) = first.shape, second.shape[:2]
    found = torch.zeros(a_ * b_, c_ * d_, *second.shape[2:], dtype=torch.float64)
    for a in range(a_):
        for c in range(c_):
            found[a * b_ : (a + 1) * b_, c * d_ : (c + 1) * d_] = first[a, c] * second
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loha(shape):
    k = torch.tensor(shape[2:]).prod().int().item() if shape[2:] else 1
    parts = {f"hada_w{n}_a": randn(OUT, RANK) for n in "12"} | {f"hada_w{n}_b": randn(RANK, IN * k) for n in "12"}
    parts["alpha"] = torch.tensor(1.0)
    expected = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"]) / RANK
    near(delta("LoHa", single(parts), randn(*shape).float()), expected.reshape(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("whole", [(True, True), (True, False), (False, True), (False, False)])
def test_lokr(shape, whole):
    kernel = shape[2:]
    k = 9 if kernel == (3, 3) else 1
    parts = {"alpha": torch.tensor(2.0)}
    if whole[0]:
        first = parts["lokr_w1"] = randn(3, 2)
    else:
        parts |= {"lokr_w1_a": randn(3, RANK), "lokr_w1_b": randn(RANK, 2)}
        first = parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if whole[1]:
        second = parts["lokr_w2"] = randn(4, 4, *kernel)
    else:
        parts |= {"lokr_w2_a": randn(4, RANK), "lokr_w2_b": randn(RANK, 4 * k)}
        second = (parts["lokr_w2_a"] @ parts["lokr_w2_b"]).reshape(4, 4, *kernel)
    expected = kronecker(first, second) * (1 if all(whole) else 2 / RANK)  # with both whole alpha means nothing
    near(delta("LoKr", single(parts), randn(*shape).float()), expected)


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_glora_in_both_layouts(kernel):
    weight, one = randn(OUT, IN, *kernel), (1,) * len(kernel)
    new = {"a1": randn(IN, RANK, *one), "a2": randn(RANK, IN, *one), "b1": randn(OUT, RANK, *one), "b2": randn(RANK, IN, *kernel)}
    on_input = new["a1"].reshape(IN, RANK) @ new["a2"].reshape(RANK, IN)
    expected = torch.einsum("oi...,ij->oj...", weight, on_input)
    expected = expected + (new["b1"].reshape(OUT, RANK) @ new["b2"].flatten(1)).reshape(weight.shape)
    near(delta("GLoRA", single(new | {"alpha": torch.tensor(1.0)}), weight.float()), expected / RANK)
    old = {"a1": randn(RANK, IN, *one), "a2": randn(IN, RANK, *one), "b1": randn(RANK, IN, *kernel), "b2": randn(OUT, RANK, *one)}
    on_input = old["a2"].reshape(IN, RANK) @ old["a1"].reshape(RANK, IN)
    expected = torch.einsum("oi...,ij->oj...", weight, on_input)
    expected = expected + (old["b2"].reshape(OUT, RANK) @ old["b1"].flatten(1)).reshape(weight.shape)
    near(delta("GLoRA", single(old), weight.float()), expected)


def rotation(block: Tensor) -> Tensor:
    q, eye = block - block.T, torch.eye(len(block), dtype=torch.float64)
    return (eye + q) @ (eye - q).inverse()


def bounded(blocks: Tensor, bound: float) -> Tensor:
    """Blocks whose skew parts together have no larger norm."""
    norm = (blocks - blocks.mT).norm()
    return blocks * min(1.0, bound / float(norm))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("alpha", "rule"), [(None, "paper"), (0.01, "paper"), (0.01, "comfyui"), (1e9, "paper"), (0.0, "paper")])
def test_oft(shape, alpha, rule):
    weight, blocks = randn(*shape), randn(3, 4, 4) * 0.3
    parts = {"oft_blocks": blocks}
    if alpha is not None:
        parts["alpha"] = torch.tensor(alpha)
    free = alpha in (None, 0.0)
    used = blocks if free else bounded(blocks, alpha * (OUT if rule == "paper" else 1))
    rows = weight.reshape(3, 4, -1)
    turned = [sum(rotation(used[k])[n, m] * rows[k, n] for n in range(4)) for k in range(3) for m in range(4)]
    expected = torch.stack(turned).reshape(shape) - weight
    near(delta("OFT", single(parts), weight.float(), rule=rule), expected)
    if rule == "comfyui":
        near(delta("OFT", single(parts), weight.float(), 0.7, rule), expected * 0.49)
    else:
        near(delta("OFT", single(parts), weight.float(), 0.7), expected * 0.7)
        rescale = randn(OUT, *(1 for _ in shape[1:]))
        near(delta("OFT", single(parts | {"rescale": rescale}), weight.float()), rescale * (expected + weight) - weight)


@pytest.mark.parametrize("shape", [(16, 6), (16, 6, 3, 3)], ids=str)
def test_boft(shape):
    """Stage i turns rows together that are 2^i z / 2 apart, z of them at a time."""
    z, n, stages = 4, 4, 3
    weight, blocks = randn(*shape), randn(stages, n, z, z) * 0.3
    rows = weight.reshape(16, -1)
    for i in range(stages):
        apart = 2**i * z // 2
        order = [c * 2 * apart + g * apart + k for c in range(16 // (2 * apart)) for k in range(apart) for g in range(2)]
        mixed = rows[order].reshape(n, z, -1)
        mixed = torch.stack([rotation(blocks[i, b]) @ mixed[b] for b in range(n)]).reshape(16, -1)
        rows = torch.empty_like(rows)
        rows[order] = mixed
    expected = rows.reshape(shape) - weight
    near(delta("BOFT", single({"oft_blocks": blocks}), weight.float()), expected)
    near(delta("BOFT", single({"oft_blocks": blocks}), weight.float(), 0.3), expected * 0.3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_dora(shape, axis):
    weight, parts = randn(*shape), {"up": randn(OUT, RANK), "down": randn(RANK, *shape[1:]), "alpha": torch.tensor(2.0)}
    if shape[2:] == (3, 3):
        parts["up"] = parts["up"][:, :, None, None]
    change = (parts["up"].flatten(1) @ parts["down"].flatten(1)).reshape(shape) / 2
    magnitude = randn(*(size if i == axis else 1 for i, size in enumerate(shape))).abs()
    others = [i for i in range(len(shape)) if i != axis]
    whole = weight + change
    expected = magnitude * whole / torch.linalg.vector_norm(whole, dim=others, keepdim=True) - weight
    near(delta("LoRA", single(parts | {"dora": magnitude}), weight.float()), expected)
    near(delta("LoRA", single(parts | {"dora": magnitude}), weight.float(), 0.5), expected / 2)
    if axis == 0:
        near(delta("LoRA", single(parts | {"dora": magnitude.flatten()}), weight.float()), expected)
        near(delta("LoRA", single(parts | {"magnitude": magnitude.flatten()}), weight.float()), expected)
        theirs = magnitude * whole / torch.linalg.vector_norm(weight, dim=others, keepdim=True) - weight
        near(delta("LoRA", single(parts | {"dora": magnitude}), weight.float(), rule="comfyui"), theirs)
    else:
        near(delta("LoRA", single(parts | {"dora": magnitude}), weight.float(), rule="comfyui"), expected)


def test_ia3_full_norm_and_set():
    weight, square = randn(OUT, IN), randn(IN, IN)
    for shape in ((IN,), (1, IN)):
        parts = {"weight": randn(*shape), "on_input": torch.tensor(1.0)}
        near(delta("IA3", single(parts), weight.float()), weight * parts["weight"].reshape(1, IN))
        near(delta("IA3", single(parts), square.float()), square * parts["weight"].reshape(1, IN))
    parts = {"weight": randn(1, IN), "on_input": torch.tensor(0.0)}
    near(delta("IA3", single(parts), square.float()), square * parts["weight"].reshape(IN, 1))
    change = randn(OUT, IN)
    near(delta("full", {"diff": change.float()}, weight.float(), 0.5), change / 2)
    near(delta("set", {"set": change.float()}, weight.float()), change - weight)
    near(delta("set", {"set": change.float()}, weight.float(), 0.5, "comfyui"), change - weight)


def test_shapes_that_hold_as_many_numbers_are_no_fit():
    weight = torch.zeros(OUT, IN)
    for parts in (
        {"up": torch.zeros(IN, RANK), "down": torch.zeros(RANK, OUT)},
        {"diff": torch.zeros(IN, OUT)},
    ):
        with pytest.raises(RuntimeError):
            delta("full" if "diff" in parts else "LoRA", parts, weight)
    with pytest.raises(RuntimeError):
        delta("OFT", {"oft_blocks": torch.zeros(2, 3, 3)}, weight)


def test_kinds_of_peft():
    """Their modules, trained away from zero, merged by peft itself (which alone heeds alpha in a LoKr of whole factors)."""
    import peft

    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv = torch.nn.Linear(IN, OUT, bias=False), torch.nn.Conv2d(IN, OUT, 3, bias=False)

    for config in (
        peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["lin", "conv"], init_lora_weights=False),
        peft.LoraConfig(r=RANK, lora_alpha=6, target_modules=["lin", "conv"], init_lora_weights=False, use_dora=True),
        peft.LoHaConfig(r=RANK, alpha=6, target_modules=["lin", "conv"], init_weights=False),
        peft.LoKrConfig(r=RANK, alpha=RANK, target_modules=["lin", "conv"], init_weights=False),
    ):
        net = Net()
        base = {name: value.clone() for name, value in net.state_dict().items()}
        model = peft.get_peft_model(net, config)
        state = {
            key.removeprefix("base_model.model."): value.clone() for key, value in peft.get_peft_model_state_dict(model).items()
        }
        for key in state:
            if "magnitude" in key:
                state[key] = state[key] * 1.1
        peft.set_peft_model_state_dict(model, {f"base_model.model.{key}": value for key, value in state.items()})
        merged = model.merge_and_unload().state_dict()
        for name in ("lin", "conv"):
            own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(name)}
            names = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "magnitude"}
            parts = {names.get(key, key): value for key, value in own.items()} | {
                "alpha": torch.tensor(float(getattr(config, "alpha", 6)))
            }
            kind = {"LoraConfig": "LoRA", "LoHaConfig": "LoHa", "LoKrConfig": "LoKr"}[type(config).__name__]
            near(delta(kind, parts, base[f"{name}.weight"]), (merged[f"{name}.weight"] - base[f"{name}.weight"]).double())
