"""Attention on a CPU by code of our own: against the formula in float64, and where it cannot be had."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error

import minisd
from minisd.cli import main
from minisd.errors import UsageError
from minisd.fast.cpu import attention, compiled
from minisd.fast.operations import attention_by
from minisd.models import ops
from minisd.system.device import cpu_bfloat16

CAN = pytest.mark.skipif("avx512_bf16" not in cpu_bfloat16(), reason="needs a processor with avx512_bf16")
BUILT = pytest.mark.skipif(not compiled.compilers(), reason="needs a C compiler")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MINISD_CPU=compiled; what a test has built, or not, is forgotten after it."""
    monkeypatch.setenv("MINISD_CPU", "compiled")
    yield
    compiled.built.cache_clear()
    compiled.extra_builds.cache_clear()


def given(batch: int, length: int, keys: int, heads: int, d: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Queries, and keys and values that are chunks of one product; size: how much larger the scores."""
    make = torch.Generator().manual_seed(length + keys)
    q = torch.randn(batch, length, 3 * heads * d, generator=make).mul(size).bfloat16().chunk(3, -1)[1]
    return q, *torch.randn(batch, keys, 2 * heads * d, generator=make).bfloat16().chunk(2, -1)


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    return ops.joined_heads(F.scaled_dot_product_attention(*ops.split_heads(heads, q.double(), k.double(), v.double())))


@CAN
@BUILT
@pytest.mark.parametrize(
    ("batch", "length", "keys", "heads", "d", "size"),
    [
        (2, 300, 300, 3, 40, 1.0),  # some tasks, more blocks of keys than one, and ends of all of them
        (2, 64, 77, 2, 64, 1.0),
        (1, 1600, 129, 1, 80, 4.0),
        (1, 17, 256, 2, 160, 1.0),
        (1, 150, 9, 1, 512, 1.0),
        (1, 16, 1, 2, 40, 1.0),  # one key
        (3, 5, 3, 2, 7, 1.0),  # an odd number of channels
        (1, 33, 500, 2, 40, 200.0),  # scores of some hundreds: nearly all of a row is one weight
        (1, 33, 500, 2, 40, 1e12),
    ],
)
def test_as_exact_as_pytorchs_own(chosen, batch, length, keys, heads, d, size):
    q, k, v = given(batch, length, keys, heads, d, size)
    wanted = by_formula(q, k, v, heads)
    own = ops.joined_heads(F.scaled_dot_product_attention(*ops.split_heads(heads, q, k, v)))
    found = attention.attention(q, k, v, heads)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    assert relative_error(found, wanted) <= 1.5 * relative_error(own, wanted)


@CAN
@BUILT
def test_the_largest_score_may_be_the_last(chosen):
    """What has been added up is made smaller then; a row beside it, whose scores are all alike, is not touched."""
    q, k, v = (torch.zeros(1, 512, 16, dtype=torch.bfloat16) for _ in range(3))
    q[0, 0], k[0, :, 0], v[0, :, 0] = 10, torch.arange(512), torch.arange(512)
    found = attention.attention(q, k, v, 1)
    assert relative_error(found, by_formula(q, k, v, 1)) <= 2**-9


@CAN
@BUILT
def test_the_number_of_threads_changes_nothing(chosen, monkeypatch):
    q, k, v = given(1, 700, 200, 2, 40)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(attention.attention(q, k, v, 2))
    monkeypatch.setattr(compiled, "parallel", lambda: None)  # no OpenMP
    compiled.built.cache_clear()
    found.append(attention.attention(q, k, v, 2))
    assert all(torch.equal(each, found[0]) for each in found)


@CAN
@BUILT
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so_in_its_row(chosen, what):
    q, k, v = given(1, 40, 50, 2, 40)
    whole = attention.attention(q, k, v, 2)
    q = q.clone()
    q[0, 7, 3] = what  # of the first head; a query of infinity has scores of both signs
    found = attention.attention(q, k, v, 2)
    rows = torch.zeros_like(found, dtype=torch.bool)
    rows[0, 7, :40] = True
    assert torch.equal(found.isnan(), rows)
    assert torch.equal(found[~rows], whole[~rows])
    v = v.clone()
    v[0, 5, 50] = what
    found = attention.attention(q, k, v, 2)[0, :, 40:]
    assert not found[:, 10].isfinite().any()
    assert found[:, :10].isfinite().all()


@CAN
@BUILT
@torch.no_grad()
def test_a_picture(chosen, monkeypatch):
    """The tiny checkpoint in bfloat16: the same picture but for what rounding makes of it."""
    pipe = minisd.load(device="cpu", dtype="bfloat16")
    options = {"seed": 1, "steps": 4, "width": 64, "height": 64}
    found = pipe("a red circle", **options).latents
    assert pipe("a red circle", **options).latents.equal(found)
    monkeypatch.setenv("MINISD_CPU", "torch")
    other = minisd.load(device="cpu", dtype="bfloat16")("a red circle", **options).latents
    assert 0 < relative_error(found, other) <= 5e-2


@CAN
@BUILT
def test_what_it_takes(chosen, monkeypatch):
    q, k, v = given(1, 40, 50, 2, 40)
    assert compiled.takes(q, k, v, 2)
    assert attention_by(q, k, v, 2) == "compiled_attention"
    assert not compiled.takes(q.float(), k.float(), v.float(), 2)
    assert not compiled.takes(q.mT.contiguous().mT, k, v, 2)
    assert not compiled.takes(q.requires_grad_(), k, v, 2)
    with torch.no_grad():
        assert compiled.takes(q, k, v, 2)
    monkeypatch.setattr(compiled, "has_zig", lambda: False)
    for said in (None, "", "auto", "torch"):
        monkeypatch.delenv("MINISD_CPU") if said is None else monkeypatch.setenv("MINISD_CPU", said)
        assert not compiled.takes(q, k, v, 2)


@CAN
@BUILT
def test_it_is_built_once_and_anew_where_it_is_not_whole(chosen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("minisd.warmup.starting.capability_here", lambda: None)
    assert main(["warm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target"] == "cpu"
    (file,) = (tmp_path / "minisd").iterdir()
    before = file.stat().st_mtime_ns
    (compiler, *_) = compiled.compilers()
    assert compiled.loaded(compiler).attention
    assert file.stat().st_mtime_ns == before
    monkeypatch.setattr(compiled, "fingerprint", lambda compiler: "torn")
    torn = file.with_name("attention-torn.so")
    torn.write_bytes(b"\x7fELF")
    assert compiled.loaded(compiler).attention
    assert torn.stat().st_size > 4
    monkeypatch.chdir(tmp_path)  # where some compiler may keep what is its own
    monkeypatch.setenv("XDG_CACHE_HOME", "nowhere")  # no cache: for this process alone
    assert compiled.loaded(compiler).attention


@CAN
@BUILT
def test_the_extra_that_brings_a_compiler_turns_it_on(chosen, monkeypatch, capsys):
    """For bfloat16; MINISD_CPU=torch still turns it off."""
    monkeypatch.delenv("MINISD_CPU")
    monkeypatch.setattr(compiled, "has_zig", lambda: True)
    q, k, v = given(1, 40, 50, 2, 40)
    assert compiled.takes(q, k, v, 2)
    assert not compiled.takes(q.float(), k.float(), v.float(), 2)
    assert minisd.load(device="cpu", dtype="float32")("a red circle", steps=1, width=32, height=32).images
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"]["used"] == "attention"
    monkeypatch.setenv("MINISD_CPU", "torch")
    assert not compiled.takes(q, k, v, 2)


def test_an_extra_that_builds_nothing_is_told_of_once(chosen, monkeypatch, tmp_path):
    monkeypatch.delenv("MINISD_CPU")
    monkeypatch.setattr(compiled, "has_zig", lambda: True)
    monkeypatch.setattr(compiled, "cpu_bfloat16", lambda: ["avx512_bf16"])
    monkeypatch.setattr(compiled, "compilers", lambda: [[str(tmp_path / "no-such-cc")]])
    with pytest.warns(UserWarning, match=r"minisd\[native\] is of no use here.*no-such-cc"):
        compiled.prepare(torch.bfloat16)
    compiled.prepare(torch.bfloat16)  # where warnings are errors
    assert not compiled.takes(*given(1, 40, 50, 2, 40), 2)


@CAN
def test_threads_are_pytorchs_own():
    """The only OpenMP in this process, where PyTorch is built with one."""
    if torch.__config__.parallel_info().count("OpenMP not found"):
        pytest.skip("this PyTorch has no OpenMP")
    assert compiled.parallel() is not None


def test_its_source_is_in_the_package():
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    data = tomllib.loads(pyproject.read_text())["tool"]["setuptools"]["package-data"]
    assert data["minisd.fast.cpu"] == [compiled.SOURCE.name]


def test_a_wrong_choice(monkeypatch, chosen):
    monkeypatch.setenv("MINISD_CPU", "fast")
    with pytest.raises(UsageError, match="MINISD_CPU: expected auto, torch or compiled, found 'fast'"):
        minisd.load(device="cpu")


def test_where_it_cannot_be(monkeypatch, chosen, tmp_path):
    with pytest.raises(UsageError, match="MINISD_CPU=compiled: expected bfloat16, found float32: use --dtype bfloat16"):
        minisd.load(device="cpu", dtype="float32")
    monkeypatch.setattr(compiled, "cpu_bfloat16", lambda: [])
    with pytest.raises(UsageError, match="expected a processor with avx512_bf16"):
        minisd.load(device="cpu", dtype="bfloat16")
    monkeypatch.setattr(compiled, "cpu_bfloat16", lambda: ["avx512_bf16"])
    monkeypatch.setattr(compiled, "compilers", list)
    with pytest.raises(UsageError, match=r"expected a C compiler .* found none"):
        minisd.load(device="cpu", dtype="bfloat16")
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "cpu_bfloat16", lambda: ["avx512_bf16"])
    monkeypatch.setenv("MINISD_CPU", "compiled")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { for i in 1 2 3 4 5 6 7; do echo line $i >&2; done; exit 1; }\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"(?s)cannot be built here.*/cc: line 3\n.*line 7$"):
        minisd.load(device="cpu", dtype="bfloat16")
    assert not list((tmp_path / "cache" / "minisd").iterdir())


def test_a_compiler_that_is_not_there_and_zig(monkeypatch, chosen):
    monkeypatch.setenv("CC", "ccache no-such-cc")
    assert compiled.compilers() == [["ccache", "no-such-cc"]]
    monkeypatch.delenv("CC")
    monkeypatch.setattr("shutil.which", lambda name: name if name == "gcc" else None)
    monkeypatch.setattr(compiled, "has_zig", compiled.has_zig.__wrapped__)  # asked anew
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (first, zig) = compiled.compilers()
    assert (first, zig[1:]) == (["gcc"], ["-m", "ziglang", "cc"])
