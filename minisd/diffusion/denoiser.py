"""From what the network predicts to what the samplers ask for: denoise(x, sigma) -> x_0, with guidance.

A network sees x scaled to unit variance and was trained to predict the noise, v, or x_0 itself.  Guidance asks it once for each
role ("negative", "positive", …) and mixes the answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from ..errors import UsageError
from .schedule import Schedule

Unet = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
Denoise = Callable[[Tensor, Tensor], Tensor]
DenoisePair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # the guided estimate and the unconditional one
Noise = Callable[[float, float], Tensor]  # (sigma, following) -> unit noise for the way between these two levels
Steps = Iterator[tuple[Tensor, Tensor]]  # (latents, estimate of the finished ones), (B, C, h, w) each


@dataclass(frozen=True)
class Network:
    """A UNet, and what its output means."""

    unet: Unet
    schedule: Schedule
    prediction: str = "epsilon"  # one of PREDICTIONS
    sigma_data: float = 1.0  # standard deviation of the latents as the network assumes it


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the UNet is told about B pictures beside the noisy latents."""

    context: Tensor  # (B, L, D), the text, token by token
    pooled: Tensor | None = None  # (B, P), the whole text in a vector, in families that have it
    vector: Tensor | None = None  # (B, A), the pooled text and the sizes, as the UNet's label_emb takes them
    extra: Tensor | None = None  # (B, C, h, w), channels beside the latents: a mask, a picture


@dataclass(frozen=True)
class Call:
    """The index-th question to the network."""

    index: int  # from 0
    step: int  # of the sampler, which may ask more than once a step
    sigma: float
    of: int | None = None  # calls in all, where the sampler makes as many whatever it sees


@dataclass(frozen=True)
class Timeline:
    """The conditioning of one role, which may change from call to call."""

    entries: tuple[tuple[int, Conditioning], ...]  # (the last call that it holds for, conditioning); the last holds to the end

    def at(self, call: Call) -> Conditioning:
        return next((conditioning for last, conditioning in self.entries if call.index <= last), self.entries[-1][1])


Observer = Callable[[Call, Tensor, Sequence[Tensor]], None]


