"""What a format is: how its config.json and its tensors are told from ours, and what it cannot say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from speedstack.dflash.config import DFlashConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """What some formats want to know of the target: its name (a path, or one of the Hub), class, and LM head [V, D]."""

    name: str | None = None
    architectures: tuple[str, ...] = ()
    head_VD: Tensor | None = None


@dataclass(frozen=True)
class DrafterFormat:
    """One format. `lacks`: options of `DFlashConfig` that it cannot express, refused by name when written.

    `from_tensors` maps stored names to those of `DFlashDraftModel.state_dict`; `to_tensors` the other way. Either may
    raise ValueError, one line. The mask embedding is no tensor of these: see `dflash.checkpoint`.
    """

    name: str
    title: str
    lacks: frozenset[str]
    recognizes: Callable[[Mapping[str, Any]], bool]
    from_json: Callable[[Mapping[str, Any]], DFlashConfig]
    to_json: Callable[[DFlashConfig, str, Target], dict[str, Any]]
    from_tensors: Callable[[Tensors, DFlashConfig], Tensors]
    to_tensors: Callable[[Tensors, DFlashConfig, Target], Tensors]

    def refuse_options(self, config: DFlashConfig) -> None:
        """Raise ValueError naming an option of this drafter that the format cannot express."""
        for name, value in config.options.items():
            if name in self.lacks:
                raise ValueError(
                    f"{self.title} cannot express {name} = {value}, which this drafter has; "
                    "the formats that can are named by --to in `speedstack convert --help`"
                )
