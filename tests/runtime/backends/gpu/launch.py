"""Launches of single kernels by tests whose tensors lie on the CPU: interpreted there, or on a GPU and back."""

from typing import Any

import torch


class Launcher:
    """Launches kernels on one device: interpreted where that is a CPU, compiled where it is a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """`kernel[grid](*arguments, **options)`. Tensors are on the CPU and hold what the kernel left in them after it.

        Two tensors that are not the same one must not share memory.
        """
        if self.device.type == "cpu":
            kernel[grid](*arguments, **options)
            return
        from speedstack.runtime.backends.gpu.kernels.ptxas_workaround import first_values

        there: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return there.setdefault(id(value), (value, value.to(self.device)))[1]
            return tuple(map(moved, value)) if isinstance(value, tuple) else value

        with first_values():
            kernel[grid](*map(moved, arguments), **options)
        for tensor, copy in there.values():
            tensor.copy_(copy)

    def phase(self, pointers: tuple[torch.Tensor, ...], **constants: Any) -> None:
        """Every item of one phase, of which `op` and `axes` are constants like all others."""
        from speedstack.runtime.backends.gpu.bindings.layers import Constants
        from speedstack.runtime.backends.gpu.interpreter import interpret_grid
        from speedstack.runtime.backends.gpu.kernels.single_op import phase_kernel
        from speedstack.runtime.backends.gpu.op_launch import DEFAULT_NUM_WARPS, NUM_WARPS

        phase, grid = Constants(IS_DRAFT=False, **constants), constants["axes"]
        if self.device.type == "cpu":
            interpret_grid(phase_kernel, grid, {"pointers": pointers, "PHASE": phase, "IS_DEPENDENT": False})
        else:
            num_warps = NUM_WARPS.get(constants["op"], DEFAULT_NUM_WARPS)
            self(phase_kernel, grid, pointers, PHASE=phase, IS_DEPENDENT=False, num_warps=num_warps)
