"""vLLM as a peer, in this process: its engine, stepped by hand so that every token's time is known.

Written to vLLM's documented Python interface (`LLM`, `SamplingParams`, `LLM.llm_engine.add_request` and `step`). Its
prefix cache is off, because a race gives the same prompts again; each of two instances, without and with the drafter,
gets half of the GPU memory that is left.
"""

import importlib
import importlib.util
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.eval.document import Unavailable
from speedstack.eval.failures import PEER_ERRORS, one_line
from speedstack.eval.peer_transformers import rounds_of
from speedstack.eval.timing import Contestant, Sample

VLLM, VLLM_DRAFTER = "vLLM", "vLLM + drafter"
MEMORY_SHARE = 0.45


def vllm_contestants(
    target: str | Path,
    drafter: str | Path | None,
    dtype: torch.dtype,
    device: str,
    max_length: int,
    reference: str,
) -> tuple[list[Contestant], list[Unavailable]]:
    """vLLM without and with `drafter`, where it is installed and takes them; and the others with the reason."""
    names = [VLLM] if drafter is None else [VLLM, VLLM_DRAFTER]
    if importlib.util.find_spec("vllm") is None:
        return [], [Unavailable(name=name, reason="vllm is not installed") for name in names]
    # Its engine in a process of its own would be forked from one that uses the GPU already.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    contestants: list[Contestant] = []
    unavailable: list[Unavailable] = []
    for name in names:
        started = time.perf_counter()
        num_proposals = None
        options: dict[str, Any] = {}
        try:
            vllm = importlib.import_module("vllm")
            if name == VLLM_DRAFTER:
                assert drafter is not None
                num_proposals = load_drafter(drafter).config.num_proposals
                options["speculative_config"] = {
                    "method": "dflash",
                    "model": str(drafter),
                    "num_speculative_tokens": num_proposals,
                }
            if device.startswith("cuda"):
                free, total = torch.cuda.mem_get_info(device)
                options["gpu_memory_utilization"] = MEMORY_SHARE * free / total
            llm = vllm.LLM(
                model=str(target),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=max_length,
                max_num_seqs=1,
                enable_prefix_caching=False,
                seed=0,
                **options,
            )
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=name, reason=one_line(error)))
            continue
        how = "" if num_proposals is None else f", DFlash drafter, {num_proposals} proposals a round"
        contestants.append(
            Contestant(
                name=name,
                description=f"vLLM {vllm.__version__}, engine in this process, no prefix cache{how}",
                run=_runner(vllm, llm, num_proposals),
                prepare_seconds=time.perf_counter() - started,
                identical_to=reference,
            )
        )
    return contestants, unavailable


def _runner(vllm: Any, llm: Any, num_proposals: int | None) -> Callable[[list[int], int], Sample]:
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    numbers = itertools.count()

    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False, output_kind=delta
        )
        tokens: list[int] = []
        arrivals: list[tuple[float, int]] = []
        started = time.perf_counter()
        llm.llm_engine.add_request(f"bench-{next(numbers)}", {"prompt_token_ids": prompt}, params)
        while llm.llm_engine.has_unfinished_requests():
            for request in llm.llm_engine.step():
                new = list(request.outputs[0].token_ids)
                if new:
                    tokens += new
                    arrivals.append((time.perf_counter() - started, len(new)))
        return Sample(
            tokens=tokens,
            arrivals=arrivals,
            total_seconds=time.perf_counter() - started,
            rounds=None if num_proposals is None else rounds_of(arrivals, num_new_tokens, num_proposals),
        )

    return run
