"""How many positions a layer's key/value buffer holds: a ring over absolute positions, longer than what a row sees."""

# Rows of one sequence that a step may hold: rings of sliding-window layers have this much slack, so that a chunk of a
# prompt, or drafts that are later rejected, never overwrite what an earlier row of the same step still attends to.
MAX_ROWS = 64
POSITIONS_PER_BLOCK = 16


def ring_length(window: int | None, max_length: int) -> int:
    """Positions that a layer's buffer holds: whole blocks, `max_length` or enough for the window and one step."""
    length = max_length if window is None else min(max_length, window + MAX_ROWS)
    return -(-length // POSITIONS_PER_BLOCK) * POSITIONS_PER_BLOCK
