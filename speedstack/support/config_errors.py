"""What is wrong in a config, as one line that names the key.

pydantic and tyro say it in frames, with types and links; whoever wrote the file or the flag wants the key, the problem
and what was given. An unknown key names the nearest known one.
"""

from __future__ import annotations

from pydantic import BaseModel, ValidationError

from speedstack.support.near_miss import nearest


def describe_validation_error(error: ValidationError, config_type: type[BaseModel]) -> str:
    """All problems of a `ValidationError` in one line, each with its dotted key; unknown keys name the nearest one."""
    problems = []
    section = _section_named(error.title, config_type)
    for item in error.errors():
        key = ".".join([*section, *map(str, item["loc"])])
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key '{key}'{nearest_key(key, config_type)}")
        else:
            # Messages of validators may begin with the key themselves.
            message = item["msg"].removeprefix("Value error, ")
            prefix = f"{key}: " if key and not message.startswith(f"{key}.") else ""
            # A validator that looks at a whole section names what is wrong in it.
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            problems.append(f"{prefix}{message}{got}"[:300])
    return "; ".join(problems)


def validation_error(stop: BaseException) -> ValidationError | None:
    """What pydantic refused, where that is why tyro gave up with `stop`; None where it is not."""
    below: BaseException | None = stop
    while below is not None and not isinstance(below, ValidationError):
        below = below.__context__
    return below


def _section_named(title: str, config_type: type[BaseModel]) -> list[str]:
    """The key of the section whose type has this name, where there is one: tyro makes each section by itself."""
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
    """What to add to a message about an unknown key: the nearest known one behind `prefix`, or all sections."""
    known = dotted_keys(config_type)
    # A key in the wrong section is nearer by its last part than by its whole path.
    leaf = key.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in known}
    matches = [by_leaf[leaf]] if leaf in by_leaf else nearest(key, known)
    matches = matches or [by_leaf[name] for name in nearest(leaf, by_leaf)]
    return f"; did you mean '{prefix}{matches[0]}'?" if matches else f"; known: {', '.join(config_type.model_fields)}"
