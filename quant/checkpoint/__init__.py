"""Model checkpoints as Hugging Face directories: plain, or with the routed experts packed to MXFP4.

    files     config.json and safetensors of a directory, with every defect a clear error
    names     one family's tensor names on disk and in transformers
    packed    writes a packed directory
    reader    reads a directory, packed or not, into fused tensors
    model     reads a directory into a transformers model
    digest    names a directory's weights by their SHA-256

The packed format is compressed-tensors' `mxfp4-pack-quantized`, which vLLM, SGLang and transformers load.
"""

from speedstack.quant.checkpoint.digest import weights_sha256
from speedstack.quant.checkpoint.model import load_model
from speedstack.quant.checkpoint.packed import save_packed
from speedstack.quant.checkpoint.reader import Checkpoint, load_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "load_model", "save_packed", "weights_sha256"]
