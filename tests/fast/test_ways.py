"""The fast ways against the plain one: on a CPU without recording, with kernels in the interpreter, and on a GPU.

Every sampler x guide x option is drawn both ways, and whatever somebody does to a network is either in the picture or makes it
go the plain way.
"""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SMALL
from helpers import relative_error
from own_samplers import LINEAR, NOT_LINEAR, dpmpp_2m, euler_ancestral, heun
from PIL import Image
from torch import nn

import minisd
from minisd.diffusion.denoiser import ClassifierFree
from minisd.diffusion.samplers import SAMPLERS, Sampler
from minisd.fast import choice, engines
from minisd.fast.cuda import Cuda, decoder_recorder, text_recorder
from minisd.fast.decoder import FusedDecoder
from minisd.fast.engine import Plain
from minisd.fast.graphs import NetworkRecorder, Recording
from minisd.fast.unet import FusedUNet, NarrowConv, Upsample
from minisd.fast.ways import Moment
from minisd.models.shapes import below
from minisd.models.unet import CrossAttention, Trunk, UNet
from minisd.models.vae import AutoencoderKL
from minisd.plan import planned
from minisd.request import Request
from minisd.text.prompts import encode
from minisd.walks import Progress, course, known_latents, start, walk
from minisd.workbench import blueprint

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
LIMIT = 1e-4 if CUDA else 1e-5  # of float32 after a few steps, where a GPU sums in an order of its own; never tried on one
runs_kernels = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
OFF_ON = ["torch", pytest.param("triton", marks=runs_kernels)]
SMALLEST = {"width": 64, "height": 64, "steps": 3, "seed": 1}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: small.write(folder / f"{name}.safetensors") for name, small in SMALL.items()}


def load(path: Path, device: str = "cpu", dtype: str = "float32") -> minisd.Pipeline:
    return minisd.load(path, device=device, dtype=dtype, fast=device != "cpu")  # the tests bring engines of their own


def fast(pipe: minisd.Pipeline, graphs: bool = CUDA) -> Cuda:
    """The engine of a GPU, on a CPU too, where it records nothing."""
    return Cuda(pipe.unet, graphs)


def begun(pipe: minisd.Pipeline, request: Request, engine, dtype: torch.dtype = torch.float32, factor: float = 1.0):
    """All the pictures of a request at once, from an engine; dtype: of the sampler's arithmetic; factor: of the start."""
    with torch.no_grad():
        plan = planned(request, pipe.capabilities())
        (leg,) = course(plan, pipe)
        part, known = slice(0, len(plan.seeds)), known_latents(plan, pipe)
        x, source = start(plan, part, leg, known)
        return engine.walk(walk(plan, part, leg, known, Progress(plan, [leg], 1)), (x * factor).to(dtype), source)


def steps(pipe: minisd.Pipeline, request: Request, engine=None, dtype: torch.dtype = torch.float32) -> list[Moment]:
    """Every step, in memory of its own."""
    with torch.no_grad():
        return [
            moment._replace(latents=moment.latents.clone(), denoised=moment.denoised.clone())
            for moment in begun(pipe, request, engine or Plain(), dtype)
        ]


def compare(pipe: minisd.Pipeline, request: Request, way: str = "recorded", engine=None, limit: float = LIMIT) -> None:
    """The plain way with its sampler in float64: where the noise starts at 4096 (sdxl-v), its sums lose four digits in float32,
    and those of the fast way, whose coefficients are made in float64, none."""
    wanted = steps(pipe, request, dtype=torch.float64)
    found = steps(pipe, request, engine or fast(pipe))
    assert {moment.way for moment in found} == {way}
    assert len(found) == len(wanted)
    for moment, true in zip(found, wanted, strict=True):
        assert relative_error(moment.latents, true.latents) <= limit
        assert relative_error(moment.denoised, true.denoised) <= limit
        assert moment.call == true.call


PICTURE = Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8))
HALF = np.zeros((64, 64), dtype=np.uint8)
HALF[:, 32:] = 255
MASK = Image.fromarray(HALF)
REQUESTS = {
    "sd1": {},
    "sd1, no guidance": {"guidance_scale": 1.0},
    "sd1, a scale for each": {"guidance_scale": [1.0, 7.5, 3.0], "negative_prompt": ["", "a star", "blue"]},
    "sd1, uneven": {"width": 72, "height": 56},
    "sd1, ddim": {"sampler": "ddim", "spacing": "trailing"},
    "sd1, fresh noise": {"sampler": "ddim", "eta": 1.0, "spacing": "trailing"},
    "sd1, mask": {"init_image": PICTURE, "mask": MASK},
    "sd1, over a picture": {"init_image": PICTURE, "strength": 0.7},
    "sd1, three pictures, two chunks": {"num_images": 3, "prompt": "a star " * 100},
    "sd1, own levels": {"sigmas": [12.0, 5.0, 1.0, 0.0]},
    "sd1-inpaint": {"init_image": PICTURE, "mask": MASK, "strength": 1.0},
    "sd1-edit": {"init_image": PICTURE},
    "sd2": {},
    "sdxl": {},
    "sdxl, uneven, two pictures": {"width": 88, "height": 56, "num_images": 2},
    "sdxl-v": {},
    "sdxl-refiner": {},
    "playground": {},
    "cosxl": {},
}


@pytest.mark.parametrize("case", [case for case in REQUESTS if case.split(",")[0] in SMALL])
def test_every_step_equals_the_plain_way(case, files):
    options = SMALLEST | {"prompt": "a red circle"} | REQUESTS[case]
    with choice.using("torch"):
        compare(load(files[case.split(",")[0]], DEVICE), Request(**options))


# --- samplers and guides that no one here wrote for the fast way ------------------------------------------------------------


