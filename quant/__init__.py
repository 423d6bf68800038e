"""Number formats, expert fake-quantization, post-training quantization and checkpoint formats.

Depends on torch, transformers and safetensors, not on the other packages or their configs.

    mxfp4         the one definition of MXFP4: scale rules, rounding, packing, straight-through fake-quant
    experts       a transformers model's routed experts, and their fake-quantized forward for QAT
    formats       other number formats for ablations, by name
    kernels       MXFP4 in C++ and Triton
    ptq, gptq     rounding to nearest; GPTQ of a stack of matrices, given second moments
    calibration   GPTQ of a model's routed experts, layer by layer, with `replay` and `routing`
    fp8           FP8 in tiles, as some checkpoints store other linear layers
    checkpoint    Hugging Face directories in several formats, in and out
"""
