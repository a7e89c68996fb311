"""Noise of a seed against the programs that it is said to equal: numbers that they print, and their rules written another way."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import minisd
from minisd.cli import main
from minisd.diffusion.brownian import brownian, path
from minisd.diffusion.levels import Levels
from minisd.diffusion.noise import Origin, philox, slerp, sources, torch_stream
from minisd.options import OPTIONS
from minisd.pictures.metadata import parameters_text, read_recipe
from minisd.recipe import repeat

CPU = torch.device("cpu")
FAST = {"steps": 2, "width": 32, "height": 32}
LATENTS = (4, 4, 4)


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.images, other.images, strict=True))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What A1111 prints of its generator (modules/rng_philox.py), which is what PyTorch gives on a GPU.
ON_A_GPU = [
    [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
    [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
    [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
]


def test_philox_is_that_of_a_gpu():
    found = minisd.noise(0, (3, 4), "nv")
    assert found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor(ON_A_GPU), rtol=0, atol=5e-7)
    # The known answer of Random123's tests to a counter and key of zeros: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    u, v = (0x6627E8D5 + 0.5) / 2**32, (0xE169C58D + 0.5) / 2**32
    assert float(found[0, 0]) == pytest.approx(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v), rel=1e-6)


def one_number(seed: int, call: int, i: int) -> float:
    """Philox4x32-10 and Box-Muller in Python's whole numbers."""
    mask, c, key = 2**32 - 1, [call, 0, i, 0], [seed & (2**32 - 1), seed >> 32]
    for _ in range(10):
        one, two = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(two >> 32) ^ c[1] ^ key[0], two & mask, (one >> 32) ^ c[3] ^ key[1], one & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return math.sqrt(-2 * math.log((c[0] + 0.5) / 2**32)) * math.sin(2 * math.pi * (c[1] + 0.5) / 2**32)


@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**32, 0x123456789ABCDEF0])
def test_philox_of_large_seeds_and_later_calls(seed):
    for call in (0, 1, 7):
        found = philox(seed, 100, call)
        assert np.allclose(found[[0, 1, 50, 99]], [one_number(seed, call, i) for i in (0, 1, 50, 99)], rtol=0, atol=3e-6)


@pytest.mark.parametrize("dialect", ["cpu", "nv"])
def test_a_picture_has_its_own_generator_which_goes_on(dialect):
    first, draw = sources(dialect, [Origin(5), Origin(9)], LATENTS, CPU)
    alone, own = sources(dialect, [Origin(9)], LATENTS, CPU)
    assert torch.equal(first[1:], alone)
    for _ in range(2):
        later = draw(9.0, 3.0)
        assert torch.equal(later[1:], own(1.0, 0.0))
        assert not torch.equal(later, first)
    assert torch.equal(minisd.noise(8, (2, *LATENTS), dialect)[1:], minisd.noise(9, (1, *LATENTS), dialect))
    assert torch.equal(minisd.noise([5, 9], (2, *LATENTS), dialect), first)


def test_cpu_is_the_generator_of_pytorch():
    both = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(7))
    first, draw = sources("cpu", [Origin(7)], LATENTS, CPU)
    assert torch.equal(torch.cat([first, draw(1.0, 0.0)]), both)


def test_comfyui_draws_a_batch_at_once_and_begins_again():
    shape = (4, 3, 5)  # not a multiple of 16, where how many are drawn together changes the last of them
    whole = normal(7, 3, *shape)
    origins = [Origin(7, index=i, batch=3) for i in range(3)]
    first, draw = sources("comfy", origins, shape, CPU)
    assert torch.equal(first, whole)
    assert torch.equal(minisd.noise(7, (3, *shape), "comfyui"), whole)
    assert torch.equal(draw(9.0, 3.0), whole)  # ComfyUI's step noise on a CPU
    assert not torch.equal(draw(3.0, 1.0), whole)
    assert torch.equal(sources("comfy", origins[2:], shape, CPU)[0], whole[2:])  # a picture of it alone


def test_variations():
    low, high = normal(3, *LATENTS), normal(11, *LATENTS)
    x, y = low.double().numpy(), high.double().numpy()
    wanted = np.empty_like(x)
    for channel in range(4):  # along the height
        for column in range(4):
            a, b = x[channel, :, column], y[channel, :, column]
            angle = math.acos(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))
            wanted[channel, :, column] = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    found = minisd.noise(3, (2, *LATENTS), "cpu", subseed=11, subseed_strength=0.3)
    assert np.allclose(found[0], wanted, rtol=0, atol=2e-5)
    assert torch.equal(found[1], slerp(0.3, low, normal(12, *LATENTS)))  # one seed for all, and the next subseed
    assert torch.allclose(slerp(0.25, low, 3 * low), 0.25 * low + 0.75 * 3 * low)  # A1111's reversed line


