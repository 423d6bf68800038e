"""What compilers make of the resident kernel's waits and signals, read off the code for sm_90a without a GPU.

Each check is one way in which a wait that looks right in the source is none on a GPU. See `kernels.sync`.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton

from speedstack.dflash.model import DFlashDraftModel
from speedstack.runtime.backends.gpu.base import Target
from speedstack.runtime.backends.gpu.kernels import sync
from speedstack.runtime.backends.gpu.kernels.ptxas_workaround import first_values, with_first_values
from speedstack.runtime.backends.gpu.resident import Prefetching, ResidentBackend
from speedstack.runtime.backends.gpu.task_table import Tasks
from speedstack.runtime.model.released_models import drafter_config
from speedstack.runtime.model.spec import AttentionSpec, DenseSpec, LayerSpec, ModelSpec, MoeSpec
from speedstack.runtime.model.synthetic_weights import empty_weights

# One layer of each kind, at the least sizes that a tensor core takes.
LAYERS = (
    LayerSpec(AttentionSpec(4, 2, 32, 32, 16, 1e4, window=64, has_sinks=True), DenseSpec(64)),
    LayerSpec(AttentionSpec(4, 2, 32, 32, 16, 1e4), MoeSpec(8, 2, 64, "sigmoid", True, True)),
)
META = torch.device("meta")


def compiled(
    prefetch: Prefetching = "own",
    has_fp8: bool = False,
    layers: tuple[LayerSpec, ...] = LAYERS,
    has_drafter: bool = False,
) -> tuple[Tasks, Any]:
    """The tables and the compiled kernel of a tiny model, with prompt lookup where there is no drafter."""
    weights = empty_weights(ModelSpec("test", 256, 64, 1e-5, 512, (), layers), torch.bfloat16, META, True, has_fp8)
    drafter = None
    if has_drafter:
        with META:
            drafter = DFlashDraftModel(drafter_config(weights.spec)).to(torch.bfloat16)
    backend = ResidentBackend(weights, drafter, 2, 512, prefetch=prefetch, target=Target((9, 0), 132))
    backend.set_prompt_lookup(not has_drafter)
    (built,) = backend.compile()
    return backend.tasks, built


@pytest.fixture(scope="module")
def own() -> tuple[Tasks, Any]:
    return compiled()


def sass_of(built: Any) -> list[str]:
    """Instructions of the machine code, in order."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        listing = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?);", listing, re.MULTILINE)


def ptx_of(built: Any) -> list[str]:
    """Instructions of the virtual machine's code, without directives, comments and labels."""
    lines = (line.strip() for line in built.asm["ptx"].splitlines())
    return [line for line in lines if line and not line.startswith(("//", ".", "{", "}", "$"))]


def first(lines: list[str], pattern: str) -> str:
    """The first line that the pattern matches, or nothing."""
    return next((line for line in lines if re.search(pattern, line)), "")


def unguarded_acquires(ptx: list[str]) -> Iterator[str]:
    """Acquire loads behind which global memory is touched before all threads have met."""
    for index, line in enumerate(ptx):
        if "ld.global.gpu.acquire" in line:
            after = first(ptx[index + 1 :], r"bar\.sync|\.global|cp\.async")
            if "bar.sync" not in after:
                yield f"{line} then {after}"


def unguarded_releases(ptx: list[str]) -> Iterator[str]:
    """Releases before which something was stored without all threads having met since."""
    for index, line in enumerate(ptx):
        if re.search(r"(atom|red)\.global\.gpu\.release", line):
            before = first(ptx[:index][::-1], r"bar\.sync|st\.global")
            if "bar.sync" not in before:
                yield f"{before} then {line}"


def stale_acquires(sass: list[str]) -> Iterator[str]:
    """Acquire loads that leave the multiprocessor's L1 cache as it was."""
    for index, line in enumerate(sass):
        if "LDG.E.STRONG.GPU" in line:
            after = first(sass[index + 1 :], r"CCTL\.IVALL|BAR\.SYNC|LDG|STG")
            if "CCTL.IVALL" not in after:
                yield f"{line} then {after}"


def unfenced_releases(sass: list[str]) -> Iterator[str]:
    """Additions to counters that are not held back until what was stored has arrived."""
    for index, line in enumerate(sass):
        if re.search(r"(RED|ATOM)G?\.E\.ADD\.STRONG\.GPU", line):
            before = first(sass[:index][::-1], r"MEMBAR\.\w+\.GPU|STG|BAR\.SYNC")
            if "MEMBAR" not in before:
                yield f"{before} then {line}"


def unset_loads(ptx: list[str]) -> Iterator[str]:
    """Loads from shared memory by some threads alone, into registers that have no value for the others."""
    for before, line in zip(["", *ptx], ptx, strict=False):
        load = re.match(r"@!?%p\d+ ld\.shared\.\w+ (%\w+),", line)
        if load and not re.match(rf"mov\.b\d+ {load[1]}, 0;", before):
            yield line


def without(lines: list[str], pattern: str) -> list[str]:
    return [line for line in lines if not re.search(pattern, line)]


def num_waits_and_signals(tasks: Tasks) -> tuple[int, int]:
    waits = sum(len(variant.waits) + len(variant.item_waits) for variant in tasks.variants)
    return waits, sum(len(variant.signals) + len(variant.item_signals) for variant in tasks.variants)


