"""The drafter recipe on the tiny packed model: batches, what evaluation counts, and a run from end to end."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.eval.results.metrics import read_metrics
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.quant.checkpoint.digest import config_sha256
from speedstack.runtime import Engine
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.attention import enable_blockwise_attention
from speedstack.train.core.distributed import World
from speedstack.train.data.digest import corpus_digest
from speedstack.train.drafter.evaluation import GreedyText
from speedstack.train.drafter.frozen_target import FrozenTarget, SharedTarget
from speedstack.train.drafter.job import make_recipe, train_drafter
from speedstack.train.drafter.recipe import DrafterRecipe
from speedstack.train.drafter.shape import draft_config
from speedstack.train.drafter.text import write_text

MODULES = [
    "textwrap",
    "heapq",
    "bisect",
    "string",
    "shlex",
    "fnmatch",
    "glob",
    "keyword",
    "queue",
    "sched",
    "abc",
    "csv",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_packed_dir: Path) -> DrafterConfig:
    import importlib
    import inspect

    root = tmp_path_factory.mktemp("drafter")
    texts = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return DrafterConfig.model_validate(
        {
            "run": {"name": "run", "out": root, "device": "cpu", "precision": "float32"},
            "data": {
                "corpus": root / "corpus",
                "source": str(root / "texts.jsonl"),
                "heldout_fraction": 0.2,
                "sequence_length": 48,
            },
            "optim": {"lr": 0.02, "adamw_lr": 0.005},
            "loop": {"num_steps": 30, "batch_size": 8, "eval_every": 0, "save_every": 10},
            "drafter": {
                "target": tiny_packed_dir,
                "target_dtype": "float32",
                "target_layer_ids": [0, 2],
                "block_size": 4,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "text": root / "text",
                "num_sequences": 24,
                "num_eval_sequences": 6,
                "num_served_prompts": 0,
                "prompt_length": 12,
                "num_anchors": 8,
                "written_fraction": 0.5,
            },
        }
    )


@pytest.fixture(scope="module")
def recipe(config: DrafterConfig) -> DrafterRecipe:
    built = DrafterRecipe(config, show_progress=False)
    built.build(one_process())
    return built


def written_ids(recipe: DrafterRecipe) -> torch.Tensor:
    assert recipe.written is not None
    return recipe.written.ids_NT


def one_process() -> World:
    return World(rank=0, size=1, device=torch.device("cpu"))


def test_text_is_a_stage_of_its_own(config, tmp_path, changed):
    apart = changed(config, run={"name": "apart"}, drafter={"text": tmp_path / "text"})
    counts: list[tuple[int, int]] = []
    write_text(apart, on_progress=lambda done, total: counts.append((done, total)))
    assert [done for done, _ in counts] == sorted(done for done, _ in counts)
    assert counts[-1] == (30, 30)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "text").rglob("*.safetensors")}
    assert len(written) == 2
    DrafterRecipe(apart, show_progress=False).build(one_process())
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "text").rglob("*.safetensors")}


def test_a_batch_is_a_function_of_the_example_numbers(recipe):
    together = vars(recipe.batch([0, 1, 2, 3, 40]).windows)
    for place, index in enumerate([0, 1, 2, 3, 40]):
        alone = vars(recipe.batch([index]).windows)
        assert all(torch.equal(alone[name][0], together[name][place]) for name in together)
    anchors = together["anchors_BA"]
    assert not torch.equal(anchors[0], anchors[2])


def test_written_windows_and_corpus_windows_alternate_at_one_half(recipe):
    batch = recipe.batch(range(8)).windows
    written = {tuple(row) for row in recipe.written.ids_NT.tolist()}
    assert [tuple(row) in written for row in batch.ids_BT.tolist()] == [False, True] * 4
    prompt_length = recipe.config.drafter.prompt_length
    assert not batch.predictable_BT[1, :prompt_length].any() and batch.predictable_BT[1, prompt_length:].all()
    assert batch.predictable_BT[0].all()


def test_a_process_without_a_prompt_says_nothing_of_serving(config, changed):
    """And not that of another's prompt, which would count twice."""
    recipe = DrafterRecipe(changed(config, drafter={"num_served_prompts": 2}), show_progress=False)
    model = recipe.build(one_process())
    recipe.world = World(rank=2, size=3, device=torch.device("cpu"))
    metrics = recipe.evaluate(model.eval())
    assert metrics["tau_served"] is None and metrics["tau_served_t1_at_1"] is None
    assert metrics["tau_simulated"] is not None


