"""PTX instructions as lines of Python over NumPy arrays, one element per thread (PTX ISA 8.7).

Registers hold unsigned bits; the opcode's type gives the view.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.ptx_block import SHARED_BASE

Operation = Callable[["Emit", list[str]], list[str]]
TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")},
    "pred": np.dtype("?"),
}
# Types by name prefix.
REGISTERS = {"%p": "pred", "%rs": "u16", "%r": "u32", "%rd": "u64", "%f": "u32", "%fd": "u64", "%h": "u16"}
SPECIAL = {"%tid.x": "B.thread", "%ctaid.x": "B.block"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def register_type(name: str) -> str:
    """The unsigned type."""
    return REGISTERS[re.match(r"%[a-z]+", name).group()]  # type: ignore[union-attr]


class Emit:
    """One instruction: opcode parts, guard, constants."""

    def __init__(self, parts: list[str], guard: str | None, constants: dict[str, Any], threads: int) -> None:
        self.parts, self.guard, self.constants, self.threads = parts, guard, constants, threads

    @property
    def type(self) -> str:
        return self.parts[-1]

    def constant(self, value: Any) -> str:
        key = f"{value.dtype.str}{value.tobytes().hex()}"
        name = f"K_{re.sub('[^0-9a-z]', '_', key)}"
        self.constants[name] = np.broadcast_to(value, (self.threads,))
        return name

    def read(self, operand: str, kind: str) -> str:
        """The operand viewed as ``kind``."""
        if kind == "bf16":
            return f"({self.read(operand, 'u16')}.astype(np.uint32) << 16).view(np.float32)"
        dtype = TYPES[kind]
        if operand in SPECIAL:
            return f"{SPECIAL[operand]}.astype(np.{TYPES[kind].name})"
        if operand.startswith("%"):
            own = TYPES[register_type(operand)]
            expression = f"R[{operand!r}]"
            if own == dtype or kind == "pred":
                return expression
            if own.itemsize == dtype.itemsize:
                return f"{expression}.view(np.{dtype.name})"
            return f"{expression}.astype(np.u{'int'}{dtype.itemsize * 8}).view(np.{dtype.name})"
        if operand == "global_smem":
            return self.constant(np.array(SHARED_BASE, dtype))
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
            return self.constant(np.array(int(match.group(1), 16), np.uint32).view(dtype))
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
            return self.constant(np.array(int(match.group(1), 16), np.uint64).view(dtype))
        number = int(operand.rstrip("U"), 0)
        if kind == "pred":
            return self.constant(np.array(bool(number)))
        bits = number & ((1 << (8 * dtype.itemsize)) - 1)
        return self.constant(np.array(bits, np.dtype(f"u{dtype.itemsize}")).view(dtype))

    def write(self, register: str, expression: str, kind: str) -> list[str]:
        """Assigns a value of ``kind`` where the guard holds."""
        if not register.startswith("%"):
            return []  # "_" or a discarded name
        own, given = TYPES[register_type(register)], TYPES[kind]
        if own != given:
            if own.itemsize == given.itemsize:
                expression = f"({expression}).view(np.{own.name})"
            elif kind.startswith("s"):
                expression = f"({expression}).astype(np.int{own.itemsize * 8}).view(np.{own.name})"
            else:
                expression = f"({expression}).view(np.uint{given.itemsize * 8}).astype(np.{own.name})"
        if self.guard is not None:
            expression = f"np.where({self.guard}, {expression}, B.previous_value({register!r}, np.{own.name}))"
        return [f"R[{register!r}] = {expression}"]

    def active(self) -> str:
        return f"{self.guard} & B.active" if self.guard else "B.active"


def simple(template: str) -> Operation:
    """Operands and result have the opcode's type; {0}, {1}: sources."""

    def operation(emit: Emit, operands: list[str]) -> list[str]:
        target, *sources = operands
        return emit.write(target, template.format(*(emit.read(s, emit.type) for s in sources)), emit.type)

    return operation


def flushed(template: str) -> Operation:
    """.ftz flushes subnormals to zero."""
    plain = simple(template)

    def operation(emit: Emit, operands: list[str]) -> list[str]:
        if "ftz" not in emit.parts:
            return plain(emit, operands)
        target, *sources = operands
        read = [f"{FLUSH}({emit.read(s, emit.type)})" for s in sources]
        return emit.write(target, f"{FLUSH}({template.format(*read)})", emit.type)

    return operation


