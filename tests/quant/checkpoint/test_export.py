"""A directory that is written again: what a loader of the source reads, a loader of the result finds."""

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from speedstack.quant.checkpoint import can_be_packed, check_export, convert, export_model, load_checkpoint, load_model
from speedstack.quant.checkpoint.formats import default_format
from speedstack.quant.checkpoint.names import hub_names
from speedstack.quant.checkpoint.source import value_dtypes
from speedstack.quant.experts import contraction_last, expert_parameters
from speedstack.quant.mxfp4 import MXFP4Tensor, quantize
from speedstack.quant.ptq import round_to_nearest

FAMILIES = ["deepseek_v3", "gpt_oss", "mimo_v2_flash", "minimax_m2", "mixtral", "olmoe", "qwen3_moe"]
SIDE_FILES = {
    "LICENSE": b"free for research",
    "USAGE_POLICY": b"be kind",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"temperature": 0.6, "top_k": 20, "of_the_makers": [1, 2]}',
    "modeling_of_theirs.py": b"class Model: ...",
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": '{"tokenizer_class":  "Theirs", "eos_token": "\u2581"}'.encode(),
}
# What the installed transformers does not know, or writes otherwise.
FIELDS = {"auto_map": {"AutoModel": "modeling_of_theirs.Model"}, "transformers_version": "4.51.0", "of_the_makers": 0.5}
EXTRA = "model.mtp.norm.weight"


def make_source(path: Path, model: PreTrainedModel, dtype: torch.dtype, **fields: Any) -> Path:
    """A snapshot as the Hub's cache has it: links to files with other names. Vectors are float32, as of some makers."""
    model.save_pretrained(path / "made")
    tensors = load_file(path / "made" / "model.safetensors")
    tensors = {name: tensor.to(dtype if tensor.ndim > 1 else tensor.dtype) for name, tensor in tensors.items()}
    config = json.loads((path / "made" / "config.json").read_text()) | FIELDS | fields
    del config["dtype"]
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    blobs, snapshot = path / "blobs", path / "snapshots" / "main"
    for directory in (blobs, snapshot):
        directory.mkdir(parents=True)
    save_file(tensors | {EXTRA: torch.randn(5).half()}, blobs / "0", metadata={"format": "pt"})
    (blobs / "1").write_text(json.dumps(config))
    (snapshot / "model.safetensors").symlink_to("../../blobs/0")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    for name, content in SIDE_FILES.items():
        (blobs / name).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    return snapshot


def read_config(path: Path) -> dict[str, Any]:
    fields = json.loads((path / "config.json").read_text())
    fields.pop("quantization_config", None)
    return fields


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def others_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors that are no expert's weight."""
    return {name: tensor for name, tensor in weights_of(path).items() if ".experts." not in name or "bias" in name}


def check_copied(source: Path, out: Path) -> None:
    assert read_config(out) == read_config(source)
    assert {entry.name for entry in source.iterdir()} <= {entry.name for entry in out.iterdir()}
    for name, content in SIDE_FILES.items():
        assert (out / name).read_bytes() == content and not (out / name).is_symlink(), name
    assert out.joinpath("model.safetensors").stat().st_size <= source.joinpath("model.safetensors").stat().st_size


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


