"""llama.cpp as a peer, in a process of its own, on GGUF files of the same model: the user's, or copies made for it.

Its weights may be rounded otherwise than ours, hence the same text is compared and not promised.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from speedstack.eval.results.failures import PEER_ERRORS, one_line
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.speed.contestant import Contestant
from speedstack.eval.speed.peers.copies import GGUFWeights, PeerCopies
from speedstack.eval.speed.peers.process import PeerProcess, check_installed

LLAMA_CPP = "llama.cpp"


def llama_cpp_contestants(
    copies: PeerCopies,
    gguf: Path | None,
    weights: Sequence[GGUFWeights],
    python: Path,
    device: str,
    max_length: int,
    batch_size: int,
    reference: str,
    processes: ExitStack,
) -> tuple[list[Contestant], list[Unavailable]]:
    """llama.cpp on the file `gguf`, or without one on a copy of the target for each of `weights`; or why not.

    `processes` ends them.
    """
    contestants: list[Contestant] = []
    unavailable: list[Unavailable] = []
    for kind in [None] if gguf is not None else weights:
        name = LLAMA_CPP if len(weights) == 1 or kind is None else f"{LLAMA_CPP}, {kind}"
        what = "" if kind is None else f": {'experts in MXFP4, other ' if copies.is_packed else ''}weights in {kind}"
        try:
            check_installed(python, "llama_cpp", "llama-cpp-python")
            file = gguf if kind is None else copies.gguf(python, kind)
            options = {
                "gguf": str(file),
                "num_threads": torch.get_num_threads(),
                "max_length": max_length,
                "batch_size": batch_size,
                "is_gpu": device.startswith("cuda"),
            }
            started = time.perf_counter()
            process = processes.enter_context(PeerProcess(python, "llama_cpp", options))
        except PEER_ERRORS as error:
            unavailable.append(Unavailable(name=name, reason=one_line(error)))
            continue
        contestants.append(
            Contestant(
                name=name,
                description=f"{process.description}{what}",
                run=process.run,
                run_batch=process.run_batch,
                prepare_seconds=time.perf_counter() - started,
                identical_to=reference,
            )
        )
    return contestants, unavailable
