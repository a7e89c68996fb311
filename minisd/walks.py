"""From a plan to walks: who goes down which noise levels, told what, by which guide, and from where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from .addons.controls.acting import Active, activated, controlled
from .codec import check_finite
from .diffusion.brownian import brownian
from .diffusion.denoiser import ClassifierFree, Conditioning, Guide, Known, Noise, Timeline, Unet, is_affine
from .diffusion.guides import Composed, Own, Rescaled, TextAndImage, Until, part_role
from .diffusion.levels import Levels, own_levels
from .diffusion.noise import sources
from .diffusion.program import Program, program
from .diffusion.samplers import SAMPLERS, Sampler
from .diffusion.schedule import TRAINING_STEPS, Continuous, Schedule, scaled_linear, zero_terminal
from .diffusion.worlds import RULES, Wanted, schedule_of
from .errors import UsageError
from .fast.engine import moments
from .fast.lossy.cached import Reusing
from .fast.ways import Moment, Walk
from .models.family import REFINER, UNET, Training
from .options import MAX_IMAGES, whole
from .pictures.masks import at_latents, without_masked
from .plan import Plan, words_of
from .request import Stations
from .result import Step
from .system.finite import Culprit, Rescuing, watching
from .text.added import NONE
from .text.conditioner import with_sizes, zeroed
from .text.grammar import parse
from .text.prompts import Line, Reader, line

KEPT_PROGRAMS = 32
PROGRAMS: dict[tuple[object, ...], Program | None] = {}


def trained_on(training: Training) -> Schedule:
    """The noise levels that a network was trained on."""
    if training.sigmas:
        return Continuous(*training.sigmas)
    return zero_terminal(scaled_linear()) if training.zero_terminal else scaled_linear()


@dataclass(frozen=True)
class Leg:
    """Who draws which noise levels."""

    pipe: Stations
    levels: Levels
    program: Program | None  # of the sampler over these levels, where it has one
    before: int  # calls of the network on the way here
    calls: int  # of the whole way, as A1111 counts them for what changes in a prompt
    controls: tuple[Active, ...] = ()
    guided: int | None = None  # steps, the first; all of them where guidance does not end

    @property
    def steps(self) -> int | None:
        return len(self.program.done) if self.program else None


def course(plan: Plan, base: Stations) -> list[Leg]:
    """The way of a picture: all of it by the base, or the rest of it by a refiner.

    The base draws the noise levels of the first timesteps, the refiner goes on from there (Podell et al. 2023, arXiv 2307.01952,
    section 2.5); a level belongs to the base if its timestep is at least the cutoff (diffusers, denoising_end).
    """
    whole, refiner = plan_levels(plan, base), plan.request.refiner
    parts = [(base, whole)]
    if refiner is not None:
        cutoff = round(TRAINING_STEPS * (1 - plan.request.high_noise_frac))
        turn = int((base.network.schedule.timestep(whole.sigmas[:-1]) >= cutoff).sum())
        parts = list(zip((base, refiner), whole.split(turn), strict=True))
    sampler, shape = plan.sampler, (min(len(plan.seeds), 2), *plan.shape)
    if short := [part.steps for _, part in parts if 0 < part.steps < sampler.least]:
        raise UsageError(f"steps: expected at least {sampler.least} for sampler {sampler.label!r}, found {short[0]}")
    ways = [(pipe, part, program_of(sampler, plan.options, part.sigmas, shape)) for pipe, part in parts if part.steps > 0]
    asked = [len(found.sigmas) if found else part.steps for _, part, found in ways]
    steps = plan.request.steps if plan.request.sigmas is None else len(plan.request.sigmas) - 1
    # The steps asked for, twice for samplers that ask twice a step, be it 2 N - 1 times (A1111 sd_samplers_kdiffusion.py).
    calls = steps * max(1, int(sum(asked) / max(1, sum(part.steps for _, part, _ in ways)) + 0.5))
    controls = activated(plan.request.controls, base, plan.width, plan.height)  # which a refiner knows nothing of
    guided = guided_steps(plan, [found for *_, found in ways])
    return [Leg(*each, sum(asked[:i]), calls, controls if each[0] is base else (), guided[i]) for i, each in enumerate(ways)]


def guided_steps(plan: Plan, programs: Sequence[Program | None]) -> list[int | None]:
    """How many steps of each leg are guided, where guidance ends before they do.  Raises UsageError."""
    until = plan.request.cfg_until
    if until == 1:
        return [None] * len(programs)
    steps = [len(found.done) for found in programs if found]
    if len(steps) < len(programs):
        raise UsageError(f"cfg_until: expected 1 with sampler {plan.sampler.label!r}, the number of whose steps nobody foretells")
    left = round(until * sum(steps))
    return [min(max(left - sum(steps[:i]), 0), count) for i, count in enumerate(steps)]


def program_of(sampler: Sampler, options: dict[str, Any], sigmas: Tensor, shape: tuple[int, ...]) -> Program | None:
    """A sampler's program; one of ours, which does the same each time, is kept: to find it takes as long as a step of a small
    network."""
    find = partial(program, sampler.run, sigmas, shape, sampler.pair, **options)
    if not any(each is sampler for each in SAMPLERS.values()):
        return find()
    key = (id(sampler), repr(sorted(options.items())), tuple(sigmas.tolist()), sigmas.dtype, shape)
    if key not in PROGRAMS:
        if len(PROGRAMS) >= KEPT_PROGRAMS:
            PROGRAMS.clear()
        PROGRAMS[key] = find()
    return PROGRAMS[key]


def plan_levels(plan: Plan, base: Stations) -> Levels:
    """The noise levels of the way, falling; a strength below 1 leaves out the first (diffusers, get_timesteps)."""
    request = plan.request
    strength = plan.init.strength if plan.init else None
    if request.sigmas is None:
        name = request.sampler if isinstance(request.sampler, str) else plan.sampler.label
        wanted = Wanted(name, plan.spacing, request.steps, plan.sampler.wish, bool(base.family.vector), strength)
        return RULES[request.like](schedule_of(request.like, base.network.schedule), wanted)
    found = own_levels(request.sigmas, plan.sampler.wish)
    return found if strength is None else found.tail(int(found.steps * strength))


def kept(plan: Plan, pipe: Stations) -> Tensor | None:
    """The mask (1, 1, H, W) outside of which the init image is kept; a model that is trained to inpaint is told it instead."""
    return plan.init.mask if plan.init and pipe.recognition.task == "draw" else None


def known_latents(plan: Plan, pipe: Stations) -> Tensor | None:
    """The latents of the init image (1, C, h, w), where it is drawn over; an editing model starts from noise alone."""
    return pipe.codec.encode(plan.init.pixels) if plan.init and pipe.recognition.task != "edit" else None


def in_parts(plan: Plan, pipe: Stations) -> list[slice]:
    """On a CPU one picture at a time, if not told otherwise: large ones as fast, in less memory, and picture i bit for bit that
    of the single run.  Raises UsageError."""
    count = len(plan.seeds)
    whole(1, MAX_IMAGES).check("batch_size", pipe.batch_size)
    size = pipe.batch_size if pipe.device.type == "cpu" else count
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def start(plan: Plan, part: slice, leg: Leg, known: Tensor | None) -> tuple[Tensor, Noise]:
    """The first latents (B, C, h, w), and the source of all further noise.

    Noise, and under it the latents of the init image (1, C, h, w), where it is drawn over.
    """
    origins, device, rng = plan.origins[part], leg.pipe.device, plan.request.rng or "cpu"
    drawn, noise = sources(rng, origins, plan.shape, device)
    if plan.request.sde_noise == "brownian":
        noise = brownian(rng, origins, plan.shape, leg.levels.ends, device)
    unit = drawn if plan.latents is None else plan.latents[part].to(leg.pipe.device)
    if known is not None and plan.init and (plan.init.strength < 1 or kept(plan, leg.pipe) is not None):
        return known + unit * float(leg.levels.sigmas[0]), noise
    return unit * leg.levels.start_scale, noise


def walk(plan: Plan, part: slice, leg: Leg, known: Tensor | None, progress: Progress) -> Walk:
    """What one model does for some of the pictures.  known: the latents of the init image (1, C, h, w), where there is one."""
    guide, conditioning = guidance(plan, part, leg)
    for conditioned in {id(each): each for timeline in conditioning for _, each in timeline.entries}.values():
        check_finite(conditioned.context, leg.pipe.dtype, "text encoder", lambda: reader_at_fault(plan, part, leg))
    mask = kept(plan, leg.pipe)
    region = Known(at_latents(mask, known), known) if mask is not None and known is not None else None
    transform = progress.begin(part, leg, known)
    how = (leg.levels, conditioning, guide, leg.program, plan.options, region, transform, plan.request.observe)
    network = replace(leg.pipe.network, schedule=schedule_of(plan.request.like, leg.pipe.network.schedule), unet=progress.unet())
    control = partial(controlled, leg.controls, leg.levels.steps) if leg.controls else None
    return Walk(network, plan.sampler, *how, control)


class Progress:
    """Counts the steps of a call, and says of each what it is."""

    def __init__(self, plan: Plan, legs: Sequence[Leg], parts: int) -> None:
        steps = [leg.steps for leg in legs]
        self.plan, self.legs, self.index, self.way = plan, legs, 0, "plain"
        self.rescuing: dict[Unet, Unet] = {}
        self.total = None if None in steps else parts * sum(step or 0 for step in steps)

    def begin(self, part: slice, leg: Leg, known: Tensor | None) -> Callable[[Moment], Tensor] | None:
        """A walk begins; returns what its latents are to become after each step, where the user says so."""
        self.part, self.leg, self.known, self.sigma = part, leg, known, float(leg.levels.sigmas[0])
        change = self.plan.request.transform
        return None if change is None else lambda moment: change(self.describe(moment))

    def step(self, moment: Moment) -> Step:
        step = self.describe(moment)
        if step.latents.device.type == "cpu":  # not to draw on for minutes; a GPU would have to be waited for
            self.finished(step.latents)
        self.index += 1
        return step

    def finished(self, latents: Tensor) -> Tensor:
        """The same latents.  Raises NonFiniteError."""
        check_finite(latents, self.leg.pipe.dtype, "UNet", self.at_fault)
        return latents

    def at_fault(self) -> Culprit | None:
        """The first module that leaves the finite numbers, if one does: the walk is taken again, as the modules stand."""
        again = Progress(replace(self.plan, request=replace(self.plan.request, transform=None, observe=None)), self.legs, 1)
        x, noise = start(self.plan, self.part, self.legs[0], self.known)
        for leg in self.legs:
            one = walk(again.plan, self.part, leg, self.known, again)
            with watching({UNET: leg.pipe.unet}) as found:
                for moment in moments(one, one.denoiser(), x, noise, "plain"):
                    if found or not moment.latents.isfinite().all():
                        return found[0] if found else None
                    x = moment.latents
        return None

    def unet(self) -> Unet:
        """Of the walk that begins: the pipeline's own, or one whose blocks are rescued where they overflow, or reused."""
        own = self.leg.pipe.network.unet
        if self.plan.request.cache > 1:
            return Reusing(self.leg.pipe.unet, self.plan.request.cache)
        if not self.plan.request.rescue:
            return own
        return self.rescuing.setdefault(own, Rescuing(self.leg.pipe.unet))

    def describe(self, moment: Moment) -> Step:
        sigma = moment.call.sigma if moment.call else self.sigma
        self.sigma, self.way = sigma, moment.way
        schedule = schedule_of(self.plan.request.like, self.leg.pipe.network.schedule)
        timestep = float(schedule.timestep(torch.tensor(sigma, dtype=torch.float64)))
        seeds = tuple(self.plan.seeds[self.part])
        at = (moment.latents, moment.denoised, moment.before, sigma, timestep)
        return Step(self.index, self.total, *at, self.part.start, seeds, moment.way)