FLUSH = "B.flush"


def shift(left: bool) -> Operation:
    """Counts beyond the width leave zero, or the sign of a signed right shift."""

    def operation(emit: Emit, operands: list[str]) -> list[str]:
        kind = emit.type
        bits = 8 * TYPES[kind].itemsize
        value, count = emit.read(operands[1], kind), emit.read(operands[2], "u32")
        name = TYPES[kind].name
        clamped = f"np.minimum({count}, np.uint32({bits - 1})).astype(np.{name})"
        result = f"{value} {'<<' if left else '>>'} {clamped}"
        if not kind.startswith("s"):
            result = f"np.where({count} < {bits}, {result}, np.{name}(0))"
        return emit.write(operands[0], result, kind)

    return operation


def multiply(emit: Emit, operands: list[str]) -> list[str]:
    """mul and mad: .lo, .hi, .wide or floating point."""
    kind, (target, *sources) = emit.type, operands
    if "wide" in emit.parts:
        wide = f"{kind[0]}{int(kind[1:]) * 2}"
        a, b = (f"{emit.read(s, kind)}.astype(np.{TYPES[wide].name})" for s in sources[:2])
        addend = f" + {emit.read(sources[2], wide)}" if len(sources) > 2 else ""
        return emit.write(target, f"{a} * {b}{addend}", wide)
    a, b, *c = (emit.read(s, kind) for s in sources)
    addend = f" + {c[0]}" if c else ""
    if "hi" in emit.parts:
        return emit.write(target, f"B.high_product({a}, {b}){addend}", kind)
    return emit.write(target, f"{a} * {b}{addend}", kind)


def fused(emit: Emit, operands: list[str]) -> list[str]:
    """fma."""
    a, b, c = (emit.read(s, emit.type) for s in operands[1:])
    wide = "np.float64" if emit.type == "f32" else "np.longdouble"
    product = f"{a}.astype({wide}) * {b} + {c}"
    return emit.write(operands[0], f"({product}).astype(np.{TYPES[emit.type].name})", emit.type)


def divide(emit: Emit, operands: list[str]) -> list[str]:
    """div."""
    a, b = (emit.read(s, emit.type) for s in operands[1:])
    if emit.type.startswith("f"):
        return emit.write(operands[0], f"{a} / {b}", emit.type)
    return emit.write(operands[0], f"B.quotient({a}, {b})", emit.type)


def remainder(emit: Emit, operands: list[str]) -> list[str]:
    """rem."""
    a, b = (emit.read(s, emit.type) for s in operands[1:])
    return emit.write(operands[0], f"{a} - B.quotient({a}, {b}) * {b}", emit.type)


def compare(emit: Emit, operands: list[str]) -> list[str]:
    """setp. With NaN, ordered comparisons are false, unordered (…u) true."""
    how, kind = emit.parts[1], emit.type
    a, b = (emit.read(s, kind) for s in operands[1:3])
    if how in ("num", "nan"):
        result = f"np.isnan({a}) | np.isnan({b})"
        result = f"~({result})" if how == "num" else result
    elif "f" in kind and how.endswith("u"):
        result = f"({a} {COMPARISONS[how[:-1]]} {b}) | np.isnan({a}) | np.isnan({b})"
    elif "f" in kind and how == "ne":
        result = f"({a} != {b}) & ~np.isnan({a}) & ~np.isnan({b})"
    else:
        result = f"{a} {COMPARISONS[how]} {b}"
    for combined, sign in (("and", "&"), ("or", "|"), ("xor", "^")):
        if combined in emit.parts[2:]:
            result = f"({result}) {sign} {emit.read(operands[3], 'pred')}"
    target, *inverse = operands[0].split("|")
    lines = emit.write(target.strip(), result, "pred")
    return lines + (emit.write(inverse[0].strip(), f"~({result})", "pred") if inverse else [])


def select(emit: Emit, operands: list[str]) -> list[str]:
    """selp."""
    target, a, b, predicate = operands
    values = f"{emit.read(a, emit.type)}, {emit.read(b, emit.type)}"
    return emit.write(target, f"np.where({emit.read(predicate, 'pred')}, {values})", emit.type)


