"""Reading a pickle without running anything that it says.

A pickle is a program for a machine with a stack, and two of its instructions import and call whatever they name.  Here is a
machine in which they only take notes: nothing is imported, nothing of the file's choice is called, and no tensor is made.
Objects beside the weights are passed over.  An unknown call is refused, never handed on to a machine that knows more.
"""

from __future__ import annotations

import io
import pickletools
import sys
from dataclasses import dataclass
from typing import Any

MAX_STEPS = 600_000  # instructions; 10,000 tensors take 450,000

NONSENSE = (ValueError, LookupError, TypeError, Warning)  # how a pickle ends that is broken; pickletools may warn
DAMAGED = "copy or download it again"
CONVERT = "get this model as .safetensors, or convert it where you trust it"

# What the pickle of a checkpoint may have called, by module and name: storages, the calls that make tensors and dicts, ...
STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        **{"Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16"},
        **{"Long": "I64", "Int": "I32", "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL"},
    }.items()
} | {("torch.storage", "UntypedStorage"): "U8"}
ORDERED_DICT, DEFAULT_DICT = ("collections", "OrderedDict"), ("collections", "defaultdict")
TENSOR, UNTYPED = ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")
DTYPES = {("torch", "float8_e4m3fn"): "F8_E4M3", ("torch", "float8_e5m2"): "F8_E5M2"}  # that an untyped storage is read as
PARAMETERS = {("torch._utils", "_rebuild_parameter"), ("torch._utils", "_rebuild_parameter_with_state")}
ATTRIBUTES = ("torch._tensor", "_rebuild_from_type_v2")  # a tensor that somebody hung something on
PLAIN_TYPES = {("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch.nn.parameter", "Buffer")}
# ... and what makes the plain data beside the weights in files that trainers saved.  All of it becomes Unused.
PYTHON = {
    "collections": "Counter deque UserDict UserList",
    "argparse": "Namespace",
    "types": "SimpleNamespace GenericAlias",
    "datetime": "datetime date time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID SafeUUID",
    "functools": "partial",
    "typing": "Any Union Optional Callable Literal Dict List Tuple Set Sequence Mapping Type",
    "random": "Random",
    "array": "array _array_reconstructor",
    "_codecs": "encode",
    **dict.fromkeys(("pathlib", "pathlib._local"), "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath"),
    **dict.fromkeys(("copyreg", "copy_reg"), "_reconstructor"),
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        "object dict list tuple set frozenset int float complex bool str bytes bytearray range xrange slice long unicode "
        "type Ellipsis NotImplemented",
    ),
}
OTHERS = {
    "torch": "Size device",
    "torch.serialization": "_get_layout",
    "numpy": "dtype ndarray",
    **{f"numpy.{core}.multiarray": "scalar _reconstruct" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric": "_frombuffer" for core in ("core", "_core")},
    "numpy.random._pickle": "__generator_ctor __bit_generator_ctor __randomstate_ctor",
    "numpy.random.bit_generator": "__pyx_unpickle_SeedSequence",
}
BESIDE = {(module, name) for module, names in (PYTHON | OTHERS).items() for name in names.split()}
TYPES = {("_operator", "getitem"), ("operator", "getitem")}
KNOWN = STORAGES.keys() | TYPES | BESIDE | PARAMETERS | {ORDERED_DICT, DEFAULT_DICT, TENSOR, UNTYPED, ATTRIBUTES}
SYSTEM = sys.stdlib_module_names | {"__builtin__", "copy_reg", ""}  # in which a name that is not known bodes no good


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


PARAMETER_DICT = Global("torch.nn.modules.container", "ParameterDict")


@dataclass(frozen=True)
class Unused:
    """What became of an object that no weight needs; it swallows what is put into it."""

    of: Global | None = None  # its class, or what would have made it


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
    dtype: str
    offset: Any  # in elements
    shape: Any
    stride: Any


class Machine:
    """Runs a pickle: dicts, lists, numbers and texts come out as they are, tensors as View, everything else as Unused."""

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
            names = [shown_name(name) for name in list(self.unknown)[:5]]
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
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES" | "BYTEARRAY8":
                push(argument)
            case "NEWTRUE" | "NEWFALSE":
                push(name == "NEWTRUE")
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                push({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[name]())
            case "EMPTY_SET":
                push(Unused())
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
            case "FROZENSET":
                self.to_mark()
                self.stack.append(Unused())
            case "REDUCE":
                self.call(self.stack.pop(-2), self.stack.pop())
            case "NEWOBJ":
                self.make(self.stack.pop(-2), self.stack.pop())
            case "BINPERSID":
                self.refer(self.stack.pop())
            case "APPEND":
                self.extend([self.stack.pop()])
            case "APPENDS":
                self.extend(self.to_mark())
            case "ADDITEMS":
                self.to_mark()
                self.accepts(self.stack[-1], set)
            case "SETITEM":
                self.update([self.stack.pop(-2), self.stack.pop()])
            case "SETITEMS":
                self.update(self.to_mark())
            case "STACK_GLOBAL":
                self.name(self.stack.pop(-2), self.stack.pop())
            case "BUILD":
                # attributes of a dict, such as the _metadata of a module's state, or of something unused
                attributes, target = self.stack.pop(), self.stack[-1]
                self.accepts(target, dict)
                if target == Unused(PARAMETER_DICT) and type(attributes) is dict:  # the first embeddings of textual inversion
                    self.stack[-1] = attributes.get("_parameters", target)
            case _:
                raise UnreadableError(f"its pickle uses the instruction {name}, which torch.save does not write", CONVERT)

    def to_mark(self) -> list[Any]:
        """Takes everything above the topmost mark off the stack."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def accepts(self, target: Any, kind: type) -> bool:
        """Whether something may be put into `target`; False if it is Unused, and UnreadableError if it is neither."""
        if type(target) is not kind and type(target) is not Unused:
            raise UnreadableError(f"its pickle takes a {type(target).__name__} for a {kind.__name__}")
        return type(target) is kind

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
        """A class or a function that the pickle names.  That alone is harmless; in Python's own modules it must be known."""
        if not (type(module) is str and type(name) is str):
            raise UnreadableError("its pickle asks for a name that is no text")
        found = Global(module, name)
        if (module, name) not in KNOWN and (module.split(".")[0] in SYSTEM or "." in name):
            self.unknown[found] = None
        self.stack.append(found)

    def make(self, kind: Any, arguments: Any) -> None:
        """An object of which pickle knows no more than its class and its attributes, which follow: nothing is called for it."""
        if isinstance(kind, Global) and (kind.module, kind.name) not in KNOWN and type(arguments) is tuple:
            self.stack.append(Unused(kind))
        else:
            self.call(kind, arguments)

    def call(self, function: Any, arguments: Any) -> None:
        """What the pickle wants called is recognised by its name; this machine calls none of it."""
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise UnreadableError("its pickle calls something that is no function")
        match (function.module, function.name), arguments:
            case (pair, ()) if pair == ORDERED_DICT:
                self.stack.append({})
            case (pair, () | (_,)) if pair == DEFAULT_DICT:
                self.stack.append({})
            case (pair, _) if pair in (TENSOR, UNTYPED):
                self.stack.append(self.view(pair, arguments))
            case (pair, (View() as view, *_)) if pair in PARAMETERS:
                self.stack.append(view)
            case (pair, (Global(module, name), Global() as kind, tuple(inner), _)) if pair == ATTRIBUTES:
                if (kind.module, kind.name) not in PLAIN_TYPES:
                    self.unknown[kind] = None
                self.stack.append(self.view((module, name), inner))
            case (pair, _) if pair in (ORDERED_DICT, ATTRIBUTES, *PARAMETERS):
                raise otherwise(function.name)
            case _:
                if (function.module, function.name) not in BESIDE and not made_of_data(function, arguments):
                    self.unknown[function] = None
                self.stack.append(Unused(function))

    def view(self, function: tuple[str, str], arguments: tuple[Any, ...]) -> View:
        """The tensor that one of torch's own functions would make."""
        match function, arguments:
            case (pair, (Storage() as storage, offset, shape, stride, _, _, *more)) if pair == TENSOR and not any(more):
                return View(storage, storage.dtype, offset, shape, stride)
            case (pair, (Storage() as storage, offset, shape, stride, _, _, Global(module, name), *more)) if (
                pair == UNTYPED and storage.dtype == "U8" and not any(more)
            ):
                if (module, name) not in DTYPES:
                    self.unknown[Global(module, name)] = None
                return View(storage, DTYPES.get((module, name), "U8"), offset, shape, stride)
            case _:
                raise otherwise(function[1])

    def refer(self, reference: Any) -> None:
        """A reference to a storage: ("storage", its type, its key, the device it was on, how many elements)."""
        match reference:
            case ("module", Global() as kind, *_):  # before PyTorch 1.6: a class, and its source beside it
                self.stack.append(kind)
            case ("storage", Global(module, name) as kind, str(key), str(), int(numel), *views) if views in ([], [None]):
                if (module, name) not in STORAGES:
                    self.unknown[kind] = None
                if (module, name) not in STORAGES or numel < 0:
                    raise UnreadableError(f"its storage {ascii(key)[:80]} is of no type or size that torch.save writes", CONVERT)
                storage = Storage(STORAGES[module, name], key, numel)
                self.storages[key] = storage
                self.stack.append(storage)
            case _:
                raise UnreadableError("its pickle refers to a storage in a way that torch.save does not")


def shown_name(name: Global) -> str:
    return ascii(f"{name.module}.{name.name}")[1:-1][:80]


def otherwise(name: str) -> UnreadableError:
    return UnreadableError(f"its pickle describes a tensor or a dict in a way that torch.save does not ({name[:80]!a})")


def made_of_data(function: Global, arguments: tuple[Any, ...]) -> bool:
    """Whether a call is that of a member of somebody's own enumeration (its class, and the member's value), or of a type with
    its parameters, such as Dict[str, int]."""
    match (function.module, function.name), arguments:
        case pair, (Global(module="typing"), _):
            return pair in TYPES
        case (module, name), (str() | int(),):
            return module.split(".")[0] not in SYSTEM and name.lstrip("_")[:1].isupper()
    return False
