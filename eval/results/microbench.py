"""Results of the benchmarks in `speedstack.eval.microbench`."""

from typing import Any, Literal

from speedstack.eval.results.schema import Document, Environment, Record, Spread, Unavailable
from speedstack.eval.results.speed import AcceptanceSet


class ConversionCost(Record):
    """One conversion of a checkpoint in its own process.

    `peak_bytes` is resident memory above the baseline; `max_shard_bytes` bounds the safetensors files written.
    """

    name: str
    description: str
    source_bytes: int
    num_source_shards: int
    max_shard_bytes: int
    seconds: float
    peak_bytes: int

    @property
    def peak_shards(self) -> float | None:
        """Peak memory in shards; None for unbounded shards."""
        return self.peak_bytes / self.max_shard_bytes if self.max_shard_bytes else None


class ConversionResult(Document):
    """Conversions, a peer's included."""

    kind: Literal["conversion"] = "conversion"
    conversions: tuple[ConversionCost, ...]
    environment: Environment


class Shape(Record):
    """Sizes of a drafter and of its batch."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_taps: int
    vocab_size: int
    num_windows: int = 8
    length: int = 256
    num_anchors: int = 32
    block_size: int = 8


class StepTimes(Record):
    """One contestant's optimizer steps; `cpu` is processor time of all threads."""

    contestant: str
    step_ms: tuple[float, ...]
    step_cpu_ms: tuple[float, ...]
    median_ms: float
    median_cpu_ms: float
    num_blocks: int


class ShapeTimes(Record):
    """All contestants on one shape and loss; `speedup` is the peer's fastest median over ours.

    Prefer `cpu_speedup` on a machine that does other work.
    """

    shape: Shape
    loss: Literal["ce", "kl"]
    contestants: tuple[StepTimes, ...]
    speedup: float | None
    cpu_speedup: float | None


class LossMemory(Record):
    """Peak memory of head, loss and gradient above the baseline."""

    way: str
    num_positions: int
    hidden_size: int
    vocab_size: int
    logits_bytes: int
    peak_bytes: int


class DrafterCost(Document):
    """Cost of training a drafter, beside speculators if installed."""

    kind: Literal["drafter_cost"] = "drafter_cost"
    environment: Environment
    peer_version: str | None
    times: tuple[ShapeTimes, ...]
    memory: tuple[LossMemory, ...]
    unavailable: tuple[Unavailable, ...] = ()


class LayerMemory(Record):
    """Bytes autograd keeps per layer for the backward, in weights and others; and the process's memory above the
    baseline, after the last forward and at its peak.
    """

    way: Literal["packed", "plain"]
    kept_weight_bytes: int
    kept_other_bytes: int
    forward_bytes: int
    peak_bytes: int


class StepTime(Record):
    """Optimizer steps with and without fake-quant; `cpu` is processor time of all threads, ratios are of medians.

    Prefer `cpu_ratio` on a machine that does other work.
    """

    precision: Literal["float32", "bfloat16"]
    fake_quant_ms: tuple[float, ...]
    plain_ms: tuple[float, ...]
    fake_quant_cpu_ms: tuple[float, ...]
    plain_cpu_ms: tuple[float, ...]
    ratio: float
    cpu_ratio: float
    num_parameters: int
    num_expert_parameters: int
    num_tokens: int


class QatCost(Document):
    """Cost of fake-quantized experts in training."""

    kind: Literal["qat_cost"] = "qat_cost"
    environment: Environment
    layer_shape: dict[str, int]
    layers: tuple[LayerMemory, ...]
    steps: tuple[StepTime, ...]


class QuantTiming(Record):
    """One contestant at one operation: `seconds` for `num_experts` matrices, which are `num_bytes` of reads and writes.

    `times_ours` is the ratio of median times per expert; `relative_squared_error` is of the first matrix.
    """

    operation: Literal["quantize", "dequantize", "fake_quantize", "copy"]
    dtype: str
    contestant: str
    num_experts: int
    seconds: Spread
    num_bytes: int
    bytes_per_second: float
    fraction_of_copy: float
    times_ours: float | None
    relative_squared_error: float | None