def test_another_seed_for_the_steps():
    first, draw = sources("cpu", [Origin(3, following=31340)], LATENTS, CPU)
    assert torch.equal(first[0], normal(3, *LATENTS))
    assert torch.equal(draw(1.0, 0.5)[0], normal(31340, *LATENTS))


HIGH, LOW = 14.614641, 0.0291672
# torchsde 0.2.6: BrownianTree(LOW, zeros(4, 8, 8), HIGH, entropy=42), the increment downwards over the root of the length, as
# k-diffusion has it: three of the numbers, and the sum of all.
TREE = {
    (HIGH, 7.5): ([-0.857668, 0.4237, 0.758443], 16.712),
    (7.5, 2.25): ([-0.528431, -1.571483, -1.162472], 6.4251),
    (HIGH, 2.25): ([-0.994918, -0.702598, -0.182162], 16.8636),
    (0.1, LOW): ([-0.101635, -0.622233, -1.408336], -7.2651),
    (3.0, 3.5): ([0.099172, 1.202381, 1.918388], -8.3813),
}


def test_brownian_noise_is_that_of_torchsde():
    for levels in (TREE, reversed(TREE)):  # in any order
        increment = path(42, (4, 8, 8), LOW, HIGH, torch_stream)
        for sigma, following in levels:
            x, (numbers, total) = increment(sigma, following), TREE[sigma, following]
            assert [float(x[at]) for at in ((0, 0, 0), (1, 2, 3), (3, 7, 7))] == pytest.approx(numbers, abs=2e-6)
            assert float(x.sum()) == pytest.approx(total, abs=3e-4)


def test_brownian_noise_against_torchsde_itself():
    torchsde = pytest.importorskip("torchsde")
    low, high = (float(np.float32(level)) for level in (LOW, HIGH))
    tree = torchsde.BrownianTree(low, torch.zeros(4, 8, 8), high, entropy=7)
    increment = path(7, (4, 8, 8), low, high, torch_stream)
    for start, end in np.sort(np.random.default_rng(0).uniform(low, high, (50, 2)).astype(np.float32).astype(float)):
        assert torch.allclose(increment(end, start), -tree(start, end) / (end - start) ** 0.5, rtol=0, atol=5e-6)


def test_brownian_noise_belongs_to_one_path_and_is_of_unit_variance():
    increment = path(1, (4, 32, 32), 0.03, 14.6, torch_stream)
    whole, parts = increment(10, 1) * 3, increment(10, 4) * 6**0.5 + increment(4, 1) * 3**0.5
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.equal(increment(1, 10), -increment(10, 1))
    drawn = torch.stack([increment(sigma, sigma * 0.8) for sigma in (14, 8, 3, 1, 0.2)])
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    assert abs(float(drawn[0].flatten() @ drawn[1].flatten()) / 4096) < 0.06
    assert not increment(0.01, 0.0).any()  # below the range nothing moves


def test_a_path_for_each_picture_or_for_a_batch():
    ends = (0.03, 14.6)
    two = brownian("cpu", [Origin(5), Origin(9)], LATENTS, ends, CPU)(9.0, 4.0)
    assert torch.equal(two[1], path(9, LATENTS, *ends, torch_stream)(9.0, 4.0))
    batch = brownian("comfy", [Origin(5, index=1, batch=2)], LATENTS, ends, CPU)(9.0, 4.0)
    assert torch.equal(batch, path(5, (2, *LATENTS), *ends, torch_stream)(9.0, 4.0)[1:])


def test_pictures_start_from_it(tiny):
    shape = (1, *tiny("a star", seed=1, **FAST).latents.shape[1:])
    for dialect in ("cpu", "nv", "comfy"):
        given = tiny("a star", latents=minisd.noise(4, shape, dialect), **FAST)
        assert same(given, tiny("a star", seed=4, rng=dialect, **FAST))
    varied = tiny("a star", latents=minisd.noise(4, shape, "nv", 9, 0.5), **FAST)
    assert same(varied, tiny("a star", seed=4, rng="a1111-gpu", subseed=9, subseed_strength=0.5, **FAST))


