"""ZeRO-3 in two processes takes the steps of one process, for every family and whatever is trained."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from speedstack.quant.checkpoint import export_model, load_model
from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.support.config import dump_config
from speedstack.train.config.recipes import DrafterConfig, JobConfig, QatConfig
from speedstack.train.core.distributed import join_world
from speedstack.train.data.corpus import load_corpus
from speedstack.train.drafter.text import write_text
from tests.conftest import build_tiny_config
from tests.quant.conftest import FAMILIES as FIELDS
from tests.random_values import randomize
from tests.train.core import two_steps as worker
from tests.train.core.two_steps import two_steps

# What a model does in training alone differs from process to process, and from teacher to student: none of it counts.
OWN = {
    "mixtral": {"router_jitter_noise": 0.4, "attention_dropout": 0.5},
    "qwen2_moe": {"output_router_logits": True, "router_aux_loss_coef": 10.0},
    "qwen3_moe": {"attention_dropout": 0.5},
}
# With a large `eps`, because a gradient of nearly zero may have either sign, and AdamW would make whole steps of both.
OPTIM = {"name": "adamw", "lr": 1e-3, "eps": 1e-3}
# In the first and in the second step. Everything is in float32, and sums over sequences are made in another order: the
# largest difference seen is 2e-6. By then a weight on the edge of two MXFP4 codes may have fallen to the other side.
TOLERANCES = (1e-5, 1e-3)


@pytest.fixture(scope="module")
def models(corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of each family, with the corpus's tokenizer."""
    root = tmp_path_factory.mktemp("families")
    tokenizer = load_corpus(corpus_path).tokenizer
    paths: dict[str, Path] = {}
    config: Any
    for family in [*FAMILIES, "minimax_m2"]:
        if family == "mimo_v2_flash":
            config = build_tiny_config(vocab_size=300)
        else:
            fields = FIELDS[family] | {"vocab_size": 300, "max_position_embeddings": 64} | OWN.get(family, {})
            config = AutoConfig.for_model(family, **fields)
        model = AutoModelForCausalLM.from_config(config)
        randomize(model, seed=0)
        model.save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
        paths[family] = root / family
    return paths


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore:no packed format is known for minimax_m2")
def test_two_processes_take_the_steps_of_one(
    models: dict[str, Path],
    corpus_path: Path,
    make_qat_config: Callable[..., QatConfig],
    torchrun: Callable[[str, Path, Sequence[Path]], None],
    tmp_path: Path,
) -> None:
    def qat_config(name: str, model: Path, **changes: Any) -> QatConfig:
        options: dict[str, Any] = {"run__name": name, "loop__num_steps": 2, "loop__save_every": 0, "qat__look_every": 0}
        options |= {f"optim__{field}": value for field, value in OPTIM.items()}
        return make_qat_config(tmp_path, model, **(options | changes))

    jobs: dict[str, JobConfig] = {}
    for place, (family, path) in enumerate(models.items()):
        jobs[f"qat-{family}"] = qat_config(f"qat-{family}", path)
        jobs[f"qat-{family}-all"] = qat_config(
            f"qat-{family}-all",
            path,
            qat__trainable="all" if place % 2 else "all_but_router",
            qat__activation_checkpointing=place % 4 < 2,
            loop__micro_batch_size=1,
        )
        # Others write no held-out text, and end before the first step in one process as well.
        if family in ("gpt_oss", "mimo_v2_flash", "qwen3_moe"):
            jobs[f"drafter-{family}"] = drafter_config(f"drafter-{family}", path, corpus_path, tmp_path)
    jobs["qat-resumed"] = qat_config("qat-resumed", models["qwen3_moe"], loop__save_every=1)
    # Some families keep their router in float32 in a model in bfloat16.
    jobs["qat-bf16-teacher"] = qat_config("qat-bf16-teacher", models["glm4_moe"], qat__teacher_dtype="bfloat16")
    packed = tmp_path / "packed"
    export_model(load_model(models["gpt_oss"]), models["gpt_oss"], packed, scale_rule="even")
    jobs["qat-packed"] = qat_config("qat-packed", models["gpt_oss"], qat__start_from=str(packed))
    jobs["qat-headless"] = qat_config("qat-headless", without_head(models["minimax_m2"], tmp_path / "headless"))

    alone = {}
    for name, job in jobs.items():
        if isinstance(job, DrafterConfig):
            write_text(job)
        # One process takes all of a step's sequences at once, two of them one after the other.
        at_once = job.model_copy(update={"loop": job.loop.model_copy(update={"micro_batch_size": 0})})
        with join_world(at_once) as world:
            alone[name] = two_steps(at_once, world)
        sharded = job.model_dump() | {"distributed": {"zero_stage": 3}}
        (tmp_path / f"{name}.yaml").write_text(dump_config(type(job).model_validate(sharded)))
    torchrun(Path(worker.__file__).read_text(), tmp_path / "job.py", [tmp_path / f"{name}.yaml" for name in jobs])

    for name, lines in alone.items():
        first, second = (json.loads((tmp_path / f"{name}.{rank}.json").read_text()) for rank in range(2))
        assert first == second, name
        if isinstance(lines, str):
            assert first == lines and "lacks 1 tensors, such as lm_head.weight" in lines
            continue
        for step, (ours, theirs) in enumerate(zip(first, lines, strict=True)):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCES[step]), (name, step, key)
    # A resumed run is not just close.
    files = [tmp_path / f"{name}.0.json" for name in ("qat-qwen3_moe", "qat-resumed")]
    assert files[0].read_text() == files[1].read_text()


def drafter_config(name: str, target: Path, corpus: Path, out: Path) -> DrafterConfig:
    return DrafterConfig.model_validate(
        {
            "run": {"name": name, "out": out, "device": "cpu", "precision": "float32"},
            "data": {"corpus": corpus, "source": str(corpus.parent / "source.jsonl"), "sequence_length": 32}
            | {"heldout_fraction": 0.2},
            "optim": OPTIM,
            # One window of two is written text, whose prompt is not predicted: it has fewer blocks than the corpus's.
            "loop": {"num_steps": 2, "batch_size": 4, "save_every": 0, "micro_batch_size": 1},
            "drafter": {
                "target": target,
                "target_dtype": "float32",
                "target_layer_ids": [0, 1],
                "mask_token_id": 2,
                "block_size": 4,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "kl_weight": 1.0,
                "num_sequences": 4,
                "num_eval_sequences": 1,
                "num_served_prompts": 0,
                "prompt_length": 8,
                "num_anchors": 28,
                "written_fraction": 0.5,
            },
        }
    )


def without_head(model: Path, path: Path) -> Path:
    """A copy of an untied model that lacks the tensor of its LM head."""
    shutil.copytree(model, path)
    weights = load_file(path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_noise_of_training_is_not_in_the_loss(
    models: dict[str, Path], make_qat_config: Callable[..., QatConfig], tmp_path: Path
) -> None:
    """The student is computed as its teacher and its export are: no dropout, no noise in the router, no other loss."""
    for family, fields in OWN.items():
        quiet = tmp_path / family
        shutil.copytree(models[family], quiet)
        config = json.loads((quiet / "config.json").read_text())
        assert all(config[name] == value for name, value in fields.items())
        zero = {name: type(value)(0) for name, value in fields.items()}
        (quiet / "config.json").write_text(json.dumps(config | zero))
        lines = []
        for path in (models[family], quiet):
            job = make_qat_config(tmp_path, path, qat__activation_checkpointing=True)
            with join_world(job) as world:
                lines.append(two_steps(job, world))
        assert lines[0] == lines[1], family