def reader_at_fault(plan: Plan, part: slice, leg: Leg) -> Culprit | None:
    """The first module of the text encoders that leaves the finite numbers."""
    towers = {tower.name: encoder for tower, encoder in zip(leg.pipe.family.towers, leg.pipe.conditioner.encoders, strict=True)}
    with watching(towers) as found:
        guidance(plan, part, leg)
    return found[0] if found else None


def guidance(plan: Plan, part: slice, leg: Leg) -> tuple[Guide, list[Timeline]]:
    """How the network's answers become one, and what it is told in each role."""
    roles, weights = conditionings(plan, part, leg)
    # Of each part of a prompt, of each picture.
    scales = [[scale * weight for scale, weight in zip(plan.scales[part], of_part, strict=True)] for of_part in weights]
    guide = own_guide(plan.request.guide, weights) if plan.request.guide is not None else usual_guide(plan, scales, roles)
    if leg.guided is not None and is_affine(guide):
        guide = Until(guide, leg.guided)
    if not guide.roles or guide.on not in ("estimate", "output"):
        raise UsageError(f"guide: expected roles, and to work on estimate or output, found {guide.roles} and {guide.on!r}")
    if plan.sampler.pair and "negative" not in guide.roles:
        raise UsageError(f"guide: expected the role negative for sampler {plan.sampler.label!r}, found {guide.roles}")
    if unknown := [role for role in guide.roles if role not in roles]:
        raise UsageError(f"guide: expected some of the roles {', '.join(roles)}, found {unknown[0]!r}")
    return guide, [roles[role] for role in guide.roles]


