"""Which layers and experts bear quantization badly: KL to full precision when one of them alone is quantized.

The full-precision forward is computed once a batch; a quantized layer costs the forward from that layer on, and an
unreached expert costs nothing. Weights are quantized in place and restored bit for bit, so nothing else may use the
model meanwhile.

    python -m speedstack.eval.quality.sensitivity MODEL --corpus DIR

In a notebook, `sensitivity` takes directories, and `measure_sensitivity` a model and windows of token ids.

Left out: interactions. The layers' effects about add up; experts' effects do not, because any change, of one expert or
all, moves the same undecided tokens elsewhere in later layers.

Shape suffixes: B windows, T tokens, V vocabulary.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from speedstack.eval.quality.divergence import token_kl, top1_matches
from speedstack.eval.quality.heldout import corpus_windows
from speedstack.eval.quality.measure import stderr_over_windows
from speedstack.eval.results.environment import describe_environment
from speedstack.eval.results.quality import SensitivityResult, UnitSensitivity
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.config import read_config
from speedstack.quant.checkpoint.files import checkpoint_directory
from speedstack.quant.experts import contraction_last, weight_names
from speedstack.quant.mxfp4 import DEFAULT_SCALE_RULE, ScaleRule, fake_quantize
from speedstack.quant.replay import DecoderLayers
from speedstack.quant.routing import RoutedTokens, record_routing
from speedstack.runtime.model.device import choose_device
from speedstack.support.command import module_command, module_parser, show_result
from speedstack.support.progress import counting_bar

NUM_SHOWN = 10

Rounding = Callable[[torch.Tensor], torch.Tensor]
# Layer and expert; None is all experts of the layer.
Unit = tuple[int, int | None]


def sensitivity(
    model: str | Path,
    corpus: str | Path,
    rounding: Rounding = fake_quantize,
    *,
    num_tokens: int = 4096,
    window: int = 256,
    batch_size: int = 4,
    by_expert: bool = True,
    device: str = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> SensitivityResult:
    """`measure_sensitivity` of a model directory in float32, on the held-out part of a prepared corpus.

    Raises ValueError for a missing, broken or packed model, and as `corpus_windows` and `measure_sensitivity`.
    """
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    directory = checkpoint_directory(model)
    if read_config(directory)[1].is_packed:
        raise ValueError(
            f"the experts of {directory} are quantized already, so that quantizing them changes nothing: give the "
            "model it was made from"
        )
    chosen_device = choose_device(device)
    windows = corpus_windows(corpus, directory, window, num_tokens)
    loaded = load_model(directory)
    torch.nn.Module.to(loaded, chosen_device)
    result = measure_sensitivity(loaded, windows, rounding, by_expert, batch_size, on_batch)
    return result.model_copy(update={"model_sha256": weights_sha256(directory)})


@torch.no_grad()
def measure_sensitivity(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    rounding: Rounding = fake_quantize,
    by_expert: bool = True,
    batch_size: int = 8,
    on_batch: Callable[[int, int], None] | None = None,
) -> SensitivityResult:
    """KL to `model` itself on `windows` (of `heldout_windows`) with each layer, and each expert, quantized alone.

    `rounding` maps weights [..., O, K], contraction last, to their quantized values. Use float32 for such small
    differences. `on_batch` receives (batches done, batches). Raises ValueError as `DecoderLayers` and `rounding`, and
    for no windows; weights are restored.
    """
    if not windows:
        raise ValueError("no windows to measure on")
    layers = DecoderLayers(model)
    units: list[Unit] = [
        (index, expert)
        for index, module in layers.experts.items()
        for expert in [None, *(range(len(_weights(module)[0])) if by_expert else ())]
    ]
    # Sums over windows: a small tensor a window and unit, between large ones, would keep those from being freed.
    kl: dict[Unit, list[float]] = {unit: [] for unit in units}
    num_matches = dict.fromkeys(units, 0.0)
    num_routed = dict.fromkeys(units, 0)
    all_kl = 0.0
    batches = list(_batches(windows, batch_size))
    for done, ids_BT in enumerate(batches):
        ids_BT = ids_BT.to(model.device)
        with record_routing(layers.experts) as calls:
            outputs, teacher_BTV = layers.run_all(ids_BT)
        for unit in units:
            index, expert = unit
            chosen = RoutedTokens.join(calls[index]).experts_Nk
            num_reached = chosen.numel() if expert is None else int((chosen == expert).sum())
            num_routed[unit] += num_reached
            student_BTV = teacher_BTV
            if num_reached:
                with _quantized([layers.experts[index]], expert, rounding):
                    student_BTV = layers.logits_from(index, ids_BT, outputs[index - 1] if index else None)
            kl[unit] += _window_sums(token_kl, teacher_BTV, student_BTV)
            num_matches[unit] += sum(_window_sums(top1_matches, teacher_BTV, student_BTV))
        with _quantized(list(layers.experts.values()), None, rounding):
            all_kl += sum(_window_sums(token_kl, teacher_BTV, model(input_ids=ids_BT, use_cache=False).logits))
        if on_batch is not None:
            on_batch(done + 1, len(batches))
    sizes = [ids_BT.shape[1] - 1 for ids_BT in batches for _ in ids_BT]
    num_tokens = sum(sizes)
    return SensitivityResult(
        rounding=_describe(rounding),
        num_tokens=num_tokens,
        all_kl_nats=all_kl / num_tokens,
        units=tuple(
            UnitSensitivity(
                layer=index,
                expert=expert,
                num_parameters=_num_parameters(layers.experts[index], expert),
                num_tokens=num_routed[index, expert],
                kl_nats=sum(kl[index, expert]) / num_tokens,
                kl_stderr_nats=stderr_over_windows(kl[index, expert], sizes),
                top1_agreement=num_matches[index, expert] / num_tokens,
            )
            for index, expert in units
        ),
        environment=describe_environment(),
    )


@contextmanager
def _quantized(modules: Sequence[nn.Module], expert: int | None, rounding: Rounding) -> Iterator[None]:
    """Quantize one expert of these modules, or all, during the block."""
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    try:
        for module in modules:
            for weight in _weights(module):
                weight_EOK = contraction_last(module, weight)
                part = weight_EOK if expert is None else weight_EOK[expert]
                saved.append((part, part.clone()))
                part.copy_(rounding(part))
        yield
    finally:
        for part, original in saved:
            part.copy_(original)


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [getattr(module, name).data for name in weight_names(module)]


def _num_parameters(module: nn.Module, expert: int | None) -> int:
    return sum(weight.numel() if expert is None else weight[expert].numel() for weight in _weights(module))


def _batches(windows: Sequence[Sequence[int]], batch_size: int) -> Iterator[torch.Tensor]:
    """Windows grouped by length, int64 [B, T]."""
    for _, group in itertools.groupby(sorted(windows, key=len, reverse=True), key=len):
        same_length = [list(window) for window in group]
        for start in range(0, len(same_length), batch_size):
            yield torch.tensor(same_length[start : start + batch_size])


def _window_sums(
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], teacher_BTV: torch.Tensor, student_BTV: torch.Tensor
) -> list[float]:
    """Each window's sum of a value per token, without the last row, which predicts beyond the window."""
    pairs = zip(teacher_BTV[:, :-1], student_BTV[:, :-1], strict=True)
    return [float(function(teacher_TV, student_TV).sum()) for teacher_TV, student_TV in pairs]


