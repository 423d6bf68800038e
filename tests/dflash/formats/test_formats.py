"""Every option in every format: round trip to the bit, or refused by name with nothing written."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from speedstack.dflash.checkpoint import convert_drafter, is_drafter, load_config, load_drafter, save_drafter
from speedstack.dflash.formats.format import Target
from speedstack.dflash.formats.registry import FORMATS, recognize

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sample_from_anchor": {"sample_from_anchor": True},
    "markov_rank": {"markov_rank": 4},
    "dspark": {"sample_from_anchor": True, "markov_rank": 4},
    "draft_vocab_size": {"draft_vocab_size": 50},
    "causal windows": {
        "layer_types": ("full_attention", "sliding_attention"),
        "sliding_window": 6,
        "sliding_is_causal": True,
    },
    "windows": {
        "layer_types": ("sliding_attention",) * 2,
        "sliding_window": 6,
        "sliding_is_causal": False,
    },
    "attention_sinks": {"attention_sinks": True},
    "attention_value_scale": {"attention_value_scale": 0.612},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "mask_embedding": {"mask_embedding": True},
}
HEAD = torch.randn(128, 64, generator=torch.Generator().manual_seed(9))
TARGET = Target("models/target", ("MiMoV2FlashForCausalLM",), HEAD)
# What each format says, by the names of OPTIONS; ours says all.
SAYS = {
    "speedstack": set(OPTIONS),
    "zlab": {"plain", "causal windows", "windows"},
    "mimo": set(OPTIONS) - {"sample_from_anchor", "markov_rank", "dspark", "draft_vocab_size"},
    "speculators": {
        *("plain", "sample_from_anchor", "markov_rank", "dspark", "draft_vocab_size", "causal windows", "windows")
    },
    "transformers": {"plain", "windows"},
}


@pytest.mark.filterwarnings("ignore:this drafter reads the output of the target's last layer")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_round_trip_or_refusal(make_drafter, tmp_path, form, name):
    drafter = make_drafter(**OPTIONS[name])
    path = tmp_path / "drafter"
    if name not in SAYS[form]:
        with pytest.raises(ValueError, match=f"{'causal' if name == 'causal windows' else next(iter(OPTIONS[name]))}"):
            save_drafter(drafter, path, to=form, target=TARGET)
        assert not any(tmp_path.iterdir())
        return
    save_drafter(drafter, path, to=form, target=TARGET)
    raw = json.loads((path / "config.json").read_text())
    found = recognize(raw)
    assert found is not None and found.name in (form, "speedstack") and is_drafter(path)
    loaded = load_drafter(path)
    assert loaded.config == drafter.config == load_config(path)
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    for key, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key]), key


def test_five_layers_are_58_tensors_in_z_labs_format(make_drafter, tmp_path):
    save_drafter(make_drafter(num_hidden_layers=5), tmp_path / "drafter", to="zlab")
    stored = load_file(tmp_path / "drafter" / "model.safetensors")
    assert len(stored) == 58
    assert {name.split(".")[0] for name in stored} == {"fc", "hidden_norm", "norm", "layers"}
    assert stored["fc.weight"].shape == (64, 2 * 64)


def test_conversion_keeps_weights_and_card(make_drafter, tmp_path):
    drafter = make_drafter()
    save_drafter(drafter, tmp_path / "ours", torch.bfloat16, card={"acceptance": {"held-out": 3.5}})
    assert convert_drafter(tmp_path / "ours", "transformers", tmp_path / "theirs") == drafter.config
    convert_drafter(tmp_path / "theirs", "zlab", tmp_path / "again")
    for file in ("model.safetensors", "config.json", "card.json", "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes(), file
    with pytest.raises(ValueError, match="choose another --out"):
        convert_drafter(tmp_path / "ours", "zlab", tmp_path / "ours")
    with pytest.raises(ValueError, match="'onnx' is no format of drafters: choose one of speedstack, zlab, mimo"):
        convert_drafter(tmp_path / "ours", "onnx", tmp_path / "x")


def test_speculators_config_is_nested_and_its_ids_are_one_higher(make_drafter, tmp_path):
    drafter = make_drafter(sample_from_anchor=True, markov_rank=4, target_layer_ids=(0, 1))
    save_drafter(drafter, tmp_path / "drafter", to="speculators", target=TARGET)
    raw = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert raw["aux_hidden_state_layer_ids"] == [1, 2]
    assert raw["speculators_model_type"] == raw["speculators_config"]["algorithm"] == "dspark"
    assert raw["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert raw["speculators_config"]["verifier"] == {
        "architectures": ["MiMoV2FlashForCausalLM"],
        "name_or_path": "models/target",
    }
    assert raw["transformer_layer_config"]["hidden_size"] == 64 and "hidden_size" not in raw
    with pytest.warns(UserWarning, match="target's last layer"):
        save_drafter(make_drafter(), tmp_path / "last", to="speculators")


def test_speculators_stores_the_heads_rows_of_a_pruned_vocabulary(make_drafter, tmp_path):
    drafter = make_drafter(draft_vocab_size=50, target_layer_ids=(0, 1))
    path = tmp_path / "drafter"
    with pytest.raises(ValueError, match="name the target with --target"):
        save_drafter(drafter, path, to="speculators")
    save_drafter(drafter, path, to="speculators", target=TARGET)
    stored = load_file(path / "model.safetensors")
    ids = drafter.target_ids(torch.arange(50))
    assert torch.equal(stored["lm_head.weight"], HEAD[ids])
    assert torch.equal(stored["t2d"].nonzero()[:, 0], ids) and stored["t2d"].dtype == torch.bool
    stored["t2d"] = stored["t2d"].roll(1)
    save_file(stored, path / "model.safetensors")
    with pytest.raises(ValueError, match="t2d and d2t"):
        load_drafter(path)


def test_a_confidence_head_is_left_out_loudly(make_drafter, tmp_path):
    path = tmp_path / "drafter"
    save_drafter(make_drafter(markov_rank=4, target_layer_ids=(0, 1)), path, to="speculators")
    stored = load_file(path / "model.safetensors")
    save_file(stored | {"confidence_head.proj.weight": torch.zeros(1, 68)}, path / "model.safetensors")
    with pytest.warns(UserWarning, match="confidence head"):
        load_drafter(path)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (raw | changes).items() if value != "absent"}))


@pytest.mark.filterwarnings("ignore:this drafter reads the output of the target's last layer")
@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("speculators", {"aux_hidden_state_layer_ids": [0, 3]}, "0 is the embedding"),
        ("speculators", {"aux_hidden_state_layer_ids": [1, 9]}, "distinct layers of 0..2"),
        ("speculators", {"speculators_model_type": "eagle3"}, "speculators_model_type = 'eagle3'"),
        ("speculators", {"transformer_layer_config": None}, "lacks transformer_layer_config"),
        ("speculators", {"target_hidden_size": 32}, "target_hidden_size"),
        ("speculators", {"draft_vocab_size": "absent"}, "lacks draft_vocab_size"),
        ("speculators", {"draft_vocab_size": 500}, "less than the vocabulary"),
        ("transformers", {"vocab_size": "absent"}, "lacks vocab_size"),
        ("transformers", {"target_layer_ids": [0, 3]}, "distinct layers of 0..2"),
        ("transformers", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type"),
        ("transformers", {"hidden_act": "gelu"}, "hidden_act"),
        ("zlab", {"architectures": ["DFlash2DraftModel"]}, "architectures"),
        ("zlab", {"architectures": ["Qwen3ForCausalLM"], "dflash_config": "absent"}, "no drafter's"),
    ],
)
def test_configs_that_make_no_sense_are_named(make_drafter, tmp_path, form, changes, message):
    path = tmp_path / "drafter"
    save_drafter(make_drafter(), path, to=form)
    edit_config(path, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_drafter(path)
    assert "\n" not in str(caught.value)


def test_a_target_from_elsewhere_may_have_any_number_of_layers(make_drafter, tmp_path):
    path = tmp_path / "drafter"
    save_drafter(make_drafter(), path, to="transformers")
    edit_config(path, num_target_layers="absent", target_sha256="absent")
    config = load_drafter(path).config
    assert config.num_target_layers is None and config.target_layer_ids == (0, 2)


def test_shards_are_read_by_their_index(make_drafter, tmp_path):
    """MiMo's drafters are one file of another name beside an index."""
    path = tmp_path / "drafter"
    drafter = make_drafter(mask_embedding=True)
    save_drafter(drafter, path, to="mimo")
    stored = load_file(path / "model.safetensors")
    (path / "model.safetensors").rename(path / "dflash_draft_model.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, "dflash_draft_model.safetensors")}))
    loaded = load_drafter(path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in drafter.state_dict().items())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, "../elsewhere.safetensors")}))
    with pytest.raises(ValueError, match="files beside it"):
        load_drafter(path)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(stored, "other.safetensors")}))
    with pytest.raises(ValueError, match=r"other\.safetensors is missing"):
        load_drafter(path)


