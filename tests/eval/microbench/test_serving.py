"""The serving bench: every way counted and timed, texts compared, prompts read or refused in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from speedstack.dflash.checkpoint import load_drafter
from speedstack.eval.microbench import serving
from speedstack.eval.microbench.serving import Server, ServingBench, Way, main, measure_serving, prompt_sets_of, ways_of
from speedstack.runtime import Generation
from speedstack.runtime.rounds.speculation import DraftStrategy

PROMPTS: dict[str, list[list[int]]] = {"a": [[5, 6, 7], [8, 9]], "b": [[10, 11, 12]]}


def test_rows_cover_every_strategy() -> None:
    ways = ways_of(7)
    assert {way.strategy.num_drafts for way in ways if way.name.startswith("chain of")} == set(range(1, 8))
    assert {way.temperature for way in ways if way.strategy.noise == "shared"} == {1.0}
    assert {way.proposer for way in ways} == {"none", "drafter", "ngram"}
    assert len({(way.name, way.temperature) for way in ways}) == len(ways)


def test_rows_count_and_time(tiny_packed_dir: Path, tiny_packed_drafter_dir: Path) -> None:
    server = Server(tiny_packed_dir, load_drafter(tiny_packed_drafter_dir), 64, "cpu")
    ways = [
        Way("none", "none"),
        Way("chain", "drafter", DraftStrategy(2)),
        Way("look-up", "ngram", DraftStrategy(3)),
    ]
    rows = measure_serving(server, ways, PROMPTS, 9, 2, 2, progress=False)
    assert [row.acceptance.num_prompts for row in rows] == [3, 3, 3]
    assert [row.num_timed_prompts for row in rows] == [2, 2, 2]
    assert [row.backend for row in rows] == ["cpu"] * 3
    for row in rows:
        assert row.acceptance.num_committed == 8 * row.acceptance.num_prompts
        assert row.decode_tokens_per_second is not None and row.decode_tokens_per_second.num_repeats == 2
    assert rows[0].acceptance.acceptance_length == rows[0].acceptance.rows_per_token == 1.0
    assert rows[1].acceptance.drafted_per_token != 0.0 and rows[0].acceptance.drafted_per_token == 0.0


def test_a_changed_text_ends_the_run(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tiny_packed_dir, load_drafter(tiny_packed_drafter_dir), 64, "cpu")
    run = server.run

    def broken(way: Way, *arguments: Any) -> Generation:
        found = run(way, *arguments)
        if way.proposer == "ngram":
            found.tokens[-1] += 1
        return found

    monkeypatch.setattr(server, "run", broken)
    ways = [Way("none", "none"), Way("look-up", "ngram")]
    with pytest.raises(ValueError, match="'look-up' changed a text"):
        measure_serving(server, ways, PROMPTS, 5, 0, 1, progress=False)


def test_result_file(
    tiny_packed_dir: Path,
    tiny_packed_drafter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "serving.json"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("def f(x):", "import os", "class A:")))
    monkeypatch.setattr(serving, "ways_of", lambda *_: [Way("none", "none"), Way("look-up", "ngram")])
    options: dict[str, Any] = {
        "target": tiny_packed_dir,
        "drafter": tiny_packed_drafter_dir,
        "prompts": prompts,
        "out": out,
    }
    options |= {"num-prompts": 2, "num-new-tokens": 6, "num-repeats": 0, "device": "cpu"}
    monkeypatch.setattr(sys, "argv", ["bench_serving", *(str(x) for k, v in options.items() for x in (f"--{k}", v))])
    assert main() == 0
    assert f"written: {out}" in capsys.readouterr().out
    result = ServingBench.load(out)
    assert [row.name for row in result.rows] == ["none", "look-up"] and result.num_prompts == 2
    assert result.rows[0].sets[0].name == "prompts" and result.rows[0].decode_tokens_per_second is None


def test_prompts_that_cannot_be_read(tmp_path: Path, tiny_packed_dir: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match="there is no file or directory"):
        prompt_sets_of(file, tiny_packed_dir, 5, 64, 200)
    file.write_text('{"prompt": "x"}\n')
    with pytest.raises(ValueError, match="has 1 prompts of 1 to 200 tokens, 5 were asked for"):
        prompt_sets_of(file, tiny_packed_dir, 5, 64, 200)
    with pytest.raises(ValueError, match="not a prepared corpus"):
        prompt_sets_of(tmp_path, tiny_packed_dir, 5, 64, 200)
