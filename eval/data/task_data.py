"""Data of our lm-eval tasks and the prompts of acceptance and timing, made from held-out source files.

A model of ten million parameters that has read only source code must be able to answer: how likely real code is, which
of four real lines comes next, how the first line of a block closes. Everything is a function of (documents, seed), in
any order of documents, a mapping of names to texts. The caller decides what is held out.
"""

import itertools
import json
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NUM_CHOICES = 4
CONTEXT_LINES = 20
CONTEXT_CHARS = 900
MIN_CONTEXT_LINES = 4
# A choice must be informative: no lone bracket and no comment rule.
CHOICE_CHARS = range(12, 89)
# The first line of a code block up to its last word; then its closing brackets and the colon.
BLOCK_OPENING = re.compile(r"(\s*(?:class|def|elif|except|for|if|while|with) .*\w)([\])}]*:)")
PER_DOCUMENT_SHARE = 3  # at most this many times the even share of questions from one document


@dataclass(frozen=True)
class TaskSizes:
    """Maximum number of items of each task, and characters of a perplexity document."""

    num_perplexity_documents: int = 24
    perplexity_chars: int = 2000
    num_next_line: int = 100
    num_close_line: int = 100


NUM_SAME_TEXT = 200
SUITE_SIZES = TaskSizes(num_perplexity_documents=96, perplexity_chars=4000, num_next_line=500, num_close_line=500)


@dataclass(frozen=True)
class SourceFile:
    """A held-out document as lines without trailing blanks."""

    name: str
    lines: tuple[str, ...]


def read_documents(paths: Sequence[str | Path], root: str | Path | None = None) -> dict[str, str]:
    """Texts of the files, by path relative to `root`. Raises ValueError naming a file that is not UTF-8."""
    documents = {}
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path} as UTF-8 text: {error}") from error
        documents[str(path.relative_to(root) if root is not None else path)] = text
    return documents


def make_tasks(
    documents: Mapping[str, str],
    out_dir: str | Path,
    seed: int = 0,
    sizes: TaskSizes | None = None,
    tasks: Collection[str] | None = None,
) -> dict[str, int]:
    """Write one JSON-lines file per task into `out_dir`; returns each one's number of items.

    `tasks` None means all that the documents have items for, and a warning names the others. Raises ValueError if a
    requested task has none.
    """
    sizes = sizes or TaskSizes()
    files = _source_files(documents)
    makers = {
        "heldout_perplexity": lambda: _perplexity_items(files, seed, sizes),
        "next_line": lambda: _next_line_items(files, seed, sizes.num_next_line),
        "close_line": lambda: _close_line_items(files, seed, sizes.num_close_line),
    }
    items = {name: list(make()) for name, make in makers.items() if tasks is None or name in tasks}
    without = [name for name, rows in items.items() if not rows]
    if without:
        said = f"{len(files)} held-out documents give no item for task {' and '.join(without)}"
        if tasks is not None:
            raise ValueError(f"{said}: hold out more text, or leave the task out; close_line is of source code")
        warnings.warn(f"{said}, which is not measured", stacklevel=2)
    for name in items.keys() - without:
        _write_rows(Path(out_dir) / f"{name}.jsonl", items[name])
    return {name: len(rows) for name, rows in items.items() if rows}


def make_same_text(
    documents: Mapping[str, str],
    write: Callable[[list[str]], list[str]],
    out_dir: str | Path,
    num_items: int,
    seed: int = 0,
) -> int:
    """Write the data of task `same_text` into `out_dir`; returns its number of items.

    `write` returns the full-precision model's text after each context. Raises ValueError without a context.
    """
    files = _source_files(documents)
    rng = random.Random(f"same_text:{seed}")

    def candidates(file: SourceFile) -> list[int]:
        return [i for i in range(MIN_CONTEXT_LINES, len(file.lines)) if file.lines[i - 1].strip()]

    places = itertools.islice(_spread_over_files(files, rng, num_items, candidates), num_items)
    contexts = [(file.name, _context(file.lines, i)) for file, i in places]
    if not contexts:
        raise ValueError(f"{len(files)} held-out documents give no item for task same_text: hold out more text")
    texts = write([context for _, context in contexts])
    rows = [
        {"name": name, "context": context, "text": text} for (name, context), text in zip(contexts, texts, strict=True)
    ]
    _write_rows(Path(out_dir) / "same_text.jsonl", rows)
    return len(rows)


