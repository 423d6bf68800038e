"""Translates config.json from the spellings of makers, other loaders and older releases to transformers' own.

transformers keeps an unknown key as an attribute that nothing reads and computes with a default. So makers' keys are
translated, duplicate keys must agree, hard-wired values must match, and unread keys that may matter are refused by
name.

    fields    a whole config.json: what is read of it, and what is refused
    families  hard-wired values and makers' keys, by family
    rotary    the rotary embedding's keys, current and older
    keys      which keys a class reads, and checks of single keys
"""

from speedstack.quant.checkpoint.spelling.fields import NUM_EXPERTS, transformers_fields

__all__ = ["NUM_EXPERTS", "transformers_fields"]
