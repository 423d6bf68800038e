"""Triton device functions of a decode step, one item of one phase each, for both GPU backends.

`layers/` has the model's layers and the drafter's, `rounds/` sampling, acceptance and row allocation. `dispatch.py`
runs any item of any phase, `single_op.py` a phase as one kernel (`graph`), `resident.py` a whole step as one kernel
(`resident`), which `sync.py` and `prefetch.py` serve. `aot_compile.py` compiles without a GPU; `ptxas_workaround.py`
works around Triton 3.6.

Rules for row invariance. Every product takes all R rows of a step, idle ones as zeros that are not read, so tile shapes
never depend on their number; a broken row stays in its column. Contraction axes are cut into slices by their size
alone, and the slices' sums are added at the end. Keys go in absolute chunks and splits in absolute groups, ascending;
invisible keys add exact zeros. Only integers are added atomically.

Arithmetic is float32; activations, weights and caches are bfloat16 on a GPU. Triton's interpreter (3.6.0) multiplies
bfloat16 matrices wrongly, so tests use float32 throughout.

Legend for all files: R rows, D hidden, T columns of an item, B elements of a chunk of a contraction axis, N heads, G
key/value heads, M heads of a group, I (row, head) pairs of a query tile, H query/key head size, V value head size or
vocabulary, C key chunk, S splits combined at a time, E experts, K choices of a row (a weight's contraction axis where
there are no experts). In tiles, sizes are rounded up to powers of two. Buffers are laid out as
`speedstack.runtime.plan.ops.layers` cuts them into cells, one cell after another:

    hidden [D, R]   scaled [D / 16, R, 16]   squares [D / 16, R]   qkv [G, columns, R]   router [E, R]
    partial [R, N, splits, V + 2]   attended [R, N, V]
    act, dense [columns / 16, R, 16]   act, experts [R, K, columns]   logits [V, R]   cache [G, slots, positions, H + V]
    features [taps, D / 16, R, 16]   context [D / 16, R, 16]   context.kv [L * G, columns, R], L layers of a drafter
"""
