"""The int32 fields of the records by which the host, the plan's semantics and the kernels know a step's rows.

One definition for all three: kernels take these numbers as compile-time constants, and need Triton to be imported.

Of a row: TOKEN, -1 for an idle one; SLOT, POSITION; FIRST_POSITION, where its sequence begins in this step. In the
record whose index is a sequence's, as they are numbered in order: FIRST_ROW and NUM_ROWS, 0 where there is none.

Of a row's sampling state, and of the draws of a sequence: SEED and SEQUENCE, two words each; TEMPERATURE, the bits of
a float32; TOP_K and TOP_P, 0 where they keep every token, TOP_P in units of 2**-24.

Of a sequence that is decoded without the host, zeros for all others: CAPACITY, the rows that it may have in a round,
the anchor's and one for each draft; ANCHOR, its newest token; OWN_SLOT; LENGTH and END, tokens that are committed and
how many may be, it is over when they are equal; NGRAM, the longest run that a prompt lookup looks for; WATCHES_EOS,
whether an end-of-sequence token ends it.

Of an active expert, in a MoE layer's routes: for each row which of its choices the expert is, -1 where it is none; for
each row the choice's weight, the bits of a float32; then EXPERT, and NUM_ACTIVE, how many active experts there are.

Of a sequence's proposals, as many words as a step has rows: NUM_PROPOSED, and from FIRST_PROPOSED on the tokens.
"""

RECORD = 8  # fields of each but the last

TOKEN, SLOT, POSITION, FIRST_POSITION, FIRST_ROW, NUM_ROWS = range(6)
SEED, SEQUENCE, TEMPERATURE, TOP_K, TOP_P = 0, 2, 4, 5, 6
CAPACITY, ANCHOR, OWN_SLOT, LENGTH, END, NGRAM, WATCHES_EOS = range(7)
NUM_PROPOSED, FIRST_PROPOSED = range(2)
EXPERT, NUM_ACTIVE = range(2)  # behind the rows' words
OUTCOME = 3  # words a sequence in a report: rows in the step, drafts that stand, proposals made


def route_words(num_rows: int) -> int:
    """Of an active expert's record, whole sixteens of bytes."""
    return 2 * num_rows + 4
