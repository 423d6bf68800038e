import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from speedstack.support.config import dump_config, read_config
from speedstack.train.config.recipes import (
    KINDS,
    DrafterConfig,
    JobConfig,
    PretrainConfig,
    config_hash,
    identity,
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


def test_the_mirror_is_offline_unless_asked_otherwise() -> None:
    assert {config_type().run.wandb_mode for config_type in KINDS.values()} == {"offline"}


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, speedstack.train.config.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
