"""Reading a pickle without running anything that it says.

A pickle is a program for a machine with a stack, and two of its instructions import and call whatever they name.  Here is a
machine in which they only take notes: nothing is imported, nothing of the file's choice is called, and no tensor is made.
What it does not know is refused, never handed on to a machine that knows more.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from typing import Any

MAX_STEPS = 600_000  # instructions; 10,000 tensors take 450,000

NONSENSE = (ValueError, LookupError, TypeError, Warning)  # how a pickle ends that is broken; pickletools may warn
DAMAGED = "copy or download it again"
CONVERT = "get this model as .safetensors, or convert it where you trust it"

# What the pickle of a checkpoint may name, by module and name: storages, the calls that `Machine.call` understands, ...
STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        **{"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16"},
        **{"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"},
    }.items()
}
ORDERED_DICT = ("collections", "OrderedDict")
TENSOR, PARAMETER = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter")
# ... and what stands beside the weights in files that trainers saved.  All of it becomes UNUSED.
BESIDE = {
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.utilities.parsing", "AttributeDict"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("_codecs", "encode"),
    ("__builtin__", "set"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16")),
}
KNOWN = STORAGES.keys() | BESIDE | {ORDERED_DICT, TENSOR, PARAMETER}


class UnreadableError(ValueError):
    """Why a file is refused, and what to do."""

    def __init__(self, reason: str, hint: str = DAMAGED, key: str | None = None) -> None:
        super().__init__(reason)
        self.hint, self.key = hint, key[:200] if key else key


@dataclass(frozen=True)
class Global:
    """A name that the pickle asks Python for, and does not get."""

    module: str
    name: str


class Unused:
    """What became of everything that no weight needs; it swallows what is put into it."""


UNUSED = Unused()


@dataclass(frozen=True)
class Storage:
    """Numbers in a row that one or more tensors are views of."""

    dtype: str
    key: str  # names the record in the file
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor as the pickle describes it, checked for nothing yet."""

    storage: Storage
    offset: Any  # in elements
    shape: Any
    stride: Any


class Machine:
    """Runs a pickle: dicts, lists, numbers and texts come out as they are, tensors as View, everything else as UNUSED."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.unknown: dict[Global, None] = {}  # a set in the order of finding

    def run(self, source: io.BytesIO) -> Any:
        """What the pickle at `source` leaves behind.  Raises one of NONSENSE, of which UnreadableError is one."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
                if count == MAX_STEPS:
                    raise UnreadableError(f"has a pickle of more than {MAX_STEPS:,} instructions", CONVERT)
                self.step(opcode.name, argument)
        except NONSENSE:
            if not self.unknown:  # else that is what the user must hear of
                raise
        if self.unknown:
            names = [ascii(f"{name.module}.{name.name}")[1:-1][:80] for name in list(self.unknown)[:5]]
            listed = ", ".join(names) + (f", … ({len(self.unknown)} in all)" if len(self.unknown) > 5 else "")
            raise UnreadableError(f"its pickle asks for {listed}, which no weights need; nothing was run", CONVERT)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """One instruction, by its name in pickletools: here those that bring or keep a value; `combine` has the others."""
        push = self.stack.append
        match name:
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BININT1" | "BININT2" | "BININT" | "LONG1" | "BINFLOAT" | "NONE":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                push(argument)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[name]())
            case "GLOBAL":
                self.name(*argument.split(" ", 1))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                self.combine(name)

    def combine(self, name: str) -> None:
        """An instruction that works on what is on the stack already.  Raises UnreadableError for those that are not known."""
        match name:
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "TUPLE":
                items = self.to_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(reversed([self.stack.pop() for _ in range(int(name[-1]))])))
            case "REDUCE" | "NEWOBJ":
                self.call(self.stack.pop(-2), self.stack.pop())
            case "BINPERSID":
                self.refer(self.stack.pop())
            case "APPEND":
                self.extend([self.stack.pop()])
            case "APPENDS":
                self.extend(self.to_mark())
            case "SETITEM":
                self.update([self.stack.pop(-2), self.stack.pop()])
            case "SETITEMS":
                self.update(self.to_mark())
            case "STACK_GLOBAL":
                self.name(self.stack.pop(-2), self.stack.pop())
            case "BUILD":
                self.stack.pop()  # attributes of a dict, such as the _metadata of a module's state, or of something UNUSED
                self.accepts(self.stack[-1], dict)
            case _:
                raise UnreadableError(f"its pickle uses the instruction {name}, which torch.save does not write", CONVERT)

    def to_mark(self) -> list[Any]:
        """Takes everything above the topmost mark off the stack."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def accepts(self, target: Any, kind: type) -> bool:
        """Whether something may be put into `target`; False if it is UNUSED, and UnreadableError if it is neither."""
        if type(target) is not kind and target is not UNUSED:
            raise UnreadableError(f"its pickle takes a {type(target).__name__} for a {kind.__name__}")
        return target is not UNUSED

    def extend(self, items: list[Any]) -> None:
        if self.accepts(self.stack[-1], list):
            self.stack[-1].extend(items)

    def update(self, items: list[Any]) -> None:
        """Puts key, value, key, value, … into the dict on the stack.  Only keys that are texts lead to weights."""
        target = self.stack[-1]
        if not self.accepts(target, dict):
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str:
                if key in target:
                    raise UnreadableError("occurs twice", CONVERT, key)
                target[key] = value

    def name(self, module: Any, name: Any) -> None:
        if not (type(module) is str and type(name) is str):
            raise UnreadableError("its pickle asks for a name that is no text")
        found = Global(module, name)
        if (module, name) not in KNOWN:
            self.unknown[found] = None
        self.stack.append(found)

    def call(self, function: Any, arguments: Any) -> None:
        """What the pickle wants called is recognised by its name; this machine calls none of it."""
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise UnreadableError("its pickle calls something that is no function")
        match (function.module, function.name), arguments:
            case (pair, ()) if pair == ORDERED_DICT:
                self.stack.append({})
            case (pair, (Storage() as storage, offset, shape, stride, _, _, *more)) if pair == TENSOR and not any(more):
                self.stack.append(View(storage, offset, shape, stride))
            case (pair, (View() as view, _, _)) if pair == PARAMETER:
                self.stack.append(view)
            case (pair, _) if pair in (ORDERED_DICT, TENSOR, PARAMETER):
                raise UnreadableError(
                    f"its pickle describes a tensor or a dict in a way that torch.save does not ({function.name})"
                )
            case _:
                self.stack.append(UNUSED)

    def refer(self, reference: Any) -> None:
        """A reference to a storage: ("storage", its type, its key, the device it was on, how many elements)."""
        match reference:
            case ("storage", Global(module, name), str(key), str(), int(numel), *views) if views in ([], [None]):
                if (module, name) not in STORAGES or numel < 0:
                    raise UnreadableError(f"its storage {ascii(key)[:80]} is of a type that minisd does not know", CONVERT)
                storage = Storage(STORAGES[module, name], key, numel)
                self.storages[key] = storage
                self.stack.append(storage)
            case _:
                raise UnreadableError("its pickle refers to a storage in a way that torch.save does not")
