"""Programs for the CPU kernels: operation records with sizes and pointers, and the tensors they point to.

The layouts mirror kernels/program.h field by field; the backend compares sizes before running.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from speedstack.runtime.backends.cpu.kernels.build import load_kernels
from speedstack.runtime.backends.cpu.packed_layout import FP8, INT8, MXFP4_BYTES, MXFP4_WORDS, Panels
from speedstack.runtime.model.kv_ring import MAX_ROWS
from speedstack.runtime.model.weights import FP8_PART, INT8_PART, MXFP4_PART

NUM_INTEGERS, NUM_FLOATS, NUM_POINTERS = 12, 4, 12

EMBED, QKV, ATTENTION, LINEAR, GATE_UP, ROUTER, CHOOSE, EXPERT_GATE_UP, EXPERT_DOWN, LM_HEAD, ARGMAX, MARKOV = range(12)

# Part-name suffixes by matrix format.
_PART_OF = {MXFP4_WORDS: MXFP4_PART, MXFP4_BYTES: MXFP4_PART, FP8: FP8_PART, INT8: INT8_PART}
# Indices of a tap's stride and pointer in an operation's record.
_TAPS = {LINEAR: (3, 3), EXPERT_DOWN: (4, 5)}


class Op(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("i", ctypes.c_int32 * NUM_INTEGERS),
        ("f", ctypes.c_float * NUM_FLOATS),
        ("p", ctypes.c_void_p * NUM_POINTERS),
    )


class RowArrays(ctypes.Structure):
    _fields_ = (
        ("num_rows", ctypes.c_int32),
        ("num_logit_rows", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("slot", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("key_end", ctypes.c_void_p),
        ("logit_row", ctypes.c_void_p),
    )


@dataclass
class Program:
    """Operation records and the tensors they point to.

    `weight_bytes`: matrix bytes by part of the model; `part`: the part being added; `taps`: see `tap`.
    """

    ops: list[Op] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    part: str = ""
    taps: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(
        self,
        kind: int,
        integers: Sequence[int],
        floats: Sequence[float] = (),
        tensors: Sequence[torch.Tensor | Panels | None] = (),
    ) -> None:
        """Appends an operation; the kernels document its numbers and pointers."""
        op = Op(kind=kind)
        op.i[: len(integers)] = list(integers)
        op.f[: len(floats)] = list(floats)
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if isinstance(tensor, Panels):
                op.i[NUM_INTEGERS - 1] = tensor.format
                part = self.part + _PART_OF.get(tensor.format, "")
                self.weight_bytes[part] = self.weight_bytes.get(part, 0) + tensor.nbytes
                tensor = tensor.data
            op.p[index] = self._keep(tensor)
        self.ops.append(op)

    def tap(self, columns: dict[int, torch.Tensor]) -> None:
        """Copies results of operations (by number) into columns of a wider buffer; replaces earlier taps."""
        for index in self.taps.keys() | columns.keys():
            tensor = columns.get(index)
            op = self.ops[index]
            stride_at, pointer_at = _TAPS[op.kind]
            op.i[stride_at] = tensor.stride(0) if tensor is not None else 0
            op.p[pointer_at] = tensor.data_ptr() if tensor is not None else None
        self.taps = dict(columns)

    def _keep(self, tensor: torch.Tensor) -> int:
        assert tensor.stride(-1) == 1
        self.kept.append(tensor)
        return tensor.data_ptr()


Records = ctypes.Array[Op]


def records_of(*programs: Program) -> Records:
    """Consecutive programs as an array for the kernels; a copy, unaffected by later changes."""
    ops = [op for program in programs for op in program.ops]
    return (Op * len(ops))(*ops)


class Runner:
    """Calls the kernels with the arrays that describe a step's rows."""

    def __init__(self) -> None:
        self._kernels = load_kernels()
        layout = ctypes.sizeof(Op) * 1000 + ctypes.sizeof(RowArrays)
        assert self._kernels.speedstack_layout() == layout, "kernels and records disagree about the layout of a program"
        self._arrays = {
            name: np.zeros(MAX_ROWS, np.int32) for name in ("token", "slot", "position", "key_end", "logit_row")
        }
        self._rows = RowArrays(**{name: array.ctypes.data for name, array in self._arrays.items()})

    def run(
        self,
        records: Records,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        key_ends: Sequence[int],
        logit_rows: Sequence[int],
        num_threads: int,
    ) -> None:
        """Runs all operations on up to MAX_ROWS rows."""
        arrays, num_rows, num_logits = self._arrays, len(tokens), len(logit_rows)
        arrays["token"][:num_rows] = tokens
        arrays["slot"][:num_rows] = slots
        arrays["position"][:num_rows] = positions
        arrays["key_end"][:num_rows] = key_ends
        arrays["logit_row"][:num_logits] = logit_rows
        self._rows.num_rows, self._rows.num_logit_rows = num_rows, num_logits
        status = self._kernels.speedstack_run(records, len(records), ctypes.byref(self._rows), num_threads)
        assert status != -1, "the program has more operations than the kernels take"
        assert status != -2, "weights were packed for the kernels of another instruction set"
        assert status == 0, f"operation {status - 1} of the program has an unknown kind"
