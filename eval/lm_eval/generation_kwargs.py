"""A task's `generation_kwargs`: settings that the engine has and settings without effect; all others are refused.

Names and meanings are those of lm-eval and transformers, a few vLLM's. Unset values are neutral: defaults of a library
or of a model's generation_config.json, such as transformers' top_k of 50, do not apply.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from speedstack.quant.checkpoint.files import read_json
from speedstack.runtime.rounds.sampling import GREEDY, SamplingParams
from speedstack.support.near_miss import did_you_mean

DEFAULT_MAX_GEN_TOKS = 256
# lm-eval's names for one number.
MAX_GEN_TOKS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = ("until", *MAX_GEN_TOKS_KEYS, "max_length", "do_sample", "temperature", "top_p", "top_k")
# Values without effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "remove_invalid_values": (False,),
    "token_healing": (False,),
    "return_dict_in_generate": (False,),
    "ignore_eos": (False,),
}
# Values without effect on sampling; greedy decoding ignores these settings.
_NEUTRAL_TO_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
# Settings without effect on text: how it is computed, what else is returned, and options of beam search.
_WITHOUT_EFFECT = frozenset(
    {
        "use_cache",
        "length_penalty",
        "early_stopping",
        "renormalize_logits",
        "pad_token_id",
        "output_scores",
        "output_logits",
        "output_attentions",
        "output_hidden_states",
    }
)
_KNOWN = (*_READ, *_NEUTRAL, *_NEUTRAL_TO_SAMPLING, *sorted(_WITHOUT_EFFECT))


@dataclass(frozen=True)
class GenerationSettings:
    """How one text is generated. `max_length`: limit of prompt and text tokens together, if the task sets it."""

    max_gen_toks: int
    stop: tuple[str, ...]
    sampling: SamplingParams
    max_length: int | None = None

    def num_new_tokens(self, num_prompt_tokens: int) -> int:
        """Limit of new tokens after a prompt. Raises ValueError if `max_length` leaves none."""
        if self.max_length is None:
            return self.max_gen_toks
        if self.max_length <= num_prompt_tokens:
            raise ValueError(
                f"max_length {self.max_length} leaves no room after a prompt of {num_prompt_tokens} tokens: set "
                "max_gen_toks instead"
            )
        return self.max_length - num_prompt_tokens


def read_generation_kwargs(gen_kwargs: Mapping[str, Any]) -> GenerationSettings:
    """The settings in `gen_kwargs`; None counts as unset.

    Raises ValueError naming a setting that is unknown, unsupported or has a bad value.
    """
    given = {name: value for name, value in gen_kwargs.items() if value is not None}
    for name in ("temperature", "top_p"):
        _check_type(given, name, int | float)
    for name in ("top_k", "max_length", *MAX_GEN_TOKS_KEYS):
        _check_type(given, name, int)
    if not isinstance(given.get("do_sample", False), bool):
        raise ValueError(f"generation setting do_sample is true or false, not {given['do_sample']!r}")
    if given.get("do_sample"):
        given.setdefault("temperature", 1.0)
        if given["temperature"] == 0:
            raise ValueError("generation settings do_sample true and temperature 0 exclude each other: drop one")
    until = given.get("until", [])
    given["until"] = [until] if isinstance(until, str) else until
    if not isinstance(until, str | list) or not all(isinstance(text, str) for text in given["until"]):
        raise ValueError(f"generation setting until is text or a list of texts, not {until!r}")
    known: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_MAX_GEN_TOKS))
    temperature = float(known.get("temperature", 0.0))
    for name, value in known.items():
        _check_supported(name, value, is_sampled=temperature > 0.0)
    if known["max_gen_toks"] < 1:
        raise ValueError(f"generation setting max_gen_toks is {known['max_gen_toks']}: ask for a token or more")
    top_k = known.get("top_k", 0)  # -1 means all in vLLM
    return GenerationSettings(
        max_gen_toks=known["max_gen_toks"],
        stop=tuple(text for text in known["until"] if text),
        sampling=GREEDY
        if temperature == 0.0
        else SamplingParams(temperature, float(known.get("top_p", 1.0)), 0 if top_k == -1 else top_k),
        max_length=known.get("max_length"),
    )


def defaults_not_computed(directory: Path) -> dict[str, Any]:
    """Settings of generation_config.json that transformers applies to every text and the engine does not."""
    file = directory / "generation_config.json"
    fields = read_json(file) if file.is_file() else {}
    return {
        name: value
        for name, value in fields.items()
        if value is not None and name in _NEUTRAL and value not in _NEUTRAL[name]
    }


def _check_type(given: Mapping[str, Any], name: str, types: Any) -> None:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, types):
        raise ValueError(f"generation setting {name} is a {'whole ' if types is int else ''}number, not {value!r}")


def _check_supported(name: str, value: Any, is_sampled: bool) -> None:
    if name in _READ or name in _WITHOUT_EFFECT or (name in _NEUTRAL_TO_SAMPLING and not is_sampled):
        return
    neutral = _NEUTRAL.get(name, _NEUTRAL_TO_SAMPLING.get(name))
    if neutral is None:
        hint = did_you_mean(name, _KNOWN) or f"; those that are read are {', '.join(_READ)}"
        raise ValueError(f"unknown generation setting '{name}'{hint}")
    if value not in neutral:
        raise ValueError(f"generation setting {name} is {value!r}, which the engine does not compute: drop it")
