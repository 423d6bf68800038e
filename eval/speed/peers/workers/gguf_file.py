"""Writes a model directory as a GGUF file, with llama.cpp's own converter:

    PYTHON gguf_file.py DIRECTORY FILE WEIGHTS [--mxfp4-experts]

WEIGHTS is one of the converter's types (f32, f16, bf16, q8_0); with --mxfp4-experts routed experts are MXFP4 instead,
which changes no value that MXFP4 has. The file has no vocabulary: a race is of token ids, and the converter knows few
tokenizers. The converter lies in share/llama.cpp of the environment, where `eval.speed.peers.install` puts it.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def prepare(model_class: Any, mxfp4: Any, has_mxfp4_experts: bool) -> Any:
    """A converter's class for a family, changed to write no vocabulary, and experts in MXFP4."""

    class Converter(model_class):  # type: ignore[misc]
        model_arch = model_class.model_arch  # which every class must name itself

        def set_vocab(self) -> None:
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            if has_mxfp4_experts and n_dims == 3 and new_name.endswith("_exps.weight"):
                return mxfp4
            return super().tensor_force_quant(name, new_name, bid, n_dims)

    return Converter


def main() -> None:
    """Runs the converter, as its command line would."""
    source, file, weights, *flags = sys.argv[1:]
    share = Path(sys.prefix) / "share" / "llama.cpp"
    script = share / "convert_hf_to_gguf.py"
    if not script.is_file():
        sys.exit(f"llama.cpp's converter is not at {script}")
    sys.path[:0] = [str(share), str(share / "gguf-py")]
    import conversion
    import gguf

    model_class_of = conversion.get_model_class
    mxfp4 = gguf.GGMLQuantizationType.MXFP4
    conversion.get_model_class = lambda *arguments, **options: prepare(
        model_class_of(*arguments, **options), mxfp4, "--mxfp4-experts" in flags
    )
    sys.argv = [str(script), source, "--outfile", file, "--outtype", weights]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
