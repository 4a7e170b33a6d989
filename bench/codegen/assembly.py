# SPDX-License-Identifier: MIT
"""Read SASS and amdgcn: the instructions, the innermost loops, and how wide their memory accesses are.

Both dialects become one list of instructions, each with the numbers of its successors. Loops come from that graph, not
from the order of the text: both compilers unroll loops and move a loop's cold blocks behind it.
Nothing here needs a GPU, Triton, or torch.
"""

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Instruction:
    """One machine instruction and where control may go from it."""

    opcode: str  # STG.E.128, buffer_store_dwordx4
    operands: str
    is_predicated: bool = False  # a lane may skip it; for amdgcn see `_amdgcn_predicated`
    successors: list[int] = field(default_factory=list)
    kind: str | None = None  # "store.128", "barrier", …; None for arithmetic and the rest


@dataclass
class Loop:
    """An innermost loop. counts: "load.128" and the like (global memory, bits per lane), "shared_load", "tensor", …"""

    begin: int  # number of its first instruction in the kernel
    instructions: int
    counts: dict[str, int]
    predicated: int  # accesses of global memory that a lane may skip
    products: dict[str, int] = field(default_factory=dict)  # tensor-core opcodes: "HGMMA.64x64x16.F32.BF16": 16


def is_access(kind):
    """Whether a kind of instruction reads or writes global memory."""
    return bool(kind) and "." in kind


_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_SASS_KINDS = {
    "LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDGSTS": "copy", "UTMALDG": "bulk",
    "UTMASTG": "bulk", "UBLKCP": "bulk", "RED": "atomic", "REDG": "atomic", "ATOM": "atomic", "ATOMG": "atomic",
    "LDS": "shared_load", "LDSM": "shared_load", "STS": "shared_store", "STSM": "shared_store",
    "ATOMS": "shared_atomic", "LDL": "local", "STL": "local", "SHFL": "shuffle", "BAR": "barrier",
    "SYNCS": "barrier", "HMMA": "tensor", "IMMA": "tensor", "DMMA": "tensor", "QMMA": "tensor", "HGMMA": "tensor",
    "IGMMA": "tensor", "QGMMA": "tensor", "UTCHMMA": "tensor", "UTCIMMA": "tensor", "UTCQMMA": "tensor",
}  # fmt: skip
_SASS_WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


def _sass_kind(opcode):
    name, *suffixes = opcode.split(".")
    if name == "MUFU":
        return "exp2" if "EX2" in suffixes else None
    if name == "WARPGROUP":
        return "wait" if "DEPBAR" in suffixes else None
    kind = _SASS_KINDS.get(name)
    if kind in ("load", "store", "copy", "atomic"):
        return f"{kind}.{next((_SASS_WIDTHS[s] for s in suffixes if s in _SASS_WIDTHS), 32)}"
    return kind


def parse_sass(text):
    """The instructions of the only kernel in `text`, as `cuobjdump -sass` prints it, without the padding after it."""
    found = [m for m in _SASS_LINE.finditer(text) if m[2] != "!PT" and m[3].split(".")[0] != "NOP"]
    at = {int(m[1], 16): number for number, m in enumerate(found)}
    reconverge = {}  # convergence barrier -> the instruction where its lanes meet again
    instructions = []
    for number, (guard, opcode, operands) in enumerate(m.groups()[1:] for m in found):
        name = opcode.split(".")[0]
        is_predicated = guard not in (None, "PT", "UPT")
        following = number + 1 if number + 1 < len(found) else None
        hexadecimal = re.findall(r"0x[0-9a-f]+", operands)
        target = at.get(int(hexadecimal[-1], 16)) if hexadecimal else None
        successors = [following]
        if name == "BSSY":
            reconverge[operands.split(",")[0].strip()] = target
        elif name == "BSYNC":
            successors = [reconverge.get(operands.strip()), following if is_predicated else None]
        elif name == "BRA":
            # `BRA P1, 0x40` and `BRA.U UP0, 0x40` have the condition as an operand, `@P0 BRA 0x40` has it in front
            is_conditional = is_predicated or bool(re.match(r"!?~?U?[PR]\w*\s*,", operands))
            successors = [target, following if is_conditional else None]
        elif name == "CALL":
            successors = [target, following]
        elif name in ("EXIT", "RET", "BRX", "JMX", "KILL"):
            successors = [following if is_predicated else None]
        successors = [successor for successor in successors if successor is not None]
        instructions.append(Instruction(opcode, operands.strip(), is_predicated, successors, _sass_kind(opcode)))
    return instructions


