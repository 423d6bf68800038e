"""llama.cpp as a peer, through the `llama-cpp-python` bindings, on a GGUF file of the same model.

Written to the documented `Llama` class. The file is the user's to make, with llama.cpp's own converter; its weights
may be rounded otherwise than ours, hence the same text is compared and not promised.
"""

import importlib
import importlib.util
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speedstack.eval.document import Unavailable
from speedstack.eval.failures import PEER_ERRORS, one_line
from speedstack.eval.timing import Contestant, Sample

LLAMA_CPP = "llama.cpp"


def llama_cpp_contestants(
    gguf: Path | None, device: str, max_length: int, reference: str
) -> tuple[list[Contestant], list[Unavailable]]:
    """llama.cpp on the file `gguf`, or the reason why not."""
    if importlib.util.find_spec("llama_cpp") is None:
        return [], [Unavailable(name=LLAMA_CPP, reason="llama-cpp-python is not installed")]
    if gguf is None:
        return [], [Unavailable(name=LLAMA_CPP, reason="no GGUF file of the model: give --gguf FILE")]
    started = time.perf_counter()
    try:
        bindings = importlib.import_module("llama_cpp")
        llama = bindings.Llama(
            model_path=str(gguf),
            n_ctx=max_length,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            n_gpu_layers=-1 if device.startswith("cuda") else 0,
            verbose=False,
        )
    except PEER_ERRORS as error:
        return [], [Unavailable(name=LLAMA_CPP, reason=one_line(error))]
    contestant = Contestant(
        name=LLAMA_CPP,
        description=f"llama-cpp-python {bindings.__version__}, {gguf.name}",
        run=_runner(llama),
        prepare_seconds=time.perf_counter() - started,
        identical_to=reference,
    )
    return [contestant], []


def _runner(llama: Any) -> Callable[[list[int], int], Sample]:
    def run(prompt: list[int], num_new_tokens: int) -> Sample:
        tokens: list[int] = []
        arrivals: list[tuple[float, int]] = []
        llama.reset()  # or it would keep what two prompts have in common
        started = time.perf_counter()
        # The generator never ends by itself.
        for token in itertools.islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), num_new_tokens):
            tokens.append(int(token))
            arrivals.append((time.perf_counter() - started, 1))
        return Sample(tokens=tokens, arrivals=arrivals, total_seconds=time.perf_counter() - started)

    return run
