"""Instructions a byte of weights, out of listings as `nvdisasm -c` prints them."""

import pytest

from speedstack.eval.microbench.sass import (
    SCHEDULERS,
    Product,
    innermost,
    issues,
    listing_of,
    loops,
    product_of,
)
from speedstack.runtime.perf.gpus import gpu_named

MMA = "HMMA.16816.F32.BF16 R12, R12, R44, R8"


def listing_text(*lines: str) -> str:
    """Labels end with a colon; all else is an instruction."""
    text = [
        f"{line}" if line.endswith(":") else f"        /*{16 * n:04x}*/      {line} ;" for n, line in enumerate(lines)
    ]
    return "\n".join(text)


NESTED = listing_text(
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "IADD3 R1, R1, 0x1, RZ",
    ".L_x_1:",
    "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64]",
    "@!P2 LDG.E.U16 R3, desc[UR4][R4.64]",
    MMA,
    "@!P1 BRA `(.L_x_3)",
    ".L_x_2:",
    "LOP3.LUT R5, R5, 0xf000f, RZ, 0xc0, !PT",
    "@P0 BRA `(.L_x_1)",
    "@P3 BRA `(.L_x_0)",
    "EXIT",
    # A part of the inner loop that lies behind the end.
    ".L_x_3:",
    "HMUL2.BF16_V2 R6, R6, R7",
    "BRA `(.L_x_2)",
    ".L_x_4:",
    "BRA `(.L_x_4)",
)


def test_loops_are_what_comes_back_to_its_start() -> None:
    listing = listing_of(NESTED)
    names = [[listing.instructions[index].name for index in sorted(body)] for body in loops(listing)]
    inner = ["LDGSTS", "LDG", "HMMA", "BRA", "LOP3", "BRA", "HMUL2", "BRA"]
    assert inner in names and len(names) == 2, "nobody reaches the jump to itself at the end"
    assert max(names, key=len) == ["IADD3", *inner[:6], "BRA", "HMUL2", "BRA"]
    ((is_loop, code),) = innermost(listing)
    assert is_loop and [one.name for one in code] == inner


def test_a_branch_is_conditional_whichever_way_it_is_written() -> None:
    for conditional in ("@P0 BRA `(.L_x_0)", "@!UP0 BRA `(.L_x_0)", "BRA.U !UP0, `(.L_x_0)", "BRA P0, `(.L_x_0)"):
        listing = listing_of(listing_text(".L_x_0:", "NOP", conditional, ".L_x_1:", MMA, "@P1 BRA `(.L_x_1)", "EXIT"))
        assert len(loops(listing)) == 2, conditional
    listing = listing_of(listing_text(".L_x_0:", "NOP", "BRA `(.L_x_0)", ".L_x_1:", MMA, "@P1 BRA `(.L_x_1)", "EXIT"))
    assert len(loops(listing)) == 1, "what lies behind cannot be reached"


def test_a_barrier_may_be_used_twice() -> None:
    """Threads that meet at the first go on behind it, not into the loop where the second is."""
    listing = listing_of(
        listing_text(
            "BSSY B0, `(.L_x_0)", "@P0 BRA `(.L_x_1)", "NOP", ".L_x_1:", "BSYNC B0", ".L_x_0:", "NOP",
            ".L_x_5:", "BSSY B0, `(.L_x_3)", "@P6 BRA `(.L_x_4)", MMA, ".L_x_4:", "BSYNC B0", ".L_x_3:",
            "@P2 BRA `(.L_x_5)", "EXIT",
        )
    )  # fmt: skip
    ((is_loop, code),) = innermost(listing)
    assert is_loop and [one.name for one in code] == ["BSSY", "BRA", "HMMA", "BSYNC", "BRA"]
    # A part of the loop that lies behind the end comes back to where the last of that barrier says.
    listing = listing_of(
        listing_text(
            "BSSY B0, `(.L_x_0)", ".L_x_0:", "NOP", ".L_x_5:", "BSSY B0, `(.L_x_3)", "@P6 BRA `(.L_x_4)", MMA,
            ".L_x_3:", "@P2 BRA `(.L_x_5)", "EXIT", ".L_x_4:", "LDS R0, [R1]", "BSYNC B0",
        )
    )  # fmt: skip
    ((is_loop, code),) = innermost(listing)
    assert is_loop and [one.name for one in code] == ["BSSY", "BRA", "HMMA", "BRA", "LDS", "BSYNC"]


