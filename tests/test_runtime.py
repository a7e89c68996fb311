"""The fast way against the plain one: step by step, on a CPU without recording, with kernels in the interpreter, and on a GPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SMALL
from helpers import relative_error
from PIL import Image

import minisd
from minisd.fast import choice
from minisd.fast.cuda import Runtime, decoder_recorder, plain, text_recorder
from minisd.fast.decoder import FusedDecoder
from minisd.fast.graphs import NetworkRecorder, Recording
from minisd.fast.unet import FusedUNet
from minisd.models.shapes import below
from minisd.models.unet import UNet
from minisd.models.vae import AutoencoderKL
from minisd.request import Request, noise_source, settle
from minisd.text.conditioner import hidden_states
from minisd.workbench import blueprint

LIMIT = 1e-5
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
runs_kernels = [pytest.mark.gpu] if CUDA else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
OFF_ON = ["torch", pytest.param("triton", marks=runs_kernels)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: small.write(folder / f"{name}.safetensors") for name, small in SMALL.items()}


def load(path: Path, device: str = "cpu", dtype: str = "float32") -> minisd.Pipeline:
    return minisd.load(path, device=device, dtype=dtype)


def steps(pipe: minisd.Pipeline, request: Request, dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(latents, denoised) of every step of all the pictures at once; dtype: of the sampler's arithmetic."""
    plan = settle(request, pipe.facts())
    part, sigmas = slice(0, len(plan.prompts)), pipe.sigmas(plan)
    with torch.no_grad():
        known = pipe.codec.encode(plan.canvas.pixels) if plan.canvas and pipe.recognition.task == "draw" else None
        x = pipe.start(plan, part, sigmas, known).to(dtype)
        return list(pipe.sample(plan, part, x, sigmas, known, noise_source(plan.seeds, x)))


def compare(pipe: minisd.Pipeline, request: Request, limit: float = LIMIT) -> None:
    """The plain way with its sampler in float64: where the noise starts at 4096 (sdxl-v), its sums lose four digits in float32,
    and those of the fast way, whose coefficients are made in float64, none."""
    pipe.runtime = None
    wanted = steps(pipe, request, torch.float64)
    pipe.runtime = Runtime(pipe.unet, graphs=CUDA)
    found = steps(pipe, request)
    assert pipe.runtime.fused is not None, "went the plain way"
    assert len(found) == len(wanted) == request.steps
    for (x, denoised), (true_x, true_denoised) in zip(found, wanted, strict=True):
        assert relative_error(x, true_x) <= limit
        assert relative_error(denoised, true_denoised) <= limit


PICTURE = np.full((64, 64, 3), 128, dtype=np.uint8)
HALF = np.zeros((64, 64), dtype=np.uint8)
HALF[:, 32:] = 255
REQUESTS = {
    "sd1": {},
    "sd1, no guidance": {"guidance_scale": 1.0},
    "sd1, uneven": {"width": 72, "height": 56},
    "sd1, ddim": {"sampler": "ddim", "spacing": "trailing"},
    "sd1, three pictures, two chunks": {"num_images": 3, "prompt": "a star " * 100},
    "sd2": {},
    "sdxl": {},
    "sdxl, uneven, two pictures": {"width": 88, "height": 56, "num_images": 2},
    "sdxl-v": {},
    "sdxl-refiner": {},
}


@pytest.mark.parametrize("case", REQUESTS)
def test_every_step_equals_the_plain_way(case, files):
    options = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 3, "seed": 1} | REQUESTS[case]
    with choice.using("torch"):
        compare(load(files[case.split(",")[0]], DEVICE), Request(**options))


def test_a_mask_beside_the_latents_goes_the_fast_way(files):
    options = {"init_image": Image.fromarray(PICTURE), "mask": Image.fromarray(HALF), "strength": 1.0}
    pipe = load(files["sd1-inpaint"], DEVICE)
    with choice.using("torch"):
        compare(pipe, Request("a star", width=64, height=64, steps=3, seed=1, **options))


