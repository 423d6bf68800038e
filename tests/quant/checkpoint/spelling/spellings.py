"""One model in every way its directory can be spelled: keys of config.json, layouts of tensors and of files.

A spelling is written from a canonical directory, as `save_pretrained` of the installed transformers makes it, and means
the same model. What a reader has to find there is computed from the canonical one with transformers alone.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.quant.experts import contraction_last, expert_parameters
from speedstack.quant.mxfp4 import fake_quantize

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
TILE = 128
# What the elements of FP8 in tiles are: their products with the scales in float32, rounded to this: what the makers'
# scripts write, and what transformers holds of such a model in bfloat16.
FP8_DTYPE = torch.bfloat16
IDS = [3, 9, 27, 18, 54, 35, 42, 63, 62, 59, 50, 23, 6, 11, 33, 40, 57, 44, 5, 15, 45, 8, 24, 10]

# Sizes of more than one FP8 tile, the last of them partial.
_WIDE = {"vocab_size": 64, "moe_intermediate_size": 160, "intermediate_size": 192, "max_position_embeddings": 256}
_EXPERTS_ALONE = {"vocab_size": 64, "intermediate_size": 160, "max_position_embeddings": 256}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_v4": {"rope_theta": 5e4, "compress_rope_theta": 9e4, "partial_rotary_factor": 0.5},
    "glm4_moe": _WIDE | {"rope_parameters": _ROPE["rope_parameters"] | {"partial_rotary_factor": 0.25}},
    "gpt_oss": _EXPERTS_ALONE | _ROPE,
    "mimo_v2_flash": {"vocab_size": 64, "moe_intermediate_size": 160, "intermediate_size": 192},
    "mixtral": _EXPERTS_ALONE | _ROPE | {"head_dim": 32},
    "olmoe": _EXPERTS_ALONE | _ROPE,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 8}
# What has no single rotary embedding has no YaRN under these keys, and no release in FP8 blocks is known of the others.
NO_YARN = ("deepseek_v4", "mimo_v2_flash")
NO_FP8 = ("deepseek_v4", "gpt_oss")
# Settings that change what is computed, away from their defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"topk_method": "group_limited_greedy", "n_group": 2, "routed_scaling_factor": 2.5},
    "deepseek_v3": {"n_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": False, "rope_interleave": False},
    "deepseek_v4": {"routed_scaling_factor": 2.5, "swiglu_limit": 0.5, "rms_norm_eps": 1e-2},
    "glm4_moe": {"attention_bias": True, "use_qk_norm": True, "n_group": 2, "norm_topk_prob": False},
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "rms_norm_eps": 1e-2},
    "mimo_v2_flash": {"routed_scaling_factor": 2.5, "attention_value_scale": None, "norm_topk_prob": False},
    "mixtral": {"sliding_window": 5, "rms_norm_eps": 1e-2},
    "olmoe": {"clip_qkv": 0.5, "norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": True, "mlp_only_layers": [0], "qkv_bias": False},
    "qwen3_moe": {"attention_bias": True, "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": []},
}


def overrides(family: str, model: str) -> dict[str, Any]:
    """Fields of a family's tiny model beside those of the shared fixture."""
    return OVERRIDES.get(family, _WIDE | _ROPE) | (SETTINGS[family] if model == "settings" else {})


