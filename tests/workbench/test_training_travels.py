"""What a file says about its training goes where its weights go, and what contradicts it is told."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import SMALL, Small
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.cli import main
from minisd.errors import OutputError
from minisd.files.checkpoint import open_checkpoint
from minisd.files.recognition import recognise
from minisd.models.family import SD2, UNET, Training
from minisd.workbench import converting
from minisd.workbench.blueprint import random_weights
from minisd.workbench.converting import convert, save
from minisd.workbench.folders.folder import REST, from_folder, to_folder
from minisd.workbench.merging import merge, repeat

MEASURED = f"{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V, ZERO = {"v_pred": torch.zeros(0)}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
SAID = {"modelspec.prediction_type": "v"}
COSXL = {"edm_vpred.sigma_min": torch.tensor(0.002), "edm_vpred.sigma_max": torch.tensor(120.0)}
PLAYGROUND = {"edm_mean": torch.tensor([-1.66, 1.88, -1.38, 2.5]), "edm_std": torch.tensor([8.5, 5.9, 6.5, 5.2])}

# (family, markers, metadata, what the training is)
KINDS = {
    "epsilon": ("sd1", {}, {}, Training()),
    "v by its marker": ("sdxl", V, {}, Training("v")),
    "v, zero": ("sdxl", ZERO, {}, Training("v", True)),
    "v by its metadata": ("sd1", {}, SAID, Training("v")),
    "v by ComfyUI's metadata, zero": ("sdxl", {"ztsnr": torch.zeros(0)}, {"modelspec.predict_key": "v"}, Training("v", True)),
    "CosXL": ("sdxl", COSXL, {}, None),
    "Playground": ("sdxl", PLAYGROUND, {}, None),
}


def written(path, family, markers=(), metadata=None, seed=2):
    save_file(random_weights(SMALL[family].shapes(), seed, torch.float16) | dict(markers), path, metadata)
    return path


def trained(path):
    return recognise(open_checkpoint(path)).training


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def there_and_back(source, target):
    return from_folder(to_folder(source, target.with_suffix("")), target)


def without_the_rest(source, target):
    folder = to_folder(source, target.with_suffix(""))
    (folder / REST).unlink()
    return from_folder(folder, target)


COMMANDS = {
    "convert": convert,
    "prune": lambda source, target: convert(source, target, torch.float16, prune=True),
    "save": lambda source, target: save(source, target.stem, folder=target.parent),
    "merge": lambda source, target: merge([source, source], target, 0.5),
    "load and save": lambda source, target: minisd.load(source, device="cpu", dtype="float32").save(target),
    "folder and back": there_and_back,
    "folder without its rest": without_the_rest,
}


USUALLY = {("v, zero", command) for command in COMMANDS} | {(kind, "convert") for kind in KINDS}  # the others with `-m slow`


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        pytest.param(kind, command, marks=[] if (kind, command) in USUALLY else [pytest.mark.slow])
        for command in COMMANDS
        for kind in KINDS
    ],
)
def test_training_travels(kind, command, tmp_path):
    """In both forms: markers, which ComfyUI reads, and metadata, which others read."""
    family, markers, metadata, expected = KINDS[kind]
    source = written(tmp_path / "a.safetensors", family, markers, metadata)
    found = recognise(open_checkpoint(source))
    assert found.training == (expected or found.training)
    target = COMMANDS[command](source, tmp_path / "b.safetensors")
    again = recognise(open_checkpoint(target))
    assert (again.training, again.size) == (found.training, found.size)
    names, said = load_file(target).keys(), metadata_of(target)
    plain = not found.training.sigmas
    assert ("v_pred" in names) == (plain and found.training.prediction == "v")
    assert ("ztsnr" in names) == found.training.zero_terminal
    assert said.get("modelspec.prediction_type") == (found.training.prediction if found.training.prediction != "edm" else None)


def test_what_was_measured_is_written_down(tmp_path):
    """Mixing may bring the measured number below the threshold; what the models were trained for stays."""
    weights = random_weights(Small(SD2, (1, 1, 1, 1), (1, 1, 1, 0)).shapes(), 2)
    weights[MEASURED] = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.2
    save_file(weights, tmp_path / "a.safetensors")
    save_file(weights | {MEASURED: -weights[MEASURED]}, tmp_path / "b.safetensors")
    assert trained(tmp_path / "a.safetensors") == Training("v")
    path = merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "m.safetensors", 0.5)
    assert load_file(path)[MEASURED].std() < 0.01
    assert recognise(open_checkpoint(path)).size == (768, 768)
    assert trained(path) == Training("v")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    written(folder / "eps.safetensors", "sdxl", seed=1)
    written(folder / "eps2.safetensors", "sdxl", seed=2)
    written(folder / "v.safetensors", "sdxl", ZERO, seed=3)
    return folder


# (models, base, ratios and options, what the training is; None: refused)
MIXTURES = [
    (("eps", "v"), None, {"ratios": 0}, Training()),
    (("eps", "v"), None, {"ratios": 1}, Training("v", True)),
    (("v", "eps"), None, {"ratios": 1}, Training()),
    (("eps", "v"), None, {"ratios": 0.5}, None),
    (("eps", "eps2"), None, {"ratios": 0.5}, Training()),
    (("eps", "eps2", "v"), None, {"ratios": (0.5, 0)}, Training()),
    (("eps", "eps2", "v"), None, {"ratios": (0.5, 0.1)}, None),
    (("eps", "v"), "eps2", {"ratios": 1}, Training("v", True)),  # epsilon's change on top of what v learned since
    (("v", "eps"), "eps2", {"ratios": 0.7}, Training("v", True)),  # a change that epsilon learned, on top of v
    (("eps", "v"), "eps2", {"ratios": 0.7}, None),
    (("eps", "v"), None, {"ratios": 0, "by_part": {"unet": 1}}, Training("v", True)),
    (("eps", "v"), None, {"ratios": 0, "by_part": {"text": 0.5}}, Training()),
    (("eps", "v"), None, {"ratios": 0, "blocks": "input.0=0.5"}, None),
    (("eps", "v"), None, {"ratios": 0.5, "method": "slerp"}, None),
    (("eps", "v"), "eps2", {"method": "ties"}, Training("v", True)),
    (("eps", "v"), None, {"ratios": 0.5, "prediction": "v"}, Training("v", True)),
    (("eps", "v"), None, {"ratios": 0.5, "prediction": "v", "zero_snr": False}, Training("v")),
    (("eps", "v"), None, {"ratios": 0.5, "prediction": "epsilon"}, Training()),
    (("eps", "eps2"), None, {"ratios": 0.5, "prediction": "v", "zero_snr": True}, Training("v", True)),
]


@pytest.mark.parametrize(("models", "base", "options", "expected"), MIXTURES)
def test_a_mixture_is_trained_as_what_is_left_of_it(three, models, base, options, expected, tmp_path):
    sources = [three / f"{name}.safetensors" for name in models]
    target = tmp_path / "m.safetensors"
    options = options | {"base": three / f"{base}.safetensors" if base else None}
    if expected is None:
        with pytest.raises(minisd.UsageError, match=r"v\.safetensors predicts v with zero terminal SNR.*: .*prediction") as error:
            merge(sources, target, **options)
        assert "eps.safetensors predicts epsilon" in str(error.value)
        assert not target.exists()
        return
    assert trained(merge(sources, target, **options)) == expected
    assert trained(repeat(target, tmp_path / "n.safetensors", [three])) == expected


def test_the_command_line_says_what_to_do(three, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(three)
    arguments = ["merge", "eps.safetensors", "v.safetensors", "--ratio", "0.5", "-o", str(tmp_path / "m.safetensors")]
    assert main(arguments) == 2
    assert "what lies between them draws noise; merge models that were trained alike" in capsys.readouterr().err
    assert main([*arguments, "--prediction", "v", "--no-zero-snr"]) == 0
    assert trained(tmp_path / "m.safetensors") == Training("v")
    assert (
        main(["merge", "--from", str(tmp_path / "m.safetensors"), "--prediction", "v", "-o", str(tmp_path / "n.safetensors")])
        == 2
    )
    assert "found both" in capsys.readouterr().err


def test_what_a_file_does_not_say_is_said_by_hand_and_travels(tmp_path, capsys):
    plain = written(tmp_path / "plain.safetensors", "sd2")
    assert main(["convert", str(plain), "--prediction", "v", "--zero-snr", "-o", str(tmp_path / "v.safetensors")]) == 0
    found = recognise(open_checkpoint(tmp_path / "v.safetensors"))
    assert (found.training, found.size) == (Training("v", True), (768, 768))
    pipe = minisd.load(plain, device="cpu", dtype="float32", prediction="v", zero_snr=True)
    assert (pipe.training, pipe.recognition.size) == (Training("v", True), (768, 768))
    assert trained(pipe.save(tmp_path / "saved.safetensors")) == Training("v", True)
    picture = tmp_path / "out.png"
    options = ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--size", "16x16", "--prediction", "v", "--zero-snr"]
    assert main(["a castle", "-m", str(plain), *options, "-o", str(picture)]) == 0
    assert main(["again", str(picture), "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == picture.read_bytes()
    capsys.readouterr()
    assert main(["a castle", "-m", str(plain), "--zero-snr", "-o", str(picture)]) == 2
    expected = "--zero-snr: expected with a model that predicts v, found one that predicts epsilon"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("markers", "metadata", "training", "message"),
    [
        ({"ztsnr": torch.zeros(0)}, None, Training(), "has the marker ztsnr, but nothing says that it predicts v"),
        ({"ztsnr": torch.zeros(0)}, {"modelspec.prediction_type": "epsilon"}, Training(), "its metadata say prediction epsilon"),
        (V, {"modelspec.prediction_type": "epsilon"}, Training("v"), "and the marker v_pred, which says v: taking v"),
    ],
)
def test_a_file_that_contradicts_itself_is_told(markers, metadata, training, message, tmp_path):
    path = written(tmp_path / "x.safetensors", "sdxl", markers, metadata)
    with pytest.warns(UserWarning, match=message):
        found = recognise(open_checkpoint(path))
    assert found.training == training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target = convert(path, tmp_path / "y.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained(target) == training  # and there is no contradiction any more


def test_a_folder_that_contradicts_its_rest_is_told(tmp_path):
    folder = to_folder(written(tmp_path / "v.safetensors", "sdxl", V), tmp_path / "folder")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "epsilon"))
    with pytest.raises(
        minisd.CheckpointError, match=r"its scheduler says that it predicts epsilon, its minisd\.safetensors that"
    ):
        from_folder(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_moving_average_is_not_passed_off_as_that_of_the_mixture(tmp_path):
    weights = random_weights(SMALL["sd1"].shapes(), 2)
    average = {
        f"model_ema.{key.removeprefix('model.').replace('.', '')}": value + 1 for key, value in weights.items() if UNET in key
    }
    save_file(weights | average, tmp_path / "a.safetensors")
    written(tmp_path / "b.safetensors", "sd1", seed=3)
    path = merge([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], tmp_path / "m.safetensors", 0.5)
    assert load_file(path).keys() == weights.keys()


def test_the_hash_goes_into_its_own_field_only(tmp_path):
    """Whatever else looks like the place that is kept free for it."""
    zeros = "0x" + "0" * 64
    path = written(tmp_path / "a.safetensors", "sd1", metadata={"aaa": zeros, "modelspec.title": zeros, "zzz": zeros})
    found = metadata_of(convert(path, tmp_path / "b.safetensors"))
    assert [found[key] for key in ("aaa", "modelspec.title", "zzz")] == [zeros] * 3
    assert found["modelspec.hash_sha256"] not in (zeros, "")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda planned, read, *_: (planned, read), "taken for something else, and was not kept: expected .*predicts v"),
        (
            lambda planned, read, *_: ({key: facts for key, facts in planned.items() if "out.2" not in key}, read),
            "no checkpoint that minisd opens",
        ),
    ],
)
def test_what_is_written_is_opened_before_it_takes_its_place(broken, message, tmp_path, monkeypatch):
    """A fault of ours on the way is noticed, and what stood there stays."""
    source, target = (
        written(tmp_path / "a.safetensors", "sd1", metadata={"modelspec.predict_key": "v"}),
        tmp_path / "b.safetensors",
    )
    target.write_bytes(b"old")
    monkeypatch.setattr(converting, "with_markers", broken)
    if "something else" in message:
        monkeypatch.setattr(converting, "described", lambda *_: {})
    with pytest.raises(OutputError, match=message):
        convert(source, target)
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
