"""Which computation is chosen, and that it makes no difference: whole networks with kernels on against kernels off."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from families import SMALL, Small
from helpers import relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import minisd
from minisd.fast import choice, operations
from minisd.fast.decoder import FusedDecoder
from minisd.fast.lossy.float8 import to_float8
from minisd.fast.unet import FusedUNet, NarrowConv
from minisd.models import ops
from minisd.models.shapes import below
from minisd.models.unet import BasicTransformerBlock, UNet
from minisd.models.vae import AutoencoderKL
from minisd.workbench import blueprint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = 1e-4 if DEVICE == "cuda" else 1e-5  # of float32, where a GPU sums in an order of its own; never tried on one
runs_kernels = [pytest.mark.gpu] if DEVICE == "cuda" else [pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def small_unet(small: Small) -> UNet:
    shapes = below(small.shapes(), "model.diffusion_model")
    unet = UNet(shapes)
    unet.load_state_dict(blueprint.random_weights(shapes, 3))
    return unet.requires_grad_(False).to(DEVICE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called from now on."""
    names: list[str] = []
    for name in ("group_norm", "layer_norm", "attention", "geglu", "linear_geglu"):
        kernel = getattr(choice.kernels(), name)
        monkeypatch.setattr(choice.kernels(), name, lambda *args, n=name, k=kernel, **more: names.append(n) or k(*args, **more))
    return names


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=runs_kernels) for name in ("sd1", "sdxl")])
@torch.no_grad()
def test_unet_with_kernels_equals_the_one_without(name, calls):
    small = SMALL[name]
    unet = small_unet(small)
    x, t, context = noise(2, 4, 6, 5), torch.tensor([981.0, 1.0], device=DEVICE), noise(2, 7, small.context, seed=1)
    y = noise(2, small.vector, seed=2) if small.vector else None
    with choice.using("torch"):
        wanted = unet(x, t, context, y)
    assert not calls
    with choice.using("triton"):
        found = unet(x, t, context, y)
    assert set(calls) == {"group_norm", "layer_norm", "attention", "geglu"}
    assert relative_error(found, wanted) <= LIMIT


@pytest.mark.parametrize("kernels", [pytest.param("triton", marks=runs_kernels)])
@torch.no_grad()
def test_vae_with_kernels_equals_the_one_without(kernels, calls):
    shapes = blueprint.vae((32, 64), (32, 64), (1, 1))
    vae = AutoencoderKL(shapes)
    vae.load_state_dict(blueprint.random_weights(shapes, 3))
    vae = vae.requires_grad_(False).to(DEVICE)
    latents = noise(1, 4, 3, 5)
    with choice.using("torch"):
        wanted = vae.decode(latents)
    with choice.using(kernels):
        found = vae.decode(latents)
    assert set(calls) == {"group_norm", "attention"}
    assert relative_error(found, wanted) <= LIMIT


@pytest.mark.parametrize("layout", [pytest.param(name, marks=runs_kernels) for name in ("rows of 10 bytes", "copies", "float64")])
@torch.no_grad()
def test_what_a_kernel_does_not_take_goes_to_pytorch(layout, calls):
    if layout == "rows of 10 bytes":
        q = k = v = noise(2, 5, 10)
    elif layout == "copies":
        q, k = noise(2, 5, 16), noise(1, 3, 16).expand(2, 3, 16)
        v = k
    else:
        q = k = v = noise(2, 5, 16).double()
    heads = 2 if layout == "rows of 10 bytes" else 1
    with choice.using("torch"):
        wanted = ops.attention(q, k, v, heads)
    with choice.using("triton"):
        assert torch.equal(ops.attention(q, k, v, heads), wanted)
    assert not calls


@pytest.mark.parametrize("x", [pytest.param("grad", marks=runs_kernels)])
def test_training_goes_to_pytorch(x, calls):
    x = noise(1, 32, 2, 2).requires_grad_()
    with choice.using("triton"):
        ops.group_norm(x, 4, torch.ones(32, device=DEVICE), torch.zeros(32, device=DEVICE), 1e-5).square().sum().backward()
    assert not calls
    assert x.grad is not None


def test_wrong_switch_is_named(monkeypatch):
    with pytest.raises(minisd.UsageError, match=r"kernels: expected auto, triton, torch or some of .*, found 'cuda'"):
        choice.use("cuda")
    monkeypatch.setenv("MINISD_KERNELS", "group_norm,softmax")
    with pytest.raises(minisd.UsageError, match=r"MINISD_KERNELS: expected auto, .* found 'group_norm,softmax'"):
        minisd.load(device="cpu")


