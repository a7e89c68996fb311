"""`minisd explain`: a page about one picture, with everything in it: no other file is asked for, and no network."""

from __future__ import annotations

import base64
import inspect
import io
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ... import __version__
from ...codec import Codec
from ...diffusion.denoiser import ClassifierFree, Denoiser
from ...diffusion.levels import levels
from ...diffusion.schedule import TRAINING_STEPS, Discrete
from ...models.clip import Encoder
from ...models.ops import attention as attention_op
from ...models.unet import UNet
from ...models.vae import Decoder
from ...text.listing import shown as token_shown
from ...text.tokenizer import END_ID, LENGTH, START_ID, tokenize
from ..maps import END, summed
from ..taps import Value
from . import prose, svg
from .heat import evenly, heat, short
from .lecture import Lecture, heat_of, words_shown
from .unet_map import drawn, written

HERE = Path(__file__).parent
MOST_LAYERS, MOST_WORDS = 8, 12  # of cross-attention that have a row or a column
MOST_TOKENS = 24  # of the table of text layers
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
EQUATIONS = {
    "euler": "x' = x + (σ' − σ) eps",
    "ddim": "x' = x₀ + σ' eps   (eta 0)",
}


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(image: Image.Image, words: str, most: int = 512, **attributes: str) -> str:
    """An <img> of at most so many pixels a side; small ones keep every pixel."""
    small = max(image.size) <= most
    image = image if small else image.resize(tuple(round(side * most / max(image.size)) for side in image.size))  # type: ignore[arg-type]
    more = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
    return f'<img src="{data_uri(image, small)}" alt="{escape(words)}"{more}>'


def grey(values: Tensor) -> Image.Image:
    """Numbers (h, w) from their smallest, black, to their largest, white."""
    low, high = values.min(), values.max()
    scaled = ((values - low) / (high - low).clamp(min=1e-9) * 255).round().byte()
    return Image.fromarray(scaled.cpu().numpy())


def source_of(thing: Any) -> str:
    """Where something is computed: file and line."""
    thing = inspect.unwrap(thing)
    path = Path(inspect.getsourcefile(thing) or "")
    package = HERE.parents[1]
    place = path.relative_to(package.parent) if path.is_relative_to(package) else Path(path.name)
    return f"{place.as_posix()}:{inspect.getsourcelines(thing)[1]}"


def figure(inner: str, words: str, *things: Any) -> str:
    """With a caption, and where what it shows is computed."""
    sources = ", ".join(f"<code>{escape(source_of(each))}</code>" for each in things)
    return f"<figure>{inner}<figcaption>{words} Computed in {sources}.</figcaption></figure>"


def section(number: int, title: str, *parts: str) -> str:
    return f"<section><h2><span>{number}</span>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(words: str) -> str:
    return f"<p>{words}</p>"


def page(made: Lecture) -> str:
    """The whole page, as HTML."""
    sections: Sequence[Callable[[Lecture], str]] = (words, reading, noise, walk, latents, network, looking, decoding)
    body = "".join([head(made), *(each(made) for each in sections), foot(made)])
    title = escape(f"How “{made.plan.prompts[0][:80]}” is drawn")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{(HERE / 'page.css').read_text()}</style></head><body>{body}"
        f"<script>{(HERE / 'page.js').read_text()}</script></body></html>\n"
    )


def head(made: Lecture) -> str:
    plan, facts = made.plan, made.result.metadata[0]
    said = f"{made.pipe.checkpoint.path.name}, {made.pipe.family.title}: {plan.width}×{plan.height} pixels, {len(made.moments)} "
    said += f"steps of {plan.sampler.label}, guidance {plan.scales[0]:g}, "
    said += f"seed {facts['seed']}, {facts['dtype']} on {facts['device']}"
    image = picture(made.result.images[0], plan.prompts[0])
    title = f"<h1>How “{escape(plan.prompts[0][:200])}” is drawn</h1>"
    return f'<header><div>{title}<p class="lead">{prose.LEAD}</p><p>{escape(said)}</p></div>{image}</header>'


def first_chunk(made: Lecture) -> list[int]:
    """The ids of the first 77 places up to the end of the text."""
    chunk = made.tokens["chunks"][0][0]["ids"]
    return chunk[: (chunk.index(END_ID) if END_ID in chunk else len(chunk) - 1) + 1]