def epsilon(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """The network predicts the noise (Ho et al. 2020, arXiv 2006.11239, eq. 15)."""
    return x - sigma * output


def v(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """It predicts v = alpha eps - s x_0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D), where alpha^2 + s^2 = 1.

    alpha = 1 / sqrt(sigma^2 + 1), s = sigma alpha, eps = (x - x_0) / sigma: so v = alpha (x - x_0) / sigma - sigma alpha x_0, and
    x_0 = x / (sigma^2 + 1) - v sigma / sqrt(sigma^2 + 1).  sigma_data stands where the picture's deviation was taken as 1.
    """
    total = sigma**2 + sigma_data**2
    return x * sigma_data**2 / total - output * sigma * sigma_data / total.sqrt()


def edm(output: Tensor, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """It predicts F in x_0 = c_skip x + c_out F (Karras et al. 2022, arXiv 2206.00364, table 1).

    c_skip = sigma_data^2 / total as for v, and c_out = + sigma sigma_data / sqrt(total): so F is v with the other sign.
    """
    return v(-output, x, sigma, sigma_data)


PREDICTIONS = {"epsilon": epsilon, "v": v, "edm": edm}


@dataclass(frozen=True)
class Known:
    """A region whose finished latents are known: x_0 is asked for where the mask is 1.

    Latents that start as known + sigma * noise then stay so, whatever the sampler (RePaint's known region, Lugmayr et al. 2022,
    arXiv 2201.09865, eq. 8a, with one noise throughout, as in diffusers).
    """

    mask: Tensor  # (1, 1, h, w), 1 where to paint, 0 where the latents are known
    latents: Tensor  # (B or 1, C, h, w)


class Guide(Protocol):
    """Mixes what the network answers for each role, (B, C, h, w) each, into one answer."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose answers it wants, such as ("negative", "positive")."""

    @property
    def on(self) -> Literal["estimate", "output"]:
        """Whether it mixes estimates of x_0, or the network's outputs as they are."""

    def __call__(self, answers: Sequence[Tensor], x: Tensor, call: Call) -> Tensor: ...


class Affine(ABC):
    """A guide that has no definition but its weights, which sum to 1: what mixes estimates may then mix outputs as well.

    A role whose weights are 0 at a call is not asked there.
    """

    on: Literal["estimate", "output"] = "output"

    @property
    def roles(self) -> tuple[str, ...]:
        return "negative", "positive"

    @abstractmethod
    def weights(self, call: Call) -> Tensor:
        """(K, B or 1), float32, for the K roles."""

    def __call__(self, answers: Sequence[Tensor], x: Tensor, call: Call) -> Tensor:
        return mix(self.weights(call), answers)


def mix(weights: Tensor, answers: Sequence[Tensor]) -> Tensor:
    """sum_k w_k e_k of K tensors (B, C, h, w), for weights (K, B or 1) that sum to 1: e_0 + sum_k w_k (e_k - e_0)."""
    total = answers[0]
    for weight, answer in zip(weights[1:], answers[1:], strict=True):
        # A number where it is the same for all pictures: a GPU need not be told it by a copy.
        factor = float(weight) if len(weight) == 1 else weight.to(total.device)[:, None, None, None]
        total = total + factor * (answer - answers[0])
    return total


def checked(weights: Tensor, roles: int) -> Tensor:
    """Weights (K, B or 1) as they must be: what sums to something else would be no mean of the answers.  Raises UsageError."""
    fits = weights.dim() == 2 and len(weights) == roles
    if not fits or not bool(((weights.sum(0) - 1).abs() < 1e-4 * weights.abs().sum(0)).all()):
        raise UsageError(
            f"guide: expected weights ({roles}, B or 1) that sum to 1 over the roles, found {weights.tolist()}"[:300]
        )
    return weights


def is_affine(guide: Guide) -> TypeGuard[Affine]:
    """Whether a guide's weights are all there is to it: a class that mixes in a way of its own is not taken for its parent."""
    return isinstance(guide, Affine) and type(guide).__call__ is Affine.__call__


@dataclass(frozen=True)
class ClassifierFree(Affine):
    """u + w (c - u), from the negative prompt u and the positive c (Ho and Salimans 2022, arXiv 2207.12598)."""

    scale: float | tuple[float, ...]  # w: of all pictures, or of each

    def weights(self, call: Call) -> Tensor:
        scale = torch.tensor(self.scale).float().view(-1)  # (B or 1,)
        return torch.stack([1 - scale, scale])


class Denoiser:
    """denoise(x, sigma) -> x_0, for the length of one walk: it counts its calls.

    conditioning: a timeline for each role of the guide.
    observe: is shown every call, x and the estimates of the roles that were asked.
    """

    def __init__(
        self,
        network: Network,
        conditioning: Sequence[Timeline],
        guide: Guide,
        known: Known | None = None,
        observe: Observer | None = None,
        total: int | None = None,
    ) -> None:
        self.network, self.conditioning, self.guide, self.known = network, conditioning, guide, known
        self.observe, self.total, self.step = observe, total, 0
        self.calls: list[Call] = []
        self.asked: list[int] = []  # the roles of the last call, by their numbers, as they stand in its batch
        self.joined: tuple[list[Conditioning], Conditioning] | None = None  # the conditions asked with last, as one batch

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:  # (B, C, h, w), () -> (B, C, h, w)
        return self.estimates(x, level(sigma))[0]

    def pair(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The guided estimate, and that of the negative prompt, which CFG++ goes on with."""
        guided, negative = self.estimates(x, level(sigma), self.guide.roles.index("negative"))
        return guided, negative

    def estimates(self, x: Tensor, sigma: Tensor, *beside: int) -> list[Tensor]:
        """The guided estimate, and those of the roles with these numbers."""
        call = Call(len(self.calls), self.step, float(sigma), self.total)
        self.calls.append(call)
        weights = checked(self.guide.weights(call), len(self.conditioning)) if is_affine(self.guide) else None
        asked = self.asked = [k for k in range(len(self.conditioning)) if weights is None or weights[k].any() or k in beside]
        outputs = self.predict(x, sigma, [self.conditioning[k].at(call) for k in asked])
        if self.observe:
            self.observe(call, x, [self.x_0(output, x, sigma) for output in outputs])
        guided = self.mixed(outputs, x, sigma, call) if weights is None else self.x_0(mix(weights[asked], outputs), x, sigma)
        found = [guided, *(self.x_0(outputs[asked.index(k)], x, sigma) for k in beside)]
        return [torch.where(self.known.mask > 0.5, each, self.known.latents) if self.known else each for each in found]

    def mixed(self, outputs: Sequence[Tensor], x: Tensor, sigma: Tensor, call: Call) -> Tensor:
        """By a guide that is not affine."""
        on_outputs = self.guide.on == "output"
        mixed = self.guide(outputs if on_outputs else [self.x_0(output, x, sigma) for output in outputs], x, call)
        if not isinstance(mixed, Tensor) or mixed.shape != x.shape:
            found = tuple(getattr(mixed, "shape", ())) or type(mixed).__name__
            raise UsageError(f"guide: expected a tensor {tuple(x.shape)} from it, found {found}")
        return self.x_0(mixed, x, sigma) if on_outputs else mixed

    def x_0(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return PREDICTIONS[self.network.prediction](output, x, sigma, self.network.sigma_data)

    def predict(self, x: Tensor, sigma: Tensor, conditions: list[Conditioning]) -> tuple[Tensor, ...]:
        """The network's output for each of the conditions, (B, C, h, w) each, in float32."""
        if self.joined is None or self.joined[0] != conditions:
            self.joined = conditions, stacked(conditions)
        batch = self.joined[1]
        x = torch.cat([x / (sigma**2 + self.network.sigma_data**2).sqrt()] * len(conditions))  # of unit variance, as in training
        if batch.extra is not None:
            x = torch.cat([x, batch.extra], dim=1)
        t = self.network.schedule.timestep(sigma).float()  # between two trained timesteps, too: their sinusoids are smooth in t
        times = torch.full((len(x),), float(t), device=x.device)  # a copy from the CPU would wait for the GPU
        return self.network.unet(x.to(batch.context.dtype), times, batch.context, batch.vector).float().chunk(len(conditions))


def level(sigma: Tensor | float) -> Tensor:
    """A noise level (), on the CPU, from what samplers hand over: a number, one for each picture, on any device."""
    if isinstance(sigma, Tensor) and sigma.dim() == 0 and sigma.device.type == "cpu":
        return sigma
    return torch.as_tensor(sigma, dtype=torch.float64).flatten()[0].cpu()


def stacked(conditions: Sequence[Conditioning]) -> Conditioning:
    """Several conditions as one batch."""

    def joined(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return Conditioning(
        torch.cat([each.context for each in conditions]),
        vector=joined([each.vector for each in conditions]),
        extra=joined([each.extra for each in conditions]),
    )
