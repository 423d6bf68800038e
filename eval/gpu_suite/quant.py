"""Our MXFP4 kernels at the shape of a layer's experts, as `speedstack.eval.microbench.quant` times them."""

import random
from typing import Any

import torch

from speedstack.eval.gpu_suite.scale import Scale
from speedstack.eval.microbench.quant_race import ours, reference, time_libraries
from speedstack.eval.results.spread import spread_fields
from speedstack.quant.kernels import kernels_for
from speedstack.quant.mxfp4 import BLOCK_SIZE, DEFAULT_SCALE_RULE
from speedstack.runtime.model.device import DTYPES

NUM_REPEATS = 5


class QuantKernels:
    """Made in a worker."""

    def __init__(self, scale: Scale) -> None:
        self.scale, self.device = scale, torch.device(scale.device)

    def measure(self, seed: int) -> list[dict[str, Any]]:
        """Seconds, bytes/s and fraction of a copy, one row per operation and contestant.

        Raises RuntimeError without kernels, because rows would time something else.
        """
        if kernels_for(torch.ones(1, BLOCK_SIZE, device=self.device)) is None:
            raise RuntimeError(f"there are no MXFP4 kernels for {self.device} here")
        generator = torch.Generator(self.device).manual_seed(seed)
        w = torch.empty(self.scale.quant_shape, dtype=DTYPES[self.scale.dtype], device=self.device)
        w.normal_(0, 0.02, generator=generator)
        libraries = [ours(DEFAULT_SCALE_RULE), reference(DEFAULT_SCALE_RULE)]
        samples = time_libraries(w, libraries, NUM_REPEATS, len(w), random.Random(seed), self.scale.dtype)
        rates = {(each.operation, each.contestant): spread_fields(each.seconds) for each in samples}
        (copy,) = (each for each in samples if each.operation == "copy")
        copy_rate = copy.num_bytes / rates["copy", copy.contestant]["median"]
        return [
            {
                "operation": each.operation,
                "contestant": each.contestant,
                "seconds": rates[each.operation, each.contestant],
                "num_bytes": each.num_bytes,
                "fraction_of_copy": each.num_bytes / rates[each.operation, each.contestant]["median"] / copy_rate,
            }
            for each in samples
        ]