class DynamicGuidance(ClassifierFree):
    """Its weights are all there is to it, so it goes the fast way, too; none in the last call."""

    def weights(self, call):
        scale = torch.tensor([1.0 if call.index + 1 == call.of else self.scale - call.index])
        return torch.stack([1 - scale, scale])


class OwnMix(ClassifierFree):
    """A subclass of a guide that mixes in its own way."""

    def __call__(self, answers, x, call):
        return super().__call__(answers, x, call) * 0.9


def own_guide(answers, x, call):
    return 0.5 * answers[0] + 0.6 * answers[1]


GUIDES = {"usual": (None, "recorded"), "dynamic": (DynamicGuidance(7.5), "recorded"), "own": (own_guide, "network")}
GUIDES |= {"own mix": (OwnMix(7.5), "network")}


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("sampler", ["euler", "ddim", *LINEAR])
def test_every_sampler_and_guide_both_ways(sampler, guide, files):
    own, way = GUIDES[guide]
    pipe = load(files["sd1"], DEVICE)
    options = SMALLEST | {"steps": 4, "sampler": LINEAR.get(sampler, sampler), "guide": own, "spacing": "trailing"}
    with choice.using("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore" if way == "network" else "error")
        compare(pipe, Request("a red circle", num_images=2, **options), way)


OTHER_GUIDES = [pytest.param(guide, marks=pytest.mark.slow) for guide in GUIDES if guide != "usual"]


