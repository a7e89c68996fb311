"""Taps: every module of every family, at chosen steps, to see and to change; nothing is left behind."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SMALL
from PIL import Image

import minisd
from minisd.fast import choice
from minisd.fast.cpu.engine import Cpu
from minisd.fast.cuda import Cuda
from minisd.inside.taps import Watched, makes_value

UNET = "model.diffusion_model"
QUICKLY = {"steps": 2, "seed": 1, "width": 32, "height": 32}
GREY = Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8))
TASKS = {
    "sd1-inpaint": {"init_image": GREY, "mask": np.ones((64, 64))},
    "sdxl-inpaint": {"init_image": GREY, "mask": np.ones((64, 64))},
    "sd1-edit": {"init_image": GREY},
}


def hooks_of(pipe: minisd.Pipeline) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.model.modules())


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = tmp_path_factory.mktemp("families")
    made: dict[str, minisd.Pipeline] = {}

    def pipe(family: str) -> minisd.Pipeline:
        if family not in made:
            made[family] = minisd.load(SMALL[family].write(folder / f"{family}.safetensors"), device="cpu", dtype="float32")
        return made[family]

    return pipe


ARCHITECTURES = ("sd1", "sd2", "sdxl", "sdxl-refiner")  # the others have the modules of one of these
EACH = [family if family in ARCHITECTURES else pytest.param(family, marks=pytest.mark.slow) for family in SMALL]


@pytest.mark.parametrize("family", EACH)
def test_every_module_of_every_family_hands_out_its_values(family, pipes):
    pipe = pipes(family)
    request = {"steps": 2, "seed": 1, "width": 32, "height": 32} | TASKS.get(family, {})
    with minisd.tap(pipe, "*") as values:
        pipe("a star", **request)
        pipe.codec.encode(torch.zeros(1, 3, 32, 32))
    seen = {value.name for value in values}
    # Of position embeddings only the weight is read, and SDXL takes the layer before the last of its first encoder, as it is.
    unused = ("position_embedding", "embedders.0.transformer.text_model.final_layer_norm")
    wanted = {name for name, module in pipe.model.named_modules() if name and makes_value(module) and not name.endswith(unused)}
    assert wanted - seen == set()
    assert all(value.output.isfinite().all() and value.module is pipe.model.get_submodule(value.name) for value in values)
    assert {value.step for value in values[f"{UNET}.*"]} == {0, 1}
    assert {value.step for value in values if not value.name.startswith(UNET)} == {None}
    assert hooks_of(pipe) == 0


def test_values_are_those_of_a_hook_and_the_picture_is_the_same(tiny):
    name, own = f"{UNET}.middle_block", []
    hook = tiny.unet.middle_block.register_forward_hook(lambda block, inputs, output: own.append(output.clone()))
    wanted = tiny("a star", **QUICKLY)
    hook.remove()
    with minisd.tap(tiny, name) as values:
        found = tiny("a star", **QUICKLY)
    assert [value.name for value in values] == [name] * 2
    assert all(torch.equal(value.output, other) for value, other in zip(values, own, strict=True))
    assert torch.equal(found.latents, wanted.latents)
    assert "changed" not in found.metadata[0]  # it only looked


def test_steps_are_those_of_the_sampler(tiny):
    """Heun asks twice a step, but for the last."""
    with minisd.tap(tiny, f"{UNET}.out", steps=[0, 2]) as values:
        tiny("a star", **QUICKLY | {"steps": 3}, sampler="heun", num_images=2)
    assert [(value.step, value.call.index) for value in values] == [(0, 0), (0, 1), (2, 4)] * 2
    with minisd.tap(tiny, ["cond_stage_model.*.layers.0", f"{UNET}.out"], steps=1) as values:
        tiny("a star", **QUICKLY)
    assert [(value.name.split(".")[0], value.step) for value in values] == [("cond_stage_model", None), ("model", 1)]


def test_a_change_goes_on_in_the_place_of_the_output(tiny):
    plain = tiny("a star", **QUICKLY)
    with minisd.tap(tiny, f"{UNET}.middle_block", lambda value: value.output * 0.5, steps=1) as values:
        changed = tiny("a star", **QUICKLY)
    assert len(values) == 0
    assert not torch.equal(changed.latents, plain.latents)
    assert "hook" in changed.metadata[0]["changed"]
    hook = tiny.unet.middle_block.register_forward_hook(lambda block, inputs, output: output * 0.5)
    with minisd.tap(tiny, f"{UNET}.middle_block", lambda value: value.output * 2, steps=0):  # undoes it at the first step
        again = tiny("a star", **QUICKLY)
    hook.remove()
    assert torch.equal(again.latents, changed.latents)
    assert torch.equal(tiny("a star", **QUICKLY).latents, plain.latents)


def test_nothing_is_left_behind_after_an_exception(tiny):
    engine = tiny.engine

    def fails(value):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"), minisd.tap(tiny, "*", fails):
        tiny("a star", **QUICKLY)
    with pytest.raises(KeyboardInterrupt), minisd.tap(tiny, "*"), minisd.tap(tiny, f"{UNET}.out"):
        raise KeyboardInterrupt
    assert hooks_of(tiny) == 0
    assert tiny.engine is engine


def test_taps_may_be_nested_and_streams_run_in_turns(tiny):
    with minisd.tap(tiny, f"{UNET}.out") as first, minisd.tap(tiny, f"{UNET}.middle_block", steps=1) as second:
        pair = [tiny.stream("a star", **QUICKLY | {"steps": count}) for count in (2, 3)]
        for _ in range(2):
            for stream in pair:
                next(stream)
    assert [(value.step, value.call.of) for value in first] == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert len(second) == 2


def test_the_unet_by_hand_belongs_to_no_step(tiny):
    told = tiny.encode_prompt("a star")
    with minisd.tap(tiny, f"{UNET}.out", steps=3) as values:
        tiny.unet(torch.zeros(1, 4, 8, 8, dtype=tiny.dtype), torch.tensor([500.0]), told.context)
    assert [value.step for value in values] == [None]


def test_a_fast_pipeline_takes_the_plain_way_and_says_so(tiny):
    with choice.using("torch"):
        plain, own = tiny("a star", **QUICKLY).latents, tiny.engine
    tiny.engine = fast = Cuda(tiny.unet, False)
    try:
        with pytest.warns(UserWarning, match="slower.*taps"), minisd.tap(tiny, f"{UNET}.out") as values:
            steps = list(tiny.stream("a star", **QUICKLY))
        assert [step.way for step in steps] == ["plain", "plain"]
        assert len(values) == 2
        assert torch.equal(steps[-1].latents, plain)
        assert tiny.engine is fast
    finally:
        tiny.engine = own


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (f"{UNET}.middel_block", {}, "names: expected modules of this checkpoint, such as .*middle_block"),
        (f"{UNET}.input_blocks", {}, "only holds other modules"),
        ([3], {}, "names: expected names of modules, found 3"),
        ("*", {"steps": -1}, "steps: expected numbers of steps from 0, found -1"),
        ("*", {"steps": ["a"]}, "steps: expected"),
        ("*", {"steps": []}, "steps: expected"),
    ],
)
def test_what_is_no_tap_is_told(names, options, said, tiny):
    with pytest.raises(minisd.UsageError, match=said), minisd.tap(tiny, names, **options):
        pass
    assert hooks_of(tiny) == 0


def test_a_change_of_another_shape_is_told(tiny):
    with (
        pytest.raises(minisd.UsageError, match=r"change: expected None or a tensor \(2, 4, 8, 8\) for .*out, found \(1, 4"),
        minisd.tap(tiny, f"{UNET}.out", lambda value: value.output[:1]),
    ):
        tiny("a star", **QUICKLY)
    with pytest.raises(minisd.UsageError, match="pipe: expected a pipeline"), minisd.tap(tiny.unet, "*"):
        pass


def test_a_tap_is_told_of_by_no_warning_on_a_cpu():
    pipe = minisd.load(device="cpu", dtype="float32")
    assert isinstance(pipe.engine, Cpu)
    with warnings.catch_warnings(action="error"), minisd.tap(pipe, f"{UNET}.out"):
        assert isinstance(pipe.engine, Watched)
    assert isinstance(pipe.engine, Cpu)


def work_of(pipe: minisd.Pipeline) -> Counter[str]:
    """The operations of one picture, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        pipe("a star", **QUICKLY)
    return Counter(event.name for event in seen.events())


def test_without_taps_nothing_more_is_done_than_if_there_had_never_been_any():
    """The same operations of the same modules, none of them hooked or wrapped: so it takes as long as before."""
    pipe = minisd.load(device="cpu", dtype="float32")
    pipe("a star", **QUICKLY)  # the first one has weights to bring into order
    engine, before = pipe.engine, work_of(pipe)
    with minisd.tap(pipe, "*"):
        assert work_of(pipe) != before
    pipe("a star", **QUICKLY)
    assert work_of(pipe) == before
    assert pipe.engine is engine
    assert hooks_of(pipe) == 0
    assert not any("forward" in vars(module) for module in pipe.model.modules())
