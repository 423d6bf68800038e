"""Defects of model directories: what a download, a hand or another program leaves behind, one function a kind.

Each takes a generator of random numbers and a directory of one file or of shards under an index, and changes it in
place; some raise `NotHere` where the directory has nothing to damage that way.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Mutation = Callable[[random.Random, Path], None]
# How a directory has to be taken: read as if nothing had happened; that or refused; or refused by every reader.
# The rest may also be read as transformers does.
MUST_BE_READ: set[str] = set()
READ_OR_REFUSED: set[str] = set()
MUST_BE_REFUSED: set[str] = set()
MUTATIONS: dict[str, Mutation] = {}

RUBBISH: list[Any] = [None, "", "many", -1, 0, 1.5, True, [], {}, [1, 2], {"a": 1}, "0.5", float("nan"), float("inf")]
HARMLESS = {
    "_commit_hash": "0123",
    "auto_map": {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"},
    "license": "mit",
    "initializer_range": 0.5,
    "use_cache": False,
    "router_aux_loss_coef": 0.7,
    "output_router_logits": False,
    "transformers_version": "4.40.0",
    "attention_dropout": 0.0,
    "torchscript": False,
    "num_nextn_predict_layers": 1,
}
COMPUTATIONAL = {
    "attn_logit_softcapping": 30.0,
    "final_logit_softcapping": 20.0,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "attention_multiplier": 0.0078125,
    "query_pre_attn_scalar": 144,
    "logit_scale": 0.0625,
    "no_rope_layers": [1, 0],
    "moe_layer_start_index": 1,
    "num_zero_experts": 2,
    "rope_local_base_freq": 1e4,
    "attn_temperature_tuning": True,
    "use_parallel_residual": True,
    "scale_emb": 12,
    "hybrid_override_pattern": "M*",
}


class NotHere(Exception):
    """The directory has nothing that this kind of defect could be done to."""


def mutation(function: Mutation) -> Mutation:
    MUTATIONS[function.__name__] = function
    return function


def must_be_read(function: Mutation) -> Mutation:
    MUST_BE_READ.add(function.__name__)
    return mutation(function)


def read_or_refused(function: Mutation) -> Mutation:
    READ_OR_REFUSED.add(function.__name__)
    return mutation(function)


def must_be_refused(function: Mutation) -> Mutation:
    MUST_BE_REFUSED.add(function.__name__)
    return mutation(function)


# The parts of a directory.


def fields_of(path: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((path / CONFIG).read_text())
    return fields


def write_fields(path: Path, fields: Any) -> None:
    (path / CONFIG).write_text(json.dumps(fields))


def shards_of(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def index_of(path: Path) -> dict[str, Any]:
    if not (path / INDEX).is_file():
        raise NotHere
    index: dict[str, Any] = json.loads((path / INDEX).read_text())
    return index


def write_index(path: Path, index: Any) -> None:
    (path / INDEX).write_text(json.dumps(index))


def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """What `change` makes of a file's tensors."""
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def edit_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """What `change` makes of a file's header, the data staying as they are."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def entry(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header[rng.choice(sorted(set(header) - {"__metadata__"}))]
    return found


def pick(rng: random.Random, names: Any) -> str:
    return str(rng.choice(sorted(names)))


def computing_keys(fields: dict[str, Any]) -> list[str]:
    ignored = ("transformers_version", "architectures", "model_type", "dtype", "quantization_config")
    return sorted(set(fields) - set(ignored))


# config.json


@mutation
def value_is_rubbish(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    write_fields(path, fields | {rng.choice(computing_keys(fields)): rng.choice(RUBBISH)})


@mutation
def value_is_another(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    key = rng.choice([key for key in computing_keys(fields) if isinstance(fields[key], int | float)])
    value = fields[key]
    others = [not value] if isinstance(value, bool) else [value + 1, 2 * value, value // 2, value - 1, float(value), 7]
    write_fields(path, fields | {key: rng.choice(others)})


@mutation
def value_is_a_string(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    key = rng.choice(computing_keys(fields))
    write_fields(path, fields | {key: str(fields[key])})


@mutation
def key_removed(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    del fields[rng.choice(computing_keys(fields))]
    write_fields(path, fields)


@mutation
def key_misspelt(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    key = rng.choice(computing_keys(fields))
    place = rng.randrange(1, len(key) - 1)
    wrong = rng.choice([key[:place] + key[place + 1 :], key[:place] + key[place] + key[place:], key.replace("_", "-")])
    write_fields(path, {wrong if name == key else name: value for name, value in fields.items()})


@mutation
def key_of_another_family(rng: random.Random, path: Path) -> None:
    pairs = (
        ("rms_norm_eps", "layernorm_epsilon"),
        ("rms_norm_eps", "layer_norm_eps"),
        ("num_key_value_heads", "num_kv_heads"),
        ("num_experts_per_tok", "moe_top_k"),
        ("hidden_act", "activation"),
        ("moe_intermediate_size", "expert_intermediate_size"),
        ("n_routed_experts", "num_experts"),
        ("num_experts", "n_routed_experts"),
        ("num_local_experts", "n_routed_experts"),
        ("num_local_experts", "num_experts"),
        ("norm_topk_prob", "norm_topk"),
        ("sliding_window", "window_size"),
        ("head_dim", "attention_head_dim"),
    )
    fields = fields_of(path)
    old, new = rng.choice([pair for pair in pairs if pair[0] in fields])
    write_fields(path, {new if name == old else name: value for name, value in fields.items()})


@must_be_refused
def key_unknown_that_computes(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    key = pick(rng, COMPUTATIONAL.keys() - fields.keys())
    write_fields(path, fields | {key: COMPUTATIONAL[key]})


@must_be_read
def key_unknown_and_harmless(rng: random.Random, path: Path) -> None:
    key = pick(rng, HARMLESS)
    write_fields(path, fields_of(path) | {key: HARMLESS[key]})


def edit_rope(rng: random.Random, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = fields_of(path)
    rope = fields.get("rope_parameters")
    if not isinstance(rope, dict):
        raise NotHere
    nested = sorted(key for key, value in rope.items() if isinstance(value, dict))
    change(rope[rng.choice(nested)] if nested else rope)
    write_fields(path, fields)


@mutation
def rope_type_is_another(rng: random.Random, path: Path) -> None:
    kinds = ["linear", "dynamic", "llama3", "longrope", "yarn", "proportional", "foo", None, 3]
    several: list[dict[str, Any]] = [{}, {"factor": 2.0}, {"factor": "two"}]
    several.append({"factor": 4.0, "original_max_position_embeddings": 8})
    more = rng.choice(several)
    edit_rope(rng, path, lambda rope: rope.update({"rope_type": rng.choice(kinds)} | more))


@mutation
def rope_value_is_rubbish(rng: random.Random, path: Path) -> None:
    edit_rope(rng, path, lambda rope: rope.update({pick(rng, rope): rng.choice(RUBBISH)}))


@mutation
def rope_key_removed_or_misspelt(rng: random.Random, path: Path) -> None:
    def change(rope: dict[str, Any]) -> None:
        key = pick(rng, rope)
        value = rope.pop(key)
        if rng.random() < 0.5:
            rope[key[:-1]] = value

    edit_rope(rng, path, change)


@mutation
def rope_spelled_twice(rng: random.Random, path: Path) -> None:
    """Old keys beside the new ones, with other values."""
    old: list[dict[str, Any]] = [{"rope_theta": 777.0}, {"partial_rotary_factor": 0.25}]
    old.append({"rope_scaling": {"type": "linear", "factor": 2.0}})
    write_fields(path, fields_of(path) | rng.choice(old))


@mutation
def experts_counted_twice(rng: random.Random, path: Path) -> None:
    key = rng.choice(["num_experts", "num_local_experts", "n_routed_experts"])
    write_fields(path, fields_of(path) | {key: rng.choice([2, 3, 8, None])})


@mutation
def layer_lists_are_wrong(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    keys = [key for key in ("layer_types", "mlp_layer_types", "mlp_only_layers") if isinstance(fields.get(key), list)]
    if not keys:
        raise NotHere
    key = rng.choice(keys)
    values = list(fields[key])
    kinds = [values + values[:1], values[:-1], values[::-1], ["foo", *values[1:]], [None] * len(values), "full", [7]]
    write_fields(path, fields | {key: rng.choice(kinds)})


@mutation
def model_type_is_another(rng: random.Random, path: Path) -> None:
    kinds = ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "llama", "bert", "t5", "none", 3, None, ["qwen3_moe"], ""]
    fields = fields_of(path)
    fields["model_type"] = rng.choice([kind for kind in kinds if kind != fields["model_type"]])
    write_fields(path, fields)


@mutation
def tied_flag_is_another(rng: random.Random, path: Path) -> None:
    fields = fields_of(path)
    write_fields(path, fields | {"tie_word_embeddings": not fields.get("tie_word_embeddings", False)})


@mutation
def tied_and_the_head_is_gone(rng: random.Random, path: Path) -> None:
    write_fields(path, fields_of(path) | {"tie_word_embeddings": rng.choice([True, True, "false", None])})
    for file in shards_of(path):
        edit(file, lambda tensors: tensors.pop("lm_head.weight", None))
    if (path / INDEX).is_file():
        index = index_of(path)
        index["weight_map"].pop("lm_head.weight", None)
        write_index(path, index)


@mutation
def quantization_is_rubbish(rng: random.Random, path: Path) -> None:
    kinds: list[Any] = [
        {},
        "fp8",
        [],
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": 3},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": None},
        {"quant_method": 3},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "weight_block_size": "128"},
        3,
    ]
    write_fields(path, fields_of(path) | {"quantization_config": rng.choice(kinds)})


@mutation
def config_is_no_config(rng: random.Random, path: Path) -> None:
    text = (path / CONFIG).read_text()
    kinds = [text[: len(text) // 2], "", "[]", "null", "3", text.replace(":", "=", 1), text + "}", f"{text}\n{text}"]
    (path / CONFIG).write_text(rng.choice(kinds))


@mutation
def config_in_another_encoding(rng: random.Random, path: Path) -> None:
    text = (path / CONFIG).read_text()
    kinds = [text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\xff", b"\x00" * 64]
    (path / CONFIG).write_bytes(rng.choice(kinds))


@read_or_refused
def dtype_is_rubbish(rng: random.Random, path: Path) -> None:
    key = rng.choice(["dtype", "torch_dtype"])
    value = rng.choice(["float99", 5, None, "torch.float32", "int8", "auto", ["float32"], "float16"])
    write_fields(path, {name: entry for name, entry in fields_of(path).items() if name != "dtype"} | {key: value})


@read_or_refused
def architectures_are_others(rng: random.Random, path: Path) -> None:
    kinds: list[Any] = [["LlamaForCausalLM"], [], None, "Qwen3MoeForCausalLM", ["NoSuchModel"], 3]
    write_fields(path, fields_of(path) | {"architectures": rng.choice(kinds)})


# The index


@read_or_refused
def index_lacks_entries(rng: random.Random, path: Path) -> None:
    index = index_of(path)
    for _ in range(rng.randint(1, 3)):
        del index["weight_map"][pick(rng, index["weight_map"])]
    write_index(path, index)


@read_or_refused
def index_names_another_shard(rng: random.Random, path: Path) -> None:
    index = index_of(path)
    name = pick(rng, index["weight_map"])
    others = {file.name for file in shards_of(path)} - {index["weight_map"][name]}
    index["weight_map"][name] = pick(rng, others)
    write_index(path, index)


@mutation
def index_names_a_missing_file(rng: random.Random, path: Path) -> None:
    index = index_of(path)
    kinds = [
        "model-00009-of-00009.safetensors",
        "../elsewhere.safetensors",
        "/no/such.safetensors",
        "",
        "config.json",
        ".",
    ]
    index["weight_map"][pick(rng, index["weight_map"])] = rng.choice(kinds)
    write_index(path, index)


@read_or_refused
def index_has_more(rng: random.Random, path: Path) -> None:
    index = index_of(path)
    name = rng.choice(["model.layers.9.mlp.gate.weight", "lm_head.bias", "model.layers.0.self_attn.rotary.inv_freq"])
    index["weight_map"][name] = shards_of(path)[0].name
    write_index(path, index)


@read_or_refused
def index_is_rubbish(rng: random.Random, path: Path) -> None:
    index = index_of(path)
    kinds: list[Any] = [
        {},
        [],
        {"weight_map": None},
        {"weight_map": []},
        {"weight_map": {}},
        {"weight_map": dict.fromkeys(index["weight_map"], 3)},
        {"weight_map": dict.fromkeys(index["weight_map"], None)},
        index | {"metadata": {"total_size": -5}},
        {"weight_map": index["weight_map"]},
    ]
    write_index(path, rng.choice(kinds))


@read_or_refused
def index_is_cut_or_gone(rng: random.Random, path: Path) -> None:
    index_of(path)
    content = (path / INDEX).read_bytes()
    if rng.random() < 0.5:
        (path / INDEX).unlink()
    else:
        (path / INDEX).write_bytes(content[: rng.randrange(len(content))])


@mutation
def index_beside_one_file(rng: random.Random, path: Path) -> None:
    """A whole model.safetensors of other values besides the shards, as an older download leaves it."""
    index_of(path)
    tensors = {name: tensor for file in shards_of(path) for name, tensor in load_file(file).items()}
    other = {name: tensor * 1.5 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(other, path / WEIGHTS, metadata={"format": "pt"})


# Files


@mutation
def file_is_cut(rng: random.Random, path: Path) -> None:
    file = rng.choice(shards_of(path))
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([0, 4, 8, 100, len(content) // 2, len(content) - 1])])


@read_or_refused
def file_is_longer(rng: random.Random, path: Path) -> None:
    file = rng.choice(shards_of(path))
    file.write_bytes(file.read_bytes() + b"\x00" * rng.choice([1, 64]))


@mutation
def file_is_no_file(rng: random.Random, path: Path) -> None:
    file = rng.choice([*shards_of(path), path / CONFIG, *path.glob(INDEX)])
    file.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        file.symlink_to("nowhere")
    elif kind == 1:
        file.symlink_to(file.name)
    elif kind == 2:
        file.mkdir()


@mutation
def file_is_text(rng: random.Random, path: Path) -> None:
    """A pointer of Git LFS, an error page, zeros."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123456\n"
    content = rng.choice([pointer.encode(), b"<html>404</html>", b"\x00" * 4096, b"\xff" * 4096])
    rng.choice(shards_of(path)).write_bytes(content)


