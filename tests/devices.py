"""Where kernels written in Triton run in tests: interpreted on a CPU, or compiled on a CUDA device.

The cases are the same, so that `pytest -m gpu` holds on a GPU what is held here. Triton decides when it is imported
whether it interprets: those on a CPU are skipped unless the process was started with TRITON_INTERPRET=1, as `make
test-all` starts one.
"""

import os

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETS, reason="about a process that does not interpret")

DEVICES = (
    pytest.param("cpu", marks=pytest.mark.interpret, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="cuda"),
)
