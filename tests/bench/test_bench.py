"""The bench command: rows appear and reach the file, what fails costs its own row, wrong words are named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import SMALL
from helpers import write_holes

import minisd
from minisd import kernels
from minisd.bench import everything, networks, peers, steps
from minisd.bench.everything import summary
from minisd.bench.kernels import double, outputs, relative_error, smaller, variants
from minisd.bench.machine import compiling
from minisd.bench.machine.kinds import class_of
from minisd.bench.machine.roofline import Watch, of_pytorch, spent_on_cpu
from minisd.bench.report import Report, seconds_of, write_json
from minisd.bench.shapes import shapes_of
from minisd.bench.timing import Clock
from minisd.cli.bench import DEFAULTS, PARTS, TAKEN_BY, bench, parsed, parser
from minisd.fast import choice, operations
from minisd.fast import unet as fused_networks
from minisd.fast.cpu import networks as networks_of_a_cpu
from minisd.models import ops
from minisd.models.family import UNET
from minisd.warmup.absent import capability_of
from minisd.workbench import blueprint


def main(argv):
    return bench(parsed(argv))


CLOCK = Clock(torch.device("cpu"), torch.float32, 2)
ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu", "--dtype", "float32", "--repeats", "1"]


def rows(path, table=0):
    return json.loads(path.read_text())["tables"][table]["rows"]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet and a VAE that take no time, in the place of the published ones."""
    small = SMALL["sdxl"]
    published = networks.Published("small", small.shapes, small.family, 8, small.context, small.vector, 64)
    monkeypatch.setitem(networks.MODELS, "sd15", published)
    unet = {"block_out_channels": (64, 128, 128), "cross_attention_dim": 128, "attention_head_dim": [1, 2, 2]}
    unet |= {"transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": small.vector}
    monkeypatch.setitem(peers.UNETS, "small", peers.UNETS["SDXL"] | unet)


def test_kernels(tmp_path, capsys):
    assert main(["kernels", "geglu", *CPU, "--json", str(tmp_path / "x.json")]) == 0
    assert "smaller shapes" in capsys.readouterr().out
    found = rows(tmp_path / "x.json")
    assert {row["variant"] for row in found} == {"minisd", "PyTorch"}
    assert not any("error_text" in row for row in found)
    assert all(row["error"] < 1e-6 for row in found if not row["label"].startswith("to float8"))
    assert all((row["time_us"] is None) == (row["variant"] == "minisd") for row in found)  # an interpreter is not timed