def test_switch_in_the_environment_and_in_python(monkeypatch):
    monkeypatch.setenv("MINISD_KERNELS", "group_norm,geglu")
    assert choice.chosen().names == {"group_norm", "geglu"}
    with choice.using("torch"):
        assert not choice.chosen().names
        with choice.using("triton"):
            assert choice.chosen().names == choice.ALL
        assert not choice.chosen().names
    assert choice.chosen().names == {"group_norm", "geglu"}
    monkeypatch.setenv("MINISD_KERNELS", "")
    assert choice.chosen() == (choice.AUTO, True)


def test_auto_on_a_cpu_is_pytorch_and_does_not_import_triton():
    code = "import sys, minisd; minisd.load(device='cpu')('a star', seed=0, steps=1); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"TRITON_INTERPRET": "0"})


def test_triton_on_a_cpu_without_the_interpreter_is_refused():
    code = "import minisd; minisd.load(device='cpu')('a star', seed=0, steps=1)"
    environment = os.environ | {"TRITON_INTERPRET": "0", "MINISD_KERNELS": "triton"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "UsageError: kernels: expected a CUDA device (or TRITON_INTERPRET=1" in run.stderr


def test_without_a_c_compiler_auto_goes_on_without_kernels(monkeypatch):
    def fails(x):
        raise RuntimeError("Failed to find C compiler.\nMore.")

    monkeypatch.setattr(choice.kernels(), "geglu", fails)
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: None)
    choice.triton_builds.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"Triton cannot build kernels here.*Failed to find C compiler\.$"):
            assert not choice.wants("group_norm", torch.device("cuda"))
    finally:
        choice.triton_builds.cache_clear()