@pytest.mark.parametrize("draft_vocab_size", [None, 64])
def test_the_batches_of_a_step_have_its_loss_as_their_mean(config, changed, draft_vocab_size):
    """Windows differ in how much there is to predict: prompts are not, nor tokens that the drafter does not have."""
    section = {"num_anchors": 40, "draft_vocab_size": draft_vocab_size}
    recipe = DrafterRecipe(changed(config, drafter=section), show_progress=False)
    model = recipe.build(one_process())
    for step in (0, 3):
        first = step * recipe.config.loop.batch_size
        whole, _ = recipe.loss(model, recipe.batch(range(first, first + 8)))
        parts = [recipe.loss(model, recipe.batch(range(start, start + 2)))[0] for start in range(first, first + 8, 2)]
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)
        unweighted = [
            recipe.blocks_loss(model, recipe.batch([index]).windows)[0].loss for index in range(first, first + 8)
        ]
        assert torch.stack(unweighted).mean().item() != pytest.approx(whole.item(), rel=1e-5)


def test_an_epoch_of_written_text_reads_every_sequence_once(recipe):
    num = len(recipe.written.ids_NT)
    first = [recipe.windows.written_window(place, 0).ids_BT[0].tolist() for place in range(num)]
    second = [recipe.windows.written_window(place, 0).ids_BT[0].tolist() for place in range(num, 2 * num)]
    assert sorted(first) == sorted(second) == sorted(recipe.written.ids_NT.tolist())
    assert first != second


def test_features_are_the_tapped_layers_outputs(recipe, tiny_packed_dir):
    ids = recipe.heldout.ids_NT[:2]
    features = recipe.target.features(ids).taps_BTC
    whole = load_model(tiny_packed_dir)
    enable_blockwise_attention(whole, torch.device("cpu"))
    with torch.no_grad():
        states = whole.model(ids, output_hidden_states=True, use_cache=False)
    width = whole.config.hidden_size
    assert torch.equal(features[..., :width], states.hidden_states[1])
    # The last layer's entry in hidden_states is final-normed; the tap is its output before that.
    assert torch.equal(whole.model.norm(features[..., width:]), states.hidden_states[3])


def test_features_of_a_document_do_not_know_the_one_before_it(recipe):
    """As in serving, where a document begins a sequence."""
    ids, ends = recipe.heldout.ids_NT[:3], torch.tensor([48, 20, 33])
    documents = (torch.arange(48) >= ends[:, None]).long()
    features = recipe.target.features(ids, documents).taps_BTC
    for row, end in enumerate(ends.tolist()):
        parts = [
            recipe.target.features(ids[row : row + 1, part]).taps_BTC
            for part in (slice(end), slice(end, 48))
            if part.start != 48
        ]
        torch.testing.assert_close(features[row], torch.cat(parts, dim=1)[0])  # other batches


def test_precomputed_features_are_used_and_the_rest_computed(recipe, tiny_packed_dir):
    ids = recipe.heldout.ids_NT[:3]
    target = FrozenTarget(tiny_packed_dir, torch.device("cpu"))
    target.tap((0, 2))
    first_two, last = target.features(ids[:2]).taps_BTC, target.features(ids[2:]).taps_BTC
    with pytest.warns(UserWarning, match="2 of 3 windows have room"):
        target.precompute(ids, max_bytes=2 * first_two[0].nbytes)
    num_windows = 0

    def count(module, args, kwargs):
        nonlocal num_windows
        num_windows += len(kwargs["input_ids"])

    target.decoder.register_forward_pre_hook(count, with_kwargs=True)
    assert torch.equal(target.features(ids).taps_BTC, torch.cat([first_two, last]))
    assert num_windows == 1  # there was room for two
    assert torch.equal(target.features(ids[:2].flip(0)).taps_BTC, first_two.flip(0))
    assert num_windows == 1


def test_features_kept_on_disk_are_those_kept_in_memory(config, tmp_path, changed):
    kept: dict[str, Any] = {}
    for features in ("memory", "disk"):
        options = {"features": features, "features_path": tmp_path / "features", "kl_weight": 1.0}
        built = DrafterRecipe(changed(config, drafter=options), show_progress=False)
        built.build(one_process())
        kept[features] = built.target.features(written_ids(built)[3:7])
    assert torch.equal(kept["memory"].taps_BTC, kept["disk"].taps_BTC)
    assert torch.equal(kept["memory"].final_BTD, kept["disk"].final_BTD)
    # A cache with final states serves a recipe that needs none; another target's does not.
    hard = {"features": "disk", "features_path": tmp_path / "features"}
    built = DrafterRecipe(changed(config, drafter=hard), show_progress=False)
    built.build(one_process())
    assert torch.equal(built.target.features(written_ids(built)[3:7]).taps_BTC, kept["disk"].taps_BTC)
    other = changed(config, drafter=hard | {"target_layer_ids": [0, 1]})
    with pytest.raises(ValueError, match="holds features with another target_layer_ids"):
        DrafterRecipe(other, show_progress=False).build(one_process())


