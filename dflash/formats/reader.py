"""Typed values of a drafter's config.json; errors are one line and name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def mapping(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object called `name`, empty if missing. Raises ValueError for another type."""
    found = raw.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"drafter config.json: {name} must be an object, got {found!r}")
    return found or {}


class Reader:
    """Looks a key up in the `nested` objects in order, then in the file's top level `raw`.

    Rotary settings may be in any `rope_parameters` (newer transformers), searched last. Null counts as absent. Raises
    ValueError for a missing key or a wrong type.
    """

    def __init__(self, raw: Mapping[str, Any], *nested: Mapping[str, Any]) -> None:
        places = (*nested, raw)
        self.places = (*places, *(mapping(place, "rope_parameters") for place in places))

    def has(self, name: str) -> bool:
        return any(place.get(name) is not None for place in self.places)

    def value(self, name: str, default: Any = None) -> Any:
        found = next((place[name] for place in self.places if place.get(name) is not None), default)
        if found is None:
            raise ValueError(f"drafter config.json lacks {name}")
        return found

    def integer(self, name: str, default: int | None = None) -> int:
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise ValueError(f"drafter config.json: {name} must be an integer, got {found!r}")
        return found

    def number(self, name: str, default: float | None = None) -> float:
        found = self.value(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise ValueError(f"drafter config.json: {name} must be a number, got {found!r}")
        return float(found)

    def flag(self, name: str) -> bool:
        found = self.value(name, False)
        if not isinstance(found, bool):
            raise ValueError(f"drafter config.json: {name} must be true or false, got {found!r}")
        return found

    def text(self, name: str, default: str) -> str:
        found = self.value(name, default)
        if not isinstance(found, str):
            raise ValueError(f"drafter config.json: {name} must be a string, got {found!r}")
        return found

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.value(name)
        if not isinstance(found, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise ValueError(f"drafter config.json: {name} must be a list of integers, got {found!r}")
        return tuple(found)

    def layer_types(self) -> list[str]:
        kinds = self.value("layer_types", [])
        if not isinstance(kinds, list):
            raise ValueError(f"drafter config.json: layer_types must be a list, got {kinds!r}")
        return kinds

    def shapes(self) -> dict[str, Any]:
        """Fields of `DFlashConfig` that all formats name alike."""
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        return {
            "hidden_size": hidden_size,
            "intermediate_size": self.integer("intermediate_size"),
            "num_hidden_layers": self.integer("num_hidden_layers"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self.integer("num_key_value_heads"),
            "head_dim": self.integer("head_dim", default=hidden_size // max(num_heads, 1)),
            "vocab_size": self.integer("vocab_size"),
            "mask_token_id": self.integer("mask_token_id"),
            "block_size": self.integer("block_size"),
            "rms_norm_eps": self.number("rms_norm_eps"),
            "rope_theta": self.number("rope_theta"),
            "max_position_embeddings": self.integer("max_position_embeddings"),
            "target_sha256": self.text("target_sha256", "") or None,
        }

    def refuse_unknown_numerics(self) -> None:
        """Raises ValueError for settings that this drafter would compute differently."""
        unsupported = {
            "attention_bias": bool(self.value("attention_bias", False)),
            "hidden_act": self.value("hidden_act", "silu") != "silu",
            "rope_scaling": bool(self.value("rope_scaling", False)),
            "rope_type": self.value("rope_type", "default") != "default",
        }
        for name, refused in unsupported.items():
            if refused:
                raise ValueError(f"drafter config.json: {name} = {self.value(name)!r} is not supported by this drafter")
