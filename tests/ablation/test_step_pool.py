"""Steps in worker processes: what fails, what runs alone, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from speedstack.ablation.step_pool import Place, run_steps
from speedstack.support.steps import Step, StepStore

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
from speedstack.support.steps import Step, StepStore
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
    assert store.is_done(a) and not store.is_done(b) and (store.path(b) / "begun").exists()

    def finish(needs: Mapping[str, Path], directory: Path) -> dict[str, Any]:
        return {"continued": (directory / "begun").exists()}

    assert store.make(b, finish) and store.result(b) == {"continued": True}


def test_what_was_made_from_a_lost_step_is_made_anew(tmp_path: Path, runner: str) -> None:
    store, root = StepStore(tmp_path / "steps"), step("root", tmp_path)
    after, other = step("after", tmp_path, {"root": root}), step("other", tmp_path)

    def settled() -> list[str]:
        names: list[str] = []
        steps = [after, other]
        assert run_steps(store, steps, runner, [PLACE], tmp_path / "logs", lambda one, _: names.append(one.kind)) == {}
        return names

    assert sorted(settled()) == ["after", "other", "root"] and settled() == []
    (store.path(root) / "begun").unlink()
    assert settled() == ["root", "after"] and settled() == []


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One whose parent has gone may stay as a zombie where nobody reaps it.
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