def test_targets_that_share_weights_have_their_own_taps(tiny_packed_dir):
    load, ids_BT = SharedTarget(), torch.arange(40).reshape(2, 20) + 5
    alone = FrozenTarget(tiny_packed_dir, torch.device("cpu"))
    alone.tap([0, 2], with_final=True)
    expected = alone.features(ids_BT)
    first, second, third = (load(tiny_packed_dir, torch.device("cpu"), torch.float32) for _ in range(3))
    first.tap([0])
    second.tap([0, 2], with_final=True)
    third.tap([1, 0])
    assert [len(target.decoder.layers) for target in (first, second, third)] == [1, 3, 2]
    pointers = [{p.data_ptr() for p in target.decoder.parameters()} for target in (first, second, third)]
    assert pointers[0] < pointers[2] < pointers[1]
    assert first.embedding_VD is second.embedding_VD
    taps, final = second.features(ids_BT)
    assert final is not None and expected.final_BTD is not None
    assert torch.equal(taps, expected.taps_BTC) and torch.equal(final, expected.final_BTD)
    assert torch.equal(first.features(ids_BT).taps_BTC, taps[..., :64])
    assert torch.equal(third.features(ids_BT).taps_BTC[..., 64:], taps[..., :64])
    assert not first._taps and not second._taps and not third._taps


def test_a_step_reads_kept_features_and_computes_windows_of_several_documents(config, monkeypatch, changed):
    built = DrafterRecipe(changed(config, drafter={"features": "memory"}), show_progress=False)
    built.build(one_process())
    computed: list[int] = []
    forward = built.target._forward

    def counted(ids_BT):
        computed.append(len(ids_BT))
        return forward(ids_BT)

    monkeypatch.setattr(built.target, "_forward", counted)
    written = built.windows.written_window(0, 0)
    kept = built.features(written)
    assert not computed
    cut = replace(written, documents_BT=(torch.arange(48) >= 20).long()[None])
    apart = built.features(cut)
    assert sum(computed) == 2  # each document is a row
    torch.testing.assert_close(apart.taps_BTC[:, :20], kept.taps_BTC[:, :20])  # other batches
    assert (apart.taps_BTC[:, 20:] - kept.taps_BTC[:, 20:]).abs().max() > 0.01


def test_final_states_are_what_the_head_reads(recipe, tiny_packed_dir):
    target = FrozenTarget(tiny_packed_dir, torch.device("cpu"))
    target.tap((0,), with_final=True)
    ids = recipe.heldout.ids_NT[:2]
    features = target.features(ids)
    whole = load_model(tiny_packed_dir)
    enable_blockwise_attention(whole, torch.device("cpu"))
    with torch.no_grad():
        logits = whole(ids, use_cache=False).logits
    assert features.taps_BTC.shape[-1] == whole.config.hidden_size and features.final_BTD is not None
    assert torch.equal(features.final_BTD @ target.head_VD(torch.float32).T, logits)


