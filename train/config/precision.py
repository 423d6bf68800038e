"""The precisions of training, as configs name them."""

from typing import Literal

Precision = Literal["auto", "float32", "bfloat16"]
