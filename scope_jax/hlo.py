"""Reads the text of a program that XLA compiled for a TPU: what it sends, copies, and how long it
takes.

Nothing runs. Products and other fusions carry the compiler's own estimate of their cycles; a loop
counts as often as it turns; Pallas kernels, which carry none, are counted by formula. Transfers
between chips take bytes / bandwidth and go on beside what is computed until their result is waited
for: what is then not yet there is added (`Estimate.seconds`, against `Estimate.compute`).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence

from scope_jax.hardware import Chip

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
ITEM_BITS = {"pred": 8, "bf16": 16}
# Of the chip's flop/s, what the attention kernels are taken to reach: our assumption, not measured.
KERNEL_EFFICIENCY = 0.5
# Products of [L, S] in the splash kernels, of a head: scores and the mixing of values; scores
# again, dP, dV and dK; scores again, dP and dQ.
KERNEL_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
KERNEL_BLOCK = 512  # queries and keys; of the causal triangle whole blocks are computed
NEVER = 2**62  # cycles of operations that the compiler gives no estimate for


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    kind: str  # "all-gather", "fusion", ..; an asynchronous one's start and done have the same
    bytes: int  # of the largest array of the result
    calls: tuple[str, ...]  # computations
    text: str

    @property
    def starts(self) -> bool:
        return f" {self.kind}-start(" in self.text

    @property
    def updates(self) -> bool:
        return f" {self.kind}-update(" in self.text

    @property
    def ends(self) -> bool:
        return f" {self.kind}-done(" in self.text

    @property
    def operand(self) -> str:
        """Name of the first operand; "" where there is none."""
        found = re.search(rf" {self.kind}(?:-start|-done|-update)?\(%?([\w.\-]+)", self.text)
        return found[1] if found else ""


def parse(text: str) -> dict[str, list[Op]]:
    """Returns the operations of each computation of an HLO module's text; "ENTRY" is the first."""
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "", text)  # lines of its own, with braces
    computations: dict[str, list[Op]] = {}
    inside = None
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            inside = computations.setdefault("ENTRY" if head[1] else head[2], [])
        elif inside is not None and (
            op := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        ):
            kind = re.sub(r"-(start|done|update)$", "", op[3]) if "dynamic" not in op[3] else op[3]
            calls = re.findall(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)", line)
            if several := re.search(r"(?:branch|called)_computations=\{([^}]*)\}", line):
                calls += re.findall(r"[\w.\-]+", several[1])
            inside.append(Op(op[1], kind, largest(op[2]), tuple(calls), line))
    return computations


def largest(shapes: str) -> int:
    """Returns the bytes of the largest array in a result type.

    >>> largest("(bf16[2,64]{1,0:T(8,128)(2,1)}, u32[]{:S(2)})"), largest("pred[3]")
    (256, 3)
    """
    found = re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", shapes)
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n)
        * (ITEM_BITS.get(kind) or int(re.sub(r"\D", "", kind) or 8))
        // 8
        for kind, dims in found
    ]
    return max(sizes, default=0)


# ------------------------------------------------------------------------------ how long it takes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one run of a program on every chip."""

    compute: float  # seconds without transfers between chips
    seconds: float  # with those that nothing hides
    sent: float  # bytes that a chip receives
    unknown_loops: int  # that were counted as one turn


def estimate(
    computations: dict[str, list[Op]], chip: Chip, coords: Sequence[Sequence[int]], turns: int = 1
) -> Estimate:
    """Returns how long a compiled program takes.

    Args:
      computations: from `parse`, of text with "estimated_cycles".
      coords: where in the topology each device of the program stands.
      turns: of loops whose number of turns the text does not say (a decode loop).
    """
    reader = _Reader(computations, chip, [tuple(c) for c in coords], turns)
    return reader.run("ENTRY")


