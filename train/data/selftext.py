"""Text a target wrote itself: what a drafter for it should be trained and judged on.

The engine that will serve the target continues prompts, so the labels are the very tokens a drafter has to predict.
Generating is slow, so it is a stage with shards on disk: they are written atomically, shared among ranks, and only
missing ones are generated. `settings.json` keeps a directory to one target, set of prompts and sampling.

Pieces of documents are equally long, and end-of-text does not stop them. A user's prompts may have any lengths, and the
target ends its answers.

Shapes: N sequences, P prompt tokens, T tokens of prompt and continuation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file

from speedstack.support.digests import json_sha256
from speedstack.support.files import atomic_path, write_atomically
from speedstack.train.core.batches import generator
from speedstack.train.core.rundir import set_aside
from speedstack.train.core.trainer import save_tensors

if TYPE_CHECKING:
    from speedstack.runtime import Engine

SEQUENCES_A_SHARD = 64
_OPENING_EVERY = 4  # every fourth prompt begins a document, the others start anywhere in one


@dataclass(frozen=True)
class Sampling:
    """How a continuation is drawn; `temperatures` alternate by shard.

    With `stops_at_eos` it ends at the target's end token. `chat_template_sha256` is None without a template.
    """

    num_new_tokens: int
    temperatures: tuple[float, ...] = (0.0,)
    top_p: float = 1.0
    seed: int = 0
    stops_at_eos: bool = False
    chat_template_sha256: str | None = None


Prompts = torch.Tensor | Sequence[Sequence[int]]  # int64 [N, P], or lists of any lengths


def cut_prompts(documents: Dataset, num_prompts: int, length: int, *keys: int) -> torch.Tensor:
    """Prompts int64 [N, P] within single documents, a function of `keys`. Raises ValueError if all are too short."""
    eligible = [ids for ids in documents["input_ids"] if len(ids) > length]
    if not eligible:
        raise ValueError(f"no document has more than drafter.prompt_length = {length} tokens: lower it")
    rng = generator(*keys)
    weights = torch.tensor([len(ids) - length for ids in eligible], dtype=torch.float64)
    chosen = torch.multinomial(weights, num_prompts, replacement=True, generator=rng).tolist()
    openings = torch.randint(len(eligible), (num_prompts,), generator=rng).tolist()
    fractions = torch.rand(num_prompts, dtype=torch.float64, generator=rng).tolist()
    prompts = []
    for i in range(num_prompts):
        if i % _OPENING_EVERY == 0:
            ids = eligible[openings[i]]
            # A document follows a separator, as in a packed window; its own last token is one.
            prompts.append([ids[-1], *ids[: length - 1]])
        else:
            ids = eligible[chosen[i]]
            start = int(fractions[i] * (len(ids) - length))
            prompts.append(ids[start : start + length])
    return torch.tensor(prompts, dtype=torch.int64)


def continue_prompts(
    path: Path,
    make_engine: Callable[[], Engine],
    target_sha256: str,
    prompts: Prompts,
    sampling: Sampling,
    rank: int = 0,
    world_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> None:
    """Write this rank's missing shards of the continuations of `prompts` into the directory `path`.

    `make_engine` is called only if a shard is missing. `on_progress(done)` counts this rank's sequences, existing ones
    first. Raises ValueError if `path` holds text of other settings, OSError if it cannot be written.
    """
    settings = _settings(target_sha256, prompts, sampling)
    path.mkdir(parents=True, exist_ok=True)
    if (path / "settings.json").is_file():
        _check_settings(path, settings)
    elif rank == 0:
        write_atomically(path / "settings.json", json.dumps(settings, indent=2) + "\n")
    mine = _shards_of(len(prompts), rank, world_size)
    missing = [shard for shard in mine if not _shard_path(path, shard).is_file()]
    done = sum(len(_rows(shard, len(prompts))) for shard in mine if shard not in missing)
    if on_progress is not None:
        on_progress(done)
    engine = make_engine() if missing else None
    for shard in missing:
        assert engine is not None
        rows = _rows(shard, len(prompts))
        continuations: list[list[int]] = []
        # Answers end at different times: the engine refills finished rows from the rest of the shard.
        num_at_once = len(rows) if sampling.stops_at_eos else engine.max_batch_size
        for start in range(0, len(rows), num_at_once):
            part = rows[start : start + num_at_once]
            generations = engine.generate(
                [_as_list(prompts[i]) for i in part],
                max_new_tokens=sampling.num_new_tokens,
                temperature=sampling.temperatures[shard % len(sampling.temperatures)],
                top_p=sampling.top_p,
                seed=[sampling.seed + i for i in part],
                ignore_eos=not sampling.stops_at_eos,
            )
            continuations += [generation.tokens for generation in generations]
            done += len(part)
            if on_progress is not None:
                on_progress(done)
        file = _shard_path(path, shard)
        tensors = _shard_tensors(prompts[rows.start : rows.stop], continuations)
        try:
            with atomic_path(file) as partial:
                save_tensors(tensors, partial)
        except OSError as error:
            raise OSError(
                f"cannot write {file}: {error.strerror or error}; make room, then run the same command again to go on"
            ) from error


def load_text(path: Path, target_sha256: str, prompts: Prompts, sampling: Sampling) -> list[torch.Tensor]:
    """Prompts with continuations, int64 each, in the order of the prompts.

    Raises ValueError for a missing or corrupt shard and for other settings.
    """
    _check_settings(path, _settings(target_sha256, prompts, sampling))
    sequences: list[torch.Tensor] = []
    for shard in _shards_of(len(prompts), 0, 1):
        file = _shard_path(path, shard)
        rows = _rows(shard, len(prompts))
        try:
            tensors = load_file(file)
            if isinstance(prompts, torch.Tensor):
                sequences += tensors["tokens"].long().unbind()
                continue
            answers = tensors["responses"].long().split(tensors["lengths"].tolist())
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(f"{file} is missing or corrupt ({error}): delete it and run again") from error
        sequences += [torch.cat([torch.tensor(prompts[i]), a]) for i, a in zip(rows, answers, strict=True)]
    return sequences


def num_sequences_of(num_sequences: int, rank: int, world_size: int) -> int:
    """How many of `num_sequences` a rank writes."""
    return sum(len(_rows(shard, num_sequences)) for shard in _shards_of(num_sequences, rank, world_size))


def _shards_of(num_sequences: int, rank: int, world_size: int) -> range:
    return range(rank, math.ceil(num_sequences / SEQUENCES_A_SHARD), world_size)


def _rows(shard: int, num_sequences: int) -> range:
    return range(shard * SEQUENCES_A_SHARD, min((shard + 1) * SEQUENCES_A_SHARD, num_sequences))


def _shard_path(path: Path, shard: int) -> Path:
    return path / f"shard-{shard:05d}.safetensors"


def _as_list(ids: torch.Tensor | Sequence[int]) -> list[int]:
    return ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)


def _shard_tensors(prompts: Prompts, continuations: list[list[int]]) -> dict[str, torch.Tensor]:
    """A shard's int32 tensors: `tokens` [n, T] for equally long prompts, else joined `responses` and `lengths`."""
    if isinstance(prompts, torch.Tensor):
        return {"tokens": torch.cat([prompts, torch.tensor(continuations)], dim=1).int()}
    responses = torch.tensor([token for tokens in continuations for token in tokens], dtype=torch.int32)
    return {"responses": responses, "lengths": torch.tensor([len(c) for c in continuations], dtype=torch.int32)}


