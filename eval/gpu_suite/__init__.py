"""Everything that has to be measured on a GPU, in one command of a few minutes: `python -m speedstack.eval.gpu_suite`.

Correctness of the GPU backends against the reference, row invariance to the bit, speed at the shapes of released models
against a compiled transformers, time by phase, and the MXFP4 kernels; a table of targets at the end. Whatever touches
the GPU runs in worker processes with deadlines, so that a kernel that hangs or breaks its context costs its own numbers
and no others. Results are plain JSON, saved after every step: no schema package is needed where they are measured.
"""
