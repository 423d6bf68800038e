"""The `speedstack` command: `speedstack <verb> [CONFIG.yaml] [--section.key value ...]`.

A verb is a row of `VERBS`: what it does, the type of its config and the function that does it, the last two as names,
so that `speedstack --help` imports neither torch nor the verb. Nothing is computed here. What this file owns is the
boundary to the shell: a user's mistake becomes one line on stderr and an exit code (2 for bad input, 1 for a file
system that refuses and for a job that did not do all, 130 for Ctrl-C); `--debug`, or SPEEDSTACK_DEBUG=1, shows the
traceback as well. An exception that is none of these is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from speedstack import __version__
from speedstack.support.command import EXIT_INTERRUPTED, EXIT_OK, EXIT_SYSTEM, error_line, exit_status
from speedstack.support.near_miss import did_you_mean


@dataclass(frozen=True)
class Verb:
    """One command: `config` and `job` are 'module:name'; the job takes the config and prints where its result lies. It
    returns None, or an exit code.

    `continues` says that an interrupted job goes on where it was when the same command is given again.
    """

    summary: str
    config: str
    job: str
    continues: bool = False


VERBS = {
    "demo": Verb(
        "the whole stack on a small model: pretrain, quantize, QAT, drafter, quality, timing, report",
        "speedstack.demo.config:load_demo_config",
        "speedstack.demo.demo:demo",
        continues=True,
    ),
    "pretrain": Verb(
        "train a Mixture-of-Experts model from scratch",
        "speedstack.train.config.recipes:PretrainConfig",
        "speedstack.verbs.train:pretrain",
        continues=True,
    ),
    "qat": Verb(
        "train a model with its experts in MXFP4, distilled from itself in full precision",
        "speedstack.train.config.recipes:QatConfig",
        "speedstack.verbs.train:qat",
        continues=True,
    ),
    "quantize": Verb(
        "quantize a model's experts to MXFP4 after training, by rounding or GPTQ",
        "speedstack.verbs.quantize:load_quantize_config",
        "speedstack.verbs.quantize:quantize",
    ),
    "drafter": Verb(
        "train a DFlash drafter for a model",
        "speedstack.train.config.recipes:DrafterConfig",
        "speedstack.verbs.train:drafter",
        continues=True,
    ),
    "convert": Verb(
        "turn a checkpoint of one format into one of another",
        "speedstack.verbs.convert:load_convert_config",
        "speedstack.verbs.convert:convert",
    ),
    "generate": Verb(
        "stream text from a model, with or without a drafter",
        "speedstack.verbs.generate:load_generate_config",
        "speedstack.verbs.generate:generate",
    ),
    "eval": Verb(
        "lm-eval suites and held-out perplexity through the runtime",
        "speedstack.verbs.evaluate:load_eval_config",
        "speedstack.verbs.evaluate:evaluate",
        continues=True,
    ),
    "compare": Verb(
        "results of a suite side by side, with significance and recovery",
        "speedstack.verbs.compare:load_compare_config",
        "speedstack.verbs.compare:compare",
    ),
    "bench": Verb(
        "time the decode loop, with peers side by side",
        "speedstack.verbs.bench:load_bench_config",
        "speedstack.verbs.bench:bench",
    ),
    "ablate": Verb(
        "a grid over number format, modules, method, drafter and temperature: one table and its plots",
        "speedstack.ablation.config:load_ablate_config",
        "speedstack.ablation.ablate:ablate",
        continues=True,
    ),
    "plan": Verb(
        "plan a model's decode step: bytes, FLOPs, roofline on a named GPU, and the proof that it is safe",
        "speedstack.verbs.plan:load_plan_config",
        "speedstack.verbs.plan:plan",
    ),
    "trace": Verb(
        "a timeline of one decode step as the cost model predicts it, for Perfetto",
        "speedstack.verbs.trace:load_trace_config",
        "speedstack.verbs.trace:trace",
    ),
    "report": Verb(
        "HTML and JSON from finished runs and result files of any kind",
        "speedstack.verbs.report:load_report_config",
        "speedstack.verbs.report:report",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("SPEEDSTACK_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _warnings_as_lines(debug):
            return _dispatch(arguments)
    except KeyboardInterrupt:
        verb = VERBS.get(arguments[0]) if arguments else None
        way_on = "; the same command continues from the last finished piece of work"
        return _fail(f"interrupted{way_on if verb and verb.continues else ''}", debug, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output, `| head` for example, is gone: nobody is left to tell, and the interpreter's own
        # flush at exit must not raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SYSTEM
    except (ValueError, OSError) as error:  # pydantic's ValidationError is a ValueError
        return _fail(error_line(error), debug, exit_status(error))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return EXIT_OK
    if arguments[0] == "--version":
        print(__version__)
        return EXIT_OK
    name, *rest = arguments
    if name not in VERBS:
        raise ValueError(f"unknown verb '{name}'{did_you_mean(name, VERBS)}; verbs: {', '.join(VERBS)}")
    verb = VERBS[name]
    path = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    if "-h" in rest or "--help" in rest:
        print(f"speedstack {name} [CONFIG.yaml] [--section.key value ...]\n{verb.summary}\n")
    config = _load(verb, path, rest)
    if config is None:
        return EXIT_OK
    code = _resolve(verb.job)(config)
    return EXIT_OK if code is None else int(code)


def usage() -> str:
    """The text of `speedstack --help`."""
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "speedstack <verb> [CONFIG.yaml] [--section.key value ...]\n\n"
        f"{rows}\n\n"
        "speedstack <verb> --help lists every setting. Flags win over the file, the file over defaults.\n"
        "--debug shows the traceback of an error, --version the version."
    )


def config_loader(verb: Verb) -> Callable[[Path | None, Sequence[str]], Any]:
    """The function that makes the verb's config of a file and flags: its own, or the common one over its type."""
    from speedstack.support.config import load_config

    config = _resolve(verb.config)
    return partial(load_config, config) if isinstance(config, type) else config


def _load(verb: Verb, path: Path | None, overrides: list[str]) -> Any:
    """The verb's config, or None after `--help` was printed. tyro's error boxes become one line."""
    load = config_loader(verb)
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return load(path, overrides)
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ValueError(_first_message(stderr.getvalue())) from None


def _first_message(box: str) -> str:
    """The message inside one of tyro's boxes: the text above its first inner rule, on one line."""
    lines: list[str] = []
    for line in box.splitlines():
        text = line.strip(" \u2502")
        if text.startswith("\u2500") and lines:
            break
        if text and text[0] not in "\u2500\u256d\u2570" and not re.match(r"For further information|https?://", text):
            lines.append(text)
    return " ".join(lines)


@contextlib.contextmanager
def _warnings_as_lines(debug: bool) -> Iterator[None]:
    """Warnings from our code are one line as errors are, without the file and the source line that raised them. Others'
    stay as they are, and all of them under `debug`."""
    library_format, ours = warnings.formatwarning, str(Path(__file__).parent)

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if debug or category is not UserWarning or not filename.startswith(ours):
            return library_format(message, category, filename, lineno, line)
        return f"speedstack: warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = format_warning
    try:
        yield
    finally:
        warnings.formatwarning = library_format


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _fail(message: str, debug: bool, code: int) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"speedstack: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
