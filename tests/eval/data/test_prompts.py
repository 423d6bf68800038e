"""Prompts by the name of their set: files in every form they come in, the Hub, held-out and long code, bad files."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from speedstack.eval.data import prompts
from speedstack.eval.data.prompt_settings import PromptSettings
from speedstack.eval.data.prompts import (
    BENCHMARKS,
    PromptLoader,
    benchmark_rows,
    long_prompts,
    spaced,
)


def write_lines(file: Path, *rows: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def corpus(tmp_path: Path, documents: dict[str, str]) -> Path:
    """What of a prepared corpus is read here: its held-out documents."""
    table = datasets.Dataset.from_dict({"name": list(documents), "text": list(documents.values())})
    table.save_to_disk(str(tmp_path / "corpus" / "heldout"))
    return tmp_path / "corpus"


def loader(tokenizer: PreTrainedTokenizerFast, **options: Any) -> PromptLoader:
    return PromptLoader(tokenizer, **({"max_tokens": 200, "num_prompts": 2} | options))


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("humaneval", "humaneval.jsonl", {"task_id": "HumanEval/0", "prompt": "def f(x):\n", "test": "assert f"}),
        ("humaneval", "prompts-humaneval.jsonl", {"turns": ["def f(x):\n"]}),
        ("mbpp", "mbpp.jsonl", {"task_id": 1, "text": "def f(x):\n", "code": "pass"}),
        ("math-500", "prompts-math500.jsonl", {"turns": ["def f(x):\n"]}),
        ("math-500", "HuggingFaceH4/MATH-500/default/test.jsonl", {"problem": "def f(x):\n", "answer": "1"}),
        ("gsm8k", "gsm8k-test.jsonl", {"question": "def f(x):\n", "answer": "#### 1"}),
        ("gsm8k", "openai/gsm8k/main/test.jsonl", {"question": "def f(x):\n", "answer": "#### 1"}),
        ("mt-bench", "prompts-mt-bench.jsonl", {"turns": ["def f(x):\n", "and the second"]}),
        ("mt-bench", "HuggingFaceH4/mt_bench_prompts/default/train.jsonl", {"prompt": ["def f(x):\n", "second"]}),
    ],
)
def test_benchmarks_from_files(
    name: str, file: str, row: dict[str, Any], tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    write_lines(tmp_path / file, row, row)
    (found,) = loader(tiny_tokenizer, directory=tmp_path).load([name])
    assert found.name == name and found.source == str(tmp_path / file) and found.notes == ()
    assert [tiny_tokenizer.decode(ids) for ids in found.prompts] == ["def f(x):\n"] * 2


def test_parquet_and_a_file_of_ones_own(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    datasets.Dataset.from_dict({"prompt": ["import os", "import re"]}).to_parquet(str(tmp_path / "mbpp.parquet"))
    own = write_lines(tmp_path / "mine.jsonl", {"prompt": [5, 6, 7]}, {"prompt": "class A:"})
    mbpp, mine = loader(tiny_tokenizer, directory=tmp_path).load(["mbpp", str(own)])
    assert [tiny_tokenizer.decode(ids) for ids in mbpp.prompts] == ["import os", "import re"]
    assert mine.name == "mine" and mine.prompts[0] == [5, 6, 7]


def test_prompts_are_from_the_whole_set_and_fit(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert spaced(list(range(10)), 4) == [0, 2, 5, 7]
    rows = [{"prompt": [number]} for number in range(8)]
    file = write_lines(tmp_path / "mine.jsonl", {"prompt": [1] * 300}, *rows, {"prompt": "x = 1\n" * 90})
    (found,) = loader(tiny_tokenizer, num_prompts=4).load([str(file)])
    assert found.prompts == [[0], [2], [4], [6]]
    assert found.notes == ("mine: 2 of 10 prompts do not fit the model, and were left out",)
    with pytest.raises(ValueError, match="has 8 prompts of 1 to 200 tokens, 9 were asked for"):
        loader(tiny_tokenizer, num_prompts=9).load([str(file)])
    fitting, notes = loader(tiny_tokenizer).read_file(file)
    assert fitting == [[number] for number in range(8)] and notes == found.notes


def test_chats_take_the_template_and_the_benchmarks_instruction(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "humaneval.jsonl", {"prompt": "def f(x): ..."}, {"turns": ["Write {f}"]})
    options = {"directory": tmp_path, "chat_template": True}
    with pytest.raises(ValueError, match=r"the tokenizer of .* has no chat template"):
        loader(tiny_tokenizer, **options).load(["humaneval"])
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    (found,) = loader(tiny_tokenizer, **options).load(["humaneval"])
    first, second = (str(tiny_tokenizer.decode(ids)) for ids in found.prompts)
    assert first.startswith("<user>Write a solution to the following problem") and "def f(x): ...\n```" in first
    assert second == "<user>Write {f}<assistant>"
    assert BENCHMARKS["gsm8k"].instruction.format("2?").endswith("final answer within \\boxed{}.")


def test_the_hub_is_asked_for_what_the_directory_lacks(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"question": "def f(x):"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, source = benchmark_rows("gsm8k", tmp_path)
    assert asked == [("openai/gsm8k", "main", "test")] and source == "openai/gsm8k (main), test"
    assert rows == [("openai/gsm8k (main), test, row 1", {"question": "def f(x):"})]


def test_without_a_network_the_error_names_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for directory, place in ((tmp_path, str(tmp_path)), (None, "DIR")):
        with pytest.raises(ValueError, match="ConnectionError: no route") as error:
            benchmark_rows("mt-bench", directory)
        assert f"--prompts.dir {place} with {place}/mt-bench.jsonl" in str(error.value)
        assert f"{place}/HuggingFaceH4/mt_bench_prompts/default/train.jsonl" in str(error.value)
        assert "\n" not in str(error.value)


def test_heldout_is_two_sets_of_the_corpus(corpus: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    made = loader(tiny_tokenizer, corpus=corpus, num_heldout_tokens=24).load(["heldout"])
    assert [entry.name for entry in made] == ["module opening", "function body"]
    assert all(len(entry.prompts) == 2 and len(ids) <= 24 for entry in made for ids in entry.prompts)
    with pytest.raises(ValueError, match="held-out prompts of 300 tokens leave no room"):
        loader(tiny_tokenizer, corpus=corpus, num_heldout_tokens=300).load(["heldout"])


def test_long_prompts_are_whole_documents_joined(
    corpus: Path, documents: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (found,) = loader(tiny_tokenizer, corpus=corpus, max_tokens=20000, num_long_tokens=16384).load(["long"])
    assert [len(ids) for ids in found.prompts] == [16384] * 2 and found.notes == ()
    used = []
    for ids in found.prompts:
        start, *pieces = str(tiny_tokenizer.decode(ids)).split("<|endoftext|>")
        assert start == "" and len(pieces) >= 1
        names = [next(name for name, text in documents.items() if text.startswith(piece)) for piece in pieces]
        assert [documents[name] for name in names[:-1]] == pieces[:-1]
        used += names
    assert len(set(used)) == len(used)
    (found,) = loader(tiny_tokenizer, corpus=corpus, max_tokens=100).load(["long"])
    assert [len(ids) for ids in found.prompts] == [100] * 2
    assert found.notes == ("long: prompts of 100 tokens, the longest that fit the model, not 16384",)
    with pytest.raises(ValueError, match="give 0 of 1 prompts of 9 tokens"):
        long_prompts({"a": "x = 1"}, lambda text: [7, 8, 9], 1, 9, separator=0)
    assert long_prompts({"a": "", "b": ""}, lambda text: [7, 8, 9], 1, 6, separator=0) == [[0, 7, 8, 9, 0, 7]]


def test_names_and_places_that_are_not_there(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no prompt set 'humanevil': there are heldout, humaneval"):
        loader(tiny_tokenizer).load(["humanevil"])
    with pytest.raises(ValueError, match=r"prompts long are made of a prepared corpus: give prompts\.corpus"):
        loader(tiny_tokenizer).load(["long"])
    with pytest.raises(ValueError, match="is not a prepared corpus"):
        loader(tiny_tokenizer, corpus=tmp_path).load(["heldout"])
    with pytest.raises(ValueError, match="there is no file or directory"):
        loader(tiny_tokenizer).load([str(tmp_path / "none.jsonl")])


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_chats_that_train_a_drafter_are_prompts_up_to_the_answer(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"from": "human", "value": "say 7"}, {"from": "gpt", "value": "it is 7"}]
    file = write_lines(tmp_path / "dirty" / "a.jsonl", *[{"conversations": chat}] * 9, {"conversations": None})
    with pytest.raises(ValueError, match="has no chat template"):
        loader(tiny_tokenizer).load([str(file)])
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    settings = PromptSettings(chat_template_kwargs={"enable_thinking": False})
    with pytest.warns(
        UserWarning, match=r"1 of 10 rows of .* cannot be used and were left out: .*a.jsonl line 10: has"
    ):
        (found,) = loader(tiny_tokenizer, settings=settings).load([str(tmp_path / "dirty")])
    assert found.name == "dirty" and found.source.endswith('dirty, chat template with {"enable_thinking": false}')
    assert "a.jsonl line 10" in found.notes[0]
    assert {tiny_tokenizer.decode(ids) for ids in found.prompts} == {"<user>say 7<assistant><think></think>"}
    with pytest.raises(ValueError, match=r"1 of 10 rows .* more than max_unusable_fraction 0\.05 bears: .* line 10"):
        loader(tiny_tokenizer, settings=PromptSettings(max_unusable_fraction=0.05)).load([str(file)])


def test_settings_of_chats_that_no_prompt_is_are_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "mine.jsonl", {"prompt": "def f("}, {"prompt": "def g("})
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    settings = PromptSettings(chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(ValueError, match="are for chats, and no prompt is one"):
        loader(tiny_tokenizer, settings=settings).load([str(file)])
    assert loader(tiny_tokenizer, settings=settings, chat_template=True).load([str(file)])
    with pytest.raises(ValueError, match=r"has 'enable_thoughts', which the chat template of .* never reads"):
        loader(tiny_tokenizer, settings=PromptSettings(chat_template_kwargs={"enable_thoughts": False}))


def test_a_large_set_is_thinned_before_it_is_encoded(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "_MAX_ROWS", 5)
    file = write_lines(tmp_path / "mine.jsonl", *[{"prompt": [number]} for number in range(20)])
    (found,) = loader(tiny_tokenizer).load([str(file)])
    assert found.prompts == [[0], [8]]
    assert found.notes == ("mine: 5 of 20 rows were looked at, evenly spaced",)
