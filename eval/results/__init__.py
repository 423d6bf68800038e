"""Result files: their schemas, a file a subject, and what every one of them records.

`schema` has what all are made of; `quality`, `quantization`, `speed`, `suite`, `ablation` and `microbench` the
measurements, `report` what holds a whole run. The rest is read without a schema, also where pydantic is not.
"""
