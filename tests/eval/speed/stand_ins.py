"""Stand-ins for what peers need: libraries with the interfaces that their documentation describes, and interpreters."""

import sys
from pathlib import Path

VLLM = """
import os
from types import SimpleNamespace

__version__ = f"9.9 ({os.environ.get('KMP_BLOCKTIME')}, {os.environ['OMP_NUM_THREADS']} threads)"
DRAFTED_TOKENS = [[7], [8, 9, 10], [11, 12]]  # as a drafter's rounds commit them
SamplingParams = SimpleNamespace


class LLM:
    '''A step commits what comes next in DRAFTED_TOKENS when it drafts, one token when it does not.'''

    def __init__(self, **options):
        print("lines of its own, on standard output")
        if "unknown" in options["model"]:
            raise RuntimeError("engine core failed") from ValueError("Model architectures ['Other'] are not supported")
        assert options["enable_prefix_caching"] is False and options["skip_tokenizer_init"] is True
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        self.options, self.llm_engine, self.running = options, self, {}

    def add_request(self, name, prompt, params):
        assert (params.temperature, params.ignore_eos, params.detokenize) == (0.0, True, False)
        assert params.output_kind == "delta"
        assert len(self.running) < self.options["max_num_seqs"]
        if prompt["prompt_token_ids"] == [666]:
            os._exit(3)
        pieces = DRAFTED_TOKENS if "speculative_config" in self.options else [[t] for r in DRAFTED_TOKENS for t in r]
        # A step of the prompt's first half brings nothing; what another sequence has shows in the first token.
        self.running[name] = [[], [prompt["prompt_token_ids"][0]], *pieces[1:]]
        self.bad = prompt["prompt_token_ids"] == [667]

    def has_unfinished_requests(self):
        return bool(self.running)

    def abort_request(self, names):
        for name in names:
            self.running.pop(name, None)

    def step(self):
        if self.bad:
            raise RuntimeError("no kernel for these heads\\nand a traceback")
        outputs = []
        for name in list(self.running):
            tokens = self.running[name].pop(0)
            outputs.append(SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=tokens)]))
            if not self.running[name]:
                del self.running[name]
        return outputs
"""

VLLM_PARAMS = "class RequestOutputKind:\n    DELTA = 'delta'\n"

LLAMA_CPP = """
import ctypes
from pathlib import Path
from types import SimpleNamespace

__version__ = "9.9"
llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
log = None


def llama_log_set(callback, data):
    global log
    log = callback


def llama_backend_init():
    pass


def llama_model_default_params():
    return SimpleNamespace(n_gpu_layers=-1)


def llama_context_default_params():
    return SimpleNamespace()


def llama_model_load_from_file(path, params):
    assert params.n_gpu_layers == 0
    log(3, b"a warning", None)
    if not Path(path.decode()).is_file():
        log(4, b"key not found in model: qwen3moe.context_length\\n", None)
        log(4, b"failed to load model\\n", None)
        return None
    return "model"


class Context:
    def __init__(self, params):
        self.params, self.seen, self.logits = params, {}, {}


def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch == 2
    if params.n_ctx > 10**6:
        log(4, b"failed to allocate buffer", None)
        return None
    return Context(params)


def llama_get_memory(context):
    return context


def llama_memory_clear(memory, data):
    memory.seen.clear()


def llama_sampler_init_greedy():
    return "greedy"


def llama_batch_init(num_tokens, embd, num_sequences):
    return SimpleNamespace(
        n_tokens=0,
        token=[0] * num_tokens,
        pos=[0] * num_tokens,
        n_seq_id=[0] * num_tokens,
        seq_id=[[0] for _ in range(num_tokens)],
        logits=[0] * num_tokens,
    )


def llama_decode(context, batch):
    '''Holds callers to positions without gaps; the next token is the last one's number after it.'''
    context.logits = {}
    for i in range(batch.n_tokens):
        (sequence,) = batch.seq_id[i]
        assert batch.n_seq_id[i] == 1 and sequence < context.params.n_seq_max
        assert batch.pos[i] == context.seen.get(sequence, 0) < context.params.n_ctx // context.params.n_seq_max
        context.seen[sequence] = batch.pos[i] + 1
        if batch.token[i] == 667:
            log(4, b"no memory slot", None)
            return 1
        if batch.logits[i]:
            context.logits[i] = batch.token[i] + 1
    return 0


def llama_sampler_sample(sampler, context, index):
    return context.logits[index]
"""


def interpreter(directory: Path, modules: dict[str, str]) -> Path:
    """An interpreter that finds modules in files of these names, with this source, beside what ours finds."""
    library = directory / "library"
    for name, source in modules.items():
        file = library / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return script(directory / "python", f'PYTHONPATH={library} exec {sys.executable} "$@"')


def script(path: Path, body: str) -> Path:
    """A program of a shell's commands."""
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def vllm_interpreter(directory: Path) -> Path:
    """One that has vLLM's stand-in."""
    return interpreter(directory, {"vllm/__init__.py": VLLM, "vllm/sampling_params.py": VLLM_PARAMS})


def llama_cpp_interpreter(directory: Path) -> Path:
    """One that has the stand-in of llama.cpp's bindings."""
    return interpreter(directory, {"llama_cpp.py": LLAMA_CPP})
