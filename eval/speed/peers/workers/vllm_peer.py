"""vLLM as a peer: its engine inside this process, stepped by hand, so that every token's time is known.

Written to vLLM's documented Python interface (`LLM`, `SamplingParams`, `LLM.llm_engine.add_request` and `step`). Its
prefix cache is off, because a race gives the same prompts again. On a CPU its threads are bound to no cores, as those
of the other contestants, and there are as many as OMP_NUM_THREADS says.
"""

import importlib
import importlib.util
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = ("libtcmalloc_minimal*.so*", "libiomp5.so")


def environment() -> dict[str, str]:
    """What vLLM's documentation says of CPUs: two libraries loaded ahead, and OpenMP threads that soon sleep."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        return {}
    folders = (Path(found.origin).parent / "libs", Path(sys.prefix) / "lib")
    libraries = [str(file) for folder in folders for name in PRELOADED for file in sorted(folder.glob(name))[:1]]
    return {"LD_PRELOAD": ":".join(libraries), "KMP_BLOCKTIME": "5"} if libraries else {}


def load(options: dict[str, Any]) -> tuple[str, Any]:
    """`options` are those of `vllm.LLM`."""
    # An engine in yet another process would keep a core for itself, and be asked over a socket.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    vllm = importlib.import_module("vllm")
    delta = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
    engine = vllm.LLM(enable_prefix_caching=False, skip_tokenizer_init=True, seed=0, **options).llm_engine
    numbers = itertools.count()

    def run(prompts: list[list[int]], num_new_tokens: int) -> tuple[list[list[int]], list[list[Any]], float]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=num_new_tokens, ignore_eos=True, detokenize=False, output_kind=delta
        )
        names = [f"bench-{next(numbers)}" for _ in prompts]
        tokens: dict[str, list[int]] = {name: [] for name in names}
        arrivals: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
        started = time.perf_counter()
        try:
            for name, prompt in zip(names, prompts, strict=True):
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            while engine.has_unfinished_requests():
                for request in engine.step():
                    new = list(request.outputs[0].token_ids)
                    if new:
                        tokens[request.request_id] += new
                        arrivals[request.request_id].append((time.perf_counter() - started, len(new)))
        except Exception:
            engine.abort_request(names)  # or the next call would wait for them
            raise
        total_seconds = time.perf_counter() - started
        return [tokens[name] for name in names], [arrivals[name] for name in names], total_seconds

    return f"vLLM {vllm.__version__}", run
