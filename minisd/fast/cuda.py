"""How a UNet draws at full speed on a GPU: what stays the same is computed before the first step, and a call is one CUDA graph.

For a prompt: keys and values of every cross-attention, and what the time embedding adds to every block at every noise level.
Then each call is the same sequence of kernels over the same memory: the network, guidance, the next row of the sampler's program,
and a counter that chooses it.  The first call of a new shape runs kernel by kernel, as every one does on a CPU, and so brings all
kernels to life; then the sequence is recorded, and from the second call on replayed.  Nothing in the loop asks for memory, and
the host runs no more than two calls ahead, so that progress is honest and a stop is one.

ways.py says which walks are drawn so.  All others call the fused network, recorded, from the sampler's own generator, or go the
plain way.  Text encoders and the VAE's decoder are recorded, too, from the second call on.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Affine, Call, Conditioning, Noise, Unet, checked, stacked
from ..diffusion.program import Program
from ..models.clip import TextEncoder
from ..models.unet import UNet
from ..models.vae import AutoencoderKL
from ..system.memory import free_memory
from . import operations
from .choice import chosen, kernels
from .decoder import FusedDecoder, Make, vae_layer
from .engine import moments
from .graphs import KEPT, NetworkRecorder, Recorder, Recording, addresses, record, turn, versions
from .tiling import decode_bytes
from .unet import FusedUNet
from .ways import Moment, Snapshot, Walk, Way, lasting, structure, touched, way

AHEAD = 2  # calls that the host may be ahead of the GPU
Roles = tuple[int, ...]
Form = Callable[[UNet], FusedUNet]


@dataclass
class Buffers:
    """The memory that the calls of one shape work in: K roles, B pictures, up to N calls and R rows of history."""

    history: Tensor  # (R, B, C, h, w), float32: see diffusion/program.py
    asked: Tensor  # (B, C, h, w), float32: what the network is asked about next
    model_input: Tensor  # (K*B, C', h, w), channels-last, in the network's dtype; beyond its channels, zeros
    table: Tensor  # (N, 4 + R), float32: see kernels/linear_step.py
    weights: Tensor  # (N, K, B), float32: the guide's
    shifts: Tensor  # (N, K*B or 1, sum of channels), float32: see FusedUNet.shifts
    keys_values: Tensor  # (K*B, S, sum of 2*C): see FusedUNet.keys_values
    known: dict[str, Tensor]  # the known region, where there is one: known (B, C, h, w) and mask (B, 1, h, w)
    call: Tensor  # (1,), int64: the row of the tables
    recordings: dict[Roles, Recording | None] = field(default_factory=dict)  # by the roles asked; None: no memory for one


@dataclass(frozen=True)
class Course:
    """What a recorded walk does at each of its calls, as the host knows it."""

    program: Program
    calls: Sequence[Call]
    roles: Sequence[Roles]  # of each call: those whose weights are not all 0
    weights: Tensor  # (calls, K, B)
    conditioning: Sequence[Conditioning]  # of each call, all roles in one batch: the same object while they stay

    def still(self, walk: Walk, following: int) -> bool:
        """Whether the guide says of the next call what it said before the first."""
        if following == len(self.calls):
            return True
        assert isinstance(walk.guide, Affine)
        return torch.equal(walk.guide.weights(self.calls[following]).expand_as(self.weights[0]), self.weights[following])


def course_of(walk: Walk, count: int) -> Course:
    """For `count` pictures."""
    program, guide = walk.program, walk.guide
    assert program is not None
    assert isinstance(guide, Affine)
    steps = [sum(done <= i for done in program.done) for i in range(len(program.sigmas))]
    calls = [Call(i, step, float(program.sigmas[i]), len(steps)) for i, step in enumerate(steps)]
    weights = torch.stack([checked(guide.weights(call), len(walk.conditioning)).expand(-1, count) for call in calls])
    roles = [tuple(k for k, weight in enumerate(row) if weight.any()) for row in weights]
    batches: dict[tuple[int, ...], Conditioning] = {}
    batched = []
    for call in calls:
        conditions = [each.at(call) for each in walk.conditioning]
        key = tuple(map(id, conditions))
        if key not in batches:
            batches[key] = stacked(conditions)
        batched.append(batches[key])
    return Course(program, calls, roles, weights, batched)


class Cuda:
    """Draws with one model.  `graphs`: record calls, which only a GPU can."""

    def __init__(self, unet: UNet, graphs: bool, others: Iterable[nn.Module] = ()) -> None:
        self.unet, self.graphs = unet, graphs
        self.form: Form | None = FusedUNet  # None: the UNet has no form but its modules
        self.built = {network: structure(network) for network in (unet, *others)}  # before anybody touches them
        self.fused: FusedUNet | None = None
        self.weights: tuple[object, object] = (None, None)  # where they lie, and how often each was written to
        self.shapes: dict[tuple[object, ...], Buffers] = {}
        self.network_calls: Recorder | None = None
        self.recorders: dict[nn.Module, NetworkRecorder] = {}
        self.said: set[str] = set()

    def way(self, walk: Walk, x: Tensor) -> tuple[Way, str]:
        if walk.network.unet is not self.unet:
            return "plain", "the network is not the pipeline's own"
        if self.form is None:
            return "plain", "its layers are in a form that only its modules know"
        return way(walk, x, self.built[self.unet])

    def walk(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        taken, why = self.way(walk, x)
        if why:
            self.say(why if taken == "plain" else f"{why}; only the network is recorded")
        if taken == "plain":
            return moments(walk, walk.denoiser(), x, noise, taken)
        if taken == "network":
            return moments(walk, walk.denoiser(self.network()), x, noise, taken)
        return self.recorded(walk, x, noise)

    def say(self, why: str) -> None:
        if why not in self.said:
            self.said.add(why)
            warnings.warn(f"drawing slower than this device can: {why}", stacklevel=2)

    def fuse(self) -> FusedUNet:
        assert self.form is not None
        return self.form(self.unet)

    def prepared(self) -> FusedUNet:
        """The fused network: made anew if weights were replaced; if they were written to, with what follows from them renewed."""
        if self.fused is None or self.weights[0] != addresses(self.unet):
            self.shapes.clear()
            with lasting():  # or nobody could tell when they are written to
                self.fused = fused = self.fuse()
            self.network_calls = Recorder(lambda x, t, y, prompt: fused(x, fused.shifts(t, y)[0], prompt), self.graphs)
        elif self.weights[1] != versions(self.unet):
            self.fused.refresh()
        self.weights = addresses(self.unet), versions(self.unet)
        return self.fused

    @torch.no_grad()
    def refresh(self) -> None:
        if self.fused is not None:
            self.fused.refresh()
        for recorder in self.recorders.values():
            recorder.refresh()

    @torch.no_grad()
    def network(self) -> Unet:
        """The UNet for any sampler, to be called at one timestep for the whole batch."""
        held: list[Any] = [None, None, None]  # the network as it was, the context of the call before, its keys and values

        @torch.no_grad()
        def predict(x: Tensor, t: Tensor, context: Tensor, y: Tensor | None) -> Tensor:
            if held[0] is None or not held[0].still():  # at first, and where somebody has changed it since
                if why := touched(self.unet, self.built[self.unet]):
                    self.say(why)
                    return self.unet(x, t, context, y)
                self.prepared()
                held[:] = Snapshot(self.unet), None, None
            fused, calls = self.fused, self.network_calls
            assert fused is not None
            assert calls is not None
            if held[1] is not context:
                held[1:] = context, fused.keys_values(context)
            return calls(x, t[:1], y, held[2])

        return predict

    @torch.no_grad()
    def recorded(self, walk: Walk, x: Tensor, noise: Noise) -> Iterator[Moment]:
        """A walk by its program."""
        fused, course, snapshot = self.prepared(), course_of(walk, len(x)), Snapshot(self.unet)
        program = course.program
        vectors = {0: x} | {row: noise(draw.sigma, draw.following) for row, draw in program.draws}
        shape = tuple(1 << max(5, (size - 1).bit_length()) for size in program.questions.shape)  # so that a few steps more need
        key = self.key(walk, x, course, shape)  # no other recording
        # Taken out of the row while in use: two streams of one pipeline may run in turns.
        buffers = self.shapes.pop(key, None) or self.new_buffers(walk, x, course.conditioning[0], shape)
        with lasting():
            kept = [(torch.empty_like(buffers.asked), torch.empty_like(buffers.asked)) for _ in program.done]
        try:
            fill(buffers, fused, walk, course, vectors)
            ahead: deque[Any] = deque()
            first, before = 0, x
            for step, (latents, denoised) in enumerate(kept):
                for i in range(first, program.done[step]):
                    if i and course.conditioning[i] is not course.conditioning[i - 1]:
                        set_conditioning(buffers, fused, course.conditioning[i], x.shape[1])
                    self.run(fused, buffers, course.roles[i])
                    keep_pace(ahead, x.device)
                write_moment(buffers, program, step, latents, denoised)
                written = latents._version, denoised._version
                yield Moment(latents, denoised, before, course.calls[first] if first < program.done[step] else None, "recorded")
                edits = [x if x._version != version else None for x, version in zip((latents, denoised), written, strict=True)]
                edited = any(x is not None for x in edits)
                if edited:
                    self.say("a caller edits the steps; only the network is recorded")
                first, before = program.done[step], latents
                if edited or not snapshot.still() or not course.still(walk, first):
                    yield from self.edited(walk, program, buffers.history.clone(), step, edits)
                    return
        finally:
            if self.fused is fused:
                self.shapes[key] = buffers  # the last of the row is the one used last
            while len(self.shapes) > KEPT:
                del self.shapes[next(iter(self.shapes))]

    def run(self, fused: FusedUNet, buffers: Buffers, roles: Roles) -> None:
        with turn(buffers.asked.device):
            recording = buffers.recordings.get(roles)
            if recording is not None:
                recording.replay()
                return
            call(fused, buffers, roles)
            if self.graphs and roles not in buffers.recordings:
                others = (each for held in (buffers, *self.shapes.values()) for each in held.recordings.values())
                buffers.recordings[roles] = record(lambda: call(fused, buffers, roles), others)

    def edited(
        self, walk: Walk, program: Program, history: Tensor, step: int, edits: Sequence[Tensor | None]
    ) -> Iterator[Moment]:
        """Goes on by the sampler's own generator from what a caller has written to after this step: latents and estimate.

        The generator takes its way up to there once more, over the answers and the noise that it had.
        """
        answers = iter([history[row] for row in program.estimates[: program.done[step]]])
        draws = iter([history[row] for row, _ in program.draws])
        denoise = walk.denoiser(self.network())

        def ask(x: Tensor, sigma: Tensor) -> Tensor:
            answer = next(answers, None)
            if answer is None:
                return denoise(x, sigma)
            denoise.calls.append(Call(len(denoise.calls), denoise.step, float(sigma), denoise.total))
            return answer

        again = moments(walk, denoise, history[0], lambda *_: next(draws), "network", ask)
        for _ in range(step):
            next(again)
        moment = next(again)
        for target, edit in ((moment.denoised, edits[1]), (moment.latents, edits[0])):  # which may be one and the same
            if edit is not None:
                target.copy_(edit)
        yield from again

    def key(self, walk: Walk, x: Tensor, course: Course, shape: tuple[int, ...]) -> tuple[object, ...]:
        """Of what buffers of one shape serve: everything but numbers."""
        first, roles = course.conditioning[0], len(walk.conditioning)
        vector = None if first.vector is None else first.vector.shape
        return x.shape, first.context.shape, first.context.dtype, vector, shape, roles, walk.known is not None, chosen()

    @lasting()
    def new_buffers(self, walk: Walk, x: Tensor, conditioning: Conditioning, shape: tuple[int, ...]) -> Buffers:
        calls, rows = shape
        batch, here = len(conditioning.context), x.device
        assert self.fused is not None
        wide, dtype = (batch, self.fused.conv_in.channels(here), *x.shape[2:]), conditioning.context.dtype
        masked = {"known": torch.zeros(x.shape, device=here), "mask": torch.zeros(len(x), 1, *x.shape[2:], device=here)}
        return Buffers(
            history=torch.zeros(rows, *x.shape, device=here),
            asked=torch.zeros(x.shape, device=here),
            model_input=torch.zeros(wide, dtype=dtype, device=here).to(memory_format=torch.channels_last),
            table=torch.zeros(calls, 4 + rows, device=here),
            weights=torch.zeros(calls, len(walk.conditioning), len(x), device=here),
            shifts=torch.zeros(calls, batch if conditioning.vector is not None else 1, len(self.fused.shift_bias), device=here),
            keys_values=torch.empty(*conditioning.context.shape[:2], len(self.fused.kv), dtype=dtype, device=here),
            known=masked if walk.known else {},
            call=torch.zeros(1, dtype=torch.int64, device=here),
        )

    def read(self, encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
        recorder = self.recorder(encoder, lambda: text_recorder(encoder, self.graphs))
        return recorder(ids).unbind() if recorder else encoder.hidden_states(ids)

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        recorder = self.recorder(vae, lambda: decoder_recorder(vae, self.graphs))
        return recorder(latents) if recorder else vae.decode(latents)

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        self.recorders.pop(old, None)
        self.built.pop(old, None)
        self.built[new] = structure(new)

    def reform(self, form: Form | None) -> None:
        self.form, self.fused, self.network_calls = form, None, None
        self.shapes.clear()
        self.replace(self.unet, self.unet)

    def recorder(self, network: nn.Module, make: Any) -> NetworkRecorder | None:
        """What records this network, unless somebody has touched it."""
        if network not in self.built:
            self.built[network] = structure(network)
        if network not in self.recorders:
            self.recorders[network] = make()
        if why := touched(network, self.built[network]):
            self.say(f"{type(network).__name__}: {why}")
            return None
        return self.recorders[network]


def fill(buffers: Buffers, fused: FusedUNet, walk: Walk, course: Course, vectors: dict[int, Tensor]) -> None:
    """Puts everything in its place for the first call."""
    program, network = course.program, walk.network
    buffers.history.zero_()
    for row, vector in vectors.items():
        buffers.history[row].copy_(vector)
    count = len(course.calls)
    following = torch.cat([program.questions[1:], program.latents[-1:]])  # what each call leaves in `asked`
    p, q = kernels().prediction_coefficients(network.prediction, program.sigmas, network.sigma_data)
    c_in = (program.sigmas**2 + network.sigma_data**2).rsqrt()
    rows = torch.tensor(program.estimates)
    table = kernels().call_table(rows, p, q, torch.cat([c_in[1:], c_in[-1:]]), following)
    buffers.table[:count, : table.shape[1]].copy_(table)
    buffers.table[:count, table.shape[1] :].zero_()
    buffers.weights[:count].copy_(course.weights)
    if walk.known:
        buffers.known["known"].copy_(walk.known.latents.expand_as(buffers.asked))
        buffers.known["mask"].copy_(walk.known.mask.expand_as(buffers.known["mask"]))
    fill_shifts(buffers, fused, walk, course)
    buffers.call.zero_()
    combine(buffers.history, program.questions[0], buffers.asked)
    channels = buffers.asked.shape[1]
    copies = len(buffers.model_input) // len(buffers.asked)
    buffers.model_input[:, :channels].copy_((buffers.asked * float(c_in[0])).repeat(copies, 1, 1, 1))
    set_conditioning(buffers, fused, course.conditioning[0], channels)


def fill_shifts(buffers: Buffers, fused: FusedUNet, walk: Walk, course: Course) -> None:
    """What the time embedding adds, for every call, with the vector that the network is told there."""
    times = walk.network.schedule.timestep(course.program.sigmas).float().to(buffers.shifts.device)
    start = 0
    for end in range(1, len(times) + 1):
        if end == len(times) or course.conditioning[end] is not course.conditioning[start]:
            buffers.shifts[start:end].copy_(fused.shifts(times[start:end], course.conditioning[start].vector))
            start = end


def set_conditioning(buffers: Buffers, fused: FusedUNet, conditioning: Conditioning, channels: int) -> None:
    """The conditioning from the next call on."""
    buffers.keys_values.copy_(fused.keys_values(conditioning.context))
    if conditioning.extra is not None:
        buffers.model_input[:, channels : channels + conditioning.extra.shape[1]].copy_(conditioning.extra)


def call(fused: FusedUNet, buffers: Buffers, roles: Roles) -> Tensor:
    """One call, all of it on the device; returns what is asked next."""
    count = buffers.weights.shape[1]

    def of_roles(x: Tensor) -> Tensor:  # (K*B, …) -> (roles*B, …); what all roles share stays
        return x if len(roles) == count or len(x) == 1 else torch.cat([x.chunk(count)[k] for k in roles])

    shift = buffers.shifts.index_select(0, buffers.call)[0]
    prediction = fused(of_roles(buffers.model_input), of_roles(shift), of_roles(buffers.keys_values))
    weights = buffers.weights if len(roles) == count else torch.stack([buffers.weights[:, k] for k in roles], dim=1)
    channels = buffers.asked.shape[1]
    operations.linear_step(
        buffers.history, buffers.asked, prediction, weights, buffers.table, buffers.call,
        buffers.model_input[:, :channels], **buffers.known,
    )  # fmt: skip
    buffers.call.add_(1)
    return buffers.asked


def write_moment(buffers: Buffers, program: Program, step: int, latents: Tensor, denoised: Tensor) -> None:
    """What a step yields: often just what is asked next, and the last answer."""
    done = program.done[step]
    following = program.questions[done] if done < len(program.questions) else program.latents[-1]
    if torch.equal(following, program.latents[step]):
        latents.copy_(buffers.asked)
    else:
        combine(buffers.history, program.latents[step], latents)
    combine(buffers.history, program.denoised[step], denoised)


def combine(history: Tensor, coefficients: Tensor, out: Tensor) -> None:
    """out = sum_r c_r history_r, over the rows that count."""
    out.zero_()
    for row in coefficients.nonzero().flatten().tolist():
        out.add_(history[row], alpha=float(coefficients[row]))


def keep_pace(ahead: deque[Any], device: torch.device) -> None:
    """Waits for the call two before this one, where a GPU would otherwise be left behind."""
    if device.type != "cuda":
        return
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    ahead.append(event)
    if len(ahead) > AHEAD:
        ahead.popleft().synchronize()


def decoder_recorder(network: AutoencoderKL, graphs: bool, make: Make = vae_layer) -> NetworkRecorder:
    """`AutoencoderKL.decode` at full speed, (B, C, h, w) -> (B, 3, H, W): fused, and recorded where there is memory to keep.

    make: the fused form of one of its layers.
    """

    def roomy(latents: Tensor) -> bool:
        size = 4 * decode_bytes(network, latents)
        free = free_memory(latents.device, size)
        return free is not None and free >= size

    return NetworkRecorder(network, lambda: FusedDecoder(network, make), graphs, roomy)


def text_recorder(encoder: TextEncoder, graphs: bool) -> NetworkRecorder:
    """A text encoder's hidden states, stacked: ids (B, 77) -> (layers, B, 77, D)."""
    return NetworkRecorder(encoder, lambda: lambda ids: torch.stack(encoder.hidden_states(ids)), graphs)
