"""Result files: schemas, a file per subject, and what every result records.

All schemas build on `schema`. `quality`, `quantization`, `speed`, `suite`, `ablation` and `microbench` hold
measurements, `report` a whole run. `environment`, `failures`, `labels`, `metrics` and `spread` need no pydantic.
"""
