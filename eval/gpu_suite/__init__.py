"""All measurements that need a GPU, in one command of a few minutes: `python -m speedstack.eval.gpu_suite`.

Correctness against the reference, bitwise row invariance, speed at the shapes of released models against a compiled
transformers, time by phase, the MXFP4 kernels, and a table of targets. GPU work runs in worker processes with
deadlines, so a kernel that hangs or breaks its context loses only its own numbers. Results are plain JSON, saved after
every step, and need no schema package.
"""