def test_draft_ids_outside_the_vocabulary_are_refused(make_drafter, tmp_path):
    path = tmp_path / "drafter"
    save_drafter(make_drafter(draft_vocab_size=50), path)
    stored = load_file(path / "model.safetensors")
    for d2t in (stored["d2t"] + 100, stored["d2t"] - 100, stored["d2t"].flip(0), stored["d2t"].float()):
        save_file(stored | {"d2t": d2t}, path / "model.safetensors")
        with pytest.raises(ValueError, match=r"draft vocabulary: .* below 128|must be integers"):
            load_drafter(path)


class Payload:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_mask_embedding_that_carries_code_is_refused_and_not_run(make_drafter, tmp_path):
    path, trace = tmp_path / "drafter", tmp_path / "it ran"
    save_drafter(make_drafter(mask_embedding=True), path, to="mimo")
    file = path / "mask_embedding.pt"
    torch.save({"embedding": torch.zeros(64), "mask_token_id": 2, "extra": Payload(trace)}, file)
    with pytest.raises(ValueError, match="more than tensors") as caught:
        load_drafter(path)
    assert "\n" not in str(caught.value) and not trace.exists()
    file.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    with pytest.raises(ValueError, match="more than tensors"):
        load_drafter(path)
    assert not trace.exists()
    pickle.loads(file.read_bytes())
    assert trace.exists(), "the payload is harmless: the test proves nothing"


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"embedding": torch.zeros(63), "mask_token_id": 2}, r"shape \[63\]"),
        ({"embedding": torch.zeros(2, 64), "mask_token_id": 2}, r"shape \[2, 64\]"),
        ({"embedding": torch.zeros(64), "mask_token_id": 3}, "token 3, config.json says 2"),
        ({"embedding": torch.zeros(8, 64), "mask_token_id": 2, "per_position": True}, "by position"),
        ({"mask_token_id": 2}, "no embedding"),
        (torch.zeros(64, dtype=torch.int64), "no embedding"),
        (b"", "corrupt"),
        (b"PK\x03\x04 truncated", "corrupt"),
    ],
)
def test_mask_embeddings_that_are_none(make_drafter, tmp_path, saved, message):
    path = tmp_path / "drafter"
    save_drafter(make_drafter(mask_embedding=True), path, to="mimo")
    file = path / "mask_embedding.pt"
    if isinstance(saved, bytes):
        file.write_bytes(saved)
    else:
        torch.save(saved, file)
    with pytest.raises(ValueError, match=message) as caught:
        load_drafter(path)
    assert "\n" not in str(caught.value)


