"""What a LoRA or one of its relatives changes in a weight W, (O, I) or (O, I, kh, kw): one function a kind, at strength 1.

All take float32 tensors by the names in lora_file.py, return a change of W's shape, and also run on the meta device, which is
how shapes are checked.  r is the rank, alpha / r the scale; alpha is a 0-d tensor.

Reference: LyCORIS (KohakuBlueleaf/LyCORIS, lycoris/modules), kohya-ss/sd-scripts networks/oft.py, peft; where ComfyUI's
weight_adapter/ has another rule, `rule` "comfyui" means that one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
EPS = torch.finfo(torch.float32).eps
RULES = ("paper", "comfyui")


def scaled(change: Tensor, parts: Parts, rank: int) -> Tensor:
    """By alpha / r; a file without alpha means r."""
    return change * (parts["alpha"].reshape(()) / rank) if "alpha" in parts else change


def shaped(change: Tensor, weight: Tensor) -> Tensor:
    """A change whose kernel places may lie in a row, or be missing, in the weight's shape.  Raises RuntimeError."""
    if len(change) != len(weight):
        raise RuntimeError(f"a change of {tuple(change.shape)} for {tuple(weight.shape)}")
    return change.reshape(weight.shape)


def lora(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """up @ down (Hu et al. 2021, arXiv 2106.09685), for convolutions with a Tucker core between them if there is a mid."""
    up, down = parts["up"], parts["down"]
    if "mid" in parts:
        change = torch.einsum("om,mnhw,ni->oihw", up.flatten(1), parts["mid"], down.flatten(1))
    else:
        change = up.flatten(1) @ down.flatten(1)
    return scaled(shaped(change, weight), parts, len(down))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(p, q, kh, kw), (p, O), (q, I) -> (O, I, kh, kw)."""
    return torch.einsum("pqhw,po,qi->oihw", core, a, b)


def loha(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """The elementwise product of two (FedPara: Hyeon-Woo et al. 2021, arXiv 2108.06098)."""
    halves = []
    for n in "12":
        a, b, core = parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")
        halves.append(tucker(core, a, b) if core is not None else a @ b)
    return scaled(shaped(halves[0] * halves[1], weight), parts, len(parts["hada_w1_b"]))


def lokr(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """The Kronecker product of two matrices, each whole or a product (Yeh et al. 2023, arXiv 2309.14859).

    With both whole alpha has no meaning, whatever it is.
    """
    rank, factors = None, []
    for n in "12":
        if f"lokr_w{n}" in parts:
            factors.append(parts[f"lokr_w{n}"])
            continue
        a, b = parts[f"lokr_w{n}_a"], parts[f"lokr_w{n}_b"]
        rank = len(b)
        factors.append(tucker(parts["lokr_t2"], a, b) if n == "2" and "lokr_t2" in parts else a @ b)
    change = shaped(torch.kron(factors[0], factors[1].flatten(1).contiguous()), weight)
    return change if rank is None else scaled(change, parts, rank)


def glora(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """W A + B, both of low rank (Chavan et al. 2023, arXiv 2306.07967), in LyCORIS' layout or its first."""
    a1, a2, b1, b2 = (parts[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == len(b1) == len(a1) == a2.shape[1]
    new = len(b2) == b1.shape[1] == a1.shape[1] == len(a2)
    if old and (not new or (weight.shape[0] == weight.shape[1] == len(a2))):
        on_input, added, rank = a2 @ a1, b2 @ parts["b1"].flatten(1), len(a1)
    else:
        on_input, added, rank = a1 @ a2, b1 @ b2, len(a2)
    change = torch.einsum("oi...,ij->oj...", weight, on_input) + shaped(added, weight)
    return scaled(change, parts, rank)


def turns(blocks: Tensor, parts: Parts, rows: int, rule: str) -> Tensor:
    """R - I for R = (I + Q)(I - Q)^-1 and the skew part Q of each block (..., z, z).

    The norm of all Q together is bounded by alpha times the rows (kohya, LyCORIS), or by alpha (ComfyUI).
    """
    if blocks.shape[-3] * blocks.shape[-1] != rows:
        raise RuntimeError(f"blocks of {tuple(blocks.shape)} for {rows} rows")
    q = blocks - blocks.mT
    if "alpha" in parts:
        bound = parts["alpha"].reshape(()) * (rows if rule == "paper" else 1)
        norm = q.norm() + 1e-8
        q = torch.where((bound > 0) & (norm > bound), q * (bound / norm), q)
    return 2 * q @ torch.linalg.inv(torch.eye(q.shape[-1], device=q.device) - q)


def oft(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """Blocks of z rows, each turned (Qiu et al. 2023, arXiv 2306.07280): sum_n R[k, n, m] W[k, n]."""
    blocks = parts["oft_blocks"]
    rows = weight.reshape(len(blocks), blocks.shape[-1], -1)
    change = (turns(blocks, parts, weight.shape[0], rule).mT @ rows).reshape(weight.shape)
    return rescaled(change, parts if rule == "paper" else {}, weight)


def boft(parts: Parts, weight: Tensor, rule: str, share: float = 1.0) -> Tensor:
    """Stages of such turns over rows that lie ever further apart (Liu et al. 2023, arXiv 2311.06243): sum_n R[b, m, n] W[b, n].

    share: how far each stage is on its way from the identity, which is ComfyUI's strength.
    """
    blocks = parts["oft_blocks"]
    size = blocks.shape[-1]
    turned = weight.flatten(1)
    for i, turn in enumerate(share * turns(blocks, parts, weight.shape[0], rule)):
        apart = 2**i * size // 2
        mixed = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).reshape(len(turn), size, -1)
        turned = (mixed + turn @ mixed).reshape(-1, apart, 2, turned.shape[1]).transpose(1, 2).flatten(0, 2)
    return rescaled(turned.reshape(weight.shape) - weight, parts, weight)


def rescaled(change: Tensor, parts: Parts, weight: Tensor) -> Tensor:
    """With a factor for each row of the turned weight, if there is one."""
    return change if "rescale" not in parts else per_axis(parts["rescale"], weight, 0) * (weight + change) - weight


def per_axis(vector: Tensor, weight: Tensor, axis: int) -> Tensor:
    """As many numbers as an axis of the weight has, in its dimensions."""
    return vector.reshape([-1 if i == axis else 1 for i in range(weight.dim())])


def ia3(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """A factor for every output or, with on_input, every input (Liu et al. 2022, arXiv 2205.05638)."""
    factors, (outputs, inputs, *_) = parts["weight"], weight.shape
    if outputs != inputs:
        return weight * per_axis(factors, weight, int(factors.numel() == inputs))
    return weight * torch.where(parts["on_input"].bool(), per_axis(factors, weight, 1), per_axis(factors, weight, 0))


def full(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """The whole change, of a weight or of a norm's."""
    return shaped(parts["diff"], weight)


def replaced(parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """Another weight."""
    return shaped(parts["set"], weight) - weight


KINDS: dict[str, Callable[[Parts, Tensor, str], Tensor]] = {
    "LoRA": lora, "LoHa": loha, "LoKr": lokr, "GLoRA": glora, "OFT": oft, "BOFT": boft, "IA3": ia3, "full": full, "set": replaced,
}  # fmt: skip


def delta(kind: str, parts: Parts, weight: Tensor, strength: float = 1.0, rule: str = "paper") -> Tensor:
    """The change of a weight by an add-on of a kind: `strength` times the change at strength 1.

    weight: float32, as the file has it.  rule: "paper", or "comfyui" for a picture of it, which squares the strength of OFT,
    bends that of BOFT, and replaces weights whatever it is.  Raises RuntimeError where the shapes do not fit.
    """
    bent = rule == "comfyui" and kind == "BOFT"
    change = boft(parts, weight, rule, strength) if bent else KINDS[kind](parts, weight, rule)
    if "dora" in parts or "magnitude" in parts:
        change = decomposed(change, parts, weight, rule)
    if rule == "comfyui":
        strength = {"OFT": strength**2, "set": 1.0}.get(kind, strength)
    return change * strength


def decomposed(change: Tensor, parts: Parts, weight: Tensor, rule: str) -> Tensor:
    """DoRA (Liu et al. 2024, arXiv 2402.09353): m V / |V| for V = W + change, minus W; m has its place on the axis that is not 1.

    ComfyUI divides by |W| where that is the output axis.  PEFT's magnitude is always the output's, however it is stored.
    """
    if "magnitude" in parts:
        magnitude, axis = parts["magnitude"].flatten(), 0
    else:
        magnitude = parts["dora"]
        axis = next((i for i, size in enumerate(magnitude.shape) if size != 1), 0) if magnitude.dim() > 1 else 0
    whole = weight + change
    measured = weight if rule == "comfyui" and axis == 0 else whole
    others = [i for i in range(weight.dim()) if i != axis]
    norm = torch.linalg.vector_norm(measured, dim=others, keepdim=True) + EPS
    return whole * (per_axis(magnitude, weight, axis) / norm) - weight
