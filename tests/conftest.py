"""Shared fixtures: one tiny random Mixture-of-Experts model on disk, the same model packed, and drafters for both.

The model has every ingredient of the model of record at a thousandth of its cost: a dense layer, a sliding-window layer
with sinks, a global layer, query/key heads wider than value heads, partial rotary embedding, a sigmoid router with a
correction bias. All parameters are random and large enough that greedy decoding does not collapse onto one token.
Fixtures are built once a test process and must not be written to; copy the directory first.
"""

import importlib.util
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM, PreTrainedTokenizerFast

# Several test processes share the cores; set before any test module imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|mask|>"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interleavings",
        type=int,
        default=200,
        metavar="N",
        help="orders in which a test of the resident kernel lets its programs take turns (200; the quick run has 20)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, each of them whole: at the end no worker is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests of Triton kernels that this process cannot run, before their fixtures are made."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    if item.get_closest_marker("interpret") is not None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed: its kernels are not tested")
        if not interprets:
            pytest.skip("interprets Triton kernels, as make test-all does with TRITON_INTERPRET=1")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if interprets or not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and a process that does not interpret Triton kernels")


@pytest.fixture(scope="session")
def num_interleavings(request: pytest.FixtureRequest) -> int:
    """Of `--interleavings`."""
    return int(request.config.getoption("--interleavings"))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE over one module of the standard library; special ids 0, 1, 2 as in the model of record."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(textwrap.__file__).read_text(encoding="utf-8")], trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
    )


def build_tiny_config(**overrides: Any) -> "MiMoV2FlashConfig":
    """Three layers: global + dense, sliding + experts, global + experts. `overrides` replace single fields."""
    from transformers import MiMoV2FlashConfig

    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "sliding_window": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        "attention_value_scale": 0.707,
        "max_position_embeddings": 256,
        "norm_topk_prob": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    return MiMoV2FlashConfig(**(fields | overrides | {"attn_implementation": "eager"}))


def build_tiny_model(seed: int = 0, **overrides: Any) -> "MiMoV2FlashForCausalLM":
    """A float32 model in eval mode with every parameter random: sinks and router bias too, which start at constants."""
    import torch
    from transformers import MiMoV2FlashForCausalLM

    from tests.random_values import randomize

    model = MiMoV2FlashForCausalLM(build_tiny_config(**overrides))
    generator = randomize(model, seed)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.1, generator=generator)
    model.set_experts_implementation("grouped_mm")
    return model.eval()


@pytest.fixture(scope="session")
def make_tiny_model() -> "Callable[..., MiMoV2FlashForCausalLM]":
    """`make_tiny_model(seed=0, **config_overrides)`: the tiny model with other fields, for one shape or error."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """A float32 Hugging Face directory (config, safetensors, tokenizer) of the tiny model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny_model().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_packed_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "PreTrainedTokenizerFast") -> Path:
    """The tiny model with its routed experts packed to MXFP4."""
    from tests.packing import save_packed

    path = tmp_path_factory.mktemp("models") / "tiny-mxfp4"
    save_packed(build_tiny_model(), path, tokenizer=tiny_tokenizer)
    return path


def save_tiny_drafter(path: Path, target: Path, seed: int = 1) -> Path:
    """Write a random two-layer drafter, block 8, that names `target`'s weights; returns `path`."""
    from speedstack.dflash.checkpoint import save_drafter
    from speedstack.dflash.config import DFlashConfig
    from speedstack.dflash.model import DFlashDraftModel
    from speedstack.quant.checkpoint import weights_sha256
    from tests.random_values import randomize

    config = DFlashConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        vocab_size=VOCAB_SIZE,
        block_size=8,
        mask_token_id=2,
        target_layer_ids=(0, 1),
        num_target_layers=3,
        max_position_embeddings=256,
        target_sha256=weights_sha256(target),
    )
    drafter = DFlashDraftModel(config)
    randomize(drafter, seed)
    save_drafter(drafter, path)
    return path


@pytest.fixture(scope="session")
def make_tiny_drafter() -> Callable[..., Path]:
    """`make_tiny_drafter(path, target, seed=1)`: write a random drafter for the model directory `target`."""
    return save_tiny_drafter


@pytest.fixture(scope="session")
def tiny_drafter_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A random drafter for `tiny_model_dir`."""
    return save_tiny_drafter(tmp_path_factory.mktemp("models") / "tiny-drafter", tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_packed_drafter_dir(tmp_path_factory: pytest.TempPathFactory, tiny_packed_dir: Path) -> Path:
    """A random drafter for `tiny_packed_dir`."""
    return save_tiny_drafter(tmp_path_factory.mktemp("models") / "tiny-mxfp4-drafter", tiny_packed_dir)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`fails(*arguments, code=2)`: the one line that the command leaves on stderr, after checking its exit code."""

    from speedstack.cli import main

    def run(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        exit_code = main([str(argument) for argument in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("speedstack: error: ")]
        assert exit_code == code, lines
        assert len(lines) == 1
        assert len(lines[0]) > len("speedstack: error: ")
        return lines[0]

    return run
