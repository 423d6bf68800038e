"""Prompts of a drafter's training from a file or the Hugging Face Hub, as token ids, split and kept on disk.

A prompt is text, or a chat: a list of messages, which the chat template of the target's tokenizer makes into text. The
target answers it, or the set brings the answers. What was made of the source is kept beside the text that the target
writes, with the digest of everything that decided it, and read from there ever after: a template may print today's
date, and a stage that is resumed tomorrow must still continue the same prompts.

Only the last answer of a chat is trained on; earlier ones are context. Of a file the content is part of the digest, of
a data set on the hub the name alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from speedstack.eval.prompts import Row, read_rows
from speedstack.train.config import DrafterConfig
from speedstack.train.corpus import load_table, quiet_datasets, tokenizer_sha256
from speedstack.train.data import generator
from speedstack.train.drafter_config import PromptsSection
from speedstack.train.trainer import save_tensors

_SPLITS = ("heldout", "train")


@dataclass(frozen=True)
class Conversation:
    """Token ids of a prompt and of the answer that came with it; no answer: the target has yet to write it."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class PromptSet:
    """Conversations to train on and held-out ones, which share no prompt; `facts` is what `prompts.json` says."""

    train: list[Conversation]
    heldout: list[Conversation]
    facts: dict[str, Any]