def own_guide(given: Guide | Callable[..., Tensor], weights: Sequence[Sequence[float]]) -> Guide:
    """A user's own, which weighs itself what AND joins, if it knows of that."""
    guide = cast(Guide, given) if hasattr(given, "on") and hasattr(given, "roles") else Own(given)
    if (len(weights) > 1 or set(weights[0]) != {1.0}) and part_role(1) not in guide.roles:
        raise UsageError(
            "guide: expected a prompt without AND and without a weight at its end, which are guidance as A1111 has it"
        )
    return guide


def usual_guide(plan: Plan, scales: list[list[float]], roles: dict[str, Timeline]) -> Guide:
    request, joined = plan.request, len(scales) > 1
    if all(len(set(each)) == 1 for each in scales):
        scales = [each[:1] for each in scales]
    scale = scales[0][0] if len(scales[0]) == 1 else tuple(scales[0])
    if joined and ("image" in roles or request.guidance_rescale or request.cfg_until < 1):
        found = "a model that edits" if "image" in roles else "guidance_rescale" if request.guidance_rescale else "cfg_until"
        raise UsageError(f"prompt: expected no AND beside {found}, which is a guidance of its own")
    if joined:
        return Composed(tuple(map(tuple, scales)))
    if "image" in roles:
        return TextAndImage(scale, request.image_guidance_scale)
    if request.guidance_rescale and scale != 1:
        return Rescaled(scale, request.guidance_rescale)
    return ClassifierFree(scale)


