"""How a network was trained: how a file says it, how that is read, and how it is written.

Files say it by small tensors (markers, ComfyUI), by metadata (ModelSpec), or not at all.  Whoever writes a file writes both.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from dataclasses import replace

from ..errors import CheckpointError, UsageError
from ..models.family import SD2, UNET, Family, Training
from ..options import FLAG, one_of
from .checkpoint import Checkpoint, read_floats

STATED = ("modelspec.prediction_type", "modelspec.predict_key")  # ModelSpec's, and what ComfyUI writes
NOTHING_SAID = "prediction epsilon: no marker and no metadata say otherwise"
V_NAMES = ("v", "v_prediction", "v-prediction")


def said(checkpoint: Checkpoint, prediction: str | None, zero_snr: bool | None) -> Checkpoint:
    """The same file, with what the user says of its training.  Raises UsageError if that is nothing that can be said."""
    if prediction is not None:
        one_of("epsilon", "v").check("prediction", prediction)
    if zero_snr is not None:
        FLAG.check("zero_snr", zero_snr)
    return replace(checkpoint, prediction=prediction, zero_snr=zero_snr)


def trained(checkpoint: Checkpoint, family: Family, task: str) -> tuple[Training, str]:
    """How the network was trained, and how that is known: what the user says of it, what the file says, or a measured rule.

    Raises CheckpointError (broken markers), UsageError (what the user says makes no sense).
    """
    return overridden(*stated(checkpoint, family, task), checkpoint.prediction, checkpoint.zero_snr)


def overridden(training: Training, why: str, prediction: str | None, zero_snr: bool | None) -> tuple[Training, str]:
    """The same after what the user says of it.  Raises UsageError if that makes no sense."""
    if prediction is not None and prediction != training.prediction:
        training, why = Training(prediction), f"prediction {prediction}: as it was asked for"
    if zero_snr is None or zero_snr is training.zero_terminal:
        return training, why
    if training.prediction != "v" or training.sigmas:
        raise UsageError(f"zero_snr: expected with a model that predicts v, found one that {title_of(training)}")
    return Training("v", zero_snr), f"{why}; {'' if zero_snr else 'no '}zero terminal SNR: as it was asked for"


def stated(checkpoint: Checkpoint, family: Family, task: str) -> tuple[Training, str]:
    """What the file says, or else what was measured."""
    if training := said_training(checkpoint):
        return training, reason(training, checkpoint)
    training, why = measured(checkpoint) if family is SD2 and task == "draw" else (Training(), NOTHING_SAID)
    if "ztsnr" in checkpoint.entries:
        if training.prediction == "v":
            return Training("v", True), f"{why}; zero terminal SNR: the marker ztsnr"
        tell(checkpoint, "has the marker ztsnr, but nothing says that it predicts v: taking epsilon, without zero terminal SNR")
    return training, why


def said_training(checkpoint: Checkpoint) -> Training | None:
    """What a file's markers and metadata say, if they say anything; where they differ, the markers count, and it is told."""
    names, name = checkpoint.entries, said_prediction(checkpoint.metadata)
    if "edm_mean" in names and "edm_std" in names:  # Playground 2.5 (Li et al. 2024, arXiv 2402.17245)
        mean, std = (tuple(read_floats(checkpoint, key, 4)) for key in ("edm_mean", "edm_std"))
        return Training("edm", sigmas=(0.002, 80.0), sigma_data=0.5, latent_mean=mean, latent_std=std)
    if "edm_vpred.sigma_max" in names:
        return continuous(checkpoint)
    zero = "ztsnr" in names
    if "v_pred" in names:
        if name == "epsilon":
            tell(checkpoint, "has metadata that say prediction epsilon, and the marker v_pred, which says v: taking v")
        return Training("v", zero)
    if name == "epsilon" and zero:  # which has no meaning where there is nothing but noise
        tell(checkpoint, "has the marker ztsnr, but its metadata say prediction epsilon: taking it, without zero terminal SNR")
    return Training(name, zero and name == "v") if name else None


def reason(training: Training, checkpoint: Checkpoint) -> str:
    """Which of a file's markers, or that its metadata, say it."""
    found = [key for key in markers(training) if key in checkpoint.entries]
    names = f"the marker{'s' * (len(found) > 1)} {' and '.join(found)}" if {*found} - {"ztsnr"} else "the metadata"
    return f"prediction {title_of(training).removeprefix('predicts ')}: {names}"


def tell(checkpoint: Checkpoint, what: str) -> None:
    warnings.warn(f"{checkpoint.path}: {what}; if that is wrong, say prediction (and zero_snr)", stacklevel=5)


def said_prediction(metadata: Mapping[str, str]) -> str | None:
    """ "epsilon" or "v", if the metadata name one of them."""
    found = next((metadata[key] for key in STATED if metadata.get(key)), None)
    return "v" if found in V_NAMES else "epsilon" if found == "epsilon" else None


def continuous(checkpoint: Checkpoint) -> Training:
    """CosXL's; without the marker of the least level the published one."""
    low = read_floats(checkpoint, "edm_vpred.sigma_min", 1)[0] if "edm_vpred.sigma_min" in checkpoint.entries else 0.002
    high = read_floats(checkpoint, "edm_vpred.sigma_max", 1)[0]
    if not 0 < low < high:
        raise CheckpointError(checkpoint.path, f"expected rising noise levels, found {low} to {high}", key="edm_vpred.sigma_max")
    return Training("v", sigmas=(low, high))


def measured(checkpoint: Checkpoint) -> tuple[Training, str]:
    """SD 2.x predicts epsilon or v with equal keys, but the v models were trained until this bias had spread further
    (ComfyUI supported_models.py, SD20.model_type)."""
    key = f"{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if key not in checkpoint.entries:
        return Training(), f"prediction epsilon: there is no {key} to measure"
    numbers = read_floats(checkpoint, key)
    if max(map(abs, numbers)) > 3.4e38:  # the largest float32; sums of larger ones overflow
        raise CheckpointError(checkpoint.path, "holds numbers too large for weights", "the file is broken; get another copy", key)
    spread = statistics.pstdev(numbers)
    prediction = "v" if spread > 0.09 else "epsilon"
    sign = ">" if spread > 0.09 else "<="
    return Training(prediction), f"prediction {prediction}: {key} has a standard deviation of {spread:.3f} {sign} 0.09"


def markers(training: Training) -> dict[str, tuple[float, ...]]:
    """The tensors by which a file says it, and their numbers: none where the name alone is what counts."""
    if training.latent_mean:
        return {"edm_mean": training.latent_mean, "edm_std": training.latent_std}
    if training.sigmas:
        return {"edm_vpred.sigma_min": training.sigmas[:1], "edm_vpred.sigma_max": training.sigmas[1:]}
    return {key: () for key, said in (("v_pred", training.prediction == "v"), ("ztsnr", training.zero_terminal)) if said}


def metadata_of(training: Training) -> dict[str, str]:
    """What ModelSpec has to say it with: nothing of Playground's."""
    return {key: training.prediction for key in STATED[:1] if training.prediction in ("epsilon", "v")}


def title_of(training: Training) -> str:
    """In words, for messages."""
    levels = " over continuous noise levels" if training.sigmas else " with zero terminal SNR" if training.zero_terminal else ""
    return f"predicts {training.prediction}{levels}"
