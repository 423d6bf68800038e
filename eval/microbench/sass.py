"""Instructions per byte of weights of a compiled kernel, from its machine code.

A multiprocessor issues at most four warp instructions a cycle. At an H200's bandwidth that is about a fifth of a warp
instruction per byte: a kernel that needs more is bound by issue. Counted is the innermost loop that multiplies (the
whole kernel if it is unrolled), relative to its tensor-core instructions, whose share of the weights follows from their
shape, so that unrolling does not matter.

The bound ignores latency, bank conflicts, dependent instructions, the tensor cores' own rate, other reads from the L2
cache (`Issue.load_bytes`), work around the loop, and the last items of a phase.

Loops are natural: a header, and all that reaches it again without passing it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from speedstack.runtime.perf.gpus import Gpu

SCHEDULERS = 4  # of a multiprocessor; each begins an instruction a cycle
# Results a cycle and multiprocessor of 32-bit integer additions, comparisons, shifts and logic: half of what is begun
# (CUDA C++ Programming Guide, arithmetic instructions, compute capability 9.0).
INTEGER_LANES = 64
# A clock that an H100 or H200 SXM holds under load; its data sheet's rates are those of 1.83 GHz.
CLOCK_HZ = 1.755e9

_CLASSES = {
    "integer": "IADD3 LOP3 SHF PRMT LEA ISETP SEL VIADD VIMNMX IMNMX SGXT PLOP3 FSEL FSETP FMNMX IABS POPC FLO P2R R2P",
    "multiply-add": "IMAD MOV CS2R",
    "float": "FADD FMUL FFMA HADD2 HMUL2 HFMA2 HFMA2_MMA MUFU",
    "conversion": "F2F F2FP F2I I2F I2FP",
    "global": "LDG LDGSTS STG RED ATOMG CCTL",
    "local": "LDL STL",
    "shared": "LDS LDSM STS STSM ATOMS",
    "tensor": "HMMA HGMMA QGMMA IGMMA",
    "barrier": "BAR DEPBAR LDGDEPBAR WARPSYNC WARPGROUP MEMBAR FENCE ERRBAR SYNCS",
}
_CLASS_OF = {name: kind for kind, names in _CLASSES.items() for name in names.split()}
_BYTES = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}


@dataclass(frozen=True)
class Instruction:
    """name: such as LDG; text: all of it. target: a branch target label; reconverge_at: the one `BSYNC` uses."""

    text: str
    name: str
    target: str | None
    is_predicated: bool

    @property
    def kind(self) -> str:
        """A class of `_CLASSES`, or `uniform`, or `other`."""
        if self.name in _CLASS_OF:
            return _CLASS_OF[self.name]
        return "uniform" if self.name.startswith("U") or self.name == "R2UR" else "other"

    @property
    def num_bytes(self) -> int:
        """Bytes per lane of a global load; 0 for others."""
        if self.name not in ("LDG", "LDGSTS"):
            return 0
        mnemonic = re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]
        return next((size for suffix, size in _BYTES.items() if f"{suffix}." in f"{mnemonic}."), 4)


@dataclass(frozen=True)
class Listing:
    """Instructions in code order, and the positions of labels."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Product:
    """How warps share a product of weights [rows, K] with the rows of a step, from Triton's layout.

    slices: products side by side. warps: along slices, rows and columns (weight rows; rows of the step).
    """

    slices: int
    rows: int
    columns: int
    warps: tuple[int, int, int]


