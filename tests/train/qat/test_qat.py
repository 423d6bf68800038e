import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from speedstack.eval.quality.divergence import token_kl
from speedstack.eval.results.metrics import read_metrics
from speedstack.quant import grouped
from speedstack.quant.calibration import gptq_experts
from speedstack.quant.checkpoint import load_checkpoint, load_model
from speedstack.quant.experts import enable_autocast, enable_fake_quant, expert_parameters, router_parameters
from speedstack.quant.mxfp4 import MXFP4Tensor, ScaleRule, fake_quantize
from speedstack.quant.ptq import round_to_nearest
from speedstack.train.config.recipes import OptimSection, QatConfig
from speedstack.train.core.batches import PackedWindows
from speedstack.train.core.loop import RunResult
from speedstack.train.core.objective import forward_kl
from speedstack.train.core.optim import build_optimizer
from speedstack.train.data.corpus import load_corpus
from speedstack.train.qat.recipe import qat
from tests.packing import save_packed

MakeConfig = Callable[..., QatConfig]


def test_forward_kl_is_the_mean_over_positions_in_nats() -> None:
    teacher = torch.tensor([[[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]]).log()
    student = torch.tensor([[[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]]).log() + 3.0
    by_hand = (0.5 * torch.tensor(2.0).log() - 0.25 * torch.tensor(2.0).log()) / 2
    torch.testing.assert_close(forward_kl(teacher, student), by_hand)
    assert forward_kl(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32


def mean_kl(teacher_BTV: torch.Tensor, student_BTV: torch.Tensor) -> float:
    return token_kl(teacher_BTV.flatten(0, 1), student_BTV.flatten(0, 1)).mean().item()


@pytest.fixture(scope="module")
def trained(pretrained: RunResult, make_qat_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """40 steps of QAD of the pretrained model, experts only."""
    return qat(
        make_qat_config(
            tmp_path_factory.mktemp("qat"),
            pretrained.export_path,
            optim__name="adamw",
            optim__lr=1e-3,
            loop__num_steps=40,
            loop__eval_every=0,
        )
    )


def heldout_ids(corpus_path: Path) -> torch.Tensor:
    windows = PackedWindows(load_corpus(corpus_path).heldout, 32)
    return torch.stack([windows.window(index * len(windows) // 4) for index in range(4)])


@torch.no_grad()
def test_distillation_beats_rounding(trained: RunResult, pretrained: RunResult, corpus_path: Path) -> None:
    ids = heldout_ids(corpus_path)
    teacher, rounded = load_model(pretrained.export_path), load_model(pretrained.export_path)
    round_to_nearest(rounded)
    ptq_kl = forward_kl(teacher(input_ids=ids).logits, rounded(input_ids=ids).logits).item()
    assert 0 < trained.metrics["heldout_kl"] < 0.8 * ptq_kl


@torch.no_grad()
def test_the_packed_export_is_the_student_that_was_evaluated(
    trained: RunResult, pretrained: RunResult, corpus_path: Path
) -> None:
    assert load_checkpoint(trained.export_path).is_packed
    ids = heldout_ids(corpus_path)
    student = load_model(trained.export_path)(input_ids=ids).logits
    teacher = load_model(pretrained.export_path)(input_ids=ids).logits
    # Equal weights, another experts implementation: float32 rounding of the products.
    assert mean_kl(teacher, student) == pytest.approx(trained.metrics["heldout_kl"], rel=1e-3)
    loss = F.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    assert loss == pytest.approx(trained.metrics["heldout_loss"], abs=1e-5)


def test_only_the_experts_have_moved(trained: RunResult, pretrained: RunResult) -> None:
    before = load_model(pretrained.export_path)
    after = load_model(trained.export_path).state_dict()
    experts = set(expert_parameters(before))
    assert experts
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after[name]) == (name not in experts), name


def test_what_was_not_trained_is_exported_as_it_came(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    source = tmp_path / "bfloat16"
    shutil.copytree(pretrained.export_path, source)
    load_model(pretrained.export_path, dtype=torch.bfloat16).save_pretrained(source)
    fields = json.loads((source / "config.json").read_text())
    fields |= {"torch_dtype": fields.pop("dtype"), "of_the_makers": True}
    (source / "config.json").write_text(json.dumps(fields))
    (source / "LICENSE").write_text("free")
    before = load_file(source / "model.safetensors")
    frozen = qat(make_qat_config(tmp_path / "a", source, loop__num_steps=1, loop__eval_every=0)).export_path
    after = load_file(frozen / "model.safetensors")
    for name in before.keys() & after.keys():
        assert after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]), name

    config = make_qat_config(tmp_path / "b", source, loop__num_steps=1, loop__eval_every=0, qat__trainable="all")
    trained = qat(config).export_path
    for path, dtype in ((frozen, "bfloat16"), (trained, "float32")):
        stored = json.loads((path / "config.json").read_text())
        del stored["quantization_config"]
        assert stored == fields | {"torch_dtype": dtype}
        for name in ("LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (path / name).read_bytes() == (source / name).read_bytes()
    # What was evaluated is what is stored: float32 masters that bfloat16 does not hold.
    masters = load_file(config.run_directory / "checkpoints" / "step-1" / "model.safetensors")
    exported = load_checkpoint(trained).tensors
    others = {name: tensor for name, tensor in exported.items() if not isinstance(tensor, MXFP4Tensor)}
    assert others and all(
        torch.equal(masters[name], tensor.float()) for name, tensor in others.items() if name in masters
    )


def test_evaluation_before_the_first_step_is_post_training_quantization(
    pretrained: RunResult, make_qat_config: MakeConfig, corpus_path: Path, tmp_path: Path
) -> None:
    config = make_qat_config(tmp_path, pretrained.export_path, loop__num_steps=1, qat__scale_rule="floor")
    first = read_metrics(qat(config).path)[0]
    assert (first["kind"], first["step"]) == ("eval", 0)
    ids = heldout_ids(corpus_path)
    teacher, rounded = load_model(pretrained.export_path), load_model(pretrained.export_path)
    round_to_nearest(rounded, "floor")
    with torch.no_grad():
        expected = mean_kl(teacher(input_ids=ids).logits, rounded(input_ids=ids).logits)
    assert first["heldout_kl"] == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def gptq_export(pretrained: RunResult, corpus_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pretrained model after GPTQ, packed."""
    path = tmp_path_factory.mktemp("gptq") / "packed"
    model = load_model(pretrained.export_path)
    gptq_experts(model, heldout_ids(corpus_path).split(2))
    save_packed(model, path)
    return path


@pytest.mark.parametrize("scale_rule", get_args(ScaleRule))
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.no_grad()
def test_values_of_a_packed_model_are_where_training_starts(
    pretrained: RunResult, gptq_export: Path, corpus_path: Path, scale_rule: ScaleRule, precision: str
) -> None:
    """Fake-quant is the identity on the grid, so the first forward is that of the packed model, bit for bit."""
    ids = heldout_ids(corpus_path)
    packed, student, rounded = (load_model(path) for path in (gptq_export, gptq_export, pretrained.export_path))
    for weight in expert_parameters(packed).values():
        assert torch.equal(fake_quantize(weight, scale_rule).view(torch.int32), weight.view(torch.int32))
    enable_autocast(packed)
    enable_fake_quant(student, scale_rule)
    enable_fake_quant(rounded, scale_rule)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        packed_BTV, student_BTV, rounded_BTV = (model(input_ids=ids).logits for model in (packed, student, rounded))
    assert torch.equal(student_BTV, packed_BTV)
    assert not torch.equal(student_BTV, rounded_BTV), "GPTQ's values are not those of rounding"


def test_training_from_gptq(
    pretrained: RunResult, gptq_export: Path, make_qat_config: MakeConfig, corpus_path: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"loop__num_steps": 2, "qat__start_from": str(gptq_export), "qat__scale_rule": "floor"}
    config = make_qat_config(tmp_path, pretrained.export_path, **options)
    run = qat(config)
    first = read_metrics(run.path)[0]
    ids = heldout_ids(corpus_path)
    teacher, packed = load_model(pretrained.export_path), load_model(gptq_export)
    with torch.no_grad():
        expected = mean_kl(teacher(input_ids=ids).logits, packed(input_ids=ids).logits)
    # The mean is taken in another order.
    assert first["heldout_kl"] == pytest.approx(expected, rel=1e-9)
    start, end = load_model(gptq_export).state_dict(), load_model(run.export_path).state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and moved <= set(expert_parameters(packed))

    replaced = tmp_path / "replaced"
    shutil.copytree(gptq_export, replaced)
    options["qat__start_from"] = str(replaced)
    config = make_qat_config(tmp_path / "b", pretrained.export_path, **options)
    qat(config)
    save_packed(teacher, replaced)
    with pytest.raises(ValueError, match="the start_from of this run has changed since it was started"):
        qat(config)


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"qat__objective": "ce", "qat__trainable": "all"}, set()),
        ({"qat__objective": "mix", "qat__ce_weight": 0.25, "run__precision": "bfloat16"}, {"kl", "cross_entropy"}),
        ({"qat__teacher_dtype": "bfloat16", "run__precision": "bfloat16"}, set()),
        ({"qat__trainable": "all_but_router", "run__precision": "bfloat16"}, set()),
    ],
)
def test_options(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path, changes: dict[str, object], keys: set[str]
) -> None:
    result = qat(make_qat_config(tmp_path, pretrained.export_path, loop__num_steps=2, **changes))
    line = next(line for line in read_metrics(result.path) if line["kind"] == "train")
    assert keys <= line.keys()
    if keys:
        assert line["loss"] == pytest.approx(0.25 * line["cross_entropy"] + 0.75 * line["kl"], rel=1e-5)
    before, after = load_model(pretrained.export_path), load_model(result.export_path)
    moved = {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])}
    trainable = changes.get("qat__trainable", "experts")
    assert ("lm_head.weight" in moved) == (trainable != "experts")
    assert bool(moved & router_parameters(before).keys()) == (trainable == "all")


def numbers(run_directory: Path) -> list[dict[str, Any]]:
    """The record without what a clock says."""
    clock = {"elapsed_seconds", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in read_metrics(run_directory)]


def test_flips_are_recorded_and_survive_a_resume(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"qat__look_every": 1, "optim__name": "adamw", "optim__lr": 1e-2, "loop__eval_every": 2}
    whole = qat(make_qat_config(tmp_path / "whole", pretrained.export_path, **options))
    first, *_, last = (line for line in numbers(whole.path) if line["kind"] == "eval")
    assert first["flips_since_start"] == first["oscillating"] == 0.0
    assert last["flips_since_start"] > last["flips_since_look"] > 0.0
    assert last["oscillating"] > 0.0

    config = make_qat_config(tmp_path / "resumed", pretrained.export_path, **options)
    shutil.copytree(whole.path, config.run_directory)
    shutil.rmtree(config.run_directory / "export")
    shutil.rmtree(config.run_directory / "checkpoints" / "step-6")
    assert numbers(qat(config).path) == numbers(whole.path)

    # Of looks nothing is trained: a checkpoint without any is continued from.
    blind = make_qat_config(tmp_path / "blind", pretrained.export_path, **(options | {"qat__look_every": 0}))
    shutil.copytree(whole.path, blind.run_directory)
    shutil.rmtree(blind.run_directory / "export")
    shutil.rmtree(blind.run_directory / "checkpoints" / "step-6")
    manifest = blind.run_directory / "checkpoints" / "step-4" / "COMPLETE.json"
    content = json.loads(manifest.read_text())
    del content["files"]["recipe.safetensors"]
    manifest.write_text(json.dumps(content))
    (manifest.parent / "recipe.safetensors").unlink()
    with pytest.warns(UserWarning, match="no record of flips .*: flips between looks are counted anew"):
        seeing = qat(make_qat_config(tmp_path / "blind", pretrained.export_path, **options))
    assert seeing.metrics["flips_since_start"] == last["flips_since_start"]
    assert seeing.metrics["heldout_kl"] == last["heldout_kl"]

    silent = qat(make_qat_config(tmp_path / "silent", pretrained.export_path, **(options | {"qat__look_every": 0})))
    assert "oscillating" not in silent.metrics
    assert silent.metrics["heldout_kl"] == last["heldout_kl"], "looking changes nothing"

    rare = qat(make_qat_config(tmp_path / "rare", pretrained.export_path, **(options | {"qat__look_every": 5})))
    shares = [line.get("flips_since_start") for line in numbers(rare.path) if line["kind"] == "eval"]
    assert shares[:3] == [0.0, None, None] and shares[3], "before the first look nobody knows"


def test_activation_checkpointing_changes_no_number(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer's experts are computed, and packed for the backward, once more in each step; nothing else changes."""
    num_packed = 0

    def counted(*arguments: Any) -> MXFP4Tensor:
        nonlocal num_packed
        num_packed += 1
        return pack(*arguments)

    pack = grouped._pack
    monkeypatch.setattr(grouped, "_pack", counted)
    records, counts = [], []
    for is_on in (False, True):
        config = make_qat_config(
            tmp_path / str(is_on),
            pretrained.export_path,
            run__precision="bfloat16",
            loop__num_steps=3,
            qat__activation_checkpointing=is_on,
            qat__trainable="all",
        )
        num_packed = 0
        records.append(numbers(qat(config).path))
        counts.append(num_packed)
    assert records[0] == records[1]
    assert counts[1] == 2 * counts[0] > 0


def test_dampening_keeps_masters_near_their_values(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    def distance(dampening: float, micro_batch_size: int) -> float:
        config = make_qat_config(
            tmp_path / f"{dampening}-{micro_batch_size}",
            pretrained.export_path,
            qat__dampening=dampening,
            loop__micro_batch_size=micro_batch_size,
            optim__name="adamw",
            optim__lr=1e-3,
            optim__grad_clip=0.0,
        )
        masters = load_file(qat(config).path / "checkpoints" / "step-6" / "model.safetensors")
        return sum((w - fake_quantize(w)).square().sum().item() for w in masters.values() if w.ndim == 3)

    assert distance(10.0, 0) < 0.9 * distance(0.0, 0)
    # The pull is of an optimizer step, however many backward passes make one.
    assert distance(10.0, 1) == pytest.approx(distance(10.0, 0), rel=1e-2)


def test_masters_are_float32_whatever_the_file_holds(
    pretrained: RunResult, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    """In bfloat16 an update of 1e-5 of a weight would vanish without a trace."""
    model = load_model(pretrained.export_path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    load_corpus(make_qat_config(tmp_path, tmp_path).data.corpus).tokenizer.save_pretrained(tmp_path / "half")
    result = qat(make_qat_config(tmp_path, tmp_path / "half", loop__num_steps=1))
    masters = load_file(result.path / "checkpoints" / "step-1" / "model.safetensors")
    assert {tensor.dtype for tensor in masters.values() if tensor.ndim == 3} == {torch.float32}
    with pytest.raises(ValueError, match=r"down_proj.weight is torch.bfloat16: master weights have to be float32"):
        build_optimizer(torch.nn.ModuleDict({"down_proj": torch.nn.Linear(2, 2).bfloat16()}), OptimSection())


@pytest.mark.parametrize("family", ["mimo_v2_flash", "gpt_oss", "qwen3_moe"])
def test_a_teacher_held_in_bfloat16_is_measured_in_float32(
    family: str,
    pretrained: RunResult,
    random_model: Callable[[str, Path], Path],
    make_qat_config: MakeConfig,
    tmp_path: Path,
) -> None:
    """Of weights that bfloat16 holds the held-out figures are those of a float32 teacher, bit for bit."""
    source = pretrained.export_path if family == "mimo_v2_flash" else random_model(family, tmp_path / "random")
    model = load_model(source, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    load_corpus(make_qat_config(tmp_path, tmp_path).data.corpus).tokenizer.save_pretrained(tmp_path / "model")

    def first(teacher_dtype: str) -> dict[str, Any]:
        options: dict[str, Any] = {"loop__num_steps": 1, "loop__eval_every": 1, "qat__teacher_dtype": teacher_dtype}
        config = make_qat_config(tmp_path / teacher_dtype, tmp_path / "model", **options)
        return numbers(qat(config).path)[0]

    assert first("bfloat16") == first("float32")


@pytest.mark.filterwarnings("ignore:no packed format is known for minimax_m2")
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss", "minimax_m2"])
def test_other_families(
    family: str, make_qat_config: MakeConfig, random_model: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    model = random_model(family, tmp_path / family)
    load_model(model, dtype=torch.bfloat16).save_pretrained(model)
    (model / "LICENSE").write_text("free")
    head = {"model.mtp.0.eh_proj.weight": torch.randn(64, 128).half()}
    weights = load_file(model / "model.safetensors") | head
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    result = qat(make_qat_config(tmp_path, model, loop__num_steps=3, optim__name="adamw", optim__lr=1e-3))
    assert result.metrics["heldout_kl"] > 0
    before, after = load_model(model), load_model(result.export_path)
    rounded = load_model(model)
    round_to_nearest(rounded)
    for name, weight in expert_parameters(after).items():
        assert torch.equal(weight, fake_quantize(weight) if family != "gpt_oss" else fake_quantize(weight.mT).mT)
        assert not torch.equal(weight, expert_parameters(rounded)[name]), "trained beyond rounding"
    name = "model.embed_tokens.weight"
    assert torch.equal(before.get_parameter(name), after.get_parameter(name))
    # Everything else is as it came, prediction heads too.
    exported = load_file(result.export_path / "model.safetensors")
    for name, tensor in weights.items():
        if ".experts." not in name or "bias" in name:
            assert exported[name].dtype == tensor.dtype and torch.equal(exported[name], tensor), name
    sizes = [(path / "model.safetensors").stat().st_size for path in (result.export_path, model)]
    assert sizes[0] <= sizes[1]
    fields = [json.loads((path / "config.json").read_text()) for path in (result.export_path, model)]
    assert fields[1] == {key: value for key, value in fields[0].items() if key != "quantization_config"}
    assert (result.export_path / "LICENSE").read_text() == "free"


def test_a_start_of_another_architecture_is_refused(
    pretrained: RunResult,
    gptq_export: Path,
    make_qat_config: MakeConfig,
    random_model: Callable[[str, Path], Path],
    tmp_path: Path,
) -> None:
    other = random_model("qwen3_moe", tmp_path / "other")
    narrow = tmp_path / "narrow"
    shutil.copytree(gptq_export, narrow)
    fields = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(fields | {"num_experts_per_tok": 1}))
    for path, message in (
        (tmp_path / "nowhere", "no model directory at .*nowhere"),
        (other, "is another architecture than qat.model .*: model_type is 'qwen3_moe' instead of 'mimo_v2_flash'"),
        (narrow, "num_experts_per_tok is 1 instead of 2"),
    ):
        config = make_qat_config(tmp_path / path.name, pretrained.export_path, qat__start_from=str(path))
        with pytest.raises(ValueError, match=message) as caught:
            qat(config)
        assert "\n" not in str(caught.value)

    (narrow / "config.json").write_text(json.dumps(fields))
    weights = load_file(narrow / "model.safetensors")
    name = next(name for name in weights if name.endswith("down_proj.weight_packed"))
    weights[name] = weights[name][:-1].clone()
    save_file(weights, narrow / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has shape"):
        qat(make_qat_config(tmp_path / "cut", pretrained.export_path, qat__start_from=str(narrow)))


def test_a_teacher_that_teaches_nothing_is_refused(
    pretrained: RunResult, gptq_export: Path, make_qat_config: MakeConfig, tmp_path: Path
) -> None:
    """Its divergence from its own values is 0, and training would only lead away from it."""
    packed = Path(shutil.copytree(gptq_export, tmp_path / "packed"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pretrained.export_path / name, packed)
    for objective in ("kl", "mix"):
        with pytest.raises(ValueError, match=r"has its experts in MXFP4 already, .* as qat\.start_from"):
            qat(make_qat_config(tmp_path / objective, packed, qat__objective=objective))
    result = qat(make_qat_config(tmp_path / "ce", packed, qat__objective="ce", loop__num_steps=1))
    assert result.metrics["heldout_loss"] > 0