def sass_resources(text):
    """{"registers", "stack" [bytes]} from `cuobjdump -res-usage`."""
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups())
    return {"registers": registers, "stack": stack + local}


def ptxas_notes(log):
    """The numbered remarks in ptxas' output, such as "(C7515) Potential Performance Loss: wgmma…"."""
    return re.findall(r"\(C\d+\).*", log)


def serialising_note(notes):
    """The remark that a wgmma waits for the one before it; None if there is none.

    (C7519) alone costs nothing: ptxas only adds an arrive.
    """
    found = [note for word in ("serialized", "warpgroup.wait is injected") for note in notes if word in note]
    return found[0] if found else None


_AMDGCN_ACCESS = re.compile(r"(?:buffer|global|flat)_(load|store|atomic)_(\w+)$")
_AMDGCN_WIDTHS = [
    (r"dwordx4|b128", 128), (r"dwordx3|b96", 96), (r"dwordx2|x2|b64|f64", 64), (r"short|[ubi]16|ushort", 16),
    (r"byte|[ubi]8", 8),
]  # fmt: skip
_AMDGCN_KINDS = [
    (r"scratch_", "local"), (r"v_(mfma|smfmac|wmma|swmmac)", "tensor"), (r"s_barrier(_wait)?$", "barrier"),
    (r"ds_b?permute|ds_swizzle|v_permlane|\w+_dpp", "shuffle"), (r"ds_(read|load)", "shared_load"),
    (r"ds_(write|store)", "shared_store"), (r"ds_", "shared_atomic"), (r"v_exp_f32", "exp2"),
]  # fmt: skip


def _amdgcn_kind(opcode, operands):
    access = _AMDGCN_ACCESS.match(opcode)
    if access:
        kind = "copy" if re.search(r"\blds\b", operands) or "_lds_" in opcode else access[1]
        return f"{kind}.{next((width for name, width in _AMDGCN_WIDTHS if re.search(name, access[2])), 32)}"
    return next((kind for name, kind in _AMDGCN_KINDS if re.match(name, opcode)), None)


def parse_amdgcn(text):
    """The instructions of the only kernel in `text`, as Triton's AMD backend writes it."""
    labels, lines = {}, []
    body = re.search(r"@function\n(.*?)^\.Lfunc_end", text, re.M | re.S)[1]  # metadata and debug information follow
    for line in body.splitlines():
        line = line.split(";")[0].strip()
        if line.endswith(":"):
            labels[line[:-1]] = len(lines)
        elif line and not line.startswith("."):
            opcode, _, operands = line.partition(" ")
            lines.append((opcode, operands.strip()))
    instructions = []
    for number, (opcode, operands) in enumerate(lines):
        successors = [number + 1]
        if opcode == "s_branch":
            successors = [labels.get(operands)]
        elif opcode.startswith("s_cbranch"):
            successors = [labels.get(operands), number + 1]
        elif opcode in ("s_endpgm", "s_setpc_b64"):
            successors = []
        successors = [successor for successor in successors if successor is not None and successor < len(lines)]
        instructions.append(Instruction(opcode, operands, False, successors, _amdgcn_kind(opcode, operands)))
    return instructions