def save_tokenizer(path: Path) -> None:
    """A tokenizer of 64 words, the vocabulary of the tiny models."""
    words = {f"w{index}": index for index in range(62)}
    tokenizer = Tokenizer(
        models.WordLevel({"<eos>": 0, "<unk>": 1} | {word: 2 + n for word, n in words.items()}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(path)


def read_fields(path: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((path / CONFIG).read_text())


def write_fields(path: Path, fields: dict[str, Any]) -> None:
    (path / CONFIG).write_text(json.dumps(fields, indent=1))


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's files."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def from_pretrained(path: Path) -> PreTrainedModel:
    """transformers' own reading, in float32."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of `IDS`, float32 [T, V]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def round_experts(model: PreTrainedModel) -> None:
    """Pass the weights of routed experts through MXFP4."""
    with torch.no_grad():
        for name, parameter in expert_parameters(model).items():
            experts = model.get_submodule(name.rpartition(".")[0])
            values = contraction_last(experts, parameter)
            if "bias" not in name:
                values.copy_(fake_quantize(values.contiguous()))


# Spellings of config.json.


def yarn(fields: dict[str, Any]) -> dict[str, Any]:
    """Another model of the same weights: rotary frequencies stretched."""
    partial = fields["rope_parameters"].get("partial_rotary_factor")
    return fields | {"rope_parameters": YARN | ({} if partial is None else {"partial_rotary_factor": partial})}


def old_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """As transformers before 5 wrote it: rope_theta and partial_rotary_factor beside rope_scaling, with `type`."""
    fields = dict(fields)
    if fields["model_type"] == "deepseek_v4":
        del fields["rope_parameters"], fields["partial_rotary_factor"]
        rates = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
        head_dim, kinds = fields["head_dim"], fields.pop("layer_types")
        mlps = fields.pop("mlp_layer_types")
        return fields | {
            "compress_ratios": [rates[kind] for kind in kinds],
            "num_hash_layers": mlps.count("hash_moe"),
            "qk_rope_head_dim": head_dim // 2,
            "rope_scaling": None,
        }
    scaling = dict(fields.pop("rope_parameters"))
    fields["rope_theta"] = scaling.pop("rope_theta")
    if "partial_rotary_factor" in scaling:
        fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    kind = scaling.pop("rope_type")
    return fields | {"rope_scaling": None if kind == "default" else {"type": kind} | scaling}


def tied(fields: dict[str, Any]) -> dict[str, Any]:
    """Another model where a head is stored that is not the embedding: transformers keeps it."""
    return fields | {"tie_word_embeddings": True}


def type_for_rope_type(fields: dict[str, Any]) -> dict[str, Any]:
    rope = dict(fields["rope_parameters"])
    return fields | {"rope_parameters": {"type": rope.pop("rope_type")} | rope}


def torch_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    return fields | {"torch_dtype": fields.pop("dtype")}


def no_dtype(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != "dtype"}


def experts_key(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def spell(fields: dict[str, Any]) -> dict[str, Any]:
        (found,) = (name for name in EXPERT_KEYS if name in fields)
        fields = dict(fields)
        return fields | {key: fields.pop(found)}

    return spell


def makers(fields: dict[str, Any]) -> dict[str, Any]:
    """MiMo-V2-Flash in the words of its makers' config.json."""
    fields = dict(fields)
    rope, attention = fields.pop("rope_parameters"), fields.pop("layer_types")
    mlps = fields.pop("mlp_layer_types")
    return fields | {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in attention],
        "moe_layer_freq": [int(kind == "sparse") for kind in mlps],
        "rope_theta": rope["full_attention"]["rope_theta"],
        "swa_rope_theta": rope["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": rope["full_attention"]["partial_rotary_factor"],
        "layernorm_epsilon": fields.pop("rms_norm_eps"),
        "sliding_window_size": fields["sliding_window"] - 1,
        "sliding_window": fields.pop("sliding_window") - 1,
        "attention_chunk_size": 128,
        "swa_num_attention_heads": fields["num_attention_heads"],
        "swa_num_key_value_heads": 2 * fields["num_key_value_heads"],
        "swa_head_dim": fields["head_dim"],
        "swa_v_head_dim": fields["v_head_dim"],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_shared_experts": None,
        "routed_scaling_factor": None,
    }


# Spellings of the files.


def fused(path: Path) -> None:
    """Experts as transformers' model holds them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (path / WEIGHTS).unlink()
    fields = read_fields(path)
    model.save_pretrained(path, save_original_format=False)
    write_fields(path, fields)


def released_names(path: Path) -> None:
    """Tensors under their makers' names, where those are not what `save_pretrained` writes."""
    tensors = load_file(path / WEIGHTS)
    for old, new in FAMILIES[read_fields(path)["model_type"]].released:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    (path / WEIGHTS).unlink()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def shards(path: Path) -> None:
    """Three shards under an index; experts of one layer in several."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    weight_map = {name: f"model-0000{1 + index % 3}-of-00003.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name, place in weight_map.items() if place == file}
        save_file(part, path / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def snapshot(path: Path) -> Path:
    """The Hub cache's layout: the directory's files are relative links to blobs."""
    hub = path.with_name(f"{path.name}-hub")
    place, blobs = hub / "snapshots" / "0123abcd", hub / "blobs"
    place.mkdir(parents=True)
    blobs.mkdir()
    for index, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{index:040x}")
        (place / file.name).symlink_to(Path("../../blobs") / f"{index:040x}")
    return place


def half(path: Path) -> None:
    """float16 files under a config.json that says bfloat16."""
    tensors = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in stored(path).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_fields(path, read_fields(path) | {"dtype": "bfloat16"})


def mixed(path: Path) -> None:
    """Experts in bfloat16, all else in float32, and nothing said of it."""
    tensors = {name: tensor.bfloat16() if ".experts." in name else tensor for name, tensor in stored(path).items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_fields(path, no_dtype(read_fields(path)))


def is_fp8(name: str, tensor: torch.Tensor) -> bool:
    """Whether the makers of released FP8 models quantize it: linear layers but the head and routers."""
    plain = ("embed", "lm_head", "norm", ".gate.", "shared_expert_gate")
    return name.endswith(".weight") and tensor.ndim == 2 and not any(part in name for part in plain)


def fp8_blocks(path: Path) -> None:
    """Tiles of 128 x 128 under float32 scales that are no powers of two."""
    tensors: dict[str, torch.Tensor] = {}
    fields = read_fields(path)
    quantization: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantization["weight_block_size"] = [TILE, TILE]
    if fields["model_type"] == "mimo_v2_flash":
        layers = range(fields["num_hidden_layers"])
        quantization["ignored_layers"] = [f"model.layers.{layer}.self_attn.o_proj" for layer in layers]
    for name, tensor in load_file(path / WEIGHTS).items():
        if not is_fp8(name, tensor) or name.removesuffix(".weight") in quantization.get("ignored_layers", ()):
            tensors[name] = tensor
            continue
        codes = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty([-(-size // TILE) for size in tensor.shape])
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                tile = (slice(row * TILE, row * TILE + TILE), slice(column * TILE, column * TILE + TILE))
                scales[row, column] = tensor[tile].abs().max() / 448
                codes[tile] = (tensor[tile] / scales[row, column]).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scales}
    (path / WEIGHTS).unlink()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_fields(path, fields | {"quantization_config": quantization})


def without_fp8(path: Path) -> None:
    """The inverse: every element times its tile's scale."""
    tensors = load_file(path / WEIGHTS)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        scales = tensors.pop(name).repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
        rows, columns = tensors[weight].shape
        tensors[weight] = (tensors[weight].float() * scales[:rows, :columns]).to(FP8_DTYPE).float()
    (path / WEIGHTS).unlink()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    write_fields(path, {key: value for key, value in read_fields(path).items() if key != "quantization_config"})


@dataclass(frozen=True)
class Spelling:
    """How a directory is written. `model`: which of the family's models it is, see `write_model`."""

    name: str
    fields: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = ()
    files: tuple[Callable[[Path], Path | None], ...] = ()
    model: str = "plain"

    def write(self, source: Path, out: Path) -> Path:
        """The directory that spells what is at `source`, made at `out` or beside it."""
        shutil.copytree(source, out)
        for change in self.files:
            if change is not snapshot:
                change(out)
        fields = read_fields(out)
        for spell in self.fields:
            fields = spell(fields)
        write_fields(out, fields)
        return snapshot(out) if snapshot in self.files else out


def write_model(model: str, plain: Path, path: Path) -> None:
    """One of the models that share the weights of `plain`, or what they are rounded to."""
    shutil.copytree(plain, path)
    if model in ("half", "mixed", "fp8"):
        {"half": half, "mixed": mixed, "fp8": fp8_blocks}[model](path)
    else:
        write_fields(path, {"yarn": yarn, "tied": tied}[model](read_fields(path)))


def spellings(family: str) -> list[Spelling]:
    """All of a family's."""
    has_rope = family != "mimo_v2_flash"
    has_yarn = family not in NO_YARN
    alias = next((key for key in EXPERT_KEYS if key in CONFIG_MAPPING[family].attribute_map), None)
    old = (torch_dtype, old_rope if has_rope else makers, *((experts_key(alias),) if alias else ()))
    cells = [
        Spelling("as_saved"),
        Spelling("torch_dtype", (torch_dtype,)),
        Spelling("no_dtype", (no_dtype,)),
        *(Spelling(key, (experts_key(key),)) for key in EXPERT_KEYS),
        Spelling("settings", model="settings"),
        Spelling("half", model="half"),
        Spelling("mixed", model="mixed"),
        Spelling("tied_with_head", model="tied"),
        Spelling("shards", files=(shards,)),
        Spelling("snapshot", files=(shards, snapshot)),
    ]
    if has_rope and family != "gpt_oss":
        # gpt-oss' classes take rope_scaling null for their default, which is YaRN.
        cells.append(Spelling("old_rope", (old_rope,)))
    if has_yarn:
        cells.append(Spelling("yarn", model="yarn"))
        cells.append(Spelling("type_for_rope_type", (type_for_rope_type,), model="yarn"))
        cells.append(Spelling("old_yarn", (old_rope,), model="yarn"))
    if family == "mimo_v2_flash":
        cells.append(Spelling("makers", (makers,)))
    if not FAMILIES[family].is_fused:
        cells.append(Spelling("fused", files=(fused,)))
        cells.append(Spelling("fused_old_snapshot", old, (fused, shards, snapshot)))
    if FAMILIES[family].released:
        cells.append(Spelling("released", (old_rope,), (released_names,)))
    if family not in NO_FP8:
        cells.append(Spelling("fp8", model="fp8"))
        cells.append(Spelling("fp8_old_snapshot", old, (shards, snapshot), model="fp8"))
    return cells