@dataclass(frozen=True)
class Issue:
    """The innermost code that multiplies; `counts` are instructions per warp and pass, by class.

    weight_bytes: per program and pass, on average. load_bytes: all global loads, masked ones included; async_bytes:
    those by cp.async. num_warps: per program.
    """

    is_loop: bool
    counts: Mapping[str, int]
    weight_bytes: float
    load_bytes: int
    async_bytes: int
    num_warps: int

    @property
    def warp_instructions_per_byte(self) -> float:
        return sum(self.counts.values()) * self.num_warps / self.weight_bytes

    def bandwidth_fraction(self, gpu: Gpu, clock_hz: float = CLOCK_HZ) -> float:
        """Share of a GPU's bandwidth that issue allows, for all instructions and for integer ones."""
        begun = self.warp_instructions_per_byte / SCHEDULERS
        integer = self.counts.get("integer", 0) * self.num_warps / self.weight_bytes * 32 / INTEGER_LANES
        return gpu.num_sms * clock_hz / max(begun, integer) / gpu.bandwidth


def listing_of(text: str) -> Listing:
    """Parses `nvdisasm -c` of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"^\s*(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            body = re.sub(r"^@!?U?P\w+\s+", "", found[1])
            target = re.search(r"`\((\.L_\w+)\)", body)
            name = re.split(r"[.\s]", body)[0]
            instructions.append(Instruction(found[1], name, target and target[1], body != found[1]))
    return Listing(tuple(instructions), labels)


def loops(listing: Listing) -> list[frozenset[int]]:
    """Natural loops as indices of instructions; loops with the same header are merged."""
    starts, edges = _blocks(listing)
    dominators = _dominators(edges)
    found: dict[int, set[int]] = {}
    for block, following in edges.items():
        for header in following:
            if header in dominators.get(block, ()):
                found.setdefault(header, {header}).update(_body(edges, header, block))
    ends = [*starts[1:], len(listing.instructions)]
    return [
        frozenset(index for block in body for index in range(starts[block], ends[block])) for body in found.values()
    ]


def innermost(listing: Listing) -> list[tuple[bool, list[Instruction]]]:
    """The innermost loops that multiply, or the whole kernel if none does; and whether they are loops."""
    code = listing.instructions
    multiplying = [body for body in loops(listing) if any(code[index].kind == "tensor" for index in body)]
    inner = [body for body in multiplying if not any(other < body for other in multiplying)]
    if not inner and any(one.kind == "tensor" for one in code):
        # The compiler pads a kernel's end with jumps to themselves and nothing.
        return [(False, [one for one in code if one.name not in ("NOP", "BRA")])]
    return [(True, [code[index] for index in sorted(body)]) for body in sorted(inner, key=min)]


def product_of(ttgir: str) -> Product:
    """The layout of a kernel's products. Raises ValueError for none, or several."""
    layouts = dict(re.findall(r"^(#mma\d*) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[([\d, ]+)\]", ttgir, re.MULTILINE))
    found = set()
    for shape, layout in re.findall(r"(?:tt\.dot|warp_group_dot) .*-> tensor<([\dx]+)xf32, (#mma\d*)>", ttgir):
        sizes = [int(size) for size in shape.split("x")]
        warps = [int(size) for size in layouts[layout].split(",")]
        slices, batch = (sizes[0], warps[0]) if len(sizes) == 3 else (1, 1)
        found.add(Product(slices, sizes[-2], sizes[-1], (batch, warps[-2], warps[-1])))
    if len(found) != 1:
        raise ValueError(f"a kernel with {len(found)} kinds of products")
    return found.pop()


def issues(listing: Listing, product: Product, bits_per_weight: float, share: float = 1.0) -> Iterator[Issue]:
    """Of each innermost code that multiplies. share: of real weights; the rest is zero padding, and costs as much."""
    batch, row_warps, column_warps = product.warps
    num_warps = batch * row_warps * column_warps
    for is_loop, code in innermost(listing):
        counts = Counter(one.kind for one in code)
        tensor = next(one for one in code if one.kind == "tensor")
        columns = columns_of(tensor)
        # Warps beyond the slices, or a tile's rows or columns, multiply what others do.
        copies = max(1.0, batch / product.slices) * max(1.0, 16 * row_warps / product.rows)
        copies *= max(1.0, columns * column_warps / product.columns)
        # A warp's instruction takes 16 x 16 weights.
        weights = counts["tensor"] * num_warps * 256 * columns / product.columns / copies * share
        lanes = 32 * num_warps
        yield Issue(
            is_loop=is_loop,
            counts=dict(counts.most_common()),
            weight_bytes=weights * bits_per_weight / 8,
            load_bytes=lanes * sum(one.num_bytes for one in code),
            async_bytes=lanes * sum(one.num_bytes for one in code if one.name == "LDGSTS"),
            num_warps=num_warps,
        )