@pytest.mark.parametrize("guide", ["usual", *OTHER_GUIDES])
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "dpm_adaptive"])  # whose levels depend on rounding
def test_every_sampler_of_the_field_both_ways(sampler, guide, files):
    """By its table, or by its own generator where it asks for two estimates (CFG++)."""
    own, way = GUIDES[guide]
    if SAMPLERS[sampler].pair:
        way = "network"
    pipe = load(files["sd1"], DEVICE)
    options = SMALLEST | {"steps": 4, "sampler": sampler, "guide": own, "guidance_scale": 2.0}
    with choice.using("torch"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare(pipe, Request("a red circle", num_images=2, **options), way)


@pytest.mark.parametrize("sampler", ["euler", "ddim", *LINEAR])
def test_over_many_steps_the_ways_part_no_further_than_rounding_takes_them(sampler, files):
    """By no more than three times what it makes on the plain way alone to round the start otherwise."""
    pipe = load(files["sd1"], DEVICE)
    options = {"steps": 20, "sampler": LINEAR.get(sampler, sampler), "spacing": "trailing", "width": 64, "height": 64, "seed": 1}
    request = Request("a red circle", **options)
    with choice.using("torch"):
        plain, recorded = (steps(pipe, request, engine)[-1] for engine in (Plain(), fast(pipe)))
        rounded = []
        for factor in (1 + 2**-23, 1 - 2**-23):  # an ulp, more or less
            with torch.no_grad():
                *_, last = begun(pipe, request, Plain(), factor=factor)
            rounded.append(relative_error(last.latents, plain.latents))
    assert recorded.way == "recorded"
    assert relative_error(recorded.latents, plain.latents) <= 3 * max(rounded)


@pytest.mark.parametrize("sampler", NOT_LINEAR)
def test_what_is_not_linear_goes_by_its_own_generator_and_says_so_once(sampler, files):
    pipe = load(files["sd1"], DEVICE)
    engine, request = fast(pipe), Request("a red circle", sampler=sampler, **SMALLEST)
    with choice.using("torch"), pytest.warns(UserWarning, match=rf"the steps of {sampler.__name__} depend on what the network"):
        compare(pipe, request, "network", engine, 5 * LIMIT)
    with choice.using("torch"), warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(pipe, request, "network", engine, 5 * LIMIT)


@pytest.mark.parametrize("kernels", OFF_ON)
def test_whole_steps_with_kernels(kernels, files):
    """At the least size: the interpreter is slow."""
    pipe = load(files["sd1"], DEVICE)
    request = Request("a star", **(SMALLEST | {"steps": 3 if CUDA else 1}))
    with choice.using("torch"):
        wanted = steps(pipe, request)
    with choice.using(kernels):
        found = steps(pipe, request, fast(pipe))
    assert max(relative_error(a.latents, b.latents) for a, b in zip(found, wanted, strict=True)) <= LIMIT


@pytest.mark.parametrize("name", [pytest.param(name, marks=runs_kernels) for name in ("sd1", "sd1-inpaint")])
def test_what_the_first_convolution_reads_is_padded(name, files, recording):
    """Recorded, and replayed, with what is read beside the latents in its place."""
    pipe = load(files[name], DEVICE)
    request = Request(**({"prompt": "a star"} | SMALLEST | (REQUESTS[name] if name != "sd1" else {})))
    with choice.using("torch"):
        wanted = steps(pipe, request)
    engine = fast(pipe, graphs=True)
    with choice.using("padded_conv"):
        found = steps(pipe, request, engine)
    (buffers,) = engine.shapes.values()
    assert buffers.model_input.shape[1] % 8 == 0
    assert max(relative_error(a.latents, b.latents) for a, b in zip(found, wanted, strict=True)) <= LIMIT


# --- whatever is done to a network is in the picture, or makes it go the plain way ---------------------------------------------


class Louder(nn.Linear):
    """What peft, quantisers and research code put in a Linear's place."""

    def forward(self, x):
        return super().forward(x) * 1.5


def swapped(unet: UNet) -> None:
    old = unet.middle_block[1].transformer_blocks[0].attn1.to_v
    new = Louder(old.in_features, old.out_features, bias=False, device=old.weight.device)
    new.weight = old.weight
    unet.middle_block[1].transformer_blocks[0].attn1.to_v = new


def own_forward(unet: UNet) -> None:
    block = unet.middle_block[0]
    usual = block.forward
    block.forward = lambda x, emb: usual(x, emb) * 1.5


def hooked(unet: UNet) -> None:
    unet.middle_block[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def hooked_before(unet: UNet) -> None:
    unet.out.register_forward_pre_hook(lambda module, inputs: (inputs[0].flip(-1),))


def parametrised(unet: UNet) -> None:
    class Larger(nn.Module):
        def forward(self, weight):
            return weight * 1.5

    torch.nn.utils.parametrize.register_parametrization(unet.out[2], "weight", Larger())


def other_activation(unet: UNet) -> None:
    unet.middle_block[0].emb_layers[0] = nn.Identity()


def seamless(unet: UNet) -> None:
    """What makes pictures that can be tiled."""
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [*(module.padding[1],) * 2, *(module.padding[0],) * 2]


def other_heads(unet: UNet) -> None:
    unet.middle_block[1].transformer_blocks[0].attn1.heads = 2


TRAPS = {
    swapped: "to_v is a Louder",
    own_forward: r"middle_block\.0 has a forward of its own",
    hooked: r"middle_block\.0 has a hook",
    hooked_before: "out has a hook",
    parametrised: r"out\.2 is a ParametrizedConv2d",
    seamless: r"input_blocks\.0\.0 was given another padding_mode",
    other_heads: r"attn1 was given another heads",
    other_activation: r"emb_layers\.0 is a Identity",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_a_touched_network_goes_the_plain_way_and_says_so_once(trap, files):
    pipe = load(files["sd1"], DEVICE)
    engine, request = fast(pipe), Request("a star", **SMALLEST)
    with choice.using("torch"):
        before = steps(pipe, request, engine)
        trap(pipe.unet)
        with pytest.warns(UserWarning, match=TRAPS[trap]) as told:
            found = [steps(pipe, request, engine) for _ in range(2)]
        wanted = steps(pipe, request)
    assert len(told) == 1
    for moments in found:
        assert {moment.way for moment in moments} == {"plain"}
        assert torch.equal(moments[-1].latents, wanted[-1].latents)
    assert relative_error(wanted[-1].latents, before[-1].latents) > 1e-3


def test_further_ways_of_being_touched(files, monkeypatch):
    pipe = load(files["sd1"], DEVICE)
    request = Request("a star", **SMALLEST)

    def way_of(engine) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return steps(pipe, request, engine)[0].way

    conv = pipe.unet.input_blocks[0][0]
    conv._conv_forward = lambda x, weight, bias: nn.Conv2d._conv_forward(conv, x, weight, bias)
    assert way_of(Cuda(pipe.unet, CUDA)) == "plain"
    del conv._conv_forward
    with monkeypatch.context() as patch:
        patch.setattr(UNet, "down", lambda self, *given: Trunk.down(self, *given))
        assert way_of(fast(pipe)) == "plain"
    engine = fast(pipe)
    to_v = pipe.unet.middle_block[1].transformer_blocks[0].attn1.to_v
    to_v.bias = nn.Parameter(torch.ones(to_v.out_features, device=DEVICE))
    assert way_of(engine) == "plain"
    to_v.bias = None
    assert way_of(engine) == "recorded"
    with torch.autocast(DEVICE, torch.bfloat16):
        assert way_of(engine) == "plain"
    pipe.network = replace(pipe.network, unet=load(files["sd1"], DEVICE).unet)
    assert way_of(engine) == "plain"


def test_in_inference_mode_edits_are_noticed(files):
    pipe = load(files["sd1"], DEVICE)

    def edited(engine):
        kept = []
        for i, moment in enumerate(begun(pipe, Request("a star", **SMALLEST), engine)):
            if i == 0:
                moment.latents.mul_(0.8)
            kept.append(moment.latents.clone())
        return kept

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = edited(fast(pipe)), edited(Plain())
    for x, true in zip(found, wanted, strict=True):
        assert relative_error(x, true) <= LIMIT


def test_begun_in_inference_mode_and_gone_on_outside_of_it(files):
    """What is kept from one picture for the next is written to in either, also after a weight has changed."""
    pipe, latents = load(files["sd1"], DEVICE), noise(1, 4, 8, 8).to(DEVICE)
    engine, request = fast(pipe), Request("a star", **SMALLEST)
    with torch.inference_mode():
        first, decoded = steps(pipe, request, engine)[-1].latents, engine.decode(pipe.vae, latents)
    again = steps(pipe, request, engine)[-1].latents
    assert torch.equal(first, again)
    with torch.no_grad():
        for network in (pipe.unet, pipe.vae):
            for weight in network.parameters():
                weight.mul_(1.01)
    compare(pipe, request, engine=engine)
    with torch.no_grad():
        changed, wanted = engine.decode(pipe.vae, latents), pipe.vae.decode(latents)
    assert relative_error(changed, wanted) <= LIMIT
    assert relative_error(decoded, wanted) > LIMIT


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=runs_kernels) for name in ("upsample_conv", "padded_conv")])
@torch.no_grad()
def test_what_kernels_keep_of_weights_is_made_again_outside_of_inference_mode(kernel):
    conv, x = nn.Conv2d(4, 4, 3, padding=1).to(DEVICE), noise(1, 4, 4, 4).to(DEVICE)
    layer = Upsample(conv) if kernel == "upsample_conv" else NarrowConv(conv)
    with choice.using(kernel):
        with torch.inference_mode():
            layer(x)
        conv.weight.mul_(2)
        layer.refresh()
        found = layer(x)
    wanted = conv(torch.nn.functional.interpolate(x, scale_factor=2)) if kernel == "upsample_conv" else conv(x)
    assert relative_error(found[0] if kernel == "upsample_conv" else found, wanted) <= LIMIT


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_that_are_brought_to_a_gpu_in_turns_are_drawn_with_as_they_stand(files, dtype, monkeypatch):
    """Not by the fused form of the CPU where they lie; and cuDNN is told what it is told where they stay on the GPU."""
    told = []
    monkeypatch.setattr(engines, "settle_cudnn", lambda: told.append(True))
    monkeypatch.setattr(engines, "wants", lambda name, device: False)
    model = load(files["sd1"], dtype=dtype).model
    assert isinstance(engines.engine(model, torch.device("cuda"), True), Plain)
    assert told == [True]