def amdgcn_resources(text):
    """{"registers", "stack" [bytes], "spilled", "spilled_scalar" [registers]} from the metadata after the code."""
    found = {name: int(value) for name, value in re.findall(r"^\s*(?:- )?\.(\w+):\s+(\d+)$", text, re.M)}
    return {
        "registers": found["vgpr_count"],  # on CDNA this includes the accumulation registers
        "stack": found["private_segment_fixed_size"],
        "spilled": found["vgpr_spill_count"],
        "spilled_scalar": found["sgpr_spill_count"],
    }


def _registers(operand):
    """v7 -> {7}, v[2:5] -> {2, 3, 4, 5}."""
    found = re.match(r"v(\d+)$|v\[(\d+):(\d+)\]$", operand.strip())
    if not found:
        return set()
    return {int(found[1])} if found[1] else set(range(int(found[2]), int(found[3]) + 1))


def _amdgcn_predicated(body):
    """How many accesses in a loop a lane may skip.

    All of them if the loop writes the lane mask `exec`. Buffer instructions have a second way: v_cndmask gives a lane
    that skips the access an address outside the buffer.
    """
    accesses = [instruction for instruction in body if is_access(instruction.kind)]
    if any("saveexec" in i.opcode or "cmpx" in i.opcode or re.match(r"exec(_lo|_hi)?\s*,", i.operands) for i in body):
        return len(accesses)
    selected = set()
    for instruction in body:
        if instruction.opcode.startswith("v_cndmask"):
            selected |= _registers(instruction.operands.split(",")[0])
    buffer = [i for i in accesses if i.opcode.startswith("buffer_")]
    # the address operand follows the data; copies to shared memory have no data register
    address = [i.operands.split(",")[0 if i.kind.startswith("copy") else 1] for i in buffer]
    return sum(bool(_registers(operand) & selected) for operand in address)


def _back_edges(instructions):
    """{header: [latches]}: edges of a depth-first walk that lead back to an instruction still on the path."""
    edges, state = {}, {0: "open"}
    path = [(0, iter(instructions[0].successors))] if instructions else []
    while path:
        number, successors = path[-1]
        for successor in successors:
            if state.get(successor) == "open":
                edges.setdefault(successor, []).append(number)
            elif successor not in state:
                state[successor] = "open"
                path.append((successor, iter(instructions[successor].successors)))
                break
        else:
            state[number] = "done"
            path.pop()
    return edges


def innermost_loops(instructions):
    """The loops without an inner loop, as `Loop`s in the order of the code; bodies are natural loops of the graph.

    Loops that only wait, such as Blackwell's for its tensor cores, do not count.
    """
    predecessors = {}
    for number, instruction in enumerate(instructions):
        for successor in instruction.successors:
            predecessors.setdefault(successor, []).append(number)
    bodies = {}
    for header, latches in _back_edges(instructions).items():
        body, todo = {header}, list(latches)
        while todo:
            number = todo.pop()
            if number not in body:
                body.add(number)
                todo += predecessors.get(number, [])
        is_waiting = len(body) < 8 and {instructions[number].kind for number in body} <= {"barrier", None}
        if len(body) > 1 and not is_waiting:  # a branch to itself is the trap after the last instruction
            bodies[header] = sorted(body)
    loops = []
    for header, body in sorted(bodies.items()):
        if not any(other in body for other in bodies if other != header):
            loops.append(_loop([instructions[number] for number in body], body[0]))
    return loops


def _loop(body, begin):
    if any(instruction.opcode.startswith("s_") for instruction in body):  # amdgcn: every loop has a scalar branch
        predicated = _amdgcn_predicated(body)
    else:
        predicated = sum(instruction.is_predicated for instruction in body if is_access(instruction.kind))
    products = Counter(instruction.opcode for instruction in body if instruction.kind == "tensor")
    return Loop(begin, len(body), dict(sorted(counts(body).items())), predicated, dict(sorted(products.items())))


def counts(instructions):
    """How many instructions of each kind, as a Counter."""
    return Counter(instruction.kind for instruction in instructions if instruction.kind)
