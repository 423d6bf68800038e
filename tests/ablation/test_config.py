"""What a grid's config and its files say without a model: rows, workers, versions."""

import json
from pathlib import Path

import pytest
import torch

from speedstack.ablation.ablate import worker_places
from speedstack.ablation.config import AblateConfig
from speedstack.eval.results.ablation import AblationGrid, AblationRow
from speedstack.quant.formats import number_format


def test_rows_of_a_grid() -> None:
    config = AblateConfig.model_validate(
        {
            "grid": {"format": ["mxfp4", "nvfp4"], "method": ["rtn", "none"], "temperature": [0, 1]},
            "include": [{"method": "none", "drafter": ["full", "quantized"], "temperature": 1}],
            "exclude": [{"format": "nvfp4", "method": "rtn"}],
        }
    )
    assert [row.name for row in config.rows()] == [
        "full precision",
        "full precision, drafter of the full model, T=1",
        "mxfp4 experts rtn",
    ]


def test_workers_share_threads_and_have_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    cpu = worker_places(AblateConfig(jobs=3), "cpu")
    assert [place.num_threads for place in cpu] == [2, 2, 2]
    gpus = worker_places(AblateConfig(), "cuda")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in gpus] == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in worker_places(AblateConfig(), "cuda")] == ["2", "5"]
    with pytest.raises(ValueError, match="3 jobs need a GPU each, and there are 2"):
        worker_places(AblateConfig(jobs=3), "cuda")


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"kind": "ablation", "schema_version": 7}), encoding="utf-8")
    with pytest.raises(ValueError, match="has schema version 7, this release reads version 1"):
        AblationGrid.load(file)
    assert number_format("nvfp4").num_bytes((3, 2, 32)) == 3 * (2 * 32 * 4 + 4 * 8 + 32) // 8
    assert AblationRow(name="", format="", modules="", method="none", drafter="none", temperature=0).model_name
