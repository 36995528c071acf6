"""Counts the bytes that a compiled program moves between devices, from the text of its scheduled HLO."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

OPERATIONS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*?\{\n(.*?)^\}(?:, .*?)?$", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$", re.MULTILINE)
ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")


class CollectiveBytes(NamedTuple):
    """Bytes that each device receives or sends, whichever is more."""

    total: int
    exposed: int
    """Those moved while the device computes nothing."""

    def __add__(self, other: object) -> "CollectiveBytes":
        assert isinstance(other, CollectiveBytes)
        return CollectiveBytes(self.total + other.total, self.exposed + other.exposed)


class _Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    rest: str
    """Operands and attributes."""

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


def count_collective_bytes(hlo: str) -> CollectiveBytes:
    """Counts the collectives of a program. Those in loops count as often as the loop runs.

    An operation is exposed if no matrix product, kernel or fusion runs between its start and its end.

    Args:
      hlo: The text of a compiled module (`compiled.as_text()`) with a schedule, as TPU programs have.
    """
    computations, entry = {}, None
    for match in COMPUTATION.finditer(hlo):
        computations[match[2]] = [_Instruction(*groups) for groups in INSTRUCTION.findall(match[3])]
        entry = match[2] if match[1] else entry
    if entry is None:
        raise ValueError("the text is not that of an HLO module")
    counted: dict[str, CollectiveBytes] = {}

    def count(name: str) -> CollectiveBytes:
        if name not in counted:
            instructions = computations[name]
            sizes = {instruction.name: sum(_sizes(instruction.shape)) for instruction in instructions}
            result = sum((_own(instructions, i, sizes) for i in range(len(instructions))), CollectiveBytes(0, 0))
            for instruction in instructions:
                inner = sum((count(called) for called in _called(instruction)), CollectiveBytes(0, 0))
                if instruction.operation == "while":
                    times = _trip_count(instruction, computations)
                    inner = CollectiveBytes(times * inner.total, times * inner.exposed)
                elif instruction.operation == "fusion":  # it computes at the same time
                    inner = CollectiveBytes(inner.total, 0)
                result += inner
            counted[name] = result
        return counted[name]

    return count(entry)


def _own(instructions: list[_Instruction], i: int, sizes: dict[str, int]) -> CollectiveBytes:
    """Counts one instruction, without those that it calls, given the sizes of the results of all instructions."""
    instruction = instructions[i]
    operation = instruction.operation
    operands = sum(sizes.get(name, 0) for name in instruction.operands())
    if operation in OPERATIONS:
        size = max(operands, sizes[instruction.name])
        return CollectiveBytes(size, size)
    if operation.removesuffix("-start") in OPERATIONS:
        # The result of most starts has the operands and the results.
        size = max(operands, sizes[instruction.name] - operands)
        for later in instructions[i + 1 :]:
            if later.operation.endswith("-done") and instruction.name in later.operands():
                return CollectiveBytes(size, size)
            if later.operation in ("fusion", "convolution", "custom-call", "dot", "while"):
                return CollectiveBytes(size, 0)
    return CollectiveBytes(0, 0)


def _sizes(shape: str) -> Iterator[int]:
    """Yields the size in bytes of each array in a shape or in a tuple of shapes. Scalars are contexts, or too small."""
    for dtype, dimensions in ARRAY.findall(shape):
        if not dimensions:
            continue
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype) or 0)
        yield bits * math.prod(int(size) for size in dimensions.split(",") if size) // 8


def _called(instruction: _Instruction) -> list[str]:
    return [name for names in CALLED.findall(instruction.rest) for name in re.findall(r"%([\w.\-]+)", names)]


def _trip_count(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int:
    """Returns how often a loop runs whose counter starts at 0 and is compared with a constant; 1 for other loops."""
    condition, body = (re.search(rf"{part}=%([\w.\-]+)", loop.rest) for part in ("condition", "body"))
    assert condition and body
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    test, step = ({i.name: i for i in computations[found[1]]} for found in (condition, body))
    compare = list(test.values())[-1]
    if compare.operation != "compare" or "direction=LT" not in compare.rest:
        return 1
    counter, limit = (test[name] for name in compare.operands())
    index = re.search(r"index=(\d+)", counter.rest)
    if limit.operation != "constant" or not index:
        return 1
    new = step[list(step.values())[-1].operands()[int(index[1])]]
    increments = [step[name] for name in new.operands() if new.operation == "add"]
    increment = next((int(i.rest.split(")")[0]) for i in increments if i.operation == "constant"), 1)
    return -(-int(limit.rest.split(")")[0]) // increment)
