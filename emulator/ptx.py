"""Runs compiled GPU code (PTX) on the CPU.

A block's threads run in lockstep (registers: ptx_operations.py); blocks run in order. Errors:

- an access outside an argument's elements (strided views included), or unaligned;
- a byte that one warp writes and another reads, in either order, without a barrier between, or that a block writes
  and a later one accesses;
- a barrier or shuffle that not all threads reach; an unwritten register.

Approximate instructions (ex2, div.full, rcp) are computed exactly, then rounded.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator.ptx_block import Block, Fault, Memory
from emulator.ptx_operations import OPERATIONS, Emit

INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)


@dataclass
class BasicBlock:
    """Statements without a branch, as a Python function that returns the next basic block."""

    statements: list[str]
    source: str
    run: Callable[[Block], int]

    def statement_of(self, error: BaseException) -> str:
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not self.run.__code__:
            trace = trace.tb_next
        return "?" if trace is None else self.source.splitlines()[trace.tb_lineno - 1].partition("  # ")[2]


@dataclass
class Program:
    """A kernel."""

    name: str
    threads: int
    basic_blocks: list[BasicBlock]
    parameters: list[str]

    def run(self, block: Block) -> None:
        """Diverged threads run in turns, lowest program counter first."""
        pc, pcs = 0, None
        while True:
            if pcs is not None:
                pc = int(pcs.min())
                block.active = pcs == pc
                if block.active.all():
                    pcs = None
            if pc >= len(self.basic_blocks):
                return
            before = {} if pcs is None else dict(block.registers)
            block.targets = None
            basic_block = self.basic_blocks[pc]
            try:
                pc = basic_block.run(block)
            except Fault as error:
                raise Fault(f"{self.name}, block {block.index}: {error} ({basic_block.statement_of(error)})") from None
            except KeyError as error:
                what = f"register {error.args[0]} is read before it is written"
                raise Fault(f"{self.name}, block {block.index}: {what} ({basic_block.statement_of(error)})") from None
            if pcs is not None:
                for name, value in before.items():
                    if block.registers[name] is not value:
                        block.registers[name] = np.where(block.active, block.registers[name], value)
            if pcs is not None or block.targets is not None:
                pcs = np.full(block.threads, pc) if pcs is None else pcs
                pcs = np.where(block.active, pc if block.targets is None else block.targets, pcs)


def _translate_branch(statement: str, following: int, targets: dict[str, int], last: int) -> str | None:
    negated, predicate, opcode, operand = INSTRUCTION.fullmatch(statement).groups()  # type: ignore[union-attr]
    if opcode != "ret" and not opcode.startswith("bra"):
        return None
    there = last if opcode == "ret" else targets[operand.strip()]
    if predicate is None:
        return f"    return {there}"
    return f"    return B.branch({'~' if negated else ''}R[{predicate!r}], {there}, {following})"


def _translate_statement(statement: str, constants: dict[str, Any], threads: int) -> list[str]:
    parsed = INSTRUCTION.fullmatch(statement)
    if parsed is None:
        raise NotImplementedError(f"PTX statement {statement!r}")
    negated, predicate, opcode, operands = parsed.groups()
    guard = None if predicate is None else f"{'~' if negated else ''}R[{predicate!r}]"
    emit = Emit(opcode.split("."), guard, constants, threads)
    operation = OPERATIONS.get(emit.parts[0])
    if operation is None:
        raise NotImplementedError(f"PTX instruction {statement!r}")
    return [f"    {line}  # {statement}" for line in operation(emit, _operands(operands))]


def translate(ptx: str) -> Program:
    """Translates a PTX file's only kernel."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    header = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{(.*?)\n\}", ptx, re.S)
    if header is None:
        raise ValueError("no kernel in this PTX")
    name, parameters, directives, body = header.groups()
    threads = int(re.search(r"\.reqntid\s+(\d+)", directives).group(1))  # type: ignore[union-attr]
    statements = list(_statements(body))
    labels = {s[:-1]: i for i, s in enumerate(statements) if s.endswith(":")}
    jumps = {i + 1 for i, s in enumerate(statements) if re.match(r"(@!?%\w+\s+)?(bra|ret)\b", s)}
    starts = sorted(s for s in {0, *labels.values(), *jumps} if s < len(statements))
    targets = {label: starts.index(index) for label, index in labels.items()}
    constants: dict[str, Any] = {"np": np}
    basic_blocks = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(statements)], strict=True)):
        lines, jump = [], f"    return {number + 1}"
        for statement in statements[start:end]:
            if statement.endswith(":"):
                continue
            found = _translate_branch(statement, number + 1, targets, len(starts))
            if found is None:
                lines += _translate_statement(statement, constants, threads)
            else:
                jump = found
        source = "\n".join(["def basic_block(B):", "    R = B.registers", *lines, jump])
        scope: dict[str, Any] = {}
        exec(compile(source, f"<{name} {number}>", "exec"), constants, scope)
        basic_blocks.append(BasicBlock(statements[start:end], source, scope["basic_block"]))
    return Program(name, threads, basic_blocks, [p.split()[-1] for p in parameters.split(",")])


def _statements(body: str) -> Iterator[str]:
    body = re.sub(r"^\s*\.(loc|reg|pragma|file|section)[^\n]*", "", body, flags=re.M)
    for line in re.split(r";|\n(?=\s*\$?\w+:)|(?<=:)\n", body):
        for part in re.split(r"(?<=:)\s*\n", line):
            part = " ".join(part.split())
            while part.startswith(("{ ", "} ")):
                part = part[2:]
            if part not in ("", "{", "}") and not part.startswith(".reg"):
                yield part


def _operands(text: str) -> list[str]:
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def launch(program: Program, memory: Memory, blocks: int, shared: int, arguments: list[int]) -> None:
    """Runs a grid's blocks in order."""
    if len(arguments) != len(program.parameters):
        raise ValueError(f"{program.name}: {len(arguments)} arguments for {len(program.parameters)} parameters")
    parameters = dict(zip(program.parameters, arguments, strict=True))
    for region in memory.regions:
        region.clear_history()
    for index in range(blocks):
        with np.errstate(all="ignore"):
            program.run(Block(memory, program.threads, shared, index, parameters))
