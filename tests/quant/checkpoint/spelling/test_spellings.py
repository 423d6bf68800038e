"""However a directory is spelled, transformers, `load_model`, engine, plan, quantize, convert and qat see one model.

Every family that has names, every spelling of `spellings`; see there. transformers' own reading of the canonical
directory, in float32, is what all are compared with; its experts through `fake_quantize` for what is rounded.
"""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, PreTrainedModel

from speedstack.cli import main
from speedstack.quant.checkpoint import convert, load_model
from speedstack.quant.checkpoint.names import FAMILIES
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, MXFP4Tensor, dequantize, fake_quantize
from speedstack.runtime import Engine
from speedstack.runtime.model.config_file import read_model_config
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.train.config.recipes import QatConfig
from speedstack.train.core.distributed import World
from speedstack.train.data.corpus import prepare_corpus
from speedstack.train.qat.recipe import QatRecipe
from speedstack.verbs.quantize import QuantizeConfig, quantize
from tests.quant.checkpoint.spelling import spellings as sp
from tests.quant.checkpoint.spelling.spellings import Spelling

CELLS = [
    pytest.param(family, spelling, id=f"{family}-{spelling.name}")
    for family in FAMILIES
    for spelling in sp.spellings(family)
]
DECODED = ("gpt_oss", "mimo_v2_flash", "qwen3_moe")
each_cell = pytest.mark.parametrize(("family", "spelling"), CELLS)
each_decoded_cell = pytest.mark.parametrize(
    ("family", "spelling"), [cell for cell in CELLS if cell.values[0] in DECODED]
)


@dataclass(frozen=True)
class Reference:
    """What transformers makes of a canonical directory.

    rounded: names of the model's experts by MXFP4 values. loss: mean KL of the rounded model from the whole.
    """

    path: Path
    logits: torch.Tensor
    rounded_logits: torch.Tensor
    loss: float


class Models:
    """Directories and references, each made once."""

    def __init__(self, root: Path, make_family: Callable[..., PreTrainedModel]) -> None:
        self.root = root
        self.corpus = root / "corpus"
        self._make_family = make_family
        self._sources: dict[tuple[str, str], Path] = {}
        self._references: dict[tuple[str, str], Reference] = {}
        self._spelled: dict[tuple[str, str], Path] = {}

    def source(self, family: str, model: str) -> Path:
        """The directory that spellings are made of: for fp8 the one in FP8."""
        if (family, model) not in self._sources:
            path = self.root / f"{family}-{model}"
            if model in ("plain", "settings"):
                self._make_family(family, **sp.overrides(family, model)).save_pretrained(path)
                sp.save_tokenizer(path)
            else:
                sp.write_model(model, self.source(family, "plain"), path)
            self._sources[family, model] = path
        return self._sources[family, model]

    def reference(self, family: str, model: str) -> Reference:
        if (family, model) not in self._references:
            path = self.source(family, model)
            if model == "fp8":
                path = Path(sp.shutil.copytree(path, self.root / f"{family}-dequantized"))
                sp.without_fp8(path)
            whole, rounded = sp.from_pretrained(path), sp.from_pretrained(path)
            sp.round_experts(rounded)
            logits, rounded_logits = sp.logits(whole), sp.logits(rounded)
            loss = F.kl_div(
                rounded_logits.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean"
            )
            self._references[family, model] = Reference(path, logits, rounded_logits, loss.item())
        return self._references[family, model]

    def spelled(self, family: str, spelling: Spelling) -> Path:
        if (family, spelling.name) not in self._spelled:
            path = self.root / "spelled" / f"{family}-{spelling.name}"
            path.parent.mkdir(exist_ok=True)
            self._spelled[family, spelling.name] = spelling.write(self.source(family, spelling.model), path)
        return self._spelled[family, spelling.name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_family: Callable[..., PreTrainedModel]) -> Models:
    models = Models(tmp_path_factory.mktemp("spellings"), make_family)
    source = models.root / "text.txt"
    source.write_text(" ".join(f"w{7 * index % 62}" for index in range(400)))
    lines = [f'{{"text": "{" ".join(f"w{(step * 5 + 3 * line) % 62}" for step in range(50))}"}}\n' for line in range(8)]
    source = source.with_suffix(".jsonl")
    source.write_text("".join(lines))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.source("qwen3_moe", "plain"))
    prepare_corpus(models.corpus, source=str(source), heldout_fraction=0.3, tokenizer=tokenizer)
    return models