@pytest.mark.parametrize("kernels", OFF_ON)
def test_whole_steps_with_kernels(kernels, files):
    """At the least size: the interpreter is slow."""
    pipe = load(files["sd1"], DEVICE)
    request = Request("a star", width=64, height=64, steps=3 if CUDA else 1, seed=1)
    with choice.using("torch"):
        pipe.runtime = None
        wanted = steps(pipe, request)
    pipe.runtime = Runtime(pipe.unet, graphs=CUDA)
    with choice.using(kernels):
        found = steps(pipe, request)
    assert max(relative_error(x, true) for (x, _), (true, _) in zip(found, wanted, strict=True)) <= LIMIT


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


def test_steps_are_memory_of_their_own(files):
    pipe = load(files["sd1"], DEVICE)
    pipe.runtime = Runtime(pipe.unet, graphs=CUDA)
    found = steps(pipe, Request("a star", width=64, height=64, steps=3, seed=1))
    assert len({x.data_ptr() for x, _ in found}) == 3
    assert not torch.equal(found[0][0], found[1][0])


def test_the_second_prompt_and_other_numbers_of_steps_reuse_the_buffers(files):
    pipe = load(files["sd1"], DEVICE)
    runtime = Runtime(pipe.unet, graphs=CUDA)
    for request in (
        Request("a star", width=64, height=64, steps=3, seed=1),
        Request("a blue circle", width=64, height=64, steps=5, seed=2, guidance_scale=3.0),
        Request("a blue circle", width=64, height=64, steps=2, seed=2, guidance_scale=1.0),
    ):
        pipe.runtime = None
        wanted = steps(pipe, request)
        pipe.runtime = runtime
        found = steps(pipe, request)
        assert relative_error(found[-1][0], wanted[-1][0]) <= LIMIT
    assert len(runtime.shapes) == 2  # with guidance and without


def test_changed_weights_are_noticed(files):
    pipe = load(files["sd1"], DEVICE)
    request = Request("a star", width=64, height=64, steps=2, seed=1)
    runtime = Runtime(pipe.unet, graphs=CUDA)
    pipe.runtime = runtime
    before = steps(pipe, request)
    pipe.unet.middle_block[0].out_layers[3].bias.mul_(100)
    pipe.unet.load_state_dict({key: value.clone() for key, value in pipe.unet.state_dict().items()}, assign=True)
    compare(pipe, request)
    pipe.runtime = runtime
    assert relative_error(steps(pipe, request)[-1][0], before[-1][0]) > 1e-3


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


UNPLAIN = {
    "sd1, fresh noise": {"sampler": "ddim", "eta": 1.0, "spacing": "trailing"},
    "sd1, mask": {"init_image": Image.fromarray(PICTURE), "mask": Image.fromarray(HALF)},
    "sd1-edit": {"init_image": Image.fromarray(PICTURE)},
    "playground": {},
    "sdxl-refiner, rescaled, two pictures": {"guidance_rescale": 0.7, "num_images": 2},
}


@pytest.mark.parametrize("case", UNPLAIN)
def test_all_others_call_the_recorded_network(case, files, recording):
    pipe = load(files[case.split(",")[0]], DEVICE)
    options = {"prompt": "a red circle", "width": 64, "height": 64, "steps": 4, "seed": 1} | UNPLAIN[case]
    with choice.using("torch"):
        pipe.runtime = None
        wanted = steps(pipe, Request(**options))
        pipe.runtime = Runtime(pipe.unet, graphs=True)
        found = steps(pipe, Request(**options))
    assert len(pipe.runtime.calls.recordings) == 1
    assert len(found) == len(wanted) == 4
    for (x, denoised), (true_x, true_denoised) in zip(found, wanted, strict=True):
        assert relative_error(x, true_x) <= LIMIT
        assert relative_error(denoised, true_denoised) <= LIMIT


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}])
def test_two_streams_of_one_pipeline_run_in_turns(options, files):
    pipe = load(files["sd1"], DEVICE)
    pipe.runtime = runtime = Runtime(pipe.unet, graphs=CUDA)
    requests = [Request(prompt, width=64, height=64, steps=3, seed=1, **options) for prompt in ("a red star", "a blue circle")]
    wanted = [steps(pipe, request) for request in requests]
    plans = [settle(request, pipe.facts()) for request in requests]
    streams = []
    with torch.no_grad():
        for plan in plans:
            sigmas = pipe.sigmas(plan)
            x = pipe.start(plan, slice(0, 1), sigmas, None)
            streams.append(pipe.sample(plan, slice(0, 1), x, sigmas, None, noise_source(plan.seeds, x)))
        turns = list(zip(*streams, strict=True))
    for number, turn in enumerate(turns):
        for stream, (x, _) in enumerate(turn):
            assert torch.equal(x, wanted[stream][number][0])
    assert len(runtime.shapes) <= 1


