"""Steps: what names them, that each is made once and whole, and that the pool survives failures and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from speedstack.ablation.step_pool import Place, run_steps
from speedstack.ablation.step_store import RECORD, Step, StepStore

PLACE = Place({}, 1)
# A runner that notes when it ran; settings say how long, and whether and how it fails.
RUNNER = """
import os, signal, time
from pathlib import Path

def run(step, needs, directory):
    settings, log = step.settings, Path(step.places["log"])
    before = (directory / "begun").exists()
    (directory / "begun").write_text("")
    (log / f"{step.name}.pid").write_text(str(os.getpid()))
    start = time.monotonic()
    time.sleep(settings.get("seconds", 0))
    if settings.get("raises"):
        raise ValueError("two\\nlines of it")
    if settings.get("dies"):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(log / "log", "a") as file:
        file.write(f"{step.name} {start} {time.monotonic()}\\n")
    return {"needs": sorted(str(path) for path in needs.values()), "continued": before}
"""


def step(name: str, tmp_path: Path, needs: Mapping[str, Step] | None = None, **settings: Any) -> Step:
    is_exclusive = bool(settings.pop("is_exclusive", False))
    return Step(name, 1, settings, needs or {}, {"log": str(tmp_path)}, is_exclusive)


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_up_runner.py").write_text(RUNNER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))  # which the workers inherit
    return "made_up_runner:run"


def runs(tmp_path: Path) -> dict[str, tuple[float, float]]:
    """Start and end of every step that ran to its end; each once."""
    lines = [line.split() for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert len({name for name, _, _ in lines}) == len(lines)
    return {name: (float(start), float(end)) for name, start, end in lines}


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
    # As if it had been killed right before the rename.
    (store.partial(one) / RECORD).write_text("{", encoding="utf-8")
    assert not store.is_done(one) and not store.path(one).exists()
    with pytest.raises(ValueError, match=f"step {one.name} is not in"):
        store.result(one)
    assert store.make(one, run) and not store.make(one, run)
    assert calls == [[], ["made"]] and store.result(one) == {"value": 3.5}
    assert not store.partial(one).exists()
    assert json.loads((store.path(one) / RECORD).read_text(encoding="utf-8"))["files"] == {"made": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.make(step("nan", tmp_path), lambda needs, directory: {"value": float("nan")})
    # A step that lost a file, or has another length of it, is made anew.
    (store.path(one) / "made").write_text("xy", encoding="utf-8")
    assert not store.is_done(one) and store.make(one, run) and store.is_done(one)
    assert calls[2] == []


def test_steps_of_other_software_are_named_and_not_used(tmp_path: Path) -> None:
    store = StepStore(tmp_path / "steps")
    old = replace(step("a", tmp_path), software={"torch": "2.12.0", "lm_eval": "0.4"})
    old_after = step("b", tmp_path, {"of": old})
    for one in (old, old_after):
        assert store.make(one, lambda needs, directory: {"value": 1})
    record = json.loads((store.path(old) / RECORD).read_text(encoding="utf-8"))
    assert record["software"] == {"torch": "2.12.0", "lm_eval": "0.4"}
    assert store.other_software([old, old_after]) == {}
    new = replace(old, software={"torch": "2.13.0", "lm_eval": "0.4"})
    new_after = replace(old_after, needs={"of": new})
    assert not store.is_done(new) and not store.is_done(new_after)
    found = store.other_software([new, new_after, step("c", tmp_path)])
    assert found == {new.name: ["torch 2.12.0, is 2.13.0"], new_after.name: []}
    assert store.make(new, lambda needs, directory: {"value": 2})
    assert store.result(old) == {"value": 1} and store.result(new) == {"value": 2}
    assert store.other_software([new, new_after]) == {new_after.name: []}


def test_what_does_not_depend_on_a_failure_goes_on(tmp_path: Path, runner: str) -> None:
    store = StepStore(tmp_path / "steps")
    root = step("root", tmp_path)
    left, right = (step(name, tmp_path, {"root": root}, seconds=0.1) for name in ("left", "right"))
    raises, dies = step("raises", tmp_path, raises=True), step("dies", tmp_path, {"root": root}, dies=True)
    after = [step("after", tmp_path, {"a": raises, "b": root}), step("both", tmp_path, {"a": left, "b": right})]
    later = step("later", tmp_path, {"after": after[0]})
    settled: dict[str, str | None] = {}
    wanted = [later, *after, dies, left, right]
    failures = run_steps(
        store, wanted, runner, [PLACE, PLACE], tmp_path / "logs", lambda one, why: settled.update({one.kind: why})
    )
    assert settled.keys() == {"root", "left", "right", "raises", "dies", "after", "later", "both"}
    assert failures.keys() == {raises.name, dies.name, after[0].name, later.name}
    assert settled["raises"] == "two lines of it" and settled["after"] == "raises failed: two lines of it"
    assert settled["later"] == "after failed: raises failed: two lines of it"
    assert "its process ended by signal 9" in (settled["dies"] or "")
    ran = runs(tmp_path)
    assert ran.keys() == {one.name for one in (root, left, right, after[1])}
    assert ran[root.name][1] <= min(ran[left.name][0], ran[right.name][0])
    assert store.result(left)["needs"] == [str(store.path(root))]
    # What failed is tried again, what is there is not.
    again = run_steps(store, wanted, runner, [PLACE], tmp_path / "logs", lambda one, why: None)
    assert again.keys() == failures.keys() and runs(tmp_path) == ran


def test_exclusive_steps_run_alone(tmp_path: Path, runner: str) -> None:
    slow, quick = step("slow", tmp_path, seconds=3), step("quick", tmp_path)
    alone = [step(f"alone{i}", tmp_path, {"of": quick}, seconds=0.2, is_exclusive=True) for i in range(2)]
    store, steps = StepStore(tmp_path / "steps"), [*alone, slow]
    assert run_steps(store, steps, runner, [PLACE, PLACE], tmp_path / "logs", lambda one, why: None) == {}
    ran = runs(tmp_path)
    # The other two ran beside each other, so that there was somebody to wait for.
    assert ran[quick.name][0] < ran[slow.name][1] and len(ran) == 4
    for one in alone:
        start, end = ran[one.name]
        assert all(e <= start or end <= s for name, (s, e) in ran.items() if name != one.name)


def test_killed_with_its_workers_and_continued(tmp_path: Path, runner: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from pathlib import Path
from speedstack.ablation.step_pool import Place, run_steps
from speedstack.ablation.step_store import Step, StepStore
if __name__ == "__main__":
    path = Path({str(tmp_path)!r})
    steps = [Step(name, 1, {{"seconds": time}}, places={{"log": str(path)}}) for name, time in (("a", 0), ("b", 60))]
    run_steps(StepStore(path / "steps"), steps, {runner!r}, [Place({{}}, 1)], path / "logs", lambda step, why: None)
"""
    (tmp_path / "job.py").write_text(code, encoding="utf-8")
    a, b = (
        Step(name, 1, {"seconds": seconds}, places={"log": str(tmp_path)}) for name, seconds in (("a", 0), ("b", 60))
    )
    process = subprocess.Popen([sys.executable, str(tmp_path / "job.py")])
    pid_file = tmp_path / f"{b.name}.pid"
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    worker = int(pid_file.read_text(encoding="utf-8"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    while is_running(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store = StepStore(tmp_path / "steps")
    assert store.is_done(a) and not store.is_done(b) and store.partial(b).is_dir()

    def finish(needs: Mapping[str, Path], directory: Path) -> dict[str, Any]:
        return {"continued": (directory / "begun").exists()}

    assert store.make(b, finish) and store.result(b) == {"continued": True}


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One whose parent has gone may stay as a zombie where nobody reaps it.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
