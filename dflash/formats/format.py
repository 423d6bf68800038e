"""The description of a drafter format: translation of config.json and tensors, and unsupported options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from speedstack.dflash.config import DFlashConfig

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """Target data that some formats need: name (a path or Hub id), class, and LM head [V, D]."""

    name: str | None = None
    architectures: tuple[str, ...] = ()
    head_VD: Tensor | None = None


@dataclass(frozen=True)
class DrafterFormat:
    """One format. `lacks`: options of `DFlashConfig` that it cannot express, refused by name when written.

    `from_tensors` maps stored names to `DFlashDraftModel.state_dict`'s, `to_tensors` back; both may raise a one-line
    ValueError. The mask embedding is separate: see `dflash.checkpoint`.
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
        """Raises ValueError naming an option that the format cannot express."""
        for name, value in config.options.items():
            if name in self.lacks:
                raise ValueError(
                    f"{self.title} cannot express {name} = {value}, which this drafter has; "
                    "the formats that can are named by --to in `speedstack convert --help`"
                )
