"""Every YAML in configs/ is a valid config of its verb, and every field of every verb says what it is."""

from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from speedstack.ablation.drafters_config import AblationConfig
from speedstack.cli import VERBS, config_loader
from speedstack.demo.config import MANAGED, SIZES, load_demo_config, stage_configs
from speedstack.support.config import dump_config, read_config
from speedstack.train.config.recipes import KINDS

ROOT = Path(__file__).resolve().parent.parent
# Suites are no configs of a verb: they name tasks, and tests/eval/lm_eval/test_suite.py reads them.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "suites")


# Folders of configs that a module reads, run with python -m, and not a verb.
MODULES: dict[str, type[BaseModel]] = {"drafter_ablation": AblationConfig}


def verb_of(path: Path) -> str:
    """The verb a config is for: the folder it lies in."""
    return path.parent.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_config_validates(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if verb_of(path) in MODULES:
        monkeypatch.chdir(ROOT)
        ablation = read_config(AblationConfig, path)
        assert all(ablation.row_config(row, seed=0) for row in ablation.rows)
        return
    assert verb_of(path) in VERBS, f"{path} lies in no verb's folder"
    config = config_loader(VERBS[verb_of(path)])(path, [])
    assert isinstance(config, BaseModel)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_config(verb: str) -> None:
    assert any(verb_of(path) == verb for path in CONFIGS)


def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of the fields of `model` and its sections that have no description."""
    names = []
    for name, field in model.model_fields.items():
        if not field.description:
            names.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += undocumented(field.annotation, f"{prefix}{name}.")
    return names


@pytest.mark.parametrize("name", [*VERBS, *MODULES])
def test_every_field_is_described_frozen_and_known(name: str) -> None:
    model = MODULES[name] if name in MODULES else type(config_loader(VERBS[name])(None, []))
    assert undocumented(model) == []
    assert model.model_config["frozen"] and model.model_config["extra"] == "forbid"


@pytest.mark.parametrize("size", SIZES)
def test_preset_dumps_and_loads_to_the_same_bytes(size: str, tmp_path: Path) -> None:
    text = dump_config(load_demo_config(None, ["--size", size]))
    path = tmp_path / "demo.yaml"
    path.write_text(text, encoding="utf-8")
    assert dump_config(load_demo_config(path, [])) == text
    assert yaml.safe_load(text)["size"] == size


def test_file_changes_only_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("size: small\nqat: {loop: {num_steps: 3}}\n", encoding="utf-8")
    preset, config = SIZES["small"](), load_demo_config(path, [])
    assert config.qat.loop == preset.qat.loop.model_copy(update={"num_steps": 3})
    assert config.qat.optim == preset.qat.optim


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("seed: 3\nquality: {num_tokens: 5}\n", encoding="utf-8")
    config = load_demo_config(path, ["--quality.num-tokens", "7"])
    assert (config.seed, config.quality.num_tokens) == (3, 7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("recipe", MANAGED)
def test_demo_trains_as_the_recipes_own_configs_say(recipe: str, size: str) -> None:
    alone = read_config(KINDS[recipe], ROOT / "configs" / recipe / f"{size}.yaml")
    assert getattr(SIZES[size](), recipe) == alone


@pytest.mark.parametrize("stage", MANAGED)
def test_demo_refuses_what_it_sets_itself(stage: str) -> None:
    with pytest.raises(ValueError, match=f"{stage}.run.name is set by the demo"):
        load_demo_config(None, [f"--{stage}.run.name", "mine"])


def test_stages_share_seed_corpus_and_directory() -> None:
    config = load_demo_config(None, ["--seed", "5", "--out", "somewhere", "--pretrain.data.vocab-size", "1000"])
    stages = stage_configs(config)
    assert {stage.run.seed for stage in stages} == {5}
    assert {stage.data.corpus for stage in stages} == {Path("somewhere/corpus")}
    assert {stage.data.vocab_size for stage in stages} == {1000}
    assert stages[2].drafter.target == Path("somewhere/qad/export")
    assert {stage.run.wandb_mode for stage in stages} == {"disabled"}


def test_demo_times_the_prompts_that_acceptance_measures() -> None:
    config = load_demo_config(None, [])
    timing, acceptance = config.timing, config.acceptance
    assert (timing.num_prompts, timing.num_prompt_tokens) == (acceptance.num_prompts, acceptance.num_prompt_tokens)
