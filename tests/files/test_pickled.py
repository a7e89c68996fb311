"""Files that torch.save wrote: the same numbers as from .safetensors, and nothing that they say is ever run."""

from __future__ import annotations

import argparse
import collections
import copyreg
import datetime
import decimal
import enum
import fractions
import functools
import io
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys
import tarfile
import time
import types
import typing
import uuid
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pickles
import pytest
import torch
from peak import memory, reset
from pickles import HONEST, archive, data_pkl, saved, tensor, text, with_weights
from safetensors.torch import load_file, save

import minisd
from minisd.cli import main
from minisd.files.checkpoint import open_checkpoint
from minisd.files.entry import FLOATS
from minisd.files.model import averaged, build
from minisd.files.tensors import load_tensors
from minisd.models.family import SD1
from minisd.workbench.inspecting import inspect


def refused(path: Path) -> str:
    with pytest.raises(minisd.CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 700
    return message


def written(folder: Path, content: bytes, name: str = "x.ckpt") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    return load_tensors(checkpoint, [key for key, entry in checkpoint.entries.items() if entry.dtype in FLOATS], torch.float64)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key].double()) for key in wanted)


# ---- honest files ----

FORMATS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_those_that_were_saved(tmp_path, dtype, options):
    weights = {
        key: torch.randn(shape).to(dtype) for key, shape in {"a.b": (3, 5), "a.c": (7,), "scalar": (), "none": (0, 4)}.items()
    }
    path = written(tmp_path, saved(weights, **options))
    checkpoint = open_checkpoint(path)
    assert {key: entry.shape for key, entry in checkpoint.entries.items()} == {k: tuple(w.shape) for k, w in weights.items()}
    assert {entry.dtype for entry in checkpoint.entries.values()} == {
        str(dtype).replace("torch.float", "F").replace("torch.bfloat", "BF")
    }
    assert checkpoint.size == path.stat().st_size
    assert checkpoint.modified == path.stat().st_mtime_ns
    found = load_tensors(checkpoint, weights, dtype)
    assert all(torch.equal(found[key], weights[key]) for key in weights)


SMALL = ["--seed", "1", "--steps", "2", "--size", "64x64", "--device", "cpu"]  # a .ckpt does not say what size it draws


def views() -> dict[str, torch.Tensor]:
    """Every way in which a tensor may lie in a storage that is still its numbers in a row."""
    shared = torch.randn(4, 6)
    whole = torch.arange(24.0)
    return {
        "whole": shared,
        "again": shared,
        "rows": shared[1:3],
        "row": shared[2],
        "tail": whole[10:],
        "transposed": torch.randn(5, 3).t(),
        "transposed part": whole[8:20].view(3, 4).t(),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "flat kernel": torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "new axis": torch.randn(7).expand(1, 7),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "half of it": torch.randn(3, 3).half().t(),
    }


