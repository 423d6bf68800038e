"""The `bench` verb: prompts by name, the race of the engine and its peers, and what came out as files and a table.

Files are written after every set of every repeat, so that whatever ends the run leaves what was finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from speedstack.eval.config import BenchConfig

if TYPE_CHECKING:
    from speedstack.eval.data.prompts import PromptSet
    from speedstack.eval.results.speed import AcceptanceResult, TimingResult

TIMING_FILE, TABLE_FILE, ACCEPTANCE_FILE = "timing.json", "timing.md", "acceptance.json"


def load_bench_config(path: Path | None, overrides: Sequence[str]) -> BenchConfig:
    """As every verb's; instead of a YAML file, a model directory may be named, which is then `target`."""
    from speedstack.train.config.recipes import load_config_of

    return load_config_of(BenchConfig, "target", path, overrides)


def bench(config: BenchConfig) -> None:
    """Time the decode loop against peers, and count the drafter's acceptance meanwhile.

    Raises ValueError, one line, for prompts that cannot be had, for checkpoints as their loaders do, and when the
    engine itself cannot decode.
    """
    import torch

    from speedstack.eval.results.schema import write_whole
    from speedstack.eval.speed.contestants import TimingSettings, measure_timing
    from speedstack.runtime.model.device import choose_device

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    prompt_sets = load_prompts(config)
    for entry in prompt_sets:
        print("\n".join((f"{entry.name}: {_sizes(entry)} tokens, {entry.source}", *entry.notes)))
    written: set[Path] = set()

    def keep(timing: TimingResult, acceptance: AcceptanceResult | None) -> None:
        written.add(timing.save(config.out / TIMING_FILE))
        written.add(write_whole(config.out / TABLE_FILE, timing.table()))
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
    """The sets that the config names, in tokens of its target. Raises ValueError, one line."""
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
