import datasets
import pytest
import torch

from speedstack.train.core.batches import PackedWindows, generator


def documents(*lengths: int) -> datasets.Dataset:
    """Documents that together count 0, 1, 2, ..."""
    rows, start = [], 0
    for length in lengths:
        rows.append(list(range(start, start + length)))
        start += length
    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": rows}, features=features)


def test_windows_cut_the_documents_laid_end_to_end() -> None:
    windows = PackedWindows(documents(3, 5, 4), 4)
    assert len(windows) == 3
    assert torch.equal(windows.window(1), torch.tensor([4, 5, 6, 7]))


def test_an_epoch_reads_every_token_once_wherever_it_is_cut() -> None:
    windows = PackedWindows(documents(*[7] * 8), 8)
    for epoch in range(4):
        ids = windows.examples(0, range(epoch * len(windows), (epoch + 1) * len(windows)))
        assert sorted(ids.flatten().tolist()) == list(range(56))
        steps = (ids[:, 1:] - ids[:, :-1]) % 56
        assert bool((steps == 1).all()), "a window is consecutive text"


def test_order_is_a_function_of_seed_and_number() -> None:
    windows = PackedWindows(documents(100, 100), 5)
    ids = windows.examples(3, range(90))
    assert torch.equal(ids[41:47], PackedWindows(documents(100, 100), 5).examples(3, range(41, 47)))
    assert not torch.equal(ids, windows.examples(4, range(90)))
    assert not torch.equal(ids[:40], ids[40:80]), "epochs differ"


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 tokens, fewer than one window of 4"):
        PackedWindows(documents(3), 4)


def test_slices_of_a_dataset_keep_to_themselves() -> None:
    # Arrow slices share the buffers of the whole; only the selected rows may be read.
    windows = PackedWindows(documents(4, 4, 4).select([1]), 4)
    assert len(windows) == 1
    assert torch.equal(windows.window(0), torch.tensor([4, 5, 6, 7]))


def test_generator_is_a_pure_function_of_its_keys() -> None:
    draw = torch.rand(4, generator=generator(1, 2))
    assert torch.equal(draw, torch.rand(4, generator=generator(1, 2)))
    assert not torch.equal(draw, torch.rand(4, generator=generator(2, 1)))
