"""The `compare` verb: results of one suite, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speedstack.eval.config import CompareConfig
from speedstack.support.config import is_yaml
from speedstack.verbs.named_files import load_naming_files


def load_compare_config(path: Path | None, overrides: Sequence[str]) -> CompareConfig:
    """The verb's config; result files may be named in place of a YAML file."""
    if path is not None and not is_yaml(path) and (not overrides or overrides[0].startswith("-")):
        raise ValueError("compare needs two result files or more: speedstack compare A.json B.json")
    return load_naming_files(CompareConfig, "results", path, overrides)


def compare(config: CompareConfig) -> None:
    """Results of one suite, side by side."""
    from speedstack.eval.lm_eval.compare import compare_results
    from speedstack.eval.results.suite import SuiteResult

    places = [path.resolve() for path in config.results]
    if twice := [str(path) for path, place in zip(config.results, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"compare takes different result files, and {' and '.join(twice)} are one")
    comparison = compare_results(
        {str(path): SuiteResult.load(path) for path in config.results},
        significance=config.significance,
        num_resamples=config.num_resamples,
        seed=config.seed,
    )
    print(comparison.markdown())
    if config.out is not None:
        save = comparison.save_markdown if config.out.suffix == ".md" else comparison.save
        print(f"written: {save(config.out)}")
