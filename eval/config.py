"""Configs of the verbs that measure: `eval`, `bench` and `report`. One frozen pydantic model a verb.

Defaults point at what `speedstack demo` leaves behind, so that every verb runs after a demo without a single flag.
Reading files and flags is the command line's business; a notebook builds these models directly.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from speedstack.eval.data.prompt_settings import ChatTemplateKwargs, PromptSettings
from speedstack.support.config import Section

DEMO_RUN = Path("runs/demo")


def _checked_limit(limit: int | float | None) -> int | float | None:
    if limit is not None and (limit <= 0 or (isinstance(limit, float) and limit >= 1)):
        raise ValueError("expected a number of documents, or a share of them between 0 and 1")
    return limit


Limit = Annotated[int | float | None, AfterValidator(_checked_limit)]
# An id is a number in YAML.
TokenName = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]


class ModelConfig(Section):
    """Which checkpoints run, and on what."""

    target: Path = Field(DEMO_RUN / "qad" / "export", description="Model directory, experts packed in MXFP4 or not.")
    drafter: Path | None = Field(None, description="Directory of a DFlash drafter trained for the target; None: none.")
    backend: Literal["auto", "reference", "cpu", "graph", "resident"] = Field(
        "auto", description="How a step is computed; auto takes the fastest that this machine and model allow."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Device; auto takes CUDA if present.")


# Fields of `EvalConfig` that only one of its two measurements has.
_SUITE_ONLY = (
    "data",
    "chat_template",
    "chat_template_kwargs",
    "think_end_token",
    "max_gen_toks",
    "allow_code",
)
_HELDOUT_ONLY = ("tasks", "num_tokens", "window")


class EvalConfig(ModelConfig):
    """Quality of one model through the runtime: a suite of lm-eval tasks, or without one, its held-out perplexity,
    divergence from a teacher and a few tasks.
    """

    suite: str | None = Field(
        None,
        description="Suite of tasks (recovery, code, math, wikitext, offline) or its YAML file. An interrupted one "
        "continues; under torchrun processes share its requests.",
    )
    teacher: Path | None = Field(
        None,
        description="Full-precision model directory; adds KL divergence from it and top-1 agreement with it. Suite "
        "offline: adds the task same_text, how often the model writes word for word the same.",
    )
    corpus: Path = Field(DEMO_RUN / "corpus", description="Prepared corpus whose held-out part is read.")
    tasks: tuple[str, ...] | None = Field(
        None,
        description="lm-eval tasks: ours (heldout_perplexity, next_line, close_line), made from the held-out part, or "
        "any name lm-eval itself knows. None: ours, as far as the text has items for them; prose has none to close. "
        "An empty list: none.",
    )
    limit: Limit = Field(
        None, description="Documents a task at most: so many, or a share of them between 0 and 1; None: all."
    )
    num_tokens: int = Field(16384, ge=1, description="Held-out tokens of perplexity and divergence.")
    window: int = Field(256, ge=2, description="Tokens in one of their windows.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="dtype of everything but packed experts; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    max_length: int | None = Field(None, ge=2, description="Positions of a sequence's buffers; None: the model's.")
    batch_size: int = Field(8, ge=1, description="Sequences decoded together.")
    data: Path | None = Field(
        None,
        description="Suite: directory of local data sets, DATA/<data set>/<configuration or default>/<split>.jsonl or "
        ".parquet; those it lacks come from the Hugging Face Hub.",
    )
    include_path: Path | None = Field(
        None, description="A folder of your own lm-eval tasks (.yaml files), which the suite, or tasks, may name."
    )
    chat_template: bool = Field(False, description="Suite: prompts in the chat template of the model's tokenizer.")
    chat_template_kwargs: ChatTemplateKwargs = Field(
        {}, description="Suite: variables for the chat template, as a JSON object: '{\"enable_thinking\": false}'."
    )
    think_end_token: TokenName | None = Field(
        None,
        description="Suite: what ends the thinking of a reasoning model, as text or the id of a token: '</think>'; "
        "what follows it is scored.",
    )
    max_gen_toks: int | None = Field(
        None,
        ge=1,
        description="Suite: tokens of a text at most, instead of each task's own; reasoning takes thousands.",
    )
    allow_code: bool = Field(
        False,
        description="Suite: run the programs that the model writes, in processes without network but with your files.",
    )
    seed: int = Field(0, ge=0, description="Seed of the choice of held-out documents, and of sampling.")
    out: Path = Field(
        Path("runs/eval"), description="Directory for quality.json or <suite>.json, the tasks' data and answers."
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> "EvalConfig":
        other, needs = (_HELDOUT_ONLY, "no suite") if self.suite is not None else (_SUITE_ONLY, "a suite")
        for name in other:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is for an evaluation with {needs}")
        if self.chat_template_kwargs and not self.chat_template:
            raise ValueError("chat_template_kwargs are for the chat template: add --chat-template")
        return self


class PromptsConfig(Section, PromptSettings):
    """What is decoded: sets of prompts by name. `field` and the other settings of rows are of files and benchmarks."""

    sets: tuple[str, ...] = Field(
        ("heldout",),
        min_length=1,
        description="heldout (two sets, of the corpus), humaneval, mbpp, math-500, gsm8k, mt-bench, long (joined code "
        "of the corpus), or a .jsonl, .json or .parquet file of prompts or chats, or a directory of such files.",
    )
    dir: Path | None = Field(
        None,
        description="Directory with <set>.jsonl or .parquet of benchmarks, or as eval --data has them; those it lacks "
        "come from the Hugging Face Hub.",
    )
    corpus: Path = Field(
        DEMO_RUN / "corpus", description="Prepared corpus; heldout and long are made of its held-out part."
    )
    num_prompts: int = Field(4, ge=1, description="Prompts of each set, evenly spaced over it.")
    num_tokens: int = Field(64, ge=2, description="Tokens in a prompt of heldout.")
    long_tokens: int = Field(16384, ge=2, description="Tokens in a prompt of long, or as many as the model takes.")
    chat_template: bool = Field(
        False,
        description="Text prompts of benchmarks and files as a user's message, in the template of the model's "
        "tokenizer, as chats are anyway.",
    )

    @model_validator(mode="after")
    def _fields_fit(self) -> "PromptsConfig":
        benchmarks = {"dir": "a benchmark"} | dict.fromkeys(
            ("chat_template", *PromptSettings.model_fields), "a benchmark or a file"
        )
        needs = ({} if set(self.sets) - {"heldout", "long"} else benchmarks) | {
            field: name for field, name in (("num_tokens", "heldout"), ("long_tokens", "long")) if name not in self.sets
        }
        for field, what in needs.items():
            if getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"prompts.{field} needs {what} among prompts.sets, which are {', '.join(self.sets)}")
        return self


class BenchConfig(ModelConfig):
    """Decode speed: the engine with and without speculation, and its peers, interleaved in one race."""

    prompts: PromptsConfig = Field(PromptsConfig(), description="What is decoded.")
    peers: tuple[Literal["transformers", "assisted", "compiled", "vllm", "llama.cpp", "unpacked"], ...] = Field(
        ("transformers", "assisted", "compiled", "vllm", "llama.cpp"),
        description="transformers' generate; the same assisted by the drafter; the same under torch.compile, which "
        "compiles for minutes on a CPU; vLLM and llama.cpp where they are installed (`make peers`); unpacked: our "
        "engine on the same values, experts not packed.",
    )
    vllm_python: Path | None = Field(
        None, description="Interpreter that has vLLM; None: .venv-peers/bin/python, or without it this one."
    )
    llama_cpp_python: Path | None = Field(
        None, description="Interpreter that has llama-cpp-python; None: .venv-peers/bin/python, or without it this one."
    )
    look_up: bool = Field(True, description="Time the engine with prompt lookup too.")
    gguf: Path | None = Field(
        None, description="GGUF file of the model, for llama.cpp; None: its own converter makes one in `copies`."
    )
    gguf_weights: tuple[Literal["f32", "f16", "bf16", "q8_0"], ...] = Field(
        ("f16",),
        min_length=1,
        description="What such a file holds weights in, but for experts in MXFP4, which stay so; of several each is a "
        "contestant.",
    )
    copies: Path = Field(
        Path("runs/peers"), description="Directory for copies of the target that peers read: unpacked, and GGUF files."
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1,), min_length=1, description="Prompts of a set decoded at once; of several each is timed, in the same race."
    )
    num_new_tokens: int = Field(128, ge=2, description="Tokens generated after each prompt, past any end token.")
    num_repeats: int = Field(5, ge=1, description="Timed repeats of every contestant, interleaved.")
    num_warmups: int = Field(1, ge=1, description="Calls before, on the first prompt of each set; not counted.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of all contestants.")
    peer_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of transformers and vLLM where it is another one: what people would run them in."
    )
    dense_dtype: Literal["int8"] | None = Field(
        None, description="int8: the engine's attention, dense MLPs and LM head in eight bits (CPU); None: as stored."
    )
    kv_dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of the engine's key/value buffers (CPU); None: float32."
    )
    num_threads: int | None = Field(None, ge=1, description="Threads of torch and of the kernels; None: torch's own.")
    gpu_hour_usd: float | None = Field(
        None, gt=0, description="Price of an hour of this machine in US dollars; adds the cost of a million tokens."
    )
    seed: int = Field(0, ge=0, description="Seed of the choice of prompts, and of the order of contestants.")
    out: Path = Field(
        Path("runs/bench"), description="Directory for timing.json, timing.md and, with a drafter, acceptance.json."
    )

    @model_validator(mode="after")
    def _peers_fit(self) -> "BenchConfig":
        for name, peer in (("gguf", "llama.cpp"), ("llama_cpp_python", "llama.cpp"), ("vllm_python", "vllm")):
            if getattr(self, name) is not None and peer not in self.peers:
                raise ValueError(f"{name} is for the peer {peer}, which is not among peers")
        return self

    @model_validator(mode="after")
    def _drafter_is_a_model(self) -> "BenchConfig":
        if self.drafter == Path("ngram"):
            raise ValueError("prompt lookup is timed beside a drafter anyway (look_up): give its directory, or None")
        return self


class CompareConfig(Section):
    """Results of one suite side by side: differences, their significance, how much of the first one is recovered."""

    results: tuple[Path, ...] = Field(
        (Path("runs/eval-full/offline.json"), Path("runs/eval/offline.json")),
        min_length=2,
        description="Result files of a suite; the others are compared with the first.",
    )
    significance: float = Field(
        0.05, gt=0, lt=1, description="A difference with a larger p-value is called within noise."
    )
    num_resamples: int = Field(10000, ge=100, description="Resamples of the paired bootstrap.")
    seed: int = Field(0, ge=0, description="Seed of the bootstrap.")
    out: Path | None = Field(None, description="File for the table, .md or .json; None: only on the terminal.")

    @model_validator(mode="after")
    def _suffix_is_known(self) -> "CompareConfig":
        if self.out is not None and self.out.suffix not in (".md", ".json"):
            raise ValueError(f"out is {self.out}: end its name in .md or .json")
        return self


class ReportConfig(Section):
    """One report from whatever finished runs and result files are given."""

    inputs: tuple[Path, ...] = Field(
        (DEMO_RUN,),
        min_length=1,
        description="Run directories and result files; a directory stands for the runs and results inside it.",
    )
    title: str = Field("speedstack", min_length=1, description="Title of the report.")
    wandb_mode: Literal["disabled", "offline", "online"] = Field(
        "disabled",
        description="Mirror the report's curves and tables to Weights & Biases; offline ones lie in OUT/wandb.",
    )
    out: Path = Field(Path("runs/report"), description="Directory for report.html and report.json.")
