"""Loading onto a GPU: the same way through, with ordinary memory in place of a GPU's where there is none."""

from __future__ import annotations

import pytest
import torch
from pickles import archive, tensor, text
from safetensors.torch import save_file

import minisd
from minisd.errors import CheckpointError
from minisd.files import upload
from minisd.files.checkpoint import open_checkpoint
from minisd.files.tensors import load_tensors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"long": (300, 17), "odd": (7,), "one": (), "none": (0, 4), "another": (64, 3, 3, 3)}
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_arrives_as_the_cpu_reads_it(tmp_path, monkeypatch, device, stored, dtype):
    monkeypatch.setattr(upload, "PIECE", 256)  # so that tensors take many pieces and all readers have some
    path = tmp_path / "x.safetensors"
    save_file(weights(stored), path)
    checkpoint = open_checkpoint(path)
    wanted = load_tensors(checkpoint, checkpoint.entries, dtype)
    found = upload.upload_tensors(checkpoint, checkpoint.entries, dtype, torch.device(device))
    assert found.keys() == wanted.keys()
    for key, weight in found.items():
        assert (weight.device.type, weight.dtype, weight.shape) == (device, dtype, wanted[key].shape)
        assert torch.equal(weight.cpu(), wanted[key]), key


@pytest.mark.parametrize("device", DEVICES)
def test_a_transposed_tensor_of_a_ckpt_arrives_in_the_order_of_its_axes(tmp_path, device):
    path = tmp_path / "x.ckpt"
    path.write_bytes(archive(b"\x80\x02}" + text("w") + tensor((3, 2), (1, 3)) + b"s."))
    checkpoint = open_checkpoint(path)
    found = upload.upload_tensors(checkpoint, ["w"], torch.float32, torch.device(device))["w"]
    assert found.is_contiguous()
    assert torch.equal(found.cpu(), load_tensors(checkpoint, ["w"], torch.float32)["w"])


@pytest.mark.parametrize("device", DEVICES)
def test_a_file_that_ends_while_it_is_read_is_an_error(tmp_path, monkeypatch, device):
    path = tmp_path / "x.safetensors"
    save_file(weights(torch.float32), path)
    checkpoint = open_checkpoint(path)

    def at_its_end(*_: object) -> int:
        return 0

    monkeypatch.setattr("os.preadv", at_its_end)
    with pytest.raises(CheckpointError, match="could not be read to its end"):
        upload.upload_tensors(checkpoint, checkpoint.entries, torch.float16, torch.device(device))


def test_integers_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"n": torch.arange(3)}, path)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match="found I64"):
        upload.upload_tensors(checkpoint, ["n"], torch.float16, torch.device("cpu"))


@pytest.mark.gpu
def test_a_checkpoint_loads_onto_a_gpu_as_onto_a_cpu():
    from minisd.pipeline import tiny_checkpoint

    here = minisd.load(tiny_checkpoint(), "cpu", "float32")
    there = minisd.load(tiny_checkpoint(), "cuda", "float16")
    for key, value in there.model.state_dict().items():
        assert torch.equal(value.cpu().float(), here.model.state_dict()[key]), key