SIZES = [(64, 64), (72, 64), (64, 72), (80, 64), (64, 80), (72, 72)]


@pytest.mark.parametrize("options", [{}, {"guidance_rescale": 0.7}])
def test_six_sizes_in_turns_and_a_weight_that_changes(options, files, recording):
    """More than are kept, twice each, so that some are replayed and some made again."""
    pipe = load(files["sd1"], DEVICE)
    runtime = Runtime(pipe.unet, graphs=True)
    requests = [Request("a star", width=w, height=h, steps=3, seed=1, **options) for w, h in SIZES]
    for turn in range(2):
        for request in (*requests, requests[-1]):
            pipe.runtime = None
            wanted = steps(pipe, request)
            pipe.runtime = runtime
            found = steps(pipe, request)
            assert relative_error(found[-1][0], wanted[-1][0]) <= 2 * LIMIT
        kept = runtime.calls.recordings if options else runtime.shapes
        assert len(kept) == 4
        if not options:
            assert all(buffers.recording for buffers in runtime.shapes.values())
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
    assert not calls.calls.recordings


def test_a_stream_that_ends_after_the_weights_have_changed_leaves_nothing_behind(files, recording):
    pipe = load(files["sd1"], DEVICE)
    pipe.runtime = runtime = Runtime(pipe.unet, graphs=True)
    request = Request("a star", width=64, height=64, steps=3, seed=1)
    plan = settle(request, pipe.facts())
    with torch.no_grad():
        sigmas = pipe.sigmas(plan)
        x = pipe.start(plan, slice(0, 1), sigmas, None)
        stream = pipe.sample(plan, slice(0, 1), x, sigmas, None, noise_source(plan.seeds, x))
        next(stream)
        changed = {key: value * 1.1 for key, value in pipe.unet.state_dict().items()}
        pipe.unet.load_state_dict(changed, assign=True)
        wanted = steps(pipe, request)
        stream.close()
    found = steps(pipe, request)
    assert torch.equal(found[-1][0], wanted[-1][0])
    assert len(runtime.shapes) == 1


def test_a_dropped_pipeline_is_gone_at_once(files, monkeypatch):
    """With its recordings: they keep no hold of what made them."""
    if not CUDA:
        for module in ("graphs", "cuda"):
            monkeypatch.setattr(f"minisd.fast.{module}.record", lambda run, others: Recording(Live.graph, run()))
        monkeypatch.setattr(Recording, "replay", lambda self: self.result)
    pipe = load(files["sd1"], DEVICE)
    pipe.runtime = Runtime(pipe.unet, graphs=True)
    for options in ({}, {"guidance_rescale": 0.7}):
        steps(pipe, Request("a star", width=64, height=64, steps=3, seed=1, **options))
    gone = [weakref.ref(each) for each in (pipe.unet, pipe.runtime)]
    gc.disable()
    try:
        del pipe
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
    for options in ({}, {"guidance_rescale": 0.7}):
        request = Request("a star", width=64, height=64, steps=4, seed=1, **options)
        pipe.runtime = None
        wanted = steps(pipe, request)
        pipe.runtime = Runtime(pipe.unet, graphs=True)
        with pytest.warns(UserWarning, match="no memory to record") as told:
            found = steps(pipe, request)
        assert len(told) == 1  # and is not tried again
        assert relative_error(found[-1][0], wanted[-1][0]) <= LIMIT