def is_read(path: Path, reference: Reference) -> bool:
    """Whether transformers reads a directory's number of experts, whatever the key."""
    canonical = sp.read_fields(reference.path)
    (key,) = (name for name in sp.EXPERT_KEYS if name in canonical)
    return getattr(AutoConfig.from_pretrained(path), key, None) == canonical[key]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    difference = (found - expected).abs().max().item()
    if not difference < tolerance * max(1.0, expected.abs().max().item()):
        pytest.fail(f"logits are off by {difference:.3g}")


def see(models: Models, family: str, spelling: Spelling, check: Callable[[Path, Reference], None]) -> None:
    """`check`, which a key that transformers does not read may end with one line that names it."""
    path = models.spelled(family, spelling)
    reference = models.reference(family, spelling.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(path, reference)
        except ValueError as error:
            if spelling.name not in sp.EXPERT_KEYS or is_read(path, reference):
                raise
            line = str(error).replace(str(path), "PATH")
            assert spelling.name in line and "\n" not in line, line


@each_cell
def test_load_model(models: Models, family: str, spelling: Spelling) -> None:
    see(models, family, spelling, lambda path, reference: assert_close(sp.logits(load_model(path)), reference.logits))


@each_decoded_cell
def test_engine_and_plan(models: Models, family: str, spelling: Spelling) -> None:
    def check(path: Path, reference: Reference) -> None:
        engine = Engine.from_pretrained(path, backend="reference")
        assert_close(engine.logits(sp.IDS), reference.logits)
        assert read_model_config(path)[0] == engine.spec == spec_from_config(AutoConfig.from_pretrained(reference.path))

    see(models, family, spelling, check)


def assert_packed(out: Path, path: Path, reference: Reference, spelling: Spelling) -> None:
    """Experts are `fake_quantize` of the source's; all else has its name, bits and dtype, where it was not FP8."""
    expected, found = sp.stored(path if spelling.name == "released" else reference.path), sp.stored(out)
    left = set(found)
    for name, tensor in expected.items():
        if re.search(r"\.experts\.\d+\.\w+\.weight$", name):
            codes, scales = f"{name}_packed", f"{name}_scale"
            values = tensor
        elif re.search(r"\.experts\.(gate_up|down)_proj$", name):
            codes, scales = f"{name}_blocks", f"{name}_scales"
            values = tensor.mT.contiguous()
        else:
            assert name in found, f"{name} is lost"
            if spelling.model == "fp8":
                tensor = tensor.to(found[name].dtype)
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), f"{name} has changed"
            left.discard(name)
            continue
        assert codes in found, f"{codes} is missing"
        packed = MXFP4Tensor(found[codes].flatten(-2) if codes.endswith("blocks") else found[codes], found[scales])
        assert torch.equal(dequantize(packed, torch.float32), fake_quantize(values.float())), (
            f"{name} is not rounded once"
        )
        left -= {codes, scales}
    assert not left, f"tensors from nowhere: {sorted(left)[:3]}"


@each_cell
def test_quantize(models: Models, family: str, spelling: Spelling, tmp_path: Path) -> None:
    def check(path: Path, reference: Reference) -> None:
        config = QuantizeConfig.model_validate({"model": path, "method": "rtn", "out": tmp_path / "out"})
        assert config.chosen_scale_rule == DEFAULT_SCALE_RULE
        quantize(config)
        assert_packed(tmp_path / "out", path, reference, spelling)
        # Linear layers in FP8 become bfloat16 where the format has none.
        tolerance = 2e-2 if spelling.model == "fp8" else 2e-4
        assert_close(sp.logits(load_model(tmp_path / "out")), reference.rounded_logits, tolerance)

    see(models, family, spelling, check)


