"""Weights in FP8: the engine keeps them, and every number and every word is what dequantized ones give.

Legend: R rows, V vocabulary, O outputs, D hidden.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from speedstack.dflash.checkpoint import load_drafter
from speedstack.quant.checkpoint import convert, load_checkpoint, load_model
from speedstack.quant.fp8 import FP8Tensor, quantize_fp8
from speedstack.runtime import Engine
from speedstack.runtime.backends.gpu.base import check_fp8, formats_of
from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.weight_formats import WeightFormat, WeightFormats
from speedstack.runtime.model.weights import DenseWeights, ModelWeights, plain_matrix, read_weights
from speedstack.runtime.plan.step import build_plan
from tests.packing import save_packed
from tests.runtime.backends.gpu.plan_cases import dequantized

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
# All matrices of whole tiles of 128 x 128.
WHOLE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 2}
IDS = [5, 6, 7, 300, 20, 20, 11]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., Any]) -> dict[str, Path]:
    """One model with MXFP4 experts and an FP8 head, by format: float32 scales and a plain o_proj, or E8M0 and FP8."""
    place = tmp_path_factory.mktemp("fp8")
    save_packed(make_tiny_model(**WHOLE).bfloat16(), place / "packed")
    for name in ("mimo", "deepseek-v4"):
        with pytest.warns(UserWarning, match=r"the LM head is in FP8, which speedstack reads: most loaders of"):
            convert(place / "packed", name, place / name, linears="fp8", lm_head="fp8")
    return {name: place / name for name in ("packed", "mimo", "deepseek-v4")}


def weights_of(path: Path, keep_fp8: bool, dtype: torch.dtype = torch.float32) -> ModelWeights:
    checkpoint = load_checkpoint(path, keep_fp8)
    assert bool(checkpoint.fp8) == keep_fp8
    tensors = {**checkpoint.tensors, **checkpoint.fp8}
    return read_weights(spec_from_config(checkpoint.config), tensors, dtype, CPU, tied=False)


def held_in_fp8(weights: ModelWeights) -> list[bool]:
    return [isinstance(matrix, FP8Tensor) for matrix in weights.linears()]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["mimo", "deepseek-v4"])
def test_text_and_logits_are_those_of_dequantized_weights(
    directories: dict[str, Path], name: str, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Engine(weights_of(directories[name], keep_fp8=False), backend=backend, max_length=64)
    with caplog.at_level(logging.WARNING, "speedstack.runtime"):
        kept = Engine.from_pretrained(directories[name], backend=backend, device="cpu", dtype="float32", max_length=64)
    assert torch.equal(kept.logits(IDS), plain.logits(IDS))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": [1, 2], "ignore_eos": True}
    texts = [[out.tokens for out in engine.generate([IDS[:2], IDS], **options)] for engine in (kept, plain)]
    assert texts[0] == texts[1] and len(set(texts[0][0])) > 3
    num_fp8 = sum(held_in_fp8(weights_of(directories[name], keep_fp8=True)))
    assert num_fp8 == {"mimo": 6, "deepseek-v4": 9}[name]
    sizes, wide = kept.memory_bytes(), plain.memory_bytes()
    if backend == "cpu":
        assert wide["dense MLP"] / 2 <= sizes["dense MLP (FP8)"] <= 0.54 * wide["dense MLP"]  # of bfloat16
    else:
        assert f"backend {backend}: {num_fp8} matrices in FP8 are held" in caplog.text and sizes == wide


def test_plain_weights_share_what_is_plain(directories: dict[str, Path]) -> None:
    weights = weights_of(directories["mimo"], keep_fp8=True)
    plain = weights.plain()
    assert not any(held_in_fp8(plain)) and weights.num_fp8() == 6 and plain.num_fp8() == 0
    sizes = weights.nbytes_by_part()
    # a byte a weight, and four a tile
    assert sizes["dense MLP (FP8)"] == 3 * 128 * 256 + 6 * 4 and sizes["LM head (FP8)"] == 512 * 128 + 4 * 4
    for matrix, stored in zip(plain.linears(), weights.linears(), strict=True):
        assert (matrix is stored) != isinstance(stored, FP8Tensor)


def test_values_are_those_of_transformers(directories: dict[str, Path]) -> None:
    """Their dequantization of what the file holds, and of the whole model as a peer loads it."""
    weights, stored = weights_of(directories["mimo"], keep_fp8=True), load_file(directories["mimo"] / WEIGHTS)
    model = load_model(directories["mimo"], torch.bfloat16).state_dict()
    quantizer = cast(Any, SimpleNamespace())

    def theirs(name: str) -> torch.Tensor:
        return Fp8Dequantize(quantizer)._dequantize_one(
            stored[f"{name}.weight"], stored[f"{name}.weight_scale_inv"], torch.bfloat16
        )

    for index, layer in enumerate(weights.layers):
        parts = [f"model.layers.{index}.self_attn.{part}_proj" for part in "qkv"]
        found_OD = plain_matrix(layer.attention.qkv_OD, torch.bfloat16)
        assert torch.equal(found_OD, torch.cat([theirs(part) for part in parts]))
        assert torch.equal(found_OD, torch.cat([model[f"{part}.weight"] for part in parts]))
    assert torch.equal(plain_matrix(weights.lm_head_VD, torch.bfloat16), theirs("lm_head"))
    assert torch.equal(plain_matrix(weights.lm_head_VD, torch.float32), theirs("lm_head").float()), (
        "rounded all the same"
    )


@pytest.mark.parametrize("name", ["mimo", "deepseek-v4", "packed"])
def test_the_plan_counts_what_is_held(directories: dict[str, Path], name: str) -> None:
    """From config.json alone the same formats as from the weights; their bytes are those of the tensors."""
    spec, formats = read_model_config(directories[name])
    weights = weights_of(directories[name], name != "packed", torch.bfloat16)
    assert formats == formats_of(weights)
    if name != "packed":
        output: WeightFormat = "bf16" if name == "mimo" else "fp8"
        assert formats == WeightFormats("fp8", output, "fp8", "float32", "mxfp4", "bf16", "fp8")
    work = {phase.name: phase.work.weight_bytes for phase in build_plan(spec, formats, 8, max_context=64).phases}
    D, attention, dense = 128, weights.layers[0].attention, weights.layers[0].mlp
    assert isinstance(dense, DenseWeights)
    for phase, matrix, norms in (
        ("L00.qkv", attention.qkv_OD, 2 * D), ("L00.o_proj", attention.output_DO, 0),
        ("L00.gate_up", dense.gate_up_FD, 2 * D), ("L00.down", dense.down_DF, 0),
        ("lm_head", weights.lm_head_VD, 2 * D),
    ):  # fmt: skip
        assert work[phase] == matrix.nbytes + norms, phase


def test_a_projection_joined_with_unquantized_ones_is_not_kept(
    tmp_path: Path, make_tiny_model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Keys of 64 rows are no whole tile: the projection is plain, said so, counted so, and the same values."""
    save_packed(make_tiny_model(**WHOLE | {"num_key_value_heads": 1}).bfloat16(), tmp_path / "packed")
    with pytest.warns(UserWarning, match="4 linear layers of .* are not of whole tiles"):
        convert(tmp_path / "packed", "mimo", tmp_path / "mimo", linears="fp8")
    with caplog.at_level(logging.WARNING, "speedstack.runtime"):
        kept = weights_of(tmp_path / "mimo", keep_fp8=True)
    assert (
        "2 projections in FP8 are joined with unquantized ones and held in torch.float32, model.layers.0" in caplog.text
    )
    # qkv and o_proj of three layers, the dense layer's two, and the head
    assert held_in_fp8(kept) == [False, False, True, True, True, False, False, False, False]
    plain = weights_of(tmp_path / "mimo", keep_fp8=False)
    for matrix, wanted in zip(kept.linears(), plain.linears(), strict=True):
        assert torch.equal(plain_matrix(matrix, torch.float32), plain_matrix(wanted, torch.float32))
    assert formats_of(kept).attention == "float32" and read_model_config(tmp_path / "mimo")[1].attention == "bf16"