@pytest.mark.gpu
def test_a_graph_outlives_the_others(files):
    """Of another model, and of the same model with other weights: each with its own memory, cuBLAS's included."""
    first, second = (load(files["sd1"], "cuda", "float16") for _ in range(2))
    request = Request("a star", width=64, height=64, steps=4, seed=1)
    wanted = steps(first, request)[-1][0]
    assert torch.equal(steps(second, request)[-1][0], wanted)
    del second
    torch.cuda.empty_cache()
    assert torch.equal(steps(first, request)[-1][0], wanted)
    for _ in range(2):
        first.unet.out[2].bias.add_(0)  # the same numbers, written anew
        assert torch.equal(steps(first, request)[-1][0], wanted)


def test_what_is_not_plain_goes_the_plain_way():
    from minisd.diffusion.denoiser import ClassifierFree, TextAndImage, unguided

    assert plain(unguided, "epsilon", 1.0, 0.0)
    assert plain(ClassifierFree(7.5), "v", 1.0, 0.0)
    assert not plain(ClassifierFree(7.5, 0.7), "epsilon", 1.0, 0.0)
    assert not plain(TextAndImage(7.5, 1.5), "epsilon", 1.0, 0.0)
    assert not plain(unguided, "edm", 1.0, 0.0)
    assert not plain(unguided, "v", 0.5, 0.0)
    assert not plain(unguided, "epsilon", 1.0, 0.5)


def test_on_a_cpu_everything_goes_the_plain_way(tiny):
    assert tiny.runtime is None


def test_sdxl_decodes_in_bfloat16_where_the_unet_runs_in_float16():
    """Its VAE overflows in float16."""
    from minisd.codec import vae_dtype

    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    assert vae_dtype(half, overflows=True, has_bfloat16=True) == brain
    assert vae_dtype(half, overflows=True, has_bfloat16=False) == half
    assert vae_dtype(half, overflows=False, has_bfloat16=True) == half
    assert vae_dtype(full, overflows=True, has_bfloat16=True) == full


@torch.no_grad()
def test_codec_decodes_with_the_fast_decoder_what_is_in_its_dtype(files):
    pipe = load(files["sdxl"], DEVICE)
    latents = noise(1, 4, 8, 8).to(DEVICE)
    with choice.using("torch"):
        pipe.codec.decoder = None
        wanted = pipe.codec.decode(latents)
        pipe.codec.decoder = decoder_recorder(pipe.vae, graphs=CUDA)
        for _ in range(3):
            assert relative_error(pipe.codec.decode(latents), wanted) <= LIMIT
    assert pipe.codec.decoder.calls is not None


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
    plain_texts = replace(pipe.conditioner, run=hidden_states)
    wanted = plain_texts.encode(prompts, clip_skip=2)
    recorded = {encoder: text_recorder(encoder, graphs=True) for encoder in pipe.text_encoders}
    texts = replace(pipe.conditioner, run=lambda encoder, ids: recorded[encoder](ids).unbind())
    for _ in range(3):
        found = texts.encode(prompts, clip_skip=2)
        assert relative_error(found.context, wanted.context) <= LIMIT
        assert found.pooled is None or relative_error(found.pooled, wanted.pooled) <= LIMIT
    assert all(len(each.calls.recordings) == 1 for each in recorded.values())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_graph_equals_eager_on_a_gpu(name, files):
    """The same kernels over the same numbers: bit for bit."""
    pipe = load(files[name], "cuda", "float16")
    request = Request("a star", width=64, height=64, steps=4, seed=1)
    pipe.runtime = Runtime(pipe.unet, graphs=False)
    wanted = steps(pipe, request)
    pipe.runtime = Runtime(pipe.unet, graphs=True)
    for _ in range(2):
        for (found, _), (true, _) in zip(steps(pipe, request), wanted, strict=True):
            assert torch.equal(found, true)


@pytest.mark.gpu
def test_no_synchronisation_and_no_allocation_in_the_loop(files):
    pipe = load(files["sd1"], "cuda", "float16")
    request = Request("a star", width=64, height=64, steps=6, seed=1)
    pipe.runtime = Runtime(pipe.unet, graphs=True)
    steps(pipe, request)  # records
    plan = settle(request, pipe.facts())
    sigmas = pipe.sigmas(plan)
    with torch.no_grad():
        x = pipe.start(plan, slice(0, 1), sigmas, None)
        loop = pipe.sample(plan, slice(0, 1), x, sigmas, None, noise_source(plan.seeds, x))
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
