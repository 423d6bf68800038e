"""How the compiled CPU backend holds weights and key/value buffers: as stored, in eight bits, in bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.quant.checkpoint import load_model
from speedstack.quant.fp8 import FP8Tensor
from speedstack.runtime import Engine
from speedstack.runtime.backends.cpu.packed_layout import BFLOAT16, FP8, INT8, int8_blocks, panels, unpacked
from speedstack.runtime.model.loading import load_target

PROMPTS = [[5, 9, 200, 31], list(range(60, 130)), [7] * 20]


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (40, 96), (33, 160), (48, 64)])
def test_int8_rounds_to_the_nearest_of_a_block(num_outputs: int, num_inputs: int) -> None:
    w_NK = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))
    w_NK[3, :32] = 0.0
    codes_NK, scales_NB = int8_blocks(w_NK)
    scales_NK = scales_NB.float().repeat_interleave(32, 1)
    # half a step, and what rounding the scale to bfloat16 may cut off the largest
    assert bool(((codes_NK * scales_NK - w_NK).abs() <= scales_NK * (0.5 + 127 * 2**-8)).all())
    assert int(codes_NK.abs().max()) <= 127 and not codes_NK[3, :32].any()
    matrix = panels(w_NK, to_int8=True)
    assert matrix.format == INT8 and torch.equal(unpacked(matrix, num_outputs), codes_NK * scales_NK)
    assert matrix.nbytes < 1.13 * -(-num_outputs // 16) * 16 * num_inputs


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(256, 128), (40, 96), (200, 320), (130, 64)])
def test_fp8_is_what_it_dequantizes_to(num_outputs: int, num_inputs: int) -> None:
    """Every code but NaN, subnormal ones too, under scales that are no powers of two, in partial tiles."""
    generator = torch.Generator().manual_seed(0)
    codes_NK = torch.randint(0, 256, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    codes_NK[(codes_NK & 0x7F) == 0x7F] = 1
    tiles = (-(-num_outputs // 128), -(-num_inputs // 128))
    weight = FP8Tensor(codes_NK.view(torch.float8_e4m3fn), torch.rand(tiles, generator=generator) + 0.01)
    matrix = panels(weight)
    expected_NK = weight.dequantize(torch.bfloat16).float()
    assert matrix.format == FP8 and torch.equal(unpacked(matrix, num_outputs), expected_NK)
    codes_NK[0, 0] = 0x7F
    held = panels(weight)
    assert held.format == BFLOAT16 and bool(unpacked(held, num_outputs)[0, 0].isnan())


def test_int8_needs_whole_blocks_of_finite_values() -> None:
    assert panels(torch.randn(16, 48), to_int8=True).format != INT8  # no whole blocks
    with pytest.raises(ValueError, match="not finite, which eight bits cannot hold"):
        panels(torch.full((16, 32), float("nan")), to_int8=True)


@pytest.mark.parametrize(
    ("options", "part"),
    [({"dense_dtype": "int8"}, "attention (int8)"), ({"kv_dtype": "bfloat16"}, "KV cache")],
    ids=["int8", "bfloat16 buffers"],
)
def test_fewer_bytes_change_logits_a_little_and_keep_every_promise(
    options: dict[str, Any], part: str, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path
) -> None:
    exact = Engine.from_pretrained(tiny_packed_dir, backend="cpu", max_length=192)
    plain = Engine.from_pretrained(tiny_packed_dir, backend="cpu", max_length=192, **options)
    assert plain.memory_bytes()[part] < 0.6 * exact.memory_bytes()[part.removesuffix(" (int8)")]
    expected_TV, found_TV = (engine.logits(PROMPTS[1]).log_softmax(-1) for engine in (exact, plain))
    divergence = (expected_TV.exp() * (expected_TV - found_TV)).sum(-1).mean()
    # Random weights are steep, and a row whose experts change counts for much; wrong values diverge by more than one.
    assert 0 < divergence < 0.05
    drafting = Engine.from_pretrained(
        tiny_packed_dir, tiny_packed_drafter_dir, backend="cpu", max_length=192, num_drafts="all", **options
    )
    for temperature in (0.0, 0.9):
        sampling: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 3, "ignore_eos": True}
        together = [out.tokens for out in drafting.generate(PROMPTS, **sampling)]
        assert together == [plain.generate(prompt, **sampling).tokens for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense_dtype": "int4"}, "dense_dtype 'int4' is not supported; use 'int8'"),
        ({"kv_dtype": "int8"}, "kv_dtype 'int8' is not supported; use 'float32' or 'bfloat16'"),
        ({"backend": "reference", "dense_dtype": "int8"}, "options of backend 'cpu'"),
        ({"backend": "reference", "kv_dtype": "bfloat16"}, "options of backend 'cpu'"),
    ],
)
def test_options_that_are_not_there_are_refused(options: dict[str, Any], message: str, tiny_packed_dir: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(tiny_packed_dir, **options)


def test_a_bfloat16_checkpoint_is_held_in_bfloat16_and_computed_in_float32(
    tiny_packed_dir: Path, tmp_path: Path
) -> None:
    model: Any = load_model(tiny_packed_dir)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    target = load_target(tmp_path / "bfloat16", "cpu", "float32")
    weights: Any = target.weights
    assert weights.embedding_VD.dtype == weights.layers[1].mlp.gate_up_EID.dtype == torch.bfloat16
    wide = weights.widened()
    assert weights.dtype == wide.dtype == wide.embedding_VD.dtype == torch.float32 and wide.widened() is wide
    for layer, stored in zip(wide.layers, weights.layers, strict=True):
        assert torch.equal(layer.attention.qkv_OD, stored.attention.qkv_OD.float())
        assert layer.attention.norm_D is stored.attention.norm_D
    compiled, oracle = (Engine.from_target(target, backend=name, max_length=96) for name in ("cpu", "reference"))
    ratio = {part: compiled.memory_bytes()[part] / oracle.memory_bytes()[part] for part in ("attention", "experts")}
    assert all(value < 0.52 for value in ratio.values())
    # float32 sums in another order, through a few layers
    torch.testing.assert_close(compiled.logits(PROMPTS[1]), oracle.logits(PROMPTS[1]), rtol=1e-3, atol=1e-3)
