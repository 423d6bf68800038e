"""Prompts of measurements, by the name of their set: public benchmarks, held-out code, long code, a file of one's own.

Benchmarks come from files in a directory or from the Hub; only a chat's first turn is used, since later turns answer a
model's text. Held-out and long prompts come from a prepared corpus unseen by the model. None are random tokens, which
say nothing about a drafter. Rows are read as in training (`rows.py`, `chats.py`).
"""

import json
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets

from speedstack.eval.data.chat_template import ChatTemplate
from speedstack.eval.data.chats import Chat, checked_ids, prompt_of
from speedstack.eval.data.local_data import FORMATS, data_place, split_files
from speedstack.eval.data.prepared_corpus import corpus_part
from speedstack.eval.data.prompt_settings import PromptSettings
from speedstack.eval.data.rows import SUFFIXES, Row, RowTally, UnusableRow, read_rows
from speedstack.eval.data.task_data import make_prompt_sets

T = TypeVar("T")
Encode = Callable[[str], list[int]]

HELDOUT, LONG = "heldout", "long"
_MAX_ROWS = 10_000  # larger sets are thinned before encoding
_PROGRAM = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{}\n```"
_REASON = "{}\nPlease reason step by step, and put your final answer within \\boxed{{}}."


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's files (names without suffix) and its split on the Hub.

    `instruction` wraps a prompt in a chat, as in the DFlash benchmarks; rows with `turns` have their own.
    """

    files: tuple[str, ...]
    hub: str
    configuration: str | None
    split: str
    instruction: str = "{}"


BENCHMARKS = {
    "humaneval": Benchmark(("humaneval", "prompts-humaneval"), "openai/openai_humaneval", None, "test", _PROGRAM),
    "mbpp": Benchmark(("mbpp", "prompts-mbpp"), "google-research-datasets/mbpp", "sanitized", "test"),
    "math-500": Benchmark(
        ("math-500", "math500", "prompts-math-500", "prompts-math500"),
        "HuggingFaceH4/MATH-500",
        None,
        "test",
        _REASON,
    ),
    "gsm8k": Benchmark(("gsm8k", "gsm8k-test", "prompts-gsm8k"), "openai/gsm8k", "main", "test", _REASON),
    "mt-bench": Benchmark(("mt-bench", "prompts-mt-bench"), "HuggingFaceH4/mt_bench_prompts", None, "train"),
}


@dataclass(frozen=True)
class PromptSet:
    """Token ids of a set's prompts, their source, and notes for readers of the result."""

    name: str
    source: str
    prompts: list[list[int]]
    notes: tuple[str, ...] = ()


@dataclass
class PromptLoader:
    """Sets by name, for one model. `max_tokens` is the longest prompt that leaves room for an answer.

    `corpus` is a prepared corpus, for `heldout` and `long`; `directory` has benchmark files. With `chat_template` a
    benchmark's prompt is a user's message in the tokenizer's template, as chats always are.
    """

    tokenizer: Any
    max_tokens: int
    num_prompts: int
    corpus: Path | None = None
    directory: Path | None = None
    num_heldout_tokens: int = 64
    num_long_tokens: int = 16384
    chat_template: bool = False
    seed: int = 0
    settings: PromptSettings = PromptSettings()  # noqa: RUF009  (frozen)
    _documents: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._template = ChatTemplate(self.tokenizer, self.settings.chat_template_kwargs)

    def load(self, names: Sequence[str]) -> list[PromptSet]:
        """The named sets, in order; `heldout` is two. A name may be a file or directory of rows.

        Raises ValueError for an unknown name, unreadable files, too many unusable rows, too few prompts, and chat
        settings without a chat.
        """
        found = [found for name in names for found in self._load(name)]
        self._template.check_used()
        return found

    def _load(self, name: str) -> Iterator[PromptSet]:
        if name == HELDOUT:
            documents = self._corpus_documents(name)
            made = make_prompt_sets(
                documents, self._encode, self.num_prompts, self._held_length(), self._separator(), self.seed
            )
            for kind, prompts in made.items():
                yield PromptSet(kind, f"held-out documents of {self.corpus}", prompts)
        elif name == LONG:
            yield self._long()
        elif name in BENCHMARKS:
            rows, source = benchmark_rows(name, self.directory)
            yield self._chosen(name, source, rows, BENCHMARKS[name].instruction)
        elif Path(name).suffix in SUFFIXES or Path(name).is_dir():
            yield self._chosen(Path(name).stem, name, read_rows(Path(name)), "{}")
        else:
            known = ", ".join((HELDOUT, *BENCHMARKS, LONG))
            raise ValueError(
                f"no prompt set {name!r}: there are {known}, or the path of a {', '.join(SUFFIXES)} file, or of a "
                "directory of them"
            )

    def _held_length(self) -> int:
        if self.num_heldout_tokens > self.max_tokens:
            raise ValueError(
                f"held-out prompts of {self.num_heldout_tokens} tokens leave no room in the model's window: at most "
                f"{self.max_tokens}"
            )
        return self.num_heldout_tokens

    def _long(self) -> PromptSet:
        length = min(self.num_long_tokens, self.max_tokens)
        notes: tuple[str, ...] = ()
        if length < self.num_long_tokens:
            notes = (f"{LONG}: prompts of {length} tokens, the longest that fit the model, not {self.num_long_tokens}",)
        prompts = long_prompts(
            self._corpus_documents(LONG), self._encode, self.num_prompts, length, self._separator(), self.seed
        )
        return PromptSet(LONG, f"held-out documents of {self.corpus}, joined", prompts, notes)

    def read_file(self, file: Path) -> tuple[list[list[int]], tuple[str, ...]]:
        """Token ids of a file's prompts that fit, and notes on the others. Raises ValueError as `load`."""
        fitting, notes = self._fitting(file.stem, str(file), read_rows(file), "{}")
        self._template.check_used()
        return fitting, notes

    def _chosen(self, name: str, source: str, rows: Sequence[Row], instruction: str) -> PromptSet:
        """Evenly spaced prompts of the set, because benchmarks change in difficulty or subject along the way."""
        num_rendered, kwargs = self._template.num_rendered, self.settings.chat_template_kwargs
        fitting, notes = self._fitting(name, source, rows, instruction)
        if len(fitting) < self.num_prompts:
            raise ValueError(
                f"{source} has {len(fitting)} prompts of 1 to {self.max_tokens} tokens, "
                f"{self.num_prompts} were asked for{f' ({notes[0]})' if notes else ''}"
            )
        if kwargs and self._template.num_rendered > num_rendered:
            source = f"{source}, chat template with {json.dumps(kwargs)}"
        return PromptSet(name, source, spaced(fitting, self.num_prompts), notes)

    def _fitting(
        self, name: str, source: str, rows: Sequence[Row], instruction: str
    ) -> tuple[list[list[int]], tuple[str, ...]]:
        notes = []
        if len(rows) > _MAX_ROWS:
            notes.append(f"{name}: {_MAX_ROWS} of {len(rows)} rows were looked at, evenly spaced")
            rows = spaced(rows, _MAX_ROWS)
        tally = RowTally(source, self.settings.max_unusable_fraction, len(rows))
        encoded: list[list[int]] = []
        for where, row in rows:
            try:
                encoded.append(self._ids(where, row, instruction))
            except UnusableRow as error:
                tally.unusable.append(error)
        tally.check()
        if tally.unusable:
            warnings.warn(tally.summary(), stacklevel=2)
            notes.append(f"{name}: {tally.summary()}")
        fitting = [ids for ids in encoded if 0 < len(ids) <= self.max_tokens]
        if left_out := len(encoded) - len(fitting):
            notes.append(f"{name}: {left_out} of {len(encoded)} prompts do not fit the model, and were left out")
        return fitting, tuple(notes)

    def _ids(self, where: str, row: dict[str, Any] | UnusableRow, instruction: str) -> list[int]:
        prompt = prompt_of(where, row, self.settings.field)
        assert isinstance(row, dict)  # `prompt_of` has refused others
        if isinstance(prompt, list):
            return checked_ids(where, prompt, self.tokenizer)
        if isinstance(prompt, str):
            if not self.chat_template:
                return self._encode(prompt)
            content = prompt if "turns" in row else instruction.format(prompt)
            prompt = Chat([{"role": "user", "content": content}])
        return self._encode(self._template.prompt(where, prompt))

    def _encode(self, text: str) -> list[int]:
        return encode_text(self.tokenizer, text)

    def _separator(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the target's tokenizer has no end token, which separates the documents of a corpus")
        return int(self.tokenizer.eos_token_id)

    def _corpus_documents(self, name: str) -> dict[str, str]:
        if self.corpus is None:
            raise ValueError(f"prompts {name} are made of a prepared corpus: give prompts.corpus")
        if not self._documents:
            self._documents = corpus_documents(self.corpus)
        return self._documents


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def corpus_documents(corpus: Path) -> dict[str, str]:
    """Name -> text of a corpus' held-out documents. Raises ValueError if it is not prepared."""
    heldout = corpus_part(corpus, "heldout", ("name", "text"))
    return dict(zip(heldout["name"], heldout["text"], strict=True))


def long_prompts(
    documents: dict[str, str], encode: Encode, num_prompts: int, num_tokens: int, separator: int, seed: int = 0
) -> list[list[int]]:
    """Prompts of `num_tokens` ids: documents in a drawn order, each after `separator`, the last one cut.

    No document is in two prompts. Raises ValueError for too few documents.
    """
    names = sorted(documents)
    order = iter(random.Random(f"long:{seed}").sample(names, len(names)))
    prompts: list[list[int]] = []
    for _ in range(num_prompts):
        ids: list[int] = []
        while len(ids) < num_tokens:
            name = next(order, None)
            if name is None:
                raise ValueError(
                    f"{len(names)} held-out documents give {len(prompts)} of {num_prompts} prompts of {num_tokens} "
                    "tokens: ask for fewer or shorter ones, or hold out more text"
                )
            ids += [separator, *encode(documents[name])]
        prompts.append(ids[:num_tokens])
    return prompts


def benchmark_rows(name: str, directory: Path | None) -> tuple[list[Row], str]:
    """A benchmark's rows and where they were found: files of `directory` first, then the Hub.

    Files may be <file>.jsonl or .parquet, or in the layout of `eval --data`. Raises ValueError naming the missing
    files.
    """
    benchmark = BENCHMARKS[name]
    if directory is not None:
        for stem in benchmark.files:
            for suffix in FORMATS:
                if (file := directory / f"{stem}{suffix}").is_file():
                    return read_rows(file), str(file)
        file_or_none = split_files(directory, benchmark.hub, benchmark.configuration).get(benchmark.split)
        if file_or_none is not None:
            return read_rows(file_or_none), str(file_or_none)
    try:
        table = datasets.load_dataset(benchmark.hub, benchmark.configuration, split=benchmark.split)
    # Whatever the cause (no network, offline mode, a renamed or gated data set, a full disk), local files help.
    except Exception as error:
        place = directory or Path("DIR")
        tree = data_place(place, benchmark.hub, benchmark.configuration) / f"{benchmark.split}.jsonl"
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        raise ValueError(
            f"prompts {name}: no file{'' if directory is None else f' in {directory}'}, and the data set "
            f"{benchmark.hub} could not be loaded from the Hub ({reason}). Without a network give --prompts.dir "
            f'{place} with {place / name}.jsonl, a prompt each line as {{"prompt": "..."}}, or {tree} '
            "(.parquet will do too)"
        ) from error
    source = f"{benchmark.hub}{f' ({benchmark.configuration})' if benchmark.configuration else ''}, {benchmark.split}"
    return [(f"{source}, row {number}", dict(row)) for number, row in enumerate(table, start=1)], source


def spaced(items: Sequence[T], count: int) -> list[T]:
    """`count` evenly spaced items, from the first on."""
    return [items[i * len(items) // count] for i in range(count)]