QUARTER = {"s": 0.25, "ms": 250.0, "us": 250_000.0}


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a quarter of a second."""

    def quarter(self: Clock, run):
        run()
        return 0.25

    for name in ("seconds", "once", "back_to_back", "replayed"):
        monkeypatch.setattr(Clock, name, quarter)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (["kernels", "geglu"], "time_us"),
        (["unet", "--peers", "eager"], "time_ms"),
        (["image", "--checkpoint", "tiny", "--peers", ""], "time_s"),
    ],
)
def test_a_key_names_the_unit_of_its_number(part, key, little, slow_clock, tmp_path):
    main([*part, *CPU, "--json", str(tmp_path / "x.json")])
    known = ("PyTorch", "minisd, whole step as drawn", "diffusers, eager", "minisd, prompt to uint8")
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    found = [row for row in tables[-1]["rows"] if row.get("variant", row["label"]) in known]
    assert found
    assert {row[key] for row in found} == {QUARTER[key[5:]]}


def test_a_roofline_is_in_the_units_that_it_says(little, slow_clock, tmp_path):
    start = time.perf_counter()
    main(["roofline", *CPU, "--json", str(tmp_path / "x.json")])
    took = time.perf_counter() - start
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    assert found["all"]["floor_us"] == pytest.approx(found["all"]["GFLOP"] * 1e9 / (2 * 1024**3 / 0.25) * 1e6)
    assert took * 1e6 / 1000 < found["all"]["time_us"] < took * 1e6
    assert found["convolution"]["left_us"] == pytest.approx(
        max(0.0, found["convolution"]["time_us"] - found["convolution"]["floor_us"])
    )


def test_times_are_given_in_seconds_and_read_in_seconds(tmp_path):
    report = Report(CLOCK, tmp_path / "x.json")
    report.table("title", ("time us", "first s", "floor ms", "GB/s", "to ours"))
    report.add("a", time=0.002, first=3.0, floor=0.004, to_ours=2.0, **{"GB/s": 5.0})
    wanted = {"label": "a", "time_us": 2000.0, "first_s": 3.0, "floor_ms": 4.0, "to_ours": 2.0, "GB/s": 5.0}
    assert rows(tmp_path / "x.json") == [wanted]
    assert [seconds_of(wanted, name) for name in ("time", "first", "floor", "to_ours")] == [0.002, 3.0, 0.004, None]
    with pytest.raises(ValueError, match="expected values for time, first, floor, GB/s, to_ours, found time_us"):
        report.add("b", time_us=0.002)


def test_unet_against_diffusers(little, tmp_path):
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    ours, theirs = found["minisd, fused"], found["diffusers, eager"]
    assert found["minisd, plain modules"]["difference"] <= 1e-5
    assert ours["difference"] <= 1e-5
    assert theirs["difference"] <= 1e-5
    assert theirs["to_ours"] == pytest.approx(theirs["time_ms"] / ours["time_ms"])
    assert found["minisd, whole step as drawn"]["time_ms"] > 0


def test_vae_against_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr(blueprint, "sd15", lambda: SMALL["sd1"].shapes())
    monkeypatch.setitem(peers.VAE, "block_out_channels", (32, 64, 64, 64))
    main(["vae", *CPU, "--peers", "eager", "--json", str(tmp_path / "x.json")])
    found = [row["difference"] for row in rows(tmp_path / "x.json") if "difference" in row]
    assert len(found) == 3
    assert max(found) <= 1e-5


OWN = """
import torch.nn.functional as F
def geglu(x):
    value, gate = x.chunk(2, dim=-1)
    return {result}
"""


def against(tmp_path, text, *more):
    """The rows of `bench kernels geglu` that are those of the user's file."""
    (tmp_path / "mine.py").write_text(text)
    files = ["--against", str(tmp_path / "mine.py"), "--json", str(tmp_path / "x.json")]
    assert main(["kernels", "geglu", *CPU, *files, *more]) == 0
    found = rows(tmp_path / "x.json")
    assert {"minisd", "PyTorch"} <= {row.get("variant") for row in found}  # whatever the file does
    return [row for row in found if row.get("variant") not in ("minisd", "PyTorch")]


def test_a_kernel_of_the_user_beside_ours(tmp_path, capsys):
    (row,) = against(tmp_path, OWN.format(result="value * F.gelu(gate) * 1.001"), "--shapes-of", "tiny")
    assert (row["variant"], row["label"]) == ("mine.py", "UNet 512, 128 rows, 6 times (cut)")
    assert row["error"] == pytest.approx(1e-3, rel=0.01)
    assert row["time_us"] > 0  # no Triton in it, so a CPU can time it
    assert "geglu, float32, shapes of tiny:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["layer_norm", "linear_step"])
def test_kernels_that_change_what_they_are_given_are_each_given_their_own(name):
    """Each with every tile, and PyTorch, computes from the same numbers."""
    module = kernels.KERNELS[name]
    shape = smaller(next(each for each in module.SHAPES if getattr(each, "addend", True)))
    if name == "layer_norm":  # the interpreter cuts off what goes into float8
        shape = dataclasses.replace(shape, float8=False)
    arguments = module.make(shape, torch.device("cpu"), torch.float32)
    wanted = outputs(module.reference(**double(arguments)))
    runs = variants(name, shape, arguments, torch.device("cpu"), tiles=True)
    assert {"minisd", "PyTorch"} <= {*runs}
    assert (len(runs) > 2) == hasattr(module, "tiles")
    for variant, run in runs.items():
        assert relative_error(outputs(run()), wanted) < 0.01, variant


