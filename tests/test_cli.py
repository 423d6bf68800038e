"""The command line: help of every verb, and one clear line with an exit code for everything a user can get wrong."""

import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from speedstack import __version__, cli
from speedstack.cli import VERBS, config_loader, main
from speedstack.demo import demo
from speedstack.demo.config import DemoConfig, load_demo_config
from speedstack.support.config import dump_config


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert VERBS[verb].summary in text
    assert "options" in text and "(default:" in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_all_verbs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_help_is_quick_because_it_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom speedstack.cli import main\n"
        "main(['--help']); main(['pretrain', '--help']); main(['generate', '--help']); main(['demo', '--help'])\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "False"


def test_unknown_verb_names_the_nearest(fails: Callable[..., str]) -> None:
    assert "did you mean 'pretrain'" in fails("pretrian")


@pytest.mark.parametrize("verb", VERBS)
def test_unknown_key_in_a_file_names_the_nearest(verb: str, fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    wrong, right = {
        "demo": ("sead: 1", "seed"),
        "pretrain": ("optim: {lrr: 1}", "optim.lr"),
        "qat": ("qat: {modle: x}", "qat.model"),
        "drafter": ("drafter: {bloc_size: 8}", "drafter.block_size"),
        "quantize": ("calibration: {num_sequence: 8}", "calibration.num_sequences"),
        "convert": ("sorce: x", "source"),
        "generate": ("promt: x", "prompt"),
        "eval": ("techer: x", "teacher"),
        "bench": ("num_repeat: 2", "num_repeats"),
        "compare": ("significanse: 0.1", "significance"),
        "ablate": ("grid: {formats: x}", "grid.format"),
        "plan": ("row: 8", "rows"),
        "trace": ("num_step: 2", "num_steps"),
        "report": ("input: []", "inputs"),
    }[verb]
    path.write_text(wrong + "\n", encoding="utf-8")
    line = fails(verb, path)
    assert str(path) in line and f"did you mean '{right}'" in line


def test_unknown_flag_names_the_nearest(fails: Callable[..., str]) -> None:
    assert "did you mean '--prompt'" in fails("generate", "--promt", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: fast}", "optim.lr"),
        ("optim: {lr: -1.0}", "optim.lr"),
        ("optim: 3", "optim"),
        ("optim: {name: sgd}", "optim.name"),
        ("- 1\n- 2", "expected sections"),
        ("optim: {lr: 1", "not YAML"),
    ],
)
def test_wrong_type_in_a_file(text: str, message: str, fails: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text + "\n", encoding="utf-8")
    assert message in fails("pretrain", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr", "fast"], "--optim.lr"),
        (["--optim.lr", "-1"], "greater than 0"),
        (["--optim.name", "sgd"], "muon"),
        (["--optim.lr"], "--optim.lr"),
        (["--loop.batch-size", "6", "--loop.micro-batch-size", "4"], "multiple"),
    ],
)
def test_wrong_value_of_a_flag(arguments: list[str], message: str, fails: Callable[..., str]) -> None:
    assert message in fails("pretrain", *arguments)


@pytest.mark.parametrize(
    ("verb", "key"),
    [
        ("generate", "target"),
        ("eval", "target"),
        ("bench", "target"),
        ("plan", "model"),
        ("trace", "model"),
        ("quantize", "model"),
        ("convert", "source"),
    ],
)
def test_a_verb_that_takes_a_model_takes_its_directory_in_the_place_of_a_file(verb: str, key: str) -> None:
    config = config_loader(VERBS[verb])(Path("some/model"), [])
    assert getattr(config, key) == Path("some/model")
    assert getattr(config, "drafter", None) is None, "nothing that was made for another model"


def test_missing_config_file(fails: Callable[..., str]) -> None:
    assert "nowhere.yaml" in fails("generate", "nowhere.yaml")


