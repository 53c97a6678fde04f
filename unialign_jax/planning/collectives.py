"""The collectives of a compiled program, read from its optimised HLO text (`compiled.as_text()`).

Bytes are those that one device receives in a group of n, by the algorithm that moves least, from operands of s bytes:

    all-gather            (n - 1) s
    reduce-scatter        (n - 1) / n s
    all-reduce          2 (n - 1) / n s
    all-to-all            (n - 1) / n s
    collective-permute    s

Of a group over k slices, (k - 1) / (n - 1) of these bytes come from other slices: a piece crosses to each once.

For several slices XLA emits the program of one slice. Traffic between slices appears as host send/recv pairs; their
megascale attributes name the collective and its slices.
"""

import dataclasses
import functools
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# The names of the runtime between slices (megascale).
_BETWEEN_SLICES = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_WIDTH = {"pred": 8, "bf16": 16, "token": 0}  # bits; other types have them in the name: "f32", "s8", "f8e4m3fn"
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
    """One collective of the program."""

    kind: str
    name: str  # of the operation it comes from, such as "jvp(MMDiT)/while/body/..."
    sent: int  # bytes of its operands on one device
    groups: np.ndarray  # int [groups, size], positions in `mesh.devices.flat`; of a permute the pairs [pairs, 2]
    times: int  # that one call of the program runs it
    overlaps: bool  # the compiler made it asynchronous (start/done, or split over fusions)
    between_slices: bool = False  # then `groups` are slices: each device exchanges with its peers in them

    @property
    def received(self) -> float:
        """Bytes that a device receives, all `times` together."""
        size = self.groups.shape[1]
        factor = {
            "all-gather": size - 1,
            "reduce-scatter": (size - 1) / size,
            "all-reduce": 2 * (size - 1) / size,
            "all-to-all": (size - 1) / size,
            "collective-permute": 1,
        }[self.kind]
        return self.times * self.sent * factor

    def received_across(self, slice_of: np.ndarray) -> float:
        """The part of `received` that comes from other slices; `slice_of` [devices] is the slice of each."""
        if self.between_slices:
            return self.received
        slices = slice_of[self.groups]
        if self.kind == "collective-permute":
            return self.times * self.sent * float(np.mean(slices[:, 0] != slices[:, 1]))
        count = max(len(set(row)) for row in slices.tolist())
        size = self.groups.shape[1]
        if count == 1 or size == 1:
            return 0.0
        return self.received * (count - 1) / (size - 1)


def received_bytes(collectives: list[Collective], slice_of: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes that a device receives, {kind: bytes}: (from its own slice, from other slices)."""
    inside, across = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for collective in collectives:
        between = collective.received_across(slice_of)
        across[collective.kind] += between
        inside[collective.kind] += collective.received - between
    return inside, across


def read_collectives(text: str) -> list[Collective]:
    """All collectives of an optimised HLO module; those in a loop count once per iteration.

    Raises ValueError for a loop with collectives in it whose trip count is not in the text.
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
                # A collective that is split over a chain of fusions appears in each of them; count the least frequent.
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
        elif line.split(" //")[0].rstrip() == "}":  # a line of an attribute may begin with a brace too
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _parse_instruction(match[1], match[2])
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return computations, entry


def _parse_instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, tail = rest[end:].lstrip().partition("(")
    inside = tail[: _closing("(" + tail, 0) - 1]
    return Instruction(name, rest[:end], opcode.strip(), tuple(re.findall(r"%([\w.\-]+)", inside)), rest)


def _closing(text: str, start: int) -> int:
    """The position at which the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def type_bytes(text: str) -> int:
    """Bytes of all arrays in an HLO type: "bf16[4,2]{1,0}" is 16."""
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


def trip_count(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
    """The iterations of a while loop: the compiler's known_trip_count, or the constant in the loop's condition.

    Raises ValueError when the program has neither.
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


def _is_chained(instruction: Instruction) -> bool:
    return "chain_id=" in instruction.line


def _crosses(instruction: Instruction) -> bool:
    return instruction.opcode == "send" and "_xla_megascale_transfer_type=" in instruction.line


def _transfer(instruction: Instruction, computation: dict[str, Instruction], times: int) -> Collective:
    """The collective between slices that a send belongs to. The receive has the same attributes and is not read."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.line)[1]
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', instruction.line)
    if kind not in _BETWEEN_SLICES or not target:
        raise ValueError(f"this transfer between slices cannot be read: {instruction.line[:400]}")
    slices = []  # "1,2,5:8"
    for part in target[1].split(","):
        first, _, last = part.partition(":")
        slices += range(int(first), int(last or first) + 1)
    if kind == "ONE_TO_ONE":
        slices = slices[:1] * 2  # a group of two: from one slice to another
    name = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.line)
    sent = type_bytes(computation[instruction.operands[0]].type)
    groups = np.array([slices])
    return Collective(_BETWEEN_SLICES[kind], name[1] if name else "", sent, groups, times, True, between_slices=True)


def _collective(
    kind: str, instruction: Instruction, computation: dict[str, Instruction], times: int, overlaps: bool, fused: bool
) -> Collective:
    sent = sum(type_bytes(computation[name].type) for name in instruction.operands if name in computation)
    sliced = (user for user in computation.values() if user.opcode == "dynamic-slice")
    if kind == "all-reduce" and fused and any(instruction.name in user.operands[:1] for user in sliced):
        kind = "reduce-scatter"  # on TPU it is a fusion of all-reduce and dynamic-slice
    name = re.search(r'op_name="([^"]*)"', instruction.line)
    return Collective(kind, name[1] if name else "", sent, read_groups(instruction.line), times, overlaps)


def read_groups(line: str) -> np.ndarray:
    """The groups in a collective's text, int [groups, size]: lists, an iota, a mesh with axes, or a permute's pairs."""
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
    # An axis may be split: 'x':(2)4 is the part of size 4 after a part of size 2.
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


def _lists(text: str) -> np.ndarray:
    return np.array([[int(number) for number in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)])


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _iota(text: str) -> np.ndarray:
    """ "[64,4]T(1,0)" -> the device numbers in that order."""
    dimensions, _, order = text.partition("T")
    ids = np.arange(math.prod(_numbers(dimensions))).reshape(_numbers(dimensions))
    return ids.transpose(_numbers(order)).ravel() if order else ids.ravel()
