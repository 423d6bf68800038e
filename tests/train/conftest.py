"""Jobs small enough to train in a second: a corpus of made-up programs and a model of a hundred thousand weights."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from speedstack.support.config import dump_config
from speedstack.train.config.recipes import DrafterConfig, PretrainConfig, QatConfig
from speedstack.train.core.loop import RunResult
from speedstack.train.data.corpus import load_corpus, prepare_corpus
from speedstack.train.pretrain import pretrain

MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def job_sections(corpus: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Sections of a job of 6 steps; `changes` are dotted names with `__` for the dot."""
    sections: dict[str, Any] = {
        "run": {"name": "job", "out": str(out), "device": "cpu", "precision": "float32"},
        "data": {"corpus": str(corpus), "source": "", "vocab_size": 300, "sequence_length": 32, "eval_sequences": 4},
        "loop": {"num_steps": 6, "batch_size": 4, "log_every": 2, "eval_every": 3, "save_every": 2},
    }
    sections["data"] |= {"source": str(corpus.parent / "source.jsonl"), "heldout_fraction": 0.2}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        sections.setdefault(section, {})[key] = value
    return sections


def write_source(path: Path, num_documents: int = 30) -> Path:
    """Documents that a small model can learn something about."""
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "count", "total", "value", "index"]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_documents):
            lines = [f"{rng.choice(words)} = {rng.choice(words)} + {rng.randrange(10)}\n" for _ in range(40)]
            file.write(json.dumps({"text": "".join(lines)}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus, with its source next to it."""
    directory = tmp_path_factory.mktemp("corpus")
    source = write_source(directory / "source.jsonl")
    return prepare_corpus(directory / "corpus", 300, source=str(source), heldout_fraction=0.2).path


@pytest.fixture(scope="session")
def make_pretrain_config(corpus_path: Path) -> Callable[..., PretrainConfig]:
    """`make_pretrain_config(out, **changes)`: a job of a second; `changes` are fields, as in `loop__num_steps=4`."""

    def make(out: Path, **changes: Any) -> PretrainConfig:
        sections = job_sections(corpus_path, out, **changes)
        return PretrainConfig.model_validate({**sections, "model": MODEL | sections.get("model", {})})

    return make


@pytest.fixture(scope="session")
def make_qat_config(corpus_path: Path) -> Callable[..., QatConfig]:
    """`make_qat_config(out, model, **changes)`: likewise, starting from the model directory `model`."""

    def make(out: Path, model: Path, **changes: Any) -> QatConfig:
        sections = job_sections(corpus_path, out, **changes)
        return QatConfig.model_validate({**sections, "qat": {"model": str(model)} | sections.get("qat", {})})

    return make


@pytest.fixture(scope="session")
def pretrained(
    make_pretrain_config: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> RunResult:
    """A finished pretraining run of 6 steps, read only."""
    return pretrain(make_pretrain_config(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="session")
def changed() -> Callable[..., DrafterConfig]:
    """`changed(config, **sections)`: a drafter's config with these fields of its sections replaced."""

    def change(config: DrafterConfig, **sections: dict[str, Any]) -> DrafterConfig:
        raw = config.model_dump()
        for section, values in sections.items():
            raw[section] |= values
        return DrafterConfig.model_validate(raw)

    return change


@pytest.fixture(scope="session")
def torchrun() -> Callable[[str, Path, Sequence[Path]], None]:
    """`torchrun(source, script, files)`: two processes that run `source`, which is written to `script`, on `files`."""

    def launch(source: str, script: Path, files: Sequence[Path]) -> None:
        script.write_text(source)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            command + [str(file) for file in files], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return launch


_DRAFTER_JOB = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from speedstack.support.config import read_config
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.drafter.job import train_drafter
for path in sys.argv[1:]:
    train_drafter(read_config(DrafterConfig, Path(path)))
sys.stderr.flush()
os._exit(0)
"""


@pytest.fixture(scope="session")
def train_by_two(torchrun: Callable[[str, Path, Sequence[Path]], None]) -> Callable[..., None]:
    """`train_by_two(configs, directory)`: two processes train these drafters, one after the other."""

    def train(configs: Sequence[DrafterConfig], directory: Path) -> None:
        files = [directory / f"{config.run.name}.yaml" for config in configs]
        for file, config in zip(files, configs, strict=True):
            file.write_text(dump_config(config))
        torchrun(_DRAFTER_JOB, directory / "job.py", files)

    return train


@pytest.fixture(scope="session")
def random_model(corpus_path: Path) -> Callable[[str, Path], Path]:
    """`random_model(model_type, path)`: write a random instance of another family, with the corpus's tokenizer."""
    fields: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_experts_per_tok": 2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        "gpt_oss": {"num_local_experts": 4, "head_dim": 16},
        "minimax_m2": {"num_local_experts": 4, "head_dim": 16},
        "olmoe": {"num_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 32},
    }

    def write(model_type: str, path: Path) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **fields, **own[model_type])
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        load_corpus(corpus_path).tokenizer.save_pretrained(path)
        return path

    return write
