"""Damaged model directories end in what transformers makes of them, or in one clear line.

`mutations` has the kinds of damage. Each case is drawn from its number alone. A result is right when transformers, on
the same damaged directory, computes the same logits from weights that it found all of; where transformers fails, when
it is the undamaged model's. transformers reads no packed directories: there our readers have to agree.
"""

import random
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from speedstack.quant.checkpoint import convert, load_model
from speedstack.runtime import Engine
from speedstack.runtime.model.config_file import read_model_config
from speedstack.verbs.quantize import QuantizeConfig, quantize
from tests.packing import save_packed
from tests.quant.checkpoint.damage.mutations import MUST_BE_READ, MUST_BE_REFUSED, MUTATIONS, READ_OR_REFUSED, NotHere
from tests.quant.checkpoint.spelling import spellings as sp

NUM_CASES = 300
FAMILIES = ("mimo_v2_flash", "qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3")
LAYOUTS = ("one_file", "shards", "shards", "packed")
DECODED = ("mimo_v2_flash", "qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module")
def undamaged(
    tmp_path_factory: pytest.TempPathFactory, make_family: Callable[..., PreTrainedModel]
) -> Callable[[str, str], tuple[Path, torch.Tensor]]:
    """`undamaged(family, layout)`: a directory and its logits, made once."""
    root = tmp_path_factory.mktemp("undamaged")
    made: dict[tuple[str, str], tuple[Path, torch.Tensor]] = {}

    def make(family: str, layout: str) -> tuple[Path, torch.Tensor]:
        if (family, layout) not in made:
            path = root / f"{family}-{layout}"
            model = make_family(family, vocab_size=64, max_position_embeddings=128)
            if layout == "packed":
                save_packed(model, path)
            else:
                model.save_pretrained(path)
            if layout != "one_file":
                sp.shards(path)
            sp.save_tokenizer(path)
            made[family, layout] = path, sp.logits(load_model(path))
        return made[family, layout]

    return make


def draw(index: int, undamaged: Any, out: Path) -> tuple[str, str, str]:
    """Family, layout and kind of damage of case `index`, done to a copy at `out`."""
    kind = sorted(MUTATIONS)[index % len(MUTATIONS)]
    for attempt in range(20):
        rng = random.Random(f"{index} {attempt}")
        family, layout = rng.choice(FAMILIES), rng.choice(LAYOUTS)
        shutil.copytree(undamaged(family, layout)[0], out)
        try:
            MUTATIONS[kind](rng, out)
        except NotHere:
            shutil.rmtree(out)
            continue
        return family, layout, kind
    raise AssertionError(f"{kind} finds no directory to damage")


def changes(before: Path, after: Path) -> str:
    """What is different in config.json."""
    try:
        old, new = sp.read_fields(before).items(), sp.read_fields(after).items()
        return f": {[item for item in old if item not in new]} -> {[item for item in new if item not in old]}"
    except (ValueError, OSError, AttributeError):
        return ""


def oracle(path: Path) -> torch.Tensor | None:
    """transformers' logits; None where it fails, or would go on with weights that are not there."""
    try:
        model_class: Any = AutoModelForCausalLM
        model, report = model_class.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        return None if report["missing_keys"] else sp.logits(model.eval())
    except Exception:  # whatever rubbish does to it
        return None


def attempt(read: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    """What a reader returns, or the line it ends with. Any other exception is a failure, one of a library's too."""
    try:
        return read()
    except (ValueError, OSError) as error:
        line = str(error)
        assert line and "\n" not in line, f"{type(error).__name__} of several lines: {line}"
        *_, last = traceback.extract_tb(error.__traceback__)
        is_ours = "site-packages" not in last.filename and "/lib/python" not in last.filename
        is_ours |= isinstance(error, OSError) and error.errno is not None
        assert is_ours, f"a library's {type(error).__name__}: {line}"
        return line


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not expected.isfinite().all():
        return not found.isfinite().all()
    return bool((found - expected).abs().max() < 5e-4 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("index", range(NUM_CASES))
def test_damaged_directory(index: int, undamaged: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    family, layout, kind = draw(index, undamaged, path)
    case = f"{kind} in {family}, {layout}"
    case += changes(undamaged(family, layout)[0], path)
    print(case)
    whole = undamaged(family, layout)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends = {
            "load_model": attempt(lambda: sp.logits(load_model(path))),
            "engine": attempt(lambda: Engine.from_pretrained(path, backend="reference").logits(sp.IDS)),
        }
        expected = None
        if kind not in READ_OR_REFUSED | MUST_BE_READ:
            readings = [end for end in ends.values() if isinstance(end, torch.Tensor)]
            expected = next(iter(readings), None) if layout == "packed" else oracle(path)
        right = whole if expected is None else expected
        for reader, end in ends.items():
            if isinstance(end, str):
                assert kind not in MUST_BE_READ or (reader == "engine" and family not in DECODED), (
                    f"{case}: {reader}: {end}"
                )
                continue
            assert kind not in MUST_BE_REFUSED, f"{case}: {reader} reads it"
            assert is_same(end, right), f"{case}: {reader} computes other logits"
        if isinstance(ends["load_model"], torch.Tensor) and isinstance(ends["engine"], torch.Tensor):
            assert is_same(ends["engine"], ends["load_model"]), f"{case}: engine and load_model differ"
        writes(index, layout, path, tmp_path / "out", ends["load_model"])
        attempt(lambda: torch.tensor(read_model_config(path)[0].num_layers))


def writes(index: int, layout: str, path: Path, out: Path, end: torch.Tensor | str) -> None:
    """quantize or convert of the directory: one line, or what `load_model` computes with experts rounded."""

    def write() -> torch.Tensor:
        if layout == "packed":
            convert(path, "plain", out)
        elif index % 2:
            convert(path, "gpt-oss" if "gpt_oss" in (path / "config.json").read_text() else "compressed-tensors", out)
        else:
            quantize(QuantizeConfig.model_validate({"model": path, "method": "rtn", "out": out, "dtype": "float32"}))
        return sp.logits(load_model(out))

    found = attempt(write)
    if isinstance(found, str):
        return
    assert isinstance(end, torch.Tensor), f"written, though load_model says: {end}"
    expected = load_model(path)
    if layout != "packed":
        sp.round_experts(expected)
    assert is_same(found, sp.logits(expected)), "the written directory is of another model"
