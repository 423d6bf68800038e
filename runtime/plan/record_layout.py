"""The int32 fields of the records that describe a step's rows to the host, the semantics and the kernels.

Kernels take these as compile-time constants; this file does not import Triton.

Row: TOKEN, -1 if idle; SLOT; POSITION; FIRST_POSITION, where its sequence starts in this step. The record at a
sequence's index also has FIRST_ROW and NUM_ROWS, 0 if there is none.

Sampling state: SEED and SEQUENCE, two words each; TEMPERATURE, float32 bits; TOP_K; TOP_P in units of 2**-24. Zero
top-k or top-p keeps every token.

Sequence decoded without the host (others are zero): CAPACITY, rows per round for anchor and drafts; ANCHOR, its newest
token; OWN_SLOT; LENGTH and END, tokens committed and allowed, equal when it is finished; NGRAM, longest prompt-lookup
run; WATCHES_EOS, whether an end-of-sequence token ends it.

Active expert: for each row, which choice it is, or -1; for each row, the weight's float32 bits; EXPERT; NUM_ACTIVE.

Proposals, as many words as rows: NUM_PROPOSED, then tokens from FIRST_PROPOSED.
"""

RECORD = 8  # fields of each but the last

TOKEN, SLOT, POSITION, FIRST_POSITION, FIRST_ROW, NUM_ROWS = range(6)
SEED, SEQUENCE, TEMPERATURE, TOP_K, TOP_P = 0, 2, 4, 5, 6
CAPACITY, ANCHOR, OWN_SLOT, LENGTH, END, NGRAM, WATCHES_EOS = range(7)
NUM_PROPOSED, FIRST_PROPOSED = range(2)
EXPERT, NUM_ACTIVE = range(2)  # behind the rows' words
OUTCOME = 3  # words a sequence in a report: rows in the step, drafts that stand, proposals made


def route_words(num_rows: int) -> int:
    """Words in an active expert's record, rounded up to 16 bytes."""
    return 2 * num_rows + 4
