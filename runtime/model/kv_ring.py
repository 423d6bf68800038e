"""Length of a layer's key/value buffer: a ring over absolute positions, longer than the attention window."""

# Most rows of one sequence in a step. Sliding-window rings have this much slack, so that a prompt chunk or rejected
# drafts never overwrite keys that an earlier row of the step still attends to.
MAX_ROWS = 64
POSITIONS_PER_BLOCK = 16


def ring_length(window: int | None, max_length: int) -> int:
    """Positions in a layer's buffer, in whole blocks: `max_length`, or enough for the window and one step."""
    length = max_length if window is None else min(max_length, window + MAX_ROWS)
    return -(-length // POSITIONS_PER_BLOCK) * POSITIONS_PER_BLOCK
