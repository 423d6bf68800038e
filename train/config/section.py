"""What every section of a config is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Precision = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error instead of a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