def extreme(emit: Emit, operands: list[str]) -> list[str]:
    """min, max: a number wins over NaN."""
    largest = emit.parts[0] == "max"
    a, b = (emit.read(s, emit.type) for s in operands[1:])
    if not emit.type.startswith("f") or "NaN" in emit.parts:
        return emit.write(operands[0], f"np.{'maximum' if largest else 'minimum'}({a}, {b})", emit.type)
    return emit.write(operands[0], f"np.{'fmax' if largest else 'fmin'}({a}, {b})", emit.type)


def move(emit: Emit, operands: list[str]) -> list[str]:
    """mov of a register, or of its parts."""
    target, source = operands
    if target.startswith("{"):
        names = _names(target)
        bits = 8 * TYPES[emit.type].itemsize // len(names)
        value = emit.read(source, emit.type)
        part = f"u{bits}"
        return [
            line
            for i, name in enumerate(names)
            for line in emit.write(name, f"({value} >> {bits * i}).astype(np.uint{bits})", part)
        ]
    if source.startswith("{"):
        names = _names(source)
        total = 8 * TYPES[emit.type].itemsize
        bits = total // len(names)
        # Unused parts may be unwritten.
        parts = [
            f"B.previous_value({n!r}, np.uint{bits})" if n.startswith("%") else emit.read(n, f"u{bits}") for n in names
        ]
        terms = [f"({part}.astype(np.uint{total}) << {bits * i})" for i, part in enumerate(parts)]
        return emit.write(target, " | ".join(terms), emit.type)
    return emit.write(target, emit.read(source, emit.type), emit.type)


def convert(emit: Emit, operands: list[str]) -> list[str]:
    """cvt."""
    to, source = emit.parts[-2:]
    target = operands[0]
    if to == "bf16x2" or to == "f16x2":
        high, low = (emit.read(s, source) for s in operands[1:])
        halves = [f"B.round_to({x}, '{to[:-2]}').astype(np.uint32)" for x in (high, low)]
        return emit.write(target, f"({halves[0]} << 16) | {halves[1]}", "u32")
    operand = operands[1]
    value, seen = emit.read(operand, source), "f32" if source == "bf16" else source
    if to in ("bf16", "f16"):
        return emit.write(target, f"B.round_to({value}, '{to}')", "u16")
    if seen.startswith("f") and not to.startswith("f"):
        rounding = next(p for p in emit.parts if p in ("rzi", "rni", "rmi", "rpi"))
        function = {"rzi": "trunc", "rni": "rint", "rmi": "floor", "rpi": "ceil"}[rounding]
        return emit.write(target, f"B.to_integer(np.{function}({value}), np.{TYPES[to].name})", to)
    if seen == to and "rni" in emit.parts:
        return emit.write(target, f"np.rint({value})", to)
    return emit.write(target, f"{value}.astype(np.{TYPES[to].name})", to)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def _address(text: str) -> tuple[str, int]:
    base, _, offset = text.strip("[] ").partition("+")
    return base.strip(), int(offset.strip() or "0", 0)


def _address_expression(emit: Emit, text: str) -> str:
    base, offset = _address(text)
    kind = "u64" if base.startswith("%rd") else "u32"
    return f"({emit.read(base, kind)}.astype(np.uint64) + np.uint64({offset % 2**64}))"


def _space(emit: Emit) -> str:
    return "shared" if any(p.startswith("shared") for p in emit.parts) else "global"


def load(emit: Emit, operands: list[str]) -> list[str]:
    """Parameters, global or shared; scalar or vector."""
    target, operand = operands
    kind = emit.type
    if "param" in emit.parts:
        base, _ = _address(operand)
        return emit.write(target, f"B.parameter({base!r}, np.{TYPES[kind].name})", kind)
    names = _names(target)
    size = TYPES[kind].itemsize
    lines = [
        f"T = B.load({_space(emit)!r}, {_address_expression(emit, operand)}, {emit.active()}, {size * len(names)})"
    ]
    for i, name in enumerate(names):
        lines += emit.write(name, f"T[:, {size * i}:{size * (i + 1)}].copy().view(np.{TYPES[kind].name})[:, 0]", kind)
    return lines