def test_gpus_that_decode_no_fp8_are_refused_by_name(directories: dict[str, Path]) -> None:
    weights = weights_of(directories["mimo"], keep_fp8=True)
    with pytest.raises(
        ValueError, match=r"'graph' reads FP8 on GPUs of compute capability 8\.9; this one has 8\.0: use"
    ):
        check_fp8("graph", weights, (8, 0))
    check_fp8("graph", weights, (8, 9))
    check_fp8("graph", dequantized(weights), (8, 0))


def damaged(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    out.mkdir()
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


@pytest.mark.parametrize(("change", "reason"), [
    (lambda t: t["lm_head.weight_scale_inv"].view(-1)[3:].fill_(torch.nan), "elements or scales are NaN or infinity"),
    (lambda t: t["lm_head.weight_scale_inv"].view(-1)[:1].fill_(torch.inf), "elements or scales are NaN or infinity"),
    (lambda t: t["lm_head.weight"].view(torch.uint8)[3, 7:9].fill_(0xFF), "elements or scales are NaN or infinity"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(4, 2)}), r"has shape \(4, 2\).*\(4, 1\)"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(4, 1).half()}), "FP8 tiles are .* got .*float16"),
    (lambda t: t.pop("lm_head.weight_scale_inv"), "lm_head.weight_scale_inv"),
])  # fmt: skip
def test_bad_fp8_is_refused_in_one_line(
    directories: dict[str, Path], tmp_path: Path, change: Callable[..., Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"lm_head.*{reason}|{reason}") as caught:
        Engine.from_pretrained(damaged(directories["mimo"], tmp_path / "bad", change), device="cpu")
    assert "\n" not in str(caught.value) and "lm_head.weight" in str(caught.value)


def test_heads_that_cannot_be_fp8(
    directories: dict[str, Path], tmp_path: Path, make_tiny_model: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"format compressed-tensors has no FP8 linear layers: leave lm_head at keep"):
        convert(directories["mimo"], "compressed-tensors", tmp_path / "out", lm_head="fp8")
    make_tiny_model(**WHOLE, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ValueError, match=r"the LM head of .*tied is its embedding, which is not stored in FP8"):
        convert(tmp_path / "tied", "mimo", tmp_path / "out", lm_head="fp8")
    make_tiny_model(**WHOLE, vocab_size=500).save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=r"lm_head\.weight of shape \(500, 128\) is not of whole tiles of 128 x 128"):
        convert(tmp_path / "odd", "mimo", tmp_path / "out", lm_head="fp8")
    assert not (tmp_path / "out").exists()
    with pytest.warns(UserWarning, match=r"13 linear layers of .* are FP8, which .* rounded to bfloat16"):
        convert(directories["mimo"], "compressed-tensors", tmp_path / "out")
    assert read_model_config(tmp_path / "out")[1] == read_model_config(directories["packed"])[1], (
        "the head is plain again"
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_drafter_reads_the_head_in_the_engines_dtype(
    backend: Any, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path
) -> None:
    """Same proposals, so the same rounds; the head is not copied for it. Tiles of this head are cut."""
    weights = weights_of(tiny_packed_dir, keep_fp8=False)
    fp8 = replace(weights, lm_head_VD=quantize_fp8(plain_matrix(weights.lm_head_VD, torch.float32)))
    found = []
    for held in (fp8, dequantized(fp8)):
        drafter = load_drafter(tiny_packed_drafter_dir)
        engine = Engine(held, drafter, backend=backend, max_length=64)
        out = engine.generate(IDS, max_new_tokens=20, ignore_eos=True)
        found.append((out.tokens, out.stats.num_rounds, out.stats.acceptance_length, engine.memory_bytes()["drafter"]))
    assert found[0][:3] == found[1][:3] and found[0][1] < 20
    assert found[0][3] == found[1][3]