def label_of(token: int) -> str:
    return {START_ID: "start", END_ID: "end"}.get(token) or token_shown(token).rpartition(" ")[0] or "·"


def words(made: Lecture) -> str:
    chunk, more = first_chunk(made), len(made.tokens["chunks"][0]) - 1
    cells = [
        f'<div class="{"edge" if token in (START_ID, END_ID) else "token"}">{escape(label_of(token))}<small>{token}</small></div>'
        for token in chunk
    ]
    filled = f"The {LENGTH - len(chunk)} places behind are filled up." if len(chunk) < LENGTH else ""
    further = f"Of the prompt {more} more of such {LENGTH} places follow." if more else ""
    tokens = f'<div class="tokens">{"".join(cells)}</div>'
    text = prose.WORDS.format(places=LENGTH, filled=filled, further=further)
    return section(1, "Words become numbers", paragraph(text), figure(tokens, "The tokens, and their ids.", tokenize))


def reading(made: Lecture) -> str:
    labels = [label_of(token) for token in first_chunk(made)[:MOST_TOKENS]]
    ends = ("embeddings", "token_embedding")
    layers = [each for each in made.texts if ".layers." in each.name or ".resblocks." in each.name or each.name.endswith(ends)]
    towers = [tower.name for tower in made.pipe.family.towers]
    tables = [changes([value for value in layers if value.name.startswith(tower)], labels) for tower in towers]
    text = prose.READING.format(context=written(made.blueprint.context))
    inner = "".join(f'<div class="wide">{each}</div>' for each in tables)
    caption = "‖h′ − h‖ / ‖h‖ of the prompt's tokens, layer by layer; darker is more."
    title = "What each layer of the text encoder does to them"
    return section(2, title, paragraph(text), figure(inner, caption, Encoder, attention_op))


def changes(rows: Sequence[Value], labels: Sequence[str]) -> str:
    """A table of how much each layer changes each token's vector."""
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(label)}</th>" for label in labels) + "</tr>"]
    before = None
    for value in rows:
        states = value.output[-1, : len(labels)].float()  # of the prompt, (L, D)
        name = value.name.rpartition(".")[2]
        if before is None:
            cells = [f"<td>{float(state.norm()):.1f}</td>" for state in states]
        else:
            parts = [float((now - old).norm() / old.norm()) for now, old in zip(states, before, strict=True)]
            cells = [f'<td style="background:rgba(47,93,138,{min(part / 2, 1) * 0.55:.2f})">{part:.2f}</td>' for part in parts]
        lines.append(f"<tr><th>{'embeddings, ‖h‖' if before is None else f'layer {name}'}</th>{''.join(cells)}</tr>")
        before = states
    return f"<table>{''.join(lines)}</table>"


@dataclass(frozen=True)
class Curve:
    """Where levels stand in the figure of noise: timesteps fall from left to right, sigma downward, by its logarithm."""

    low: float
    high: float
    width: float = 980.0
    height: float = 300.0

    def place(self, t: float, sigma: float) -> tuple[float, float]:
        share = (self.high - math.log10(max(sigma, 1e-3))) / max(self.high - self.low, 1e-9)
        return 56 + (TRAINING_STEPS - t) / TRAINING_STEPS * (self.width - 76), 16 + share * (self.height - 60)


def noise(made: Lecture) -> str:
    schedule, sigmas = made.pipe.network.schedule, [each.step.sigma for each in made.moments]
    known = schedule.sigmas if isinstance(schedule, Discrete) else torch.tensor(sigmas, dtype=torch.float64)
    curve = Curve(math.log10(max(float(known.min()), 1e-3)), math.log10(float(known.max())))
    parts = list(grid(curve))
    if isinstance(schedule, Discrete):
        parts.append(svg.line([curve.place(t, float(known[t])) for t in range(0, len(known), 5)], svg.LINE, 2))
    for i, each in enumerate(made.moments):
        x, y = curve.place(each.step.timestep, each.step.sigma)
        said = svg.titled(f"step {i + 1}: sigma {each.step.sigma:.4g}, timestep {each.step.timestep:.1f}")
        parts.append(svg.element("circle", said, cx=x, cy=y, r=5, fill="#b5651d"))
    drawing = svg.picture(curve.width, curve.height, parts, "sigma by timestep")
    caption = prose.NOISE_FIGURE.format(trained=TRAINING_STEPS, count=len(sigmas))
    return section(3, "How much noise, and when", paragraph(prose.NOISE), figure(drawing, caption, type(schedule), levels))


