"""Generation settings of tasks: read as lm-eval and transformers mean them, refused where they would change a text."""

import json
from pathlib import Path
from typing import Any

import pytest

from speedstack.eval.lm_eval.generation_kwargs import defaults_not_computed, read_generation_kwargs
from speedstack.runtime.rounds.sampling import GREEDY, SamplingParams

NEUTRAL: list[dict[str, Any]] = [
    {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0, "min_p": 0.0},
    {"no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1, "presence_penalty": 0.0},
    {"length_penalty": 2.0, "early_stopping": True, "use_cache": False, "pad_token_id": 3},
    {"min_new_tokens": 0, "bad_words_ids": [], "guidance_scale": 1, "num_return_sequences": 1},
    {"penalty_alpha": None, "forced_eos_token_id": None, "suppress_tokens": None, "top_k": None},
]


@pytest.mark.parametrize("settings", NEUTRAL)
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}])
def test_what_changes_nothing_is_taken(settings: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert read_generation_kwargs(sampling | settings) == read_generation_kwargs(sampling)


def test_greedy_decoding_looks_at_no_setting_of_sampling() -> None:
    sampling = {"temperature": 0.6, "top_p": 0.0, "top_k": -1, "min_p": 0.05, "typical_p": 0.9, "top_h": 0.3}
    assert read_generation_kwargs({"do_sample": False} | sampling).sampling == GREEDY
    assert read_generation_kwargs({"temperature": 0, "top_p": 0.3, "eta_cutoff": 0.1}).sampling == GREEDY


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, SamplingParams(1.0)),
        ({"do_sample": True, "temperature": None, "top_p": 0.9}, SamplingParams(1.0, 0.9)),
        ({"temperature": 0.3, "top_k": 20}, SamplingParams(0.3, top_k=20)),
        ({"do_sample": True, "temperature": 2, "top_k": -1, "top_p": 1}, SamplingParams(2.0)),
        ({"do_sample": False, "temperature": 1.0}, GREEDY),
        ({}, GREEDY),
    ],
)
def test_temperature_is_transformers(settings: dict[str, Any], expected: SamplingParams) -> None:
    assert read_generation_kwargs(settings).sampling == expected


def test_lengths_and_stops_have_all_their_names() -> None:
    assert read_generation_kwargs({}).max_gen_toks == 256
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert read_generation_kwargs({name: 17}).max_gen_toks == 17
    assert read_generation_kwargs({"max_tokens": 5, "max_gen_toks": 9}).max_gen_toks == 9
    assert read_generation_kwargs({"until": "\n"}).stop == ("\n",)
    assert read_generation_kwargs({"until": ["", "Q:", "\n\n"]}).stop == ("Q:", "\n\n")
    assert read_generation_kwargs({"until": None}).stop == ()
    total = read_generation_kwargs({"max_length": 40})
    assert (total.num_new_tokens(12), read_generation_kwargs({"max_tokens": 8}).num_new_tokens(12)) == (28, 8)
    with pytest.raises(ValueError, match="max_length 40 leaves no room after a prompt of 40 tokens"):
        total.num_new_tokens(40)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repetition_penalty": 1.05}, "repetition_penalty is 1.05, which the engine does not compute"),
        ({"do_sample": True, "min_p": 0.1}, "min_p is 0.1, which the engine does not compute"),
        ({"min_new_tokens": 2}, "min_new_tokens is 2"),
        ({"suppress_tokens": [7]}, r"suppress_tokens is \[7\]"),
        ({"temprature": 0.2}, "unknown generation setting 'temprature'; did you mean 'temperature'"),
        ({"zzz": None, "qqq": 1}, "unknown generation setting 'qqq'; those that are read are until, max_gen_toks"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample true and temperature 0 exclude each other"),
        ({"do_sample": "yes"}, "do_sample is true or false, not 'yes'"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"do_sample": True, "top_k": -3}, "top_k must be >= 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is a whole number, not 'many'"),
        ({"max_tokens": 2.5}, "max_tokens is a whole number, not 2.5"),
        ({"temperature": "hot"}, "temperature is a number, not 'hot'"),
        ({"until": ["a", 3]}, r"until is text or a list of texts, not \['a', 3\]"),
        ({"until": 3}, "until is text or a list of texts, not 3"),
    ],
)
def test_what_would_change_a_text_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_generation_kwargs(settings)


def test_what_a_models_own_config_would_do_is_known(tmp_path: Path) -> None:
    assert defaults_not_computed(tmp_path) == {}
    fields = {
        "repetition_penalty": 1.05,
        "num_beams": 1,
        "temperature": 0.6,
        "eos_token_id": [1],
        "bad_words_ids": None,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(fields | {"no_repeat_ngram_size": 3}))
    assert defaults_not_computed(tmp_path) == {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3}
