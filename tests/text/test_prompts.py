"""A hundred hard prompts, and what each means, written by hand from the rules of A1111 and ComfyUI."""

from __future__ import annotations

import pytest

from minisd.text.attention import BREAK, Piece, weighted
from minisd.text.chunks import COMMA, at_commas, by_segments, chunked, closed
from minisd.text.comfy import weighted as comfy
from minisd.text.editing import schedule
from minisd.text.grammar import lone_weight, parse
from minisd.text.tokenizer import END_ID, START_ID, encode, tokenize

UP, DOWN = 1.1, 1 / 1.1

ATTENTION = [
    ("", [("", 1)]),
    ("a cat", [("a cat", 1)]),
    ("(cat)", [("cat", UP)]),
    ("[cat]", [("cat", DOWN)]),
    ("((cat))", [("cat", UP * UP)]),
    ("([cat])", [("cat", UP * DOWN)]),
    ("a (red:1.3) hat", [("a ", 1), ("red", 1.3), (" hat", 1)]),
    ("((red:1.5))", [("red", 1.5 * UP)]),  # a number takes the place of 1.1, not of what is around it
    ("(a (b:0.5) c:1.2)", [("a ", 1.2), ("b", 0.6), (" c", 1.2)]),
    ("(x:.5)", [("x", 0.5)]),
    ("(x:2.)", [("x", 2)]),
    ("(x:+2)", [("x", 2)]),
    ("(x:-1)", [("x", -1)]),
    ("(x:0)", [("x", 0)]),
    ("(x : 1.2 )", [("x ", 1.2)]),
    ("(x:1e3)", [("x:1e3", UP)]),  # no exponents
    ("(x:1,5)", [("x:1,5", UP)]),
    ("(x:inf)", [("x:inf", UP)]),
    ("(x::1.2)", [("x:", 1.2)]),
    ("(16:9)", [("16", 9)]),  # a ratio in brackets is a weight
    ("(a:b:1.4)", [("a:b", 1.4)]),
    ("(:1.4)", [("", 1)]),
    ("()", [("", 1)]),
    ("a:1.2)", [("a:1.2)", 1)]),  # no bracket is open
    ("[a:1.2)", [("a:1.2)", DOWN)]),  # nor a round one
    ("a)", [("a)", 1)]),
    ("a]", [("a]", 1)]),
    ("(a", [("a", UP)]),
    ("[[a", [("a", DOWN * DOWN)]),
    ("a (b (c", [("a ", 1), ("b ", UP), ("c", UP * UP)]),
    ("(a [b) c]", [("a ", UP), ("b", UP * DOWN), (" c", DOWN)]),  # crossing
    (r"\(a\)", [("(a)", 1)]),
    (r"(a\))", [("a)", UP)]),
    (r"(a\:1.2)", [("a", 1.2)]),  # a colon cannot be escaped here
    (r"\[a\]", [("[a]", 1)]),
    (r"a\\b", [("a\\b", 1)]),
    (r"\\(a\\)", [("\\", 1), ("a\\", UP)]),
    (r"\a", [("a", 1)]),
    ("a\\", [("a", 1)]),
    ("(ab)(cd)", [("abcd", UP)]),  # joined before it is tokenised
    ("(a:1.1)(b)", [("ab", UP)]),
    ("fe(male:1.2)", [("fe", 1), ("male", 1.2)]),
    ("a BREAK b", [("a", 1), ("BREAK", -1), ("b", 1)]),
    ("BREAK", [("", 1), ("BREAK", -1), ("", 1)]),
    ("a BREAK BREAK b", [("a", 1), ("BREAK", -1), ("", 1), ("BREAK", -1), ("b", 1)]),
    ("BREAKFAST break", [("BREAKFAST break", 1)]),
    ("(a)BREAK(b)", [("a", UP), ("", 1), ("BREAK", -1), ("", 1), ("b", UP)]),
    ("(a BREAK b:1.2)", [("a", 1.2), ("BREAK", -1.2), ("b", 1.2)]),  # a word then
    ("(a BREAK b:1)", [("a", 1), ("BREAK", -1), ("b", 1)]),
    ("（a:1.2）", [("（a:1.2）", 1)]),  # full-width signs are none
    ("<lora:x:1>", [("<lora:x:1>", 1)]),
    ("((a:0.5) b:2)", [("a", 1), (" b", 2)]),
    ("(a:2)(b:0.5)[(c)]", [("a", 2), ("b", 0.5), ("c", UP * DOWN)]),
]

