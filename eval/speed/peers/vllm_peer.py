"""vLLM as a peer, in a process of its own for each of two instances: without and with the drafter.

On a GPU each gets half of the memory that is left. vLLM's build for CPUs has no kernels for packed experts and reads an
unpacked copy; its key/value buffers take what the longest texts need.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.peers.copies import PeerCopies
from speedstack.eval.speed.peers.process import PeerProcess, check_installed
from speedstack.eval.speed.peers.transformers_peer import rounds_of
from speedstack.quant.checkpoint.config import read_config
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.spec import ModelSpec

VLLM, VLLM_DRAFTER = "vLLM", "vLLM + drafter"
MEMORY_SHARE = 0.45
BLOCK_LENGTH = 128  # tokens in a block of its key/value buffers on a CPU
MIN_CACHE_BYTES = 2**28


def vllm_contestants(
    copies: PeerCopies,
    drafter: str | Path | None,
    python: Path,
    dtype: torch.dtype,
    device: str,
    max_length: int,
    batch_size: int,
    reference: str,
    processes: ExitStack,
) -> tuple[list[Contestant], list[Unavailable]]:
    """vLLM without and with `drafter`, where `python` has it and it takes them; and the others with the reason.

    `processes` ends them.
    """
    contestants: list[Contestant] = []
    unavailable: list[Unavailable] = []
    for name in [VLLM] if drafter is None else [VLLM, VLLM_DRAFTER]:
        num_proposals = None
        try:
            check_installed(python, "vllm", "vllm")
            options = _options(copies, dtype, device, max_length, batch_size)
            if name == VLLM_DRAFTER:
                assert drafter is not None
                num_proposals = load_drafter(drafter).config.num_proposals
                options["speculative_config"] = {
                    "method": "dflash",
                    "model": str(drafter),
                    "num_speculative_tokens": num_proposals,
                }
            started = time.perf_counter()
            process = processes.enter_context(PeerProcess(python, "vllm", options))
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=name, reason=one_line(error)))
            continue
        unpacked = "" if options["model"] == str(copies.target) else ", experts unpacked"
        how = "" if num_proposals is None else f", DFlash drafter, {num_proposals} proposals a round"
        speculating = _Speculating(process, num_proposals) if num_proposals is not None else process
        contestants.append(
            Contestant(
                name=name,
                description=f"{process.description}, its own process, no prefix cache{unpacked}{how}",
                run=speculating.run,
                run_batch=speculating.run_batch,
                prepare_seconds=time.perf_counter() - started,
                identical_to=reference,
            )
        )
    return contestants, unavailable


def cache_bytes(spec: ModelSpec, dtype: torch.dtype, max_length: int, batch_size: int) -> int:
    """Bytes of key/value buffers for so many sequences of `max_length`, with room for the blocks at their ends."""
    heads = sum(one.num_kv_heads * (one.qk_head_dim + one.v_head_dim) for one in (x.attention for x in spec.layers))
    num_blocks = batch_size * (-(-max_length // BLOCK_LENGTH) + 1) + 1
    return max(MIN_CACHE_BYTES, 2 * num_blocks * BLOCK_LENGTH * heads * dtype.itemsize)


def _options(copies: PeerCopies, dtype: torch.dtype, device: str, max_length: int, batch_size: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "model": str(copies.target),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "max_num_seqs": batch_size,
    }
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return options | {"gpu_memory_utilization": MEMORY_SHARE * free / total}
    spec = spec_from_config(read_config(copies.target)[0])
    return options | {
        "model": str(copies.plain()),
        "kv_cache_memory_bytes": cache_bytes(spec, dtype, max_length, batch_size),
    }


class _Speculating:
    """A peer whose rounds are counted."""

    def __init__(self, process: PeerProcess, num_proposals: int) -> None:
        self._process, self._num_proposals = process, num_proposals

    def run(self, prompt: list[int], num_new_tokens: int) -> Sample:
        return self.run_batch([prompt], num_new_tokens)[0]

    def run_batch(self, prompts: list[list[int]], num_new_tokens: int) -> list[Sample]:
        return [
            replace(sample, rounds=rounds_of(sample.arrivals, num_new_tokens, self._num_proposals))
            for sample in self._process.run_batch(prompts, num_new_tokens)
        ]
