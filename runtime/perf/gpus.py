"""GPUs by name, with the figures that a roofline needs. Dense rates, not the doubled ones of structured sparsity.

Sources: NVIDIA's data sheets H100 (2023), H200 (2024), HGX B200 (2025), H20, A100 (2021), L40S, and the whitepapers of
the Ada (RTX 4090) and Blackwell (RTX 5090) consumer architectures; there, bf16 products with float32 accumulation.
"""

from dataclasses import dataclass

from speedstack.support.near_miss import did_you_mean


@dataclass(frozen=True)
class Gpu:
    """bandwidth: memory bytes/s. bf16_flops: tensor-core FLOP/s, multiplications and additions counted."""

    name: str
    num_sms: int
    bandwidth: float
    bf16_flops: float
    memory_bytes: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 132, 3.35e12, 989.4e12, 80e9),  # SXM5, HBM3
        Gpu("H200", 132, 4.8e12, 989.4e12, 141e9),  # SXM, HBM3e
        Gpu("H20", 78, 4.0e12, 148e12, 96e9),
        Gpu("B200", 148, 8.0e12, 2250e12, 180e9),  # HGX: 1.44 TB and 36 PFLOPS of sparse bf16 among eight
        Gpu("A100", 108, 2.039e12, 312e12, 80e9),  # SXM, 80 GB
        Gpu("L40S", 142, 0.864e12, 362e12, 48e9),
        Gpu("RTX4090", 128, 1.008e12, 165.2e12, 24e9),
        Gpu("RTX5090", 170, 1.792e12, 209.5e12, 32e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """Ignores case and blanks. Raises ValueError, with the nearest known name, for an unknown GPU."""
    plain = name.upper().replace(" ", "").replace("-", "")
    if plain in GPUS:
        return GPUS[plain]
    raise ValueError(f"unknown GPU '{name}'{did_you_mean(plain, GPUS, 0.3) or '.'} Known: {', '.join(GPUS)}")
