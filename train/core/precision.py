"""Which dtype a job's matrix products run in: float32, bfloat16, or whichever is faster on the device.

GPUs multiply bfloat16 faster, and so do CPUs with AMX and AMD's from Zen 4 on. On an Intel server CPU with AVX-512
bfloat16 and no AMX a training step took 1.6 times as long as in float32. The choice rests on the CPU's flags, not on a
timing, so that it is the same in every run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from speedstack.train.config.precision import Precision
from speedstack.train.config.recipes import DrafterConfig, JobConfig

ConfigT = TypeVar("ConfigT", bound=JobConfig)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype that `precision` stands for on `device`."""
    if precision == "auto":
        return torch.bfloat16 if is_bfloat16_faster(device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def resolve_config(config: ConfigT, device: torch.device) -> ConfigT:
    """`config` with a dtype in place of every "auto"; the run directory keeps it, so a resumed run uses the same."""
    run = config.run.model_copy(update={"precision": _name(config.run.precision, device)})
    update: dict[str, object] = {"run": run}
    if isinstance(config, DrafterConfig):
        target_dtype = _name(config.drafter.target_dtype, device)
        update["drafter"] = config.drafter.model_copy(update={"target_dtype": target_dtype})
    return config.model_copy(update=update)


def _name(precision: Precision, device: torch.device) -> Precision:
    return "bfloat16" if resolve_precision(precision, device) == torch.bfloat16 else "float32"


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Inside, every module's forward uses temporary float32 copies of its bfloat16 parameters.

    A model held in half the memory then gives float32 results. Under ZeRO-3 the engine's hooks come first: they gather
    before the copies are made and release after these are dropped.
    """
    narrow: dict[nn.Parameter, torch.Tensor] = {}

    def widen(module: nn.Module, _inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == torch.bfloat16:
                narrow[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, _inputs: object, _outputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    handles = []
    try:
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                handles.append(module.register_forward_pre_hook(widen))
                handles.append(module.register_forward_hook(restore, prepend=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_bfloat16_faster(device: torch.device) -> bool:
    """Whether matrix products on `device` run faster in bfloat16 than in float32."""
    if device.type != "cpu":
        return True
    # ATEN_CPU_CAPABILITY or the build can limit PyTorch to fewer instructions than the CPU has.
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _is_fast_cpu()


@cache
def _is_fast_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False  # not Linux, where nothing was measured
    fields = {name.strip(): value for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    return "amx_bf16" in flags or ("avx512_bf16" in flags and fields.get("vendor_id", "").strip() == "AuthenticAMD")