def test_one_tensor_yielded_twice_is_edited(files):
    def heedless(denoise, x, sigmas, noise):
        for sigma, following in pairwise(sigmas):
            denoised = denoise(x, sigma)
            x = denoised + following / sigma * (x - denoised)
            yield x, x

    pipe, kept = load(files["sd1"], DEVICE), []
    for engine in (Plain(), fast(pipe)):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            last = None
            for i, moment in enumerate(begun(pipe, Request("a star", sampler=heedless, **SMALLEST), engine)):
                if i == 0:
                    moment.latents.mul_(0.8)
                last = moment.latents.clone()
            kept.append(last)
    assert relative_error(kept[1], kept[0]) <= LIMIT


class Lowered(ClassifierFree):
    """Reads what the loop around it changes."""

    strength = 7.5

    def weights(self, call):
        return torch.tensor([[1 - self.strength], [self.strength]])


def test_a_guide_that_changes_its_mind_is_asked_again(files):
    pipe, kept = load(files["sd1"], DEVICE), []
    for engine in (Plain(), fast(pipe)):
        guide, last = Lowered(7.5), None
        with torch.no_grad():
            for i, moment in enumerate(begun(pipe, Request("a star", guide=guide, **(SMALLEST | {"steps": 5})), engine)):
                object.__setattr__(guide, "strength", 7.5 - i)
                last = moment.latents.clone()
        kept.append(last)
    assert relative_error(kept[1], kept[0]) <= LIMIT


def test_a_replaced_vae_is_let_go(files):
    pipe = load(files["sd1"], DEVICE)
    pipe.engine = engine = fast(pipe)
    pipe.codec.engine = engine
    pipe("a star", **SMALLEST)
    gone = weakref.ref(pipe.vae)
    pipe.replace_vae(files["sd1"])
    gc.collect()
    assert gone() is None
    pipe.vae.decoder.mid.attn_1.__class__ = type("Mine", (type(pipe.vae.decoder.mid.attn_1),), {})
    with pytest.warns(UserWarning, match="mid.attn_1 is a Mine"):
        pipe("a star", **SMALLEST)


CHANGES = {
    hooked: "has a hook",
    swapped: "is a Louder",
    lambda unet: unet.out[2].weight.mul_(1.5): None,
    lambda unet: unet.middle_block[1].transformer_blocks[0].attn2.to_k.weight.mul_(1.5): None,
    lambda unet: unet.load_state_dict({key: x * 1.1 for key, x in unet.state_dict().items()}, assign=True): None,
}


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_on_the_way_changes_the_rest_of_it(change, options, files, recording):
    """Between two steps, as on the plain way: a strength by step, a hook that comes late."""
    request = Request("a star", **(SMALLEST | {"steps": 5, "sampler": dpmpp_2m} | options))
    found = []
    for make in (lambda pipe: Plain(), lambda pipe: fast(pipe, graphs=True)):
        pipe, kept = load(files["sd1"], DEVICE), []
        with choice.using("torch"), torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for i, moment in enumerate(begun(pipe, request, make(pipe))):
                kept.append(moment.latents.clone())
                if i == 2:
                    change(pipe.unet)
        found.append(kept)
    assert CHANGES[change] is None or any(CHANGES[change] in str(each.message) for each in said)
    for x, true in zip(*found, strict=True):
        assert relative_error(x, true) <= LIMIT


def test_a_patched_class_and_a_hook_on_all_modules_are_noticed(files, monkeypatch):
    pipe = load(files["sd1"], DEVICE)
    engine, request = fast(pipe), Request("a star", **SMALLEST)
    steps(pipe, request, engine)
    usual = nn.SiLU.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.SiLU, "forward", lambda self, x: usual(self, x) * 1.1)
        with pytest.warns(UserWarning, match="has a forward of its own"):
            assert steps(pipe, request, engine)[0].way == "plain"
    wrapped = functools.wraps(CrossAttention.forward)(lambda self, *given: usual_attention(self, *given) * 1.1)
    usual_attention = CrossAttention.forward
    with monkeypatch.context() as patch:  # before the model is loaded, and under the old name
        patch.setattr(CrossAttention, "forward", wrapped)
        other = load(files["sd1"], DEVICE)
        with pytest.warns(UserWarning, match="has a forward of its own"):
            assert steps(other, request, fast(other))[0].way == "plain"
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="a hook on all modules"):
            assert steps(pipe, request, engine)[0].way == "plain"
    finally:
        handle.remove()
    assert steps(pipe, request, engine)[0].way == "recorded"


def test_edited_steps_are_gone_on_with(files):
    """By writing into a step's latents, and by `transform`: the picture of the plain way, both times."""
    pipe = load(files["sd1"], DEVICE)
    for sampler in ("euler", dpmpp_2m, euler_ancestral):
        request = Request("a star", **(SMALLEST | {"steps": 5, "sampler": sampler}))

        def edit(step):
            if step.index in (1, 3):
                step.denoised.mul_(0.9)
                return step.latents * 0.8
            return step.latents

        def edited(engine, request=request):
            kept = []
            for i, moment in enumerate(begun(pipe, request, engine)):
                if i in (1, 3):
                    moment.latents.mul_(0.8)
                    moment.denoised.mul_(0.9)  # which a sampler of several steps has kept
                kept.append((moment.latents.clone(), moment.way))
            return kept

        with choice.using("torch"), torch.no_grad():
            wanted = edited(Plain())
            with pytest.warns(UserWarning, match="a caller edits the steps"):
                found = edited(fast(pipe))
            changed = replace(request, transform=edit)
            assert [way for _, way in found] == ["recorded"] * 2 + ["network"] * 3
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                transformed = steps_of(pipe, changed, fast(pipe))
        for (x, _), (true, _), other in zip(found, wanted, transformed, strict=True):
            assert relative_error(x, true) <= LIMIT
            assert relative_error(other, true) <= LIMIT


