"""Prompts of a drafter's training from a file or the Hugging Face Hub, as token ids, split and kept on disk.

A prompt is text, token ids, or a chat, which the tokenizer's chat template turns into text. The target or the data set
answers it; only a chat's last answer is trained on. The prepared prompts are kept with a digest of what decided them: a
template may print today's date, and a resumed stage must continue the same prompts. The digest covers a file's content,
but only the name of a data set on the Hub.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from speedstack.eval.data.chat_template import ChatTemplate
from speedstack.eval.data.chats import Chat, Message, checked_ids, checked_text, messages_of, prompt_of
from speedstack.eval.data.rows import Row, RowTally, UnusableRow, read_rows
from speedstack.support.digests import file_sha256, json_sha256
from speedstack.support.files import atomic_path
from speedstack.train.config.drafter import PromptsSection
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.batches import generator
from speedstack.train.core.rundir import set_aside
from speedstack.train.core.trainer import save_tensors
from speedstack.train.data.corpus import quiet_datasets, tokenizer_sha256

_SPLITS = ("heldout", "train")


@dataclass(frozen=True)
class Conversation:
    """Token ids of a prompt and of its given answer; no answer if the target has yet to write it."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class PromptSet:
    """Training and held-out conversations, which share no prompt; `facts` is the content of `prompts.json`."""

    train: list[Conversation]
    heldout: list[Conversation]
    facts: dict[str, Any]


class _LeftOut(Exception):
    """Why a usable row does not fit the settings."""


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Digest of the tokenizer's chat template, or None."""
    template = tokenizer.chat_template
    return None if not template else json_sha256(template)


