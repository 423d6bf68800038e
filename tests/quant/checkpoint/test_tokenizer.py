"""A model directory's tokenizer is what its files say, or there is none."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speedstack.quant.checkpoint.tokenizer import find_tokenizer, load_tokenizer, tokenizer_files

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "mixtral", "glm4_moe", "qwen3_5_moe", "gemma3", "no_such_family")


def model_directory(path: Path, family: str, **files: object) -> Path:
    path.mkdir(exist_ok=True)
    for name, value in {"config": {"model_type": family}, **files}.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_no_files_mean_no_tokenizer(family: str, tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model", family, generation_config={}, index={})
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert find_tokenizer(directory) is None
    with pytest.raises(ValueError, match=r"has no tokenizer: put tokenizer\.json"):
        load_tokenizer(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "Qwen2Tokenizer"}])
def test_settings_without_a_vocabulary_make_no_tokenizer(family: str, settings: dict, tmp_path: Path) -> None:
    added = {"100": {"content": "<|im_end|>", "special": True}, "101": {"content": "<tool>", "special": False}}
    settings = settings | {"eos_token": "<|im_end|>", "added_tokens_decoder": added}
    with pytest.raises(ValueError, match="has no tokenizer that can be read") as error:
        find_tokenizer(model_directory(tmp_path / "model", family, tokenizer_config=settings))
    assert "\n" not in str(error.value)


@pytest.fixture
def saved(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A directory of its own with the tiny tokenizer."""
    tiny_tokenizer.save_pretrained(tmp_path / "saved")
    return model_directory(tmp_path / "saved", "qwen2_moe")


def test_what_was_saved_is_read(saved: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(saved, 512)
    assert tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer.eos_token_id == tiny_tokenizer.eos_token_id
    assert [file.name for file in tokenizer_files(saved)] == ["tokenizer.json", "tokenizer_config.json"]


def test_truncation_and_padding_in_the_file_are_nobody_s_text(saved: Path) -> None:
    """As training scripts leave them there; transformers sets its own at every call."""
    text, whole = "import os\nprint(os.getcwd())\n" * 5, load_tokenizer(saved)
    expected = whole.encode(text, add_special_tokens=False)
    own = Tokenizer.from_file(str(saved / "tokenizer.json"))
    for cut in (True, False):
        own.no_padding()
        own.enable_truncation(4) if cut else own.no_truncation()
        if not cut:
            own.enable_padding(length=500)
        own.save(str(saved / "tokenizer.json"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tokenizer = load_tokenizer(saved)
        assert tokenizer.encode(text, add_special_tokens=False) == expected


def test_vocabulary_and_merges(saved: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    (saved / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of vocab\.json and merges\.txt one is missing"):
        find_tokenizer(saved)
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (saved / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    text = "def wrap(text): return the text"
    ids = load_tokenizer(saved).encode(text, add_special_tokens=False)
    assert ids == tiny_tokenizer.encode(text, add_special_tokens=False)


def test_too_many_tokens_for_the_model(saved: Path) -> None:
    with pytest.raises(ValueError, match="ids up to 511, the model an embedding of 511: they do not belong together"):
        load_tokenizer(saved, 511)


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(text, encoding="utf-8")


def _without_merges(directory: Path) -> None:
    fields = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    del fields["model"]["merges"]
    (directory / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")


def _truncated(directory: Path) -> None:
    content = (directory / "tokenizer.json").read_bytes()
    (directory / "tokenizer.json").write_bytes(content[: len(content) // 2])


def _sentencepiece(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_write("tokenizer.json", ""), "tokenizer.json is broken"),
        (_write("tokenizer.json", "{}"), "tokenizer.json is broken"),
        (_write("tokenizer.json", "[]"), "tokenizer.json is broken"),
        (_truncated, "tokenizer.json is broken"),
        (_without_merges, "tokenizer.json is broken"),
        (_write("tokenizer_config.json", "{"), "made of tokenizer.json, tokenizer_config.json"),
        (_write("tokenizer_config.json", "[1]"), "made of tokenizer.json, tokenizer_config.json"),
        (_write("tokenizer_config.json", '{"eos_token": 5}'), "eos_token"),
        (_write("tokenizer_config.json", '{"tokenizer_class": 5}'), "made of tokenizer.json, tokenizer_config.json"),
        (_write("added_tokens.json", "{"), "made of added_tokens.json"),
        (_sentencepiece, r"needs the package sentencepiece or tiktoken"),
    ],
)
def test_broken_files(break_it: Callable[[Path], object], said: str, saved: Path) -> None:
    break_it(saved)
    with pytest.raises(ValueError, match="has no tokenizer that can be read") as error:
        find_tokenizer(saved)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("auto_map", [["own_tokenizer.Own", None], {"AutoTokenizer": [None, "own_tokenizer.Own"]}])
def test_code_of_the_directory_is_not_run(auto_map: object, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = saved / "ran"
    (saved / "own_tokenizer.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n", encoding="utf-8")
    model_directory(saved, "no_such_family", tokenizer_config={"tokenizer_class": "Own", "auto_map": auto_map})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"needs code of its own \(own_tokenizer\.Own\), which is not run"):
        find_tokenizer(saved)
    assert not ran.exists()


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no directory"):
        find_tokenizer(tmp_path / "absent")


def _of_words(path: Path, words: list[str], unknown: str | None) -> Path:
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.WordLevel(vocabulary, unknown) if unknown else models.WordLevel(vocabulary)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, eos_token="</s>").save_pretrained(path)
    return model_directory(path, "mixtral")


def test_a_tokenizer_that_loses_the_text_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"does not know \d+ of the \d+ tokens of ordinary text"):
        find_tokenizer(_of_words(tmp_path / "words", ["</s>", "[UNK]", "the", "dog", "1"], "[UNK]"))
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        find_tokenizer(_of_words(tmp_path / "none", ["</s>", "the", "dog", "1"], None))
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "x": 1}, []))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path / "x")
    with pytest.warns(UserWarning, match="makes one token of all ordinary text"):
        find_tokenizer(model_directory(tmp_path / "x", "olmoe"))


def test_what_transformers_adds_or_changes_is_said(saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(saved, bare)
    (bare / "tokenizer_config.json").unlink()
    fields = json.loads((bare / "tokenizer.json").read_text(encoding="utf-8"))
    fields["pre_tokenizer"]["add_prefix_space"] = True
    (bare / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.warns(UserWarning) as caught:
        find_tokenizer(model_directory(bare, "olmoe"))
    said = [str(warning.message) for warning in caught]
    assert any("has tokens that no file names, such as <|padding|>" in line for line in said), said
    assert any("reads text as transformers' GPTNeoXTokenizer does" in line for line in said), said