def make_prompt_sets(
    documents: Mapping[str, str],
    encode: Callable[[str], list[int]],
    num_prompts: int,
    num_tokens: int,
    prefix_id: int,
    seed: int = 0,
) -> dict[str, list[list[int]]]:
    """Two sets of `num_prompts` prompts of at most `num_tokens` ids: module openings and function bodies.

    "module opening" starts at a document's first token, after the separator `prefix_id`; "function body" ends right
    after a `def` line, and is left out with a warning if there is none. Raises ValueError for too few prompts.
    """
    files = _source_files(documents)
    rng = random.Random(f"prompts:{seed}")
    openings: list[list[int]] = []
    bodies: list[list[int]] = []
    is_code = False
    for file in rng.sample(files, len(files)):
        if len(openings) < num_prompts:
            opening = [prefix_id, *encode(_limit_lines(file.lines, num_tokens * 8))][:num_tokens]
            if len(opening) == num_tokens:
                openings.append(opening)
        headers = [i for i, line in enumerate(file.lines) if re.match(r"\s*def \w+\(.*\):$", line)]
        is_code |= bool(headers)
        headers = [i for i in headers if i >= CONTEXT_LINES]
        if headers and len(bodies) < num_prompts:
            end = rng.choice(headers)
            context = "\n".join(file.lines[max(0, end - 4 * CONTEXT_LINES) : end + 1]) + "\n"
            bodies.append(encode(context)[-num_tokens:])
    sets = {"module opening": openings, "function body": bodies}
    if openings and not is_code:
        del sets["function body"]
        warnings.warn(f"none of {len(files)} held-out documents has a function: no prompts end at one", stacklevel=2)
    for name, prompts in sets.items():
        if len(prompts) < num_prompts:
            raise ValueError(
                f"{len(files)} held-out documents give {len(prompts)} of {num_prompts} prompts ({name}): "
                "hold out more files, or ask for fewer or shorter prompts"
            )
    return sets


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _source_files(documents: Mapping[str, str]) -> list[SourceFile]:
    """Documents in name order, independent of the mapping's order."""
    return [
        SourceFile(name, tuple(line.rstrip() for line in documents[name].splitlines())) for name in sorted(documents)
    ]


def _limit_lines(lines: Sequence[str], max_chars: int) -> str:
    """The first lines that fit into `max_chars`, with newlines; if none fits (prose), the first one's beginning."""
    kept: list[str] = []
    num_chars = 0
    for line in lines:
        num_chars += len(line) + 1
        if num_chars > max_chars:
            break
        kept.append(line)
    if not any(kept):
        return next((line for line in lines if line), "")[:max_chars]
    return "".join(line + "\n" for line in kept)


def _context_start(lines: Sequence[str], end: int) -> int:
    """First line of the context before line `end`: at most CONTEXT_LINES lines and CONTEXT_CHARS characters."""
    start, num_chars = end, 0
    while start > 0 and end - start < CONTEXT_LINES and num_chars + len(lines[start - 1]) + 1 <= CONTEXT_CHARS:
        start -= 1
        num_chars += len(lines[start]) + 1
    return start


def _context(lines: Sequence[str], end: int) -> str:
    """The lines from `_context_start` on, or the end of the previous line if it is too long."""
    start = _context_start(lines, end)
    return ("\n".join(lines[start:end]) if start < end else lines[end - 1][-CONTEXT_CHARS:]) + "\n"


