"""The demo's stages: what each runs, what it depends on, and how long it is expected to take.

Stages read earlier outputs from disk alone, so any may be the first of a process. Recipes resume from checkpoints, text
from its shards; measurements are short and start over.

    corpus/  pretrain/  ptq/  qad/  text/  drafter/        outputs of the stages
    quality.json  acceptance.json  timing.json            measurements
    facts.json  examples.json                             the models, their storage, some text
    report.json  report.html                              the report
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speedstack.demo.config import SIZES, DemoConfig, stage_configs
from speedstack.support.progress import Advance
from speedstack.support.stages import Stage
from speedstack.support.steps import Step
from speedstack.train.config.recipes import JobConfig, identity

if TYPE_CHECKING:
    from speedstack.runtime import Engine
    from speedstack.train.data.corpus import Corpus

CONFIG_FILE, FACTS_FILE, EXAMPLES_FILE = "demo.yaml", "facts.json", "examples.json"
FULL, PTQ, QAD = "full precision", "PTQ", "QAD"
NUM_EXAMPLES = 2

# For the shown estimates alone. tiny: measured on two cores of a server CPU, training scaled to its steps and their
# processor time. small: a guess, which the pace of finished stages corrects.
EXPECTED_SECONDS = {
    "tiny": {
        "corpus": 9.0,
        "pretrain": 190.0,
        "ptq": 1.0,
        "qad": 78.0,
        "text": 34.0,
        "drafter": 127.0,
        "quality": 44.0,
        "acceptance": 1.0,
        "timing": 90.0,
        "report": 1.0,
    },
    "small": {
        "corpus": 20.0,
        "pretrain": 300.0,
        "ptq": 5.0,
        "qad": 60.0,
        "text": 120.0,
        "drafter": 180.0,
        "quality": 120.0,
        "acceptance": 60.0,
        "timing": 120.0,
        "report": 5.0,
    },
}

# Files that later stages read. The first shard of each part stands for the written text; the drafter's recipe completes
# the rest.
DECISIVE_FILES = {
    "corpus": ("corpus/corpus.json", "corpus/tokenizer/tokenizer.json", "corpus/train", "corpus/heldout"),
    "pretrain": ("pretrain/export/model.safetensors",),
    "ptq": ("ptq/export/model.safetensors",),
    "qad": ("qad/export/model.safetensors",),
    "text": ("text/heldout/shard-00000.safetensors",),
    "drafter": ("drafter/export/model.safetensors",),
}

# Paths are the demo's own and do not affect a result.
_PATHS = frozenset({"data.corpus", "qat.model", "drafter.target", "drafter.text"})
# Drafter settings that decide the text it is trained on.
_TEXT_FIELDS = (
    "data.sequence_length",
    "drafter.num_sequences",
    "drafter.num_eval_sequences",
    "drafter.prompt_length",
    "drafter.temperatures",
    "drafter.top_p",
    "drafter.written_fraction",
)


class DemoStages:
    """The stages of one demo. `all()` lists them in order."""

    def __init__(self, config: DemoConfig) -> None:
        self.config = config
        self.out = config.out
        self.pretrain_config, self.qat_config, self.drafter_config = stage_configs(config)
        self.models = {FULL: self._export("pretrain"), PTQ: self._export("ptq"), QAD: self._export("qad")}
        self.drafter = self._export("drafter")
        self._steps: dict[str, Step] = {}

    def all(self) -> list[Stage]:
        """Every stage, after the stages it needs."""
        config = self.config
        data = self.pretrain_config.data.model_dump(mode="json", exclude={"corpus", "sequence_length"})
        drafter = _decisive(self.drafter_config)
        text = {
            name: value
            for name, value in drafter.items()
            if name in _TEXT_FIELDS or name.startswith("drafter.prompts.")
        }
        self._steps = {}
        return [
            self._stage("corpus", self.run_corpus, data),
            self._stage("pretrain", self.run_pretrain, _decisive(self.pretrain_config), ("corpus",)),
            self._stage("ptq", self.run_ptq, config.qat.qat.scale_rule, ("pretrain",)),
            self._stage("qad", self.run_qad, _decisive(self.qat_config), ("pretrain",)),
            self._stage("text", self.run_text, text, ("qad",)),
            self._stage("drafter", self.run_drafter, drafter, ("text",)),
            self._stage("quality", self.run_quality, _json(config.quality), ("ptq", "qad"), "quality.json", FACTS_FILE),
            self._stage(
                "acceptance",
                self.run_acceptance,
                _json(config.acceptance),
                ("drafter",),
                "acceptance.json",
                EXAMPLES_FILE,
            ),
            self._stage("timing", self.run_timing, _json(config.timing), ("drafter",), "timing.json"),
            self._stage(
                "report", self.run_report, None, ("quality", "acceptance", "timing"), "report.html", "report.json"
            ),
        ]

    def run_corpus(self, advance: Advance) -> str:
        """Tokenize the standard library."""
        from speedstack.train.data.corpus import corpus_for

        corpus = corpus_for(self.pretrain_config.data)
        return (
            f"{len(corpus.train)} files to train on, {len(corpus.heldout)} held out; "
            f"a byte-level BPE tokenizer of {len(corpus.tokenizer)} tokens"
        )

    def run_pretrain(self, advance: Advance) -> str:
        """Train the model of record from scratch."""
        from speedstack.train.pretrain import pretrain

        metrics = pretrain(self.pretrain_config, on_step=_on_step(advance, "loss")).metrics
        return f"{_num_tokens(self.pretrain_config)} tokens; held-out loss {metrics['heldout_loss']:.3f} nats a token"

    def run_ptq(self, advance: Advance) -> str:
        """Round the experts to MXFP4: the baseline of training."""
        from speedstack.quant.checkpoint import convert

        rule = self.config.qat.qat.scale_rule
        convert(self.models[FULL], "compressed-tensors", self.models[PTQ], scale_rule=rule)
        return "expert weights rounded to the nearest MXFP4 value, no training"

    def run_qad(self, advance: Advance) -> str:
        """Distil the full-precision model into the quantized one."""
        from speedstack.train.qat.recipe import qat

        metrics = qat(self.qat_config, on_step=_on_step(advance, "loss")).metrics
        kl = metrics["heldout_kl"]
        return f"{_num_tokens(self.qat_config)} tokens; held-out KL from the teacher {1e3 * kl:.2f} millinats a token"

    def run_text(self, advance: Advance) -> str:
        """Let the quantized model write its drafter's training text."""
        from speedstack.train.drafter.text import write_text

        write_text(self.drafter_config, on_progress=advance)
        section = self.drafter_config.drafter
        num_new = self.drafter_config.data.sequence_length - section.prompt_length
        return f"{section.num_sequences} continuations of {num_new} tokens, written by the quantized model"

    def run_drafter(self, advance: Advance) -> str:
        """Train the drafter for the quantized model."""
        from speedstack.train.drafter.job import train_drafter

        metrics = train_drafter(self.drafter_config, on_step=_on_step(advance, "loss")).metrics
        return f"{_num_tokens(self.drafter_config)} tokens; held-out acceptance {metrics['acceptance_length']:.2f}"

    def run_quality(self, advance: Advance) -> str:
        """Perplexity, divergence, lm-eval tasks and storage of the three models."""
        from speedstack.eval.data.task_data import make_tasks
        from speedstack.eval.lm_eval.task_loading import TASK_NAMES
        from speedstack.eval.quality.measure import heldout_windows, measure_quality
        from speedstack.eval.quality.storage import expert_storage, summarize_model
        from speedstack.eval.report.gather import Facts
        from speedstack.train.data.heldout import heldout_texts

        section, corpus = self.config.quality, self._corpus()
        prefix_id = corpus.tokenizer.eos_token_id
        windows = heldout_windows(corpus.heldout["input_ids"], section.window, section.num_tokens, prefix_id)
        make_tasks(heldout_texts(corpus), self.out / "tasks", self.config.seed, tasks=TASK_NAMES)
        engines = {name: self._engine(path) for name, path in self.models.items()}
        result = measure_quality(
            engines, FULL, windows, task_data=self.out / "tasks", limit=section.limit, progress=False
        )
        result.save(self.out / "quality.json")
        storage = expert_storage(self.models[QAD])
        memory = {name: engine.memory_bytes() for name, engine in engines.items()}
        in_memory = storage.model_copy(update={"place": "in memory", "packed_bytes": _expert_bytes(memory[QAD])})
        Facts(
            model=summarize_model(self.models[FULL], name=f"model of record, {self.config.size}"),
            storage=(storage, in_memory),
            memory_bytes=memory,
        ).save(self.out / FACTS_FILE)
        return "; ".join(f"{entry.method}: perplexity {entry.perplexity:.2f}" for entry in result.methods)

    def run_acceptance(self, advance: Advance) -> str:
        """Acceptance of the drafter on held-out prompts, and two example texts."""
        from speedstack.eval.report.gather import Facts
        from speedstack.eval.results.report import Example
        from speedstack.eval.speed.acceptance import measure_acceptance

        section = self.config.acceptance
        prompt_sets = self._prompt_sets(section.num_prompts, section.num_prompt_tokens)
        engine = self._engine(self.models[QAD], self.drafter)
        result = measure_acceptance(engine, prompt_sets, section.num_new_tokens)
        examples = []
        for name, prompts in prompt_sets.items():
            for prompt in prompts[: max(1, NUM_EXAMPLES // len(prompt_sets))]:
                text = engine.generate(prompt, max_new_tokens=section.num_new_tokens).text
                examples.append(Example(title=name, prompt=engine.tokenizer.decode(prompt), text=text))
        memory = {f"{QAD} + drafter": engine.memory_bytes()}
        Facts(memory_bytes=memory, examples=tuple(examples)).save(self.out / EXAMPLES_FILE)
        result.save(self.out / "acceptance.json")
        overall = result.overall
        return f"{overall.acceptance_length:.2f} tokens a round over {overall.num_prompts} held-out prompts"

    def run_timing(self, advance: Advance) -> str:
        """Time the engine and transformers, each with and without the drafter."""
        from speedstack.eval.data.prompts import PromptSet
        from speedstack.eval.speed.contestants import TimingSettings, measure_timing

        section = self.config.timing
        made = self._prompt_sets(section.num_prompts, section.num_prompt_tokens)
        prompt_sets = [PromptSet(name, "held-out documents", prompts) for name, prompts in made.items()]
        settings = TimingSettings(section.num_new_tokens, section.num_repeats, section.dtype, self.config.device)
        result = measure_timing(self.models[QAD], self.drafter, prompt_sets, settings, progress=False)
        result.save(self.out / "timing.json")
        rates = [f"{entry.name} {entry.decode_tokens_per_second.median:.0f}" for entry in result.contestants]
        return f"tokens/s: {', '.join(rates)}"

    def run_report(self, advance: Advance) -> str:
        """Write report.json and report.html from the other stages' outputs."""
        from speedstack.eval.report.gather import gather
        from speedstack.eval.report.render import write_report

        report = gather(
            [self.out],
            title=f"speedstack demo, {self.config.size}",
            subtitle="A Mixture-of-Experts model: trained, quantized to MXFP4, given a drafter, timed on this machine",
            seed=self.config.seed,
            commands=(self._command(),),
        )
        write_report(report, self.out)
        return "report.html and report.json"

    def _stage(
        self, name: str, run: Callable[[Advance], str], settings: Any, needs: tuple[str, ...] = (), *outputs: str
    ) -> Stage:
        shared = {"seed": self.config.seed, "device": self.config.device}
        decisive = DECISIVE_FILES.get(name, ())
        if name == "text" and self.drafter_config.drafter.written_fraction > 0:
            decisive += ("text/train/shard-00000.safetensors",)
        self._steps[name] = Step(
            kind=name,
            version=1,
            settings={"shared": shared, "stage": settings},
            needs={need: self._steps[need] for need in needs},
            outputs=outputs or (name,),
            decisive=decisive,
        )
        return Stage(self._steps[name], run, EXPECTED_SECONDS[self.config.size][name])

    def _command(self) -> str:
        """The command line that makes this demo again from nothing."""
        config = self.config
        preset = SIZES[config.size](seed=config.seed, out=config.out, device=config.device)
        if config == preset:
            command = [
                "speedstack",
                "demo",
                "--size",
                config.size,
                "--seed",
                str(config.seed),
                "--out",
                str(config.out),
            ]
        else:
            # Too many differences for one line; the file has them all, and the directory is taken.
            command = ["speedstack", "demo", str(config.out / CONFIG_FILE), "--out", f"{config.out}-again"]
        return shlex.join(command)

    def _export(self, name: str) -> Path:
        return self.out / name / "export"

    def _corpus(self) -> Corpus:
        from speedstack.train.data.corpus import load_corpus

        return load_corpus(self.out / "corpus")

    def _engine(self, target: Path, drafter: Path | None = None) -> Engine:
        from speedstack.runtime import Engine

        return Engine.from_pretrained(target, drafter, device=self.config.device)

    def _prompt_sets(self, num_prompts: int, num_tokens: int) -> dict[str, list[list[int]]]:
        from speedstack.train.data.heldout import heldout_prompts

        return heldout_prompts(self._corpus(), num_prompts, num_tokens, self.config.seed)


def _expert_bytes(memory_bytes: dict[str, int]) -> int:
    return sum(size for part, size in memory_bytes.items() if part.startswith("experts"))


def _num_tokens(config: JobConfig) -> str:
    num_tokens = config.loop.num_steps * config.loop.batch_size * config.data.sequence_length
    return f"{num_tokens / 1e6:.2f}M"


def _decisive(config: JobConfig) -> dict[str, Any]:
    """Settings of a recipe's config that decide its result."""
    return {key: value for key, value in identity(config).items() if key not in _PATHS}


def _json(section: Any) -> Any:
    return section.model_dump(mode="json")


def _on_step(advance: Advance, metric: str) -> Callable[[int, int, dict[str, float]], None]:
    def on_step(done: int, total: int, metrics: dict[str, float]) -> None:
        advance(done, total, note=f"{metric} {metrics[metric]:.4g}" if metric in metrics else "")

    return on_step
