"""Answers of a model, kept as they come, so that an interrupted evaluation asks only the open requests.

A directory per model has one append-only JSON-lines file per process. A key is the SHA-256 of task hash and request.
The directory's name covers all else that decides answers: weights, config, tokenizer, dtype, backend, length, software.

A generation is kept with its rounds, which the drafter decides, so `drafting_key` is part of its key; log-likelihoods
have no rounds.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from speedstack import __version__
from speedstack.quant.checkpoint.tokenizer import tokenizer_files
from speedstack.runtime import Engine
from speedstack.runtime.rounds.speculation import NGRAM
from speedstack.support.digests import file_sha256, json_sha256

logger = logging.getLogger(__name__)

# Raise this with every change of the code that changes answers or their file format.
ANSWERS_VERSION = 2
SOFTWARE = ("torch", "transformers", "tokenizers", "lm_eval")
# Files of a model directory that affect answers, beside the weights.
DECISIVE_SUFFIXES = (".json", ".txt", ".model", ".tiktoken", ".jinja")


class RequestCache:
    """Answers by key: all processes' in `directory`, and new ones in this process's file; without one, in memory."""

    def __init__(self, directory: Path | None = None, rank: int = 0) -> None:
        self._answers: dict[str, Any] = {}
        self._path = directory / f"answers-{rank}.jsonl" if directory is not None else None
        self._file: BinaryIO | None = None
        if directory is not None and directory.is_dir():
            for path in sorted(directory.glob("answers-*.jsonl")):
                self._answers.update(_read(path))

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Any:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer of plain JSON types; it is in the file on return."""
        self._answers[key] = answer
        if self._path is None:
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b", buffering=0)
            self._end_line()
        self._file.write(json.dumps([key, answer]).encode() + b"\n")

    def _end_line(self) -> None:
        """Close a line that a kill left unfinished."""
        assert self._file is not None
        if self._file.seek(0, 2) == 0:
            return
        self._file.seek(-1, 2)
        if self._file.read(1) != b"\n":
            self._file.write(b"\n")


def request_key(task_hash: str, kind: str, request: Sequence[Any]) -> str:
    """Key of one request from its task's hash, kind and content, in plain JSON types."""
    return json_sha256([task_hash, kind, *request])


def model_key(engine: Engine, directory: str | Path) -> str:
    """Directory name: a hash of all that decides the engine's answers over the model in `directory`.

    The drafter is not in it, because it changes no answer; see `drafting_key`.
    """
    settings = [engine.backend_name, str(engine.dtype), engine.device.type, engine.max_length]
    software = [ANSWERS_VERSION, __version__, *(version(name) for name in SOFTWARE)]
    return json_sha256([engine.target_sha256, side_files(directory), settings, software])[:24]


def side_files(directory: str | Path) -> dict[str, str]:
    """SHA-256, by name, of files beside the weights that affect answers."""
    return {
        path.name: file_sha256(path)
        for path in sorted(Path(directory).iterdir())
        if path.is_file() and (path.suffix in DECISIVE_SUFFIXES or path in tokenizer_files(directory))
    }


def drafting_key(engine: Engine, drafter: Path | None) -> str:
    """Hash of what decides an engine's rounds beside the text: the drafter in directory `drafter` and the strategy.

    Raises ValueError for an engine with a drafter if `drafter` is None.
    """
    if engine.num_drafts == 0:
        return json_sha256(None)
    if drafter is None:
        raise ValueError("the engine has a drafter, and acceptance is kept by drafter: say where it was loaded from")
    made_of = [engine.drafter_sha256, {} if str(drafter) == NGRAM else side_files(drafter)]
    return json_sha256([made_of, engine.num_drafts, asdict(engine.strategy)])


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    num_broken = 0
    for line in path.read_bytes().splitlines():
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            # A kill truncates the line being written; its request is asked again.
            num_broken += 1
        else:
            yield key, answer
    if num_broken:
        logger.warning("%s: %d unfinished lines are left out, their requests are asked again", path, num_broken)
