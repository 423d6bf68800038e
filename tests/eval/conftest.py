"""Fixtures of the evaluation's tests: held-out text, an engine over the tiny model, and one complete made-up report."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from speedstack.eval.results.quality import MethodQuality, QualityResult, TaskScore
from speedstack.eval.results.report import Curve, Example, ExpertStorage, ModelSummary, Report, StageSummary
from speedstack.eval.results.schema import Environment, Spread, Unavailable
from speedstack.eval.results.speed import AcceptanceResult, AcceptanceSet, ContestantTiming, Identity, TimingResult

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from speedstack.runtime import Engine

MODULES = ("argparse", "bisect", "calendar", "cmd", "configparser", "csv", "heapq", "queue", "shlex", "string")


@pytest.fixture(scope="session", autouse=True)
def without_machine_description() -> Iterator[None]:
    """lm-eval asks compilers, drivers and pip for their versions after every evaluation, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


@pytest.fixture(scope="session")
def documents() -> dict[str, str]:
    """A few modules of the standard library by name."""
    texts = {}
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        texts[f"{name}.py"] = Path(spec.origin).read_text(encoding="utf-8")
    return texts


@pytest.fixture(scope="session")
def engine(tiny_model_dir: Path) -> "Engine":
    """The tiny model without a drafter."""
    from speedstack.runtime import Engine

    return Engine.from_pretrained(tiny_model_dir, backend="reference", device="cpu", max_batch_size=4)


@pytest.fixture(scope="session")
def drafting_engine(tiny_model_dir: Path, tiny_drafter_dir: Path) -> "Engine":
    """The tiny model with its random drafter."""
    from speedstack.runtime import Engine

    return Engine.from_pretrained(tiny_model_dir, tiny_drafter_dir, backend="reference", device="cpu", max_batch_size=4)


@pytest.fixture(scope="session")
def hf_lm(tiny_model_dir: Path, engine: "Engine") -> "HFLM":
    """lm-eval's Hugging Face adapter of the tiny model, in the engine's lengths."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager").eval()
    return HFLM(
        pretrained=model, tokenizer=engine.tokenizer, backend="causal", max_length=engine.max_length, batch_size=1
    )


def _spread(median: float) -> Spread:
    return Spread(
        median=median, q1=median * 0.98, q3=median * 1.01, minimum=median * 0.9, maximum=median * 1.1, num_repeats=5
    )


def _timing(name: str, rate: float, identity: Identity | None = None) -> ContestantTiming:
    return ContestantTiming(
        name=name,
        description=f"how {name} decodes",
        prepare_seconds=0.5,
        warmup_seconds=1.0,
        decode_tokens_per_second=_spread(rate),
        tokens_per_second=_spread(rate * 0.9),
        first_token_seconds=_spread(0.012),
        identity=identity,
    )


@pytest.fixture
def made_up_report() -> Report:
    """Every part filled; the figures are invented and distinct, so that a mix-up shows."""

    def scores(shift: float) -> tuple[TaskScore, ...]:
        return (
            TaskScore(
                task="heldout_perplexity",
                metric="word_perplexity",
                value=812.0 + shift,
                stderr=None,
                higher_is_better=False,
                num_documents=24,
            ),
            TaskScore(
                task="next_line",
                metric="acc",
                value=0.561 - shift / 1000,
                stderr=0.05,
                higher_is_better=True,
                num_documents=100,
            ),
        )

    def quality(method: str, kl: float | None, shift: float) -> MethodQuality:
        return MethodQuality(
            method=method,
            num_tokens=16000,
            nll_nats=3.4 + shift / 1000,
            perplexity=29.96 + shift / 10,
            kl_to_teacher_nats=kl,
            kl_stderr_nats=None if kl is None else kl / 20,
            top1_agreement=None if kl is None else 0.97,
            tasks=scores(shift),
        )

    def acceptance(name: str, tau: float) -> AcceptanceSet:
        return AcceptanceSet(
            name=name,
            num_prompts=8,
            num_rounds=400,
            num_committed=round(400 * tau),
            acceptance_length=tau,
            mean_of_responses=tau + 0.07,
            survival=(0.6, 0.4, 0.2, 0.1, 0.05, 0.03, 0.02),
        )

    return Report(
        title="A made-up run",
        subtitle="<script>alert(1)</script> stays text",
        created_utc="2026-01-01 00:00 UTC",
        seed=7,
        environment=Environment(
            machine="x86_64",
            operating_system="Some Linux",
            cpu_model="A Processor",
            num_cores=2,
            num_threads=2,
            memory_bytes=8 * 2**30,
            gpus=(),
            python="3.11.7",
            packages={"torch": "2.13.0"},
            git_sha="0123abcd",
        ),
        model=ModelSummary(
            name="tiny",
            architecture="MiMoV2FlashForCausalLM",
            num_parameters=12_100_000,
            num_expert_parameters=7_864_320,
        ),
        stages=(StageSummary(name="pretrain", summary="from scratch", seconds=402.0),),
        curves=(
            Curve(stage="pretrain", label="training", quantity="loss (nats)", steps=(1, 2, 3), values=(8.0, 5.0, 3.0)),
            Curve(stage="qat", label="training", quantity="KL (nats)", steps=(1, 2), values=(0.002, 0.001)),
        ),
        quality=QualityResult(
            teacher="full precision",
            methods=(
                quality("full precision", None, 0.0),
                quality("PTQ", 0.0018, 5.0),
                quality("QAD", 0.00081, 2.0),
            ),
        ),
        acceptance=AcceptanceResult(
            block_size=8,
            temperature=0.0,
            seed=0,
            max_new_tokens=128,
            overall=acceptance("all prompts", 2.45),
            sets=(acceptance("module opening", 2.7), acceptance("function body", 2.2)),
        ),
        timing=TimingResult(
            device="cpu",
            dtype="float32",
            num_threads=2,
            num_prompts=4,
            num_prompt_tokens=(64, 64, 64, 64),
            num_new_tokens=128,
            num_repeats=5,
            contestants=(
                _timing("engine", 400.0),
                _timing(
                    "engine + drafter",
                    650.0,
                    Identity(reference="engine", promised=True, num_identical=4, num_prompts=4),
                ),
                _timing(
                    "transformers",
                    80.0,
                    Identity(
                        reference="engine",
                        promised=True,
                        num_identical=3,
                        num_prompts=4,
                        first_difference="prompt 2 differs from token 17 on",
                    ),
                ),
            ),
            unavailable=(Unavailable(name="transformers + drafter", reason="ValueError: made up"),),
        ),
        storage=(ExpertStorage(place="on disk", packed_bytes=425, bf16_bytes=1600),),
        memory_bytes={"bf16": {"experts": 16 * 2**20, "KV cache": 2**20}, "packed": {"experts (MXFP4)": 4 * 2**20}},
        examples=(Example(title="function body", prompt="def f(x):\n", text="    return <b>x</b>\n"),),
        commands=("speedstack demo --seed 7",),
        notes=("All figures are invented.",),
    )
