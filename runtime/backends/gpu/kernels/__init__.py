"""Device functions of a decode step in Triton: one item of one phase each, for both GPU backends.

    rows         the records of a step's rows and of its sequences
    products     norms, and matrix products of weights (plain, or FP8 decoded in registers) with all rows
    mxfp4        products of MXFP4 weights
    embed        a row's embedding
    projections  qkv, the projections that are added to the hidden state, dense gate and up
    attention    QK-norm, rotary, append, attention of one split; combining splits
    router       router logits, and which experts rows chose
    experts      gate, up and activation of an expert's columns; down and the weighted sum
    head         final norm, LM head, the largest logits or scores
    noise        Gumbel noise
    logit_histogram        of rows with top-k or top-p: how much lies in which bin of logits
    cut, sample  from which logit on they keep tokens; the token after a row
    accept       which drafts stand, and what is committed
    draft        prompt lookup in a sequence's text
    row_allocation which rows of a step a sequence has, by what is proposed for all of them
    drafter      a DFlash drafter's blocks, proposals, and the context that a step's rows add
    items        any item of any phase, by the phase's constants
    phase        a phase as one kernel, an item a program, for the `graph` backend
    resident     a whole step as one kernel, for the `resident` backend
    counters     how its programs wait for each other, and what must not go wrong there
    first_values what Triton 3.6 leaves unset in compiled kernels
    ahead        compiling kernels without their GPU
    prefetch     how they ask for weights ahead of time
    resources    what a compiled kernel takes of a multiprocessor
    issue        how many instructions it spends on a byte of weights

Rules that make a row's bits its own. Every product takes all R rows of a step, idle ones as zeros that are not read, so
that tile shapes never depend on their number; a broken row stays in its column. Contraction axes are cut into slices
by their size alone, which are walked in chunks side by side and whose sums are added at the end; keys are walked in
absolute chunks and splits in absolute groups, always ascending; what a row does not see adds exact zeros. Nothing but
integers is added atomically.

Arithmetic is float32; activations, weights and caches are bfloat16 on a GPU. Triton's interpreter, which tests these
functions without a GPU, multiplies bfloat16 matrices wrongly (3.6.0), so that it is given float32 throughout.

Legend for all files: R rows, D hidden, T columns of an item, B elements of a chunk of a contraction axis, N heads,
G key/value heads, M heads of a group, I (row, head) pairs of a query tile, H query/key head size, V value head size or
vocabulary, C key chunk, S splits combined at a time, E experts, K choices of a row (a weight's contraction axis where
there are no experts). In tiles, sizes are rounded up to powers of two.
Buffers are laid out as `speedstack.runtime.plan.ops.layers` cuts them into cells, one cell after another:

    hidden [D, R]   scaled [D / 16, R, 16]   squares [D / 16, R]   qkv [G, columns, R]   router [E, R]
    partial [R, N, splits, V + 2]   attended [R, N, V]
    act, dense [columns / 16, R, 16]   act, experts [R, K, columns]   logits [V, R]   cache [G, slots, positions, H + V]
    features [taps, D / 16, R, 16]   context [D / 16, R, 16]   context.kv [L * G, columns, R], L layers of a drafter
"""
