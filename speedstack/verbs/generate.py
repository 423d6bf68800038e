"""The `generate` verb: stream a continuation to stdout, and its cost to stderr.

Stdout has the text alone, for pipes. Decoding is greedy by default: only the end tokens are taken from the model's
generation_config.json. Batches and log-probabilities are left to the Python API (`speedstack.runtime.Engine`).
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from speedstack.eval.config import ModelConfig
from speedstack.eval.data.prompt_settings import ChatTemplateKwargs
from speedstack.support.config import load_config_of

if TYPE_CHECKING:
    from speedstack.runtime import Generation


class GenerateConfig(ModelConfig):
    """Continue a prompt."""

    prompt: str = Field("", description="Text to continue; '-' reads it from stdin.")
    prompt_ids: tuple[int, ...] = Field((), description="Token ids to continue, instead of text.")
    chat_template: bool = Field(
        False, description="The prompt as a user's message, in the template of the model's tokenizer."
    )
    chat_template_kwargs: ChatTemplateKwargs = Field(
        {}, description="Variables for the chat template, as a JSON object: '{\"enable_thinking\": false}'."
    )
    max_new_tokens: int = Field(128, ge=1, description="Tokens generated at most.")
    temperature: float = Field(
        0.0, ge=0, description="Sampling temperature; 0 is greedy, whatever generation_config.json has."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling: the probability mass kept.")
    top_k: int = Field(0, ge=0, description="Most probable tokens kept; 0 keeps all.")
    seed: int = Field(0, ge=0, description="Seed of the sampling noise.")
    stop: tuple[str, ...] = Field((), description="Strings that end the text; they are not part of it.")
    ignore_eos: bool = Field(False, description="Go on past end-of-text tokens.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens, marks of a chat say, out of the text.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of everything but packed experts; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    dense_dtype: Literal["int8"] | None = Field(
        None, description="int8: attention, dense MLPs and LM head in eight bits (CPU); None: as stored."
    )
    kv_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the key/value buffers (CPU); None: float32."
    )
    max_length: int | None = Field(None, ge=2, description="Positions of the sequence's buffers; None: the model's.")
    drafter: Path | None = Field(
        None, description="Directory of a DFlash drafter trained for the target, or ngram: prompt lookup; None: none."
    )
    num_drafts: int | Literal["adaptive", "all"] | None = Field(
        None, description="Proposals verified a round; adaptive: as many as pay. None: adaptive on a CPU, all on a GPU."
    )
    draft_noise: Literal["none", "shared"] = Field(
        "none", description="shared: draft with the sampling noise of the target. Nothing changes at temperature 0."
    )


def load_generate_config(path: Path | None, overrides: Sequence[str]) -> GenerateConfig:
    """The verb's config; a model directory in place of the YAML file becomes `target`."""
    return load_config_of(GenerateConfig, "target", path, overrides)


def generate(config: GenerateConfig) -> None:
    """Stream the continuation. Raises ValueError as `Engine`, and for no prompt or two."""
    if bool(config.prompt) == bool(config.prompt_ids):
        raise ValueError("give one prompt: --prompt TEXT (or '-' for stdin), or --prompt-ids 1 2 3")
    if config.chat_template and config.prompt_ids:
        raise ValueError("chat_template is for text: give it as --prompt instead of --prompt-ids")
    if config.chat_template_kwargs and not config.chat_template:
        raise ValueError("chat_template_kwargs need --chat-template")
    from speedstack.runtime import Engine

    engine = Engine.from_pretrained(
        config.target,
        config.drafter,
        backend=config.backend,
        device=config.device,
        dtype=None if config.dtype == "auto" else config.dtype,
        max_length=config.max_length,
        max_batch_size=1,
        num_drafts=config.num_drafts,
        draft_noise=config.draft_noise,
        dense_dtype=config.dense_dtype,
        kv_dtype=config.kv_dtype,
    )
    text = sys.stdin.read() if config.prompt == "-" else config.prompt
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "stop": config.stop,
        "ignore_eos": config.ignore_eos,
        "skip_special_tokens": config.skip_special_tokens,
    }
    prompt = text or list(config.prompt_ids)
    if config.chat_template:
        prompt = _as_chat(text, engine.tokenizer, config.chat_template_kwargs)
    if engine.tokenizer is None:
        generation = engine.generate(prompt, **options)
        print(" ".join(map(str, generation.tokens)))
    else:
        generation = _stream(engine.stream(prompt, **options))
    stats = generation.stats
    line = f"{stats.num_new_tokens} tokens ({generation.finish_reason}), {engine.backend_name} backend"
    if stats.num_rounds:
        line += f", {stats.tokens_per_second:.1f} tokens/s"
        if config.drafter is not None:
            line += f", {stats.acceptance_length:.2f} tokens a round"
    print(line, file=sys.stderr)
    parts = engine.memory_bytes().items()
    print("memory: " + ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in parts), file=sys.stderr)


def _as_chat(text: str, tokenizer: Any, kwargs: dict[str, Any]) -> list[int]:
    """Token ids of the rendered template, which writes special tokens itself."""
    from speedstack.eval.data.chat_template import ChatTemplate
    from speedstack.eval.data.chats import Chat

    if tokenizer is None:
        raise ValueError("chat_template needs a tokenizer, and the target has no tokenizer files")
    written = ChatTemplate(tokenizer, kwargs).prompt("the prompt", Chat([{"role": "user", "content": text}]))
    return list(tokenizer.encode(written, add_special_tokens=False))


def _stream(pieces: Generator[str, None, Generation]) -> Generation:
    """Print pieces as they come, then a newline; returns their generation."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as stop:
            print()
            return stop.value
