"""Reading model directories: plain ones, sharded ones, and every way in which one can be broken."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint import convert, load_checkpoint, load_model, load_tensor, weights_sha256
from speedstack.quant.checkpoint.files import WeightFiles
from speedstack.quant.checkpoint.names import FAMILIES
from tests.packing import save_packed

WEIGHTS = "model.safetensors"


def fails(
    path: Path, match: str, functions: tuple[Callable[[Path], object], ...] = (load_checkpoint, load_model)
) -> None:
    for function in functions:
        with pytest.raises(ValueError, match=match) as caught:
            function(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plain_directory(model_type: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = make_family(model_type)
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    loaded = load_model(tmp_path)
    assert not checkpoint.is_packed
    assert set(checkpoint.tensors) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        stored = checkpoint.tensors[name]
        assert isinstance(stored, torch.Tensor) and torch.equal(stored, tensor)
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v4"])
def test_one_tensor_alone(
    family: str, make_family: Callable[[str], PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the whole checkpoint, tied (qwen3_moe's head) or renamed (deepseek_v4's), and nothing else is read."""
    save_packed(make_family(family), tmp_path)
    tensors = load_checkpoint(tmp_path).tensors
    names_read: list[str] = []
    read = WeightFiles._read

    def noted(files: WeightFiles, name: str, how: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        names_read.append(name)
        return read(files, name, how)

    monkeypatch.setattr(WeightFiles, "_read", noted)
    for name in ("lm_head.weight", "model.norm.weight"):
        expected = tensors[name]
        assert isinstance(expected, torch.Tensor) and torch.equal(load_tensor(tmp_path, name), expected)
    assert len(names_read) == 2


def test_sharded_plain_directory(make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = make_tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tensors = load_checkpoint(tmp_path).tensors
    for name, tensor in model.state_dict().items():
        stored = tensors[name]
        assert isinstance(stored, torch.Tensor) and torch.equal(stored, tensor)


def test_models_are_ordinary_models(packed: Path) -> None:
    """A loaded packed model can be trained, saved and loaded without a trace of quantization."""
    model = load_model(packed)
    assert getattr(model.config, "quantization_config", None) is None
    assert not getattr(model, "is_quantized", False)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not model.training
    assert model.config._experts_implementation == "grouped_mm"


def test_tensors_outlive_the_files(packed: Path) -> None:
    checkpoint = load_checkpoint(packed)
    expected = load_model(packed).state_dict()
    shutil.rmtree(packed)
    name = "model.embed_tokens.weight"
    stored = checkpoint.tensors[name]
    assert isinstance(stored, torch.Tensor) and torch.equal(stored, expected[name])


def test_families_without_names_load_as_models(make_family: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    """They can still be trained: only their packed form is unknown."""
    model = make_family("minimax_m2")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    fails(tmp_path, "tensor names of model_type 'minimax_m2' are not known", (load_checkpoint,))


def test_a_family_whose_experts_have_one_implementation(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_hidden_layers": 1,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    config_class: Any = CONFIG_MAPPING["llama4_text"]
    config = config_class(vocab_size=16, pad_token_id=None, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    fails(tmp_path, "experts of Llama4ForCausalLM do not go through transformers' registry", (load_model,))


@pytest.mark.parametrize("fields", [{"max_new_tokens": -1}, {"watermarking_config": 5}])
def test_generation_settings_that_cannot_be_are_not_blamed_on_the_weights(
    fields: dict[str, Any], plain: Path, packed: Path
) -> None:
    for path in (plain, packed):
        (path / "generation_config.json").write_text(json.dumps(fields))
        fails(path, r"generation_config\.json is not valid \(.*\): correct or remove it", (load_model,))


def test_missing_files(plain: Path) -> None:
    both = (load_checkpoint, load_model)
    fails(plain / "nowhere", "no model directory at .*/nowhere", (*both, weights_sha256))
    fails(plain / "config.json", "no model directory at", (*both, weights_sha256))
    (plain / WEIGHTS).unlink()
    fails(plain, r"has no model\.safetensors and no model\.safetensors\.index\.json", (*both, weights_sha256))
    (plain / "config.json").unlink()
    fails(plain, r"config\.json is missing: is .* a Hugging Face model directory")


@pytest.mark.parametrize("size", [0, 5, 200, -1000])
def test_truncated_weights(plain: Path, size: int) -> None:
    """Cut before, inside and after the header."""
    content = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(content[:size])
    fails(plain, r"model\.safetensors is truncated or corrupt")


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all}"])
def test_corrupt_header(plain: Path, garbage: bytes) -> None:
    content = (plain / WEIGHTS).read_bytes()
    (plain / WEIGHTS).write_bytes(garbage + content[len(garbage) :])
    fails(plain, r"model\.safetensors is truncated or corrupt")


def test_broken_index(make_tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    save_packed(make_tiny_model(), tmp_path / "model", max_shard_bytes=60_000)
    path = tmp_path / "model"
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "elsewhere")
    everyone = (load_checkpoint, load_model, weights_sha256)
    fails(path, f"{shard.name} is missing although model.safetensors.index.json names it", everyone)
    (tmp_path / "elsewhere").rename(shard)
    index = path / "model.safetensors.index.json"
    index.write_text('{"metadata": {}}')
    fails(path, "has no weight_map", everyone)
    index.write_text("{")
    fails(path, r"index\.json is not valid JSON", everyone)


@pytest.mark.parametrize("place", ["./{}", "weights/{}"])
def test_shards_are_where_the_index_says(
    place: str, make_family: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = make_family("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"] = {name: place.format(file) for name, file in fields["weight_map"].items()}
    index.write_text(json.dumps(fields))
    (tmp_path / "weights").mkdir()
    for shard in sorted(tmp_path.glob("*.safetensors")):
        shard.rename(tmp_path / place.format(shard.name))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in load_checkpoint(tmp_path).tensors.items():
        assert isinstance(tensor, torch.Tensor) and torch.equal(tensor, theirs[name])
    fields["weight_map"] |= {"model.norm.weight": "../elsewhere.safetensors"}
    index.write_text(json.dumps(fields))
    fails(tmp_path, r"names \.\./elsewhere\.safetensors, which is not in the directory")


def test_one_file_beside_shards(make_family: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    """transformers reads the one, vLLM and SGLang what the index names; an index of the one file alone is no matter."""
    make_family("olmoe").save_pretrained(tmp_path / "whole")
    make_family("olmoe").save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(tmp_path / "whole" / WEIGHTS, tmp_path / WEIGHTS)
    fails(tmp_path, r"has model\.safetensors and model\.safetensors\.index\.json with shards such as model-00001")
    index = tmp_path / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, WEIGHTS)}))
    load_checkpoint(tmp_path)


def test_a_link_to_nothing_is_said(plain: Path) -> None:
    (plain / WEIGHTS).unlink()
    (plain / WEIGHTS).symlink_to("../../blobs/0123")
    fails(plain, r"model\.safetensors is a link to nothing: download it again")


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_of_two_tied_tensors_the_head_alone_is_stored(
    family: str,
    make_family: Callable[..., PreTrainedModel],
    edit_weights: Callable[..., Any],
    stored: Callable[[Path], dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    path = tmp_path / "model"
    make_family(family, tie_word_embeddings=True).save_pretrained(path)
    embedding = load_checkpoint(path).tensors["model.embed_tokens.weight"]
    assert isinstance(embedding, torch.Tensor)
    edit_weights(path, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    convert(path, "gpt-oss" if family == "gpt_oss" else "compressed-tensors", tmp_path / "packed")
    assert "model.embed_tokens.weight" not in stored(tmp_path / "packed")
    for place in (path, tmp_path / "packed"):
        checkpoint, loaded = load_checkpoint(place).tensors, load_model(place).state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            found = checkpoint[name]
            assert isinstance(found, torch.Tensor) and torch.equal(found, embedding)
            assert torch.equal(loaded[name], found) and torch.equal(load_tensor(place, name), found)


@pytest.mark.parametrize("others", [torch.float32, torch.float16])
def test_experts_of_several_dtypes_keep_their_values(
    others: torch.dtype, make_family: Callable[..., PreTrainedModel], edit_weights: Callable[..., Any], tmp_path: Path
) -> None:
    make_family("glm4_moe").save_pretrained(tmp_path)

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if ".experts." in name:
                tensors[name] = tensors[name].to(torch.bfloat16 if ".experts.0." in name else others)

    edit_weights(tmp_path, mix)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in load_checkpoint(tmp_path).tensors.items():
        assert isinstance(tensor, torch.Tensor) and torch.equal(tensor.float(), theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8, torch.uint8])
def test_elements_of_another_quantization_are_no_values(
    dtype: torch.dtype, plain: Path, packed: Path, edit_weights: Callable[..., Any]
) -> None:
    """Beside packed experts too, and beside a scale that nothing says how to use."""
    name = "model.layers.1.self_attn.k_proj.weight"
    for path in (plain, packed):
        edit_weights(
            path, lambda tensors: tensors.update({name: tensors[name].to(dtype), f"{name}_scale": torch.ones(1)})
        )
        fails(path, rf"{name} is (F8_E5M2|I8|U8)(, quantized| though)")
        fails(path, rf"{name} is (F8_E5M2|I8|U8), quantized", (lambda path: load_tensor(path, name),))


def test_float64_is_no_missing_quantization(plain: Path, edit_weights: Callable[..., Any]) -> None:
    edit_weights(plain, lambda tensors: tensors.update({name: each.double() for name, each in tensors.items()}))
    fails(plain, r"experts holds torch\.float64: store it in float32, bfloat16 or float16", (load_checkpoint,))


def test_missing_tensors(plain: Path, packed: Path, edit_weights: Callable[..., Any]) -> None:
    edit_weights(plain, lambda tensors: tensors.pop("model.norm.weight"))
    fails(plain, r"lacks .*model\.norm\.weight")
    edit_weights(packed, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight_scale"))
    fails(packed, r"lacks the tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight_scale")


def test_wrong_shapes_and_dtypes(
    plain: Path, packed: Path, edit_config: Callable[..., Any], edit_weights: Callable[..., Any]
) -> None:
    edit_config(plain, hidden_size=96)
    fails(plain, "has shape .* config.json asks for", (load_checkpoint,))
    fails(plain, "the weights do not fit the configuration", (load_model,))
    name = "model.layers.1.mlp.experts.3.up_proj.weight_scale"
    edit_weights(packed, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    fails(packed, f"{name} is torch.int8, not the bytes of MXFP4")


def test_broken_configuration(plain: Path) -> None:
    config = (plain / "config.json").read_text()
    for text, match in [
        ("{", r"config\.json is not valid JSON"),
        ("[]", "holds a JSON list instead of an object"),
        ("{}", "transformers knows no model_type None"),
        (config.replace("mimo_v2_flash", "mimo_v9"), "transformers knows no model_type 'mimo_v9'"),
        (config.replace('"hidden_size": 64', '"hidden_size": "wide"'), "not a valid mimo_v2_flash configuration"),
        (config.replace('"hidden_size": 64', '"hidden_size": -64'), "RuntimeError: .* negative dimension"),
        (config.replace('"head_dim": 48', '"head_dim": 0'), "ZeroDivisionError"),
        (
            config.replace('"hidden_act": "silu"', '"hidden_act": "sly"'),
            "a field of config.json must be wrong: KeyError",
        ),
        (config.replace('"dtype": "float32"', '"dtype": "float33"'), "AttributeError: .*float33"),
        (
            config.replace('"n_routed_experts": 8', '"n_routed_experts": 0'),
            r"config\.json asks for|do not fit the config",
        ),
    ]:
        (plain / "config.json").write_text(text)
        fails(plain, match)


def test_other_quantization_formats(
    plain: Path, packed: Path, edit_config: Callable[..., Any], edit_weights: Callable[..., Any]
) -> None:
    edit_config(plain, quantization_config={"quant_method": "awq"})
    fails(plain, "is quantized as awq: only unquantized weights, FP8 in tiles and the MXFP4 formats compressed-tensors")
    edit_config(plain, quantization_config={"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    fails(plain, "is quantized as compressed-tensors nvfp4-pack-quantized")
    extra = {"model.layers.0.self_attn.q_proj.weight_packed": torch.zeros(4, dtype=torch.uint8)}
    edit_weights(packed, lambda tensors: tensors.update(extra))
    fails(packed, "q_proj.weight_packed is quantized and no routed expert")


def test_quantized_activations_are_left_out_loudly(packed: Path, edit_config: Callable[..., Any]) -> None:
    quantization = json.loads((packed / "config.json").read_text())["quantization_config"]
    quantization["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "float"}
    edit_config(packed, quantization_config=quantization)
    with pytest.warns(UserWarning, match="asks for quantized activations, which are left as they are"):
        load_checkpoint(packed)


def test_extra_tensors(plain: Path, edit_weights: Callable[..., Any]) -> None:
    """Multi-token-prediction layers, which transformers leaves out too, are no surprise; anything else is."""
    edit_weights(plain, lambda tensors: tensors.update({"model.mtp.layers.0.weight": torch.zeros(2)}))
    load_checkpoint(plain)
    edit_weights(plain, lambda tensors: tensors.update({"model.surprise": torch.zeros(2)}))
    with pytest.warns(
        UserWarning, match=r"has 1 tensors that MiMoV2FlashForCausalLM does not have, such as model\.sur"
    ):
        load_checkpoint(plain)
