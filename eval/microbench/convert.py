"""Peak memory and time of checkpoint conversions: `python -m speedstack.eval.microbench.convert [RESULT.json]`.

Converts a synthetic Qwen3-MoE checkpoint of ten shards through every format. The peer is transformers, which loads the
whole model and saves it again.

Each conversion runs in its own process, which first converts a checkpoint of a few kilobytes to load torch's and
transformers' code. Needs Linux.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from speedstack.eval.microbench.harness import PeakMemory, Stopwatch, check_peak_memory, in_own_process
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import ConversionCost, ConversionResult
from speedstack.quant.checkpoint import convert
from speedstack.quant.checkpoint.directory import ShardWriter
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.checkpoint.reader import expert_weights
from speedstack.support.command import module_command, module_parser, show_result

# source, out, target format, max_shard_bytes
Work = Callable[[Path, Path, str, int], None]

NUM_SHARDS = 10
_SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 1024,
    "intermediate_size": 512,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 20,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
_TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
# Each conversion starts from the directory an earlier one made.
_CHAIN = (
    ("plain", "compressed-tensors"),
    ("compressed-tensors", "mimo"),
    ("mimo", "deepseek-v4"),
    ("deepseek-v4", "gguf"),
    ("gguf", "compressed-tensors"),
    ("compressed-tensors", "plain"),
)


def measure(directory: Path) -> ConversionResult:
    """Convert under `directory`, which needs about 5 GB. Raises ValueError off Linux."""
    check_peak_memory()
    make_checkpoint(directory / "tiny", _TINY, num_shards=1)
    make_checkpoint(directory / "plain", _SIZES, num_shards=NUM_SHARDS)
    costs = [_cost(_load_and_save, "transformers load and save", directory / "plain", directory / "peer", "")]
    for index, (source, target) in enumerate(_CHAIN):
        path = directory / ("plain" if index == 0 else f"{index}-{source}")
        out = directory / f"{index + 1}-{target}"
        costs.append(_cost(_convert, f"{source} to {target}", path, out, target))
    return ConversionResult(conversions=tuple(costs), environment=describe_environment())


def make_checkpoint(path: Path, sizes: dict[str, Any], num_shards: int) -> None:
    """Write a Qwen3-MoE directory of random bfloat16 weights, tensor by tensor."""
    config = AutoConfig.for_model("qwen3_moe", **sizes, dtype="bfloat16", tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    total_bytes = sum(tensor.numel() * torch.bfloat16.itemsize for tensor in model.state_dict().values())
    shards = ShardWriter(path, _shard_bytes(total_bytes, num_shards))

    def add(name: str, shape: tuple[int, ...]) -> None:
        shards.add(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator))

    experts = expert_weights(model, names := hub_names("qwen3_moe"))
    for name, tensor in model.state_dict().items():
        if name not in experts:
            add(name, tuple(tensor.shape))
            continue
        weight = experts[name]
        for index in range(weight.num_experts):
            parts = names.parts(weight.module, weight.name, index)
            for part in parts:
                add(f"{part}.weight", (weight.num_rows // len(parts), weight.num_columns))
    shards.finish()
    fields = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}
    (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")


def _shard_bytes(total_bytes: int, num_shards: int) -> int:
    """A little more than an even share, because shards end between tensors."""
    return int(total_bytes / num_shards * 1.03)


def _cost(work: Work, name: str, source: Path, out: Path, target: str) -> ConversionCost:
    files = [*source.glob("*.safetensors"), *source.glob("*.gguf")]
    source_bytes = sum(file.stat().st_size for file in files)
    max_shard_bytes = _shard_bytes(source_bytes, NUM_SHARDS)
    seconds, peak_bytes = in_own_process(name, _measure, work, source, out, target, max_shard_bytes)
    print(f"{name}: {peak_bytes / 1e6:.0f} MB over baseline, {seconds:.1f} s", file=sys.stderr)
    return ConversionCost(
        name=name,
        description=f"written in shards of at most {max_shard_bytes / 1e6:.0f} MB",
        source_bytes=source_bytes,
        num_source_shards=len(files),
        max_shard_bytes=max_shard_bytes,
        seconds=seconds,
        peak_bytes=peak_bytes,
    )


def _measure(work: Work, source: Path, out: Path, target: str, max_shard_bytes: int) -> tuple[float, int]:
    """Seconds and peak bytes, in this process, which must be fresh."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        work(source.parent / "tiny", Path(scratch) / "out", "mimo" if target == "plain" else target, 1 << 20)
    memory = PeakMemory()
    with Stopwatch() as watch:
        work(source, out, target, max_shard_bytes)
    return watch.wall_ms / 1e3, memory.peak_bytes()


def _convert(source: Path, out: Path, target: str, max_shard_bytes: int) -> None:
    convert(source, target, out, max_shard_bytes=max_shard_bytes)


def _load_and_save(source: Path, out: Path, target: str, max_shard_bytes: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size=max_shard_bytes)


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print, write JSON."""
    parser = module_parser(__spec__, __doc__, out=None)
    parser.add_argument("result", nargs="?", type=Path, default=Path("runs/bench/convert.json"))
    path = parser.parse_args(arguments).result
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory))
    lines = (
        f"{cost.name}: peak {cost.peak_shards:.2f} shards of {cost.max_shard_bytes / 1e6:.0f} MB, {cost.seconds:.1f} s"
        for cost in result.conversions
    )
    show_result(result, "\n".join(lines), path)


if __name__ == "__main__":
    sys.exit(main())
