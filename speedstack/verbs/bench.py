"""The `bench` verb: prompts, the comparison of the engine with its peers, and the result as files and a table.

Files are written after every set of every repeat, so an interrupted run keeps the finished ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedstack.eval.config import BenchConfig
from speedstack.support.config import load_config_of

if TYPE_CHECKING:
    from speedstack.eval.data.prompts import PromptSet
    from speedstack.eval.results.speed import AcceptanceResult, TimingResult

TIMING_FILE, TABLE_FILE, ACCEPTANCE_FILE = "timing.json", "timing.md", "acceptance.json"


def load_bench_config(path: Path | None, overrides: Sequence[str]) -> BenchConfig:
    """The verb's config; a model directory in place of the YAML file becomes `target`."""
    return load_config_of(BenchConfig, "target", path, overrides)


def bench(config: BenchConfig) -> None:
    """Time the decode loop against peers, and count the drafter's acceptance meanwhile.

    Raises ValueError for missing prompts, as the checkpoint loaders, and if the engine itself cannot decode.
    """
    import torch

    from speedstack.eval.speed.contestants import TimingSettings, measure_timing
    from speedstack.runtime.model.device import choose_device
    from speedstack.support.files import write_atomically

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    prompt_sets = load_prompts(config)
    for entry in prompt_sets:
        print("\n".join((f"{entry.name}: {_sizes(entry)} tokens, {entry.source}", *entry.notes)))
    written: set[Path] = set()

    def keep(timing: TimingResult, acceptance: AcceptanceResult | None) -> None:
        written.add(timing.save(config.out / TIMING_FILE))
        written.add(write_atomically(config.out / TABLE_FILE, timing.table()))
        if acceptance is not None:
            written.add(acceptance.save(config.out / ACCEPTANCE_FILE))

    try:
        timing = measure_timing(
            config.target,
            config.drafter,
            prompt_sets,
            TimingSettings(
                num_new_tokens=config.num_new_tokens,
                num_repeats=config.num_repeats,
                dtype=config.dtype,
                peer_dtype=config.peer_dtype,
                device=choose_device(config.device).type,
                backend=config.backend,
                peers=config.peers,
                dense_dtype=config.dense_dtype,
                kv_dtype=config.kv_dtype,
                look_up=config.look_up,
                num_warmups=config.num_warmups,
                batch_sizes=config.batch_sizes,
                gguf=config.gguf,
                gguf_weights=config.gguf_weights,
                copies=config.copies,
                vllm_python=config.vllm_python,
                llama_cpp_python=config.llama_cpp_python,
                gpu_hour_usd=config.gpu_hour_usd,
                seed=config.seed,
            ),
            on_result=keep,
        )
        print(f"\n{timing.table()}")
    finally:
        for path in sorted(written):
            print(f"written: {path}")


def load_prompts(config: BenchConfig) -> list[PromptSet]:
    """The configured sets, in tokens of the target. Raises ValueError."""
    from speedstack.eval.data.prompts import PromptLoader
    from speedstack.quant.checkpoint.tokenizer import load_tokenizer
    from speedstack.runtime.model.loading import check_decodable

    section, target = config.prompts, config.target
    window = check_decodable(target).max_position_embeddings
    if window <= config.num_new_tokens:
        raise ValueError(f"num_new_tokens {config.num_new_tokens} leaves no room in the model's {window} positions")
    loader = PromptLoader(
        tokenizer=load_tokenizer(target),
        max_tokens=window - config.num_new_tokens,
        num_prompts=section.num_prompts,
        corpus=section.corpus,
        directory=section.dir,
        num_heldout_tokens=section.num_tokens,
        num_long_tokens=section.long_tokens,
        chat_template=section.chat_template,
        seed=config.seed,
        settings=section,
    )
    return loader.load(section.sets)


def _sizes(entry: PromptSet) -> str:
    lengths = [len(prompt) for prompt in entry.prompts]
    count = f"{len(lengths)} prompt{'s' if len(lengths) > 1 else ''}"
    return f"{count} of {min(lengths)}{f' to {max(lengths)}' if min(lengths) < max(lengths) else ''}"
