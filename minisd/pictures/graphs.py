"""ComfyUI's graph: {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], …}}, …}, an input being a value or a
link to the output of another node.  It is read from the sampler upwards; what is not one of the usual nodes is named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import UsageError
from .found import Found
from .infotext import sampler_words, spacing_words

MAX_NODES = 2000
MAX_STEPS = 100  # links followed from one node
Said = list[tuple[str, tuple[str, ...]]]
Graph = Mapping[str, Mapping[str, Any]]
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom")
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
TEXTS = ("text", "string", "value", "text_g", "prompt")  # where a node keeps its text
UNDERSTOOD = {
    *SAMPLERS, "CheckpointLoaderSimple", "CheckpointLoader", "CLIPTextEncode", "CLIPTextEncodeSDXL", "EmptyLatentImage",
    "VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "VAELoader", "CLIPSetLastLayer", "VAEEncode", "LoadImage",
    "KSamplerSelect", "BasicScheduler", "KarrasScheduler", "ExponentialScheduler", "PrimitiveNode", "PrimitiveString", "Note",
    "Reroute", *LORAS,
}  # fmt: skip


def of_graph(graph: object) -> Found | None:
    """None where it has no sampler."""
    nodes = nodes_of(graph)
    name = next((name for kind in SAMPLERS for name, node in nodes.items() if node["class_type"] == kind), None)
    if name is None:
        return None
    sampler = nodes[name]["inputs"]
    upward = {name, *above(nodes, name)}
    said, lacking = of_sampler(nodes, sampler)
    for kind in sorted({nodes[each]["class_type"] for each in upward} - UNDERSTOOD):
        lacking.append(f"node {kind}")
    latents, more = of_latents(nodes, upward)
    said, lacking = said + latents, lacking + more
    model = value_of(nodes, upward, ("CheckpointLoaderSimple", "CheckpointLoader"), "ckpt_name")
    if vae := value_of(nodes, upward, ("VAELoader",), "vae_name"):
        said.append((f"VAELoader: {vae}", ("--vae", short(vae))))
    layer = value_of(nodes, upward, ("CLIPSetLastLayer",), "stop_at_clip_layer")
    if isinstance(layer, int):
        said.append((f"CLIPSetLastLayer: {layer}", ("--clip-skip", str(-layer))))
    loras, more = of_loras(nodes, upward)
    said, lacking = said + loras, lacking + more
    texts = [text_of(nodes, sampler.get(role)) for role in ("positive", "negative")]
    return Found("ComfyUI", texts[0], texts[1], tuple(said), tuple(lacking), "comfyui", short(model) if model else None)


def nodes_of(graph: object) -> dict[str, dict[str, Any]]:
    """The nodes that look like nodes; a stranger wrote them."""
    if not isinstance(graph, dict) or len(graph) > MAX_NODES:
        return {}
    whole = {name: node for name, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
    return {name: node for name, node in whole.items() if isinstance(node.get("class_type"), str)}


def link(nodes: Graph, value: object) -> str | None:
    """The node that an input is linked to."""
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int)
    name = str(value[0]) if linked else None  # type: ignore[index]
    return name if name in nodes else None


def above(nodes: Graph, name: str) -> Iterator[str]:
    """All nodes that feed one."""
    waiting, seen = [name], {name}
    while waiting:
        for value in nodes[waiting.pop()]["inputs"].values():
            other = link(nodes, value)
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
                yield other


def value_of(nodes: Graph, names: set[str], kinds: tuple[str, ...], key: str) -> Any:
    """A value of the first node of a kind."""
    return next((nodes[name]["inputs"].get(key) for name in sorted(names) if nodes[name]["class_type"] in kinds), None)


def plain(nodes: Graph, value: object) -> Any:
    """A value, or that of the node it is linked to."""
    name = link(nodes, value)
    if name is None:
        return None if isinstance(value, list | dict) else value
    inputs = nodes[name]["inputs"]
    return next((inputs[key] for key in ("value", "seed", "noise_seed", "int", "float", *TEXTS) if key in inputs), None)


def of_sampler(nodes: Graph, inputs: Mapping[str, Any]) -> tuple[Said, list[str]]:
    """Seed, steps, guidance, sampler, scheduler and strength."""
    said: Said = []
    lacking: list[str] = []
    given = dict(inputs)
    for key in ("sampler", "sigmas"):  # of SamplerCustom, which has them from nodes
        name = link(nodes, inputs.get(key))
        given |= nodes[name]["inputs"] if name else {}
        if name and nodes[name]["class_type"] in ("KarrasScheduler", "ExponentialScheduler"):
            given["scheduler"] = nodes[name]["class_type"].removesuffix("Scheduler").lower()
    flags = {"seed": "--seed", "noise_seed": "--seed", "steps": "--steps", "cfg": "--cfg"}
    for key, flag in flags.items():
        value = plain(nodes, given.get(key))
        if isinstance(value, int | float) and not isinstance(value, bool):
            said.append((f"{key}: {value}", (flag, str(value))))
    for key, words in (("sampler_name", sampler_words), ("scheduler", spacing_words)):
        value = plain(nodes, given.get(key))
        try:
            if isinstance(value, str):
                said.append((f"{key}: {value}", tuple(words(value))))
        except UsageError:
            lacking.append(f"{key}: {value}")
    denoise = plain(nodes, given.get("denoise"))
    if isinstance(denoise, int | float) and 0 < denoise < 1:
        said.append((f"denoise: {denoise}", ("--strength", str(denoise))))
    if given.get("start_at_step") or given.get("end_at_step", 10_000) < 1000:
        lacking.append("start_at_step, end_at_step")
    return said, lacking


def of_loras(nodes: Graph, names: set[str]) -> tuple[Said, list[str]]:
    """LoRAs between the checkpoint and the sampler; some nodes leave the text encoders alone."""
    said: Said = []
    lacking: list[str] = []
    for name in sorted(names):
        kind, inputs = nodes[name]["class_type"], nodes[name]["inputs"]
        unet = plain(nodes, inputs.get("strength_model"))
        text = 0.0 if kind == "LoraLoaderModelOnly" else plain(nodes, inputs.get("strength_clip"))
        numbers = all(isinstance(each, int | float) for each in (unet, text))
        if kind in LORAS and not (isinstance(inputs.get("lora_name"), str) and numbers):
            lacking.append(f"node {kind}")
        elif kind in LORAS:
            words = f"{short(inputs['lora_name'])}:{unet:g}:{text:g}"
            said.append((f"{kind}: {inputs['lora_name']}", ("--lora", words)))
    return said, lacking


def of_latents(nodes: Graph, names: set[str]) -> tuple[Said, list[str]]:
    """The size of the picture and how many, or the picture that it was drawn over."""
    image = value_of(nodes, names, ("LoadImage",), "image")
    if image:
        return [(f"LoadImage: {image}", ("--init", "PICTURE"))], []
    width, height = (value_of(nodes, names, ("EmptyLatentImage",), side) for side in ("width", "height"))
    if not isinstance(width, int) or not isinstance(height, int):
        return [], ["the size of the picture"]
    said: Said = [(f"EmptyLatentImage: {width}x{height}", ("--size", f"{width}x{height}"))]
    count = value_of(nodes, names, ("EmptyLatentImage",), "batch_size")
    if isinstance(count, int) and count > 1:
        said.append((f"batch_size: {count}", ("--num-images", str(count))))
    return said, []


def text_of(nodes: Graph, value: object) -> str:
    """The text that a conditioning was made of, through the nodes between."""
    name = link(nodes, value)
    for _ in range(MAX_STEPS):
        if name is None:
            break
        inputs = nodes[name]["inputs"]
        text = next((plain(nodes, inputs[key]) for key in TEXTS if key in inputs), None)
        if isinstance(text, str):
            return text
        name = next((link(nodes, each) for each in inputs.values() if link(nodes, each)), None)
    return ""


def short(name: object) -> str:
    """A file's name without folders, of either kind of system."""
    return PureWindowsPath(PurePosixPath(str(name)).name).name