EDITING = [  # steps, text, entries
    (10, "a cat", [(10, "a cat")]),
    (10, "[a:b:0.5]", [(5, "a"), (10, "b")]),
    (10, "[a:b:3]", [(3, "a"), (10, "b")]),
    (10, "[b:3]", [(3, ""), (10, "b")]),
    (10, "[a::3]", [(3, "a"), (10, "")]),
    (10, "[:b:3]", [(3, ""), (10, "b")]),
    (10, "[:3]", [(3, ""), (10, "")]),
    (10, "[a:b:1]", [(1, "a"), (10, "b")]),
    (10, "[a:b:1.0]", [(10, "a")]),  # with a dot: all of the steps
    (10, "[a:b:0]", [(10, "b")]),
    (10, "[a:b:-2]", [(10, "b")]),
    (10, "[a:b:0.09]", [(10, "b")]),
    (10, "[a:b:12]", [(10, "a")]),
    (10, "[x:1.2]", [(10, "")]),  # an edit that is never reached, not a weight
    (10, "[a:b: 5 ]", [(5, "a"), (10, "b")]),
    (10, "[ a : b :5]", [(5, " a "), (10, " b ")]),
    (10, "[a:b:+5]", [(5, "a"), (10, "b")]),
    (10, "[a:b:5e-1]", [(10, "b")]),  # no dot: a count, cut off
    (10, "[a:b:3.e-1]", [(3, "a"), (10, "b")]),
    (100, "[a:b:0.29]", [(28, "a"), (100, "b")]),  # 0.29 * 100 falls just under 29
    (10, "ca[t:r:5]", [(5, "cat"), (10, "car")]),
    (4, "[a|b]", [(1, "a"), (2, "b"), (3, "a"), (4, "b")]),
    (3, "c[a|]d", [(1, "cad"), (2, "cd"), (3, "cad")]),
    (4, "[a|b|c]", [(1, "a"), (2, "b"), (3, "c"), (4, "a")]),
    (4, "[a:[b:c:3]:2]", [(2, "a"), (3, "b"), (4, "c")]),
    (4, "[[a:b:3]:c:2]", [(2, "a"), (3, "c"), (4, "c")]),  # an edit that is not taken makes an entry
    (4, "[a|b:2]", [(4, "[a|b:2]")]),  # neither, so a | is left over
    (4, "[[a|b]:c:2]", [(1, "a"), (2, "b"), (3, "c"), (4, "c")]),
    (4, "([a:b:2]:1.3)", [(2, "(a:1.3)"), (4, "(b:1.3)")]),
    (4, "[(a:1.3):b:2]", [(2, "(a:1.3)"), (4, "b")]),
    (4, "[a]", [(4, "[a]")]),
    (4, "[a:b]", [(4, "[a:b]")]),
    (4, "[a:b:c:2]", [(4, "[a:b:c:2]")]),
    (4, "[a:b:2] [c", [(2, "a [c"), (4, "b [c")]),
    (4, "(a [b:c:2]", [(2, "(a b"), (4, "(a c")]),
    (4, "[a (b:c:2]", [(4, "[a (b:c:2]")]),
    (4, r"[a\:b:2]", [(2, ""), (4, r"a\:b")]),
    (4, r"\[a:b:2]", [(4, r"\[a:b:2]")]),
    (4, "a | b [c:d:2]", [(4, "a | b [c:d:2]")]),  # none of it is read
    (4, "(a|b) [c:d:2]", [(4, "(a|b) [c:d:2]")]),
    (4, "[c:d:2]\\", [(4, "[c:d:2]\\")]),
    (4, "[a:b:2", [(4, "[a:b:2")]),
    (4, "16:9 [a:b:2]", [(2, "16:9 a"), (4, "16:9 b")]),
    (4, "[a:[5:6:1]]", [(1, "[a:5]"), (4, "[a:6]")]),  # what an edit says is no number of another
    (4, "[a:b:2)]", [(4, "[a:b:2)]")]),
    (4, "[a:b:1e999]", [(4, "a")]),
]

PARTS = [
    ("a AND b", [("a", 1), (" b", 1)]),
    ("a:1.2 AND b:0.8", [("a", 1.2), (" b", 0.8)]),
    ("a : -.5 AND b :2. ", [("a", -0.5), (" b", 2)]),
    ("a cat:1.5", [("a cat", 1.5)]),
    ("at 10:30", [("at 10", 30)]),
    ("a:1.2.3", [("a:1.2.3", 1)]),
    ("a:1e1", [("a:1e1", 1)]),
    ("a (b:1.2)", [("a (b:1.2)", 1)]),
    ("[a:b:.3", [("[a:b", 0.3)]),
    ("a  ", [("a", 1)]),
    ("ANDROID BRAND and AND_", [("ANDROID BRAND and AND_", 1)]),
    ("AND a AND", [("", 1), (" a", 1), ("", 1)]),
    ("(a AND b:1.2)", [("(a", 1), (" b:1.2)", 1)]),
    ("a\nb:2\n", [("a\nb", 2)]),
    ("a AND a", [("a", 1), (" a", 1)]),
]

