"""`minisd tokens`."""

from __future__ import annotations

import json

import pytest
from families import SMALL

from minisd.cli import main


def facts(capsys, *arguments: str) -> dict:
    assert main(["tokens", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_chunks_parts_and_steps(capsys):
    found = facts(capsys, "a [cat:dog:0.5] (red:1.3) AND night:0.5", "--steps", "10")
    assert found["encoders"] == ["CLIP ViT-L"]
    assert found["steps"] == [{"until": 5, "text": "a cat (red:1.3)"}, {"until": 10, "text": "a dog (red:1.3)"}]
    assert [(part["weight"], part["text"]) for part in found["parts"]] == [(1, "a [cat:dog:0.5] (red:1.3)"), (0.5, " night")]
    ((chunk,),) = found["chunks"]
    assert chunk["ids"] == [49406, 320, 2368, 736, *[49407] * 73]
    assert chunk["weights"] == [1, 1, 1, 1.3, *[1] * 73]
    assert found["parts"][0]["steps"][1]["chunks"][0][0]["ids"][:4] == [49406, 320, 1929, 736]
    assert found["parts"][1]["steps"][0]["chunks"][0][0]["ids"][:3] == [49406, 930, 49407]


def test_two_encoders_and_what_one_does_not_see(tmp_path, capsys):
    path = str(SMALL["sdxl"].write(tmp_path / "x.safetensors"))
    found = facts(capsys, "a cat <|endoftext|> red dog", "-m", path)
    (first,), (second,) = found["chunks"]
    assert first["ids"][:7] == [49406, 320, 2368, 49407, 736, 1929, 49407]
    assert second["ids"][:7] == [49406, 320, 2368, 49407, 0, 0, 0]
    assert found["cut"] == ["", "red dog"]


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], [1.2 * 1.5]),
        (["--emphasis", "no-norm"], [1.2 * 1.5]),
        (["--emphasis", "ignore"], [1]),
        (["--emphasis", "comfy"], [1.2]),
        (["--emphasis", "none"], [1] * 12),
        (["--plain-prompt"], [1] * 12),
    ],
)
def test_every_emphasis(options, weights, capsys):
    ((chunk,),) = facts(capsys, "((cat:1.2):1.5)", *options)["chunks"]
    assert chunk["weights"][1 : 1 + len(weights)] == pytest.approx(weights)
    assert chunk["ids"][1 + len(weights)] == 49407


def test_as_a_person_reads_it(capsys):
    assert main(["tokens", "cat " * 76 + "(red:1.25) 猫"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  chunk 1 of 2: 75 of 75 tokens"
    assert lines[2:] == [
        "  chunk 2 of 2: 5 of 75 tokens",
        "    1       cat 2368",
        "    1.25    red 736",
        "    1       163  234  360",
        "nothing is cut; programs that read 77 tokens alone leave out: cat red 猫",
    ]
    assert main(["tokens", "a [cat|dog] AND night :2", "--steps", "2"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "part 1, 1 times the guidance",
        "until step 1: 'a cat'",
        "  chunk 1 of 1: 2 of 75 tokens",
        "    1       a 320  cat 2368",
        "until step 2: 'a dog'",
        "  chunk 1 of 1: 2 of 75 tokens",
        "    1       a 320  dog 1929",
        "part 2, 2 times the guidance",
        "  chunk 1 of 1: 1 of 75 tokens",
        "    1       night 930",
    ]


def test_as_a_negative_prompt(capsys):
    (part,) = facts(capsys, "a AND b:2", "--as-negative")["parts"]
    assert (part["text"], part["weight"]) == ("a AND b:2", 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["(a:1.2.3)"], "prompt: expected a number as a weight, found ':1.2.3)'"),
        (["(a:nan)", "--emphasis", "comfy"], "prompt: expected weights that are finite, found nan"),
        (["a", "--emphasis", "loud"], "--emphasis: expected one of original, no-norm, ignore, none, comfy, found 'loud'"),
        (["a", "--emphasis", "comfy", "--plain-prompt"], "--emphasis: expected none beside plain_prompt"),
        (["a AND " * 60], "prompt: expected at most 50 parts joined by AND, found 61"),
    ],
)
def test_what_is_wrong_is_one_line(arguments, told, capsys):
    assert main(["tokens", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
