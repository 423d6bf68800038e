"""Copies of a model for peers: what they are, that they are kept, and what the converter of GGUF files is told."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.eval.results.failures import PeerFailure
from speedstack.eval.speed.peers.copies import PeerCopies
from speedstack.eval.speed.peers.process import WORKERS
from speedstack.quant.checkpoint import load_model
from tests.eval.speed.stand_ins import script


def test_an_unpacked_copy_has_the_same_values(tiny_packed_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = PeerCopies(tiny_packed_dir, tmp_path).plain()
    assert copy.parent == tmp_path
    packed, plain = (load_model(path, dtype=torch.float32).state_dict() for path in (tiny_packed_dir, copy))
    assert packed.keys() == plain.keys() and all(torch.equal(packed[name], plain[name]) for name in packed)
    assert PeerCopies(tiny_model_dir, tmp_path).plain() == tiny_model_dir


def test_the_converter_is_called_once(tiny_packed_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    python = script(tmp_path / "python", f'echo "$@" >> {log}; echo made > "$3"')
    copies = PeerCopies(tiny_packed_dir, tmp_path / "copies")
    made = copies.gguf(python, "q8_0")
    assert made == copies.gguf(python, "q8_0") == PeerCopies(tiny_packed_dir, tmp_path / "copies").gguf(python, "q8_0")
    assert made.read_text() == "made\n" and made.name.endswith("q8_0.gguf")
    (line,) = log.read_text().splitlines()
    worker, source, part, *rest = line.split()
    assert worker == str(WORKERS / "gguf_file.py") and source == str(copies.plain())
    assert Path(part).name == made.name and part != str(made)
    assert rest == ["q8_0", "--mxfp4-experts"]
    assert PeerCopies(tiny_model_dir, tmp_path / "copies").gguf(python, "f16") != made
    assert log.read_text().splitlines()[1].split()[1::2] == [str(tiny_model_dir), "f16"]


def test_a_converter_that_fails_leaves_nothing(tiny_model_dir: Path, tmp_path: Path) -> None:
    python = script(tmp_path / "python", 'echo half > "$3"; echo "Model X is not supported" >&2; exit 1')
    copies = PeerCopies(tiny_model_dir, tmp_path / "copies")
    with pytest.raises(PeerFailure, match=r"^llama.cpp's converter: Model X is not supported$"):
        copies.gguf(python, "f16")
    assert not list((tmp_path / "copies").iterdir())
    with pytest.raises(PeerFailure, match=r"^no interpreter at"):
        copies.gguf(tmp_path / "none", "f16")
    with pytest.raises(PeerFailure, match=rf"^llama.cpp's converter: llama.cpp's converter is not at {sys.prefix}"):
        copies.gguf(Path(sys.executable), "f16")


def test_experts_are_written_as_mxfp4_and_no_vocabulary() -> None:
    prepare = runpy.run_path(str(WORKERS / "gguf_file.py"))["prepare"]
    written: list[Any] = []

    class Writer:
        add_vocab_size = written.append

    class Family:
        model_arch = "arch"
        hparams = {"vocab_size": 70}  # noqa: RUF012
        gguf_writer = Writer

        def _set_vocab_none(self) -> None:
            written.append("none")

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            return "F32" if "gate_inp" in new_name else False

    for is_packed, expected in ((True, ["MXFP4", False, "F32", False]), (False, [False, False, "F32", False])):
        converter = prepare(Family, "MXFP4", is_packed)()
        tensors = (
            ("blk.0.ffn_up_exps.weight", 3),
            ("blk.0.ffn_up_exps.bias", 2),
            ("blk.0.ffn_gate_inp.weight", 2),
            ("blk.0.attn_q.weight", 2),
        )
        assert [converter.tensor_force_quant("", name, 0, dims) for name, dims in tensors] == expected
    converter.set_vocab()
    assert written == ["none", 70]