def order_of(value: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if value.dim() == 4 else torch.contiguous_format


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_views_and_shared_storages(tmp_path, options):
    wanted = views()
    path = written(tmp_path, saved(wanted, **options))
    found = tensors(path)
    assert same(found, wanted)
    assert all(value.is_contiguous(memory_format=order_of(value)) for value in found.values())
    found["whole"].zero_()
    assert torch.equal(found["again"], wanted["again"].double())


@pytest.fixture
def lightning(monkeypatch):
    """The classes that old training code pickled by name, in modules of their names."""
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    kind = type("ModelCheckpoint", (), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", kind, raising=False)
    return kind


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_training_state_beside_the_weights_is_passed_over(tmp_path, lightning, options):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    top = {
        "epoch": 7,
        "global_step": 470_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": module.state_dict(),  # an OrderedDict with attributes
        "callbacks": {lightning: {"monitor": "loss", "best": torch.tensor(1.0), "scalar": np.float64(0.5), "path": None}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "_step_count": 3}],
        "set": {torch.Size([1, 2]), (3, 4)},
        "array": np.arange(3.0),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
    }
    path = written(tmp_path, saved(top, **options))
    weights = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
    assert same(tensors(path), weights)
    assert open_checkpoint(path).metadata == {"epoch": "7", "global_step": "470000", "pytorch-lightning_version": "1.4.2"}
    shown = inspect(path)
    assert shown["tensors"] == 7
    json.dumps(shown)


class Average:
    """What a trainer keeps beside the weights in a class of its own."""

    def __init__(self) -> None:
        self.decay, self.shadow = 0.999, {"a": torch.ones(2)}


class Slots:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Config(dict):
    pass


class Kind(enum.Enum):
    LINEAR = "linear"


class Level(enum.IntEnum):
    HIGH = 3


Pair = collections.namedtuple("Pair", "a b")


def harmless() -> dict[str, object]:
    """Objects of trainers that are made of data alone, or of code that nobody has to run."""
    layer = torch.nn.Linear(2, 2)
    noted = torch.ones(2)
    noted.note = "mine"
    return {
        "containers": [collections.defaultdict(list, a=[1]), collections.Counter("aab"), collections.deque([1], 3)],
        "a factory": collections.defaultdict(functools.partial(dict, a=1)),
        "sets": [{1, 2}, frozenset([3]), {(1, 2): {3}}],
        "options": [argparse.Namespace(lr=1e-4), types.SimpleNamespace(a=[1])],
        "paths": [Path("a/b"), pathlib.PureWindowsPath("c:/x")],
        "times": [datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), datetime.timedelta(1)],
        "numbers": [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1j, uuid.UUID(int=1), range(3), bytearray(b"x")],
        "numpy": [np.float32(1), np.int64(2), np.bool_(True), np.arange(3.0), np.array([{}, None], dtype=object), np.dtype("f4")],
        "generators": [random.getstate(), np.random.get_state(), np.random.default_rng(1), torch.get_rng_state()],
        "torch": [torch.Size([1]), torch.device("cpu"), torch.bfloat16, torch.strided, torch.nn.functional.gelu],
        "own classes": [Average(), Slots(), Config(a=1), Pair(1, 2), Average],
        "enumerations": [Kind.LINEAR, Level.HIGH],
        "types": [typing.Any, typing.Literal["a"], list[int], type(None), ...],
        "a module": layer,
        "an optimizer": torch.optim.AdamW(layer.parameters()),
        "a scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD(layer.parameters()), 1),
        "tensors": [noted, torch.nn.Buffer(torch.ones(2)), torch.ones(3).untyped_storage(), torch.eye(2).to(torch.float8_e5m2)],
    }


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_objects_beside_the_weights_are_passed_over(tmp_path, options):
    for name, value in harmless().items():
        for top in ({"state_dict": HONEST, "hyper_parameters": value}, HONEST | {"args": value}):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.save of modules in the old format, and of storages
                path = written(tmp_path, saved(top, **options))
            assert same({key: found for key, found in tensors(path).items() if key in HONEST}, HONEST), name


def test_no_object_is_made(tmp_path, monkeypatch):
    """Neither is its class imported nor its __new__, __init__ or __setstate__ called."""
    module = types.ModuleType("trainer_of_ours")
    touched = []
    body = {"__module__": module.__name__, "__setstate__": lambda self, state: touched.append(state)}
    module.Thing = type("Thing", (), body | {"__new__": lambda kind, *_: touched.append(kind) or object.__new__(kind)})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    thing = object.__new__(module.Thing)
    thing.a = 1
    path = written(tmp_path, saved({"state_dict": HONEST, "thing": thing}))
    torch.load(path, weights_only=False)
    assert touched  # the file is what it is meant to be
    touched.clear()
    assert same(tensors(path), HONEST)
    monkeypatch.delitem(sys.modules, module.__name__)
    assert same(tensors(path), HONEST)
    assert not touched
    assert module.__name__ not in sys.modules


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_tensors_in_other_ways_of_torch(tmp_path, options):
    """Parameters and tensors with attributes, float8 of both kinds, a dict with a factory: the weights are there."""
    noted, hung = torch.randn(3, 2), torch.nn.Parameter(torch.randn(4))
    noted.note, hung.note = "mine", [1]
    wanted = {
        "noted": noted,
        "hung": hung,
        "buffer": torch.nn.Buffer(torch.randn(2)),
        "e4m3": torch.randn(3, 5).to(torch.float8_e4m3fn),
        "e5m2": torch.randn(3, 5).to(torch.float8_e5m2)[1:],
        "turned": torch.randn(3, 5).to(torch.float8_e4m3fn).t(),
    }
    for top in (wanted, collections.defaultdict(dict, wanted), {"state_dict": collections.defaultdict(None, wanted)}):
        path = written(tmp_path, saved(top, **options))
        checkpoint = open_checkpoint(path)
        assert {key: entry.dtype for key, entry in checkpoint.entries.items()} == {
            **dict.fromkeys(("noted", "hung", "buffer"), "F32"),
            **{"e4m3": "F8_E4M3", "e5m2": "F8_E5M2", "turned": "F8_E4M3"},
        }
        found = load_tensors(checkpoint, wanted, torch.float32)
        assert all(torch.equal(found[key], value.detach().float()) for key, value in wanted.items())