def steps_of(pipe: minisd.Pipeline, request: Request, engine) -> list[torch.Tensor]:
    """By `Pipeline.stream`."""
    pipe.engine = engine
    return [step.latents.clone() for step in pipe.stream(request)]


def test_an_observer_sees_every_call_and_changes_nothing(files):
    pipe, seen = load(files["sd1"], DEVICE), []

    def observe(call, x, estimates):
        seen.append((call.index, call.step, call.of, call.sigma, [estimate.shape for estimate in estimates]))

    with choice.using("torch"):
        wanted = steps(pipe, Request("a star", sampler=heun, **SMALLEST))
        with pytest.warns(UserWarning, match="a caller watches"):
            found = steps(pipe, Request("a star", sampler=heun, observe=observe, **SMALLEST), fast(pipe))
    assert {moment.way for moment in found} == {"network"}
    assert relative_error(found[-1].latents, wanted[-1].latents) <= LIMIT
    assert [(index, step, of) for index, step, of, *_ in seen] == [(0, 0, 5), (1, 0, 5), (2, 1, 5), (3, 1, 5), (4, 2, 5)]
    assert all(len(shapes) == 2 for *_, shapes in seen)


PROMPTS = {
    "and": {"prompt": "a red circle AND a blue star:0.6 AND grey:-0.3"},
    "and, no guidance of all": {"prompt": "a red circle:0.5 AND a blue star:0.5", "guidance_scale": 1.0},  # weight 0 for no words
    "and, unlike pictures": {"prompt": ["a red circle AND a star:2", "a ring:1.5"], "guidance_scale": [3.0, 7.5]},
    "and, unlike lengths": {"prompt": "a red circle AND " + "a blue star " * 50, "negative_prompt": "grey " * 160},
    "edit": {"prompt": "a [red:blue:0.5] circle", "negative_prompt": "[grey::2]"},
    "edit, long": {"prompt": "a [red circle:" + "blue star, " * 60 + ":1]"},
    "alternation": {"prompt": "a [red|blue|] circle"},
    "alternation, two calls a step": {"prompt": "a [red|blue|] circle", "sampler": heun},
    "all of it": {"prompt": "a ([red|blue]:1.3) circle BREAK [star] AND [a:b:0.5] (ring:0.5):0.7", "emphasis": "no-norm"},
    "comfy": {"prompt": "a ((red:1.3) circle) BREAK [star] AND", "emphasis": "comfy"},
}