def test_a_copy_of_a_kernel_finds_its_neighbours_and_is_not_timed_in_the_interpreter(tmp_path):
    (row,) = against(tmp_path, (ROOT / "kernels" / "geglu.py").read_text(), "--shapes-of", "tiny")
    assert row["error"] < 1e-6
    assert row["time_us"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def gelgu(x): return x", "expected a function geglu in it, found gelgu"),
        ("geglu = 3", "expected a function geglu in it, found none"),
        ("def geglu(x: return x", "SyntaxError: "),
        ("import sys; sys.exit(3)", "expected a file that can be imported, found one that ends with status 3"),
        (OWN.format(result="gate.sum(1)"), "expected a result of shape (128, 512), found (128,)"),
        (OWN.format(result="None"), "expected tensors as result, found NoneType"),
        ("def geglu(y): return y", "TypeError: geglu() got an unexpected keyword argument 'x'"),
        (OWN.format(result="1 / 0"), "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_fails_costs_its_own_rows(text, message, tmp_path):
    found = against(tmp_path, text, "--shapes-of", "tiny")
    assert found[0]["error_text"].startswith(message)
    assert all("mine.py" in row["label"] for row in found)


def same(shape):
    return {key: value for key, value in dataclasses.asdict(shape).items() if key != "label"}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files with the keys and shapes of the published models, and holes for weights."""
    folder = tmp_path_factory.mktemp("holes")
    models = {"SD 1.5": blueprint.sd15(), "SDXL": blueprint.sdxl()}
    return {name: str(write_holes(folder / f"{name}.safetensors", shapes)) for name, shapes in models.items()}


# Of the kernels' own lists: what stands for another size, another use or another model.
ELSEWHERE = ("two chunks", "no guidance", "three prompts", "mask", "two calls", "8 pictures", "refiner", "first of a transformer")


@pytest.mark.parametrize("model", ["SD 1.5", "SDXL"])
def test_shapes_of_a_checkpoint_are_those_that_the_kernels_know(model, full_size):
    """The kernels' own lists are picked by hand from the same networks."""
    from minisd.fast.choice import kernels

    for name, module in kernels().KERNELS.items():
        found = [same(shape) for shape in shapes_of(name, full_size[model], torch.float16)]
        known = [shape for shape in module.SHAPES if shape.label.startswith(model)]
        for shape in known:
            if not any(word in shape.label for word in ELSEWHERE):
                assert same(shape) in found, f"{name} {shape.label}"
        assert found, name


@pytest.mark.slow
def test_what_the_published_models_launch_is_among_the_shapes_of_the_kernels():
    """The other way round: else the bench would time, and the tests compile, other variants than those that draw."""
    run = subprocess.run(
        [sys.executable, "-P", "-c", LAUNCHED],
        capture_output=True, text=True, env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    known, launched, strange = json.loads(run.stdout)
    assert known > launched > 40
    assert strange == []


LAUNCHED = """
import json
import torch
from minisd.bench.networks import MODELS
from minisd.fast.choice import kernels
from minisd.warmup.absent import Variants, pretend
from minisd.warmup.starting import job_of, of_shapes
from minisd.warmup.worker import variants

pretend(90)
listed = Variants()
for name, module in kernels().KERNELS.items():
    for dtype in (torch.float16, torch.bfloat16):
        for shape in module.SHAPES:
            getattr(kernels(), name)(**module.make(shape, "meta", dtype))
known = {(variant.fn.__name__, key) for variant, key in listed.found}
published = [MODELS[name] for name in ("sd15", "sd21", "sdxl")]
sizes = [(m.shapes(), m.family.name, (8 * m.latents, 8 * m.latents)) for m in published]
models = [of_shapes(*each, *how) for each in sizes for how in (("float16",), ("float16", True), ("bfloat16", True))]
seen = variants(job_of(models, 90, 1))
launched = {(variant.fn.__name__, key) for variant, key in seen.found}
print(json.dumps([len(known), len(launched), sorted(map(str, launched - known))]))
"""


def test_shapes_of_a_checkpoint_say_where_and_how_often(full_size):
    def labels(name):
        return [shape.label for shape in shapes_of(name, full_size["SD 1.5"], torch.float16)]

    assert labels("attention")[:2] == ["UNet 8 x d=40, 4096 to 4096, 5 times", "UNet 8 x d=40, 4096 to 77, 5 times"]
    assert labels("wide_attention") == ["VAE 1 x d=512, 4096 to 4096, once"]
    norms = [same(shape) for shape in shapes_of("group_norm", full_size["SD 1.5"], torch.float16)]
    assert {"batch": 2, "channels": 1280, "size": 32, "skip": 640, "shift": False, "silu": True} in norms
    assert {"batch": 1, "channels": 128, "size": 512, "skip": 0, "shift": True, "silu": True} in norms  # of the decoder
    text = [shape for shape in shapes_of("layer_norm", full_size["SDXL"], torch.float16) if shape.label.startswith("text")]
    assert {shape.channels for shape in text} == {768, 1280}


def test_asking_for_shapes_leaves_the_operations_as_they_were():
    before = [dict(vars(module)) for module in (choice, operations, fused_networks)]
    shapes_of("geglu", "tiny", torch.float32)
    assert [vars(module) for module in (choice, operations, fused_networks)] == before


def test_a_kernel_that_a_checkpoint_never_calls(tmp_path):
    half = ["--device", "cpu", "--dtype", "float16", "--repeats", "1"]
    main(["kernels", "wide_attention", *half, "--shapes-of", "tiny", "--json", str(tmp_path / "x.json")])
    assert rows(tmp_path / "x.json")[0]["error_text"] == "the networks of tiny never call it"
    with pytest.raises(minisd.CheckpointError, match="does not exist"):
        main(["kernels", "geglu", *CPU, "--shapes-of", str(tmp_path / "none.safetensors")])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", None)])
def test_errors_of_the_interpreter_only_where_it_rounds_as_a_gpu(dtype, limit, tmp_path, capsys):
    command = ["kernels", "geglu", "--device", "cpu", "--repeats", "1", "--shapes-of", "tiny"]
    command += ["--json", str(tmp_path / "x.json")]
    main([*command, *([] if dtype == "float32" else ["--dtype", dtype])])  # float32 is the default of kernels on a CPU
    out = capsys.readouterr().out
    assert f"geglu, {dtype}," in out
    assert ("no error of Triton kernels: the interpreter cuts bfloat16 off" in out) is (limit is None)
    for row in rows(tmp_path / "x.json"):
        if row["variant"] == "minisd":
            assert row["error"] is None if limit is None else row["error"] < limit
        else:
            assert row["error"] > 0


def test_without_the_interpreter_it_says_where_our_kernels_are(tmp_path, capsys, monkeypatch):
    from minisd.fast.choice import kernels

    monkeypatch.setattr(kernels().checks, "DEVICES", ("cuda",))
    main(["kernels", "geglu", *CPU, "--shapes-of", "tiny", "--json", str(tmp_path / "x.json")])
    assert "minisd's own kernels are left out" in capsys.readouterr().out
    assert [row["variant"] for row in rows(tmp_path / "x.json")] == ["PyTorch"]


def test_compile_names_registers_spills_and_shared_memory(tmp_path):
    """Without a GPU, though this process runs kernels in the interpreter."""
    pytest.importorskip("triton")
    assert main(["compile", "geglu", "--gpu", "RTX 4090", "--json", str(tmp_path / "x.json")]) == 0
    table = json.loads((tmp_path / "x.json").read_text())["tables"][0]
    assert table["title"].startswith("compiled for RTX 4090 (sm_89), float16")
    row, *to_float8 = table["rows"]  # one variant for all shapes, and rows in float8, which take a whole row
    assert row["kernel"] == "geglu"
    assert {each["kernel"] for each in to_float8} == {"geglu_float8"}
    assert 16 <= row["registers"] <= 255
    assert (row["spilled_B"], row["warps"]) == (0, 4)
    assert row["an_SM_holds"] == min(65536 // (-(-row["registers"] // 8) * 8 * 128), 48 // 4)
    assert 0.01 < row["compile_s"] < 60


def test_what_does_not_compile_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "of_job", lambda *_: iter([{"for": "geglu a", "error_text": "no"}]))
    main(["compile", "geglu", "--json", str(tmp_path / "x.json")])
    assert rows(tmp_path / "x.json") == [{"label": "geglu a", "error_text": "no"}]
    main(["compile", "wide_attention", "--dtype", "float32", "--json", str(tmp_path / "x.json")])
    assert rows(tmp_path / "x.json") == [{"label": "wide_attention", "error_text": "does not take float32"}]


def test_a_compiler_that_dies_says_why():
    with pytest.raises(RuntimeError, match=r"No module named 'minisd\.kernels\.softmax'"):
        list(compiling.compiled(90, "float16", ["softmax"]))


@pytest.mark.slow
def test_compile_says_where_a_gpu_has_no_float8_and_finds_its_shapes(tmp_path, capsys):
    assert main(["compile", "quantise_rows", "--gpu", "a100", "--dtype", "float16", "--json", str(tmp_path / "x.json")]) == 0
    assert "quantise_rows: a100 has no float8" in capsys.readouterr().out
    assert not rows(tmp_path / "x.json")
    tiny = ["--shapes-of", "tiny", "--gpu", "h100", "--dtype", "float16"]
    assert main(["compile", "dequantise", *tiny, "--json", str(tmp_path / "y.json")]) == 0
    assert [row["label"] for row in rows(tmp_path / "y.json")] == ["UNet: dequantise"]


def test_compile_needs_triton(monkeypatch):
    from minisd.fast.choice import kernels

    monkeypatch.setattr(kernels().checks, "triton", None)
    with pytest.raises(minisd.UsageError, match="bench compile: expected Triton to be installed, found none"):
        main(["compile"])


@pytest.mark.parametrize(
    ("name", "capability"), [("h100", 90), ("H200", 90), ("sm_90", 90), ("RTX-4090", 89), ("a100", 80), ("sm_120", 120)]
)
def test_gpus_by_name(name, capability):
    assert capability_of(name) == capability


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roofline_counts_attention_as_attention(dtype):
    """Also that which a CPU makes of products and a softmax (bfloat16, many keys)."""
    q = torch.randn(2, 1024, 80, dtype=dtype)
    watch = Watch()
    with of_pytorch(), watch, torch.no_grad():
        ops.attention(q, q, q, heads=2)
    work = [each for each in watch.seen if each.kind == "attention"]
    assert sum(each.flops for each in work) == 4 * 2 * 1024 * 1024 * 80
    assert sum(each.bytes for each in work) >= 4 * q.numel() * dtype.itemsize
    with torch.no_grad():
        spent = spent_on_cpu(lambda: ops.attention(q, q, q, heads=2))
    assert not any(kind == "linear" for kind, _, _ in spent.values())
    assert sum(seconds for kind, seconds, _ in spent.values() if kind == "attention") > 0


def test_roofline_knows_attention_by_code_of_our_own(monkeypatch):
    monkeypatch.setattr(networks_of_a_cpu, "attention", lambda q, k, v, heads: time.sleep(0.01) or q)
    spent = spent_on_cpu(lambda: networks_of_a_cpu.attention(torch.ones(1, 2, 4), None, None, 1))
    (kind, seconds, count) = spent["compiled attention"]
    assert (kind, count) == ("attention", 1)
    assert seconds >= 0.01


def test_roofline_counts_no_views():
    def run():
        x = torch.ones(4, 6).view(6, 4).t()[1:].permute(1, 0)
        return (x.unsqueeze(0).expand(2, 6, 3) @ torch.ones(3, 5)).detach() + 1

    spent = spent_on_cpu(run)
    assert not [name for name in spent if any(word in name for word in ("view", "expand", "detach", "::t", "slice", "permute"))]
    assert {name: count for name, (_, _, count) in spent.items() if "add" in name} == {"aten::add.Tensor": 1}


SMALL_ROOFLINE = """
from families import SMALL
from minisd.bench import networks
from minisd.cli.bench import bench, parsed
small = SMALL["sd1"]
networks.MODELS["sd15"] = networks.Published("small", small.shapes, small.family, 8, small.context)
bench(parsed(["roofline", "--device", "cpu", "--dtype", "float32", "--repeats", "1"]))
"""


def test_roofline_leaves_the_terminal_alone():
    """What C++ code prints goes past Python's sys.stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("", "tests/support", "scripts"))}
    command = [sys.executable, "-P", "-c", SMALL_ROOFLINE]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert run.stderr == ""


def test_roofline_counts_the_work_and_the_time(little, tmp_path):
    main(["roofline", *CPU, "--json", str(tmp_path / "x.json")])
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    assert found["convolution"]["GFLOP"] > 0
    assert found["convolution"]["time_us"] > 0
    assert found["all"]["time_us"] == pytest.approx(sum(row["time_us"] for row in found.values()) / 2)
    assert found["all"]["operations"] == sum(row["operations"] for row in found.values()) / 2
    assert found["attention"]["GFLOP"] > 0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("linear_geglu_kernel", "GEGLU"),
        ("apply_kernel", "GroupNorm, SiLU"),
        ("layer_norm_kernel", "LayerNorm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<c10::Half>>", "sums and copies"),
    ],
)
def test_kernels_of_a_gpu_are_sorted_by_name(kernel, kind):
    assert class_of(kernel) == kind


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
    report = Report(CLOCK, tmp_path / "x.json")
    report.table("title", ("time ms",))
    with report.attempt("bad"):
        raise RuntimeError("no\nsecond line")
    report.add("good", time=0.5)
    assert rows(tmp_path / "x.json") == [
        {"label": "bad", "error_text": "RuntimeError: no"},
        {"label": "good", "time_ms": 500.0},
    ]
    assert "500.000" in capsys.readouterr().out


def test_a_kernel_that_fails_does_not_end_the_peers(little, monkeypatch, tmp_path):
    def broken(*args, **more):
        raise RuntimeError("broken")

    monkeypatch.setattr(steps, "laid_out", broken)
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    found = rows(tmp_path / "x.json")
    assert found[0]["error_text"] == "RuntimeError: broken"
    assert next(row for row in found if row["label"] == "diffusers, eager")["time_ms"] > 0


def test_all_keeps_what_a_part_measured_before_it_stopped(tmp_path, monkeypatch, capsys):
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\n"
        "json.dump({'tables': [{'title': sys.argv[-3], 'columns': [], 'rows': []}]}, open(sys.argv[-1], 'w'))\n"
        "if 'slow' in sys.argv: time.sleep(60)\n"
        "sys.exit(3 if 'bad' in sys.argv else 0)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(everything, "random_checkpoint", lambda model, path, device: path.write_bytes(b""))
    monkeypatch.setattr(everything, "parts", lambda with_files: [["good"], ["bad"], ["slow"]])
    monkeypatch.setattr(everything, "LONGEST", 2.0)
    monkeypatch.setattr(everything.subprocess, "Popen", lambda command: popen([sys.executable, str(script), *command[5:]]))
    main(["all", *CPU, "--json", str(tmp_path / "all.json")])
    tables = json.loads((tmp_path / "all.json").read_text())["tables"]
    assert [table.get("command") for table in tables] == ["good", "bad", None, "slow", None, None]
    assert tables[2]["rows"][0]["error_text"] == "ended with status 3"
    assert tables[4]["rows"][0]["error_text"] == "stopped after 2 s"


def test_summary_takes_the_best_of_what_was_measured():
    def table(title, *rows):
        return {"title": title, "columns": [], "rows": list(rows)}

    def row(label, **values):
        return {"label": label} | values

    name = "SD 1.5 UNet step, batch 2, 64x64 latents, float16, x"
    floor = row("the plain form's arithmetic alone", time_ms=2.0)
    ours = row("minisd, fused", time_ms=6.0), row("minisd, whole step as drawn", time_ms=5.0)
    eager, graph = row("diffusers, eager", time_ms=40.0), row("diffusers in a CUDA graph", time_ms=10.0)
    tables = [
        table(name, *ours, floor, eager, graph),
        table(name, row("minisd, fused", time_ms=4.0), row("diffusers, torch.compile", error_text="no")),
        table(name, row("minisd, fused", time_ms=4.0), floor, row("diffusers, torch.compile", time_ms=6.0)),
        table("attention, float16: x", row("SDXL self d=64 64x64", variant="minisd", time_us=200.0, of_ceiling=0.5),
              row("SDXL self d=64 64x64", variant="cuDNN", time_us=100.0),
              row("SDXL self d=64 64x64", variant="64x64x4x2", time_us=10.0)),
        table("opening a 2 GB file", row("minisd, float16", time_s=0.5, **{"GB/s": 4.0})),
    ]  # fmt: skip
    found = dict(summary(tables))  # in seconds
    step = found["SD 1.5 UNet step"]  # each peer against ours of its own run
    assert (step["time"], step["floor"], step["best_peer"]) == pytest.approx((0.004, 0.002, 0.006))
    assert (step["to_ours"], step["which_peer"]) == (pytest.approx(1.5), "diffusers, torch.compile")
    assert dict(summary(tables[:2]))["SD 1.5 UNet step"]["to_ours"] == pytest.approx(2.0)
    kernel = found["attention SDXL self d=64 64x64"]
    assert (kernel["floor"], kernel["which_peer"], kernel["to_ours"]) == (pytest.approx(1e-4), "cuDNN", pytest.approx(0.5))
    assert found["opening an SD 1.5 file at 4 GB/s"] == {"time": 0.5, "floor": None}
    assert len(found) == 3


def test_summary_finds_the_rows_that_bench_writes(little, tmp_path):
    """The labels are those of real tables."""
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    tables[0]["title"] = tables[0]["title"].replace("small", "SD 1.5")
    ((label, values),) = summary(tables)
    assert label == "SD 1.5 UNet step"
    assert values["which_peer"] == "diffusers, eager"
    assert 0 < values["floor"] < values["time"]
    from minisd.fast.choice import kernels

    for kernel, shape in everything.SHAPES:
        assert any(each.label == shape for each in kernels().KERNELS[kernel].SHAPES), shape


def test_every_part_of_all_is_a_command():
    from minisd.fast.choice import kernels

    parts = [parsed([*part, "--device", "cpu", "--repeats", "1", "--full"]) for part in everything.parts(with_files=True)]
    assert {part.what for part in parts} == {"unet", "vae", "kernels", "image", "load", "roofline"}
    assert {part.name for part in parts if part.name} == set(kernels().KERNELS)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    main(["kernels", "linear_step", *CPU, "--plot", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "softmax"], r"bench kernels: expected one of group_norm, .* found 'softmax'"),
        (["all"], r"bench all: expected --json FILE"),
        (["unet", "--plot", "x.png"], r"--plot: expected matplotlib"),
        (["kernels", "geglu", "--against", "none.py"], r"--against: expected a Python file, found none at none.py"),
    ],
)
def test_wrong_requests_are_named(arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(minisd.UsageError, match=message):
        main([*arguments, *CPU])


VALUES = {"name": "geglu", "shapes_of": "tiny", "against": "x.py", "gpu": "a100", "model": "sdxl", "checkpoint": "x", "peers": ""}
VALUES |= {"size": "64x64", "steps": "3"}
VALUES |= {"minutes": "1", "repeats": "2", "device": "cpu", "dtype": "float32", "json": "x.json", "plot": "x.png"}


@pytest.mark.parametrize("part", PARTS)
def test_an_option_that_a_part_does_not_use_is_refused(part, capsys):
    assert set(DEFAULTS) == {action.dest for action in parser()._actions} - {"help", "what"}
    for option in DEFAULTS:
        argv = [part, *([] if option == "name" else [f"--{option.replace('_', '-')}"])]
        argv += [VALUES[option]] if option in VALUES else []
        if option == "against" and part == "kernels":
            argv.insert(1, "geglu")
        if part in TAKEN_BY.get(option, PARTS):
            assert getattr(parsed(argv), option) != DEFAULTS[option]
            continue
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"found with {part}" in line


def test_the_help_names_who_takes_an_option():
    for action in parser()._actions:
        if len(TAKEN_BY.get(action.dest, PARTS)) < len(PARTS) - 5:
            assert str(action.help).startswith(f"with {TAKEN_BY[action.dest][0]}"), action.dest


def test_random_weights_keep_the_keys(tmp_path):
    small = SMALL["sd1"]
    model = networks.Published("small", small.shapes, small.family, 16, small.context)
    pipe = minisd.load(networks.random_checkpoint(model, tmp_path / "x.safetensors", torch.device("cpu")), device="cpu")
    assert set(pipe.model.state_dict()) == set(small.shapes())
    assert any(key.startswith(UNET) for key in small.shapes())


def test_write_json_leaves_no_draft(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_clock_counts_the_median():
    assert dataclasses.replace(CLOCK, repeats=3).seconds(lambda: sum(range(1000))) > 0
