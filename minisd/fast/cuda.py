"""How a UNet draws at full speed on a GPU: what stays the same is computed before the first step, and a step is one CUDA graph.

For a prompt: keys and values of every cross-attention, and what the time embedding adds to every block at every noise level.
Then each step is the same sequence of kernels over the same memory: the network, guidance, the sampler's update, and a counter
that chooses the next row of the tables.  The first step of a new shape runs kernel by kernel, as every step does on a CPU, and
so brings all kernels to life; then the sequence is recorded, and from the second step on replayed.  Nothing in the loop waits
for the GPU or asks for memory.

samplers.py, denoiser.py and unet.py are the definition.  `sample` is the part of it that needs no decisions on the way: Euler or
DDIM without fresh noise, predictions of noise or of v, guidance without rescaling; `plain` says whether a request is of that
kind.  All others go the plain way, with the network alone recorded (`network`).  Text encoders and the VAE's decoder are
recorded, too, from the second call on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.denoiser import ClassifierFree, Conditioning, Guide, Steps, Unet, stacked, unguided
from ..diffusion.schedule import Schedule
from ..models import ops
from ..models.clip import TextEncoder
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from ..system.memory import free_memory
from .decoder import FusedDecoder
from .graphs import KEPT, NetworkRecorder, Recorder, Recording, record, versions
from .tiling import decode_bytes
from .unet import FusedUNet


def plain(guide: Guide, prediction: str, sigma_data: float, eta: float) -> bool:
    """Whether a step is x <- a x + b e, with e the guided prediction, so that `guided_step` can make it."""
    guided = guide is unguided or (isinstance(guide, ClassifierFree) and guide.rescale == 0)
    return guided and prediction in ("epsilon", "v") and sigma_data == 1 and eta == 0


@dataclass
class Buffers:
    """The memory that the steps of one shape work in."""

    state: Tensor  # (2, B, C, h, w), float32: the latents, and the estimate of the finished ones
    model_input: Tensor  # (B or 2*B, C', h, w), channels-last, in the network's dtype
    table: Tensor  # (N, 6), float32: see kernels/guided_step.py
    shifts: Tensor  # (N, B' or 1, sum of channels), float32: see FusedUNet.shifts
    keys_values: Tensor  # (B or 2*B, S, sum of 2*C): see FusedUNet.keys_values
    step: Tensor  # (1,), int64
    recording: Recording | None = None
    refused: bool = False  # no memory to record


class Runtime:
    """Draws with one UNet.  `graphs`: record steps, which only a GPU can."""

    def __init__(self, network: UNet, graphs: bool) -> None:
        self.unet, self.graphs = network, graphs
        self.fused: FusedUNet | None = None
        self.weights: tuple[tuple[int, int], ...] = ()
        self.shapes: dict[tuple[object, ...], Buffers] = {}
        self.calls: Recorder | None = None

    def prepared(self) -> FusedUNet:
        """The fused network, made anew if somebody has changed the weights."""
        if self.fused is None or self.weights != versions(self.unet):
            self.shapes.clear()
            self.fused = fused = FusedUNet(self.unet)
            self.weights = versions(self.unet)
            self.calls = Recorder(lambda x, t, y, prompt: fused(x, fused.shifts(t, y)[0], prompt), self.graphs)
        return self.fused

    @torch.no_grad()
    def network(self, conditions: Sequence[Conditioning]) -> Unet:
        """The UNet for any sampler, to be called with these conditions, and at one timestep for the whole batch."""
        told = stacked(conditions)
        keys_values = self.prepared().keys_values(told.context)
        calls = self.calls
        assert calls is not None

        @torch.no_grad()
        def predict(x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
            return calls(x, t[:1], y, keys_values)

        return predict

    @torch.no_grad()
    def sample(
        self, x: Tensor, sigmas: Tensor, conditions: Sequence[Conditioning], guide: Guide, schedule: Schedule, prediction: str
    ) -> Steps:
        """From x (B, C, h, w) down the noise levels (N + 1,): yields (latents, denoised) N times, as samplers.py does.

        conditions, guide and the rest: as for denoiser.Denoiser, of the kind that `plain` accepts.
        """
        fused, told = self.prepared(), stacked(conditions)
        scale = guide.scale if isinstance(guide, ClassifierFree) else 1.0
        table = ops.kernels().coefficients(sigmas, scale, prediction == "v").to(x.device)
        shifts = fused.shifts(schedule.timestep(sigmas[:-1]).float().to(x.device), told.vector)
        keys_values = fused.keys_values(told.context)

        rows = max(64, 1 << (len(table) - 1).bit_length())  # so that another number of steps needs no other recording
        key = (x.shape, told.context.shape, told.context.dtype, shifts.shape[1:], rows, ops.chosen())
        # Taken out of the row while in use: two streams of one pipeline may run in turns.
        buffers = self.shapes.pop(key, None) or self.new_buffers(x, told, rows, shifts, keys_values)
        try:
            fill(buffers, x, float((sigmas[0] ** 2 + 1).rsqrt()), told.extra, table, shifts, keys_values)
            trail = torch.empty(len(table), *buffers.state.shape, device=x.device)
            for here in trail:
                if buffers.recording is not None:
                    buffers.recording.replay()
                else:
                    step(fused, buffers)
                    if self.graphs and not buffers.refused:
                        others = (each.recording for each in self.shapes.values())
                        buffers.recording = record(lambda: step(fused, buffers), others)
                        buffers.refused = buffers.recording is None
                here.copy_(buffers.state)
                yield here[0], here[1]
        finally:
            if self.fused is fused:
                self.shapes[key] = buffers  # the last of the row is the one used last
            while len(self.shapes) > KEPT:
                del self.shapes[next(iter(self.shapes))]

    def new_buffers(self, x: Tensor, told: Conditioning, rows: int, shifts: Tensor, keys_values: Tensor) -> Buffers:
        shape = (len(told.context), self.unet.in_channels, *x.shape[2:])
        model_input = torch.empty(shape, device=x.device, dtype=told.context.dtype, memory_format=torch.channels_last)
        return Buffers(
            state=torch.zeros(2, *x.shape, device=x.device),
            model_input=model_input,
            table=torch.zeros(rows, 6, device=x.device),
            shifts=torch.zeros(rows, *shifts.shape[1:], device=x.device),
            keys_values=torch.empty_like(keys_values),
            step=torch.zeros(1, device=x.device, dtype=torch.int64),
        )


def fill(
    buffers: Buffers, x: Tensor, c_in: float, extra: Tensor | None, table: Tensor, shifts: Tensor, keys_values: Tensor
) -> None:
    """Puts everything in its place for the first step; c_in: what scales x for the network."""
    buffers.table[: len(table)].copy_(table)
    buffers.shifts[: len(shifts)].copy_(shifts)
    buffers.keys_values.copy_(keys_values)
    buffers.step.zero_()
    buffers.state[0].copy_(x)
    copies, channels = len(buffers.model_input) // len(x), x.shape[1]
    buffers.model_input[:, :channels].copy_((x * c_in).repeat(copies, 1, 1, 1))
    if extra is not None:
        buffers.model_input[:, channels:].copy_(extra)


def step(fused: FusedUNet, buffers: Buffers) -> Tensor:
    """One step, all of it on the device; returns the state."""
    latents, denoised = buffers.state
    shift = buffers.shifts.index_select(0, buffers.step)[0]
    prediction = fused(buffers.model_input, shift, buffers.keys_values)
    channels = latents.shape[1]
    ops.guided_step(latents, prediction, buffers.table, buffers.step, buffers.model_input[:, :channels], denoised)
    buffers.step.add_(1)
    return buffers.state


def decoder_recorder(network: AutoencoderKL, graphs: bool) -> NetworkRecorder:
    """`AutoencoderKL.decode` at full speed, (B, C, h, w) -> (B, 3, H, W): fused, and recorded where there is memory to keep."""

    def roomy(latents: Tensor) -> bool:
        size = 4 * decode_bytes(network, latents)
        free = free_memory(latents.device, size)
        return free is not None and free >= size

    return NetworkRecorder(network, lambda: FusedDecoder(network), graphs, roomy)


def text_recorder(encoder: TextEncoder, graphs: bool) -> NetworkRecorder:
    """A text encoder's hidden states, stacked: ids (B, 77) -> (layers, B, 77, D)."""
    return NetworkRecorder(encoder, lambda: lambda ids: torch.stack(encoder.hidden_states(ids)), graphs)
