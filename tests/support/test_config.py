"""Configs of YAML files and flags, and what is said of those that are wrong."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from speedstack.eval.config import BenchConfig
from speedstack.support.config import load_config, read_config, replaced
from speedstack.train.config.recipes import PretrainConfig, QatConfig


def test_file_overrides_defaults_and_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    # PyYAML reads 1e-4 as text; it is a number all the same.
    path.write_text("optim: {lr: 1e-4, name: adamw}\n")
    assert read_config(QatConfig, path).optim.lr == 1e-4
    config = load_config(QatConfig, path, ["--optim.lr", "0.5", "--loop.num-steps=7"])
    assert (config.optim.lr, config.optim.name, config.loop.num_steps) == (0.5, "adamw", 7)
    assert config.run.name == "qat-tiny"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"unknown key 'optim.lrr'; did you mean 'optim.lr'\?"),
        ("optm: {lr: 1}", r"unknown key 'optm'; did you mean 'optim'\?"),
        ("batch_size: 3", r"unknown key 'batch_size'; did you mean 'loop.batch_size'\?"),
        ("loop: {num_steps: many}", r"loop.num_steps: Input should be a valid integer.*got 'many'"),
        ("optim: {lr: -1}", r"optim.lr: Input should be greater than 0"),
        ("optim: {lr: .nan}", r"optim.lr: Input should be a finite number"),
        ("kind: qat", r"config of kind 'qat', not 'pretrain'"),
        ("[1]", r"expected sections"),
        ("a: [", r"is not YAML"),
        ("loop: {batch_size: 7, micro_batch_size: 2}", r"multiple of loop.micro_batch_size"),
        ("model: {moe_intermediate_size: 100}", r"multiple of 32"),
    ],
)
def test_bad_file_is_one_line_that_names_the_problem(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_config(PretrainConfig, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file_and_unknown_flag() -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_config(PretrainConfig, Path("nowhere.yaml"))
    with pytest.raises(ValueError, match=r"unknown flag '--optim.lrr'; did you mean '--optim.lr'\?"):
        load_config(PretrainConfig, None, ["--optim.lrr", "1"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim.lr", "-1"], "optim.lr: Input should be greater than 0 (got -1.0)"),
        (
            ["--optim.warmup-fraction", "0.9", "--optim.decay-fraction", "0.9"],
            "optim: warmup_fraction + decay_fraction must not exceed 1",
        ),
        (
            ["--loop.batch-size", "7", "--loop.micro-batch-size", "2"],
            "loop.batch_size must be a multiple of loop.micro_batch_size",
        ),
    ],
)
def test_a_refused_flag_is_one_line_without_words_of_pydantic_or_tyro(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(PretrainConfig, None, flags)
    assert str(caught.value) == message
    assert not any(capsys.readouterr())


def test_a_message_that_names_its_key_is_not_named_twice() -> None:
    with pytest.raises(ValueError) as caught:
        load_config(BenchConfig, None, ["--prompts.long-tokens", "5"])
    assert str(caught.value).startswith("prompts.long_tokens needs long among")


def test_tyro_says_itself_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(PretrainConfig, None, ["--optim.lr", "fast"])
    assert caught.value.code == 2
    assert "fast" in capsys.readouterr().err


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        PretrainConfig().loop.num_steps = 3  # type: ignore[misc]


def test_variables_of_a_chat_template_are_json_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("prompts: {sets: [mbpp], chat_template_kwargs: {effort: low}}")
    assert load_config(BenchConfig, tmp_path / "job.yaml").prompts.chat_template_kwargs == {"effort": "low"}
    flags = ["--prompts.sets", "mbpp", "--prompts.chat-template-kwargs"]
    given = load_config(BenchConfig, tmp_path / "job.yaml", [*flags, '{"effort": ["low", 1]}'])
    assert given.prompts.chat_template_kwargs == {"effort": ["low", 1]}
    for text, message in (
        ("{effort", "expected a JSON object such as"),
        ("[1]", "valid dictionary"),
        ('{"tools": []}', "'tools' is no variable of a chat template"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_config(BenchConfig, None, [*flags, text])
        assert str(caught.value).startswith("prompts.chat_template_kwargs: ") and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="needs a benchmark or a file among"):
        load_config(BenchConfig, None, ["--prompts.field", "question"])


def test_fields_are_replaced_by_their_dotted_names() -> None:
    config = replaced(PretrainConfig(), {"loop.num_steps": 7, "run.name": "other"})
    assert (config.loop.num_steps, config.run.name) == (7, "other")
    assert replaced(config, {"loop.num_steps": 1000, "run.name": "pretrain-tiny"}) == PretrainConfig()
    for name in ("loop.steps", "lop.num_steps", "kind.name", "loop.num_steps.x"):
        with pytest.raises(ValueError, match=f"a pretrain config has no field {name}$"):
            replaced(config, {name: 1})
    with pytest.raises(ValueError, match=r"^optim.lr: Input should be greater than 0"):
        replaced(config, {"optim.lr": -1})