@mutation
def header_length_is_wrong(rng: random.Random, path: Path) -> None:
    file = rng.choice(shards_of(path))
    length = rng.choice([0, 1, 2**20, 2**63, 2**64 - 1])
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])


@mutation
def header_dtype_is_wrong(rng: random.Random, path: Path) -> None:
    kinds = ["I32", "U32", "BF16", "F64", "F99", "F8_E4M3", "BOOL", 3, None]
    edit_header(rng.choice(shards_of(path)), lambda header: entry(rng, header).update(dtype=rng.choice(kinds)))


@mutation
def header_shape_is_wrong(rng: random.Random, path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        found = entry(rng, header)
        shape = found["shape"]
        flat = 1
        for size in shape:
            flat *= size
        found["shape"] = rng.choice(
            [shape[::-1], [flat], [1, *shape], [size + 1 for size in shape], [0], [-1], "x", []]
        )

    edit_header(rng.choice(shards_of(path)), change)


@mutation
def header_offsets_are_wrong(rng: random.Random, path: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        found = entry(rng, header)
        start, end = found["data_offsets"]
        kinds = [
            [start + 4, end + 4],
            [end, start],
            [0, end - start],
            [start, 10**9],
            [-4, end],
            [start, start],
            "x",
            [],
        ]
        found["data_offsets"] = rng.choice(kinds)

    edit_header(rng.choice(shards_of(path)), change)


@mutation
def header_swaps_two_tensors(rng: random.Random, path: Path) -> None:
    """Entries of two names change places: undetectable where the shapes are equal."""

    def change(header: dict[str, Any]) -> None:
        one, two = rng.sample(sorted(set(header) - {"__metadata__"}), 2)
        header[one], header[two] = header[two], header[one]

    edit_header(rng.choice(shards_of(path)), change)


@must_be_read
def header_without_format(rng: random.Random, path: Path) -> None:
    edit_header(rng.choice(shards_of(path)), lambda header: header["__metadata__"].update(written="by hand"))


@mutation
def bytes_are_flipped(rng: random.Random, path: Path) -> None:
    file = rng.choice(shards_of(path))
    content = bytearray(file.read_bytes())
    for _ in range(3):
        content[rng.randrange(len(content) // 2, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


@read_or_refused
def shards_are_swapped(rng: random.Random, path: Path) -> None:
    if len(shards_of(path)) < 2:
        raise NotHere
    one, two = rng.sample(shards_of(path), 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


@mutation
def shard_of_another_model(rng: random.Random, path: Path) -> None:
    """Of the same shapes, or of a model half as large."""
    scale, is_smaller = rng.choice([0.5, 2.0]), rng.random() < 0.5

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.ndim > 1:
                tensors[name] = tensor[..., : tensor.shape[-1] // 2] if is_smaller else tensor * scale

    edit(rng.choice(shards_of(path)), change)


@read_or_refused
def tensor_in_two_shards(rng: random.Random, path: Path) -> None:
    """A stale copy of what the index says is elsewhere."""
    index = index_of(path)["weight_map"]
    names = [name for name in sorted(index) if "expert" in name] if rng.random() < 0.5 else sorted(index)
    name = rng.choice(names)
    tensor = load_file(path / index[name])[name]
    other = next(file for file in reversed(shards_of(path)) if file.name != index[name])
    edit(other, lambda tensors: tensors.update({name: torch.ones_like(tensor)}))


@read_or_refused
def file_beside_the_index(rng: random.Random, path: Path) -> None:
    """A shard that the index does not name, with copies of all tensors of another."""
    index_of(path)
    tensors = load_file(rng.choice(shards_of(path)))
    stale = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    save_file(stale, path / rng.choice(["a.safetensors", "z.safetensors"]), metadata={"format": "pt"})


# Tensors; an index follows


def edit_any(rng: random.Random, path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = rng.choice(shards_of(path))
    edit(file, change)
    if (path / INDEX).is_file():
        index = index_of(path)
        index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place != file.name}
        index["weight_map"] |= dict.fromkeys(load_file(file), file.name)
        write_index(path, index)


@mutation
def tensor_renamed(rng: random.Random, path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        kinds = [
            f"{name}_old",
            name.upper(),
            name.replace("model.", ""),
            name.replace("layers.", "blocks."),
            f"x.{name}",
        ]
        tensors[rng.choice(kinds)] = tensors.pop(name)

    edit_any(rng, path, change)


@mutation
def tensors_with_a_prefix(rng: random.Random, path: Path) -> None:
    prefix = rng.choice(["module.", "_orig_mod.", "base_model.model.", "model."])
    for file in shards_of(path):
        edit(file, lambda tensors: [tensors.update({prefix + name: tensors.pop(name)}) for name in list(tensors)])
    if (path / INDEX).is_file():
        index = index_of(path)
        index["weight_map"] = {prefix + name: place for name, place in index["weight_map"].items()}
        write_index(path, index)


@must_be_refused
def tensor_removed(rng: random.Random, path: Path) -> None:
    edit_any(rng, path, lambda tensors: tensors.pop(pick(rng, set(tensors) - {"lm_head.weight"})))


@mutation
def tensor_too_many(rng: random.Random, path: Path) -> None:
    names = [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.9.self_attn.q_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
        "lm_head.bias",
        "model.rotary_emb.inv_freq",
        "score.weight",
    ]
    edit_any(rng, path, lambda tensors: tensors.setdefault(rng.choice(names), torch.ones(64)))


@mutation
def tensor_in_another_dtype(rng: random.Random, path: Path) -> None:
    kinds = [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn, torch.uint8]
    kind = rng.choice(kinds)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensors[name] = tensors[name].to(kind)

    edit_any(rng, path, change)


@must_be_refused
def tensor_in_another_shape(rng: random.Random, path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, tensors)
        tensor = tensors[name]
        kinds = [tensor[:0], tensor[:1], tensor[None], torch.cat([tensor, tensor])]
        tensors[name] = rng.choice(kinds)

    edit_any(rng, path, change)


@mutation
def tensor_is_not_finite(rng: random.Random, path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, [name for name, tensor in tensors.items() if tensor.is_floating_point()])
        tensors[name].view(-1)[:3] = rng.choice([float("nan"), float("inf"), 3e38])

    edit_any(rng, path, change)


@must_be_refused
def scale_is_nan(rng: random.Random, path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(("weight_scale", "_scales"))]
        if not names:
            raise NotHere
        tensors[pick(rng, names)].view(torch.uint8).view(-1)[rng.randrange(4)] = 255

    edit_any(rng, path, change)


def experts_in(tensors: dict[str, torch.Tensor]) -> list[str]:
    names = [name for name in tensors if ".experts." in name]
    if not names:
        raise NotHere
    return names


@must_be_refused
def expert_missing(rng: random.Random, path: Path) -> None:
    edit_any(rng, path, lambda tensors: tensors.pop(pick(rng, experts_in(tensors))))


@mutation
def expert_too_many(rng: random.Random, path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, experts_in(tensors))
        kinds = [name.replace(".experts.0.", ".experts.77."), name.replace(".experts.1.", ".experts.-1.")]
        tensors.setdefault(rng.choice(kinds), tensors[name])

    edit_any(rng, path, change)


@mutation
def experts_fused_and_not(rng: random.Random, path: Path) -> None:
    """Fused weights of other values beside each expert's own."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = pick(rng, experts_in(tensors))
        module = name.split(".experts.")[0]
        fused = torch.ones(4, 64, 64) if rng.random() < 0.5 else torch.ones(4, 64, 32)
        tensors.setdefault(f"{module}.experts.{rng.choice(['gate_up_proj', 'down_proj'])}", fused)

    edit_any(rng, path, change)


@must_be_refused
def only_a_pickle(rng: random.Random, path: Path) -> None:
    tensors = {name: tensor for file in shards_of(path) for name, tensor in load_file(file).items()}
    for file in [*shards_of(path), *path.glob(INDEX)]:
        file.unlink()
    torch.save(tensors, path / "pytorch_model.bin")


# Beside the model


@read_or_refused
def generation_config_is_rubbish(rng: random.Random, path: Path) -> None:
    kinds: list[Any] = [
        [],
        None,
        {"eos_token_id": "two"},
        {"eos_token_id": [[2]]},
        {"eos_token_id": -7},
        {"temperature": -1.0, "do_sample": True},
        {"no_such_key": 1},
        {"max_length": "long"},
        {"num_beams": 0},
        3,
    ]
    text = rng.choice(["", "{", "\x00", *(json.dumps(kind) for kind in kinds)])
    (path / "generation_config.json").write_text(text)


@read_or_refused
def tokenizer_is_rubbish(rng: random.Random, path: Path) -> None:
    name = rng.choice(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
    text = rng.choice(["", "{", "[]", "null", '{"model": {}}', '{"tokenizer_class": "NoSuchTokenizer"}', "{% if %}"])
    (path / name).write_text(text)


@must_be_read
def files_beside(rng: random.Random, path: Path) -> None:
    """What downloads and editors leave behind."""
    for name in (
        ".DS_Store",
        "README.md",
        "model.safetensors.lock",
        ".cache",
        "model.safetensors~",
        "training_args.bin",
    ):
        (path / name).write_bytes(rng.randbytes(20))
    (path / "original").mkdir()
    shutil.copy(shards_of(path)[0], path / "original" / "consolidated.safetensors")