class QuantBench(Document):
    kind: Literal["quant-bench"] = "quant-bench"
    environment: Environment
    device: str
    shape: tuple[int, ...]
    scale_rule: str
    peer_versions: dict[str, str]
    timings: tuple[QuantTiming, ...]
    unavailable: tuple[Unavailable, ...]


class LmTiming(Record):
    """One contestant on one task; `speedup` is over the adapter's median."""

    contestant: str
    seconds: Spread
    requests_per_second: float
    speedup: float


class LmAgreement(Record):
    """The engine's answers against the adapter's.

    `max_difference_nats` and `max_relative_difference` are of log-likelihoods; `engine_error_nats` and
    `adapter_error_nats` are from float64, and missing in older files. `num_equal` counts equal texts, or equal verdicts
    on greediness. `scores` are (engine, adapter) by metric.
    """

    num_equal: int
    max_difference_nats: float | None
    max_relative_difference: float | None
    engine_error_nats: float | None = None
    adapter_error_nats: float | None = None
    scores: dict[str, tuple[float, float]]


class LmTask(Record):
    task: str
    kind: Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
    num_requests: int
    experts_implementation: str
    agreement: LmAgreement
    timings: tuple[LmTiming, ...]


class LmBench(Document):
    """lm-eval through the engine beside lm-eval's Hugging Face adapter."""

    kind: Literal["lm_bench"] = "lm_bench"
    target: str
    drafter: str | None
    device: str
    dtype: str
    backend: str
    batch_size: int
    num_threads: int
    tasks: tuple[LmTask, ...]
    environment: Environment


# The contestant whose time an `LmTiming` is over.
LM_ADAPTER = "lm-eval HFLM"


class ServingRow(Record):
    """One way to speculate. `acceptance` is over all prompts.

    `decode_tokens_per_second` excludes the prompt; it is over `num_timed_prompts` prompts, None if nothing was timed.
    """

    name: str
    proposer: Literal["none", "drafter", "ngram"]
    strategy: dict[str, Any]
    backend: str
    temperature: float
    acceptance: AcceptanceSet
    sets: tuple[AcceptanceSet, ...]
    num_timed_prompts: int
    decode_tokens_per_second: Spread | None


class ServingBench(Document):
    """Ways to speculate with one target and drafter, one sequence at a time."""

    kind: Literal["serving"] = "serving"
    target: str
    drafter: str
    prompts: str
    num_prompts: int
    num_new_tokens: int
    num_repeats: int
    seed: int
    rows: tuple[ServingRow, ...]
    environment: Environment


class WeightLoop(Record):
    """One pass of the loop that multiplies weights (see `speedstack.eval.microbench.sass`).

    is_loop: false if the loop is unrolled, and the whole kernel is counted. instructions: per warp, by class.
    weight_bytes, load_bytes, async_bytes: per program; weights, all global loads, and asynchronous ones.
    bandwidth_fraction: bound by instruction issue, of an H200's bandwidth. It ignores latency, bank conflicts,
    activations from the L2 cache, work around the loop, and the tail of a phase.
    """

    is_loop: bool
    instructions: dict[str, int]
    weight_bytes: float
    load_bytes: int
    async_bytes: int
    warp_instructions_per_byte: float
    bandwidth_fraction: float


class KernelResources(Record):
    """One kernel at one shape. num_registers, local_bytes: per thread; 0 local bytes mean no spills.

    has_drafter: of a step with a DFlash drafter of two layers.
    """

    model: str
    expert_format: Literal["mxfp4", "bf16"]
    linear_format: Literal["bf16", "fp8"] = "bf16"
    has_drafter: bool = False
    phase: str
    op: str
    grid: tuple[int, ...]
    tile: int
    num_warps: int
    num_registers: int
    local_bytes: int
    shared_bytes: int
    loops: tuple[WeightLoop, ...] = ()


class KernelResourcesResult(Document):
    """Every distinct kernel of every model, compiled for `target`."""

    kind: Literal["kernel_resources"] = "kernel_resources"
    environment: Environment
    target: str
    kernels: tuple[KernelResources, ...]
