"""Copies of a model in forms that peers read: unpacked, and as GGUF files; made when first asked for, and kept.

A copy has the values of its model: experts in MXFP4 stay in MXFP4 in a GGUF file and are bfloat16 in an unpacked one,
which has them exactly. The other weights are what a peer is asked to hold them in. Copies are named by the digest of
what they are copies of.
"""

import subprocess
from functools import cached_property
from pathlib import Path
from typing import Literal

from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.speed.peers.process import WORKERS, no_interpreter, worker_environment
from speedstack.quant.checkpoint import convert
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.digest import model_sha256
from speedstack.quant.checkpoint.files import checkpoint_directory
from speedstack.quant.checkpoint.formats import Plain
from speedstack.support.files import atomic_path
from speedstack.support.progress import counting_bar

GGUFWeights = Literal["f32", "f16", "bf16", "q8_0"]
# Changed when a copy of the same model would be another one.
VERSION = 1


class PeerCopies:
    """Copies of the model in directory `target`, kept in `directory`. Raises what the readers of checkpoints do."""

    def __init__(self, target: str | Path, directory: Path) -> None:
        self.target, self.directory = checkpoint_directory(target), directory
        codec = read_config(self.target)[1]
        self.is_packed, self._is_plain = codec.is_packed, codec is Plain

    def plain(self) -> Path:
        """A model directory without packed or quantized weights: the target itself where it has none."""
        if self._is_plain:
            return self.target
        out = self._place("plain")
        if not out.exists():
            with counting_bar(f"unpacking {self.target}", " tensors") as show:
                convert(self.target, "plain", out, on_progress=show)
        return out

    def gguf(self, python: Path, weights: GGUFWeights) -> Path:
        """A GGUF file with `weights` for all but packed experts, by llama.cpp's converter beside `python`.

        Raises PeerFailure where that is not installed or does not know the model.
        """
        out = self._place(f"{weights}.gguf")
        if out.exists():
            return out
        model = self.plain()
        with atomic_path(out) as partial:
            command = [str(python), str(WORKERS / "gguf_file.py"), str(model), str(partial), weights]
            try:
                done = subprocess.run(
                    [*command, *(["--mxfp4-experts"] if self.is_packed else [])],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    env=worker_environment(),
                )
            except OSError as error:
                raise no_interpreter(python, error) from error
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise PeerFailure(f"llama.cpp's converter: {lines[-1].strip()[:200]}")
        return out

    def _place(self, suffix: str) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        return self.directory / f"{self._digest}-{VERSION}-{suffix}"

    @cached_property
    def _digest(self) -> str:
        return model_sha256(self.target)[:16]
