"""What the programs that write checkpoints add, rename and leave out: the table of writers_table.py, done to a file.

Names are made right when a file is opened, in its list of tensors alone, so that drawing, merging, converting and comparing all
see the same names.  Nothing here imports torch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..errors import CheckpointError, shown
from ..models.family import UNET, VAE, Family
from .entry import Entry
from .writers_table import ADDED, CONV_IN, LEFT_OUT, NAMED, TEXT, Row

WRAPPERS = ("model.", "module.", "state_dict.", f"{UNET}.")  # the likeliest first, where a file has several
HOPS = 6  # by so many rows a tensor gets its usual name at most: wrappers stand in one another

# The names of the networks' own tensors, for those who ask without building them: a test holds them against the modules.
BLOCK = r"(norm[12]|conv[12]|nin_shortcut)"
NETWORKS = [
    rf"{UNET}\.(time_embed|label_emb\.0|out)\.\d",
    rf"{UNET}\.((in|out)put_blocks\.\d+|middle_block)\.\d"
    r"(\.(op|conv|norm|proj_(in|out)|skip_connection|(in|out|emb)_layers\.\d"
    r"|transformer_blocks\.\d+\.(norm[123]|attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))))?",
    rf"{VAE}\.(post_)?quant_conv",
    rf"{VAE}\.(en|de)coder\.(conv_in|conv_out|norm_out|mid\.block_[12]\.{BLOCK}|mid\.attn_1\.(norm|q|k|v|proj_out)"
    rf"|(down|up)\.\d+\.(block\.\d+\.{BLOCK}|(down|up)sample\.conv))",
    rf"{TEXT}\.transformer\.text_model\.(embeddings\.(token|position)_embedding|final_layer_norm"
    r"|encoder\.layers\.\d+\.(layer_norm[12]|mlp\.fc[12]|self_attn\.([qkv]|out)_proj))",
    rf"{TEXT}\.model\.(token_embedding|ln_final|transformer\.resblocks\.\d+\.(ln_[12]|attn\.out_proj|mlp\.c_(fc|proj)))",
]
SINGLE = rf"{TEXT}\.model\.(positional_embedding|text_projection|transformer\.resblocks\.\d+\.attn\.in_proj_(weight|bias))"

_ASKED_FOR = re.compile(rf"({'|'.join(NETWORKS)})\.(weight|bias)|{SINGLE}")
_UNNEEDED = re.compile("|".join(f"(?:{row.pattern})" for row in ADDED))


def is_unneeded(key: str) -> bool:
    return _UNNEEDED.fullmatch(key) is not None


def is_bookkeeping(key: str) -> bool:
    """What nobody needs, apart from the averages of weights, which --ema draws with: numbers that may be anything."""
    return is_unneeded(key) and not re.match(r"model_ema\.(?!(decay|num_updates)$)", key)


def is_asked_for(key: str) -> bool:
    """Whether a name is one that a network's tensors have; which of them it has, its modules say (model.py)."""
    return _ASKED_FOR.fullmatch(key) is not None


def row_of(key: str) -> Row:
    """The row of an unneeded tensor, which says what it is and who adds it."""
    return next(row for row in ADDED if re.fullmatch(row.pattern, key))


def usual_names(entries: Mapping[str, Entry]) -> dict[str, tuple[str, Entry]]:
    """The tensors of a file by their usual names: (the name in the file, the entry), in alphabetical order.

    A tensor keeps its name where the usual one is taken.  Of those that lie one above the other, the name of the first.
    """
    wrapper = wrapper_of(entries)
    rows = rows_for(frozenset(key.removeprefix(wrapper) for key in entries))
    some = any_of(rows)
    found: dict[str, tuple[str, Entry]] = {}
    stacks: dict[str, dict[str, str]] = {}  # by the usual name, and q, k or v, the name in the file
    for key, entry in entries.items():
        inside = key.removeprefix(wrapper)
        usual = usual_name(inside, rows) if some.fullmatch(inside) else Usual(inside)
        if usual.part:
            stacks.setdefault(usual.name, {})[usual.part] = key
        elif usual.name != key and (usual.name in entries or usual.name in found or not usual.name):
            found[key] = (key, entry)
        else:
            found[usual.name] = (key, REMADE[usual.does](entry) if usual.does else entry)
    for name, keys in stacks.items():
        stack = stacked([entries[keys[part]] for part in "qkv" if part in keys])
        taken = name in entries or name in found
        found |= {name: (keys["q"], stack)} if stack and not taken else {key: (key, entries[key]) for key in keys.values()}
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Usual:
    """What a tensor is usually called, and what its row does to it besides."""

    name: str
    does: str = ""
    part: str = ""  # of a stack: q, k or v
    rows: tuple[Row, ...] = ()


def usual_name(key: str, rows: Sequence[Row]) -> Usual:
    usual = Usual(key)
    for _ in range(HOPS):
        matches = ((row, re.fullmatch(row.pattern, usual.name)) for row in rows if row.does != "flattened" or not usual.does)
        row, match = next(((row, match) for row, match in matches if match), (None, None))
        if row is None or match is None:
            break
        does = usual.does if row.does == "renamed" else row.does
        usual = Usual(match.expand(row.what), does, match.groupdict().get("part", ""), (*usual.rows, row))
    return usual