def store(emit: Emit, operands: list[str]) -> list[str]:
    """Global or shared."""
    operand, source = operands
    size = TYPES[emit.type].itemsize
    columns = []
    for name in _names(source):
        own = register_type(name) if name.startswith("%") else f"u{size * 8}"
        value = (
            f"{emit.read(name, own)}.astype(np.uint{size * 8})" if own[1:] != f"{size * 8}" else emit.read(name, own)
        )
        columns.append(f"np.ascontiguousarray({value}).view(np.uint8).reshape(-1, {size})")
    content = columns[0] if len(columns) == 1 else f"np.concatenate([{', '.join(columns)}], 1)"
    return [f"B.store({_space(emit)!r}, {_address_expression(emit, operand)}, {emit.active()}, {content})"]


def load_matrix(emit: Emit, operands: list[str]) -> list[str]:
    """ldmatrix."""
    names, trans = _names(operands[0]), "trans" in emit.parts
    lines = [f"T = B.load_matrix({_address_expression(emit, operands[1])}, {len(names)}, {trans})"]
    return lines + [line for i, name in enumerate(names) for line in emit.write(name, f"T[{i}]", "u32")]


def store_matrix(emit: Emit, operands: list[str]) -> list[str]:
    """stmatrix."""
    values = ", ".join(emit.read(name, "u32") for name in _names(operands[1]))
    return [f"B.store_matrix({_address_expression(emit, operands[0])}, [{values}], {'trans' in emit.parts})"]


def shuffle(emit: Emit, operands: list[str]) -> list[str]:
    """shfl."""
    target, value, lane, clamp, _ = operands
    target, *valid = target.split("|")
    read = emit.read
    lines = [f"T, V = B.shuffle({emit.parts[2]!r}, {read(value, 'u32')}, {read(lane, 'u32')}, {read(clamp, 'u32')})"]
    lines += emit.write(target.strip(), "T", "u32")
    return lines + (emit.write(valid[0].strip(), "V", "pred") if valid else [])


def warp_reduce(emit: Emit, operands: list[str]) -> list[str]:
    """redux."""
    function = {"max": "maximum", "min": "minimum", "add": "add", "or": "bitwise_or", "and": "bitwise_and"}
    ufunc = function[emit.parts[2]]
    return emit.write(operands[0], f"B.reduce(np.{ufunc}, {emit.read(operands[1], emit.type)})", emit.type)


def extract_bits(emit: Emit, operands: list[str]) -> list[str]:
    """bfe."""
    value, position, length = (emit.read(s, k) for s, k in zip(operands[1:], (emit.type, "u32", "u32"), strict=True))
    return emit.write(operands[0], f"B.extract_bits({value}, {position}, {length})", emit.type)


def permute(emit: Emit, operands: list[str]) -> list[str]:
    """prmt, default mode."""
    a, b, selector = (emit.read(s, "u32") for s in operands[1:])
    return emit.write(operands[0], f"B.permute({a}, {b}, {selector})", "u32")


def exponential(emit: Emit, operands: list[str]) -> list[str]:
    """ex2."""
    value = emit.read(operands[1], emit.type)
    flush = FLUSH if "ftz" in emit.parts else ""
    return emit.write(operands[0], f"{flush}(np.exp2({flush}({value}).astype(np.float64)).astype(np.float32))", "f32")


def barrier(emit: Emit, operands: list[str]) -> list[str]:
    """bar.warp.sync does nothing in lockstep."""
    return ["B.barrier()"] if emit.parts[1] == "sync" else []


OPERATIONS: dict[str, Operation] = {
    "add": simple("{0} + {1}"),
    "sub": simple("{0} - {1}"),
    "neg": simple("-{0}"),
    "not": simple("~{0}"),
    "and": simple("{0} & {1}"),
    "or": simple("{0} | {1}"),
    "xor": simple("{0} ^ {1}"),
    "abs": flushed("np.abs({0})"),
    "rcp": simple("1 / {0}"),
    "shl": shift(True),
    "shr": shift(False),
    "mul": multiply,
    "mad": multiply,
    "fma": fused,
    "div": divide,
    "rem": remainder,
    "min": extreme,
    "max": extreme,
    "setp": compare,
    "selp": select,
    "mov": move,
    "cvt": convert,
    "ld": load,
    "st": store,
    "ldmatrix": load_matrix,
    "stmatrix": store_matrix,
    "shfl": shuffle,
    "redux": warp_reduce,
    "bfe": extract_bits,
    "prmt": permute,
    "ex2": exponential,
    "bar": barrier,
    "barrier": barrier,
}
