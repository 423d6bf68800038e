"""The int32 fields of the records by which the host, the plan's bodies and the kernels know a step's rows.

One definition for all three: kernels take these numbers as compile-time constants, and need Triton to be imported.

Of a row: TOKEN, -1 for an idle one; SLOT, POSITION; FIRST_POSITION, where its sequence begins in this step. In the
record whose index is a sequence's, as they are numbered in order: FIRST_ROW and NUM_ROWS, 0 where there is none.

Of a row's sampling state: SEED and SEQUENCE, two words each; TEMPERATURE, the bits of a float32.

Of a sequence that is decoded without the host, zeros for all others: CAPACITY, the rows that it owns from OWN_ROW on,
in use or not, the anchor's and one for each draft of a round at most; OWN_SLOT; LENGTH and END, tokens that are
committed and how many may be, it is over when they are equal; NGRAM, the longest run that a look-up looks for;
WATCHES_EOS, whether an end-of-sequence token ends it.
"""

RECORD = 8  # fields of each of the three

TOKEN, SLOT, POSITION, FIRST_POSITION, FIRST_ROW, NUM_ROWS = range(6)
SEED, SEQUENCE, TEMPERATURE = 0, 2, 4
CAPACITY, OWN_ROW, OWN_SLOT, LENGTH, END, NGRAM, WATCHES_EOS = range(7)
