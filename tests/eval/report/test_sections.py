"""Sections of every kind of result: complete, in words that are the result's, drawn from the committed results too."""

import itertools
import json
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from speedstack.eval.report import sections
from speedstack.eval.report.page import FigureBlock, Section
from speedstack.eval.report.sections import KINDS, Found, check, kind_of, titled
from speedstack.eval.results.ablation import AblationGrid, AblationRow
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import ConversionCost, ConversionResult
from speedstack.eval.results.quality import SensitivityResult, UnitSensitivity
from speedstack.eval.results.schema import Environment
from speedstack.eval.results.suite import (
    BLOCK,
    ComparedMetric,
    Comparison,
    Difference,
    HeadlineMetric,
    SuiteBlock,
    SuiteResult,
    TaskRequests,
)
from speedstack.eval.results.table import MISSING, Cell, Column, Table
from speedstack.eval.speed.harness import spread

RESULTS = sorted((Path(__file__).resolve().parents[3] / "results").glob("*.json"))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def tables(shown: list[Section]) -> list[Table]:
    return [block for section in shown for block in section.blocks if isinstance(block, Table)]


def column(table: Table, title: str) -> list[str]:
    (index,) = (i for i, each in enumerate(table.columns) if each.title == title)
    return [row[index].text for row in table.rows]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_shown(path: Path) -> None:
    content = read(path)
    kind = kind_of(content)
    if kind == "report":
        assert kind not in KINDS
        return
    assert kind in KINDS, f"{path.name}: no section shows a result of kind {kind}"
    result = check(kind, content, str(path))
    shown = sections.sections(kind, [Found(path.name, result, "a command")])
    assert shown
    for section in shown:
        assert section.title and section.paragraphs and section.blocks
        for block in section.blocks:
            assert isinstance(block, Table | FigureBlock)
            assert (block.command, block.source) == ("a command", path.name)
            assert not isinstance(block, Table) or block.rows
            # What no number stands behind cannot be sorted.
            if isinstance(block, Table):
                for row in block.rows:
                    for cell, head in zip(row, block.columns, strict=True):
                        assert (
                            not head.is_number or cell.value is not None or cell == MISSING or cell.text == "task's own"
                        )


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_its_documents(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.json") as refused:
        check(kind, {"kind": kind, "schema_version": 99, BLOCK: {"kind": kind, "schema_version": 99}}, "x.json")
    assert "schema version 99" in str(refused.value) and "\n" not in str(refused.value)


def test_only_results_have_a_kind() -> None:
    assert kind_of({"kind": "timing", "schema_version": 1}) == "timing"
    assert kind_of({"results": {}, BLOCK: {"kind": "eval", "schema_version": 1}}) == "eval"
    others: list[Any] = [[], "text", {}, {"kind": "timing"}, {"kind": 3, "schema_version": 1}, {BLOCK: 7}]
    assert [kind_of(content) for content in others] == [None] * len(others)


def sparsest(kind: Any, num_levels: int, number: int, has_optional: bool) -> Any:
    """A value of a field's type with as little in it as fits: collections of one item down to `num_levels`, of none
    below; every number is `number`; what may be None is, unless `has_optional`.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Environment:
        return describe_environment()
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        values = {
            name: sparsest(field.annotation, num_levels, number, has_optional)
            for name, field in kind.model_fields.items()
        }
        return kind.model_validate(values)
    if origin is Literal:
        return arguments[0]
    if origin in (Union, UnionType):
        some = next(each for each in arguments if each is not NoneType)
        return sparsest(some, num_levels, number, has_optional) if has_optional or NoneType not in arguments else None
    if origin is tuple and Ellipsis not in arguments:
        return tuple(sparsest(each, num_levels, number, has_optional) for each in arguments)
    if origin in (tuple, list):
        return [sparsest(arguments[0], num_levels - 1, number, has_optional)] if num_levels else []
    if origin is dict:
        made = [sparsest(each, num_levels - 1, number, has_optional) for each in arguments] if num_levels else []
        return {made[0]: made[1]} if made else {}
    return {Any: {}, str: "", bool: False, int: number, float: float(number)}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sparsest_result_of_a_kind_is_shown(kind: str) -> None:
    """No contestant, no score, no repeat, nothing but zeros: a page all the same."""
    document = KINDS[kind].document
    for num_levels, (number, has_optional) in itertools.product((0, 1, 2), ((0, False), (0, True), (1, True))):
        if document is SuiteResult:
            result: Any = SuiteResult({"results": {}}, sparsest(SuiteBlock, num_levels, number, has_optional))
        else:
            result = sparsest(document, num_levels, number, has_optional)
        (*_, shown) = sections.sections(kind, [Found("", result)])
        assert shown.title and shown.paragraphs


def test_titles_tell_results_of_one_kind_apart() -> None:
    one, other = Found("runs/a/timing.json", None), Found("runs/b/timing.json", None)
    assert titled("Speed", one, [one]) == "Speed"
    assert [titled("Speed", each, [one, other]) for each in (one, other)] == ["Speed: a/timing", "Speed: b/timing"]
    run = Found("", None)
    assert [titled("Speed", each, [run, one]) for each in (run, one)] == ["Speed", "Speed: timing"]


def suite_result(target: str, value: float, limit: int | None = None) -> SuiteResult:
    counts = TaskRequests(
        num_requests=40,
        num_cached=10,
        num_shortened=1,
        num_generations=40,
        num_unstopped=40,
        num_new_tokens=400,
        num_rounds=100,
        num_round_tokens=250,
    )
    block = SuiteBlock(
        suite="offline",
        headline=(
            HeadlineMetric(task="speedstack_close_line", metric="exact_match,strip", num_fewshot=0),
            HeadlineMetric(task="heldout", metric="word_perplexity,none", num_fewshot=None),
        ),
        target=target,
        target_sha256="0123456789abcdef",
        drafter="drafters/d",
        drafter_sha256="fedcba9876543210",
        quantization="mxfp4-pack-quantized",
        dtype="float32",
        backend="cpu",
        device="cpu",
        max_length=1024,
        batch_size=8,
        num_processes=2,
        limit=limit,
        chat_template=False,
        seeds={"sampling": 0},
        code_isolation=None,
        seconds=12.5,
        requests={"speedstack_close_line": counts},
        documents={},
        environment=describe_environment().model_copy(update={"command": f"speedstack eval {target}"}),
    )
    lm_eval = {
        "results": {
            "speedstack_close_line": {"exact_match,strip": value, "exact_match_stderr,strip": 0.02},
            "heldout": {"word_perplexity,none": 812.5},
        },
        "higher_is_better": {"speedstack_close_line": {"exact_match": True}, "heldout": {"word_perplexity": False}},
        "n-samples": {
            "speedstack_close_line": {"original": 500, "effective": 100},
            "heldout": {"original": 24, "effective": 24},
        },
    }
    return SuiteResult(lm_eval, block)


def test_a_suite_without_scores_is_refused() -> None:
    content = {BLOCK: suite_result("models/tiny", 0.5).block.model_dump(mode="json"), "results": None}
    with pytest.raises(ValueError, match=r"x\.json holds no scores: lm-eval's part 'results' is missing"):
        SuiteResult.check(content, "x.json")


def test_suites_of_one_model_are_columns_of_their_files() -> None:
    """With another drafter each, say; two files of one name are two columns too."""
    files = ("x/offline.json", "y/offline.json", "y/offline.json")
    found = [Found(name, suite_result("models/tiny", 0.5 + 0.1 * i)) for i, name in enumerate(files)]
    (shown,) = sections.sections("eval", found)
    titles = [column.title for column in tables([shown])[0].columns]
    assert titles[-3:] == ["x/offline", "y/offline", "y/offline (2)"]
    svg = next(block.svg for block in shown.blocks if isinstance(block, FigureBlock))
    assert all(title in svg for title in titles[-3:])


def test_a_score_that_is_no_number_is_shown_as_what_it_is() -> None:
    result = suite_result("models/tiny", float("nan"))
    result.lm_eval["results"]["heldout"]["word_perplexity,none"] = float("inf")
    (shown,) = sections.sections("eval", [Found("x.json", result)])
    cells = [row[-1] for row in tables([shown])[0].rows]
    assert [(cell.text, cell.value) for cell in cells] == [("nan", None), ("inf", None)]
    assert not any(isinstance(block, FigureBlock) for block in shown.blocks)


def test_suite_is_a_column_a_model() -> None:
    found = [
        Found("full.json", suite_result("runs/pretrain/export", 0.6), "speedstack eval full"),
        Found("qad.json", suite_result("runs/qad/export", 0.58, limit=100), "speedstack eval qad"),
    ]
    (section,) = sections.sections("eval", found)
    scores, runs, requests = tables([section])
    assert section.title == "Suite offline" and "cut to their first documents" in " ".join(section.paragraphs)
    assert column(scores, "task") == ["close line", "heldout"] and column(scores, "better") == ["higher", "lower"]
    # Both directories are called export: their parents tell them apart.
    assert column(scores, "pretrain/export") == ["60.00 \u00b1 2.00%", "812.5"]
    assert column(scores, "qad/export") == ["58.00 \u00b1 2.00%", "812.5"]
    assert scores.rows[0][-1].note == "100 documents"
    assert column(runs, "drafter") == ["drafters/d (fedcba987654)"] * 2 and column(runs, "time") == ["12 s"] * 2
    assert column(requests, "answered before") == ["10", "10"] and column(requests, "\u03c4") == ["2.50", "2.50"]
    # Generations that never stop are named, not averaged away.
    assert {row[5].warning for row in requests.rows} == {"not one came to its end"}
    assert scores.command == "speedstack eval full; speedstack eval qad" and scores.source == "full.json, qad.json"


def test_comparison_says_what_is_noise() -> None:
    def difference(value: float, is_noise: bool | None) -> Difference:
        p_value = {True: 0.4, False: 1e-8, None: None}[is_noise]
        return Difference(
            result="QAD",
            value=value,
            delta=value - 0.8,
            stderr=0.01,
            p_value=p_value,
            is_noise=is_noise,
            recovery=value / 0.8,
        )

    def metric(task: str, value: float, is_noise: bool | None) -> ComparedMetric:
        return ComparedMetric(
            task=task,
            metric="acc,none",
            num_documents=50,
            higher_is_better=True,
            test="McNemar" if is_noise is not None else None,
            baseline=0.8,
            baseline_stderr=0.05,
            others=(difference(value, is_noise),),
        )

    comparison = Comparison(
        suite="offline",
        baseline="full",
        significance=0.05,
        metrics=(metric("one", 0.79, True), metric("two", 0.4, False), metric("three", 0.8, None)),
        mean_recovery={"QAD": 0.82},
        target_sha256={},
        environment=describe_environment(),
    )
    (section,) = sections.sections("comparison", [Found("c.json", comparison)])
    (table,) = tables([section])
    assert column(table, "verdict") == ["within noise", "different", "no paired test"]
    assert column(table, "recovery") == ["98.75%", "50.00%", "100.00%"] and column(table, "p") == [
        "0.400",
        "1e-08",
        "\u2013",
    ]
    assert [headline.value for headline in section.headlines] == ["82.0%"]


def test_sensitivity_shows_layers_and_the_worst_experts() -> None:
    def unit(layer: int, expert: int | None, kl_nats: float) -> UnitSensitivity:
        return UnitSensitivity(
            layer=layer,
            expert=expert,
            num_parameters=1000,
            num_tokens=50,
            kl_nats=kl_nats,
            kl_stderr_nats=kl_nats / 10,
            top1_agreement=0.9,
        )

    units = (unit(1, None, 0.004), unit(2, None, 0.002), *(unit(1, expert, expert / 1e5) for expert in range(20)))
    result = SensitivityResult(
        rounding="mxfp4, even", num_tokens=100, all_kl_nats=0.01, units=units, environment=describe_environment()
    )
    (section,) = sections.sections("sensitivity", [Found("", result)])
    (table,) = tables([section])
    assert column(table, "unit")[:3] == ["layer 1", "layer 2", "layer 1, expert 19"] and len(table.rows) == 18
    assert column(table, "KL")[0] == "4.0000 \u00b1 0.4000"


def test_conversions_are_a_row_each() -> None:
    cost = ConversionCost(
        name="a to b",
        description="how",
        source_bytes=2**30,
        num_source_shards=4,
        max_shard_bytes=2**28,
        seconds=2.0,
        peak_bytes=2**29,
    )
    (section,) = sections.sections(
        "conversion", [Found("", ConversionResult(conversions=(cost,), environment=describe_environment()))]
    )
    (table,) = tables([section])
    assert column(table, "peak") == ["2.00"] and column(table, "source") == ["1.0 GiB"]


def test_columns_without_a_number_are_left_out() -> None:
    table = Table(
        (Column("name", is_number=False), Column("known"), Column("unknown")),
        ((Cell("a"), Cell("1", 1.0), MISSING), (Cell("b"), MISSING, MISSING)),
    )
    kept = table.without_empty_columns()
    assert [each.title for each in kept.columns] == ["name", "known"] and kept.rows[1] == (Cell("b"), MISSING)


def test_grid_is_a_row_a_combination_and_failures_are_said() -> None:
    full = AblationRow(
        name="full", format="", modules="", method="none", drafter="none", temperature=0.0, perplexity=9.5
    )
    rtn = AblationRow(
        name="rtn",
        format="mxfp4",
        modules="experts",
        method="rtn",
        drafter="quantized",
        temperature=0.0,
        served="packed",
        bits_per_weight=4.25,
        model_bytes=2**20,
        expert_bytes=2**19,
        kl_nats=0.001,
        kl_stderr_nats=0.0001,
        perplexity=9.6,
        tau_greedy=3.0,
        tau=3.0,
        tau_stderr=0.1,
        tokens_per_second=spread([900.0, 1000.0, 1100.0]),
        busy_cores_of_others=0.9,
    )
    broken = full.model_copy(update={"name": "broken", "method": "qad", "format": "int2", "error": "it broke"})
    grid = AblationGrid(
        model_sha256="0",
        corpus_sha256="1",
        config={},
        score_metric=None,
        gpu="H200",
        num_jobs=1,
        rows=(full, rtn, broken),
        notes=("Mind the heat.",),
        environment=describe_environment(),
    )
    (section,) = sections.sections("ablation", [Found("", grid)])
    (table,) = tables([section])
    assert column(table, "model") == ["full precision", "mxfp4 experts rtn", "int2  qad"]
    assert table.rows[2][0].warning == "it broke" and "1 row failed" in " ".join(section.paragraphs)
    assert column(table, "KL") == ["\u2013", "1 \u00b1 0.1", "\u2013"] and "Mind the heat." in section.paragraphs
    assert [row[-1].note for row in table.rows] == ["", "others kept 0.9 cores busy", ""]
    assert "score" not in [each.title for each in table.columns]
    assert [headline.value for headline in section.headlines] == ["1"]
    assert sum(isinstance(block, FigureBlock) for block in section.blocks) == 2
