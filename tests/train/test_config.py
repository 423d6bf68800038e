import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from speedstack.eval.config import BenchConfig
from speedstack.train.config.recipes import (
    KINDS,
    DrafterConfig,
    JobConfig,
    PretrainConfig,
    QatConfig,
    config_hash,
    dump_config,
    identity,
    load_config,
    read_config,
)

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("kind", KINDS)
def test_dump_load_dump_is_byte_stable(kind: str, tmp_path: Path) -> None:
    config_type = KINDS[kind]
    text = dump_config(config_type())
    path = tmp_path / "config.yaml"
    path.write_text(text)
    again = read_config(config_type, path)
    assert again == config_type()
    assert dump_config(again) == text


TRAINING_CONFIGS = sorted(path for kind in KINDS for path in (CONFIGS / kind).glob("*.yaml"))


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_training_config_validates(path: Path) -> None:
    config = read_config(KINDS[path.parent.name], path)
    assert config.run.name != "run", "a config names its run"


def test_every_field_has_a_description() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)

    for config_type in KINDS.values():
        check(config_type)


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


def test_hash_ignores_where_a_run_lies_and_nothing_else() -> None:
    def changed(section: str, **values: object) -> JobConfig:
        config = PretrainConfig()
        return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})

    reference = config_hash(PretrainConfig())
    assert config_hash(changed("run", name="x", out=Path("y"), wandb_mode="offline")) == reference
    assert config_hash(changed("loop", keep_checkpoints=9, save_every=1)) == reference
    assert config_hash(changed("loop", eval_every=3)) == reference
    assert config_hash(changed("run", seed=1)) != reference
    assert config_hash(changed("optim", lr=0.5)) != reference


def test_what_is_only_measured_binds_no_run() -> None:
    def of(**drafter: object) -> JobConfig:
        return DrafterConfig.model_validate({"drafter": drafter})

    source: dict[str, object] = {"source": "x"}
    first = of(prompts=source)
    assert identity(of(prompts=source | {"max_unusable_fraction": 0.5}, num_served_prompts=0)) == identity(first)
    other = identity(of(prompts=source | {"chat_template_kwargs": {"a": {"b": 1}}}))
    assert {key for key, value in identity(first).items() if other[key] != value} == {
        "drafter.prompts.chat_template_kwargs"
    }


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


def test_the_mirror_is_offline_unless_asked_otherwise() -> None:
    assert {config_type().run.wandb_mode for config_type in KINDS.values()} == {"offline"}


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, speedstack.train.config.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