def _describe(rounding: Rounding) -> str:
    """'fake_quantize', 'fake_quantize(scale_rule=even)'."""
    if isinstance(rounding, partial):
        arguments = [*map(str, rounding.args), *(f"{key}={value}" for key, value in rounding.keywords.items())]
        return f"{_describe(rounding.func)}({', '.join(arguments)})"
    return getattr(rounding, "__name__", type(rounding).__name__)


@module_command
def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print the most sensitive units, write JSON and CSV."""
    parser = module_parser(__spec__, __doc__, out=None)
    parser.add_argument("model", type=Path, help="unquantized model directory")
    parser.add_argument("--corpus", type=Path, required=True, help="prepared corpus whose held-out part is read")
    parser.add_argument("--scale-rule", choices=get_args(ScaleRule), default=DEFAULT_SCALE_RULE)
    parser.add_argument("--num-tokens", type=int, default=4096, help="held-out tokens (default: %(default)s)")
    parser.add_argument("--window", type=int, default=256, help="tokens in one window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows computed together (default: %(default)s)")
    parser.add_argument("--layers-only", action="store_true", help="leave single experts out")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/sensitivity"), help="directory (default: %(default)s)")
    options = parser.parse_args(arguments)
    result = _measure(options)
    show_result(result, _worst(result), options.out / "sensitivity.json")
    print(f"written: {result.save_csv(options.out / 'sensitivity.csv')}")


def _worst(result: SensitivityResult) -> str:
    """The most sensitive units."""
    lines = [f"everything quantized: KL {1e3 * result.all_kl_nats:.3f} millinats a token"]
    for kind, units in (("layer", result.layers()), ("expert", result.experts())):
        for unit in sorted(units, key=lambda unit: unit.kl_nats, reverse=True)[:NUM_SHOWN]:
            place = f"layer {unit.layer}" if unit.expert is None else f"layer {unit.layer} expert {unit.expert}"
            lines.append(f"{kind:<8}{place:<22}KL {1e3 * unit.kl_nats:8.4f}  {unit.num_tokens} tokens")
    return "\n".join(lines)


def _measure(options: argparse.Namespace) -> SensitivityResult:
    with counting_bar("sensitivity", "batch") as show:
        return sensitivity(
            options.model,
            options.corpus,
            partial(fake_quantize, scale_rule=options.scale_rule),
            num_tokens=options.num_tokens,
            window=options.window,
            batch_size=options.batch_size,
            by_expert=not options.layers_only,
            device=options.device,
            on_batch=show,
        )


if __name__ == "__main__":
    sys.exit(main())