def conditionings(plan: Plan, part: slice, leg: Leg) -> tuple[dict[str, Timeline], list[list[float]]]:
    """What the network is told of some of the pictures, by role, with what the model's task wants to see beside the latents; and
    the weights of each part of the prompts, by picture."""
    negative, positives, weights = read_prompts(plan, part, leg)
    pipe, count, init = leg.pipe, len(plan.seeds[part]), plan.init
    roles = {"negative": negative} | {part_role(i): positive for i, positive in enumerate(positives)}
    if pipe.recognition.task == "draw" or init is None:
        return roles, weights
    if pipe.recognition.task == "edit":
        picture = (pipe.codec.encode(init.pixels) / pipe.codec.scale).expand(count, -1, -1, -1)  # not scaled (edit_cli.py)
        seeing = {name: beside(each, picture) for name, each in (roles | {"image": negative}).items()}
        return seeing | {"negative": beside(negative, torch.zeros_like(picture))}, weights
    assert init.mask is not None
    seen = pipe.codec.encode(without_masked(init.pixels, init.mask))
    extra = torch.cat([at_latents(init.mask, seen), seen], dim=1).expand(count, -1, -1, -1)  # (B, 1 + C, h, w)
    return {name: beside(each, extra) for name, each in roles.items()}, weights


def beside(timeline: Timeline, extra: Tensor) -> Timeline:
    return each_entry(timeline, lambda each: replace(each, extra=extra))


def each_entry(timeline: Timeline, change: Callable[[Conditioning], Conditioning]) -> Timeline:
    changed = {key: change(each) for key, each in {id(each): each for _, each in timeline.entries}.items()}
    return Timeline(tuple((last, changed[id(each)]) for last, each in timeline.entries))


