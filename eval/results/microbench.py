"""Measurements of single parts, by `speedstack.eval.microbench`: a kind of result a benchmark."""

from typing import Any, Literal

from speedstack.eval.results.schema import Document, Environment, Record, Spread, Unavailable
from speedstack.eval.results.speed import AcceptanceSet


class ConversionCost(Record):
    """One conversion of a checkpoint, in a process of its own.

    `peak_bytes` is the largest resident memory above what the process held before. `max_shard_bytes` bounds the
    safetensors files that are written.
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
        """Peak memory in shards of the result; None where they have no bound."""
        return self.peak_bytes / self.max_shard_bytes if self.max_shard_bytes else None


class ConversionResult(Document):
    """Memory and time of converting checkpoints, a peer among them."""

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
    """One contestant's optimizer steps, in milliseconds; `cpu` is processor time of all threads."""

    contestant: str
    step_ms: tuple[float, ...]
    step_cpu_ms: tuple[float, ...]
    median_ms: float
    median_cpu_ms: float
    num_blocks: int


class ShapeTimes(Record):
    """All contestants on one shape and loss. `speedup`: the fastest of the peer's medians over ours.

    On a machine that does other work the ratio of processor time says more.
    """

    shape: Shape
    loss: Literal["ce", "kl"]
    contestants: tuple[StepTimes, ...]
    speedup: float | None
    cpu_speedup: float | None


class LossMemory(Record):
    """Peak memory of head, loss and gradient above what the process held before."""

    way: str
    num_positions: int
    hidden_size: int
    vocab_size: int
    logits_bytes: int
    peak_bytes: int


class DrafterCost(Document):
    """What training a drafter costs, beside speculators where that is installed."""

    kind: Literal["drafter_cost"] = "drafter_cost"
    environment: Environment
    peer_version: str | None
    times: tuple[ShapeTimes, ...]
    memory: tuple[LossMemory, ...]
    unavailable: tuple[Unavailable, ...] = ()


class LayerMemory(Record):
    """What autograd keeps for the backward of one layer, weights apart from all else; and the process's memory above
    what it had before the first forward: after the last forward, and at its highest, gradients included.
    """

    way: Literal["packed", "plain"]
    kept_weight_bytes: int
    kept_other_bytes: int
    forward_bytes: int
    peak_bytes: int


class StepTime(Record):
    """Optimizer steps with fake-quant and without; `cpu` is processor time of all threads, ratios are of medians.

    On a machine that does other work the ratio of processor time says more.
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
    """What fake-quantized experts cost in training."""

    kind: Literal["qat_cost"] = "qat_cost"
    environment: Environment
    layer_shape: dict[str, int]
    layers: tuple[LayerMemory, ...]
    steps: tuple[StepTime, ...]


class QuantTiming(Record):
    """One contestant at one operation: `seconds` for `num_experts` matrices, of which it reads and writes `num_bytes`.

    `times_ours` is the ratio of median times an expert; `relative_squared_error` is the sum of squared errors of the
    first matrix over its sum of squares.
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
    """MXFP4 kernels beside other libraries."""

    kind: Literal["quant-bench"] = "quant-bench"
    environment: Environment
    device: str
    shape: tuple[int, ...]
    scale_rule: str
    peer_versions: dict[str, str]
    timings: tuple[QuantTiming, ...]
    unavailable: tuple[Unavailable, ...]


class LmTiming(Record):
    """One contestant on one task's requests; `speedup` is over the adapter, of median times."""

    contestant: str
    seconds: Spread
    requests_per_second: float
    speedup: float


class LmAgreement(Record):
    """Answers of the engine against the adapter's, request by request.

    Log-likelihoods differ by at most `max_difference_nats`, and by `max_relative_difference` of their size; from those
    in float64 the engine's differ by at most `engine_error_nats`, the adapter's by `adapter_error_nats`, which older
    files lack. Generations are the same text in `num_equal` cases, log-likelihoods have the same verdict on greediness.
    `scores` are the task's metrics, the engine's and the adapter's.
    """

    num_equal: int
    max_difference_nats: float | None
    max_relative_difference: float | None
    engine_error_nats: float | None = None
    adapter_error_nats: float | None = None
    scores: dict[str, tuple[float, float]]


class LmTask(Record):
    """One task: agreement, and times of every contestant."""

    task: str
    kind: Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
    num_requests: int
    experts_implementation: str
    agreement: LmAgreement
    timings: tuple[LmTiming, ...]


class LmBench(Document):
    """lm-eval through the engine beside its own Hugging Face adapter."""

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
    """One way of speculating.

    `acceptance` is of all prompts, `sets` of each set; without proposals its length is 1.
    `decode_tokens_per_second` leaves the prompt out; it is of `num_timed_prompts` prompts, None when nothing was timed.
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
    """Ways of speculating with one target and one drafter on the same prompts, one sequence at a time."""

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
    """The code of a kernel that multiplies weights (see `speedstack.eval.microbench.sass`), once through.

    is_loop: false where the compiler has unrolled all of it, and the whole kernel is counted. instructions: of a warp,
    by class. weight_bytes, load_bytes, async_bytes: of a program; weights, all that is asked of global memory, and what
    of that is not waited for. bandwidth_fraction: of an H200's bandwidth, what issue alone leaves possible; latency,
    bank conflicts, activations' way from the L2 cache (up to twice the weights' bytes: see load_bytes), what an item
    does around the loop, and the last items of a phase are left out.
    """

    is_loop: bool
    instructions: dict[str, int]
    weight_bytes: float
    load_bytes: int
    async_bytes: int
    warp_instructions_per_byte: float
    bandwidth_fraction: float


class KernelResources(Record):
    """One kernel at one shape. num_registers, local_bytes: a thread's; a kernel without spills has 0 local bytes.

    has_drafter: of a step that a DFlash drafter of two layers drafts for.
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
    """Every distinct kernel of every model, as compiled for `target`."""

    kind: Literal["kernel_resources"] = "kernel_resources"
    environment: Environment
    target: str
    kernels: tuple[KernelResources, ...]
