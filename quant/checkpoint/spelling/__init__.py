"""config.json in transformers' own spelling, from any spelling that makers, other loaders and older releases use.

transformers keeps a key that it does not know as an attribute that nothing reads, and computes with a default in its
place. So keys of a family's makers are translated here, keys that say the same thing twice must agree, values that
transformers' class has hard-wired must be those, and any other key that it does not read and that sounds like a part of
the computation is refused by name.

fields    a whole config.json: what is read of it, and what is refused
families  what a family's class has hard-wired, and the keys of its makers
rotary    the rotary embedding's keys, of this release of transformers and of older ones
keys      which keys a class reads, and what each check says
"""

from speedstack.quant.checkpoint.spelling.fields import NUM_EXPERTS, transformers_fields

__all__ = ["NUM_EXPERTS", "transformers_fields"]
