"""speedstack: MXFP4 quantization-aware training, DFlash drafting and one decode runtime for Mixture-of-Experts models.

The five folders of the repository are the sub-packages `train`, `quant`, `dflash`, `runtime` and `eval`; in a checkout
they are relative symlinks, so that an editable install, type checkers and wheels all see the same files. Importing
`speedstack` itself imports no torch.
"""

__version__ = "0.1.0"
