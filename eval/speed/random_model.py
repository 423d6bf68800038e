"""Writes a model of a known shape with random weights, for measuring speed where no such model can be had:

    python -m speedstack.eval.speed.random_model qwen3-moe-1b --out runs/qwen3-moe-1b

OUT/mxfp4 has its experts packed, OUT/bf16 the same values unpacked. Weights are drawn so that tokens stay apart (see
`runtime.model.synthetic_weights.random_weights`): greedy text goes from token to token as it would in a real model, and
its tokens choose different experts. OUT/prompts-<length>.jsonl are random prompts. The tokenizer knows bytes; it is
there because programs ask for one.
"""

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from speedstack.quant.checkpoint import convert
from speedstack.runtime.model.released_models import LAPTOP_MODEL, released_config
from speedstack.support.command import module_command, module_parser

PACKED, UNPACKED = "mxfp4", "bf16"
PROMPT_LENGTHS = (32, 512)
NUM_PROMPTS = 32
END = "<|end|>"


def write_random_model(model: str, out: Path, seed: int = 0) -> None:
    """The model named `model`, packed and unpacked, with prompts, in directory `out`.

    Raises ValueError for an unknown model, and as `convert` does where `out` holds something else.
    """
    config = released_config(model)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    draw_weights(built, config.num_hidden_layers, torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as name:
        built.save_pretrained(name)
        byte_tokenizer(config.vocab_size).save_pretrained(name)
        del built
        # Rounded once: what is unpacked has the values of what is packed.
        convert(name, "compressed-tensors", out / PACKED)
    convert(out / PACKED, "plain", out / UNPACKED)
    draw = random.Random(seed)
    for length in PROMPT_LENGTHS:
        rows = [{"prompt": draw.choices(range(config.vocab_size), k=length)} for _ in range(NUM_PROMPTS)]
        file = out / f"prompts-{length}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, whose other ids are tokens that no text has; the last one ends texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, *(f"<|{index}|>" for index in range(len(alphabet), vocab_size - 1)), END]
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@torch.no_grad()
def draw_weights(model: torch.nn.Module, num_layers: int, generator: torch.Generator) -> None:
    """Fills a transformers model as `speedstack.runtime.model.synthetic_weights.random_weights` fills ours."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.8, 1.2, generator=generator)
        elif "embed_tokens" in name:
            parameter.normal_(0.0, 1.0, generator=generator)
        elif parameter.dim() < 2 or name.endswith("bias"):
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            owner = model.get_submodule(name.rpartition(".")[0])
            columns = parameter.shape[-2 if getattr(owner, "is_transposed", False) else -1]
            adds = "o_proj" in name or "down_proj" in name
            scale = (2 * num_layers) ** -0.5 if adds else 1.0
            parameter.normal_(0.0, scale * columns**-0.5, generator=generator)


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: write the model and say where."""
    parser = module_parser(__spec__, __doc__, out=None)
    parser.add_argument("model", nargs="?", default=LAPTOP_MODEL)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_random_model(options.model, options.out, options.seed)
    print(f"written: {options.out / PACKED}, {options.out / UNPACKED}")


if __name__ == "__main__":
    sys.exit(main())