@pytest.mark.parametrize(("said", "benchmark"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_what_cudnn_is_told(said, benchmark, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.delenv("MINISD_CUDNN_BENCHMARK", raising=False)
    if said is not None:
        monkeypatch.setenv("MINISD_CUDNN_BENCHMARK", said)
    choice.settle_cudnn()
    assert torch.backends.cudnn.benchmark == benchmark
    assert not torch.backends.cudnn.allow_tf32


def test_a_wrong_word_for_cudnn_is_named(monkeypatch):
    monkeypatch.setenv("MINISD_CUDNN_BENCHMARK", "yes")
    with pytest.raises(minisd.UsageError, match="MINISD_CUDNN_BENCHMARK: expected 0 or 1, found 'yes'"):
        choice.settle_cudnn()


@pytest.mark.parametrize("keys", [pytest.param(keys, marks=runs_kernels) for keys in (77, 130)])
@torch.no_grad()
def test_cross_attention_is_for_few_keys_alone(keys, calls):
    q, k = noise(1, 9, 16), noise(1, keys, 16)
    with choice.using("torch"):
        wanted = ops.attention(q, k, k, 1)
    with choice.using("cross_attention"):
        assert relative_error(ops.attention(q, k, k, 1), wanted) <= LIMIT
    assert calls == (["attention"] if keys == 77 else [])


@pytest.mark.parametrize("capability", [pytest.param(capability, marks=runs_kernels) for capability in (80, 89)])
@torch.no_grad()
def test_what_needs_a_copy_engine_goes_to_pytorch_where_there_is_none(capability, calls, monkeypatch):
    monkeypatch.setattr(choice.kernels().checks, "ABSENT", capability)
    x, weight, bias = noise(1, 8, 16), noise(32, 16), noise(32)
    with choice.using("triton"):
        ops.attention(x, x, x, 1)
        operations.linear_geglu(x, weight, bias)
    assert calls == ["geglu"]


class Asked(TorchDispatchMode):
    """The names of PyTorch's operations that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_residual_sums_are_made_by_products_or_one_by_one():
    unet = small_unet(SMALL["sd1"])
    fused, t = FusedUNet(unet), torch.tensor([981.0], device=DEVICE)
    x, context = noise(2, 4, 6, 5), noise(2, 7, SMALL["sd1"].context, seed=1)
    given = fused.shifts(t, None)[0], fused.keys_values(context)
    found, counts = {}, {}
    for kernels in ("torch", "residual_product"):
        with choice.using(kernels), Asked() as asked:
            found[kernels], counts[kernels] = fused(x, *given), asked.names
    blocks = sum(isinstance(module, BasicTransformerBlock) for module in unet.modules())
    sums = counts["residual_product"]["addmm_"]
    assert sums > 4 * blocks  # three parts of each, and the product out of its transformer; and of skip connections
    assert counts["torch"]["addmm_"] == 0
    assert counts["torch"]["add_"] - counts["residual_product"]["add_"] == sums
    assert relative_error(found["residual_product"], found["torch"]) <= LIMIT


@torch.no_grad()
def test_who_computes_the_attention_is_said():
    unet = small_unet(SMALL["sd1"])
    with choice.using("torch"):
        library = r"PyTorch's [A-Z_]+( \d+)? for \d+(, \d+)* channels a head"
        assert re.fullmatch(rf"{library}(; to a prompt by {library})?", operations.attentions_of(unet))
    if DEVICE == "cpu":
        with choice.using("attention"):
            assert operations.attentions_of(unet).startswith("attention for ")
        with choice.using("cross_attention"):
            among, to_prompt = operations.attentions_of(unet).split("; to a prompt by ")
            assert among.startswith("PyTorch's ")
            assert to_prompt.startswith("attention for ")
        to_float8(unet)
        with choice.using("attention"):
            assert operations.attentions_of(unet).startswith("attention for ")


@pytest.mark.parametrize("channels", [pytest.param(channels, marks=runs_kernels) for channels in ((4, 32), (9, 12), (32, 3))])
@torch.no_grad()
def test_narrow_convolutions_are_padded_and_follow_their_weights(channels):
    """Whether what they are given is padded beforehand or not."""
    conv = torch.nn.Conv2d(*channels, 3, padding=1).to(DEVICE)
    narrow, x = NarrowConv(conv), noise(2, channels[0], 5, 4)
    for _ in range(2):
        with choice.using("torch"):
            assert narrow.channels(x.device) == channels[0]
            wanted = narrow(x)
        with choice.using("padded_conv"):
            room = narrow.channels(x.device)
            assert room % 8 == 0
            wide = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, room - channels[0]))
            for given in (x, wide):
                assert narrow(given).shape == wanted.shape
                assert relative_error(narrow(given), wanted) <= LIMIT
        conv.weight.mul_(1.5)
        conv.bias.add_(1)
        narrow.refresh()


@pytest.mark.parametrize("name", [pytest.param(name, marks=runs_kernels) for name in ("sd1", "vae")])
@torch.no_grad()
def test_statistics_of_the_kernel_that_writes_a_map_are_those_of_the_norm_that_reads_it(name, monkeypatch):
    """As of large maps, by the fused networks: where a transformer follows, too, whose bias is in the map already."""
    norm = choice.kernels().KERNELS["group_norm"]
    used: list[bool] = []
    usual = norm.launch_two
    monkeypatch.setattr(norm, "WHOLE", 0)
    monkeypatch.setattr(norm, "launch_two", lambda *given: used.append(given[-1][-1] is not None) or usual(*given))
    if name == "vae":
        shapes = blueprint.vae((32, 64), (32, 64), (1, 1))
        vae = AutoencoderKL(shapes)
        vae.load_state_dict(blueprint.random_weights(shapes, 3))
        plain, fused = vae.decode, FusedDecoder(vae.requires_grad_(False).to(DEVICE))
        given: tuple[torch.Tensor, ...] = (noise(1, 4, 3, 2),)
    else:
        unet = small_unet(SMALL["sd1"])
        t, context = torch.tensor([981.0], device=DEVICE), noise(1, 7, SMALL["sd1"].context, seed=1)
        network = FusedUNet(unet)
        plain = functools.partial(unet, t=t, context=context)
        fused = functools.partial(network, shift=network.shifts(t, None)[0], keys_values=network.keys_values(context))
        given = (noise(1, 4, 2, 3),)
    with choice.using("torch"):
        wanted = plain(*given)
    with choice.using("add_bias,group_norm,upsample_conv,small_norm,statistics"):
        assert relative_error(fused(*given), wanted) <= LIMIT
    assert sum(used) >= 5
    used.clear()
    with choice.using("add_bias,group_norm,upsample_conv,small_norm"):
        assert relative_error(fused(*given), wanted) <= LIMIT
    assert used
    assert not any(used)


@pytest.mark.parametrize("names", [pytest.param(names, marks=runs_kernels) for names in ("group_norm", "group_norm,small_norm")])
@torch.no_grad()
def test_small_maps_are_normed_in_one_launch_or_in_two(names, monkeypatch):
    norm = choice.kernels().KERNELS["group_norm"]
    taken: list[str] = []
    for name in ("launch_whole", "launch_two"):
        usual = getattr(norm, name)
        monkeypatch.setattr(norm, name, lambda *given, name=name, usual=usual: taken.append(name) or usual(*given))
    x, weight = noise(2, 64, 4, 4).to(DEVICE), torch.ones(64, device=DEVICE)
    with choice.using("torch"):
        wanted = ops.group_norm(x, 32, weight, weight, 1e-5)
    with choice.using(names):
        found = [ops.group_norm(x, 32, weight, weight, 1e-5), operations.group_norm(x, 32, weight, weight, 1e-5)]
    assert all(relative_error(each, wanted) <= LIMIT for each in found)
    assert taken == ["launch_whole" if "small_norm" in names else "launch_two"] * 2
