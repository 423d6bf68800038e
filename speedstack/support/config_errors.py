"""Config errors as one line that names the key, the problem and the given value.

pydantic and tyro print frames, types and links instead. An unknown key names the nearest known one.
"""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from speedstack.support.near_miss import nearest


def describe_validation_error(error: ValidationError, config_type: type[BaseModel]) -> str:
    """All problems of a `ValidationError` in one line, by dotted key."""
    problems = []
    section = _section_named(error.title, config_type)
    for item in error.errors():
        key = ".".join([*section, *map(str, item["loc"])])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'{nearest_key(key, config_type)}")
        else:
            # A validator's message may begin with the key itself.
            message = item["msg"].removeprefix("Value error, ")
            prefix = f"{key}: " if key and not message.startswith(f"{key}.") else ""
            # A validator of a whole section names the field in its message.
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            problems.append(f"{prefix}{message}{got}"[:300])
    return "; ".join(problems)


def validation_error(stop: BaseException) -> ValidationError | None:
    """The pydantic error behind tyro's `stop`, or None."""
    below: BaseException | None = stop
    while below is not None and not isinstance(below, ValidationError):
        below = below.__context__
    return below


def _section_named(title: str, config_type: type[BaseModel]) -> list[str]:
    """The key of the section whose type has this name, if any; tyro builds each section separately."""
    keys = [
        name for name, field in config_type.model_fields.items() if getattr(field.annotation, "__name__", "") == title
    ]
    return keys if len(keys) == 1 else []


def dotted_keys(config_type: type[BaseModel]) -> list[str]:
    """Every section and field, `section.field`."""
    keys = []
    for name, field in config_type.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.extend(f"{name}.{inner}" for inner in dotted_keys(field.annotation))
    return keys


def nearest_key(key: str, config_type: type[BaseModel], prefix: str = "") -> str:
    """An addition to a message about an unknown key: the nearest key behind `prefix`, or all sections."""
    known = dotted_keys(config_type)
    # The last part finds a key in the wrong section better than the whole path.
    leaf = key.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    matches = [by_leaf[leaf]] if leaf in by_leaf else nearest(key, known)
    matches = matches or [by_leaf[name] for name in nearest(leaf, by_leaf)]
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else f"; known: {', '.join(config_type.model_fields)}"
