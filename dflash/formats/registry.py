"""All drafter formats, by the name that `speedstack convert --to` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speedstack.dflash.formats.format import DrafterFormat
from speedstack.dflash.formats.speculators import SPECULATORS
from speedstack.dflash.formats.transformers import TRANSFORMERS
from speedstack.dflash.formats.zlab import MIMO, SPEEDSTACK, ZLAB

FORMATS = {format.name: format for format in (SPEEDSTACK, ZLAB, MIMO, SPECULATORS, TRANSFORMERS)}


def recognize(raw: Mapping[str, Any]) -> DrafterFormat | None:
    """The format of a config.json, or None if it is no drafter's. z-lab's, MiMo's and ours count as ours."""
    return next((one for one in (SPECULATORS, TRANSFORMERS, SPEEDSTACK) if one.recognizes(raw)), None)