def test_evaluation_serves_the_running_drafter(recipe, config, changed):
    served = DrafterRecipe(changed(config, drafter={"num_served_prompts": 3}), show_progress=False)
    model = served.build(one_process())
    metrics = served.evaluate(model)
    assert {"tau_served", "tau_simulated", "tau_served_t1", "tau_served_at_1", "tau_served_t1_at_3"} <= metrics.keys()
    assert metrics["tau_simulated"] == served.simulate(model).acceptance_length(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # all logits equal: token 0 is proposed, and the engine has to notice
    changed_metrics = served.evaluate(model)
    assert changed_metrics["tau_served"] != metrics["tau_served"] or metrics["tau_served"] == 1.0


def test_the_pruned_vocabulary_is_what_the_target_writes_most(config, changed):
    built = DrafterRecipe(changed(config, drafter={"draft_vocab_size": 20}), show_progress=False)
    model: Any = built.build(one_process())
    counts = torch.bincount(written_ids(built)[:, 12:].flatten(), minlength=built.draft_config.vocab_size)
    chosen = model.target_ids(torch.arange(20))
    assert chosen.unique().numel() == 20
    left = torch.ones_like(counts, dtype=torch.bool)
    left[chosen] = False
    assert counts[chosen].min() >= counts[left].max()


def test_layers_after_the_last_tap_are_not_computed(tiny_packed_dir):
    target = FrozenTarget(tiny_packed_dir, torch.device("cpu"))
    target.tap((1,))
    assert len(target.decoder.layers) == 2
    assert not any(p.requires_grad for p in target.decoder.parameters())


def test_training_end_to_end(config, tiny_packed_dir, changed):
    steps: list[int] = []
    memorise = changed(config, loop={"num_steps": 120}, drafter={"written_fraction": 1.0})
    result = train_drafter(memorise, on_step=lambda done, total, metrics: steps.append(done))
    assert steps[-1] == 120
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    drafter = load_drafter(result.export_path)
    assert drafter.config.target_sha256 == weights_sha256(tiny_packed_dir)
    inputs = {"target": weights_sha256(tiny_packed_dir), "target config": config_sha256(tiny_packed_dir)}
    inputs["corpus"] = corpus_digest(config.data.corpus)
    assert json.loads((result.path / "inputs.json").read_text()) == inputs
    card = json.loads((result.export_path / "card.json").read_text())
    assert card["training"]["steps"] == 120 and card["target"] == str(tiny_packed_dir)
    assert card["acceptance"]["held-out"] == pytest.approx(result.metrics["acceptance_length"], abs=1e-3)

    # Evaluation walks over greedy text instead of decoding. The engine decodes: the same rounds, but that it drafts
    # shorter blocks at the end of a sequence. Nobody can foresee a random target, so the text is the one the drafter
    # has learnt by heart.
    recipe = DrafterRecipe(memorise, show_progress=False)
    recipe.build(one_process())
    assert recipe.written is not None
    recipe.heldout = GreedyText.of_windows(recipe.written.ids_NT, 12)
    with torch.no_grad():
        counted = recipe.evaluate(drafter)["acceptance_length"]
    engine = Engine.from_pretrained(tiny_packed_dir, drafter=result.export_path, device="cpu", max_length=48)
    num_rounds = 0
    for ids in recipe.written.ids_NT.tolist():
        generation = engine.generate(ids[:12], max_new_tokens=36, ignore_eos=True)
        assert generation.tokens == ids[12:]
        num_rounds += generation.stats.num_rounds
    num_sequences = len(recipe.written.ids_NT)
    decoded = 35 * num_sequences / num_rounds
    assert counted is not None and counted > 1.4
    assert counted == pytest.approx(decoded, rel=0.01)
    assert result.metrics["engine_acceptance_length"] == pytest.approx(result.metrics["acceptance_length"], abs=0.05)

    again = train_drafter(memorise, on_step=lambda done, total, metrics: steps.append(done))
    assert again.metrics == result.metrics


EVERY_OPTION = {
    "sample_from_anchor": True,
    "markov_rank": 8,
    "draft_vocab_size": 200,
    "mask_embedding": True,
    "sliding_window": 16,
    "attention_sinks": True,
    "weighting": "dpace",
    "ce_weight": 0.1,
    "kl_weight": 0.2,
    "tv_weight": 0.9,
}


@pytest.mark.parametrize(
    ("features", "options"),
    [("online", {}), ("memory", {}), ("disk", EVERY_OPTION)],
    ids=["plain, online", "plain, memory", "every option, disk"],
)
def test_a_stopped_run_continues_bit_for_bit(config, features, options, tmp_path, monkeypatch, changed):
    class Stop(Exception):
        pass

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 7:
            raise Stop

    forward, num_windows = FrozenTarget._forward, 0

    def counting_forward(self, ids_BT):
        nonlocal num_windows
        num_windows += len(ids_BT)
        return forward(self, ids_BT)

    monkeypatch.setattr(FrozenTarget, "_forward", counting_forward)
    options = {
        "loop": {"num_steps": 10, "save_every": 5},
        "drafter": {"features": features, "features_path": tmp_path / "features", "written_fraction": 1.0, **options},
    }
    whole = train_drafter(changed(config, run={"name": "whole", "out": tmp_path}, **options), on_step=lambda *_: None)
    # 10 steps of 8 windows and one evaluation, against every window once and one evaluation.
    num_evaluated = config.drafter.num_eval_sequences
    num_trained = 80 if features == "online" else config.drafter.num_sequences
    assert num_windows == num_trained + num_evaluated
    broken = changed(config, run={"name": "broken", "out": tmp_path}, **options)
    with pytest.raises(Stop):
        train_drafter(broken, on_step=stop)
    resumed = train_drafter(broken, on_step=lambda *_: None)
    files = [run.export_path / "model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(config, tmp_path, changed, train_by_two):
    options: dict[str, Any] = {
        "loop": {"num_steps": 4, "log_every": 1},
        "optim": {"name": "adamw", "lr": 1e-3},
        "drafter": {
            "written_fraction": 1.0,
            "markov_rank": 8,
            "kl_weight": 1.0,
            "features": "disk",
            "num_served_prompts": 2,
        },
    }
    jobs = {
        name: changed(config, run={"name": name, "out": tmp_path}, distributed={"zero_stage": stage}, **options)
        for name, stage in (("alone", 0), ("zero-0", 0), ("zero-2", 2))
    }
    jobs["zero-3"] = changed(jobs["zero-2"], run={"name": "zero-3"}, drafter={"num_served_prompts": 0})
    jobs["zero-3"] = changed(jobs["zero-3"], distributed={"zero_stage": 3})
    train_drafter(jobs["alone"], on_step=lambda *_: None)
    train_by_two([job for name, job in jobs.items() if name != "alone"], tmp_path)
    lines = {name: [line for line in read_metrics(job.run_directory)] for name, job in jobs.items()}
    assert len(list((tmp_path / "zero-0" / "features").glob("*.safetensors"))) == 1
    for name in ("zero-0", "zero-2", "zero-3"):
        for ours, theirs in zip(lines["alone"], lines[name], strict=True):
            for key in {"loss", "heldout_loss", "grad_norm"} & ours.keys():
                # Sums over windows, in another order.
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5), (name, key)


@pytest.mark.parametrize(("num_layers", "expected"), [(3, (0, 1, 2)), (8, tuple(range(8))), (36, (1, 9, 17, 25, 33))])
def test_layers_tapped_by_default(config, num_layers, expected, changed):
    target = SimpleNamespace(hidden_size=64, num_hidden_layers=num_layers, vocab_size=512, max_position_embeddings=256)
    assert (
        draft_config(changed(config, drafter={"target_layer_ids": []}), target, 2, "sha").target_layer_ids == expected
    )


def test_impossible_drafters_are_one_line(config, tmp_path, changed):
    target = SimpleNamespace(hidden_size=64, num_hidden_layers=3, vocab_size=512, max_position_embeddings=256)
    with pytest.raises(ValueError, match="no mask token"):
        draft_config(config, target, None, "sha")
    with pytest.raises(ValueError, match=r"distinct layers of 0\.\.2"):
        draft_config(changed(config, drafter={"target_layer_ids": [0, 3]}), target, 2, "sha")
    with pytest.raises(ValueError, match="sequence_length 300 exceeds the 256 positions of"):
        draft_config(changed(config, data={"sequence_length": 300}), target, 2, "sha")
    with pytest.raises(ValueError, match="draft_vocab_size 600 must be less than the vocabulary of 512"):
        draft_config(changed(config, drafter={"draft_vocab_size": 600}), target, 2, "sha")
    with pytest.raises(ValueError, match=r"eagle has no drafter\.markov_rank"):
        make_recipe(changed(config, drafter={"architecture": "eagle", "markov_rank": 4}))
    with pytest.raises(ValueError, match=r"eagle has no drafter\.attention_value_scale"):
        make_recipe(changed(config, drafter={"architecture": "eagle", "attention_value_scale": 0.7}))
    with pytest.raises(ValueError, match=r"zero_stage 3 has no .* drafter\.mask_embedding"):
        make_recipe(changed(config, drafter={"mask_embedding": True}, distributed={"zero_stage": 3}))
    with pytest.raises(ValueError, match=r"nowhere"):
        train_drafter(changed(config, run={"name": "x"}, drafter={"target": tmp_path / "nowhere"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of num_key_value_heads"),
        ({"num_sequences": 0}, "needs num_sequences"),
        ({"temperatures": [-1.0]}, "not be negative"),
        ({"prompt_length": 45}, "hold a prompt and a block"),
        ({"ce_weight": 0.0}, "one has to be above"),
        ({"top_p": 0.9}, "top_p is for temperatures above 0"),
        ({"features": "disk", "written_fraction": 0.0}, "kept of written windows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, values, message, changed):
    with pytest.raises(ValueError, match=message):
        changed(config, drafter=values)
