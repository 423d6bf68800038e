"""Model checkpoints as Hugging Face directories: plain, or with routed experts packed to MXFP4.

files, directory            read files, with clear errors for defects; write a directory atomically
names, spelling, config     tensor names and config.json in transformers' terms
formats, linears            one codec per format; the tensors that are no routed experts
reader, model, tokenizer    read a directory into tensors, a transformers model, a tokenizer
source, writer              open a directory to be rewritten; write it with unchanged parts as they were
convert, export             format to format; a changed model as the directory it came from
generation, digest          end tokens; SHA-256 of weights
"""

from speedstack.quant.checkpoint.convert import Conversion, convert
from speedstack.quant.checkpoint.digest import weights_sha256
from speedstack.quant.checkpoint.export import can_be_packed, check_export, export_model
from speedstack.quant.checkpoint.formats import FORMATS
from speedstack.quant.checkpoint.model import load_model
from speedstack.quant.checkpoint.reader import Checkpoint, load_checkpoint, load_tensor

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Conversion",
    "can_be_packed",
    "check_export",
    "convert",
    "export_model",
    "load_checkpoint",
    "load_model",
    "load_tensor",
    "weights_sha256",
]