def rows_for(keys: frozenset[str]) -> tuple[Row, ...]:
    """The rows of other names that hold for a file with these."""
    return tuple(row for row in NAMED if (not row.when or row.when in keys) and not (row.unless and row.unless in keys))


@cache
def any_of(rows: tuple[Row, ...]) -> re.Pattern[str]:
    """Matches what one of the rows does.  Most tensors are the UNet's, which no row but that of torch.compile does."""
    some = "|".join(f"(?:{row.pattern.replace('?P<part>', '')})" for row in rows)
    return re.compile(rf"(?!{re.escape(UNET)}\.(?!.*_orig_mod\.))(?:{some})")


def written_by(names: Mapping[str, str]) -> dict[Row, list[str]]:
    """By the rows that hold of a file, its tensors of which they do, as they are called in the file.

    names: by the usual name of every tensor the one in the file.
    """
    wrapper = wrapper_of(names.values())
    inside = {name: own.removeprefix(wrapper) for name, own in names.items()}
    rows = rows_for(frozenset(inside.values()))
    found: dict[Row, list[str]] = {}
    for name, own in names.items():
        ways = [usual_name(each, rows) for each in (own, inside[name])] if own != name else []
        way = next((way for way in ways if way.name == name), Usual(name))
        named = [row for row in way.rows if row.does != "flattened"]
        for row in (*named, *([row_of(name)] if is_unneeded(name) else [])):
            found.setdefault(row, []).append(own)
    return found


def wrapper_of(keys: Iterable[str]) -> str:
    """The name below which a whole checkpoint stands, or its UNet: "model." of a {"model": …}, "module.", a doubled prefix
    (stable-diffusion.cpp#434); nothing where there is none."""
    keys = set(keys)
    found = {key.removesuffix(CONV_IN) for key in keys if key.endswith(f".{CONV_IN}")}
    if CONV_IN in keys or not found:
        return ""
    return next((name for name in WRAPPERS if name in found), min(found))


def transposed(entry: Entry) -> Entry:
    """The same numbers with the axes in the other order."""
    if len(entry.shape) != 2:
        return entry
    return replace(entry, shape=entry.shape[::-1], stride=(entry.stride or (entry.shape[1], 1))[::-1])


def flattened(entry: Entry) -> Entry:
    """The same numbers without the axes behind the first, if those are of length 1."""
    if len(entry.shape) < 2 or entry.numel != entry.shape[0]:
        return entry
    return replace(entry, shape=entry.shape[:1], stride=entry.stride and entry.stride[:1])


def stacked(entries: Sequence[Entry]) -> Entry | None:
    """q, k and v as one, in this order, which lies in three places; None if they do not fit."""
    first, *others = entries
    alike = len({(entry.dtype, entry.shape) for entry in entries}) == 1 and all(entry.in_one_piece for entry in entries)
    if len(entries) != 3 or not alike or not first.shape:
        return None
    return replace(first, shape=(3 * first.shape[0], *first.shape[1:]), others=tuple(entry.offset for entry in others))


REMADE = {"turned": transposed, "flattened": flattened}


def may_be_left_out(key: str) -> Row | None:
    """The row of a tensor that the modules can be built without, or that other files bring."""
    return next((row for row in LEFT_OUT if row.does == "left out" and re.fullmatch(row.pattern, key)), None)


def left_out(entries: Iterable[str], family: Family) -> dict[str, Row]:
    """What a writer leaves out, and is missing for drawing."""
    found = set(entries)
    needed = {f"{tower.name}.text_projection" for tower in family.towers if tower.pooled}
    if f"{VAE}.decoder.conv_in.weight" in found:  # a VAE that is not there at all may come from another file
        needed |= {f"{VAE}.{name}.weight" for name in ("quant_conv", "post_quant_conv")}
    return {key: row for key in sorted(needed - found) if (row := may_be_left_out(key))}


def check_nothing_left_out(path: Path, entries: Iterable[str], family: Family) -> None:
    """Raises CheckpointError if something is left out."""
    for key, row in left_out(entries, family).items():
        raise CheckpointError(path, f"is missing, without which {family.title} cannot be drawn with", row.what, key)


def torn(unknown: Iterable[str], found: Iterable[str]) -> bool:
    """Whether tensors that no module asks for are what is left of one: a network's bias without the weight.

    The modules are built as the file has it, so that without a weight the whole layer is left out, and its bias unknown.
    """
    return any(is_asked_for(key) and key.removesuffix("bias") + "weight" not in found for key in unknown if key.endswith(".bias"))


def tell_extra(path: Path, keys: Iterable[str]) -> None:
    """Warns of tensors that no module asks for: the first ten by name, and how many they are."""
    names = sorted(keys)
    tensors = f"{len(names):,} tensors are" if len(names) > 1 else "1 tensor is"
    them = "them" if len(names) > 1 else "it"
    listed = shown(", ".join(names[:10]), 800) + (", …" if len(names) > 10 else "")
    warnings.warn(f"{path}: {tensors} not used, since no part of the model asks for {them}: {listed}", stacklevel=2)
