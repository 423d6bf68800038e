"""Model checkpoints as Hugging Face directories: plain, or with the routed experts packed to MXFP4.

files      config.json and safetensors of a directory, with every defect a clear error
names      one family's tensor names on disk and in transformers
formats    the formats, one codec each
linears    the tensors that are no routed experts
directory  writes a directory that appears whole or not at all
packed     writes a model
reader     reads a directory into fused tensors
model      reads a directory into a transformers model
convert    turns a directory of one format into one of another
generation which tokens end a text, and how its makers sample
digest     names a directory's weights by their SHA-256
"""

from speedstack.quant.checkpoint.convert import Conversion, convert
from speedstack.quant.checkpoint.digest import weights_sha256
from speedstack.quant.checkpoint.formats import FORMATS
from speedstack.quant.checkpoint.model import load_model
from speedstack.quant.checkpoint.packed import check_extras, save_packed
from speedstack.quant.checkpoint.reader import Checkpoint, load_checkpoint, load_tensor

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Conversion",
    "check_extras",
    "convert",
    "load_checkpoint",
    "load_model",
    "load_tensor",
    "save_packed",
    "weights_sha256",
]
