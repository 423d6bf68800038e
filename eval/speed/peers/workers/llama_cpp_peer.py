"""llama.cpp as a peer, through the low-level interface of its Python bindings: its own decoding, batches and sampler.

Nothing but the list of tokens of a step goes through Python. Prompts are read in llama.cpp's default batches, all
sequences in turn, as its `llama-batched-bench` does.
"""

import ctypes
import time
from pathlib import Path
from typing import Any

GGML_LOG_LEVEL_ERROR = 4
PROMPT_BATCH = 2048  # llama.cpp's own default


def load(options: dict[str, Any]) -> tuple[str, Any]:
    """`options`: the file `gguf`, `num_threads`, `max_length` of a sequence, `batch_size` at most, `is_gpu`."""
    import llama_cpp

    model = _Model(llama_cpp, **options)
    return f"llama-cpp-python {llama_cpp.__version__}, {Path(options['gguf']).name}", model.run


class _Model:
    def __init__(
        self, bindings: Any, gguf: str, num_threads: int, max_length: int, batch_size: int, is_gpu: bool
    ) -> None:
        self.bindings, self.errors = bindings, list[str]()
        self._log = bindings.llama_log_callback(self._keep_errors)  # kept: C holds no reference
        bindings.llama_log_set(self._log, ctypes.c_void_p(0))
        bindings.llama_backend_init()
        params = bindings.llama_model_default_params()
        params.n_gpu_layers = 999 if is_gpu else 0
        self.model = bindings.llama_model_load_from_file(gguf.encode(), params)
        if not self.model:
            raise ValueError(self._reason(f"{gguf} cannot be loaded"))
        params = bindings.llama_context_default_params()
        params.n_ctx = max_length * batch_size
        params.n_seq_max = batch_size
        params.n_batch = PROMPT_BATCH
        params.n_threads = params.n_threads_batch = num_threads
        self.context = bindings.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(self._reason(f"no context of {params.n_ctx} tokens"))
        self.memory = bindings.llama_get_memory(self.context)
        self.sampler = bindings.llama_sampler_init_greedy()
        self.batch = bindings.llama_batch_init(PROMPT_BATCH, 0, 1)

    def run(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[list[list[int]], list[list[Any]], float]:
        """See `worker`."""
        tokens: list[list[int]] = [[] for _ in prompts]
        arrivals: list[list[Any]] = [[] for _ in prompts]
        self.bindings.llama_memory_clear(self.memory, True)  # or it would keep what two prompts have in common
        started = time.perf_counter()

        def decode(entries: list[tuple[int, int, int, bool]]) -> None:
            for sequence, token in self._decode(entries):
                tokens[sequence].append(token)
                arrivals[sequence].append((time.perf_counter() - started, 1))

        # (sequence, position, token, whether its logits are wanted)
        entries = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(entries), PROMPT_BATCH):
            decode(entries[start : start + PROMPT_BATCH])
        for step in range(num_new_tokens - 1):
            decode([(i, len(prompt) + step, tokens[i][-1], True) for i, prompt in enumerate(prompts)])
        return tokens, arrivals, time.perf_counter() - started

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> list[tuple[int, int]]:
        """A pass over at most PROMPT_BATCH tokens; the next token of each sequence whose logits are wanted."""
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (sequence, position, token, is_last) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, is_last
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        self.errors.clear()
        code = self.bindings.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(self._reason(f"llama_decode returned {code}"))
        return [
            (sequence, int(self.bindings.llama_sampler_sample(self.sampler, self.context, i)))
            for i, (sequence, _, _, is_last) in enumerate(entries)
            if is_last
        ]

    def _keep_errors(self, level: int, text: bytes, _data: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == GGML_LOG_LEVEL_ERROR and line:
            self.errors.append(line)

    def _reason(self, what: str) -> str:
        # The first line says what is wrong, those after it what could not be done for that.
        return f"{what}: {self.errors[0]}" if self.errors else what
