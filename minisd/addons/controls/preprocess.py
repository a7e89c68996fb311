"""From a photograph to the hint that a ControlNet was trained on, where a few lines make it; the rest is other tools' work."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ...errors import UsageError

LOW, HIGH = 100, 200  # thresholds of the gradient (lllyasviel/ControlNet gradio_canny2image.py)
BLUR = 8  # pixels, standard deviation

# What people ask for that takes a network of its own, and who has it.
ELSEWHERE = {
    "depth": "a depth map: MiDaS or Depth Anything, in the package controlnet-aux",
    "openpose": "a skeleton: OpenPose or DWPose, in the package controlnet-aux",
    "softedge": "soft edges: HED or PiDiNet, in the package controlnet-aux",
    "scribble": "a scribble: draw it, white on black (invert turns black on white), or HED in the package controlnet-aux",
    "lineart": "a line drawing: the package controlnet-aux; invert turns black lines on white into what is wanted",
    "mlsd": "straight lines: M-LSD, in the package controlnet-aux",
    "normal": "a normal map: BAE, in the package controlnet-aux",
    "seg": "a segmentation in ADE20K's colours: OneFormer or SAM, in the package controlnet-aux",
    "shuffle": "shuffled content: the package controlnet-aux",
    "inpaint": "the picture with the masked pixels at -1, which no picture file holds",
}


def canny(image: Image.Image) -> Image.Image:
    """Edges, white on black (Canny 1986).  Raises UsageError without OpenCV."""
    try:
        import cv2
    except ImportError:
        raise UsageError("control_preprocess: canny takes OpenCV: pip install 'minisd[control]'") from None
    edges = cv2.Canny(np.array(image), LOW, HIGH)  # (H, W)
    return Image.fromarray(edges).convert("RGB")


PREPROCESS = {
    "none": lambda image: image,
    "tile": lambda image: image,  # such a ControlNet is trained on the picture itself
    "canny": canny,
    "invert": ImageOps.invert,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(BLUR)),
}


def preprocessed(image: Image.Image, name: str) -> Image.Image:
    """An RGB picture as a hint of a kind.  Raises UsageError for a kind that is made elsewhere, or nowhere."""
    if name in PREPROCESS:
        return PREPROCESS[name](image)
    if name in ELSEWHERE:
        raise UsageError(f"control_preprocess: {name} is not made here; {ELSEWHERE[name]}; give the result, with none")
    raise UsageError(f"control_preprocess: expected one of {', '.join(PREPROCESS)}, found {name[:80]!r}")


def check(name: object) -> None:
    """Raises UsageError unless there is such a kind, before anything is read."""
    if not isinstance(name, str) or name not in PREPROCESS or name in ("canny",):
        preprocessed(Image.new("RGB", (8, 8)), str(name))