def test_a_mask_embedding_needs_no_key_but_a_key_needs_the_file(make_drafter, tmp_path):
    path = tmp_path / "drafter"
    drafter = make_drafter(mask_embedding=True)
    save_drafter(drafter, path, to="mimo")
    raw = json.loads((path / "config.json").read_text())
    edit_config(path, dflash_config={k: v for k, v in raw["dflash_config"].items() if k != "mask_embedding"})
    assert drafter.mask_embedding is not None
    for saved in (drafter.mask_embedding.detach(), drafter.mask_embedding.detach()[None]):
        torch.save(saved, path / "mask_embedding.pt")
        loaded = load_drafter(path)
        assert loaded.mask_embedding is not None and torch.equal(loaded.mask_embedding, drafter.mask_embedding)
    edit_config(path, dflash_config=raw["dflash_config"])
    (path / "mask_embedding.pt").unlink()
    with pytest.raises(ValueError, match=r"mask_embedding\.pt is missing"):
        load_drafter(path)


@pytest.mark.filterwarnings("ignore:this drafter reads the output of the target's last layer")
@pytest.mark.parametrize("form", ["zlab", "speculators", "transformers"])
def test_junk_in_any_key_is_one_line(make_drafter, form):
    """Every value of a config.json is replaced by values of other types: it is read, or refused with one line."""
    config = make_drafter(**OPTIONS["windows"]).config
    raw = FORMATS[form].to_json(config, "float32", TARGET)
    inside = {"zlab": "dflash_config", "speculators": "transformer_layer_config", "transformers": "rope_parameters"}
    refused = 0
    for place in (raw, raw[inside[form]]):
        for key, kept in place.items():
            for junk in (None, "x", -1, 2.5, True, [], ["x"], [-1], [None], {}, {"rope_type": 3}):
                place[key] = junk
                found = recognize(raw)
                if found is None:
                    continue
                try:
                    assert found.from_json(raw).hidden_size == 64
                except ValueError as error:
                    refused += 1
                    assert "\n" not in str(error) and str(error), key
            place[key] = kept
    assert FORMATS[form].from_json(raw) == config
    assert refused > 100
