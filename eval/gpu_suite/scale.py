"""Sizes of everything in the suite: on a GPU, and on a CPU, where it only shows that the suite works."""

from dataclasses import dataclass

CONTESTANTS = ("resident", "graph", "transformers")
PEER = "transformers"
# Shares of the time for speed, in timing order: models that fit a GPU whole come first.
MODEL_SHARES = {"qwen3-30b-a3b": 0.4, "gpt-oss-20b": 0.32, "mimo-v2-flash": 0.28}
ROOM = 160  # positions after the context: what a cell's steps and generated tokens take


@dataclass(frozen=True)
class Cell:
    """One speed measurement: a step of `rows` rows of one sequence (a verified block) after a context."""

    rows: int
    context: int


@dataclass(frozen=True)
class Scale:
    """num_steps: of a timed sample, after `warm_steps`. check_rows, check_context: of correctness.

    num_generated: tokens of a checked text; num_lookup_tokens: with lookup, enough for repetition; num_with_drafter:
    with a drafter. peer_layers: each model's two depths for extrapolation. flush_bytes: written between phase timings
    to clear the L2 cache.
    """

    device: str
    is_tiny: bool
    copy_bytes: int
    cells: tuple[Cell, ...]
    num_repeats: int
    num_steps: int
    warm_steps: int
    check_rows: int
    check_context: int
    num_generated: int
    num_lookup_tokens: int
    num_with_drafter: int
    peer_layers: dict[str, tuple[int, int]]
    compiles_peer: bool
    flush_bytes: int
    quant_shape: tuple[int, int, int]

    @property
    def dtype(self) -> str:
        return "float32" if self.device == "cpu" else "bfloat16"

    @property
    def check_length(self) -> int:
        """Positions of a sequence's buffers in checks."""
        return self.check_context + 32

    def cell_length(self, context: int) -> int:
        """Positions of a sequence's buffers in a cell with this context."""
        return context + (16 if self.is_tiny else ROOM)


def scale_for(device: str) -> Scale:
    """Released shapes on a GPU, tiny ones on a CPU."""
    if device == "cpu":
        return Scale(
            device=device,
            is_tiny=True,
            copy_bytes=1 << 20,
            cells=(Cell(2, 14),),
            num_repeats=2,
            num_steps=1,
            warm_steps=0,
            check_rows=3,
            check_context=6,
            num_generated=2,
            num_lookup_tokens=12,
            num_with_drafter=4,
            peer_layers=dict.fromkeys(("gpt-oss-20b", "mimo-v2-flash", "qwen3-30b-a3b"), (1, 2)),
            compiles_peer=False,
            flush_bytes=1 << 10,
            quant_shape=(2, 64, 64),
        )
    return Scale(
        device=device,
        is_tiny=False,
        copy_bytes=4 << 30,
        # In order of importance, in case time runs out.
        cells=(Cell(1, 1024), Cell(8, 1024), Cell(1, 16384), Cell(8, 16384)),
        num_repeats=7,
        num_steps=32,
        warm_steps=2,
        check_rows=8,
        check_context=530,
        num_generated=24,
        num_lookup_tokens=64,
        num_with_drafter=64,
        # The layers between the depths are typical: gpt-oss alternates its kinds, and most of MiMo's after its dense
        # first are sliding. MiMo's expert layers are 13 GB each in bfloat16.
        peer_layers={"gpt-oss-20b": (2, 4), "mimo-v2-flash": (1, 3), "qwen3-30b-a3b": (1, 3)},
        compiles_peer=True,
        flush_bytes=256 << 20,
        quant_shape=(128, 1536, 2048),
    )
