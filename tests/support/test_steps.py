"""Steps: what names them, that each is made once and whole, and from what is there."""

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speedstack.support.steps import Step, StepStore


def step(name: str, tmp_path: Path, needs: Mapping[str, Step] | None = None, **settings: Any) -> Step:
    is_exclusive = bool(settings.pop("is_exclusive", False))
    return Step(name, 1, settings, needs or {}, {"log": str(tmp_path)}, is_exclusive)


def record_of(store: StepStore, one: Step) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((store.path(one) / "step.json").read_text(encoding="utf-8"))
    return record


def test_a_key_is_all_that_decides_and_nothing_else(tmp_path: Path) -> None:
    base = step("a", tmp_path, rate=1)
    needing = step("b", tmp_path, {"of": base})
    assert base.key == step("a", tmp_path / "elsewhere", rate=1, is_exclusive=True).key
    others = [
        replace(base, kind="c"),
        replace(base, version=2),
        replace(base, settings={"rate": 2}),
        replace(base, software={"torch": "2.13.0"}),
        replace(base, needs={"of": needing}),
        replace(needing, needs={"by": base}),
        replace(needing, needs={"of": replace(base, version=2)}),
    ]
    assert len({one.key for one in (base, needing, *others)}) == 9
    assert base.closure() == [base] and needing.closure() == [base, needing]


def test_a_step_is_made_once_and_continued_where_it_was(tmp_path: Path) -> None:
    store, one = StepStore(tmp_path / "steps"), step("a", tmp_path)
    calls = []

    def run(needs: Mapping[str, Path], directory: Path) -> dict[str, Any]:
        calls.append(sorted(path.name for path in directory.iterdir()))
        (directory / "made").write_text("x", encoding="utf-8")
        if len(calls) == 1:
            raise RuntimeError("interrupted")
        return {"value": 3.5}

    with pytest.raises(RuntimeError, match="interrupted"):
        store.make(one, run)
    # As if it had been killed while it wrote its record.
    left = store.path(one) / f".step.json-{'0' * 32}.partial"
    left.mkdir()
    (left / "step.json").write_text("{", encoding="utf-8")
    assert not store.is_done(one) and store.missing([one]) == [one]
    with pytest.raises(ValueError, match=f"step {one.name} is not in"):
        store.result(one)
    assert store.make(one, run) and not store.make(one, run)
    assert calls == [["step.json"], [left.name, "made", "step.json"]] and store.result(one) == {"value": 3.5}
    assert not left.exists() and store.is_done(one) and store.missing([one]) == []
    assert record_of(store, one)["files"] == {"made": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.make(step("nan", tmp_path), lambda needs, directory: {"value": float("nan")})
    # A step that lost a file, or has another length of it, is made anew.
    (store.path(one) / "made").write_text("xy", encoding="utf-8")
    assert not store.is_done(one) and store.make(one, run) and store.is_done(one)
    assert calls[2] == ["step.json"]


def test_steps_of_other_software_are_named_and_not_used(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "steps")
    old = replace(step("a", tmp_path), software={"torch": "2.12.0", "lm_eval": "0.4"})
    old_after = step("b", tmp_path, {"of": old})
    for one in (old, old_after):
        assert store.make(one, lambda needs, directory: {"value": 1})
    assert record_of(store, old)["software"] == {"torch": "2.12.0", "lm_eval": "0.4"}
    assert store.other_software([old, old_after]) == {}
    new = replace(old, software={"torch": "2.13.0", "lm_eval": "0.4"})
    new_after = replace(old_after, needs={"of": new})
    assert not store.is_done(new) and not store.is_done(new_after)
    found = store.other_software([new, new_after, step("c", tmp_path)])
    assert found == {new.name: ["torch 2.12.0, is 2.13.0"], new_after.name: []}
    assert store.make(new, lambda needs, directory: {"value": 2})
    assert store.result(old) == {"value": 1} and store.result(new) == {"value": 2}
    assert store.other_software([new, new_after]) == {new_after.name: []}


def test_a_step_stands_with_what_it_was_made_from(tmp_path: Path) -> None:
    store, root = StepStore(tmp_path / "steps"), step("root", tmp_path)
    after = step("after", tmp_path, {"of": root})
    last, other = step("last", tmp_path, {"of": after}), step("other", tmp_path)
    made: list[str] = []

    def make(one: Step, stops: bool = False) -> None:
        def run(needs: Mapping[str, Path], directory: Path) -> str:
            assert all((path / "made").exists() for path in needs.values())
            made.append(one.kind)
            (directory / "made").write_text(str(len(made)), encoding="utf-8")
            if stops:
                raise KeyboardInterrupt
            (directory / "whole").touch()
            return one.kind

        store.make(one, run)

    everything = [root, after, last, other]
    for one in everything:
        make(one)
    assert [name for name, _ in store.completed()] == [one.name for one in everything]
    (store.path(root) / "made").unlink()
    assert store.missing(everything) == [root, after, last]
    make(root)
    with pytest.raises(KeyboardInterrupt):
        make(after, stops=True)
    # What the interrupted one left is of a root that has been replaced since: nothing of it stays.
    (store.path(root) / "whole").unlink()
    make(root)
    (store.path(after) / "old").touch()
    for one in store.missing(everything):
        make(one)
    assert made[4:] == ["root", "after", "root", "after", "last"] and store.missing(everything) == []
    assert not (store.path(after) / "old").exists()


def test_two_that_want_one_step_make_it_once(tmp_path: Path) -> None:
    store, one, made, outcomes = StepStore(tmp_path), step("a", tmp_path), list[int](), list[bool]()
    has_begun, may_end = threading.Event(), threading.Event()

    def run(needs: Mapping[str, Path], directory: Path) -> int:
        made.append(1)
        has_begun.set()
        assert may_end.wait(60)
        return 1

    threads = [threading.Thread(target=lambda: outcomes.append(store.make(one, run))) for _ in range(2)]
    threads[0].start()
    assert has_begun.wait(60)
    threads[1].start()
    may_end.set()
    for thread in threads:
        thread.join()
    assert made == [1] and sorted(outcomes) == [False, True]


def test_outputs_may_lie_elsewhere(tmp_path: Path) -> None:
    """Under names that stay: another key starts over, and what others read of a directory decides."""
    store = StepStore(tmp_path, "records/{name}.json")

    def at(rate: int) -> Step:
        return Step("fit", 1, {"rate": rate}, outputs=("model", "table.md"), decisive=("model/weights",))

    def run(needs: Mapping[str, Path], directory: Path) -> str:
        assert directory == tmp_path and not (tmp_path / "model").exists()
        (tmp_path / "model").mkdir()
        for name in ("model/weights", "model/log", "table.md"):
            (tmp_path / name).write_text(name, encoding="utf-8")
        return "one line"

    assert store.make(at(1), run) and store.result(at(1)) == "one line"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "records", "table.md"]
    (tmp_path / "model" / "log").unlink()
    assert store.is_done(at(1)) and not store.is_done(at(2))
    assert store.make(at(2), run) and not store.is_done(at(1))
    (tmp_path / "model" / "weights").unlink()
    assert store.make(at(2), run)
    with pytest.raises(AssertionError, match=r"step fit did not write \['model', 'model/weights'\]"):
        store.make(at(3), lambda needs, directory: (tmp_path / "table.md").write_text(""))
    assert store.missing([at(3)])[0].name == "fit" and store.completed() == []