def test_weights_are_counted_by_the_instructions_that_multiply_them() -> None:
    """16 x 16 weights and eight rows each; copies are no weights."""
    listing = listing_of(NESTED)
    for warps, weights in (((4, 1, 1), 4 * 256 / 2), ((1, 4, 1), 256 / 2), ((1, 2, 2), 256.0 * 2 * 2 / 2 / 2)):
        (found,) = issues(listing, Product(slices=4, rows=16, columns=16, warps=warps), 4)
        assert (found.weight_bytes, found.num_warps, found.is_loop) == (weights / 2, 4, True), warps
        assert found.load_bytes == 32 * 4 * 18 and found.async_bytes == 32 * 4 * 16
        assert found.warp_instructions_per_byte == 8 * 4 / (weights / 2)
    assert found.counts == {"global": 2, "other": 3, "tensor": 1, "integer": 1, "float": 1}


def test_what_several_warps_do_and_what_lies_behind_the_end_is_counted_once_and_not_at_all() -> None:
    """Eight warps for three slices' worth of four; of an axis that fills 3/4 of the stretches."""
    (whole,) = issues(listing_of(NESTED), Product(8, 16, 8, (8, 1, 1)), 4)
    (found,) = issues(listing_of(NESTED), Product(4, 16, 8, (8, 1, 1)), 4, share=0.75)
    assert (whole.weight_bytes, found.weight_bytes) == (8 * 256 / 2, 4 * 256 / 2 * 0.75)
    assert found.counts == whole.counts and found.load_bytes == whole.load_bytes


def test_the_bound_is_what_schedulers_begin_or_integer_lanes_compute() -> None:
    gpu, product = gpu_named("H200"), Product(1, 16, 8, (1, 1, 1))
    per_second = gpu.num_sms * 1e9 / gpu.bandwidth  # cycles of a multiprocessor a byte at full bandwidth
    for work, cycles in (("FFMA R0, R0, R0, R0", 12 / SCHEDULERS), ("LOP3.LUT R0, R0, R0, RZ", 10 / 2)):
        text = listing_text(".L_x_0:", *[work] * 10, MMA, "@P0 BRA `(.L_x_0)", "EXIT")
        (found,) = issues(listing_of(text), product, 8)
        assert found.weight_bytes == 256
        assert found.bandwidth_fraction(gpu, 1e9) == pytest.approx(per_second / (cycles / 256))


def test_a_kernel_that_is_unrolled_is_counted_as_a_whole() -> None:
    text = listing_text("S2R R0, SR_TID.X", *[MMA] * 4, "EXIT", ".L_x_0:", "BRA `(.L_x_0)", "NOP")
    (found,) = issues(listing_of(text), Product(1, 32, 16, (1, 1, 1)), 16)
    assert not found.is_loop and sum(found.counts.values()) == 6 and found.weight_bytes == 4 * 256 / 2 * 2
    assert not list(issues(listing_of(listing_text("NOP", "EXIT")), Product(1, 32, 16, (1, 1, 1)), 16))


def test_products_of_warp_groups() -> None:
    """A warp of four has 16 of the 64 rows, and all columns."""
    text = listing_text("HGMMA.64x16x16.F32.BF16 R32, gdesc[UR12].tnspB, R32", "EXIT")
    (found,) = issues(listing_of(text), Product(1, 128, 16, (1, 8, 1)), 16)
    assert found.weight_bytes == 8 * 256 * 2


def test_layouts_are_read_off_the_intermediate_code() -> None:
    layouts = [
        "#mma = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [8, 1, 1], instrShape = [1, 16, 8]}>",
        "#mma1 = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [2, 4], instrShape = [16, 8]}>",
    ]
    dot = "%1 = tt.dot %a, %b, %c : tensor<8x32x64xbf16, #a> * tensor<8x64x16xbf16, #b> -> tensor<8x32x16xf32, #mma>"
    other = "%2 = tt.dot %a, %b, %c : tensor<16x64xbf16, #a> * tensor<64x16xbf16, #b> -> tensor<16x16xf32, #mma1>"
    assert product_of("\n".join([*layouts, dot, dot])) == Product(8, 32, 16, (8, 1, 1))
    assert product_of("\n".join([*layouts, other])) == Product(1, 16, 16, (1, 2, 4))
    for text, number in (("", 0), (f"{dot}\n{other}", 2)):
        with pytest.raises(ValueError, match=f"{number} kinds of products"):
            product_of("\n".join([*layouts, text]))