def grid(curve: Curve) -> Iterator[str]:
    for tick in (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0):
        if curve.low <= math.log10(tick) <= curve.high:
            _, y = curve.place(0, tick)
            yield svg.line([(56, y), (curve.width - 20, y)], "#eceef1", 1)
            yield svg.text(48, y + 4, f"{tick:g}", 12, svg.PALE, text_anchor="end")
    for t in (999, 750, 500, 250, 0):
        yield svg.text(curve.place(t, 1)[0], curve.height - 20, str(t), 12, svg.PALE, text_anchor="middle")
    yield svg.text(curve.width / 2, curve.height - 4, "timestep of training", 12, svg.PALE, text_anchor="middle")


def walk(made: Lecture) -> str:
    plan, run = made.plan, plainest(made.plan.sampler.run)
    equation = EQUATIONS.get(plan.request.sampler if isinstance(plan.request.sampler, str) else "", "")
    rows = [
        {"x": data_uri(scaled(each.x)), "estimate": data_uri(scaled(each.estimate)), "numbers": numbers(made, i, equation)}
        for i, each in enumerate(made.moments)
    ]
    guided = plan.scales[0] != 1
    text = prose.STEPS.format(
        twice=", once without and once with the prompt" if guided else "",
        guidance=prose.GUIDANCE.format(scale=plan.scales[0]) if guided else "",
        sampler=escape(plan.sampler.label),
    )
    code = f"<pre>{escape(textwrap.dedent(inspect.getsource(run)))}</pre>"
    return section(
        4,
        "Step by step",
        paragraph(text),
        figure(stage(rows), prose.STEPS_FIGURE, Denoiser, ClassifierFree, Codec.decode),
        figure(f'<div class="wide">{table(made)}</div>', prose.NUMBERS_FIGURE, Denoiser),
        figure(code, f"{escape(plan.sampler.label)}, as it stands.", run),
    )


def stage(rows: Sequence[Mapping[str, str]]) -> str:
    """The pictures and numbers of one step, and a slider that chooses it."""
    said = json.dumps(rows).replace("<", "\\u003c")
    first = len(rows) // 2
    return (
        f'<div class="stage"><div><img id="x" alt="x" src="{rows[first]["x"]}"><b>x, what the network is given</b></div>'
        f'<div><img id="estimate" alt="estimate" src="{rows[first]["estimate"]}"><b>x₀, its estimate of the picture</b></div>'
        f'<div class="equation" id="numbers">{rows[first]["numbers"]}</div></div>'
        f'<div class="slider"><input type="range" id="step" min="0" max="{len(rows) - 1}" value="{first}" aria-label="step">'
        f'<output id="place"></output></div><script type="application/json" id="steps">{said}</script>'
    )


def plainest(run: Callable[..., Any]) -> Callable[..., Any]:
    """A sampler without what may be put around it, such as noise that is added before a step."""
    run = getattr(run, "func", run)
    inner = inspect.getclosurevars(run).nonlocals.get("run")
    return inner if callable(inner) else run


def scaled(image: Image.Image, most: int = 256) -> Image.Image:
    part = most / max(image.size)
    return image if part >= 1 else image.resize((round(image.width * part), round(image.height * part)))


def following(made: Lecture, i: int) -> float:
    return made.moments[i + 1].step.sigma if i + 1 < len(made.moments) else 0.0


def numbers(made: Lecture, i: int, equation: str) -> str:
    """A step's live numbers beside its pictures, as HTML."""
    each = made.moments[i]
    step, call = each.step, each.calls[0] if each.calls else {"c_in": 0.0, "apart": 0.0}
    lines = [f"<i>t</i> = {step.timestep:.1f}   <i>σ</i> = {step.sigma:.4g}   <i>σ'</i> = {following(made, i):.4g}"]
    lines.append(f"<i>c_in</i> = 1/√(σ² + 1) = {call['c_in']:.4f}")
    if call["apart"]:
        lines.append(f"<i>‖eps_c − eps_u‖</i> = {call['apart']:.2f}")
        lines.append(f"<i>eps</i> = eps_u + {made.plan.scales[0]:g} (eps_c − eps_u)")
    lines.append(f"<i>x₀</i> = x − σ eps, from {float(step.denoised.min()):.2f} to {float(step.denoised.max()):.2f}")
    lines.append(f"<i>‖x‖</i>: {float(step.before.norm()):.1f} → {float(step.latents.norm()):.1f}")
    if len(each.calls) > 1:
        asked = ", ".join(f"{row['sigma']:.3g}" for row in each.calls)
        lines.append(f"the network is asked {len(each.calls)} times, at σ {asked}")
    return "<br>".join(lines) + (f"<br><br>{escape(equation)}" if equation else "")