class _Skipped(Exception):
    """Why a row is left out and counted."""


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of the tokenizer's chat template; None where it has none."""
    template = tokenizer.chat_template
    return None if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def prepare_prompts(path: Path, config: DrafterConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PromptSet:
    """The prompts of `config.drafter.prompts`, made and written to the directory `path`, or read from there.

    Of the rows in an order drawn from `seed`, the first are held out and the next train, as many as the config takes
    of either; a training row whose prompt is held out is left out. Rows that are empty or too long are left out with
    one warning that counts them.

    Raises ValueError, one line, for a source that cannot be read, a row without the field, messages that the template
    does not take, a tokenizer without one, no usable prompt, and when `path` holds prompts made with other settings;
    OSError when it cannot be written.
    """
    section = config.drafter.prompts
    assert section.source is not None
    settings: dict[str, Any] = {
        **section.model_dump(mode="json"),
        "source_sha256": _files_sha256(section.source),
        "heldout_source_sha256": section.heldout_source and _files_sha256(section.heldout_source),
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "chat_template_sha256": chat_template_sha256(tokenizer),
        "prompt_length": config.drafter.prompt_length,
        "with_train": config.drafter.written_fraction > 0,
        "num_sequences": config.drafter.num_sequences,
        "num_eval_sequences": config.drafter.num_eval_sequences,
        "text_seed": seed,
    }
    if section.responses == "given":  # of written answers these decide nothing that is here
        settings |= {"sequence_length": config.data.sequence_length, "block_size": config.drafter.block_size}
    if not (path / "prompts.json").is_file():
        _write(path, _Reader(config, tokenizer).split(seed), settings)
    return _load(path, settings)


class _Reader:
    """Rows of a source to conversations."""

    def __init__(self, config: DrafterConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.section: PromptsSection = config.drafter.prompts
        self.config, self.tokenizer = config, tokenizer
        self.skipped: Counter[str] = Counter()

    def split(self, seed: int) -> dict[str, list[Conversation]]:
        section, drafter = self.section, self.config.drafter
        assert section.source is not None
        rows = self._rows(section.source, section.split)
        order = torch.randperm(len(rows), generator=generator(seed, len(_SPLITS))).tolist()
        shuffled = [rows[i] for i in order]
        if section.heldout_source is None:
            limit = min(drafter.num_eval_sequences, max(1, round(len(rows) * section.heldout_fraction)))
            stream = iter(shuffled)
            heldout = self._take(stream, limit, set(), to_train=False)
        else:
            apart = self._rows(section.heldout_source, section.heldout_split or section.split)
            heldout = self._take(iter(apart), drafter.num_eval_sequences, set(), to_train=False)
            stream = iter(shuffled)
        held = {tuple(conversation.prompt) for conversation in heldout}
        train = self._take(stream, drafter.num_sequences, held, to_train=True) if drafter.written_fraction else []
        counts = ", ".join(f"{number} {reason}" for reason, number in sorted(self.skipped.items()))
        if not heldout or (drafter.written_fraction and not train):
            what = "training" if heldout else "evaluation"
            raise ValueError(f"{section.source} leaves no usable prompt for {what}{f': {counts}' if counts else ''}")
        if counts:
            warnings.warn(f"prompts of {section.source} left out: {counts}", stacklevel=2)
        return {"heldout": heldout, "train": train}

    def _rows(self, source: str, split: str) -> list[Row]:
        """All rows, each checked to have the fields that are asked for."""
        field = self.section.field
        rows = list(_read_rows(source, split))
        for where, row in rows:
            with_answer = self.section.responses == "given" and isinstance(row.get(field), str)
            needed = [field, self.section.response_field] if with_answer else [field]
            absent = [name for name in needed if row.get(name) is None]
            if absent:
                raise ValueError(f"{where} has no field '{absent[0]}'; its fields are {', '.join(row) or 'none'}")
        return rows

    def _take(self, rows: Iterator[Row], limit: int, held: set[tuple[int, ...]], to_train: bool) -> list[Conversation]:
        """The first `limit` usable conversations of `rows`; different prompts where they are to be held out."""
        taken: list[Conversation] = []
        seen: set[tuple[int, ...]] = set()
        # Not beyond the limit: the row after the last one is for the next split.
        while len(taken) < limit and (next_row := next(rows, None)) is not None:
            where, row = next_row
            try:
                conversation = self._conversation(where, row, to_train)
            except _Skipped as reason:
                self.skipped[str(reason)] += 1
                continue
            key = tuple(conversation.prompt)
            if key in held or (not to_train and key in seen):
                self.skipped["with a held-out prompt"] += 1
                continue
            seen.add(key)
            taken.append(conversation)
        return taken

    def _conversation(self, where: str, row: dict[str, Any], to_train: bool) -> Conversation:
        value = row[self.section.field]
        is_given = self.section.responses == "given"
        if isinstance(value, str):
            if not value.strip():
                raise _Skipped("empty")
            answer = self._given_text(where, row) if is_given else None
            if self.section.as_chat:
                conversation = self._chat(where, [{"role": "user", "content": value}], answer)
            else:
                conversation = Conversation(self._encode(value), self._encode(answer) if answer is not None else [])
        else:
            messages, answer = self._messages(where, value)
            conversation = self._chat(where, messages, answer)
        longest = self.config.drafter.prompt_length
        if is_given and to_train:
            longest = self.config.data.sequence_length - self.config.drafter.block_size
        if len(conversation.prompt) > longest:
            raise _Skipped(f"longer than {longest} tokens")
        if is_given and not conversation.response:
            raise _Skipped("without an answer")
        return conversation

    def _messages(self, where: str, value: Any) -> tuple[list[dict[str, Any]], str | None]:
        """Messages up to the answer, and the answer if it is to be kept."""
        if not isinstance(value, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        ):
            raise ValueError(f"{where}: '{self.section.field}' is neither text nor messages with a role and content")
        is_given = self.section.responses == "given"
        ends_with_answer = bool(value) and value[-1]["role"] == "assistant"
        if is_given and value and not ends_with_answer:
            raise ValueError(f"{where}: the last message is not the assistant's, and responses are to be those given")
        messages = value[:-1] if ends_with_answer else value
        if not messages or not messages[-1]["content"].strip():
            raise _Skipped("empty")
        return messages, value[-1]["content"] if is_given else None

    def _given_text(self, where: str, row: dict[str, Any]) -> str:
        answer = row[self.section.response_field]
        if not isinstance(answer, str):
            raise ValueError(f"{where}: '{self.section.response_field}' is not text")
        return answer

    def _chat(self, where: str, messages: list[dict[str, Any]], answer: str | None) -> Conversation:
        prompt = self._render(where, messages, add_generation_prompt=True)
        if answer is None:
            return Conversation(self._encode(prompt), [])
        whole = self._render(where, [*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise ValueError(f"{where}: the chat template changes the prompt once an answer follows: give both as text")
        response = self._encode(whole[len(prompt) :]) if answer.strip() else []
        end = self.tokenizer.eos_token_id
        if end in response:  # templates go on with a line break, which no target writes after its end token
            response = response[: response.index(end) + 1]
        return Conversation(self._encode(prompt), response)

    def _render(self, where: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"{where} is a chat, and the tokenizer of {self.config.drafter.target} has no chat template: "
                "give prompts as text, or save the tokenizer with a chat_template"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of its own, and raises what it likes
            raise ValueError(f"{where}: the chat template refuses it: {' '.join(str(error).split())}") from error
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _read_rows(source: str, split: str) -> Iterator[Row]:
    """Rows of a source; of a .jsonl a bad line is named."""
    place = Path(source)
    if place.exists() and split != "train":
        raise ValueError(f"{place} is a file or directory, which has no split '{split}': leave prompts.split out")
    if place.is_file() and place.suffix == ".jsonl":
        yield from read_rows(place)
        return
    with quiet_datasets():
        table = load_table(source, split)
    for number, row in enumerate(table):
        yield f"{source} row {number}", dict(row)


def _files_sha256(source: str) -> str | None:
    """Digest of the content of a file or of a directory's files; None for a data set on the hub."""
    place = Path(source)
    if not place.exists():
        return None
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file()):
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


def conversations_sha256(conversations: Sequence[Conversation]) -> str:
    """Digest of the token ids, and of which of them are prompts."""
    digest = hashlib.sha256()
    for conversation in conversations:
        for ids in (conversation.prompt, conversation.response):
            digest.update(len(ids).to_bytes(8, "little") + torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, splits: dict[str, list[Conversation]], settings: dict[str, Any]) -> None:
    """Write the directory whole: to a temporary one, which is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".partial", dir=path.parent))
    try:
        facts = dict(settings)
        for name, conversations in splits.items():
            parts = [ids for c in conversations for ids in (c.prompt, c.response)]
            lengths = torch.tensor([[len(c.prompt), len(c.response)] for c in conversations], dtype=torch.int32)
            tokens = torch.tensor([token for ids in parts for token in ids], dtype=torch.int32)
            save_tensors({"tokens": tokens, "lengths": lengths.reshape(-1, 2)}, temporary / f"{name}.safetensors")
            facts |= {f"num_{name}": len(conversations), f"{name}_sha256": conversations_sha256(conversations)}
        (temporary / "prompts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(path: Path, settings: dict[str, Any]) -> PromptSet:
    facts = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
    different = [name for name, value in settings.items() if facts.get(name) != value]
    if different:
        raise ValueError(
            f"{path} holds prompts made with another {', '.join(different)}: choose another drafter.text or delete it"
        )
    splits = {}
    for name in _SPLITS:
        file = path / f"{name}.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is missing or corrupt ({error}): delete {path} and run again") from error
        pieces = tensors["tokens"].split(tensors["lengths"].flatten().tolist())
        ids = [piece.tolist() for piece in pieces]
        splits[name] = [Conversation(*pair) for pair in zip(ids[::2], ids[1::2], strict=True)]
        if conversations_sha256(splits[name]) != facts[f"{name}_sha256"]:
            raise ValueError(f"{file} is not what was written: delete {path} and run again")
    return PromptSet(splits["train"], splits["heldout"], facts)