@pytest.mark.parametrize(("name", "case"), [*(("sd1", case) for case in PROMPTS), ("sdxl", "all of it")])
def test_every_kind_of_prompt_both_ways(name, case, files, recording):
    """Recorded, and replayed: what changes from call to call is put in place between two replays."""
    pipe = load(files[name], DEVICE)
    request = Request(**(SMALLEST | {"steps": 4} | PROMPTS[case]))
    with choice.using("torch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "prompt: .* is no word")
        compare(pipe, request, engine=fast(pipe, graphs=True), limit=2 * LIMIT)


def test_a_conditioning_that_changes_on_the_way_both_ways(files):
    from minisd.diffusion.denoiser import Timeline

    for name in ("sd1", "sdxl"):
        pipe = load(files[name], DEVICE)
        first, second = (pipe.encode_prompt(text) for text in ("a red circle", "a blue star"))
        told = Timeline(((1, first), (9, second)))
        with choice.using("torch"):
            compare(pipe, Request(told, **(SMALLEST | {"steps": 4})))
            found = steps(pipe, Request(told, **(SMALLEST | {"steps": 4})))
            early = steps(pipe, Request("a red circle", **(SMALLEST | {"steps": 4})))
        assert torch.equal(found[1].latents, early[1].latents)
        assert not torch.equal(found[2].latents, early[2].latents)


# --- the fused networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", OFF_ON)
@torch.no_grad()
def test_fused_decoder_equals_the_vae(kernels):
    shapes = blueprint.vae((32, 64), (32, 64), (1, 1))
    network = AutoencoderKL(shapes)
    network.load_state_dict(blueprint.random_weights(shapes, 3))
    network = network.requires_grad_(False).to(DEVICE)
    latents = noise(2, 4, 3, 5).to(DEVICE)
    with choice.using("torch"):
        wanted = network.decode(latents)
    with choice.using(kernels):
        assert relative_error(FusedDecoder(network)(latents), wanted) <= LIMIT


@torch.no_grad()
def test_fusing_keeps_keys_values_and_memory():
    shapes = below(SMALL["sdxl"].shapes(), "model.diffusion_model")
    weights = blueprint.random_weights(shapes, 3)
    network = UNet(shapes)
    network.load_state_dict(weights)
    network.requires_grad_(False)
    fused = FusedUNet(network)
    assert set(network.state_dict()) == set(weights)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    stores = {p.untyped_storage().data_ptr() for p in network.parameters()}
    assert {fused.kv.untyped_storage().data_ptr(), fused.shift.untyped_storage().data_ptr()} < stores


def test_every_module_is_known_to_the_fused_form_or_refused_by_name(files):
    """Each class of module that the published networks have, in the UNet of one of them, replaced by a subclass."""
    pipe = load(files["sdxl"], DEVICE)
    request = Request("a star", **SMALLEST)
    for kind in sorted({type(module) for module in pipe.unet.modules()} - {UNet}, key=lambda kind: kind.__name__):
        name = next(name for name, module in pipe.unet.named_modules() if type(module) is kind)
        module, engine = pipe.unet.get_submodule(name), fast(pipe)
        module.__class__ = type(f"My{kind.__name__}", (kind,), {})
        try:
            with pytest.warns(UserWarning, match=f"is a My{kind.__name__}"):
                assert steps(pipe, replace(request, steps=1), engine)[0].way == "plain"
        finally:
            module.__class__ = kind


# --- buffers, recordings, changed weights ---------------------------------------------------------------------------------------


def test_steps_are_memory_of_their_own(files):
    pipe = load(files["sd1"], DEVICE)
    with torch.no_grad():
        found = list(begun(pipe, Request("a star", **SMALLEST), fast(pipe)))
    assert len({moment.latents.data_ptr() for moment in found}) == 3
    assert not torch.equal(found[0].latents, found[1].latents)


def test_the_second_prompt_and_other_numbers_of_steps_reuse_the_buffers(files):
    pipe = load(files["sd1"], DEVICE)
    engine = fast(pipe)
    for options in ({}, {"steps": 5, "seed": 2, "guidance_scale": 3.0}, {"steps": 2, "guidance_scale": 1.0}, {"sampler": heun}):
        compare(pipe, Request("a blue circle", **(SMALLEST | options)), engine=engine)
    assert len(engine.shapes) == 1


def test_replaced_weights_are_noticed(files):
    pipe = load(files["sd1"], DEVICE)
    request, engine = Request("a star", **SMALLEST), fast(pipe)
    before = steps(pipe, request, engine)
    pipe.unet.load_state_dict({key: value * 1.05 for key, value in pipe.unet.state_dict().items()}, assign=True)
    compare(pipe, request, engine=engine)
    assert relative_error(steps(pipe, request, engine)[-1].latents, before[-1].latents) > 1e-3


class Live:
    """As a recording: runs the call each time, and leaves the result in the same memory."""

    class graph:  # noqa: N801
        @staticmethod
        def pool():
            return None

    def __init__(self, run):
        self.run, self.result = run, None

    def replay(self):
        result = self.run()
        self.result = result.clone() if self.result is None else self.result.copy_(result)
        return self.result


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded for real on a GPU; on a CPU by `Live`."""
    if not CUDA:
        for module in ("graphs", "cuda"):
            monkeypatch.setattr(f"minisd.fast.{module}.record", lambda run, others: Live(run))


@torch.no_grad()
def test_weights_written_to_keep_the_recordings(files, recording):
    """Every weight of the network, in place, with recordings alive: what was derived from them is renewed where it stands."""
    pipe = load(files["sdxl"], DEVICE)
    request, engine = Request("a star", **(SMALLEST | {"steps": 4})), fast(pipe, graphs=True)
    before = steps(pipe, request, engine)
    fused, (buffers,) = engine.fused, engine.shapes.values()
    recordings = dict(buffers.recordings)
    for i, weight in enumerate(pipe.unet.parameters()):
        weight.mul_(1 + 0.02 * (i % 3)).add_(0.001)
    compare(pipe, request, engine=engine)
    assert engine.fused is fused
    assert next(iter(engine.shapes.values())) is buffers
    assert buffers.recordings == recordings
    assert relative_error(steps(pipe, request, engine)[-1].latents, before[-1].latents) > 1e-3


@torch.no_grad()
def test_weights_written_to_behind_the_scenes_are_renewed_on_request(files, recording):
    pipe = load(files["sd1"], DEVICE)
    pipe.engine = engine = fast(pipe, graphs=True)
    request = Request("a star", **SMALLEST)
    steps(pipe, request, engine)
    for weight in pipe.unet.parameters():
        weight.data.mul_(1.05)
    pipe.weights_changed()
    compare(pipe, request, engine=engine)


def rescaled(**options):
    return {"guidance_rescale": 0.7} | options


@pytest.mark.filterwarnings("ignore:drawing slower")
@pytest.mark.parametrize("case", ["sd1", "sdxl-refiner, two pictures"])
def test_all_others_call_the_recorded_network(case, files, recording):
    pipe = load(files[case.split(",")[0]], DEVICE)
    engine, count = fast(pipe, graphs=True), 2 if "two" in case else 1
    options = rescaled(**(SMALLEST | {"steps": 4, "num_images": count}))
    with choice.using("torch"):
        compare(pipe, Request("a red circle", **options), "network", engine)
    assert len(engine.network_calls.recordings) == 1


@pytest.mark.filterwarnings("ignore:drawing slower")
@pytest.mark.parametrize("options", [{}, rescaled()])
def test_two_streams_of_one_pipeline_run_in_turns(options, files):
    pipe = load(files["sd1"], DEVICE)
    engine = fast(pipe)
    requests = [Request(prompt, **(SMALLEST | options)) for prompt in ("a red star", "a blue circle")]
    wanted = [steps(pipe, request, engine) for request in requests]
    with torch.no_grad():
        turns = list(zip(*(begun(pipe, request, engine) for request in requests), strict=True))
    for number, turn in enumerate(turns):
        for stream, moment in enumerate(turn):
            assert torch.equal(moment.latents, wanted[stream][number].latents)
    assert len(engine.shapes) <= 1


SIZES = [(64, 64), (72, 64), (64, 72), (80, 64), (64, 80), (72, 72)]


@pytest.mark.filterwarnings("ignore:drawing slower")
@pytest.mark.parametrize("options", [{}, rescaled()])
def test_six_sizes_in_turns_and_a_weight_that_changes(options, files, recording):
    """More than are kept, twice each, so that some are replayed and some made again."""
    pipe = load(files["sd1"], DEVICE)
    engine = fast(pipe, graphs=True)
    requests = [Request("a star", **(SMALLEST | options | {"width": w, "height": h})) for w, h in SIZES]
    for turn in range(2):
        for request in (*requests, requests[-1]):
            compare(pipe, request, "network" if options else "recorded", engine, 2 * LIMIT)
        kept = engine.network_calls.recordings if options else engine.shapes
        assert len(kept) == 4
        if not options:
            assert all(buffers.recordings for buffers in engine.shapes.values())
        if turn == 0:
            pipe.unet.out[2].bias.add_(0.1)


@torch.no_grad()
def test_what_a_recorder_returns_stays(recording):
    weight = torch.nn.Linear(3, 3).to(DEVICE).requires_grad_(False)
    calls = NetworkRecorder(weight, lambda: weight.forward, graphs=True)
    given = [noise(2, 3, seed=seed).to(DEVICE) for seed in range(4)]
    found = [calls(x) for x in given]
    assert all(torch.allclose(y, weight(x)) for x, y in zip(given, found, strict=True))
    with choice.using("torch"):
        calls(given[0])
        calls(given[0])
    assert len(calls.calls.recordings) == 2  # one for each choice of kernels
    weight.bias.add_(1)
    assert torch.allclose(calls(given[0]), weight(given[0]))
    weight.bias = torch.nn.Parameter(weight.bias.detach() + 1, requires_grad=False)
    assert torch.allclose(calls(given[0]), weight(given[0]))
    assert not calls.calls.recordings


def test_a_stream_that_ends_after_the_weights_were_replaced_leaves_nothing_behind(files, recording):
    pipe = load(files["sd1"], DEVICE)
    engine, request = fast(pipe, graphs=True), Request("a star", **SMALLEST)
    with torch.no_grad():
        stream = begun(pipe, request, engine)
        next(stream)
        pipe.unet.load_state_dict({key: value * 1.1 for key, value in pipe.unet.state_dict().items()}, assign=True)
        wanted = steps(pipe, request, engine)
        stream.close()
    found = steps(pipe, request, engine)
    assert torch.equal(found[-1].latents, wanted[-1].latents)
    assert len(engine.shapes) == 1


@pytest.mark.filterwarnings("ignore:drawing slower")
def test_a_dropped_pipeline_is_gone_at_once(files, monkeypatch):
    """With its recordings: they keep no hold of what made them."""
    if not CUDA:
        for module in ("graphs", "cuda"):
            monkeypatch.setattr(f"minisd.fast.{module}.record", lambda run, others: Recording(Live.graph, run()))
        monkeypatch.setattr(Recording, "replay", lambda self: self.result)
    pipe = load(files["sd1"], DEVICE)
    engine = fast(pipe, graphs=True)
    for options in ({}, rescaled()):
        steps(pipe, Request("a star", **(SMALLEST | options)), engine)
    gone = [weakref.ref(each) for each in (pipe.unet, engine)]
    gc.disable()
    try:
        del pipe, engine
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()


@torch.no_grad()
def test_without_memory_to_record_drawing_goes_on(files, monkeypatch):
    @contextmanager
    def full(graph, pool):
        raise RuntimeError("CUDA error: out of memory")
        yield

    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("minisd.fast.graphs.capture", full)
    pipe = load(files["sd1"])
    for options in ({}, rescaled()):
        request, engine = Request("a star", **(SMALLEST | options | {"steps": 4})), fast(pipe, graphs=True)
        wanted = steps(pipe, request)
        with pytest.warns(UserWarning, match="no memory to record") as told:
            found = steps(pipe, request, engine)
        assert sum("no memory to record" in str(each.message) for each in told) == 1  # and is not tried again
        assert relative_error(found[-1].latents, wanted[-1].latents) <= LIMIT


def test_fast_can_be_turned_off(monkeypatch, files):
    monkeypatch.setenv("MINISD_FAST", "maybe")
    with pytest.raises(minisd.UsageError, match="MINISD_FAST: expected 0 or 1, found 'maybe'"):
        minisd.load(files["sd1"], device=DEVICE)
    monkeypatch.setenv("MINISD_FAST", "0")
    assert isinstance(minisd.load(files["sd1"], device=DEVICE).engine, Plain)
    assert isinstance(minisd.load(files["sd1"], device=DEVICE, fast=False).engine, Plain)


def test_own_samplers_have_a_wish_and_a_label(files):
    pipe = load(files["sd1"])
    wish = minisd.diffusion.levels.LevelWish("karras")
    result = pipe("a star", **(SMALLEST | {"sampler": Sampler(heun, "Heun", wish)}))
    assert (result.metadata[0]["sampler_label"], result.metadata[0]["spacing"]) == ("Heun", "karras")


def test_sdxl_decodes_in_bfloat16_where_the_unet_runs_in_float16():
    """Its VAE overflows in float16."""
    from minisd.codec import vae_dtype

    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    assert vae_dtype(half, overflows=True, has_bfloat16=True) == brain
    assert vae_dtype(half, overflows=True, has_bfloat16=False) == half
    assert vae_dtype(half, overflows=False, has_bfloat16=True) == half
    assert vae_dtype(full, overflows=True, has_bfloat16=True) == full


@torch.no_grad()
def test_codec_decodes_with_the_engine_what_is_in_its_dtype(files):
    pipe = load(files["sdxl"], DEVICE)
    latents = noise(1, 4, 8, 8).to(DEVICE)
    engine = fast(pipe)
    with choice.using("torch"):
        pipe.codec.engine = Plain()
        wanted = pipe.codec.decode(latents)
        pipe.codec.engine = engine
        for _ in range(3):
            assert relative_error(pipe.codec.decode(latents), wanted) <= LIMIT
    assert engine.recorders[pipe.vae].calls is not None


@torch.no_grad()
def test_a_touched_decoder_or_text_encoder_is_run_as_it_stands(files):
    pipe = load(files["sd1"], DEVICE)
    engine, latents = fast(pipe), noise(1, 4, 8, 8).to(DEVICE)
    ids = torch.tensor([[49406, 320, 49407]], device=DEVICE)
    (encoder,) = pipe.text_encoders
    before = engine.decode(pipe.vae, latents), engine.read(encoder, ids)[-1]
    pipe.vae.decoder.conv_out.register_forward_hook(lambda module, inputs, output: output * 1.5)
    list(encoder.modules())[-1].register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.warns(UserWarning, match="AutoencoderKL: decoder.conv_out has a hook"):
        assert relative_error(engine.decode(pipe.vae, latents), 1.5 * before[0]) <= LIMIT
    with pytest.warns(UserWarning, match="CLIPTextModel: .* has a hook"):
        assert torch.equal(engine.read(encoder, ids)[-1], encoder.hidden_states(ids)[-1])


@torch.no_grad()
def test_a_decoder_that_is_written_to_keeps_its_recordings(files, recording):
    pipe = load(files["sdxl"], DEVICE)
    decoder, latents = decoder_recorder(pipe.vae, graphs=True), noise(1, 4, 8, 8).to(DEVICE)
    for _ in range(3):
        decoder(latents)
    calls = decoder.calls
    for weight in pipe.vae.parameters():
        weight.mul_(1.01).add_(0.001)
    assert relative_error(decoder(latents), pipe.vae.decode(latents)) <= LIMIT
    assert decoder.calls is calls


@pytest.mark.gpu
@torch.no_grad()
def test_recorded_decoding_equals_eager(files):
    pipe = load(files["sdxl"], "cuda", "float16")
    decoder, first, second = decoder_recorder(pipe.vae, graphs=True), noise(1, 4, 8, 8), noise(1, 4, 8, 8, seed=1)
    first, second = (x.to("cuda", next(pipe.vae.parameters()).dtype) for x in (first, second))
    wanted = [FusedDecoder(pipe.vae)(x) for x in (first, second)]
    for _ in range(3):
        assert torch.equal(decoder(first), wanted[0])
        assert torch.equal(decoder(second), wanted[1])
    assert decoder.calls is not None
    assert len(decoder.calls.recordings) == 1


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@torch.no_grad()
def test_recorded_texts_are_the_texts(name, files, recording):
    pipe = load(files[name], DEVICE)
    prompts = ["a red star", "a blue circle " * 40]
    plain_texts = replace(pipe.conditioner, run=lambda encoder, ids: encoder.hidden_states(ids))
    wanted = encode(plain_texts, prompts, "original", clip_skip=2)
    recorded = {encoder: text_recorder(encoder, graphs=True) for encoder in pipe.text_encoders}
    texts = replace(pipe.conditioner, run=lambda encoder, ids: recorded[encoder](ids).unbind())
    for _ in range(3):
        found = encode(texts, prompts, "original", clip_skip=2)
        assert relative_error(found.context, wanted.context) <= LIMIT
        assert found.pooled is None or relative_error(found.pooled, wanted.pooled) <= LIMIT
    assert all(len(each.calls.recordings) == 1 for each in recorded.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_graph_equals_eager_on_a_gpu(name, files):
    """The same kernels over the same numbers: bit for bit."""
    pipe = load(files[name], "cuda", "float16")
    request = Request("a star", width=64, height=64, steps=4, seed=1)
    wanted, engine = steps(pipe, request, fast(pipe, graphs=False)), fast(pipe, graphs=True)
    for _ in range(2):
        for found, true in zip(steps(pipe, request, engine), wanted, strict=True):
            assert torch.equal(found.latents, true.latents)


@pytest.mark.gpu
def test_a_graph_outlives_the_others(files):
    """Of another model, and of the same model with other weights: each with its own memory, cuBLAS's included."""
    first, second = (load(files["sd1"], "cuda", "float16") for _ in range(2))
    request = Request("a star", width=64, height=64, steps=4, seed=1)
    wanted = steps(first, request, first.engine)[-1].latents
    assert torch.equal(steps(second, request, second.engine)[-1].latents, wanted)
    del second
    torch.cuda.empty_cache()
    assert torch.equal(steps(first, request, first.engine)[-1].latents, wanted)
    for _ in range(2):
        first.unet.load_state_dict({key: value.clone() for key, value in first.unet.state_dict().items()}, assign=True)
        assert torch.equal(steps(first, request, first.engine)[-1].latents, wanted)


@pytest.mark.gpu
def test_the_host_runs_no_more_than_two_calls_ahead(files):
    """A bar that has come to its end before the GPU has is a lie: when a step is yielded, the call before the last is done."""
    pipe = load(files["sd1"], "cuda", "float16")
    engine, request = fast(pipe, graphs=True), Request("a star", width=512, height=512, steps=20, seed=1, num_images=4)
    steps(pipe, request, engine)
    waits = []
    for _ in begun(pipe, request, engine):
        event = torch.cuda.Event()
        event.record()
        waits.append(event)
        assert all(each.query() for each in waits[:-3])


@pytest.mark.gpu
def test_no_synchronisation_and_no_allocation_in_the_loop(files):
    pipe = load(files["sd1"], "cuda", "float16")
    request = Request("a star", width=64, height=64, steps=6, seed=1)
    engine = fast(pipe, graphs=True)
    steps(pipe, request, engine)  # records
    with torch.no_grad():
        loop = begun(pipe, request, engine)
        next(loop)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = list(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(kept) == 5
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
def test_kernels_on_and_off_draw_the_same_picture(files):
    """In half precision every operation rounds: the latents stay within a hundredth (random weights), pixels within 3."""
    results = {}
    for kernels in ("torch", "auto", "triton"):
        with choice.using(kernels):
            results[kernels] = load(files["sd1"], "cuda", "float16")("a star", width=128, height=128, steps=4, seed=1)
    for kernels in ("auto", "triton"):
        assert relative_error(results[kernels].latents, results["torch"].latents) <= 1e-2
        pixels = [np.asarray(results[each].images[0], dtype=np.int16) for each in (kernels, "torch")]
        assert np.abs(pixels[0] - pixels[1]).max() <= 3