def columns_of(tensor: Instruction) -> int:
    """Rows of the step that a tensor-core instruction multiplies."""
    if tensor.name == "HMMA":
        assert ".16816." in tensor.text, tensor.text
        return 8
    shape = re.search(r"HGMMA\.64x(\d+)x16\.", tensor.text)
    assert shape, tensor.text
    return int(shape[1])


def _blocks(listing: Listing) -> tuple[list[int], dict[int, list[int]]]:
    """Starts of basic blocks, and their successors."""
    code = listing.instructions
    leaders = {0, *(place for place in listing.labels.values() if place < len(code))}
    leaders |= {place + 1 for place, one in enumerate(code[:-1]) if one.name in ("BRA", "EXIT", "RET", "BSYNC", "BRX")}
    starts = sorted(leaders)
    number = {start: block for block, start in enumerate(starts)}
    edges: dict[int, list[int]] = {}
    for block, start in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else len(code)
        last = code[end - 1]
        following = []
        target = _reconvergence(listing, end - 1) if last.name == "BSYNC" else last.target
        if last.name in ("BRA", "BSYNC") and target is not None and target in listing.labels:
            following.append(number[listing.labels[target]])
        is_end = last.name in ("BRA", "EXIT", "RET", "BRX") and not last.is_predicated and ".DIV" not in last.text
        # A branch whose condition is an operand goes on behind it too.
        is_end = is_end and not re.search(r"BRA(?:\.\w+)* !?U?P\d", last.text)
        if not is_end and end < len(code):
            following.append(number[end])
        edges[block] = following
        assert start < end
    return starts, edges


def _reconvergence(listing: Listing, place: int) -> str | None:
    """Where a `BSYNC` lets threads go on: behind itself, or at the target of the last `BSSY` of its barrier."""
    code = listing.instructions
    own = [n for n, one in enumerate(code) if one.name == "BSSY" and _barrier(one) == _barrier(code[place])]
    targets = {code[n].target: n for n in own}
    behind = [label for label in targets if label is not None and listing.labels.get(label) == place + 1]
    if behind:
        return behind[0]
    return code[max((n for n in own if n < place), default=own[-1])].target if own else None


def _barrier(one: Instruction) -> str | None:
    found = re.search(r"\b(B\d+)\b", one.text)
    return found[1] if found else None


def _dominators(edges: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """For every block reachable from the first: the blocks on all paths to it."""
    before: dict[int, list[int]] = {block: [] for block in edges}
    order, waiting = [], [0]
    seen = {0}
    while waiting:
        block = waiting.pop()
        order.append(block)
        for following in edges[block]:
            before[following].append(block)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    dominators = {block: set(seen) for block in seen}
    dominators[0] = {0}
    is_changing = True
    while is_changing:
        is_changing = False
        for block in sorted(seen - {0}):
            now = {block} | set.intersection(*(dominators[each] for each in before[block]))
            is_changing |= now != dominators[block]
            dominators[block] = now
    return dominators


def _body(edges: Mapping[int, Sequence[int]], header: int, last: int) -> set[int]:
    """Blocks that reach `last` without passing the header."""
    before: dict[int, set[int]] = {}
    for block, following in edges.items():
        for each in following:
            before.setdefault(each, set()).add(block)
    body, waiting = {header}, [last]
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += before.get(block, ())
    return body