@each_cell
def test_convert(models: Models, family: str, spelling: Spelling, tmp_path: Path) -> None:
    def check(path: Path, reference: Reference) -> None:
        convert(path, "gpt-oss" if FAMILIES[family].is_fused else "compressed-tensors", tmp_path / "out")
        assert_packed(tmp_path / "out", path, reference, spelling)
        # Linear layers in FP8 become bfloat16 where the format has none.
        tolerance = 2e-2 if spelling.model == "fp8" else 2e-4
        assert_close(sp.logits(load_model(tmp_path / "out")), reference.rounded_logits, tolerance)

    see(models, family, spelling, check)


@pytest.mark.parametrize(
    ("family", "spelling"), [cell for cell in CELLS if cast(Spelling, cell.values[1]).model == "fp8"]
)
def test_convert_fp8_to_plain(models: Models, family: str, spelling: Spelling, tmp_path: Path) -> None:
    def check(path: Path, reference: Reference) -> None:
        convert(path, "plain", tmp_path / "out")
        expected, found = sp.stored(reference.path), sp.stored(tmp_path / "out")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].float(), tensor.to(found[name].dtype).float()), name

    see(models, family, spelling, check)


@each_cell
def test_first_loss_of_qat(models: Models, family: str, spelling: Spelling, tmp_path: Path) -> None:
    def check(path: Path, reference: Reference) -> None:
        sections = {
            "run": {"name": "job", "out": str(tmp_path), "device": "cpu", "precision": "float32"},
            "data": {
                "corpus": str(models.corpus),
                "source": str(models.root / "text.jsonl"),
                "heldout_fraction": 0.3,
                "sequence_length": 16,
            },
            "loop": {"num_steps": 1, "batch_size": 1},
            "qat": {"model": str(path), "teacher_dtype": "float32"},
        }
        recipe = QatRecipe(QatConfig.model_validate(sections))
        student = recipe.build(World(0, 1, torch.device("cpu")))
        batch = torch.tensor([sp.IDS])
        with torch.no_grad():
            assert_close(recipe.teacher(input_ids=batch, use_cache=False).logits[0], reference.logits)
            loss = recipe.loss(student, batch)[0].item()
        assert loss == pytest.approx(reference.loss, rel=1e-3)

    see(models, family, spelling, check)


@pytest.mark.parametrize(
    ("family", "name"),
    [("mimo_v2_flash", "makers"), ("qwen3_moe", "fused_old_snapshot"), ("deepseek_v3", "fp8_old_snapshot")],
)
def test_a_step_of_qat(models: Models, family: str, name: str, tmp_path: Path) -> None:
    """The verb itself, on a spelling and on the canonical directory: the same figures and the same export."""
    spelling = next(spelling for spelling in sp.spellings(family) if spelling.name == name)
    path, reference = models.spelled(family, spelling), models.reference(family, spelling.model)
    results = []
    for number, model in enumerate((reference.path, path)):
        options: dict[str, Any] = {
            "qat.model": model,
            "data.corpus": models.corpus,
            "data.source": models.root / "text.jsonl",
        }
        options |= {"data.heldout-fraction": 0.3, "data.sequence-length": 16, "data.eval-sequences": 2}
        options |= {"run.name": f"job-{number}", "run.out": tmp_path, "run.device": "cpu", "run.precision": "float32"}
        options |= {"loop.num-steps": 1, "loop.batch-size": 1, "loop.save-every": 0, "optim.name": "adamw"}
        options |= {"run.wandb-mode": "disabled"}
        assert main(["qat", *(text for key, value in options.items() for text in (f"--{key}", str(value)))]) == 0
        lines = (tmp_path / f"job-{number}" / "metrics.jsonl").read_text().splitlines()
        figures = [json.loads(line) for line in lines]
        results.append((figures, sp.logits(load_model(tmp_path / f"job-{number}" / "export"))))
    (expected, expected_logits), (found, found_logits) = results
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() & {"loss", "heldout_kl", "heldout_loss"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4), key
    assert_close(found_logits, expected_logits)