def _prompts_sha256(prompts: Prompts) -> str:
    if isinstance(prompts, torch.Tensor):
        return hashlib.sha256(prompts.numpy().tobytes()).hexdigest()
    return json_sha256([list(ids) for ids in prompts])


def _settings(target_sha256: str, prompts: Prompts, sampling: Sampling) -> dict[str, object]:
    settings = {"target_sha256": target_sha256, "prompts_sha256": _prompts_sha256(prompts), **asdict(sampling)}
    if not sampling.stops_at_eos:  # pieces of documents have no template, and nothing stops them
        del settings["stops_at_eos"], settings["chat_template_sha256"]
    return json.loads(json.dumps(settings))  # tuples become lists, as in the file


def make_way(path: Path, target_sha256: str, prompts: Prompts, sampling: Sampling) -> None:
    """Set aside text at `path` made with other settings, or delete settings without text."""
    file = path / "settings.json"
    if not file.is_file() or not _different(file, _settings(target_sha256, prompts, sampling)):
        return
    if any(path.glob("shard-*.safetensors")):
        set_aside(path, "text")
    else:
        file.unlink()


def _different(file: Path, settings: dict[str, object]) -> list[str]:
    stored = json.loads(file.read_text(encoding="utf-8"))
    return [name for name, value in settings.items() if stored.get(name) != value]


def _check_settings(path: Path, settings: dict[str, object]) -> None:
    """Raise ValueError if `path` holds no text or text made with other settings."""
    file = path / "settings.json"
    if not file.is_file():
        raise ValueError(f"{path} holds no written text: {file.name} is missing")
    if different := _different(file, settings):
        raise ValueError(
            f"{path} holds text generated with another {', '.join(different)}: choose another drafter.text or delete it"
        )
