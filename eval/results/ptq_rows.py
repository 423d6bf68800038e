"""Results of ways to quantize one model: rows of one table, each a way.

Shapes of the file and the table printed from it; what is run is `speedstack.ablation.ptq`'s business.
"""

from typing import Any, Literal

from pydantic import Field

from speedstack.eval.results.kinds import Document, Environment, MethodQuality, Record, Unavailable


class PtqMethod(Record):
    """One way to quantize. `settings` are what made it; `kl_over_rtn` is its KL over that of rounding to nearest under
    the default scale rule; `gptq` sums up the report of a calibration, of the token ids that `calibration_sha256` is
    of; an export has the digest of its weights. `environment` is None where it is that of the whole result.
    """

    quality: MethodQuality
    settings: dict[str, Any] = Field(default={})
    seconds: float | None = None
    kl_over_rtn: float | None = None
    gptq: dict[str, float] = Field(default={})
    calibration_sha256: str | None = None
    model_sha256: str | None = None
    environment: Environment | None = None


class PtqResult(Document):
    """Ways to quantize one model, the first entry being the model itself, on `num_tokens` held-out tokens.

    `text_sha256` is of the windows' token ids. Digests are None where a file does not say. `unavailable` are ways that
    failed. `environment` is that of the command that began the file; rows of others name theirs.
    """

    kind: Literal["ptq"] = "ptq"
    model_sha256: str | None
    text_sha256: str | None = None
    device: str | None = None
    num_tokens: int
    window: int
    methods: tuple[PtqMethod, ...]
    unavailable: tuple[Unavailable, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Environment

    def table(self) -> str:
        """The methods as lines of text."""
        width = max(28, *(len(method.quality.method) + 2 for method in self.methods))
        lines = [f"{'':<{width}}{'KL, millinats':>18}{'over RTN':>10}{'top-1':>9}{'loss, nats':>12}"]
        for method in self.methods:
            quality = method.quality
            line = f"{quality.method:<{width}}"
            if quality.kl_to_teacher_nats is None or quality.top1_agreement is None:
                line += " " * 37
            else:
                error = f" ± {1e3 * quality.kl_stderr_nats:.3f}" if quality.kl_stderr_nats is not None else ""
                ratio = "" if method.kl_over_rtn is None else f"{method.kl_over_rtn:.3f}"
                line += f"{f'{1e3 * quality.kl_to_teacher_nats:.4f}{error}':>18}{ratio:>10}"
                line += f"{100 * quality.top1_agreement:>8.2f}%"
            lines.append(f"{line}{quality.nll_nats:>12.5f}")
        lines += [f"{entry.name}: failed: {entry.reason}" for entry in self.unavailable]
        return "\n".join(lines)
