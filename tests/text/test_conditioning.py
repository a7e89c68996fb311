"""What weights and chunks make of a prompt, against the same computed directly from transformers' encoders.

The pieces of every chunk are written by hand, not taken from the grammar.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from families import SMALL, text_model, tokenizers
from helpers import relative_error
from safetensors.torch import load_file, save_file

import minisd
from minisd.text.grammar import parse
from minisd.text.prompts import Reader, line
from minisd.text.tokenizer import encode

LIMIT = 1e-5
FAMILIES = ("sd1", "sd2", "sdxl")
LONG = ("cat " * 60 + ",", "dog " * 20)  # the comma is the 61st: what follows moves to the next chunk
UP = 1.1
# A prompt, and the pieces of each of its chunks.
PROMPTS = {
    "a red star": [[("a red star", 1)]],
    "": [[]],
    "a (red:1.4) [star]": [[("a", 1), ("red", 1.4), ("star", 1 / UP)]],
    "((a)) (b:-0.5) c": [[("a", UP * UP), ("b", -0.5), ("c", 1)]],
    "(((a red star:0)))": [[("a red star", 0)]],
    "a (red:1.2) BREAK (star:0.7)": [[("a", 1), ("red", 1.2)], [("star", 0.7)]],
    f"{LONG[0]} ({LONG[1]}:1.3)": [[(LONG[0], 1)], [(LONG[1], 1.3)]],
    "(cat:1.5) " + "dog " * 80: [[("cat", 1.5), ("dog " * 74, 1)], [("dog " * 6, 1)]],
}
COMFY = {
    "a red star": [[("a red star", 1)]],
    "a (red:1.4) [star]": [[("a", 1), ("red", 1.4), ("[star]", 1)]],
    "((a:1.5)) (b:-0.5) c": [[("a", 1.5), ("b", -0.5), ("c", 1)]],
    "dog " * 73 + "(cat cat cat:1.2)": [[("dog " * 73, 1)], [("cat cat cat", 1.2)]],
    "(cat:1.5) " + "dog " * 80: [[("cat", 1.5), ("dog " * 74, 1)], [("dog " * 6, 1)]],
}


class Direct:
    """A family's text encoders in transformers."""

    def __init__(self, name: str, path: Path, folder: Path) -> None:
        self.small = SMALL[name]
        weights = load_file(path)
        self.models = [text_model(weights, tower, drop=name == "sd2") for tower in self.small.family.towers]
        self.tokenizers = tokenizers(self.small, folder)

    def chunks(self, chunks: list[list[tuple[str, float]]], encoder: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, (k, 77) each."""
        rows, weights = [], []
        for pieces in chunks:
            read = [(self.tokenizers[encoder](text, add_special_tokens=False).input_ids, weight) for text, weight in pieces]
            ids = [49406, *itertools.chain(*(ids for ids, _ in read)), 49407]
            rows.append(ids + [self.small.family.towers[encoder].pad] * (77 - len(ids)))
            some = [1.0, *itertools.chain(*([weight] * len(ids) for ids, weight in read))]
            weights.append(some + [1.0] * (77 - len(some)))
        return torch.tensor(rows), torch.tensor(weights, dtype=torch.float64)

    def states(self, ids: torch.Tensor, encoder: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = self.models[encoder](ids, output_hidden_states=True)
        state = found.last_hidden_state if len(self.models) == 1 else found.hidden_states[-2]
        return state.double(), getattr(found, "text_embeds", None)

    def encode(self, chunks: list[list[tuple[str, float]]], mode: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        contexts, pooled = [], None
        for encoder in range(len(self.models)):
            ids, m = self.chunks(chunks, encoder)
            z, vectors = self.states(ids, encoder)  # (k, 77, D)
            if mode == "comfy":
                e, _ = self.states(self.chunks([[]], encoder)[0], encoder)
                y = (z - e) * m[..., None] + e
            else:
                y = z if mode in ("ignore", "none") else z * m[..., None]
                if mode == "original":
                    y = y * (z.mean((1, 2)) / y.mean((1, 2)))[:, None, None]
            contexts.append(y.flatten(0, 1))
            pooled = vectors[0] if vectors is not None else pooled
        return torch.cat(contexts, dim=-1), pooled


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for name in FAMILIES:
        path = SMALL[name].write(folder / f"{name}.safetensors")
        found[name] = minisd.load(path, device="cpu", dtype="float32"), Direct(name, path, folder)
    return found


@pytest.mark.parametrize("mode", ["original", "no-norm", "ignore", "comfy"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_weighted_and_long_prompts_equal_a_direct_computation(name, mode, made):
    pipe, direct = made[name]
    for text, chunks in (COMFY if mode == "comfy" else PROMPTS).items():
        found = pipe.encode_prompt(text, emphasis=mode)
        context, pooled = direct.encode(chunks, mode)
        assert found.context.shape[1] == 77 * len(chunks)
        assert relative_error(found.context[0], context) <= LIMIT, text
        assert (found.pooled is None) == (pooled is None)
        assert pooled is None or relative_error(found.pooled[0], pooled) <= LIMIT


@torch.no_grad()
def test_words_alone(made):
    pipe, direct = made["sdxl"]
    for options in ({"emphasis": "none"}, {"plain_prompt": True}):
        found = pipe.encode_prompt("a (red:1.4) BREAK star", **options)
        wanted, _ = direct.encode([[("a (red:1.4) BREAK star", 1)]], "none")
        assert relative_error(found.context[0], wanted) <= LIMIT
    assert not torch.equal(pipe.encode_prompt("a (red:1.4) BREAK star").context[:, :77], found.context)


@torch.no_grad()
def test_a_batch_of_texts_is_each_of_them(made):
    """Its means are its own, and what is shorter goes on with chunks of no words."""
    for name, mode in itertools.product(FAMILIES, ("original", "comfy")):
        pipe, direct = made[name]
        texts = ["a (red:1.4) star", "(cat:1.5) " + "dog " * 80, "a star"]
        found = pipe.encode_prompt(texts, emphasis=mode)
        for row, chunks in zip(
            found.context, ([[("a", 1), ("red", 1.4), ("star", 1)], []], None, [[("a star", 1)], []]), strict=True
        ):
            wanted, _ = direct.encode(chunks or PROMPTS[texts[1]], mode)
            assert relative_error(row, wanted) <= LIMIT


@torch.no_grad()
def test_an_edited_prompt_shares_its_mean(made):
    """As A1111 encodes the texts of one schedule as one batch, each as often as it is in it."""
    pipe, direct = made["sd1"]
    (part,) = parse("a [(red:1.5)|blue] star", 3).parts  # red, blue, red
    told = line(part, None, 1)
    timeline = Reader(pipe.conditioner, [told], "original").timeline([told])
    assert [last for last, _ in timeline.entries] == [1, 2, 3]
    assert timeline.entries[0][1] is timeline.entries[2][1]
    red, blue = ([[("a", 1), ("red", 1.5), ("star", 1)]], [[("a blue star", 1)]])
    z = torch.stack([direct.encode(chunks, "ignore")[0] for chunks in (red, blue, red)])
    y = torch.stack([direct.encode(chunks, "no-norm")[0] for chunks in (red, blue, red)])
    wanted = y * z.mean() / y.mean()
    for i in range(3):
        assert relative_error(timeline.entries[i][1].context[0], wanted[i]) <= LIMIT
    alone, _ = direct.encode(red, "original")
    assert relative_error(timeline.entries[0][1].context[0], alone) > 1e-3


@torch.no_grad()
def test_two_prompts_for_two_encoders(made):
    pipe, direct = made["sdxl"]
    first, second = ("a [red:blue:1] (star:1.2)", "a ring " * 40)
    told = line(parse(first, 2).parts[0], parse(second, 2).parts[0], 2)
    timeline = Reader(pipe.conditioner, [told], "no-norm").timeline([told])
    assert [last for last, _ in timeline.entries] == [1, 2]
    for (_, found), colour in zip(timeline.entries, ("red", "blue"), strict=True):
        own, _ = direct.encode([[(f"a {colour}", 1), ("star", 1.2)], []], "no-norm")
        other, pooled = direct.encode([[("a ring " * 37 + "a", 1)], [("ring a ring a ring", 1)]], "no-norm")
        assert relative_error(found.context[0], torch.cat([own[:, :64], other[:, 64:]], dim=1)) <= LIMIT
        assert relative_error(found.pooled[0], pooled) <= LIMIT


@torch.no_grad()
def test_shorter_parts_go_on_with_their_last_vector(made):
    pipe, _ = made["sd1"]
    short, long = (line(part, None, 1) for part in parse("a star AND " + "a ring " * 50, 2).parts)
    negative = line(parse("dog " * 160, 2).parts[0], None, 1)
    reader = Reader(pipe.conditioner, [short, long, negative], "original")
    assert [reader.chunks(each) for each in (short, long, negative)] == [1, 2, 3]
    ((_, found),) = reader.timeline([short], [2]).entries
    alone, empty = (pipe.encode_prompt(text).context[0] for text in ("a star", ""))
    assert relative_error(found.context[0, :77], alone) <= LIMIT
    assert torch.equal(found.context[0, 77:154], found.context[0, 76].expand(77, -1))
    assert relative_error(found.context[0, 154:], empty) <= LIMIT


def test_a_network_that_comes_later_counts_on(made):
    pipe, _ = made["sd1"]
    told = line(parse("[a|b|c]", 6).parts[0], None, 1)
    reader = Reader(pipe.conditioner, [told], "original")
    whole, rest = reader.timeline([told]), reader.timeline([told], before=4)
    assert [last for last, _ in rest.entries] == [0, 1, 2]
    assert [each for _, each in rest.entries] == [each for _, each in whole.entries[3:]]
    assert reader.timeline([told], before=9).entries == ((-3, whole.entries[-1][1]),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a AND b", "prompts: expected a text without AND"),
        ("[a:b:1]", "prompts: expected a text that says the same at all steps"),
        ("(a:1..2)", "prompts: expected a number as a weight, found ':1..2"),
    ],
)
def test_what_no_one_conditioning_says(text, told, made):
    with pytest.raises(minisd.UsageError, match=told):
        made["sd1"][0].encode_prompt(text)
    with pytest.raises(minisd.UsageError, match="prompts: expected weights that are finite, found inf"):
        made["sd1"][0].encode_prompt("(a:inf)", emphasis="comfy")


@pytest.mark.parametrize("mode", ["original", "comfy"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_added_words_equal_new_rows_of_transformers(name, mode, made, tmp_path):
    """Three rows, others for each encoder, in the place of three tokens of transformers' tables; weights; a chunk's border."""
    pipe, direct = made[name]
    stand_in = "castle forest river"
    ids = encode(stand_in)
    assert len(ids) == 3
    tables = [model.get_input_embeddings().weight for model in direct.models]
    rows = [torch.randn(3, table.shape[1], generator=torch.Generator().manual_seed(i)) for i, table in enumerate(tables)]
    before, conditioner = [table[ids].clone() for table in tables], pipe.conditioner
    file = tmp_path / "clay.safetensors"
    save_file({"emb_params": rows[0]} if len(rows) == 1 else {"clip_l": rows[0], "clip_g": rows[1]}, file)
    try:
        pipe.add_embedding(file)
        for table, own in zip(tables, rows, strict=True):
            table[ids] = own
        for text, chunks in {
            "a embedding:clay star": [[("a", 1), (stand_in, 1), ("star", 1)]],
            "a (embedding:clay:1.3) star": [[("a", 1), (stand_in, 1.3), ("star", 1)]],
            "dog " * 72 + "embedding:clay": [[("dog " * 72 + stand_in, 1)]],
            "dog " * 73 + "embedding:clay": [[("dog " * 73, 1)], [(stand_in, 1)]],
        }.items():
            found = pipe.encode_prompt(text, emphasis=mode)
            context, pooled = direct.encode(chunks, mode)
            assert found.context.shape[1] == 77 * len(chunks)
            assert relative_error(found.context[0], context) <= LIMIT, text
            assert pooled is None or relative_error(found.pooled[0], pooled) <= LIMIT
    finally:
        pipe.conditioner = conditioner
        for table, own in zip(tables, before, strict=True):
            table[ids] = own
