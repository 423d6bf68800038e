"""End tokens of a directory: what transformers' `generate` takes, and the tokenizer's own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint.generation import end_token_ids

VOCAB_SIZE = 64
ABSENT: Any = object()


def write(path: Path, config: Any = ABSENT, generation: Any = ABSENT, **fields: Any) -> Path:
    """Both files with their `eos_token_id`; without it where ABSENT, and without generation_config.json at None."""
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is None and name != "config.json":
            (path / name).unlink(missing_ok=True)
            continue
        there = json.loads((path / name).read_text()) if (path / name).is_file() else {}
        there.pop("eos_token_id", None)
        there |= {} if value is ABSENT else {"eos_token_id": value}
        (path / name).write_text(json.dumps(there | (fields if name != "config.json" else {})), encoding="utf-8")
    return path


def tokenizer(eos_token_id: int | None) -> Any:
    return SimpleNamespace(eos_token_id=eos_token_id, eos_token="</s>")


@pytest.mark.parametrize(
    ("config", "generation", "own", "expected"),
    [
        (7, None, None, (7,)),
        ([9, 7], None, 7, (7, 9)),
        (7, 9, None, (9,)),
        (7, [11, 9, 11], 3, (3, 9, 11)),
        (ABSENT, [5], None, (5,)),
        (ABSENT, None, 5, (5,)),
        (ABSENT, None, None, ()),
        (None, 5, None, (5,)),
        # A file that says nothing of it is none.
        (7, ABSENT, None, (7,)),
        (7, [], None, (7,)),
    ],
)
def test_end_tokens(config: Any, generation: Any, own: int | None, expected: tuple[int, ...], tmp_path: Path) -> None:
    path = write(tmp_path, config, None)
    if generation is not None:
        write(path, config, generation)
    assert end_token_ids(path, VOCAB_SIZE, tokenizer(own)) == expected
    if own is None:
        assert end_token_ids(path, VOCAB_SIZE) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("config", "generation"),
    [(7, None), ([9, 7], None), (7, 9), (7, [11, 9]), (ABSENT, [5, 6]), (ABSENT, None), (None, 5)],
)
def test_end_tokens_are_those_of_transformers(
    family: str, config: Any, generation: Any, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """A config class has an end token of its own where the file has none, which nobody said of this model's texts."""
    make_family(family).save_pretrained(tmp_path)
    write(tmp_path, config, generation)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    assert end_token_ids(tmp_path, VOCAB_SIZE) == tuple(sorted([theirs] if isinstance(theirs, int) else theirs or ()))


def test_a_model_of_parts_names_them_in_its_text_part(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": [4, 2]}}))
    assert end_token_ids(tmp_path, VOCAB_SIZE) == (2, 4)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["7", 7.0, True, -1, 64, [[7]], [7, None], [7, "</s>"], {"id": 7}])
def test_malformed_end_tokens_are_named(file: str, value: Any, tmp_path: Path) -> None:
    write(tmp_path, *((value, None) if file == "config.json" else (7, value)))
    with pytest.raises(ValueError, match=f"{tmp_path}/{file}: eos_token_id ") as error:
        end_token_ids(tmp_path, VOCAB_SIZE)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'</s>', whose id 64 is outside the model's vocabulary of 64"):
        end_token_ids(write(tmp_path, 7), VOCAB_SIZE, tokenizer(VOCAB_SIZE))
