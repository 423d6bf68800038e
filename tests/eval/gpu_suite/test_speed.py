"""The race over models and cells with contestants made by hand: who fails leaves, who hangs does not come back."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.gpu_suite import speed
from speedstack.eval.gpu_suite.peer import Peer
from speedstack.eval.gpu_suite.scale import Cell, scale_for
from speedstack.eval.gpu_suite.speed import HUNG, NOT_MEASURED, Race, cell_weights, run_headline, run_speed
from speedstack.eval.gpu_suite.suite import OutOfTime, Suite
from speedstack.eval.speed.worker import KILLED, WorkerFailed

MODELS = ("qwen3-30b-a3b", "gpt-oss-20b")


class Scripted:
    """Answers what a contestant would, or fails with `failures[method]`."""

    def __init__(self, name: str, seconds: float, failures: dict[str, str], log: list[str]) -> None:
        self.name, self.seconds, self.failures, self.log = name, seconds, failures, log
        self.is_alive = True

    def begin(self, method: str, *arguments: Any) -> None:
        self.method = method
        self.log.append(f"{self.name} {method}")

    def finish(self, deadline: float) -> Any:
        if self.method in self.failures:
            raise WorkerFailed(self.failures[self.method])
        sample: Any = self.seconds
        if self.name == "transformers":
            sample = {"shallow": self.seconds / 2, "deep": self.seconds, "seconds": 3 * self.seconds}
        return {
            "load": 1,
            "prepare": {"prepare_seconds": 0.1},
            "sample": sample,
            "cost": {"read_bytes": 1e9},
            "generation": {"decode_tokens_per_second": 100.0},
            "phases": [{"phase": "qkv"}],
        }[self.method]

    def close(self) -> None:
        self.is_alive = False
        self.log.append(f"{self.name} close")

    def kill(self) -> None:
        raise AssertionError("contestants are closed by the thread that calls them")


def suite_of(
    folder: Path, log: list[str], failures: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> Suite:
    seconds = {"resident": 1e-3, "graph": 2e-3, "transformers": 4e-3}

    def start(factory: Any, scale: Any, model: str, *arguments: Any) -> Scripted:
        name = "transformers" if factory is Peer else arguments[0]
        return Scripted(name, seconds[name], failures.get(name, {}), log)

    monkeypatch.setattr(speed, "why_not", lambda suite, name: None)
    scale = replace(scale_for("cpu"), cells=(Cell(1, 20), Cell(3, 20)))
    suite = Suite(scale, MODELS, tuple(seconds), 1.0, folder / "x.json", start, say=lambda line: None)
    suite.document = {"sections": {"environment": {"result": {"copy": {"median": 4e12}}}}}
    return suite


def test_every_cell_of_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    result: dict[str, Any] = {}
    run_speed(suite_of(tmp_path, log, {}, monkeypatch), result, time.monotonic() + 60)
    assert list(result) == list(MODELS)
    for found in result.values():
        assert found["failed"] == {} and len(found["cells"]) == 2
        for cell in found["cells"]:
            medians = {name: entry["step_seconds"]["median"] for name, entry in cell["contestants"].items()}
            assert medians == {"resident": 1e-3, "graph": 2e-3, "transformers": 12e-3}
            assert cell["contestants"]["resident"]["mbu"] == pytest.approx(1e9 / 1e-3 / 4e12)
            assert [each["median"] for each in cell["contestants"]["transformers"]["depth_seconds"]] == [2e-3, 4e-3]
        first, second = (cell["contestants"]["graph"] for cell in found["cells"])
        assert first["phases"] == [{"phase": "qkv"}] and first["decode_tokens_per_second"] == 100.0
        assert "phases" not in second and "phases" not in found["cells"][0]["contestants"]["resident"]
        assert not any(cell["is_peer_compiling"] for cell in found["cells"])
    samples = [line.removesuffix(" sample") for line in log if line.endswith("sample")]
    cell_samples = 2 * 2 + 2 * 3
    assert len(samples) == 2 * 2 * cell_samples, "models, cells; repeats of ours, and of all"
    for start in range(0, len(samples), cell_samples):
        turns = samples[start : start + cell_samples]
        assert [sorted(turns[at : at + 2]) for at in (0, 2)] == [["graph", "resident"]] * 2
        assert [sorted(turns[at : at + 3]) for at in (4, 7)] == [["graph", "resident", "transformers"]] * 2
    assert log.count("graph close") == 2


def test_the_headline_is_saved_before_the_peer_is_ready_and_its_race_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    suite = suite_of(tmp_path, log, {}, monkeypatch)
    saved: list[list[str]] = []

    def note_what_is_known() -> None:
        cells = headline.get(MODELS[0], {}).get("cells", [])
        saved.append([name for cell in cells for name, entry in cell["contestants"].items() if "step_seconds" in entry])

    headline: dict[str, Any] = {}
    monkeypatch.setattr(suite, "save", note_what_is_known)
    run_headline(suite, headline, time.monotonic() + 60)
    assert saved == [["resident", "graph"], ["resident", "graph", "transformers"]]
    assert list(headline) == [MODELS[0]] and len(headline[MODELS[0]]["cells"]) == 1
    assert log.index("transformers prepare") < log.index("resident sample"), "the peer compiles meanwhile"
    rest: dict[str, Any] = {}
    run_speed(suite, rest, time.monotonic() + 60)
    assert [len(rest[model]["cells"]) for model in MODELS] == [1, 2]
    assert rest[MODELS[0]]["cells"][0]["rows"] == 3 and rest[MODELS[0]]["num_layers"] == rest[MODELS[1]]["num_layers"]
    assert log.count("graph load") == 2, "a model's contestants are made once"
    assert headline[MODELS[0]]["cells"][0]["contestants"]["graph"]["phases"] == [{"phase": "qkv"}]
    assert log.count("graph close") == 2


def test_a_peer_that_would_take_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of(tmp_path, [], {}, monkeypatch)
    found: dict[str, Any] = {}
    race = Race(suite, MODELS[0], found, time.monotonic() + 60)
    race.start()
    race.measure(suite.scale.cells[0], time.monotonic() + 60)
    race.peer_seconds = 45.0
    race.measure(suite.scale.cells[1], time.monotonic() + 60)
    first, second = found["cells"]
    assert "transformers" in first["contestants"] and NOT_MEASURED not in first
    assert list(second["contestants"]) == ["resident", "graph"]
    assert second[NOT_MEASURED] == {"transformers": "the last time it took 45 s to get ready"}
    race.close()


def test_what_did_not_begin_before_the_headline_is_timed_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = suite_of(tmp_path, [], {}, monkeypatch)
    monkeypatch.setattr(speed, "layers_that_fit", lambda *arguments: 1 // 0)
    suite.document["sections"]["environment"]["result"]["machine"] = {"free_bytes": 1}
    with pytest.raises(ZeroDivisionError):
        run_headline(suite, {}, time.monotonic() + 60)
    del suite.document["sections"]["environment"]["result"]["machine"]
    rest: dict[str, Any] = {}
    run_speed(suite, rest, time.monotonic() + 60)
    assert [len(rest[model]["cells"]) for model in MODELS] == [2, 2]


def test_who_hangs_is_not_started_again_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    result: dict[str, Any] = {}
    suite = suite_of(tmp_path, log, {"resident": {"sample": f"{KILLED} 9 s"}}, monkeypatch)
    with pytest.raises(RuntimeError, match="1 failed, first qwen3-30b-a3b, resident: killed: no answer in 9 s"):
        run_speed(suite, result, time.monotonic() + 60)
    first, second = (result[model] for model in MODELS)
    assert first["failed"] == {"resident": f"{KILLED} 9 s"} and second["failed"] == {}
    assert second["not available"] == {"resident": HUNG}
    assert log.count("resident sample") == 1 and log.count("resident prepare") == 1 and log.count("resident load") == 1
    for found in (first, second):
        for cell in found["cells"]:
            assert all("step_seconds" in cell["contestants"][name] for name in ("graph", "transformers"))


def test_who_cannot_get_ready_costs_its_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    result: dict[str, Any] = {}
    suite = suite_of(tmp_path, log, {"transformers": {"prepare": "RuntimeError: no compiler"}}, monkeypatch)
    with pytest.raises(RuntimeError, match="2 failed"):
        run_speed(suite, result, time.monotonic() + 60)
    for model in MODELS:
        assert result[model]["failed"] == {"transformers": "RuntimeError: no compiler"}
        assert list(result[model]["cells"][0]["contestants"]) == ["resident", "graph"]
    assert log.count("transformers prepare") == 2, "an error is not a hang: the next model may do better"


def test_cells_without_time_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result: dict[str, Any] = {}
    suite = suite_of(tmp_path, [], {}, monkeypatch)
    with pytest.raises(OutOfTime, match="qwen3-30b-a3b: 2 cells were not measured; gpt-oss-20b: 2 cells"):
        run_speed(suite, result, time.monotonic() - 1)
    assert [found["cells"] for found in result.values()] == [[], []]


def test_fractions_need_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result: dict[str, Any] = {}
    suite = suite_of(tmp_path, [], {}, monkeypatch)
    suite.document = {}
    run_speed(suite, result, time.monotonic() + 60)
    entry = result[MODELS[0]]["cells"][0]["contestants"]["graph"]
    assert "step_seconds" in entry and "mbu" not in entry


def test_a_compiler_that_is_late_is_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    suite = suite_of(tmp_path, log, {"resident": {"prepare": f"{KILLED} 30 s"}}, monkeypatch)
    with pytest.raises(RuntimeError, match="2 failed"):
        run_speed(suite, {}, time.monotonic() + 60)
    assert log.count("resident prepare") == 2


def test_the_first_cell_gets_more_time() -> None:
    assert cell_weights(4, has_first=True) == [10, 2, 2, 2] and cell_weights(3, has_first=False) == [2, 2, 2]