class _Reader:
    def __init__(self, computations, chip: Chip, coords, turns: int):
        self.computations, self.chip, self.coords, self.turns = computations, chip, coords, turns
        self.run = functools.cache(self._run)

    def _run(self, name: str) -> Estimate:
        """One pass through a computation, in the order that the compiler scheduled it in."""
        now = compute = sent = 0.0
        unknown, free = 0, 0.0  # free: when the links are
        arrives: dict[str, float] = {}  # when each result does
        waiting: dict[str, list[tuple[float, float]]] = {}  # what has no data to send yet
        for op in self.computations.get(name, ()):
            if op.kind in COLLECTIVES or op.kind == "async":
                if op.ends:
                    now = max(now, arrives.get(op.operand, now))
                    continue
                # What a SparseCore sends begins at "start", or at "update" if its data comes there.
                begun = waiting.get(op.operand, []) if op.updates else self.transfers((op,))
                if op.starts and not op.operand:
                    waiting[op.name] = begun
                    continue
                for took, received in begun:
                    sent, free = sent + received, max(now, free) + took
                arrives[op.name] = free if begun else now
                now = max(now, free) if op.kind in COLLECTIVES and not op.starts else now
                continue
            inner = self.inside(op)
            now, compute = now + inner.seconds, compute + inner.compute
            sent, unknown = sent + inner.sent, unknown + inner.unknown_loops
        return Estimate(compute, now, sent, unknown)

    def inside(self, op: Op) -> Estimate:
        """Returns what an operation that is no collective takes."""
        runs = [name for name in op.calls if name in self.computations]
        if op.kind == "while":
            body = re.search(r"body=%?([\w.\-]+)", op.text)
            turns, once = self.loop(op), self.run(body[1]) if body else Estimate(0, 0, 0, 0)
            n = self.turns if turns is None else turns
            return Estimate(
                n * once.compute, n * once.seconds, n * once.sent,
                once.unknown_loops + (turns is None),
            )  # fmt: skip
        if op.kind == "conditional" and runs:
            return max((self.run(name) for name in runs), key=lambda x: x.seconds)
        if op.kind == "custom-call":
            seconds = self.kernel(op) / (KERNEL_EFFICIENCY * self.chip.flops)
            return Estimate(seconds, seconds, 0.0, 0)
        found = re.search(r'"estimated_cycles":"(\d+)"', op.text)
        cycles = int(found[1]) if found and int(found[1]) < NEVER else 0
        own = cycles / self.chip.clock
        if op.kind == "call" or (op.kind == "fusion" and not cycles):
            parts = [self.run(name) for name in runs]
            return Estimate(
                sum(p.compute for p in parts), sum(p.seconds for p in parts),
                sum(p.sent for p in parts), sum(p.unknown_loops for p in parts),
            )  # fmt: skip
        if op.kind == "fusion" and runs:  # a collective that was fused runs beside its fusion
            moved = self.transfers(x for n in runs for x in self.computations[n])
            took, received = sum(t for t, _ in moved), sum(r for _, r in moved)
            return Estimate(own, max(own, took), received, 0)
        return Estimate(own, own, 0.0, 0)

    def loop(self, op: Op) -> int | None:
        """Returns how often a loop turns: a counter from 0 compared with a constant (lax.scan,
        fori_loop and XLA's own); None where the condition is another.
        """
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', op.text):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", op.text)
        ops = self.computations.get(condition[1], []) if condition else []
        bounds = [re.search(r"[su]32\[\].* constant\((\d+)\)", x.text) for x in ops]
        bounds = [int(b[1]) for b in bounds if b]
        compares = [x for x in ops if x.kind == "compare" and "direction=LT" in x.text]
        return bounds[0] if len(bounds) == 1 and len(compares) == 1 else None

    def kernel(self, op: Op) -> float:
        """Returns the flops of a splash attention call, 0 for other custom calls."""
        name = next((n for n in KERNEL_PRODUCTS if op.name.startswith(n)), None)
        constraints = re.search(r"operand_layout_constraints=\{(.*?\})\},", op.text)
        if name is None or constraints is None:
            return 0.0
        shapes = re.findall(r"(?:bf16|f32|f16)\[([\d,]+)\]", constraints[1])
        # Rows where there are several, heads, length, head_dim.
        (*heads, queries, size), (*_, keys, _) = (
            [int(n) for n in x.split(",")] for x in shapes[:2]
        )
        causal = 0.5 * (1 + 1 / max(1, keys // KERNEL_BLOCK))
        return 2.0 * KERNEL_PRODUCTS[name] * math.prod(heads) * queries * keys * size * causal

    def transfers(self, ops: Iterable[Op]) -> list[tuple[float, float]]:
        """Returns `transfer` of the collectives among operations and in what they call."""
        found = []
        for op in ops:
            if op.kind in COLLECTIVES and not op.ends:
                found.append(self.transfer(op))
            else:
                calls = (x for name in op.calls for x in self.computations.get(name, ()))
                found += self.transfers(calls)
        return found

    def transfer(self, op: Op) -> tuple[float, float]:
        """Returns (seconds, bytes that a chip receives) of a collective.

        A chip is taken to receive over one link for every axis of the topology that its group
        extends along: what a corner has. Wrapped-around links of full tori are not counted.
        """
        shape = re.search(rf"= (.*?) {op.kind}(?:-start)?\(", op.text)
        size = _result_bytes(shape[1], op) if shape else op.bytes
        if op.kind == "collective-permute":
            return size / self.chip.link, size
        group = _group(op.text, len(self.coords))
        n = len(group)
        if n < 2:
            return 0.0, 0.0
        places = [self.coords[i] for i in group]
        links = sum(len({c[axis] for c in places}) > 1 for axis in range(len(places[0]))) or 1
        share = {"all-reduce": 2.0, "reduce-scatter": float(n)}.get(op.kind, 1.0)
        received = share * size * (n - 1) / n
        return received / (links * self.chip.link), received


def _result_bytes(shape: str, op: Op) -> float:
    """Returns the bytes of a collective's result; of an asynchronous one's (operand, result, ..)
    only the result.
    """
    arrays = re.findall(r"\b[a-z]+\d*\w*\[[\d,]*\]", shape)
    if op.starts:
        return max((largest(a) for a in arrays), default=0)
    return sum(largest(a) for a in arrays)


def _group(text: str, devices: int) -> list[int]:
    """Returns the first group of devices that a collective joins.

    >>> _group("replica_groups=[2,4]<=[4,2]T(1,0), x", 8), _group("replica_groups={{0,3},{1,2}}", 4)
    ([0, 2, 4, 6], [0, 3])
    >>> _group("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 8)
    [0, 1, 2, 3]
    """
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        joined, flat, stride = re.findall(r"'([^']+)'", mesh[2]), [0], 1
        for name, n in reversed(sizes.items()):
            if name in joined:
                flat = [x + i * stride for i in range(n) for x in flat]
            stride *= n
        return flat
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        numbers = [[int(n) for n in part.split(",")] if part else [] for part in iota.groups()]
        (groups, *_), dims, order = numbers
        order = order or list(range(len(dims)))
        strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
        flat = [0]
        for axis in order:
            flat = [x + i * strides[axis] for x in flat for i in range(dims[axis])]
        return flat[: len(flat) // groups]
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return [int(n) for n in listed[1].split(",") if n]
    return list(range(devices))


# ------------------------------------------------------------------------------ what it moves


def loop_bodies(computations) -> list[tuple[str, int]]:
    """Returns [(computation, depth)] of the while loops of the program: 1 = the decode loop's
    parts, 2 = those of the loop over layers inside it.
    """
    found, waiting = {}, [("ENTRY", 0)]
    while waiting:
        name, depth = waiting.pop()
        if found.get(name, -1) >= depth:
            continue
        found[name] = depth
        for op in computations.get(name, ()):
            waiting += [(called, depth + (op.kind == "while")) for called in op.calls]
    return [(name, depth) for name, depth in found.items() if depth]


def collectives(computations) -> list[dict]:
    """Returns each collective of the program's loops once: {"op", "bytes", "per_layer"}."""
    seen = {}
    for name, depth in loop_bodies(computations):
        for op in computations.get(name, ()):
            if op.kind in COLLECTIVES and not op.ends:
                channel = re.search(r"channel_id=(\d+)", op.text)
                at = channel[1] if channel else op.name  # a fused one appears in several clones
                seen[at] = {"op": op.kind, "bytes": op.bytes, "per_layer": depth > 1}
    return sorted(seen.values(), key=lambda x: -x["bytes"])


def big_copies(computations, size: int, *, loop_only: bool = False) -> list[str]:
    """Returns the operations that write `size` bytes or more beside what they read.

    An update of a slice, alone or at the end of a fusion, is done in place: where it cannot, XLA
    puts a copy before it.
    """
    inside = dict(loop_bodies(computations))
    roots = {name: ops[-1].kind for name, ops in computations.items() if ops}
    fused = {
        c for ops in computations.values() for op in ops if op.kind == "fusion" for c in op.calls
    }
    moves = ("copy", "transpose", "concatenate", "pad", "gather", "scatter", "select", "convert")
    found = []
    for name, ops in computations.items():
        for op in ops:
            kind = roots.get(op.calls[0], "") if op.kind == "fusion" and op.calls else op.kind
            # Inside a fusion only a change of layout counts: the rest is not written out.
            counts = op.kind in ("copy", "transpose") if name in fused else (
                op.kind in moves or (op.kind == "fusion" and kind != "dynamic-update-slice")
            )  # fmt: skip
            if counts and op.bytes >= size and (name in inside or not loop_only):
                shape = re.search(r"= \(?(\w+\[[\d,]*\])", op.text)
                found.append(f"{op.kind} {shape[1] if shape else op.name}")
    return found