@pytest.mark.slow
def test_a_wait_is_an_acquire_that_nothing_passes(own: tuple[Tasks, Any]) -> None:
    """Every wait is there twice: once before its loop of polls and once in it, which has not been deleted."""
    tasks, built = own
    ptx, sass = ptx_of(built), sass_of(built)
    num_waits, _ = num_waits_and_signals(tasks)
    assert sum("ld.global.gpu.acquire" in line for line in ptx) == 2 * num_waits
    assert sum("LDG.E.STRONG.GPU" in line for line in sass) >= 2 * num_waits
    assert not list(unguarded_acquires(ptx)) and not list(stale_acquires(sass))
    assert list(unguarded_acquires(without(ptx, r"bar\.sync"))), "the check sees what is missing"
    assert list(stale_acquires(without(sass, r"CCTL\.IVALL")))


@pytest.mark.slow
def test_a_signal_is_a_release_of_what_all_threads_stored(own: tuple[Tasks, Any]) -> None:
    tasks, built = own
    ptx, sass = ptx_of(built), sass_of(built)
    _, num_signals = num_waits_and_signals(tasks)
    assert sum(bool(re.search(r"(atom|red)\.global\.gpu\.release", line)) for line in ptx) == num_signals
    assert not list(unguarded_releases(ptx)) and not list(unfenced_releases(sass))
    assert list(unguarded_releases(without(ptx, r"bar\.sync"))), "the check sees what is missing"
    assert list(unfenced_releases(without(sass, "MEMBAR")))


@pytest.mark.slow
def test_no_load_may_be_served_from_what_a_launch_found(own: tuple[Tasks, Any]) -> None:
    """Loads through the non-coherent path may return what lay there before the launch."""
    _, built = own
    assert "ld.global.nc" not in built.asm["ptx"]
    loads = [line for line in sass_of(built) if "LDG" in line]
    assert len(loads) > 100 and not [line for line in loads if "CONSTANT" in line]


@pytest.mark.slow
def test_weights_are_fetched_into_the_cache(own: tuple[Tasks, Any]) -> None:
    """By every kind of phase that knows its weights early."""
    tasks, built = own
    num_early = sum(variant.is_known_early for variant in tasks.variants)
    assert built.asm["ptx"].count("cp.async.bulk.prefetch.L2.global") >= num_early
    assert built.metadata.launch_cooperative_grid


@pytest.mark.slow
def test_fp8_weights_are_decoded_in_the_resident_kernel(own: tuple[Tasks, Any]) -> None:
    _, built = compiled(has_fp8=True, layers=LAYERS[:1])
    assert "e4m3x2" in built.asm["ptx"] and "e4m3x2" not in own[1].asm["ptx"]
    assert not list(unguarded_acquires(ptx_of(built))) and "ld.global.nc" not in built.asm["ptx"]


@pytest.mark.slow
def test_a_drafter_waits_signals_and_fetches_like_the_rest() -> None:
    tasks, built = compiled(layers=LAYERS[:1], has_drafter=True)
    assert {"block", "pick", "fuse", "context", "append"} <= {variant.op for variant in tasks.variants}
    ptx, sass = ptx_of(built), sass_of(built)
    num_waits, num_signals = num_waits_and_signals(tasks)
    assert sum("ld.global.gpu.acquire" in line for line in ptx) == 2 * num_waits
    assert sum(bool(re.search(r"(atom|red)\.global\.gpu\.release", line)) for line in ptx) == num_signals
    assert not list(unguarded_acquires(ptx)) and not list(unguarded_releases(ptx)) and not list(unfenced_releases(sass))
    # What a program says to its own threads (`counters.agreed`) orders nothing: a word of its own record in the dump.
    own_word = rf"\+{4 * sync.SCRATCH.value:#x}\]"
    assert not without(list(stale_acquires(sass)), own_word)
    assert "ld.global.nc" not in built.asm["ptx"] and not list(unset_loads(ptx))
    num_early = sum(variant.is_known_early for variant in tasks.variants)
    assert built.asm["ptx"].count("cp.async.bulk.prefetch.L2.global") >= num_early


@pytest.mark.slow
def test_registers_that_some_threads_load_have_a_value_before(own: tuple[Tasks, Any]) -> None:
    """Of Triton 3.6; later versions have no such loads."""
    _, built = own
    ptx = ptx_of(built)
    assert not list(unset_loads(ptx))
    has_them = any(re.match(r"@!?%p\d+ ld\.shared", line) for line in ptx)
    assert has_them == triton.__version__.startswith("3.6.") == any(unset_loads(without(ptx, r"mov\.b32 %r\d+, 0;")))


def test_a_first_value_is_given_once_and_never_to_an_address() -> None:
    load, other = "\t@%p1 ld.shared.b32 %r2, [ %r21 + 0 ];\n", "\t@!%p1 ld.shared.b64 %rd3, [ %r21 + 8 ];\n"
    ptx = f"{load}{other}\tst.shared.b32 [%r2], %r3;\n"
    found = f"\tmov.b32 %r2, 0;\n{load}\tmov.b64 %rd3, 0;\n{other}\tst.shared.b32 [%r2], %r3;\n"
    assert with_first_values(ptx) == found
    own_address = "\t@%p1 ld.shared.b32 %r2, [ %r2 + 0 ];\n"
    assert with_first_values(own_address) == own_address


def test_a_compilation_hook_of_others_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def hook(*arguments: Any) -> Any:
        seen.append(arguments)
        return None if arguments else ("theirs", "hash")

    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", hook)
    with first_values():
        ours = triton.knobs.runtime.add_stages_inspection_hook
        stages = {"ptx": lambda source, metadata: "@%p1 ld.shared.b32 %r2, [ %r3 + 0 ];"}
        ours(None, stages, None, None, 90)
        assert [text.endswith(end) for text, end in zip(ours(), ("theirs", "hash"), strict=True)] == [True, True]
    assert stages["ptx"](None, None).startswith("mov.b32 %r2, 0;") and len(seen) == 2
    assert triton.knobs.runtime.add_stages_inspection_hook is hook