@pytest.mark.filterwarnings("ignore:.*tensors that .* does not have")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_did_not_change_is_the_source_s(
    model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    is_packed = can_be_packed(model_type)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        path = tmp_path / str(dtype)
        source, out = make_source(path, make_family(model_type), dtype), path / "out"
        model = load_model(source)
        check_export(model, source, is_packed)
        with torch.no_grad():
            for weight in expert_parameters(model).values():
                weight.mul_(1.1)  # of no other dtype than float32, until it is rounded
        expected = {
            name: quantize(contraction_last(model.get_submodule(name.rpartition(".")[0]), weight.detach()))
            for name, weight in expert_parameters(model).items()
        }
        if not is_packed:
            round_to_nearest(model)
        export_model(model, source, out, scale_rule="even" if is_packed else None)
        check_copied(source, out)
        assert same_bits(others_of(out), others_of(source))
        assert EXTRA in others_of(out)
        if is_packed:
            tensors = load_checkpoint(out).tensors
            for name, codes in expected.items():
                stored = tensors[name]
                assert isinstance(stored, MXFP4Tensor)
                assert torch.equal(stored.codes, codes.codes) and torch.equal(stored.scales, codes.scales)
        else:
            assert {name: t.dtype for name, t in weights_of(out).items()} == {
                name: t.dtype for name, t in weights_of(source).items()
            }
            loaded = expert_parameters(load_model(out))
            assert all(torch.equal(loaded[name], codes.dequantize()) for name, codes in expected.items())


@pytest.mark.filterwarnings("ignore:.*tensors that .* does not have")
@pytest.mark.parametrize("model_type", [name for name in FAMILIES if can_be_packed(name)])
def test_convert_copies_as_much(model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    """Rounded from the files' own dtype, whatever config.json says of it."""
    for dtype, named in ((torch.float32, "bfloat16"), (torch.float16, "bfloat16"), (torch.bfloat16, None)):
        path = tmp_path / str(dtype)
        source, out = make_source(path, make_family(model_type), dtype), path / "out"
        fields = read_config(source) | {"torch_dtype": named}
        if named is None:
            del fields["torch_dtype"]
        (source / "config.json").write_text(json.dumps(fields))
        convert(source, default_format(hub_names(model_type)).name, out)
        check_copied(source, out)
        assert same_bits(others_of(out), others_of(source))
        tensors, model = load_checkpoint(out).tensors, load_model(source)
        for name, weight in expert_parameters(model).items():
            module = model.get_submodule(name.rpartition(".")[0])
            codes, stored = quantize(contraction_last(module, weight.detach())), tensors[name]
            assert isinstance(stored, MXFP4Tensor)
            assert torch.equal(stored.codes, codes.codes) and torch.equal(stored.scales, codes.scales)


@pytest.fixture
def qwen(make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> Iterator[Path]:
    """A bfloat16 source, its head tied to its embedding."""
    yield make_source(tmp_path / "qwen", make_family("qwen3_moe"), torch.bfloat16)


def test_values_that_the_source_s_dtype_does_not_hold_are_kept(qwen: Path, tmp_path: Path) -> None:
    """One weight that bfloat16 holds, and one that only float32 does: then config.json must not say bfloat16."""
    name, other = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"
    model = load_model(qwen)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = 0.75
    export_model(model, qwen, tmp_path / "half", scale_rule="even")
    check_copied(qwen, tmp_path / "half")
    assert weights_of(tmp_path / "half")[name][0, 0] == 0.75
    assert {t.dtype for t in others_of(tmp_path / "half").values() if t.ndim > 1} == {torch.bfloat16}

    with torch.no_grad():
        model.get_parameter(other).mul_(1 + 2**-12)
    export_model(model, qwen, tmp_path / "out", scale_rule="even")
    stored = weights_of(tmp_path / "out")
    assert stored[name].dtype == torch.bfloat16 and stored[other].dtype == torch.float32
    assert torch.equal(stored[other], model.get_parameter(other))
    assert read_config(tmp_path / "out") == read_config(qwen) | {"torch_dtype": "float32"}
    # Nobody asked for the embedding.
    export_model(model, qwen, tmp_path / "only", scale_rule="even", only=expert_parameters(model))
    assert same_bits(others_of(tmp_path / "only"), others_of(qwen))


def test_a_checkpoint_that_names_no_dtype(qwen: Path, tmp_path: Path) -> None:
    fields = {key: value for key, value in read_config(qwen).items() if key != "torch_dtype"}
    (qwen / "config.json").write_text(json.dumps(fields))
    model = load_model(qwen)
    export_model(model, qwen, tmp_path / "same", scale_rule="even")
    assert read_config(tmp_path / "same") == fields
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1 + 2**-12)
    export_model(model, qwen, tmp_path / "wider", scale_rule="even")
    assert read_config(tmp_path / "wider") == fields | {"torch_dtype": "float32"}
    assert AutoConfig.from_pretrained(tmp_path / "wider").dtype == torch.float32


def test_a_language_model_that_is_a_part(tmp_path: Path) -> None:
    """As Qwen3.5 is released: beside an encoder of images, in a `text_config` that may name a dtype of its own."""
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "layer_types": ["full_attention"]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config_class: Any = CONFIG_MAPPING["qwen3_5_moe"]
    config = config_class(text_config=sizes, vision_config=vision)
    source = tmp_path / "source"
    AutoModelForImageTextToText.from_config(config).bfloat16().save_pretrained(source)
    fields = read_config(source)
    fields["text_config"] = {**fields["text_config"], "dtype": "bfloat16"}
    (source / "config.json").write_text(json.dumps(fields))
    model = load_model(source)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.01)
    export_model(model, source, tmp_path / "out", scale_rule=None)
    written = read_config(tmp_path / "out")
    assert (written["dtype"], written["text_config"]["dtype"]) == ("float32", "float32")
    assert weights_of(tmp_path / "out").keys() == weights_of(source).keys(), "the encoder goes along"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert all(torch.equal(theirs[name].float(), tensor) for name, tensor in model.state_dict().items())


def test_float32_files_under_another_name(make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    """What is not changed may be called bfloat16 as it was; trained values that this would round may not."""
    source = make_source(tmp_path / "source", make_family("olmoe"), torch.float32)
    (source / "config.json").write_text(json.dumps(read_config(source) | {"torch_dtype": "bfloat16"}))
    model = load_model(source)
    export_model(model, source, tmp_path / "same", scale_rule="even")
    assert read_config(tmp_path / "same")["torch_dtype"] == "bfloat16"
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.1)
    export_model(model, source, tmp_path / "trained", scale_rule="even")
    assert read_config(tmp_path / "trained")["torch_dtype"] == "float32"


@pytest.mark.filterwarnings("ignore:.*tensors that .* does not have")
def test_mxfp4_values_beyond_float16(make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    """bfloat16 holds them in as many bytes, and no loader may then take the model for float16."""
    source = make_source(tmp_path / "source", make_family("minimax_m2"), torch.float16)
    model = load_model(source)
    with torch.no_grad():
        for weight in expert_parameters(model).values():
            weight[1, :8].mul_(2.0**-22)
    round_to_nearest(model)
    export_model(model, source, tmp_path / "out", scale_rule=None)
    dtypes = {name: tensor.dtype for name, tensor in weights_of(tmp_path / "out").items() if tensor.ndim > 1}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        f"model.layers.{layer}.block_sparse_moe.experts.1.{part}.weight" for layer in range(2) for part in ("w1", "w2")
    }
    assert set(dtypes.values()) == {torch.float16, torch.bfloat16}
    assert read_config(tmp_path / "out")["torch_dtype"] == "float32"
    reader: Any = AutoModelForCausalLM
    loaded = expert_parameters(reader.from_pretrained(tmp_path / "out", dtype="auto"))
    assert all(torch.equal(loaded[name], weight) for name, weight in expert_parameters(model).items())


@pytest.mark.parametrize("spelling", ["each", "fused"])
def test_unquantized_export_keeps_the_source_s_names(
    spelling: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Experts one by one, or stacked as transformers has them in memory: the result is spelled as its source."""
    model = make_family("olmoe").bfloat16()
    if spelling == "fused":
        model.save_pretrained(tmp_path / "source", save_original_format=False)
    else:
        model.save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    names = round_to_nearest(model, number_format="int4_g32", modules=("experts", "attention"))
    check_export(model, tmp_path / "source", is_packed=False)
    export_model(model, tmp_path / "source", tmp_path / "out", scale_rule=None, only=names)
    before, after = weights_of(tmp_path / "source"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys() and any("gate_up_proj" in name for name in after) == (spelling == "fused")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed and all(".experts." in name or ".self_attn." in name for name in changed)
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    (tmp_path / "source" / "model.safetensors").unlink()
    lost = next(name for name in sorted(before) if ".experts." in name)
    save_file({name: tensor for name, tensor in before.items() if name != lost}, tmp_path / "source/model.safetensors")
    for attempt in (
        lambda: check_export(model, tmp_path / "source", is_packed=False),
        lambda: export_model(model, tmp_path / "source", tmp_path / "again", scale_rule=None),
    ):
        with pytest.raises(ValueError, match=f"lacks the tensor {lost}"):
            attempt()
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("scale_rule", [None, "even"])
def test_a_stored_copy_of_a_tied_weight_changes_with_it(scale_rule: Any, qwen: Path, tmp_path: Path) -> None:
    tensors = weights_of(qwen)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (qwen / "model.safetensors").unlink()
    save_file(tensors, qwen / "model.safetensors", metadata={"format": "pt"})
    model = load_model(qwen)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[3] = 1.5
    export_model(model, qwen, tmp_path / "out", scale_rule=scale_rule)
    copies = [weights_of(tmp_path / "out")[name] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    assert torch.equal(*copies) and copies[0][3, 0] == 1.5


def test_transformers_keys_stand_beside_makers_keys(plain: Path, tmp_path: Path) -> None:
    """Which of them a loader reads, it finds; transformers would take defaults for the others without a word."""
    fields = read_config(plain)
    ropes = fields.pop("rope_parameters")
    fields |= {"rope_theta": ropes["full_attention"]["rope_theta"], "partial_rotary_factor": 0.5}
    fields |= {"swa_rope_theta": ropes["sliding_attention"]["rope_theta"], "layernorm_epsilon": 3e-5}
    fields["hybrid_layer_pattern"] = [int(kind == "sliding_attention") for kind in fields.pop("layer_types")]
    fields["moe_layer_freq"] = [int(kind == "sparse") for kind in fields.pop("mlp_layer_types")]
    fields.pop("rms_norm_eps", None)
    (plain / "config.json").write_text(json.dumps(fields))
    model = load_model(plain)
    convert(plain, "mimo", tmp_path / "converted")
    export_model(model, plain, tmp_path / "exported", scale_rule="even")
    for name in ("converted", "exported"):
        written = read_config(tmp_path / name)
        assert {key: written[key] for key in fields} == fields
        theirs = AutoConfig.from_pretrained(tmp_path / name)
        for key in ("rope_parameters", "layer_types", "mlp_layer_types", "rms_norm_eps"):
            assert getattr(theirs, key) == getattr(model.config, key), key
        assert load_model(tmp_path / name).config.to_dict().keys() == model.config.to_dict().keys()


def test_a_head_of_its_own_makes_the_result_untied(qwen: Path, tmp_path: Path) -> None:
    """Whatever the source's flag says; a loader that believes the flag would lose the head."""
    tensors = weights_of(qwen)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    (qwen / "model.safetensors").unlink()
    save_file(tensors, qwen / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* files hold another one")
        export_model(load_model(qwen), qwen, tmp_path / "exported", scale_rule="even")
        convert(qwen, "compressed-tensors", tmp_path / "converted")
    assert read_config(qwen)["tie_word_embeddings"] is True
    for name in ("exported", "converted"):
        assert read_config(tmp_path / name) == read_config(qwen) | {"tie_word_embeddings": False}
        assert same_bits(others_of(tmp_path / name), others_of(qwen))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_fused_experts_are_packed_one_by_one(
    model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Under the names that loaders of the packed format know; everything else as it is."""
    model = make_family(model_type).bfloat16()
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    for name in ("each", "fused"):
        convert(tmp_path / name, "compressed-tensors", tmp_path / f"{name}-converted")
        export_model(load_model(tmp_path / name), tmp_path / name, tmp_path / f"{name}-exported", scale_rule="even")
    expected = weights_of(tmp_path / "each-converted")
    assert any(name.endswith("weight_packed") for name in expected)
    for name in ("each-exported", "fused-converted", "fused-exported"):
        assert same_bits(weights_of(tmp_path / name), expected)


def test_fp8_sources(
    make_family: Callable[[str], PreTrainedModel], as_fp8: Callable[..., dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """What FP8 stands for is bfloat16, which is no change; what is trained beyond that is."""
    make_family("qwen3_moe").bfloat16().save_pretrained(tmp_path / "source")
    kept = weights_of(tmp_path / "source")
    values = as_fp8(tmp_path / "source", "o_proj", "experts.2.")
    assert value_dtypes(tmp_path / "source", ".experts.") == {"BF16"}
    model = load_model(tmp_path / "source")
    check_export(model, tmp_path / "source", is_packed=True)
    export_model(model, tmp_path / "source", tmp_path / "out", scale_rule="even")
    convert(tmp_path / "source", "compressed-tensors", tmp_path / "converted")
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "converted"))
    others = others_of(tmp_path / "out")
    assert others.keys() == {name for name in kept if ".experts." not in name}
    assert all(torch.equal(tensor, values.get(name, kept[name])) for name, tensor in others.items())
    assert read_config(tmp_path / "out") == read_config(tmp_path / "source")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.q_proj.weight").mul_(1 + 2**-12)
    export_model(model, tmp_path / "source", tmp_path / "trained", scale_rule="even")
    assert weights_of(tmp_path / "trained")["model.layers.1.self_attn.q_proj.weight"].dtype == torch.float32
    assert read_config(tmp_path / "trained")["dtype"] == "float32"


def test_sources_that_cannot_be_read_or_would_be_deleted(qwen: Path, tmp_path: Path) -> None:
    model = load_model(qwen)
    with pytest.raises(ValueError, match="is or holds"):
        export_model(model, qwen, qwen, scale_rule="even")
    (qwen / "LICENSE").unlink()
    (qwen / "LICENSE").symlink_to("nowhere")
    with pytest.raises(OSError, match=r"cannot read .*/LICENSE: No such file"):
        export_model(model, qwen, tmp_path / "out", scale_rule="even")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("named", ["float16", None])
def test_plain_experts_of_a_float16_model(
    named: str | None, make_family: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    """Unpacked to bfloat16, which float16 does not hold: config.json says what holds both."""
    source = make_source(tmp_path / "source", make_family("mixtral"), torch.float16)
    (source / "config.json").write_text(json.dumps(read_config(source) | {"torch_dtype": named}))
    convert(source, "compressed-tensors", tmp_path / "packed")
    assert read_config(tmp_path / "packed")["torch_dtype"] == named
    tensors = weights_of(tmp_path / "packed")
    for name in tensors:
        if name.endswith("weight_scale"):
            tensors[name] -= 22
    save_file(tensors, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "packed", "plain", tmp_path / "plain")
    reader: Any = AutoModelForCausalLM
    loaded = expert_parameters(reader.from_pretrained(tmp_path / "plain", dtype="auto"))
    expected = expert_parameters(load_model(tmp_path / "packed"))
    assert all(torch.equal(loaded[name].float(), weight) for name, weight in expected.items())
