"""Sections of results that are times: the race of contestants, and the adapter beside the engine."""

from typing import Any

from speedstack.eval.report import sections
from speedstack.eval.report.page import FigureBlock, Section
from speedstack.eval.report.sections import Found
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.microbench import LmAgreement, LmBench, LmTask, LmTiming
from speedstack.eval.results.schema import Spread, Unavailable
from speedstack.eval.results.speed import ContestantTiming, SetTiming, TimingResult, TokenTimes
from speedstack.eval.results.table import Table


def tables(shown: list[Section]) -> list[Table]:
    return [block for section in shown for block in section.blocks if isinstance(block, Table)]


def column(table: Table, title: str) -> list[str]:
    (index,) = (i for i, each in enumerate(table.columns) if each.title == title)
    return [row[index].text for row in table.rows]


def spread(median: float) -> Spread:
    return Spread(
        median=median, q1=0.9 * median, q3=1.1 * median, minimum=median / 2, maximum=2 * median, num_repeats=3
    )


def contestant(name: str, rate: float, **more: Any) -> ContestantTiming:
    return ContestantTiming(
        name=name,
        description=f"how {name} decodes",
        prepare_seconds=1.0,
        warmup_seconds=0.5,
        decode_tokens_per_second=spread(rate),
        tokens_per_second=spread(rate / 2),
        first_token_seconds=spread(0.01),
        **more,
    )


def test_adapter_and_engine_stand_side_by_side() -> None:
    def timing(contestant: str, seconds: float) -> LmTiming:
        return LmTiming(
            contestant=contestant, seconds=spread(seconds), requests_per_second=8 / seconds, speedup=4.0 / seconds
        )

    task = LmTask(
        task="close_line",
        kind="generate_until",
        num_requests=8,
        experts_implementation="eager",
        agreement=LmAgreement(
            num_equal=7,
            max_difference_nats=None,
            max_relative_difference=None,
            engine_error_nats=None,
            adapter_error_nats=None,
            scores={"exact_match,strip": (0.5, 0.625)},
        ),
        timings=(timing("engine", 2.0), timing("engine + drafter", 1.0), timing("lm-eval HFLM", 4.0)),
    )
    bench = LmBench(
        target="t",
        drafter="d",
        device="cpu",
        dtype="float32",
        backend="cpu",
        batch_size=8,
        num_threads=2,
        tasks=(task,),
        environment=describe_environment(),
    )
    old = bench.model_dump(mode="json")
    for name in ("engine_error_nats", "adapter_error_nats"):  # of files before they were measured
        del old["tasks"][0]["agreement"][name]
    assert sections.check("lm_bench", old, "old.json") == bench
    (section,) = sections.sections("lm_bench", [Found("", bench)])
    agreement, speed = tables([section])
    assert column(agreement, "equal answers") == ["7 of 8"] and agreement.rows[0][-1].warning == "differ"
    assert column(agreement, "largest difference") == ["\u2013"]
    assert column(speed, "speed") == ["2.00\u00d7", "4.00\u00d7", "1.00\u00d7"]
    assert [headline.value for headline in section.headlines] == ["4.00\u00d7"]


def test_race_shows_what_was_measured_and_no_more() -> None:
    times = TokenTimes(p50=spread(2.0), p95=spread(3.0), p99=spread(9.0))
    full = contestant(
        "engine",
        400.0,
        token_ms=times,
        wait_ms=times,
        survival=(0.8, 0.4),
        joules_per_token=spread(0.25),
        prompt_tokens_per_second=spread(96.0),
    )
    full = full.model_copy(update={"prompt_tokens_per_second": spread(96.0)})
    one_set = SetTiming(name="humaneval", source="a file", num_prompt_tokens=(4, 5), contestants=(full,))
    race = TimingResult(
        device="cpu",
        dtype="float32",
        num_threads=2,
        num_prompts=3,
        num_prompt_tokens=(4, 5, 9),
        num_new_tokens=8,
        num_repeats=3,
        contestants=(full, contestant("peer", 40.0, usd_per_million_tokens=1.25)),
        sets=(one_set, one_set.model_copy(update={"name": "gsm8k", "batch_size": 4})),
        unavailable=(Unavailable(name="vLLM", reason="not installed"),),
        gpu_hour_usd=2.5,
        energy="NVML counters",
        notes=("The peer has no drafter.",),
    )
    (section,) = sections.sections("timing", [Found("", race)])
    everything, *sets = tables([section])
    assert column(everything, "contestant") == ["engine", "peer", "vLLM"]
    assert column(everything, "token, p50") == ["2", "\u2013", "\u2013"] and column(everything, "p99")[0] == "9"
    assert column(everything, "prompt")[0].startswith("96 (")
    assert column(everything, "energy")[0] == "0.25" and column(everything, "cost")[1] == "1.25"
    assert everything.rows[2][0].note == "did not run: not installed"
    assert [table.caption for table in sets] == [
        "Prompts humaneval, 2 prompts, 1 sequence at a time.",
        "Prompts gsm8k, 2 prompts, 4 sequences at a time.",
    ]
    text = " ".join(section.paragraphs)
    assert "4 to 9 tokens" in text and "2.5 USD an hour" in text and "NVML" in text and "The peer has no" in text
    assert sum(isinstance(block, FigureBlock) for block in section.blocks) == 3
    plain = race.model_copy(update={"contestants": (contestant("engine", 4.0),), "sets": (), "unavailable": ()})
    (section,) = sections.sections("timing", [Found("", plain)])
    (table,) = tables([section])
    assert not {"token, p50", "energy", "cost"} & {each.title for each in table.columns}
