"""Layers of the Triton kernels alone: numbers that have to be exact, ties, and what is no number.

Legend: R rows, E experts, K choices of a row, V vocabulary, T tiles.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from speedstack.quant.fp8 import FP8Tensor
from speedstack.runtime.model.moe import route
from speedstack.runtime.model.spec import MoeSpec

pytest.importorskip("triton", reason="triton is not installed: its kernels are not tested")

import triton
import triton.language as tl

from speedstack.runtime.backends.base import Rows
from speedstack.runtime.backends.gpu.buffers import row_records, sampling_records
from speedstack.runtime.backends.gpu.kernels.layers.matmul import inverse_rms, rounded_to_bfloat16
from speedstack.runtime.backends.gpu.kernels.layers.router import choose
from speedstack.runtime.plan.record_layout import RECORD
from speedstack.runtime.rounds.histogram import NUM_BINS
from tests.runtime.backends.gpu.launch import Launcher

R = 4
ROWS = row_records(Rows([1] * R, list(range(R)), [0] * R), R)  # all of them in use


@triton.jit
def decode_fp8_kernel(codes_ptr, scales_ptr, out_ptr, N: tl.constexpr, S: tl.constexpr):
    n_N, s_S = tl.arange(0, N), tl.arange(0, S)
    code_N1 = tl.load(codes_ptr + n_N).to(tl.float32)[:, None]
    value_NS = rounded_to_bfloat16(code_N1 * tl.load(scales_ptr + s_S)[None, :], out_ptr.dtype.element_ty)
    tl.store(out_ptr + n_N[:, None] * S + s_S[None, :], value_NS)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_fp8_is_decoded_exactly(launch: Launcher) -> None:
    """Every number of E4M3 under scales from the least subnormal to those that overflow, ties included."""
    codes_N = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    generator = torch.Generator().manual_seed(0)
    # 1 + 2**-7 + 2**-8 and 1 + 2**-8 lie half way between two bfloat16 values: one is rounded up, one down.
    ties = torch.tensor([1.01171875, 1.00390625, 1.0, 448.0])
    scales_S = torch.cat([torch.logspace(-45, 38, 84), torch.rand(40, generator=generator) * 1e-3, ties])
    found_NS = torch.empty(256, 128)
    launch(decode_fp8_kernel, (1,), codes_N, scales_S, found_NS, N=256, S=128)
    expected_NS = (codes_N.float()[:, None] * scales_S).bfloat16().float()
    is_number_N = ~codes_N.float().isnan()
    assert int(is_number_N.sum()) == 254 and expected_NS.isinf().any()
    assert torch.equal(found_NS[is_number_N].view(torch.int32), expected_NS[is_number_N].view(torch.int32))


@triton.jit
def choose_kernel(
    rows_ptr, logits_ptr, bias_ptr, experts_ptr, weights_ptr, chosen_ptr, scale, E: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, EP: tl.constexpr, KP: tl.constexpr, IS_SIGMOID: tl.constexpr, HAS_CORRECTION: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):  # fmt: skip
    experts_KR, weights_KR, rank_E = choose(
        rows_ptr, logits_ptr, bias_ptr, scale, E, R, K, EP, KP, IS_SIGMOID, HAS_CORRECTION, RENORMALIZE
    )
    at_KR = tl.arange(0, KP)[:, None] * R + tl.arange(0, R)[None, :]
    tl.store(experts_ptr + at_KR, experts_KR)
    tl.store(weights_ptr + at_KR, weights_KR)
    tl.store(chosen_ptr + tl.arange(0, EP), rank_E)


def run_choose(
    launch: Launcher, logits_RE: torch.Tensor, bias_E: torch.Tensor | None, spec: MoeSpec, num_rows: int
) -> Any:
    """Experts [num_rows, K], their weights, and the chosen experts; the last rows are idle."""
    E, K, KP = spec.num_experts, spec.top_k, 4
    experts, weights = torch.full((KP, R), -1, dtype=torch.int32), torch.empty(KP, R)
    chosen = torch.empty(8, dtype=torch.int32)
    rows = row_records(Rows([1] * num_rows, [0] * num_rows, list(range(num_rows))), R)
    launch(
        choose_kernel, (1,), rows, logits_RE.T.contiguous(), logits_RE if bias_E is None else bias_E, experts,
        weights, chosen, spec.routed_scale, E=E, R=R, K=K, EP=8, KP=KP, IS_SIGMOID=spec.scoring == "sigmoid",
        HAS_CORRECTION=bias_E is not None, RENORMALIZE=spec.renormalize,
    )  # fmt: skip
    assert (experts[K:] == E).all() and (experts[:, num_rows:] == E).all(), "no expert where there is no choice"
    return experts.T[:num_rows, :K], weights.T[:num_rows, :K], chosen.nonzero().flatten().tolist()


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_experts_are_the_references_choice(scoring: Any, launch: Launcher) -> None:
    """Ties go to the lower index; idle rows choose nobody; a row without numbers stays inside of the weights."""
    logits_RE = torch.randn(R, 5, generator=torch.Generator().manual_seed(0))
    logits_RE[1] = torch.tensor([0.5, 2.0, 0.5, 2.0, 0.5])
    bias_E = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.05]) if scoring == "sigmoid" else None
    spec = MoeSpec(5, 3, 8, scoring, bias_E is not None, bias_E is not None, routed_scale=1.5)
    experts_RK, weights_RK = route(logits_RE[:3], bias_E, spec)
    found_RK, found_weights_RK, chosen = run_choose(launch, logits_RE, bias_E, spec, 3)
    assert torch.equal(found_RK.long(), experts_RK) and chosen == experts_RK.unique().tolist()
    # exponentials of numpy and of torch, and sums of five in another order
    torch.testing.assert_close(found_weights_RK, weights_RK, rtol=1e-6, atol=0)
    logits_RE[0] = float("nan")
    lost_RK, lost_weights_RK, _ = run_choose(launch, logits_RE, bias_E, spec, 3)
    assert lost_weights_RK[0].isnan().all() and torch.equal(lost_weights_RK[1:], found_weights_RK[1:])
    assert sorted(lost_RK[0].tolist()) == [0, 1, 2] and torch.equal(lost_RK[1:], found_RK[1:])


def test_lm_head_names_its_largest_logit(launch: Launcher) -> None:
    """Of each tile and row: the first of equals; -1 where one is NaN; nothing past the vocabulary."""
    D, V = 24, 21
    generator = torch.Generator().manual_seed(0)
    hidden_DR, head_VD = torch.randn(D, R, generator=generator), torch.randn(V, D, generator=generator)
    head_VD[18] = head_VD[17]
    head_VD[17:19] *= 10
    hidden_DR[:, 2] = float("nan")
    logits_VR, best = torch.full((V, R), 7.0), torch.empty(2, 2, R, dtype=torch.int32)
    scaled, squares = blocks(hidden_DR), squares_of(hidden_DR)
    peaks = torch.full((2, R), 7.0)
    pointers = (ROWS, scaled, squares, head_VD, logits_VR, best, sampling_records([None] * R, R), peaks)
    launch.phase(
        pointers, op="lm_head", axes=(2,), eps=1e-5, VOCAB=V, D=D, R=R, NP=2, T=16, CHUNK=32, FP8_ROWS=0,
        HAS_LOGITS=True,
    )  # fmt: skip
    normed_RD = hidden_DR.T * torch.rsqrt(hidden_DR.T.pow(2).mean(-1, keepdim=True) + 1e-5)
    expected_RV = normed_RD @ head_VD.T
    # sums of 24 in another order
    torch.testing.assert_close(logits_VR.T, expected_RV, rtol=1e-5, atol=1e-5, equal_nan=True)
    for tile, start in enumerate((0, 16)):
        part = logits_VR.T[:, start : start + 16]
        assert best[tile, 1].tolist() == [
            -1 if row.isnan().any() else start + int(row.numpy().argmax()) for row in part
        ]  # fmt: skip
        known = [0, 1, 3]
        assert torch.equal(best[tile, 0].view(torch.float32)[known], part[known].max(-1).values)
    assert 17 in best[1, 1]
    assert (peaks == 7.0).all(), "nobody needs them without a temperature"


def blocks(x_KR: torch.Tensor) -> torch.Tensor:
    """[K / 16, R, 16]; what fills the last block is no number."""
    padded_KR = F.pad(x_KR, (0, 0, 0, -len(x_KR) % 16), value=float("nan"))
    return padded_KR.unflatten(0, (-1, 16)).transpose(1, 2).contiguous()


def squares_of(x_KR: torch.Tensor) -> torch.Tensor:
    """Sums of squares of blocks, [K / 16, R]."""
    return F.pad(x_KR, (0, 0, 0, -len(x_KR) % 16)).unflatten(0, (-1, 16)).square().sum(1)


def test_an_embedding_is_written_for_its_norm(launch: Launcher) -> None:
    """At a size that fills no block; rows that the step does not have stay as they are."""
    D, generator = 21, torch.Generator().manual_seed(0)
    embedding_VD, norm_D = torch.randn(5, D, generator=generator), torch.randn(D, generator=generator)
    rows = row_records(Rows([3, 1], [0, 1], [4, 9]), R)
    hidden_DR, scaled, squares = torch.full((D, R), 7.0), torch.full((2, R, 16), 7.0), torch.full((2, R), 7.0)
    nobody = torch.zeros(R, RECORD, dtype=torch.int32)  # goes on by itself: the host has written the rows
    bins = torch.full((R, 2, NUM_BINS), -5)
    pointers = (nobody, nobody, nobody, rows, nobody, embedding_VD, hidden_DR, norm_D, scaled, squares, bins)
    launch.phase(pointers, op="embed", axes=(R,), D=D, R=R, NP=2, HAS_PROPOSALS=False)
    expected_DR = embedding_VD[[3, 1]].T
    assert torch.equal(hidden_DR[:, :2], expected_DR)
    is_number = ~blocks(expected_DR).isnan()
    assert torch.equal(scaled[:, :2][is_number], blocks(expected_DR * norm_D[:, None])[is_number])
    # sums of 16 in another order
    torch.testing.assert_close(squares[:, :2], squares_of(expected_DR), rtol=1e-6, atol=0)
    assert (hidden_DR[:, 2:] == 7).all() and (scaled[:, 2:] == 7).all() and (squares[:, 2:] == 7).all()


@triton.jit
def inverse_rms_kernel(squares_ptr, out_ptr, eps, D: tl.constexpr, R: tl.constexpr, NP: tl.constexpr):
    r_R = tl.arange(0, R)
    tl.store(out_ptr + r_R, inverse_rms(squares_ptr, r_R >= 0, eps, D, R, NP))


def test_what_is_scaled_in_bfloat16_is_the_normalized_state(launch: Launcher) -> None:
    """A product of what `embed` writes, divided as products divide, against the norm in float64."""
    D, eps, generator = 40, 1e-5, torch.Generator().manual_seed(0)
    embedding_VD = (torch.randn(5, D, generator=generator) * 5).bfloat16()
    norm_D = (torch.rand(D, generator=generator) + 0.5).bfloat16()
    rows, nobody = row_records(Rows([3, 1, 4, 2], [0, 1, 2, 3], [0] * 4), R), torch.zeros(R, RECORD, dtype=torch.int32)
    hidden_DR, scaled, squares = torch.zeros(D, R).bfloat16(), torch.zeros(3, R, 16).bfloat16(), torch.zeros(3, R)
    bins = torch.full((R, 2, NUM_BINS), -5)
    pointers = (nobody, nobody, nobody, rows, nobody, embedding_VD, hidden_DR, norm_D, scaled, squares, bins)
    launch.phase(pointers, op="embed", axes=(R,), D=D, R=R, NP=4, HAS_PROPOSALS=False)
    rms_R = torch.zeros(R)
    launch(inverse_rms_kernel, (1,), squares, rms_R, eps, D=D, R=R, NP=4)
    assert torch.equal(hidden_DR.T, embedding_VD[[3, 1, 4, 2]])
    found_RD = scaled.transpose(1, 2).flatten(0, 1)[:D].T.double() * rms_R.double()[:, None]
    wide_RD = embedding_VD[[3, 1, 4, 2]].double()
    exact_RD = wide_RD * torch.rsqrt(wide_RD.square().mean(-1, keepdim=True) + eps) * norm_D.double()
    # one rounding to eight bits, which the interpreter makes towards zero, and float32 sums of squares
    torch.testing.assert_close(found_RD, exact_RD, rtol=2**-7 * 1.001, atol=0)


def test_a_projection_adds_to_what_is_there(launch: Launcher) -> None:
    """Rows in either layout, a last tile that is cut, columns past it left alone, and what the next norm needs."""
    generator = torch.Generator().manual_seed(0)
    D, K = 21, 40
    x_RK, w_DK = torch.randn(R, K, generator=generator), torch.randn(D, K, generator=generator)
    bias_D, hidden_DR = torch.randn(D, generator=generator), torch.randn(D + 11, R, generator=generator)
    norm_D = torch.randn(D, generator=generator)
    for x, x_step, x_row_step in ((x_RK, 16, K), (blocks(x_RK.T), R * 16, 16)):
        found_DR = hidden_DR.clone()
        tap, scaled, squares = torch.zeros(2, R, 16), torch.zeros(2, R, 16), torch.zeros(2, R)
        pointers = (ROWS, x, w_DK, bias_D, found_DR, norm_D, scaled, squares, tap)
        launch.phase(
            pointers, op="o_proj", axes=(2,), x_step=x_step, x_row_step=x_row_step, K=K, D=D, R=R, T=16, CHUNK=32,
            HAS_BIAS=True, HAS_TAP=True, FP8_ROWS=0,
        )  # fmt: skip
        tap_DR = tap.transpose(1, 2).flatten(0, 1)[:D]
        expected_DR = hidden_DR[:D] + w_DK @ x_RK.T + bias_D[:, None]
        # sums of 40 in another order
        torch.testing.assert_close(found_DR[:D], expected_DR, rtol=1e-5, atol=1e-5)
        assert torch.equal(found_DR[D:], hidden_DR[D:]) and torch.equal(tap_DR, found_DR[:D])
        scaled_DR = scaled.transpose(1, 2).flatten(0, 1)
        assert torch.equal(scaled_DR[:D], tap_DR * norm_D[:, None]) and (scaled_DR[D:] == 0).all()
        # sums of 16 in another order
        torch.testing.assert_close(squares, squares_of(tap_DR), rtol=1e-6, atol=0)


def test_rows_that_a_step_does_not_have_are_not_read(launch: Launcher) -> None:
    """They are zeros in a product, whatever lies in their place."""
    D = K = 16
    rows, x_RK = row_records(Rows([1], [0], [0]), R), torch.full((R, K), float("nan"))
    x_RK[0] = 1.0
    hidden_DR, squares = torch.zeros(D, R), torch.full((1, R), -1.0)
    pointers = (rows, x_RK, torch.eye(D), x_RK, hidden_DR, torch.ones(D), torch.zeros(1, R, 16), squares, x_RK)
    launch.phase(
        pointers, op="o_proj", axes=(1,), x_step=16, x_row_step=K, K=K, D=D, R=R, T=16, CHUNK=32, HAS_BIAS=False,
        HAS_TAP=False, FP8_ROWS=0,
    )  # fmt: skip
    assert squares.tolist() == [[16.0, 0.0, 0.0, 0.0]] and (hidden_DR[:, 0] == 1).all()


@pytest.mark.parametrize("tile_rows", [1, 16, 128])
def test_products_of_fp8_are_those_of_its_values(tile_rows: int, launch: Launcher) -> None:
    """Bit for bit, at sizes that fill no tile, no chunk and no scale's columns, in three stretches of all slices."""
    generator = torch.Generator().manual_seed(0)
    D, K, T = 150, 1100, 64
    codes_DK = (torch.randn(D, K, generator=generator) * 100).to(torch.float8_e4m3fn)
    scales_PQ = torch.rand(-(-D // tile_rows), -(-K // 128), generator=generator)
    weight = FP8Tensor(codes_DK, scales_PQ, tile_rows)
    plain_DK, x_RK = weight.dequantize(torch.bfloat16).float(), torch.randn(R, K, generator=generator)
    found = []
    for matrix, fp8_rows, scales in ((codes_DK, tile_rows, (scales_PQ,)), (plain_DK, 0, ())):
        hidden_DR = torch.zeros(D, R)
        for_norm = (torch.ones(D), torch.zeros(-(-D // 16), R, 16), torch.zeros(-(-D // 16), R))
        pointers = (ROWS, x_RK, matrix, x_RK, hidden_DR, *for_norm, x_RK, *scales)
        launch.phase(
            pointers, op="dense_down", axes=(3,), x_step=16, x_row_step=K, K=K, D=D, R=R, T=T, CHUNK=64,
            HAS_BIAS=False, HAS_TAP=False, FP8_ROWS=fp8_rows,
        )  # fmt: skip
        found.append(hidden_DR)
    assert torch.equal(found[0], found[1])
    # sums of 1100 in another order
    torch.testing.assert_close(found[0], plain_DK @ x_RK.T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("tiles_at_a_time", [1, 2, 4, 8])
def test_proposals_are_the_largest_logits_of_all_tiles(tiles_at_a_time: int, launch: Launcher) -> None:
    """Ties go to the lower token, and a row that has what is no number ends its block's proposals."""
    T, V, inf = 5, 3, float("inf")  # tiles, and tokens of a tile
    logits_RTV = torch.full((R, T, V), -2.0)
    logits_RTV[0, 3, 2] = 1.0  # an anchor's, which proposes nothing
    logits_RTV[1, 1, 2] = logits_RTV[1, 4, 0] = -1.0
    logits_RTV[2] = -inf
    logits_RTV[3, 4, 1] = 7.0
    for broken, expected in ((0, [3, 5, 0, 13]), (2, [1, 5, 9, 9]), (1, [0, 9, 9, 9])):
        if broken:
            logits_RTV[broken, 2, 1] = float("nan")
        known_RTV = logits_RTV.nan_to_num(-inf, inf, -inf)
        value_RT, index_RT = known_RTV.max(dim=-1)
        index_RT += torch.arange(T) * V
        index_RT[logits_RTV.isnan().any(dim=-1)] = -1
        best = torch.stack([value_RT.T.contiguous().view(torch.int32), index_RT.T.int()], dim=1).contiguous()
        blocks = row_records(Rows([1] * R, [0] * R, list(range(R))), R)
        proposals = torch.full((R, R), 9, dtype=torch.int32)
        launch.phase(
            (blocks, best, proposals), op="pick", axes=(R,), TILES=T, R=R, TILES_AT_A_TIME=tiles_at_a_time, FIRST_SLOT=1
        )
        assert proposals[0].tolist() == expected
        assert proposals[1:, 0].tolist() == [0] * (R - 1), "sequences without a block"


def test_records_have_the_fields_that_kernels_read() -> None:
    from speedstack.runtime.backends.gpu.kernels import rows

    records = row_records(Rows([8, 9, 5], [2, 2, 0], [30, 31, 7]), R)
    assert records.shape == (R, RECORD) and rows.RECORD.value == RECORD
    fields = {name: getattr(rows, name).value for name in (
        "TOKEN", "SLOT", "POSITION", "FIRST_POSITION", "FIRST_ROW", "NUM_ROWS",
    )}  # fmt: skip
    found = {name: records[:, index].tolist() for name, index in fields.items()}
    assert found["TOKEN"] == [8, 9, 5, -1] and found["SLOT"][:3] == [2, 2, 0]
    assert found["POSITION"][:3] == [30, 31, 7] and found["FIRST_POSITION"][:3] == [30, 30, 7]
    assert found["FIRST_ROW"][:2] == [0, 2] and found["NUM_ROWS"] == [2, 1, 0, 0]