def table(made: Lecture) -> str:
    names = ("step", "t", "σ", "σ′", "c_in", "‖eps_c − eps_u‖", "x₀ from", "to", "‖x‖")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for i, each in enumerate(made.moments):
        step, call = each.step, each.calls[0] if each.calls else {"c_in": 0.0, "apart": 0.0}
        low, high = float(step.denoised.min()), float(step.denoised.max())
        cells = [str(i + 1), f"{step.timestep:.1f}", f"{step.sigma:.4g}", f"{following(made, i):.4g}", f"{call['c_in']:.4f}"]
        cells += [f"{call['apart']:.2f}", f"{low:.2f}", f"{high:.2f}", f"{float(step.before.norm()):.1f}"]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<table id="table">{"".join(rows)}</table>'


def pixels_of(made: Lecture) -> str:
    return written((3, made.plan.height, made.plan.width))


def latents(made: Lecture) -> str:
    found = made.result.latents[0]
    cells = []
    for i, channel in enumerate(found):
        span = f"{float(channel.min()):.2f} to {float(channel.max()):.2f}"
        cells.append(f"<div>{picture(grey(channel), f'channel {i}', 256)}channel {i}<br>{span}</div>")
    text = prose.LATENTS.format(small=written(found.shape), large=pixels_of(made))
    strip = f'<div class="strip">{"".join(cells)}</div>'
    return section(5, "The finished latents", paragraph(text), figure(strip, prose.LATENTS_FIGURE, type(made.pipe).draw))


def network(made: Lecture) -> str:
    drawing = drawn(made.blueprint, heat_of(made), prose.NETWORK_HEAT.format(step=made.middle + 1))
    return section(6, "The network", paragraph(prose.NETWORK), figure(drawing, "The UNet, from its key list.", UNet))


def looking(made: Lecture) -> str:
    found, image = made.attention, made.result.images[0]
    layers, names = list(found.maps), words_shown(made)[:MOST_WORDS]
    cells = ["<span></span>", *(f"<b>{escape(name.strip('<>') if name == END else name)}</b>" for name in names)]
    for layer in (layers[i] for i in evenly(len(layers), MOST_LAYERS)):
        cells.append(f'<span class="row">{escape(short(layer))}</span>')
        cells += [picture(scaled(heat(found.of(name, layer), image), 96), f"{name} in {short(layer)}", 128) for name in names]
    columns = f"130px repeat({len(names)}, 84px)"
    maps = f'<div class="wide"><div class="maps" style="grid-template-columns: {columns}">{"".join(cells)}</div></div>'
    return section(
        7, "Where the pixels look", paragraph(prose.LOOKING), figure(maps, "Weights by word and layer.", summed, attention_op)
    )


def decoding(made: Lecture) -> str:
    cells = []
    for value in made.decoder:
        sizes = value.output[0].float().square().mean(0).sqrt()  # (h, w)
        name = value.name.partition(".decoder.")[2] or value.name.rpartition(".")[2]
        shrunk = F.interpolate(sizes[None, None], scale_factor=min(1.0, 128 / max(sizes.shape)), mode="area")[0, 0]
        image = picture(grey(shrunk), name, 256)
        cells.append(f"<div>{image}<code>{escape(name)}</code><br>{written(value.output.shape[1:])}</div>")
    cells.append(f"<div>{picture(made.result.images[0], 'the picture', 256)}the picture<br>{pixels_of(made)}</div>")
    strip = f'<div class="strip">{"".join(cells)}</div>'
    return section(8, "The way back to pixels", paragraph(prose.DECODING), figure(strip, prose.DECODING_FIGURE, Decoder))


def foot(made: Lecture) -> str:
    command = f"minisd explain {made.plan.prompts[0]!r} --seed {made.result.metadata[0]['seed']}"
    return f"<footer>Made by minisd {__version__}, PyTorch {torch.__version__}: <code>{escape(command[:300])}</code></footer>"