def test_weights_inside_an_object_are_not_taken_for_none(tmp_path):
    layer = torch.nn.Linear(2, 2)
    assert "but an object of torch.nn.modules.linear.Linear" in refused(written(tmp_path, saved(layer)))
    message = refused(written(tmp_path, saved({"model": layer, "epoch": 1})))
    assert "its objects, such as torch.nn.modules.linear.Linear, are not made" in message


def test_dicts_one_level_below_the_top(tmp_path):
    path = written(tmp_path, saved({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "cat"}))
    assert inspect(path)["looks_like"] == "a textual inversion embedding"
    assert list(open_checkpoint(path).entries) == ["string_to_param.*"]


def test_the_same_picture_as_from_the_converted_file(tmp_path, tiny):
    weights = load_file(tiny.checkpoint.path)
    for name, options in {"old.pt": FORMATS["legacy"], "named.safetensors": {}, "new.ckpt": {}}.items():
        path = written(tmp_path, saved({"state_dict": weights, "epoch": 1}, **options), name)
        pipe = minisd.load(path, device="cpu")
        assert all(torch.equal(value, tiny.model.state_dict()[key]) for key, value in pipe.model.state_dict().items())
    wanted = tiny("a red circle", seed=3, steps=2, guidance_scale=6)  # of which a .ckpt says nothing
    assert (
        pipe("a red circle", seed=3, steps=2, guidance_scale=6, width=64, height=64).images[0].tobytes()
        == wanted.images[0].tobytes()
    )


def test_inspect_on_the_command_line_without_torch(tmp_path, tiny):
    path = written(tmp_path, saved({"state_dict": load_file(tiny.checkpoint.path)}))
    code = f"import sys; from minisd.cli import main; main(['inspect', {str(path)!r}]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Stable Diffusion 1.x (sd1), task draw, predicts epsilon, 512x512" in done.stdout


# ---- the moving average ----


@pytest.mark.parametrize("write", [saved, save], ids=["ckpt", "safetensors"])
def test_ema_weights_on_request(tmp_path, tiny, write):
    own = load_file(tiny.checkpoint.path)
    unet = [key for key in own if key.startswith("model.")]
    average = {f"model_ema.{key.removeprefix('model.').replace('.', '')}": own[key].float() * 0.5 for key in unet}
    assert "model_ema.diffusion_modelinput_blocks00weight" in average
    steps = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3, dtype=torch.int32)}
    path = written(tmp_path, write(own | average | steps))
    plain = minisd.load(path, device="cpu", dtype="float32")
    pipe = minisd.load(path, device="cpu", dtype="float32", ema=True)
    assert (plain.checkpoint.ema, pipe.checkpoint.ema) == (False, True)
    for key, value in pipe.model.state_dict().items():
        assert torch.equal(value, own[key].float() * (0.5 if key in unet else 1)), key
        assert torch.equal(plain.model.state_dict()[key], own[key].float())
    assert pipe("a star", steps=1, seed=1, width=64, height=64).metadata[0]["ema"] is True


