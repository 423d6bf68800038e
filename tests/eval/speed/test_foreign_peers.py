"""vLLM and llama.cpp as peers in processes of their own, against stand-ins for both, and everything that goes wrong."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.results.schema import Unavailable
from speedstack.eval.speed.contestant import Contestant, Sample
from speedstack.eval.speed.harness import race
from speedstack.eval.speed.peers.copies import PeerCopies
from speedstack.eval.speed.peers.llama_cpp_peer import llama_cpp_contestants
from speedstack.eval.speed.peers.process import PeerProcess, peer_python
from speedstack.eval.speed.peers.vllm_peer import cache_bytes, vllm_contestants
from speedstack.quant.checkpoint.config import read_config
from speedstack.runtime.model.families.registry import spec_from_config
from tests.eval.speed.stand_ins import interpreter, llama_cpp_interpreter, script, vllm_interpreter

OURS = Path(sys.executable)


@pytest.fixture
def processes() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def vllm(
    processes: ExitStack, target: Path, drafter: Path | None, python: Path, tmp_path: Path, device: str = "cpu"
) -> tuple[list[Contestant], list[Unavailable]]:
    copies = PeerCopies(target, tmp_path / "copies")
    return vllm_contestants(copies, drafter, python, torch.float32, device, 64, 3, "engine", processes)


def llama_cpp(
    processes: ExitStack, target: Path, gguf: Path | None, python: Path, tmp_path: Path, max_length: int = 64
) -> tuple[list[Contestant], list[Unavailable]]:
    copies = PeerCopies(target, tmp_path / "copies")
    return llama_cpp_contestants(copies, gguf, ("f16",), python, "cpu", max_length, 2, "engine", processes)


def test_vllm_is_stepped_and_its_rounds_counted(
    processes: ExitStack, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    python = vllm_interpreter(tmp_path)
    contestants, unavailable = vllm(processes, tiny_packed_dir, tiny_packed_drafter_dir, python, tmp_path)
    assert [entry.name for entry in contestants] == ["vLLM", "vLLM + drafter"] and not unavailable, unavailable
    for contestant in contestants:
        assert contestant.description.startswith("vLLM 9.9 (None, 2 threads), its own process, no prefix cache, exp")
    assert contestants[1].description.endswith("DFlash drafter, 7 proposals a round")
    sets = {"a": [[1, 2], [3]], "b": [[4], [5], [6]]}
    standings = race(contestants, sets, num_new_tokens=6, num_repeats=1, progress=False, batch_sizes={"b": 3})
    assert not standings.unavailable
    first, second = standings.overall
    assert first.acceptance_length is None
    # Five tokens after the first, in two rounds; the second had room for one proposal.
    assert second.acceptance_length == 5 / 2 and second.survival == (1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert [entry.acceptance_length for entry in standings.sets["b"]] == [None, 5 / 2]
    assert [sample.tokens for sample in contestants[0].run_batch([[4], [5]], 6)] == [  # type: ignore[misc]
        [4, 8, 9, 10, 11, 12],
        [5, 8, 9, 10, 11, 12],
    ]


def test_vllm_gets_what_its_documentation_asks_for(processes: ExitStack, tiny_model_dir: Path, tmp_path: Path) -> None:
    python = vllm_interpreter(tmp_path)
    libraries = tmp_path / "library" / "vllm" / "libs"
    libraries.mkdir()
    (libraries / "libtcmalloc_minimal.so.4").touch()
    (contestant,), _ = vllm(processes, tiny_model_dir, None, python, tmp_path)
    assert contestant.description == "vLLM 9.9 (5, 2 threads), its own process, no prefix cache"


def test_vllm_has_key_value_buffers_for_the_longest_texts(tiny_packed_dir: Path) -> None:
    spec = spec_from_config(read_config(tiny_packed_dir)[0])
    small, large = (cache_bytes(spec, torch.bfloat16, length, 16) for length in (64, 10**6))
    heads = sum(one.num_kv_heads * (one.qk_head_dim + one.v_head_dim) for one in (x.attention for x in spec.layers))
    assert small == 2**28 and large > 2 * 16 * 10**6 * heads


def test_vllm_instances_share_what_memory_is_left(
    processes: ExitStack, tiny_packed_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 120))
    monkeypatch.setattr(
        "speedstack.eval.speed.peers.vllm_peer.PeerProcess", lambda python, name, options: asked.append(options)
    )
    vllm(processes, tiny_packed_dir, None, vllm_interpreter(tmp_path), tmp_path, "cuda")
    assert asked[0]["gpu_memory_utilization"] == pytest.approx(0.225)
    assert asked[0]["model"] == str(tiny_packed_dir) and "kv_cache_memory_bytes" not in asked[0]


def test_llama_cpp_decodes_several_sequences(processes: ExitStack, tiny_packed_dir: Path, tmp_path: Path) -> None:
    file, python = tmp_path / "model.gguf", llama_cpp_interpreter(tmp_path)
    file.touch()
    (contestant,), unavailable = llama_cpp(processes, tiny_packed_dir, file, python, tmp_path)
    assert contestant.description == "llama-cpp-python 9.9, model.gguf" and not unavailable
    assert contestant.identical_to == "engine" and not contestant.identity_promised
    assert contestant.run([5], 3).tokens == [6, 7, 8]
    assert contestant.run_batch is not None
    assert [sample.tokens for sample in contestant.run_batch([[5, 6, 7], [20]], 3)] == [[8, 9, 10], [21, 22, 23]]
    standings = race([contestant], {"a": [[1, 2]]}, num_new_tokens=4, num_repeats=2, progress=False)
    assert not standings.unavailable and standings.overall[0].token_ms is not None


def test_why_llama_cpp_cannot_is_said(processes: ExitStack, tiny_packed_dir: Path, tmp_path: Path) -> None:
    file, python = tmp_path / "model.gguf", llama_cpp_interpreter(tmp_path)
    none, (absent,) = llama_cpp(processes, tiny_packed_dir, file, python, tmp_path)
    assert none == [] and absent.reason == (
        f"ValueError: {file} cannot be loaded: key not found in model: qwen3moe.context_length"
    )
    file.touch()
    _, (absent,) = llama_cpp(processes, tiny_packed_dir, file, python, tmp_path, max_length=10**6)
    assert absent.reason == "ValueError: no context of 2000000 tokens: failed to allocate buffer"
    (contestant,), _ = llama_cpp(processes, tiny_packed_dir, file, python, tmp_path)
    with pytest.raises(PeerFailure, match=r"^RuntimeError: llama_decode returned 1: no memory slot$"):
        contestant.run([1, 667], 3)
    assert contestant.run([5], 3).tokens == [6, 7, 8]


def test_peers_that_cannot_run_leave_a_race_that_goes_on(
    processes: ExitStack, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (peer,), _ = vllm(processes, tiny_model_dir, None, vllm_interpreter(tmp_path), tmp_path)
    good = Contestant("good", "", lambda prompt, n: Sample([1] * n, [(0.1, 1), (0.2, n - 1)], 0.2))
    sets = {"fine": [[1]], "unfit": [[667]], "crash": [[1], [666], [1]], "after": [[1]]}
    standings = race([peer, good], sets, num_new_tokens=6, num_repeats=1, progress=False)
    assert [(entry.name, entry.reason) for entry in standings.unavailable] == [
        ("vLLM", "unfit: RuntimeError: no kernel for these heads"),
        ("vLLM", "crash: its process ended with status 3: lines of its own, on standard output"),
        ("vLLM", "after: its process ended with status 3: lines of its own, on standard output"),
    ]
    assert [[entry.name for entry in entries] for entries in standings.sets.values()] == [
        ["vLLM", "good"],
        ["good"],
        ["good"],
        ["good"],
    ]


def test_a_model_that_a_peer_does_not_know(processes: ExitStack, tiny_model_dir: Path, tmp_path: Path) -> None:
    target = tmp_path / "unknown"
    target.symlink_to(tiny_model_dir)
    none, (absent,) = vllm(processes, target, None, vllm_interpreter(tmp_path), tmp_path)
    assert none == [] and absent.reason == "ValueError: Model architectures ['Other'] are not supported"


def test_what_is_not_installed_is_named(
    processes: ExitStack, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    none, absent = vllm(processes, tiny_packed_dir, tiny_packed_drafter_dir, OURS, tmp_path)
    reason = f"vllm is not installed for {OURS}: `make peers` installs it"
    assert none == []
    assert [(entry.name, entry.reason) for entry in absent] == [("vLLM", reason), ("vLLM + drafter", reason)]
    for python, why in (
        (OURS, f"llama-cpp-python is not installed for {OURS}: `make peers` installs it"),
        (tmp_path / "no" / "python", f"no interpreter at {tmp_path}/no/python (No such file or directory): `make pee"),
    ):
        none, (one,) = llama_cpp(processes, tiny_packed_dir, None, python, tmp_path)
        assert none == [] and one.name == "llama.cpp" and one.reason.startswith(why)
    # Nothing was copied for peers that are not there.
    assert not (tmp_path / "copies").exists()


def test_processes_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for body, reason in (
        ("read line; kill -SEGV $$", "its process ended with signal SIGSEGV"),
        ("echo 'no such library' >&2; exit 7", "its process ended with status 7: no such library"),
        ("exec sleep 60", "no answer for 1 s"),
    ):
        monkeypatch.setattr("speedstack.eval.speed.peers.process.LOAD_SECONDS", 1.0)
        with pytest.raises(PeerFailure, match=f"^{reason}$"):
            PeerProcess(script(tmp_path / "python", body), "vllm", {})
    with pytest.raises(PeerFailure, match=r"no interpreter at .* \(Permission denied\)"):
        (tmp_path / "python").chmod(0o644)
        PeerProcess(tmp_path / "python", "vllm", {})


def test_the_interpreter_is_the_one_named_or_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert peer_python(Path("my/python")) == Path("my/python")
    assert peer_python(None) == OURS
    installed = Path(".venv-peers/bin/python")
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert peer_python(None) == installed


def test_a_worker_sees_neither_our_packages_nor_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    found = "[u.find_spec(name) for name in ('worker', 'vllm_peer', 'tests')]"
    python = interpreter(tmp_path, {"vllm/__init__.py": f"import importlib.util as u\nraise ValueError(str({found}))"})
    with pytest.raises(PeerFailure, match=r"^ValueError: \[None, None, None\]$"):
        PeerProcess(python, "vllm", {})
