"""vLLM and llama.cpp as peers, against stand-ins with the interfaces that their documentation describes."""

import importlib.machinery
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from speedstack.eval.peer_llama_cpp import llama_cpp_contestants
from speedstack.eval.peer_vllm import vllm_contestants
from speedstack.eval.timing import race

DRAFTED_TOKENS = [[7], [8, 9, 10], [11, 12]]  # as a drafter's rounds commit them


class FakeLLM:
    """`vllm.LLM`: a step commits what comes next in `DRAFTED_TOKENS` when it drafts, one token when it does not."""

    made: list["FakeLLM"] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, **options: Any) -> None:
        if options["model"] == "unknown":
            raise ValueError("Model architectures ['Other'] are not supported")
        self.options, self.llm_engine, self.requests = options, self, list[Any]()
        self.steps: Iterator[list[int]] = iter(())
        self.is_running = False
        FakeLLM.made.append(self)

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SimpleNamespace) -> None:
        self.requests.append((request_id, prompt, params))
        tokens = DRAFTED_TOKENS if "speculative_config" in self.options else [[t] for r in DRAFTED_TOKENS for t in r]
        self.steps, self.is_running = iter([[], *tokens]), True  # a step of the prompt's first half brings nothing

    def has_unfinished_requests(self) -> bool:
        return self.is_running

    def step(self) -> list[SimpleNamespace]:
        tokens = next(self.steps)
        self.is_running = tokens[-1:] != [12]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens)])]


class FakeLlama:
    """`llama_cpp.Llama`: greedy tokens without end, none of the last prompt's remembered after `reset`."""

    def __init__(self, **options: Any) -> None:
        if not Path(options["model_path"]).is_file():
            raise ValueError(f"Model path does not exist: {options['model_path']}")
        self.options, self.num_resets = options, 0

    def reset(self) -> None:
        self.num_resets += 1

    def generate(self, tokens: list[int], temp: float, repeat_penalty: float) -> Iterator[int]:
        assert temp == 0.0 and repeat_penalty == 1.0
        token = tokens[-1]
        while True:
            token += 1
            yield token


def module(name: str, **attributes: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(attributes)
    return made


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    FakeLLM.made.clear()
    kind = SimpleNamespace(DELTA="delta")
    monkeypatch.setitem(
        sys.modules, "vllm", module("vllm", LLM=FakeLLM, SamplingParams=SimpleNamespace, __version__="9.9")
    )
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module("vllm.sampling_params", RequestOutputKind=kind))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return FakeLLM


def test_vllm_is_stepped_and_its_rounds_counted(vllm: type[FakeLLM], tiny_packed_drafter_dir: Path) -> None:
    contestants, unavailable = vllm_contestants("T", tiny_packed_drafter_dir, torch.float32, "cpu", 64, "engine")
    assert [entry.name for entry in contestants] == ["vLLM", "vLLM + drafter"] and not unavailable
    plain, drafting = vllm.made
    assert plain.options["enable_prefix_caching"] is False and plain.options["max_model_len"] == 64
    assert plain.options["dtype"] == "float32" and "speculative_config" not in plain.options
    assert drafting.options["speculative_config"] == {
        "method": "dflash",
        "model": str(tiny_packed_drafter_dir),
        "num_speculative_tokens": 7,
    }
    standings = race(contestants, {"a": [[1, 2], [3]]}, num_new_tokens=6, num_repeats=1, progress=False)
    assert not standings.unavailable
    first, second = standings.overall
    assert first.acceptance_length is None
    # Five tokens after the first, in two rounds; the second had room for one proposal.
    assert second.acceptance_length == 5 / 2 and second.survival == (1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    requests = [request for request in plain.requests]
    assert len({request[0] for request in requests}) == 3
    _, prompt, params = requests[0]
    assert prompt == {"prompt_token_ids": [1, 2]}
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.0, 6, True)
    assert params.output_kind == "delta" and params.detokenize is False


def test_vllm_that_cannot_run_the_model(vllm: type[FakeLLM]) -> None:
    contestants, unavailable = vllm_contestants("unknown", None, torch.bfloat16, "cpu", 64, "engine")
    assert contestants == []
    assert [(entry.name, entry.reason) for entry in unavailable] == [
        ("vLLM", "ValueError: Model architectures ['Other'] are not supported")
    ]


def test_vllm_instances_share_what_memory_is_left(vllm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 120))
    vllm_contestants("T", None, torch.bfloat16, "cuda", 64, "engine")
    assert vllm.made[0].options["gpu_memory_utilization"] == pytest.approx(0.225)


def test_llama_cpp_stops_at_the_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeLlama] = []

    def build(**options: Any) -> FakeLlama:
        made.append(FakeLlama(**options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "llama_cpp", module("llama_cpp", Llama=build, __version__="9.9"))
    file = tmp_path / "model.gguf"
    file.touch()
    contestants, unavailable = llama_cpp_contestants(file, "cpu", 64, "engine")
    standings = race(contestants, {"a": [[1, 2]]}, num_new_tokens=4, num_repeats=2, progress=False)
    assert not unavailable and not standings.unavailable
    assert standings.overall[0].token_ms is not None
    assert contestants[0].run([5], 3).tokens == [6, 7, 8]
    assert contestants[0].identical_to == "engine" and not contestants[0].identity_promised
    assert made[0].options["n_ctx"] == 64 and made[0].options["n_gpu_layers"] == 0 and made[0].num_resets == 4
    _, (absent,) = llama_cpp_contestants(None, "cpu", 64, "engine")
    assert absent.reason == "no GGUF file of the model: give --gguf FILE"
    _, (absent,) = llama_cpp_contestants(tmp_path / "none.gguf", "cpu", 64, "engine")
    assert absent.reason.startswith("ValueError: Model path does not exist")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    contestants, unavailable = vllm_contestants("T", "D", torch.float32, "cpu", 64, "engine")
    assert contestants == [] and [(entry.name, entry.reason) for entry in unavailable] == [
        ("vLLM", "vllm is not installed"),
        ("vLLM + drafter", "vllm is not installed"),
    ]
    _, (absent,) = llama_cpp_contestants(Path("m.gguf"), "cpu", 64, "engine")
    assert (absent.name, absent.reason) == ("llama.cpp", "llama-cpp-python is not installed")