def _perplexity_items(files: Sequence[SourceFile], seed: int, sizes: TaskSizes) -> Iterator[dict]:
    rng = random.Random(f"perplexity:{seed}")
    chosen = rng.sample(files, min(sizes.num_perplexity_documents, len(files)))
    for file in chosen:
        text = _limit_lines(file.lines, sizes.perplexity_chars)
        if text.strip():
            yield {"name": file.name, "text": text}


def _spread_over_files(
    files: Sequence[SourceFile], rng: random.Random, num_items: int, candidates: Callable[[SourceFile], list[int]]
) -> Iterator[tuple[SourceFile, int]]:
    """Candidate (file, line) places in random order; no file gives much more than its even share."""
    places = {file.name: candidates(file) for file in files}
    useful = [file for file in files if places[file.name]]
    share = PER_DOCUMENT_SHARE * (1 + num_items // max(1, len(useful)))
    drawn = [(file, i) for file in useful for i in rng.sample(places[file.name], min(share, len(places[file.name])))]
    rng.shuffle(drawn)
    yield from drawn


def _is_choice(line: str) -> bool:
    stripped = line.strip()
    return len(stripped) in CHOICE_CHARS and any(character.isalpha() for character in stripped)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _next_line_items(files: Sequence[SourceFile], seed: int, num_items: int) -> Iterator[dict]:
    """Four lines, of equal indentation if possible: the true next one, one of the same file, two of other files."""
    rng = random.Random(f"next_line:{seed}")
    by_indent: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for file in files:
        for line in file.lines:
            if _is_choice(line):
                by_indent[_indent(line)].append((file.name, line))

    def candidates(file: SourceFile) -> list[int]:
        return [i for i in range(MIN_CONTEXT_LINES, len(file.lines)) if _is_choice(file.lines[i])]

    num_made = 0
    for file, i in _spread_over_files(files, rng, num_items, candidates):
        if num_made == num_items:
            return
        answer = file.lines[i]
        context_lines = file.lines[_context_start(file.lines, i) : i]
        excluded = {line.strip() for line in context_lines} | {answer.strip()}
        if len(context_lines) < MIN_CONTEXT_LINES or answer.strip() in {line.strip() for line in context_lines}:
            continue
        pool = by_indent[_indent(answer)]
        distractors: list[str] = []
        for wanted, same_file in ((1, True), (NUM_CHOICES - 2, False)):
            lines = sorted({line for name, line in pool if (name == file.name) == same_file})
            lines = [line for line in lines if line.strip() not in excluded]
            drawn = rng.sample(lines, min(wanted, len(lines)))
            distractors += drawn
            excluded |= {line.strip() for line in drawn}
        if len(distractors) < NUM_CHOICES - 1:
            continue
        choices = [answer, *distractors]
        rng.shuffle(choices)
        context = "\n".join(context_lines) + "\n"
        yield {"name": file.name, "context": context, "choices": choices, "label": choices.index(answer)}
        num_made += 1


def _close_line_items(files: Sequence[SourceFile], seed: int, num_items: int) -> Iterator[dict]:
    """First lines of blocks without closing brackets and colon; half have brackets to close."""
    rng = random.Random(f"close_line:{seed}")

    def openings(has_brackets: bool) -> Iterator[tuple[SourceFile, int]]:
        def candidates(file: SourceFile) -> list[int]:
            matches = [(i, BLOCK_OPENING.fullmatch(line)) for i, line in enumerate(file.lines)]
            matches = matches[MIN_CONTEXT_LINES:]
            return [i for i, match in matches if match is not None and (match[2] != ":") == has_brackets]

        return _spread_over_files(files, rng, num_items, candidates)

    pairs = zip(openings(True), openings(False), strict=False)
    for file, i in itertools.islice(itertools.chain.from_iterable(pairs), num_items):
        match = BLOCK_OPENING.fullmatch(file.lines[i])
        assert match is not None  # it is a candidate
        context = "\n".join((*file.lines[_context_start(file.lines, i) : i], match[1]))
        yield {"name": file.name, "context": context, "answer": match[2]}