CASES = [
    {"rng": "comfy", "sampler": "euler_ancestral"},
    {"rng": "nv", "ensd": 31337, "sampler": "euler_ancestral"},
    {"subseed": 9, "subseed_strength": 0.4},
    {"sde_noise": "brownian", "sampler": "dpmpp_sde", "steps": 3},
    {"sde_noise": "brownian", "sampler": "dpmpp_2m_sde", "steps": 3, "rng": "comfy"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_each_picture_is_made_again_from_its_recipe(tiny, options):
    both = tiny("a star", seed=4, num_images=2, **(FAST | options))
    recipes = json.loads(json.dumps(both.metadata))
    assert not np.array_equal(*both.images)
    for recipe, image, latents in zip(recipes, both.images, both.latents, strict=True):
        again = tiny(repeat(recipe, tiny.checkpoint.path))
        assert np.array_equal(again.images[0], image)
        assert torch.equal(again.latents[0], latents)
        assert again.metadata[0] == recipe
    usual = {name: value for name, value in options.items() if name in ("sampler", "steps")}
    plain = tiny("a star", seed=4, num_images=2, **(FAST | usual))
    assert not np.array_equal(plain.images[1], both.images[1])


def test_a_batch_of_comfyui_has_one_seed_and_the_others_their_own(tiny):
    assert tiny("a star", seed=4, num_images=3, rng="comfy", **FAST).seeds == [4, 4, 4]
    assert tiny("a star", seed=4, num_images=2, subseed=1, subseed_strength=0.5, **FAST).seeds == [4, 4]
    listed = tiny("a star", seed=[4, 6], rng="comfy", **FAST)
    assert listed.seeds == [4, 6]
    assert np.array_equal(listed.images[1], tiny("a star", seed=6, **FAST).images[0])


def test_brownian_noise_reaches_the_plain_and_the_recorded_way(tiny):
    """Whoever draws the noise of a step tells from where to where it goes."""
    from minisd.plan import planned
    from minisd.request import Request
    from minisd.walks import course, start

    made = planned(Request("a star", seed=4, sampler="dpmpp_sde", sde_noise="brownian", **FAST), tiny.capabilities())
    leg = course(made, tiny)[0]
    _, noise = start(made, slice(0, 1), leg, None)
    sigmas = leg.levels.sigmas.tolist()
    increment = path(4, made.shape, sigmas[-2], sigmas[0], torch_stream)
    for _, draw in leg.program.draws:
        assert torch.equal(noise(draw.sigma, draw.following)[0], increment(draw.sigma, draw.following))
    assert [round(draw.following, 6) for _, draw in leg.program.draws][1] == round(sigmas[1], 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rng": "nvidia"}, "rng: 'nvidia' is unknown; expected cpu, nv or comfy"),
        ({"rng": "comfy", "ensd": 1}, "ensd: expected 0 with rng comfy"),
        ({"rng": "comfy", "subseed_strength": 0.5}, "subseed_strength: expected 0 with rng comfy"),
        ({"subseed_strength": 2}, "subseed_strength: expected a number from 0 to 1"),
        ({"sde_noise": "white"}, "sde_noise: expected one of independent, brownian, found 'white'"),
        ({"batch_place": (2, 2)}, "batch_place: expected .i, B. with i < B"),
    ],
)
def test_what_is_wrong_is_named(tiny, options, message):
    with pytest.raises(minisd.UsageError, match=message):
        tiny("a star", **(FAST | options))


def test_noise_says_what_it_wants():
    for arguments, message in (
        ((1, (0, 4)), "shape: expected one or more numbers above 0"),
        (([1], (2, 4, 4, 4)), "seed: expected one, or 2"),
        ((1, (4, 4, 4), "comfy", 1, 0.5), "subseed: expected dialect cpu or nv"),
        ((1, (4, 4, 4), "xyz"), "rng: 'xyz' is unknown; expected cpu, nv or comfy"),
    ):
        with pytest.raises(minisd.UsageError, match=message):
            minisd.noise(*arguments)


def test_in_the_words_of_a1111(tiny, tmp_path):
    given = {"rng": "nv", "subseed": 0, "subseed_strength": 0.25, "ensd": 31337}
    text = parameters_text(tiny("a star", seed=4, **(FAST | given)).metadata[0]).splitlines()[-1]
    assert "Variation seed: 0, Variation seed strength: 0.25, ENSD: 31337" in text
    assert "RNG: NV" in text
    plain = parameters_text(tiny("a star", seed=4, **FAST).metadata[0])
    assert "RNG: CPU" in plain
    assert not any(word in plain for word in ("Variation", "ENSD"))
    flags = {option.infotext: option.flag for option in OPTIONS.values()}
    words = [flags["Variation seed"], "7", flags["Variation seed strength"], "0.5", flags["ENSD"], "31337", "--rng", "NV"]
    out = tmp_path / "x.png"
    assert main(["a star", "--steps", "1", "--size", "32x32", "--seed", "3", "-o", str(out), *words]) == 0
    kept = read_recipe(out)
    assert (kept["rng"], kept["subseed"], kept["subseed_strength"], kept["ensd"]) == ("nv", 7, 0.5, 31337)


def test_a_part_of_a_way_has_the_ends_of_the_whole():
    whole = Levels(torch.tensor([9.0, 5.0, 2.0, 1.0, 0.0]), 9.0, 1.0)
    first, rest = whole.tail(3).split(1)
    assert (first.sigmas.tolist(), rest.sigmas.tolist()) == ([5, 2], [2, 1, 0])
    assert whole.ends == whole.tail(2).ends == first.ends == rest.ends == (1.0, 9.0)
