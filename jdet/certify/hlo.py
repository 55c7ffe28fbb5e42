"""Optimized HLO, read: its instructions, where they come from, and which may follow the batch.

An instruction is harmless if no order of additions and no choice of a routine is in it: movements
of data, control, operations of which IEEE 754 or the instruction alone fixes the result of one
element from that element's operands, and reductions, sorts and scatters that only choose among
their operands, overwrite, or add integers. Mosaic's custom calls are kernels whose trees are
written down. The rest is left to an emitter, a library or a tile size.
"""

import collections
import dataclasses
import re

MOVEMENT = """bitcast bitcast-convert broadcast concatenate constant copy dynamic-slice
    dynamic-update-slice gather iota pad parameter reshape reverse slice transpose
    copy-start copy-done slice-start slice-done""".split()
CONTROL = """call call-start call-update call-done conditional fusion get-tuple-element tuple
    while""".split()
ELEMENTWISE = """abs add and clamp compare convert divide floor maximum minimum multiply negate not
    or remainder select shift-left shift-right-arithmetic shift-right-logical sign subtract xor
    reduce-precision""".split()
_CHOOSING = "parameter constant convert compare select and or not maximum minimum tuple".split()
_INTEGER = r"^\(?(pred|[su]\d+)\["
_MOSAIC = ("mosaic_gpu_v2", "tpu_custom_call")
# XLA:TPU's own names for a movement, and for integers that index one.
_MOVING = ("ConcatBitcast", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
      computation: that it stands in.
      name, result, opcode, operands: "%sum = f32[8] reduce(%x, %zero)".
      root: it is the computation's result.
      line: the whole.
      op: the name that tracing gave, "jit(f)/dot_general"; "" for XLA's own.
      frames: "file:line (function)" of the user's source, the innermost first.
    """

    computation: str
    name: str
    root: bool
    result: str
    opcode: str
    operands: tuple[str, ...]
    line: str
    op: str
    frames: tuple[str, ...]

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in its line; "" without."""
        match = re.search(pattern, self.line)
        return match[1] if match else ""

    @property
    def calls(self) -> tuple[str, ...]:
        """The computations it uses."""
        one = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)", self.line)
        many = re.findall(r"branch_computations=\{([^}]*)\}", self.line)
        return (*one, *(name.strip(" %") for group in many for name in group.split(",")))

    @property
    def dtype(self) -> str:
        """Of its (first) result."""
        return self.result.lstrip("(").partition("[")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its (first) result."""
        return shape_of(self.result)


def shape_of(result: str) -> tuple[int, ...]:
    """ "f32[8,16]{1,0}" as (8, 16)."""
    inside = re.search(r"\[([\d,]*)\]", result)
    return tuple(int(d) for d in inside[1].split(",") if d) if inside else ()


def parse(hlo: str) -> list[Instruction]:
    """The instructions of every computation."""
    found, computation = [], ""
    frames = _frames(hlo)
    for line in hlo.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            computation = header[1]
        match = re.match(r"\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)", line)
        if not match:
            continue
        frame = re.search(r"stack_frame_id=(\d+)", line)
        op = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Instruction(
                computation=computation,
                name=match[2],
                root=bool(match[1]),
                result=match[3],
                opcode=match[4],
                operands=tuple(re.findall(r"%([\w.-]+)", match[5].partition(")")[0])),
                line=line.strip(),
                op=op[1] if op else "",
                frames=frames.get(int(frame[1]), ()) if frame else (),
            )
        )
    return found


def _frames(hlo: str) -> dict[int, tuple[str, ...]]:
    """The tables that stack_frame_id points into."""
    tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
    table = ""
    for line in hlo.splitlines():
        if re.fullmatch(r"FileNames|FunctionNames|FileLocations|StackFrames", line):
            table = line
        elif match := re.match(r"(\d+) (.*)", line):
            tables[table][int(match[1])] = match[2]
        elif line.startswith(("%", "ENTRY")):
            break

    def number(text: str, name: str) -> int:
        match = re.search(rf"\b{name}=(\d+)", text)
        return int(match[1]) if match else 0

    found = {}
    for start in tables["StackFrames"]:
        places, at = [], start
        # An outermost frame names itself as its parent.
        while at in tables["StackFrames"]:
            frame = tables["StackFrames"][at]
            place = tables["FileLocations"].get(number(frame, "file_location_id"), "")
            file = tables["FileNames"].get(number(place, "file_name_id"), '""').strip('"')
            function = tables["FunctionNames"].get(number(place, "function_name_id"), '""')
            name = function.strip('"')
            places.append(f"{file}:{number(place, 'line')} ({name})")
            parent = number(frame, "parent_frame_id")
            if parent in (at, 0) or len(places) > 100:
                break
            at = parent
        found[start] = tuple(places)
    return found


class Module:
    """A program's instructions, by computation and by name."""

    def __init__(self, hlo: str) -> None:
        self.instructions = parse(hlo)
        self.bodies: dict[str, list[Instruction]] = collections.defaultdict(list)
        self.named: dict[tuple[str, str], Instruction] = {}
        self.callers: dict[str, Instruction] = {}
        for i in self.instructions:
            self.bodies[i.computation].append(i)
            self.named[i.computation, i.name] = i
            for computation in i.calls:
                self.callers[computation] = i

    def operand(self, i: Instruction, number: int) -> Instruction | None:
        """The instruction that makes an operand."""
        wanted = i.operands[number : number + 1]
        return self.named.get((i.computation, wanted[0])) if wanted else None

    def fusion(self, i: Instruction) -> Instruction | None:
        """The outermost fusion that it is compiled in."""
        found, at = None, self.callers.get(i.computation)
        while at is not None and at.opcode == "fusion":
            found, at = at, self.callers.get(at.computation)
        return found

    def harmless(self, i: Instruction) -> bool:
        """The batch cannot show in its result: see above."""
        body = [b for name in i.calls for b in self.bodies[name]]
        match i.opcode:
            case "custom-call":
                return i.attribute(r'custom_call_target="([^"]*)"') in (*_MOSAIC, *_MOVING)
            case "reduce" | "reduce-window":
                # The combiner chooses among its operands, or adds integers.
                chooses = all(b.opcode in _CHOOSING or re.match(_INTEGER, b.result) for b in body)
                return chooses or self._reshapes(i)
            case "scatter":
                return all(b.opcode in ("parameter", "bitcast") for b in body)
            case "sort":
                # Floats are compared by their bits or as they are; nothing is computed of them.
                return all(
                    b.opcode in (*_CHOOSING, "bitcast-convert", "bitcast")
                    or re.match(_INTEGER, b.result)
                    for b in body
                )
            case "fusion":
                # Triton may join a product and a sum of floats: it may move and compare them.
                return "triton" not in i.line or all(
                    b.opcode in (*MOVEMENT, *_CHOOSING) or re.match(_INTEGER, b.result)
                    for b in body
                )
            case opcode:
                return opcode in (*MOVEMENT, *CONTROL, *ELEMENTWISE)

    def _reshapes(self, i: Instruction) -> bool:
        """A sum of one term and -0.0, which changes no bit: how XLA:TPU drops a dimension."""
        terms, start = self.operand(i, 0), self.operand(i, 1)
        dimensions = [int(d) for d in i.attribute(r"dimensions=\{([\d,]*)\}").split(",") if d]
        if i.opcode != "reduce" or terms is None or start is None:
            return False
        return "constant(-0)" in start.line and all(terms.shape[d] == 1 for d in dimensions)

    def not_harmless(self) -> list[Instruction]:
        """The instructions that a row's bits could follow the batch through."""
        return [i for i in self.instructions if not self.harmless(i)]
