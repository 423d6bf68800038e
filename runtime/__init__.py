"""The decode runtime: model specs, packed weights, backends that compute a step, and the engine in front of them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedstack.runtime.decoding.results import Generation, GenerationStats, Score
    from speedstack.runtime.engine import Engine
    from speedstack.runtime.rounds.speculation import DraftStrategy

__all__ = ["DraftStrategy", "Engine", "Generation", "GenerationStats", "Score"]


def __getattr__(name: str) -> Any:
    # Lazy: importing a sub-module for its spec or cost must not load the engine and transformers.
    if name == "Engine":
        from speedstack.runtime.engine import Engine

        return Engine
    if name == "DraftStrategy":
        from speedstack.runtime.rounds.speculation import DraftStrategy

        return DraftStrategy
    if name in __all__:
        from speedstack.runtime.decoding import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
