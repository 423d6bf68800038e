"""Programs for the CPU kernels: operation records that hold sizes and pointers, and the tensors they point into.

The layouts mirror kernels/program.h field by field; the backend compares their sizes before it runs anything.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from speedstack.runtime.panels import Panels

NUM_INTEGERS, NUM_FLOATS, NUM_POINTERS = 11, 4, 12

EMBED, QKV, ATTENTION, LINEAR, GATE_UP, ROUTER, EXPERT_GATE_UP, EXPERT_DOWN, LM_HEAD, ARGMAX = range(10)


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
    """Operation records, and the tensors that their pointers point into.

    `weight_bytes` counts matrices by part of the model; `part` names the one that is being added.
    """

    ops: list[Op] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    weight_bytes: dict[str, int] = field(default_factory=dict)
    part: str = ""

    def add(
        self,
        kind: int,
        integers: Sequence[int],
        floats: Sequence[float] = (),
        tensors: Sequence[torch.Tensor | Panels | None] = (),
    ) -> None:
        """Appends an operation; what each number and pointer means is said where the kernels read it."""
        op = Op(kind=kind)
        op.i[: len(integers)] = list(integers)
        op.f[: len(floats)] = list(floats)
        for index, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if isinstance(tensor, Panels):
                op.i[NUM_INTEGERS - 1] = tensor.format
                self.weight_bytes[self.part] = self.weight_bytes.get(self.part, 0) + tensor.nbytes
                if tensor.scales is not None:
                    op.p[NUM_POINTERS - 1] = self._keep(tensor.scales)
                tensor = tensor.data
            op.p[index] = self._keep(tensor)
        self.ops.append(op)

    @cached_property
    def records(self) -> "ctypes.Array[Op]":
        """The records as the kernels take them; nothing may be added after the first look."""
        return (Op * len(self.ops))(*self.ops)

    def _keep(self, tensor: torch.Tensor) -> int:
        # Taps are columns of a wider buffer, whose stride the kernel is given; all else is one run of memory.
        assert tensor.stride(-1) == 1
        self.kept.append(tensor)
        return tensor.data_ptr()
