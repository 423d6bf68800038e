"""Number formats, expert fake-quantization, post-training quantization and checkpoint formats.

The ground floor: torch, transformers and safetensors only, no configuration files and nothing of the other packages.

    mxfp4         the one definition of MXFP4: scale rules, rounding, packing, straight-through fake-quant
    experts       routed experts of a transformers model, and their fake-quantized forward for QAT
    formats       other number formats for ablations, by name
    kernels       the same MXFP4, fast: C++ and Triton
    ptq           post-training quantization by rounding to nearest
    gptq          GPTQ of a stack of matrices, given the second moments of their inputs
    calibration   GPTQ of a model's routed experts, layer by layer
    replay        decoder layers of a model one at a time, or from one of them on
    routing       what reaches the routed experts in a forward
    fp8           FP8 in tiles, as some checkpoints hold their other linear layers
    checkpoint    Hugging Face directories in six formats, in and out
"""
