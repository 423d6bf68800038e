"""Model checkpoints as Hugging Face directories: plain, or with the routed experts packed to MXFP4.

files      config.json and safetensors of a directory, with every defect a clear error
names      one family's tensor names on disk and in transformers
spelling   config.json in transformers' own keys
config     what model a directory holds
formats    the formats, one codec each
linears    the tensors that are no routed experts
directory  writes a directory that appears whole or not at all
reader     reads a directory into fused tensors
model      reads a directory into a transformers model
tokenizer  reads a directory's tokenizer, if it has one
source     opens a directory that is to be written again
writer     writes it, with everything that is not changed as it was
convert    turns a directory of one format into one of another
export     writes a model that was changed in memory as the directory it came from
generation which tokens end a text
digest     names a directory's weights by their SHA-256
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
