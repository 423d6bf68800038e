"""Keys that transformers' classes read, and checks of single keys. Errors are one-line ValueErrors, no file name."""

import dataclasses
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from speedstack.support.near_miss import nearest

Fields = dict[str, Any]
# Names that source code reads from a config or has as strings.
_READ = re.compile(r"""\bconfig\.(\w+)|["'](\w+)["']""")


def check_numbers(fields: Fields) -> None:
    """Raises ValueError for NaN and infinity, which are not JSON but which Python reads."""
    for key, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key} is {value}: correct it")


def check_same(fields: Fields, first: str, second: str) -> None:
    """Raises ValueError if two keys with one meaning are both present and differ."""
    one, other = fields.get(first), fields.get(second)
    if one is not None and other is not None and one != other:
        raise ValueError(f"{first} {one!r} and {second} {other!r} contradict each other: correct one of the two")


def own_keys(config_class: type[PreTrainedConfig]) -> set[str]:
    """The keys that a family's class has fields for, under both names if there are two."""
    fields = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return fields | config_class.attribute_map.keys() | set(config_class.attribute_map.values())


def hint(key: str, known: set[str]) -> str:
    """The nearest known key as the end of a message, or nothing."""
    return "".join(f" (did you mean '{near}'?)" for near in nearest(key, sorted(known), cutoff=0.8))


@cache
def words(module: str) -> frozenset[str]:
    """Names that a family's source reads from a config or has as strings; other keys are not read."""
    place = Path(str(sys.modules[module].__file__))
    model = place.with_name(place.name.replace("configuration_", "modeling_"))
    texts = [file.read_text("utf-8") for file in (place, model) if file.is_file()]
    # Derived attributes, which a config saves.
    derived = re.findall(r"\bself\.(\w+) =", texts[0])
    return frozenset(derived).union(*(match for text in texts for match in _READ.findall(text)))