COMFY = [
    ("a cat", [("a cat", 1)]),
    ("", []),
    ("(x)", [("x", UP)]),
    ("((x))", [("x", UP * UP)]),
    ("(x:1.3)", [("x", 1.3)]),
    ("((x:1.5))", [("x", 1.5)]),  # a number replaces
    ("((x:1.2):1.5)", [("x", 1.2)]),
    ("(a (b:0.5) c:1.2)", [("a ", 1.2), ("b", 0.5), (" c", 1.2)]),
    ("(a (b) c:2)", [("a ", 2), ("b", 2 * UP), (" c", 2)]),
    ("(x:1e3)", [("x", 1000)]),
    ("(x: 1_0 )", [("x", 10)]),
    ("(x:y)", [("x:y", UP)]),
    ("(:1.5)", [(":1.5", UP)]),
    ("(a:b:2)", [("a:b", 2)]),
    ("[x] AND BREAK {a|b}", [("[x] AND BREAK {a|b}", 1)]),
    (r"\(x\) \[y\]", [(r"(x) \[y\]", 1)]),
    (r"(a\):2)", [("a)", 2)]),
    ("(x:1.5", [("(x:1.5", 1)]),
    ("x:1.5)", [("x:1.5)", 1)]),
    ("a) (b) (c)", [("a) (b) (c)", 1)]),  # below zero, a bracket opens nothing
    ("(a (b)", [("a ", UP), ("(b", UP)]),  # not closed, but it ends so
    ("(a) (b (c) d", [("a", UP), (" ", 1), ("(b (c) d", 1)]),
    ("(a)(b)", [("a", UP), ("b", UP)]),  # not joined
]


def approximately(pieces, wanted) -> bool:
    texts, weights = [text for text, _ in pieces], [weight for _, weight in pieces]
    return texts == [text for text, _ in wanted] and weights == pytest.approx([weight for _, weight in wanted], rel=1e-12)


def test_there_are_a_hundred():
    assert len(ATTENTION) + len(EDITING) + len(PARTS) + len(COMFY) >= 100


@pytest.mark.parametrize(("text", "wanted"), ATTENTION)
def test_weights(text, wanted):
    assert approximately(weighted(text), wanted)


@pytest.mark.parametrize(("steps", "text", "wanted"), EDITING)
def test_editing(steps, text, wanted):
    assert schedule(text, steps) == wanted


@pytest.mark.parametrize(("text", "wanted"), PARTS)
def test_parts(text, wanted):
    assert [(part.text, part.weight) for part in parse(text, 4).parts] == wanted
    (negative,) = parse(text, 4, joins=False).parts
    assert (negative.text, negative.weight) == (text, 1)


@pytest.mark.parametrize(("text", "wanted"), COMFY)
def test_weights_of_comfyui(text, wanted):
    assert approximately(comfy(text), wanted)


def test_the_whole_of_the_grammar():
    first, second = parse("a [(red:1.2):blue:0.5] hat AND (night) :0.5", 8).parts
    assert [(entry.last, entry.pieces) for entry in first.entries] == [
        (4, (("a ", 1), ("red", 1.2), (" hat", 1))),
        (8, (("a blue hat", 1),)),
    ]
    assert second.weight == 0.5
    assert approximately(second.entries[0].pieces, [(" ", 1), ("night", UP)])


def test_modes_that_read_less():
    text = "[a:b:2] (c:1.3) BREAK"
    assert [entry.pieces for entry in parse(text, 4, "none").parts[0].entries] == [
        (Piece("a (c:1.3) BREAK"),),
        (Piece("b (c:1.3) BREAK"),),
    ]
    assert parse("a AND b:2", 4, "plain").parts[0].entries[0].pieces == (Piece("a AND b:2"),)
    assert len(parse("a AND b:2", 4, "comfy").parts) == 1


@pytest.mark.parametrize(
    ("text", "emphasis"), [("(x:1.2.3)", "original"), ("(wait:...)", "ignore"), ("(" * 600 + ")" * 600, "comfy")]
)
def test_what_is_no_number_is_refused(text, emphasis):
    with pytest.raises(ValueError, match=r"expected (a number as a weight, found ':|at most 500 brackets)"):
        parse(text, 4, emphasis)