def prepare_prompts(
    path: Path,
    config: DrafterConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    end_ids: Sequence[int] = (),
    may_replace: bool = False,
) -> PromptSet:
    """The prompts of `config.drafter.prompts`, read from the directory `path` or prepared and written there.

    In an order drawn from `seed` the first rows are held out and the next ones train. Training rows with a held-out
    prompt, rows that are too long and unusable rows are left out with a warning, as is a shortage. `end_ids` end a
    given answer, as does the tokenizer's own; `may_replace` sets aside prompts of other settings instead of refusing
    them.

    Raises ValueError for an unreadable source, too many unusable rows, chats without a chat template, no usable prompt,
    or prompts of other settings at `path`; OSError if that cannot be written.
    """
    section = config.drafter.prompts
    assert section.source is not None
    settings: dict[str, Any] = {
        **section.model_dump(mode="json", exclude={"max_unusable_fraction"}),
        "chat_template_kwargs": section.chat_template_kwargs or None,  # None, as in files from before this setting
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
    if section.responses == "given":  # they do not affect prompts whose answers are written
        settings |= {
            "sequence_length": config.data.sequence_length,
            "block_size": config.drafter.block_size,
            "end_ids": sorted(end_ids),
        }
    if may_replace and (path / "prompts.json").is_file() and _different(path, settings):
        set_aside(path, "prompts")
    if not (path / "prompts.json").is_file():
        _write(path, _Reader(config, tokenizer, end_ids).split(seed), settings)
    return _load(path, settings)


class _Reader:
    """Turns the rows of a source into conversations."""

    def __init__(self, config: DrafterConfig, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> None:
        self.section: PromptsSection = config.drafter.prompts
        self.end_ids = {*end_ids, tokenizer.eos_token_id}
        self.config, self.tokenizer = config, tokenizer
        self.template = ChatTemplate(tokenizer, self.section.chat_template_kwargs)
        self.num_cut = 0  # given answers too long for a window

    def split(self, seed: int) -> dict[str, list[Conversation]]:
        section, drafter = self.section, self.config.drafter
        assert section.source is not None
        rows, tally = self._rows(section.source, section.split)
        order = torch.randperm(len(rows), generator=generator(seed, len(_SPLITS))).tolist()
        stream = iter([rows[i] for i in order])
        if section.heldout_source is None:
            limit = min(drafter.num_eval_sequences, max(1, round(len(rows) * section.heldout_fraction)))
            heldout = self._take(stream, limit, set(), tally, to_train=False)
        else:
            limit = drafter.num_eval_sequences
            apart, other = self._rows(section.heldout_source, section.heldout_split or section.split)
            heldout = self._take(iter(apart), limit, set(), other, to_train=False)
            _finish(other, limit, len(heldout), "num_eval_sequences", "evaluation")
            limit = 0
        held = {tuple(conversation.prompt) for conversation in heldout}
        num_train = drafter.num_sequences if drafter.written_fraction else 0
        train = self._take(stream, num_train, held, tally, to_train=True)
        if not heldout:
            _finish(tally, limit, 0, "num_eval_sequences", "evaluation")
        _finish(tally, num_train, len(train), "num_sequences", "training")
        self.template.check_used()
        if self.num_cut:
            length = self.config.data.sequence_length
            warnings.warn(
                f"{self.num_cut} given answers of {section.source} are cut: data.sequence_length {length} has no room "
                "for all of them",
                stacklevel=2,
            )
        return {"heldout": heldout, "train": train}

    def _rows(self, source: str, split: str) -> tuple[list[Row], RowTally]:
        with quiet_datasets():
            rows = read_rows(source, split)
        return rows, RowTally(source, self.section.max_unusable_fraction)

    def _take(
        self, rows: Iterator[Row], limit: int, held: set[tuple[int, ...]], tally: RowTally, to_train: bool
    ) -> list[Conversation]:
        """The first `limit` usable conversations of `rows`, with distinct prompts if they are held out."""
        taken: list[Conversation] = []
        seen: set[tuple[int, ...]] = set()
        # Stop at the limit: the next row belongs to the next split.
        while len(taken) < limit and (next_row := next(rows, None)) is not None:
            tally.num_rows += 1
            try:
                conversation = self._conversation(*next_row, to_train)
            except UnusableRow as error:
                tally.unusable.append(error)
                continue
            except _LeftOut as reason:
                tally.left_out[str(reason)] += 1
                continue
            key = tuple(conversation.prompt)
            if key in held or (not to_train and key in seen):
                tally.left_out["with a held-out prompt"] += 1
                continue
            seen.add(key)
            taken.append(conversation)
        return taken

    def _conversation(self, where: str, row: dict[str, Any] | UnusableRow, to_train: bool) -> Conversation:
        prompt = prompt_of(where, row, self.section.field)
        assert isinstance(row, dict)  # `prompt_of` has refused others
        is_given = self.section.responses == "given"
        if isinstance(prompt, str) and self.section.as_chat:
            prompt = Chat([{"role": "user", "content": prompt}])
        if isinstance(prompt, Chat):
            conversation = self._of_chat(where, prompt, row, is_given)
        else:
            text = self._response(where, row) if is_given else ""
            if not isinstance(text, str):
                raise UnusableRow(where, f"'{self.section.response_field}' is not text")
            if isinstance(prompt, str):
                conversation = self._encoded(prompt, text)
            else:
                conversation = Conversation(checked_ids(where, prompt, self.tokenizer), self._encode(text))
        window, block = self.config.data.sequence_length, self.config.drafter.block_size
        longest, why = self.config.drafter.prompt_length, "drafter.prompt_length"
        if is_given and to_train:
            longest, why = window - block, "data.sequence_length less drafter.block_size"
        if len(conversation.prompt) > longest:
            raise _LeftOut(f"longer than {longest} tokens ({why})")
        if to_train and len(conversation.prompt) + len(conversation.response) > window:
            self.num_cut += 1
        return conversation

    def _of_chat(self, where: str, chat: Chat, row: dict[str, Any], is_given: bool) -> Conversation:
        if is_given and chat.answer is None:
            chat = chat.with_answer(self._answer(where, row))
        prompt = self.template.prompt(where, chat)
        if not is_given:
            return self._encoded(prompt, "")
        answer = chat.answer
        assert answer is not None
        if not answer["content"].strip() and len(answer) == 2:
            raise UnusableRow(where, "the answer is empty")
        conversation = self._encoded(prompt, self.template.answer(where, chat, prompt))
        response = conversation.response
        # Templates add a line break, which no target writes after its end token.
        end = next((place + 1 for place, token in enumerate(response) if token in self.end_ids), None)
        return Conversation(conversation.prompt, response[:end])

    def _answer(self, where: str, row: dict[str, Any]) -> Message:
        """A row's answer in its own field, as text or a list of one message."""
        if row.get(self.section.response_field) is None:
            raise UnusableRow(where, "the last message is not the assistant's, and responses are to be those given")
        value = self._response(where, row)
        made = messages_of(where, [{"role": "assistant", "content": value}] if isinstance(value, str) else value)
        if len(made) != 1 or made[0]["role"] != "assistant":
            raise UnusableRow(where, f"'{self.section.response_field}' is not one message of the assistant's")
        return made[0]

    def _response(self, where: str, row: dict[str, Any]) -> Any:
        """A row's answer: non-empty text or a list of messages."""
        name = self.section.response_field
        if row.get(name) is None:
            raise UnusableRow(where, f"has no field '{name}'; its fields are {', '.join(row)}")
        value = row[name]
        if isinstance(value, str):
            return checked_text(where, f"'{name}'", value)
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            return value
        raise UnusableRow(where, f"'{name}' is not text")

    def _encoded(self, prompt: str, answer: str) -> Conversation:
        """Prompt and answer ids, the answer's as they follow the prompt's."""
        ids = self._encode(prompt)
        if not answer:
            return Conversation(ids, [])
        whole = self._encode(prompt + answer)
        # Encoded alone, an answer would begin with an extra blank in tokenizers of whole words.
        return Conversation(ids, whole[len(ids) :] if whole[: len(ids)] == ids else self._encode(answer))

    def _encode(self, text: str) -> list[int]:
        # A chat template writes the beginning of the text itself.
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _finish(tally: RowTally, num_wanted: int, num_taken: int, name: str, what: str) -> None:
    """Report a source's rows. Raises ValueError if too many or all are unusable."""
    tally.check()
    summary = tally.summary()
    if num_wanted and not num_taken:
        raise ValueError(f"{tally.source} leaves no usable prompt for {what}{f': {summary}' if summary else ''}")
    if summary:
        warnings.warn(summary, stacklevel=3)
    if num_taken < num_wanted:
        warnings.warn(f"{tally.source} gives {num_taken} of {num_wanted} prompts (drafter.{name})", stacklevel=3)


def _files_sha256(source: str) -> str | None:
    """Digest of the files at `source`; None for a data set on the Hub."""
    place = Path(source)
    if not place.exists():
        return None
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file()):
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def conversations_sha256(conversations: Sequence[Conversation]) -> str:
    """Digest of the token ids and of the split into prompt and answer."""
    digest = hashlib.sha256()
    for conversation in conversations:
        for ids in (conversation.prompt, conversation.response):
            digest.update(len(ids).to_bytes(8, "little") + torch.tensor(ids, dtype=torch.int32).numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, splits: dict[str, list[Conversation]], settings: dict[str, Any]) -> None:
    """Write the directory, whole or not at all."""
    with atomic_path(path) as partial:
        partial.mkdir()
        facts = dict(settings)
        for name, conversations in splits.items():
            parts = [ids for c in conversations for ids in (c.prompt, c.response)]
            lengths = torch.tensor([[len(c.prompt), len(c.response)] for c in conversations], dtype=torch.int32)
            tokens = torch.tensor([token for ids in parts for token in ids], dtype=torch.int32)
            save_tensors({"tokens": tokens, "lengths": lengths.reshape(-1, 2)}, partial / f"{name}.safetensors")
            facts |= {f"num_{name}": len(conversations), f"{name}_sha256": conversations_sha256(conversations)}
        (partial / "prompts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _different(path: Path, settings: dict[str, Any]) -> list[str]:
    """Names of the settings that differ from those of the prompts at `path`."""
    facts = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
    return [name for name, value in settings.items() if facts.get(name) != value]


def _load(path: Path, settings: dict[str, Any]) -> PromptSet:
    facts = json.loads((path / "prompts.json").read_text(encoding="utf-8"))
    if different := _different(path, settings):
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