def test_generate_with_text_ids_and_drafter(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["generate", "--target", str(tiny_packed_dir), "--device", "cpu", "--backend", "reference"]
    base += ["--max-new-tokens", "12", "--prompt", "def add(", "--ignore-eos"]
    assert main(base) == 0
    alone = capsys.readouterr()
    assert main([*base, "--drafter", str(tiny_packed_drafter_dir)]) == 0
    drafted = capsys.readouterr()
    assert alone.out == drafted.out and alone.out.strip()
    assert "12 tokens (length)" in alone.err and "tokens a round" in drafted.err
    assert "memory: embedding and LM head 0." in alone.err and "experts (MXFP4) 0." in alone.err


def test_generate_as_a_chat(
    tiny_packed_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fails: Callable[..., str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_packed_dir, model)
    base: list[object] = ["generate", "--target", model, "--device", "cpu", "--backend", "reference"]
    base += ["--max-new-tokens", 6]
    assert "has no chat template" in fails(*base, "--prompt", "x", "--chat-template")
    template = "{% for m in messages %}def {{ m.content }}{% endfor %}{% if shout %}!{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    texts = []
    for arguments in (
        ["--prompt", "f", "--chat-template", "--chat-template-kwargs", '{"shout": true}'],
        ["--prompt", "def f!"],
    ):
        assert main([*map(str, base), *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "need --chat-template" in fails(*base, "--prompt", "x", "--chat-template-kwargs", '{"shout": true}')
    assert "chat_template is for text" in fails(*base, "--prompt-ids", 3, "--chat-template")


def test_generate_prints_ids_where_there_is_no_tokenizer(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "bare"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, model / name)
    command = ["generate", "--target", str(model), "--device", "cpu", "--backend", "reference"]
    assert main([*command, "--prompt-ids", "5", "6", "7", "--max-new-tokens", "4", "--ignore-eos"]) == 0
    assert len(capsys.readouterr().out.split()) == 4


def test_missing_model_directory(fails: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere" in fails("generate", "--target", tmp_path / "nowhere", "--prompt", "x")


@pytest.mark.parametrize("arguments", [[], ["--prompt", "x", "--prompt-ids", "1"]])
def test_no_prompt_or_two(arguments: list[str], fails: Callable[..., str], tiny_model_dir: Path) -> None:
    assert "give one prompt" in fails("generate", "--target", tiny_model_dir, *arguments)


def test_drafter_of_another_target(fails: Callable[..., str], tiny_packed_dir: Path, tiny_drafter_dir: Path) -> None:
    line = fails("generate", "--target", tiny_packed_dir, "--drafter", tiny_drafter_dir, "--prompt", "x")
    assert "another target" in line


def test_drafts_without_a_drafter(fails: Callable[..., str], tiny_model_dir: Path) -> None:
    for num_drafts in ("3", "adaptive"):
        command = ["generate", "--target", tiny_model_dir, "--device", "cpu", "--num-drafts", num_drafts]
        assert "needs a drafter" in fails(*command, "--prompt", "x")


def test_ways_to_draft_from_the_command_line(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command: list[object] = ["generate", "--target", tiny_packed_dir, "--device", "cpu", "--prompt", "def f(x):"]
    size: list[object] = ["--max-new-tokens", "12", "--ignore-eos", "--max-length", "64"]
    texts = []
    ways: list[list[object]] = [
        [],
        ["--drafter", "ngram"],
        ["--drafter", tiny_packed_drafter_dir, "--backend", "reference", "--num-drafts", "3"],
        ["--drafter", tiny_packed_drafter_dir, "--draft-noise", "shared"],
    ]
    for options in ways:
        assert main([str(argument) for argument in [*command, *size, *options]]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1 and texts[0].strip()


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_safetensors(damage: str, fails: Callable[..., str], tiny_model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, model)
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-1000], "header": b"\xff" * 64 + content[64:], "empty": b""}[damage])
    assert "model.safetensors" in fails("generate", "--target", model, "--prompt", "x", "--device", "cpu")


@pytest.mark.parametrize("token", ["512", "-1"])
def test_token_ids_out_of_range(token: str, fails: Callable[..., str], tiny_model_dir: Path) -> None:
    line = fails("generate", "--target", tiny_model_dir, "--device", "cpu", "--prompt-ids", "3", token)
    assert token in line and "512" in line


def test_prompt_longer_than_the_buffers(fails: Callable[..., str], tiny_model_dir: Path) -> None:
    ids = ["7"] * 40
    line = fails("generate", "--target", tiny_model_dir, "--device", "cpu", "--max-length", "32", "--prompt-ids", *ids)
    assert "40" in line and "32" in line


def test_device_that_is_not_there(fails: Callable[..., str], tiny_model_dir: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    assert "cuda" in fails("generate", "--target", tiny_model_dir, "--device", "cuda", "--prompt", "x")
    assert "cuda" in fails("demo", "--device", "cuda", "--out", "unused-by-this-test")
    assert not Path("unused-by-this-test").exists()


def test_demo_refuses_an_unwritable_directory(fails: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way", encoding="utf-8")
    assert str(file) in fails("demo", "--out", file / "demo", "--device", "cpu", code=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_demo_refuses_a_directory_without_permission(fails: Callable[..., str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert str(tmp_path) in fails("demo", "--out", tmp_path / "demo", "--device", "cpu", code=1)


def test_demo_refuses_a_full_disk(fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(demo.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    line = fails("demo", "--out", tmp_path / "demo", "--device", "cpu", code=1)
    assert "GiB free" in line and str(tmp_path / "demo") in line


def test_demo_refuses_a_directory_that_is_not_its_own(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    assert "neither empty nor a demo's" in fails("demo", "--out", tmp_path, "--device", "cpu")
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--seed", "1"], "(seed 0 there, 1 now)"),
        (["--size", "small"], "size tiny there, small now"),
        (["--qat.loop.num-steps", "3"], "qat.loop.num_steps"),
    ],
)
def test_demo_refuses_a_directory_trained_with_other_settings(
    changed: list[str], message: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    settings = load_demo_config(None, ["--device", "cpu", "--out", str(tmp_path)])
    (tmp_path / "demo.yaml").write_text(dump_config(settings), encoding="utf-8")
    line = fails("demo", "--device", "cpu", "--out", tmp_path, *changed)
    assert message in line and "pass another --out, or delete" in line
    assert [path.name for path in tmp_path.iterdir()] == ["demo.yaml"]


def test_demo_refuses_a_directory_of_another_release(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("size: tiny\nshape: round\n", encoding="utf-8")
    line = fails("demo", "--device", "cpu", "--out", tmp_path)
    assert "shape" in line and "pass another --out, or delete" in line


def test_demo_measures_other_amounts_in_the_same_directory(tmp_path: Path) -> None:
    settings = load_demo_config(None, ["--device", "cpu", "--out", str(tmp_path)])
    (tmp_path / "demo.yaml").write_text(dump_config(settings), encoding="utf-8")
    other = ["--acceptance.num-prompts", "3", "--pretrain.loop.log-every", "7"]
    demo._open(load_demo_config(None, ["--device", "cpu", "--out", str(tmp_path), *other]))


def test_demo_refuses_a_size_that_does_not_exist(fails: Callable[..., str]) -> None:
    assert "tiny or small" in fails("demo", "--size", "huge")


def raise_in_demo(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make the verb `demo` end with `error`."""

    def job(config: DemoConfig) -> None:
        raise error

    monkeypatch.setattr(demo, "demo", job)


def test_disk_that_fills_up_while_working(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_demo(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/demo/model.safetensors"))
    assert fails("demo", code=1).endswith("No space left on device: runs/demo/model.safetensors")


def test_interrupt(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_demo(monkeypatch, KeyboardInterrupt())
    assert "interrupted; the same command continues" in fails("demo", code=130)


def test_interrupt_of_what_does_not_continue(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def job(config: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("speedstack.verbs.bench.bench", job)
    assert fails("bench", code=130) == "speedstack: error: interrupted"


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_traceback_only_when_asked(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in_demo(monkeypatch, ValueError("two\nlines"))
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "speedstack: error: two lines\n"
    if how == "variable":
        monkeypatch.setenv("SPEEDSTACK_DEBUG", "1")
    assert main(["demo", "--debug"] if how == "flag" else ["demo"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("debug", [False, True])
def test_a_warning_of_ours_is_one_line(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(config: object) -> None:
        for filename in (cli.__file__, "/elsewhere/library.py"):
            print(warnings.formatwarning("not\nused", UserWarning, filename, 1), end="", file=sys.stderr)

    before = warnings.formatwarning
    monkeypatch.setattr(demo, "demo", warn)
    assert main(["demo", "--debug"] if debug else ["demo"]) == 0
    ours, *others = capsys.readouterr().err.splitlines()
    assert (ours == "speedstack: warning: not used") is not debug
    assert any("/elsewhere/library.py:1: UserWarning: not" in line for line in others)
    assert warnings.formatwarning is before


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raise_in_demo(monkeypatch, AssertionError("impossible"))
    with pytest.raises(AssertionError, match="impossible"):
        main(["demo"])


def test_one_line_of_a_box() -> None:
    rule, side = "\u2500" * 3, "\u2502"
    lines = [rule, f"{side} first part {side}", f"{side} second {side}", f"{side} {rule} {side}", f"{side} help {side}"]
    assert cli._first_message("\n".join(lines)) == "first part second"