def test_a_weight_at_the_end_of_a_prompt():
    assert lone_weight("at 10:30 ") == ":30"
    assert lone_weight("a AND b:2") is lone_weight("(a:2)") is None


@pytest.mark.parametrize(
    "text", ["(" * 10_000, "[" * 5000 + "]" * 5000, "[a|" * 3000, "\\" * 9999, ": " * 5000, " " * 10_000 + "AND"]
)
def test_prompts_of_brackets_alone_take_no_time(text):
    for emphasis in ("original", "none"):
        assert parse(text, 20, emphasis).parts


# --- chunks ---------------------------------------------------------------------------------------------------------------------

CAT, DOG = 2368, 1929


def lengths(text: str) -> list[int]:
    pieces = weighted(text)
    return [
        len(tokens)
        for tokens in at_commas([(piece, [[(token, piece.weight)] for token in encode(piece.text)]) for piece in pieces])
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 55 + ", " + "cat " * 20, [56, 20]),  # a comma at 55: 20 from the end
        ("cat " * 54 + ", " + "cat " * 21, [75, 1]),  # at 54 it is too far
        ("cat " * 55 + "," + " cat" * 19, [75]),  # full, and nothing follows
        ("cat " * 74 + ", cat", [75, 1]),  # a comma that ends the chunk moves nothing
        ("cat " * 75 + ", cat", [75, 2]),  # one that comes as the 76th opens the next
        ("cat " * 60 + ", " + "cat " * 5 + ", " + "cat " * 20, [67, 20]),  # the last of them
        ("cat " * 60 + ". " + "cat " * 20, [75, 6]),  # nothing but commas
        ("cat " * 60 + ", " + "cat " * 76, [61, 75, 1]),  # what has moved carries none
        ("cat BREAK dog", [1, 1]),
        ("BREAK cat", [0, 1]),
        ("cat BREAK", [1]),
        ("BREAK", [0]),
        ("cat BREAK BREAK dog", [1, 0, 1]),
        ("(cat BREAK dog:1.2)", [3]),
    ],
)
def test_where_a_long_text_is_cut(text, wanted):
    assert lengths(text) == wanted


def test_weights_stay_with_their_tokens():
    text = "cat " * 60 + ", " + "cat " * 10 + "(dog:1.5) " + "cat " * 10
    first, second = chunked(weighted(text), "original", END_ID)
    assert first.ids == (START_ID, *[CAT] * 60, COMMA, *[END_ID] * 15)
    assert first.weights == (1.0,) * 77
    assert second.ids[:22] == (START_ID, *[CAT] * 10, DOG, *[CAT] * 10)
    assert second.weights == (*[1.0] * 11, 1.5, *[1.0] * 65)
    assert encode(",") == [COMMA]


def test_what_fills_up():
    for pad in (END_ID, 0):
        (plain,) = chunked([Piece("a cat")], "original", pad)
        assert list(plain.ids) == tokenize(["a cat"], pad)[0]
    typed = [Piece("cat <|endoftext|> dog")]
    assert chunked(typed, "original", 0)[0].ids[:5] == (START_ID, CAT, END_ID, 0, 0)  # all after the first end
    assert chunked(typed, "original", END_ID)[0].ids[:5] == (START_ID, CAT, END_ID, DOG, END_ID)
    for emphasis in ("comfy", "plain"):
        assert chunked(typed, emphasis, 0)[0].ids[:6] == (START_ID, CAT, END_ID, DOG, END_ID, 0)
    assert len(closed([(CAT, 1.0)] * 75, "original", 0).ids) == 77


def test_a_literal_text_is_cut_as_it_was_before_there_was_a_grammar():
    text = "cat " * 70 + ", dog BREAK (dog:1.2) " + "cat " * 90
    for pad in (END_ID, 0):
        chunks = chunked([Piece(text)], "plain", pad)
        assert [token for chunk in chunks for token in chunk.ids] == tokenize([text], pad)[0]


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ([100], [75, 25]),
        ([70, 7, 3], [70, 10]),  # 7 tokens are kept whole
        ([70, 8, 3], [75, 6]),  # 8 are cut
        ([75, 1], [75, 1]),
        ([70, 5, 80], [75, 75, 5]),
        ([], [0]),
    ],
)
def test_where_comfyui_cuts(groups, wanted):
    pairs = [(Piece(""), [[(CAT, 1.0)]] * count) for count in groups]
    assert [len(tokens) for tokens in by_segments(pairs)] == wanted


def test_break_is_a_piece_of_its_own():
    assert weighted("a BREAK b")[1] == BREAK