def test_the_command_line_draws_from_a_ckpt_and_its_average(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = load_file(tiny.checkpoint.path)
    average = {
        f"model_ema.{k.removeprefix('model.').replace('.', '')}": v * 0.5 for k, v in own.items() if k.startswith("model.")
    }
    written(tmp_path, saved({"state_dict": own | average}))
    options = ["-m", "x.ckpt", *SMALL]
    assert main(["a star", "--ema", "-o", "ema.png", *options]) == main(["a star", "-o", "own.png", *options]) == 0
    assert main(["again", "ema.png", "-o", "again.png"]) == 0
    assert main(["again", "own.png", "-o", "own-again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("ema.png").read_bytes()
    assert Path("own-again.png").read_bytes() == Path("own.png").read_bytes() != Path("ema.png").read_bytes()


def test_a_file_without_an_average_says_so(tmp_path, reduced_file):
    checkpoint = open_checkpoint(reduced_file)
    with pytest.raises(minisd.CheckpointError, match="has no moving average in this file"):
        averaged(checkpoint)
    with pytest.raises(minisd.CheckpointError, match="has no moving average in this file"):
        minisd.load(reduced_file, device="cpu", ema=True)
    weights = {"model.diffusion_model.out.0.bias": torch.zeros(4), "model_ema.diffusion_modelout0bias": torch.zeros(5)}
    with pytest.raises(minisd.CheckpointError, match=r"expected \(4,\), found \(5,\)"):
        averaged(open_checkpoint(written(tmp_path, saved(weights))))


# ---- what must never run ----


@pytest.fixture(scope="module")
def armed(tmp_path_factory):
    """Every payload and the canary that it would touch."""
    canary = tmp_path_factory.mktemp("canary") / "canary"
    payloads = pickles.payloads(canary)
    copyreg.add_extension("posix", "system", 0xF1)
    yield canary, payloads
    copyreg.remove_extension("posix", "system", 0xF1)
    copyreg.clear_extension_cache()


class Believer(pickle.Unpickler):
    """A reader of checkpoints as minisd's is not."""

    def persistent_load(self, _):
        return torch.zeros(6).untyped_storage()

    def find_class(self, module, name):
        found = super().find_class(module, name)
        return (lambda *_: None) if name.startswith("_rebuild_tensor") else found


def ran(canary: Path) -> bool:
    there = canary.exists()
    canary.unlink(missing_ok=True)
    return there


def test_the_payloads_are_real(armed):
    """Each makes its canary in an ordinary reader: what the next tests refuse is not refused for being broken."""
    canary, payloads = armed
    assert len(payloads) >= 40
    for name, payload in payloads.items():
        try:
            result = Believer(io.BytesIO(payload)).load()
            if hasattr(result, "get") and hasattr(result.get("x"), "wait"):
                result["x"].wait()
        except Exception:
            pass
        for _ in range(100):  # a shell may take its time
            if canary.exists():
                break
            time.sleep(0.02)
        assert ran(canary), name


def legacy(**changed: bytes) -> bytes:
    """A file of the old format with one storage of 24 bytes; a payload may stand in place of one of its pickles."""
    honest = {
        "first": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "second": pickle.dumps(1001, 2),
        "third": pickle.dumps({"little_endian": True}, 2),
        "fourth": with_weights(b"N"),
        "fifth": pickle.dumps(["0"], 2),
    }
    return b"".join((honest | changed).values()) + (6).to_bytes(8, "little") + bytes(24)


def disguises(payload: bytes) -> dict[str, bytes]:
    """The ways in which a pickle comes into a file."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(payload)
            file.addfile(entry, io.BytesIO(payload))
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file:
        file.writestr("archive/data.pkl", with_weights(b"N"))
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/data/0", bytes(24))
    other = {"archive/data/0": bytes(24)}
    return {
        "in an archive": archive(payload),
        "in a compressed archive": archive(payload, compression=zipfile.ZIP_DEFLATED),
        "as a second data.pkl": twice.getvalue(),
        "in another folder": archive(with_weights(b"N"), other | {"other/data.pkl": payload}),
        "as a storage": archive(with_weights(payload[2:-1]), {"archive/data/0": payload}),
        "as constants.pkl": archive(with_weights(b"N"), other | {"archive/constants.pkl": payload}),
        "as code": archive(with_weights(b"N"), other | {"archive/code/__torch__.py": payload}),
        "behind the end": archive(with_weights(b"N") + payload),
        "raw": payload,
        "raw behind honest weights": with_weights(b"N") + payload,
        "legacy, first": legacy(first=payload),
        "legacy, third": legacy(third=payload),
        "legacy, fourth": legacy(fourth=payload),
        "legacy, fifth": legacy(fifth=payload),
        "in a tar": tar.getvalue(),
        "behind a header": b"\x02\0\0\0\0\0\0\0{}" + payload,
    }


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_no_payload_is_run(armed, tmp_path):
    canary, payloads = armed
    for name, payload in payloads.items():
        for how, content in disguises(payload).items():
            for extension in ("ckpt", "safetensors"):
                path = written(tmp_path, content, f"x.{extension}")
                with pytest.raises(minisd.CheckpointError):
                    open_checkpoint(path)
                assert not ran(canary), (name, how)
    time.sleep(0.2)
    assert not ran(canary)


def test_the_message_names_what_the_pickle_asks_for(armed, tmp_path):
    _, payloads = armed
    message = refused(written(tmp_path, archive(payloads["os.system"])))
    assert (
        "asks for posix.system, which no weights need; nothing was run (get this model as .safetensors, or convert it" in message
    )
    message = refused(written(tmp_path, archive(payloads["getattr of os"])))
    assert "asks for __builtin__.getattr, __builtin__.__import__" in message
    many = archive(pickles.harmless_but_refused()["a thousand names"])
    assert "os.f0, os.f1, os.f2, os.f3, os.f4, … (1000 in all)" in refused(written(tmp_path, many))


@pytest.mark.parametrize("name", pickles.harmless_but_refused())
def test_what_no_checkpoint_needs_is_refused(tmp_path, name):
    payload = pickles.harmless_but_refused()[name]
    refused(written(tmp_path, archive(payload)))
    if name != "something behind the end":  # behind this pickle the legacy format goes on
        refused(written(tmp_path, legacy(fourth=payload)))


def test_nothing_is_imported(tmp_path, monkeypatch):
    """Not even modules that are allowed by name."""
    state = pickles.named("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint") + b")\x81}b"
    path = written(tmp_path, archive(with_weights(state)))
    monkeypatch.setattr("builtins.__import__", lambda name, *_: pytest.fail(f"imported {name}"))
    checkpoint = open_checkpoint(path)
    monkeypatch.undo()
    assert list(checkpoint.entries) == ["w"]
    assert "pytorch_lightning" not in sys.modules


@pytest.mark.parametrize("name", pickles.bad_views())
def test_views_beyond_their_storage_are_refused(tmp_path, name):
    described, message = pickles.bad_views()[name]
    assert message in refused(written(tmp_path, archive(b"\x80\x02}" + text("w") + described + b"s.")))


def test_honest_views_beside_the_bad_ones(tmp_path):
    """What the table above refuses is refused for the fault that it names."""
    for shape, stride, offset in [((6,), (1,), 0), ((5,), (1,), 1), ((2, 3), (3, 1), 0), ((3, 2), (1, 3), 0), ((1,), (9,), 5)]:
        path = written(tmp_path, archive(b"\x80\x02}" + text("w") + tensor(shape, stride, offset) + b"s."))
        assert tensors(path)["w"].shape == shape


class Own(torch.Tensor):
    pass


def of_other_kinds() -> dict[str, tuple[object, str]]:
    dense = torch.eye(3)
    return {
        "sparse": ({"w": dense.to_sparse()}, "asks for torch._utils._rebuild_sparse_tensor"),
        "meta": ({"w": dense.to("meta")}, "asks for torch._utils._rebuild_meta_tensor_no_storage"),
        "complex": ({"w": dense.to(torch.complex64)}, "asks for torch.ComplexFloatStorage"),
        "another float8": ({"w": dense.to(torch.float8_e8m0fnu)}, "asks for torch.float8_e8m0fnu"),
        "unsigned numbers": ({"w": dense.to(torch.uint16)}, "asks for torch.uint16"),
        "repeated": ({"w": torch.zeros(1).expand(1 << 40)}, "needs more numbers than the 1"),
        "a view with gaps": ({"w": torch.zeros(4, 4)[:, :2]}, "gaps or repetitions"),
        "a class of tensors": ({"w": dense.as_subclass(Own)}, "Own, which no weights need"),
        "a tensor": (dense, "holds no dict of tensors"),
        "a list": ([dense], "holds no dict of tensors"),
        "no tensors": ({"a": 1}, "holds no tensors"),
        "a state that is none": ({"state_dict": 1}, "holds no tensors"),
        "names that lead elsewhere": ({"../w": dense}, "is not an honest tensor name"),
        "names with a NUL": ({"a\0w": dense}, "is not an honest tensor name"),
        "names that are half a letter": ({"\ud800": dense}, "is not an honest tensor name"),
        "long names": ({"w" * 100_000: dense}, "is not an honest tensor name"),
        "two names in one": ({"a": {"b": dense}, "a.b": dense}, "two tensors of one name"),
    }


@pytest.mark.parametrize("name", of_other_kinds())
@pytest.mark.parametrize("options", [{}, FORMATS["legacy"]], ids=["zip", "legacy"])
def test_other_contents_are_refused(tmp_path, name, options):
    top, message = of_other_kinds()[name]
    assert message in refused(written(tmp_path, saved(top, **options)))


# ---- archives that lie ----


def changed(content: bytes, old: bytes, new: bytes, which: int = 0) -> bytes:
    """The file with one occurrence of a piece replaced; the piece must be there."""
    places = [i for i in range(len(content)) if content.startswith(old, i)]
    at = places[which]
    return content[:at] + new + content[at + len(old) :]


def bad_archives() -> dict[str, tuple[bytes, str]]:
    good = saved(HONEST)
    plain = archive(with_weights(b"N"))
    bomb = archive(with_weights(b"N"), {"archive/data/0": bytes(64 << 20)}, zipfile.ZIP_DEFLATED)
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("model.safetensors", b"x")
    many = {f"archive/data/{i}": b"" for i in range(100_000)}
    program = {"archive/code/x.py": b"x", "archive/constants.pkl": b"x"}
    entry = plain.index(b"PK\x01\x02")  # the directory's first entry, of data.pkl
    second = plain.index(b"PK\x01\x02", entry + 1)  # and its second, of data/0
    first_again = plain[: second + 42] + bytes(4) + plain[second + 46 :]
    beyond = bytearray(archive(with_weights(b"N"), {"archive/data/0": bytes(24)}))
    for field in (20, 24):  # the compressed and the real size of its last record
        last = beyond.rindex(b"PK\x01\x02") + field
        beyond[last : last + 4] = (1 << 20).to_bytes(4, "little")
    return {
        "big-endian": (changed(good, b"little", b"big___"), "big-endian"),
        "another order": (changed(good, b"little", b"biggly"), "big-endian"),
        "no archive of torch": (other.getvalue(), "is a zip archive, but not one of torch.save: it holds 'model.safetensors'"),
        "an empty archive": (b"PK\x05\x06" + bytes(18), "is a zip archive, but not one of torch.save"),
        "a program": (archive(with_weights(b"N"), program), "TorchScript program"),
        "a stray record": (archive(with_weights(b"N"), {"archive/data/0": bytes(24), "archive/x": b"x"}), "a record 'archive/x'"),
        "a record outside": (archive(with_weights(b"N"), {"../data/0": bytes(24)}), "two folders"),
        "an absolute record": (archive(with_weights(b"N"), {"/data/0": bytes(24)}), "a record '/data/0'"),
        "two folders": (archive(with_weights(b"N"), {"other/data/0": bytes(24)}), "two folders"),
        "a bomb": (bomb, "compressed or encrypted"),
        "a bomb in the pickle": (archive(with_weights(text("x" * (64 << 20))), compression=zipfile.ZIP_DEFLATED), "compressed"),
        "an encrypted record": (plain[: entry + 8] + b"\x01" + plain[entry + 9 :], "compressed or encrypted"),
        "a size that differs": (plain[: entry + 20] + b"\x01" + plain[entry + 21 :], "compressed or encrypted"),
        "records upon each other": (first_again, "does not begin where"),
        "a record beyond the end": (bytes(beyond), "reaches beyond its end"),
        "a name that differs": (changed(plain, b"archive/data/0", b"archive/data/7"), "does not begin where"),
        "no data": (archive(with_weights(b"N"), {"archive/version": b"3\n"}), "record '0', are missing"),
        "a large pickle": (archive(with_weights(text("x" * (5 << 20)))), "more than 4,194,304 bytes"),
        "100,000 records": (archive(with_weights(b"N"), many), "more than 4,194,304"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def archives():
    return bad_archives()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_lie_are_refused(tmp_path, archives):
    for name, (content, message) in archives.items():
        started = time.monotonic()
        found = refused(written(tmp_path, content))
        assert message in found, name
        assert time.monotonic() - started < 2, name


def test_big_endian_legacy_files_are_refused(tmp_path):
    assert "big-endian" in refused(written(tmp_path, legacy(third=pickle.dumps({"little_endian": False}, 2))))
    assert "big-endian" in refused(written(tmp_path, legacy(third=pickle.dumps([], 2))))


def test_legacy_storages_that_lie_are_refused(tmp_path):
    whole = saved(HONEST, **FORMATS["legacy"])
    honest = written(tmp_path, whole)
    assert tensors(written(tmp_path, legacy(), "hand.ckpt"))["w"].shape == (6,)
    assert same(tensors(honest), HONEST)
    lie = changed(whole, (4).to_bytes(8, "little"), (5).to_bytes(8, "little"), -1)
    assert "not as long as its pickle says" in refused(written(tmp_path, lie))
    assert "ends at byte" in refused(written(tmp_path, whole[:-1]))


@pytest.mark.parametrize("options", [{}, FORMATS["legacy"]], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_refused(tmp_path, options):
    whole = saved({"state_dict": HONEST | {"large": torch.zeros(5000)}}, **options)
    for i in range(256):
        refused(written(tmp_path, whole[: len(whole) * i // 256]))


@pytest.mark.parametrize("options", [{}, FORMATS["legacy"]], ids=["zip", "legacy"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, options):
    path = written(tmp_path, saved({"w": torch.zeros(100_000)}, **options))
    checkpoint = open_checkpoint(path)
    os.truncate(path, 200_000)
    with pytest.raises(minisd.CheckpointError, match="changed while it was being opened"):
        load_tensors(checkpoint, checkpoint.entries, torch.float32)


MEASURE = """
import sys, time
from pathlib import Path
from peak import memory, reset
from minisd.files.checkpoint import open_checkpoint
from minisd.errors import CheckpointError
for path in sorted(Path(sys.argv[1]).iterdir()):
    reset()
    before, started = memory(), time.monotonic()
    try:
        open_checkpoint(path)
        verdict = "opened"
    except CheckpointError:
        verdict = "refused"
    print(verdict, memory() - before >> 20, round(time.monotonic() - started, 1), path.name)
"""


def test_bombs_are_refused_in_little_memory_and_time(tmp_path, archives):
    """In a process of its own: each less than 64 MB above what it had."""
    contents = {name: archive(payload) for name, payload in pickles.bombs().items()}
    contents |= {name: archives[name][0] for name in ("a bomb", "a bomb in the pickle", "100,000 records", "a large pickle")}
    harmless = {"a memo at 2 billion", "2^60 references as a key", "deep tuples as a key"}  # weights stand beside them
    for name, content in contents.items():
        written(tmp_path, content, name)
    command, folder = [sys.executable, "-c", MEASURE, str(tmp_path)], Path(__file__).parents[1] / "support"
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(folder)})
    print(done.stdout)
    rows = [line.split(" ", 3) for line in done.stdout.splitlines()]
    assert len(rows) == len(contents) >= 20
    for verdict, megabytes, seconds, name in rows:
        assert int(megabytes) < 64, name
        assert float(seconds) < 20, name
        assert verdict == ("opened" if name in harmless else "refused"), name


# ---- mutations ----

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # pickletools reads texts with escapes, then we refuse


def opened(path: Path) -> bool:
    """Opens a file and loads its floats; anything but success or a CheckpointError leaves here as what it is."""
    try:
        checkpoint = open_checkpoint(path)
        load_tensors(checkpoint, [key for key, entry in checkpoint.entries.items() if entry.dtype in FLOATS], torch.float32)
    except minisd.CheckpointError:
        return False
    return True


@pytest.fixture
def storm():
    """Opens many contents, one after the other, in a file that lies in memory (200,000 on a disk take minutes)."""
    descriptor = os.memfd_create("storm")

    def run(contents: collections.abc.Iterable[bytes]) -> tuple[int, int]:
        """(how many opened, how many were refused); none may take long, nor all together much memory."""
        reset()
        before, slowest, counts = memory(), 0.0, [0, 0]
        for content in contents:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content, 0)
            started = time.monotonic()
            counts[opened(Path(f"/proc/self/fd/{descriptor}"))] += 1
            slowest = max(slowest, time.monotonic() - started)
        grown = memory() - before >> 20
        print(f"{counts[1]:,} opened, {counts[0]:,} refused; slowest {slowest * 1000:.0f} ms, {grown} MB more")
        assert grown < 64
        assert slowest < 5
        return counts[1], counts[0]

    yield run
    os.close(descriptor)


SEEDS = {
    "zip": saved({"state_dict": HONEST, "epoch": 1}),
    "zip by hand": archive(with_weights(b"N")),
    "legacy": legacy(),  # torch.save would put other numbers into it every time
    "protocol 4": saved(HONEST, pickle_protocol=4),
}


@pytest.mark.parametrize("name", SEEDS)
def test_mutated_ckpt_files(storm, name):
    """5,000 of each kind, 20,000 together."""
    good, bad = storm(pickles.mutants(SEEDS[name], 5_000, seed=1))
    assert good > 100
    assert bad > 1000


def test_mutated_pickles(storm):
    """The pickle alone, in an archive that is whole: these get past the first checks."""
    honest = data_pkl(SEEDS["zip"])
    good, bad = storm(pickles.with_pickle(SEEDS["zip"], mutant) for mutant in pickles.mutants(honest, 2_000, seed=2))
    assert good > 20
    assert bad > 1000


def test_10_000_mutated_safetensors(storm):
    good, bad = storm(pickles.mutants(save(HONEST, {"format": "pt"}), 10_000, seed=3))
    assert good > 250
    assert bad > 5000


def test_a_whole_model_builds(tmp_path, reduced_file):
    """A .ckpt of a whole model passes `build` as its .safetensors does."""
    path = written(tmp_path, saved({"state_dict": load_file(reduced_file)}))
    assert build(open_checkpoint(path), SD1).state_dict().keys() == build(open_checkpoint(reduced_file), SD1).state_dict().keys()


def test_storage_keys_that_are_no_texts_are_refused_before_they_are_hashed(tmp_path):
    """Hashing a tuple in a tuple, 500,000 times, recurses in C: it would end the process."""
    nested = b"\x80\x02)" + b"\x85" * 500_000
    assert "expected texts as the keys of its storages" in refused_header(tmp_path, legacy(fifth=nested + b"\x85."))
    for key in (b"\x80\x02]K\x07a.", b"\x80\x02](K\x01N)e."):
        assert "expected texts" in refused_header(tmp_path, legacy(fifth=key))
    for place in (b"\x80\x02}" + nested[2:] + b"Ns.", b"\x80\x02" + nested[2:] + b"X\x01\0\0\0a\x93."):
        refused_header(tmp_path, legacy(fourth=place))


def refused_header(folder: Path, content: bytes) -> str:
    with pytest.raises(minisd.CheckpointError) as caught:
        open_checkpoint(written(folder, content))
    return str(caught.value)