def read_prompts(plan: Plan, part: slice, leg: Leg) -> tuple[Timeline, list[Timeline], list[list[float]]]:
    """What the negative prompts say, and each part of the positive ones, equally many chunks long, with SDXL's sizes; and the
    parts' weights, by picture."""
    request, pipe = plan.request, leg.pipe
    handed = [value for value in (request.prompt, request.negative_prompt) if isinstance(value, Conditioning | Timeline)]
    chunks = max([1, *(each.context.shape[1] // 77 for value in handed for _, each in timeline_of(value).entries)])
    pictures, negatives = lines(plan, part, leg, "prompt"), [line for ((_, line),) in lines(plan, part, leg, "negative_prompt")]
    told = [line for picture in pictures for _, line in picture] + negatives
    reader = Reader(pipe.conditioner, told, plan.reading, request.clip_skip, chunks)
    longest = [max(reader.chunks(line) for _, line in picture) for picture in pictures]
    count = max(map(len, pictures))  # a picture of fewer parts has others that do not count
    parts = [[picture[k] if k < len(picture) else (0.0, picture[0][1]) for picture in pictures] for k in range(count)]
    positives = [reader.timeline([line for _, line in each], longest, leg.before) for each in parts]
    negative = reader.timeline(negatives, before=leg.before)
    if isinstance(request.prompt, Conditioning | Timeline):
        positives = [each_entry(timeline_of(request.prompt), lambda each: handed_over(each, plan, part, leg, reader.length))]
    if isinstance(request.negative_prompt, Conditioning | Timeline):
        negative = each_entry(
            timeline_of(request.negative_prompt), lambda each: handed_over(each, plan, part, leg, reader.length)
        )
    if pipe.family.vector:
        negative = each_entry(negative, lambda each: zeroed(each, plan.zero_negative[part]))
        good, bad = sizes(plan, pipe)
        positives = [each_entry(positive, lambda each: with_sizes(each, good)) for positive in positives]
        negative = each_entry(negative, lambda each: with_sizes(each, bad))
    return negative, positives, [[weight for weight, _ in each] for each in parts]


def lines(plan: Plan, part: slice, leg: Leg, name: str) -> list[list[tuple[float, Line]]]:
    """Weights and lines of the parts of each picture's prompt."""
    texts = plan.prompts if name == "prompt" else plan.negatives
    found, encoders = [], len(leg.pipe.family.towers)
    for text, second in zip(texts[part], plan.seconds[f"{name}_2"][part], strict=True):
        other = None if second is None else parse(second, leg.calls, plan.reading, joins=False).parts[0]
        parts = parse(text, leg.calls, plan.reading, joins=name == "prompt").parts
        found.append([(each.weight, line(each, other, encoders)) for each in parts])
    return found


def handed_over(given: Conditioning, plan: Plan, part: slice, leg: Leg, chunks: int) -> Conditioning:
    """Some of the pictures' rows of a user's own conditioning, where and in the dtype that the network takes them; one that is
    shorter than others goes on with its last vector."""
    pipe = leg.pipe

    def rows(x: Tensor) -> Tensor:  # one for all, one a prompt, or one a picture
        return x.repeat_interleave(len(plan.seeds) // len(x), 0)[part].to(pipe.device, pipe.dtype)

    context = rows(given.context)
    context = torch.cat([context, context[:, -1:].expand(-1, chunks * 77 - context.shape[1], -1)], dim=1)
    return Conditioning(context, None if given.pooled is None else rows(given.pooled))


def timeline_of(given: Conditioning | Timeline) -> Timeline:
    return given if isinstance(given, Timeline) else Timeline(((0, given),))


def sizes(plan: Plan, pipe: Stations) -> tuple[list[float], list[float]]:
    """The numbers that SDXL's UNet is told of the picture that is wanted, and of the one that is not."""
    request, size = plan.request, (plan.width, plan.height)
    (width, height), (left, top) = request.original_size or size, request.crop
    numbers: list[float] = [height, width, top, left]
    if pipe.family is REFINER:
        return [*numbers, request.aesthetic_score], [*numbers, request.negative_aesthetic_score]
    good = [*numbers, *reversed(request.target_size or size)]
    return good, good


def check_words(plan: Plan, base: Stations) -> None:
    """Raises UsageError where a prompt has an embedding that the base does not know, or its refiner."""
    refiner = plan.request.refiner
    texts = zip(plan.prompts, plan.negatives, *plan.seconds.values(), strict=True)
    for i in {text: i for i, text in enumerate(texts)}.values():
        names = words_of(plan, i, (base.conditioner.added or [NONE])[0])
        if refiner is not None:
            theirs = (refiner.conditioner.added or [NONE])[0]
            if missing := [name for name in names if name not in theirs.words]:
                raise UsageError(f"refiner: does not know the embedding {missing[0]!r}; refiner.add_embedding(FILE) teaches it")


def check_refiner(base: Stations, refiner: Stations | None) -> None:
    """Raises UsageError unless the two, where there are two, can share latents and noise levels."""
    if refiner is None:
        return
    if not hasattr(refiner, "recognition"):
        raise UsageError(f"refiner: expected a pipeline, as minisd.load gives it, found {type(refiner).__name__}")
    if base.recognition.task != "draw" or refiner.recognition.task != "draw":
        raise UsageError("refiner: expected two models that draw from text, found one that edits or inpaints")
    if base.device != refiner.device:
        raise UsageError(f"refiner: expected a model on {base.device}, found one on {refiner.device}")
    same = (base.recognition.latent_scale, base.training.sigmas) == (refiner.recognition.latent_scale, refiner.training.sigmas)
    if not same or base.training.sigmas:
        raise UsageError(
            f"refiner: expected a model with the latents and noise levels of {base.family.title}, found {refiner.family.title}"
        )
