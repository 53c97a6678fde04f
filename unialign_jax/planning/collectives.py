"""What a compiled program sends between chips, read from its optimised HLO text (`compiled.as_text()`).

Bytes are those that one device receives, with the algorithms that move least: of n devices in a group, all-gather of
pieces p receives (n - 1) p, reduce-scatter of s bytes (n - 1) / n s, all-reduce both, 2 (n - 1) / n s, all-to-all
(n - 1) / n s, collective-permute s. Groups that span slices send between slices what each device then holds alone.

For several slices the TPU's compiler writes the program of one, in which what goes between slices is a send to the host
and a receive from it, with a note to the runtime (megascale) of which collective over which slices that is.
"""

import dataclasses
import functools
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# What the runtime between slices calls them.
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_WIDTH = {"pred": 8, "bf16": 16, "token": 0}  # bits; of others the digits in the name say it, "f32", "s8", "f8e4m3fn"
_ARRAY = re.compile(r"\b(pred|token|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{(?: *//.*)?$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    line: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, and how often a call of the program runs it.

    `sent` is the bytes that go into it on one device, `groups` the devices that exchange, int [groups, size]
    (positions in the device assignment, so in `mesh.devices.flat`), of a permute its pairs [pairs, 2]. Where it is
    `between_slices`, each device exchanges with its like in other slices, and `groups` are these slices.
    """

    kind: str
    name: str  # of the operation it comes from, such as "jvp(MMDiT)/while/body/..."
    sent: int
    groups: np.ndarray
    times: int
    overlaps: bool  # it runs beside other work: it has a start and an end, or is split over fusions
    between_slices: bool = False

    @property
    def received(self) -> float:
        """Bytes that a device receives, in all calls."""
        size = self.groups.shape[1]
        factor = {
            "all-gather": size - 1,
            "reduce-scatter": (size - 1) / size,
            "all-reduce": 2 * (size - 1) / size,
            "all-to-all": (size - 1) / size,
            "collective-permute": 1,
        }[self.kind]
        return self.times * self.sent * factor

    def received_across(self, slice_of) -> float:
        """What of `received` comes from other slices; `slice_of` [devices] is the slice of each.

        With s slices in a group, each piece crosses once for every other slice, and is passed on inside.
        """
        if self.between_slices:
            return self.received
        slices = slice_of[self.groups]
        if self.kind == "collective-permute":
            return self.times * self.sent * float(np.mean(slices[:, 0] != slices[:, 1]))
        count = max(len(set(row)) for row in slices.tolist())
        size = self.groups.shape[1]
        if count == 1 or size == 1:
            return 0.0
        # The whole is n pieces; a device fetches (count - 1) pieces, the others of its slice fetch the rest for it.
        return self.received * (count - 1) / (size - 1)


def read_collectives(text: str) -> list[Collective]:
    """All collectives that an optimised HLO module runs, those inside loops with the number of their rounds.

    Raises ValueError for a loop with collectives in it whose number of rounds is not in the text.
    """
    computations, entry = parse_computations(text)
    found = {}

    @functools.cache
    def sends(name):
        return any(
            instruction.opcode.removesuffix("-start") in KINDS
            or _crosses(instruction)
            or any(sends(called) for called in called_computations(instruction) if called in computations)
            for instruction in computations[name].values()
        )

    def visit(name, times, overlaps, fused):
        computation = computations[name]
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", instruction.line)
                asynchronous = overlaps or _is_chained(instruction) or instruction.opcode != kind
                collective = _collective(kind, instruction, computation, times, asynchronous, fused)
                # One collective split over a chain of fusions stands in each of them, and runs as often as the rarest.
                key = (kind, channel[1]) if channel and _is_chained(instruction) else len(found)
                if key not in found or found[key].times > times:
                    found[key] = collective
            elif _crosses(instruction):
                found[len(found)] = _transfer(instruction, computation, times)
            elif instruction.opcode == "while":
                body = re.search(r"body=%?([\w.\-]+)", instruction.line)[1]
                if sends(body):
                    visit(body, times * trip_count(instruction, computations), overlaps, fused)
            else:
                for called in called_computations(instruction):
                    if called in computations:
                        within = fused or instruction.opcode == "fusion"
                        visit(called, times, overlaps or instruction.opcode == "async-start", within)

    visit(entry, 1, False, False)
    return list(found.values())


def parse_computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """HLO text -> ({computation: {instruction name: Instruction}}, the entry computation's name)."""
    computations, current, entry = {}, None, None
    for line in text.splitlines():
        if current is None:
            if line and not line[0].isspace() and (match := _HEADER.match(line)) and not line.startswith("HloModule"):
                current = computations.setdefault(match[2], {})
                entry = match[2] if match[1] else entry
        elif line.split(" //")[0].rstrip() == "}":  # a line of an attribute may begin with a brace, too
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(match[1], match[2])
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return computations, entry


def _parse_instruction(name, rest):
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, tail = rest[end:].lstrip().partition("(")
    inside = tail[: _closing("(" + tail, 0) - 1]
    return Instruction(name, rest[:end], opcode.strip(), tuple(re.findall(r"%([\w.\-]+)", inside)), rest)


def _closing(text, start):
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def type_bytes(text: str) -> int:
    """The bytes of all arrays in an HLO type: "bf16[4,2]{1,0}" is 16."""
    total = 0
    for kind, sizes in _ARRAY.findall(text):
        bits = _WIDTH[kind] if kind in _WIDTH else int(re.search(r"\d+", kind)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def called_computations(instruction: Instruction) -> list[str]:
    names = []
    for pattern in (
        r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)",
        r"\b(?:branch|called)_computations=\{([^}]*)\}",
    ):
        for match in re.findall(pattern, instruction.line):
            names += [name.strip().lstrip("%") for name in match.split(",")]
    return names


def trip_count(loop: Instruction, computations) -> int:
    """The rounds of a while loop: what the compiler notes, or the constant that its condition compares with.

    Raises ValueError when neither says it.
    """
    if match := re.search(r'known_trip_count"?\s*[:=]\s*\{"?n"?[:=]"?(\d+)', loop.line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.line)[1]
    names, constants, less = [condition], [], False
    for name in names:
        for instruction in computations.get(name, {}).values():
            names += [called for called in called_computations(instruction) if called not in names]
            less |= instruction.opcode == "compare" and "direction=LT" in instruction.line
            if instruction.opcode == "constant" and (
                match := re.search(r"[su]\d+\[\]\S* constant\((\d+)\)", instruction.line)
            ):
                constants.append(int(match[1]))
    if not less or len(constants) != 1:
        raise ValueError(f"the rounds of the loop {loop.name} are not in the program: its condition is {condition}")
    return constants[0]


def _is_chained(instruction) -> bool:
    return "chain_id=" in instruction.line


def _crosses(instruction) -> bool:
    return instruction.opcode == "send" and "_xla_megascale_transfer_type=" in instruction.line


def _transfer(instruction, computation, times):
    """The collective between slices that a send begins; its receive says the same."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)[1]
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.line)
    if kind not in _BETWEEN_SLICES or not target:
        raise ValueError(f"this transfer between slices cannot be read: {instruction.line[:400]}")
    slices = []  # "1,2,5:8"
    for part in target[1].split(","):
        first, _, last = part.partition(":")
        slices += range(int(first), int(last or first) + 1)
    if kind == "ONE_TO_ONE":
        slices = slices[:1] * 2  # from one, to another
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.line)
    sent = type_bytes(computation[instruction.operands[0]].type)
    groups = np.array([slices])
    return Collective(_BETWEEN_SLICES[kind], name[1] if name else "", sent, groups, times, True, between_slices=True)


def _collective(kind, instruction, computation, times, overlaps, fused):
    sent = sum(type_bytes(computation[name].type) for name in instruction.operands if name in computation)
    sliced = (user for user in computation.values() if user.opcode == "dynamic-slice")
    if kind == "all-reduce" and fused and any(instruction.name in user.operands[:1] for user in sliced):
        kind = "reduce-scatter"  # how the TPU's compiler writes it: a fusion of the two
    name = re.search(r'op_name="([^"]*)"', instruction.line)
    return Collective(kind, name[1] if name else "", sent, read_groups(instruction.line), times, overlaps)


def read_groups(line: str) -> np.ndarray:
    """The groups of a collective's text, int [groups, size]: lists, an iota, a mesh with axes, or a permute's pairs."""
    if match := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line):
        return _lists(match[1])
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", line):
        return _lists(match[1])
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
        shape, iota = match[1].split("<=")
        return _iota(iota).reshape(_numbers(shape))
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?(\[[\d,]+\](?:T\([\d,]+\))?)\)?)? *\{([^}]*)\}", line
    )
    if not match:
        raise ValueError(f"this collective's groups cannot be read: {line[:200]}")
    axes = {name: int(size) for name, size in re.findall(r"'([\w.\-]+)'=(\d+)", match[1])}
    ids = _iota(match[2]) if match[2] else np.arange(math.prod(axes.values()))
    # An axis may be split: 'x':(2)4 is the part of size 4 that comes after a part of size 2.
    shape, chosen = [], []
    wanted = {
        name: (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"'([\w.\-]+)'(?::\((\d+)\)(\d+))?", match[3])
    }
    for name, size in axes.items():
        before, part = wanted.get(name, (size, 1))
        part = part or size
        shape += [before, part, size // before // part]
        if name in wanted:
            chosen.append(len(shape) - 2)
    grid = ids.reshape(shape)
    others = [axis for axis in range(grid.ndim) if axis not in chosen]
    return grid.transpose(others + chosen).reshape(-1, math.prod(grid.shape[axis] for axis in chosen))


def _lists(text):
    return np.array([[int(number) for number in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)])


def _numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text):
    """ "[64,4]T(1,0)" -> the device numbers in that order."""
    dimensions, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(dimensions))).reshape(_numbers(dimensions))
    return ids.transpose(_numbers(order)).ravel() if order else ids.ravel()
