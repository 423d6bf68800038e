"""The drafter recipe on prompts from a file: what conversations in one window see of each other, and whole runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.loss import BlockLoss
from speedstack.eval.results.metrics import read_metrics
from speedstack.eval.results.speed import AcceptanceResult
from speedstack.runtime import Engine
from speedstack.train.config.recipes import DrafterConfig
from speedstack.train.core.distributed import World
from speedstack.train.data import selftext
from speedstack.train.data.packing import PADDING
from speedstack.train.drafter import evaluation, recipe
from speedstack.train.drafter import job as drafter_job
from speedstack.train.drafter.evaluation import GreedyText, simulate
from speedstack.train.drafter.job import train_drafter
from speedstack.train.drafter.recipe import DrafterRecipe
from speedstack.train.drafter.text import write_text
from speedstack.train.drafter.windows import Windows

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUM_ROWS = 24


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, tiny_packed_dir: Path, tiny_tokenizer: Any) -> Path:
    """The tiny model as a chat model that ends its answers: one token in sixteen is an end token."""
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_packed_dir, path)
    tokenizer = type(tiny_tokenizer).from_pretrained(tiny_packed_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    ends = {"eos_token_id": list(range(0, config["vocab_size"], 16))}
    (path / "generation_config.json").write_text(json.dumps(ends))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> DrafterConfig:
    root = tmp_path_factory.mktemp("prompts")
    words = ["while", "return None", "def textwrap(self, text):", "the width of a line"]
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{words[i % 4]} {i}"},
                {"role": "assistant", "content": f" {i} = x"},
            ]
        }
        for i in range(NUM_ROWS)
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DrafterConfig.model_validate(
        {
            "run": {"name": "run", "out": root, "device": "cpu", "precision": "float32"},
            "data": {"corpus": root / "corpus", "sequence_length": 96},
            "optim": {"lr": 0.02, "adamw_lr": 0.005},
            "loop": {"num_steps": 6, "batch_size": 4, "eval_every": 0, "save_every": 3},
            "drafter": {
                "target": chat_model,
                "target_dtype": "float32",
                "target_layer_ids": [0, 2],
                "block_size": 4,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "text": root / "text",
                "prompts": {"source": str(root / "chats.jsonl"), "field": "messages", "heldout_fraction": 0.2},
                "num_eval_sequences": 4,
                "num_served_prompts": 0,
                "prompt_length": 48,
                "num_anchors": 16,
                "written_fraction": 1.0,
            },
        }
    )


def built(config: DrafterConfig) -> tuple[DrafterRecipe, Any]:
    recipe = DrafterRecipe(config, show_progress=False)
    return recipe, recipe.build(World(rank=0, size=1, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def recipe_and_model(config: DrafterConfig) -> tuple[DrafterRecipe, Any]:
    return built(config)


def window_of_several(recipe: DrafterRecipe) -> int:
    assert recipe.written is not None
    return int((recipe.written.documents_NT.amax(1) >= 2).nonzero()[0])


def test_only_answers_are_labels(recipe_and_model, config):
    recipe, _ = recipe_and_model
    tokenizer = Engine.from_pretrained(config.drafter.target, device="cpu", max_length=8).tokenizer
    text, num_documents = recipe.written, 0
    for ids, documents, labels in zip(text.ids_NT, text.documents_NT, text.predictable_NT, strict=True):
        assert not labels[documents == PADDING].any()
        for document in range(int(documents.max()) + 1):
            inside = documents == document
            prompt, answer = ids[inside & ~labels].tolist(), ids[inside & labels].tolist()
            assert inside.nonzero().flatten().diff().eq(1).all()
            assert tokenizer.decode(prompt).startswith("<user>")
            assert tokenizer.decode(prompt).endswith("<|endoftext|><assistant>")
            assert answer and not any(token % 16 == 0 for token in answer[:-1])
            assert answer[-1] % 16 == 0 or len(answer) == 48
            num_documents += 1
    assert num_documents == NUM_ROWS - 4
    assert len(text) < num_documents


def test_a_conversation_in_company_is_the_conversation_alone(recipe_and_model):
    """Features, proposals and loss of each conversation of a packed window are those of it in a window of its own."""
    recipe, model = recipe_and_model
    row = window_of_several(recipe)
    ids_BT, documents_BT, labels_BT = (part[row : row + 1] for part in vars(recipe.written).values())
    together = recipe.target.features(ids_BT, documents_BT).taps_BTC[0]
    assert not together[documents_BT[0] == PADDING].any()
    blended = recipe.target.features(ids_BT).taps_BTC[0]
    with torch.no_grad():
        for document in range(int(documents_BT.max()) + 1):
            place = (documents_BT[0] == document).nonzero().flatten()
            start, end = int(place[0]), int(place[-1]) + 1
            alone_BT = ids_BT[:, start:end]
            alone = recipe.target.features(alone_BT).taps_BTC[0]
            torch.testing.assert_close(together[start:end], alone, rtol=1e-4, atol=1e-4)
            if document:
                assert (blended[start:end] - alone).abs().max() > 0.01  # what seeing the others would do
            anchors_BA = torch.arange(2, end - start - 1)[None]
            real_BA = torch.ones_like(anchors_BA, dtype=torch.bool)
            zeros_BT = torch.zeros_like(alone_BT)
            expected, valid = recipe.blocks_loss(
                model, Windows(alone_BT, zeros_BT, labels_BT[:, start:end], anchors_BA, real_BA)
            )
            found, same = recipe.blocks_loss(
                model, Windows(ids_BT, documents_BT, labels_BT, anchors_BA + start, real_BA)
            )
            assert valid.any() and torch.equal(valid, same)
            assert torch.equal(expected.correct_AJ, found.correct_AJ)
            # A rotary embedding knows differences of positions alone, up to float32's rounding of the angles.
            torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["memory", "disk"])
def test_kept_features_are_those_computed_in_a_step(recipe_and_model, config, features, tmp_path, changed):
    recipe, _ = recipe_and_model
    kept, _ = built(changed(config, drafter={"features": features, "features_path": tmp_path / "features"}))
    text = recipe.written
    row = window_of_several(recipe)
    expected = recipe.target.features(text.ids_NT[row : row + 1], text.documents_NT[row : row + 1]).taps_BTC
    found = kept.target.features(text.ids_NT[row : row + 1], text.documents_NT[row : row + 1]).taps_BTC
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_training_end_to_end(config, tmp_path, changed):
    class Stop(Exception):
        pass

    def stop(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == 4:
            raise Stop

    options: dict[str, Any] = {"drafter": {"num_served_prompts": 2}}
    whole = train_drafter(changed(config, run={"name": "whole", "out": tmp_path}, **options), on_step=lambda *_: None)
    broken = changed(config, run={"name": "broken", "out": tmp_path}, **options)
    with pytest.raises(Stop):
        train_drafter(broken, on_step=stop)
    resumed = train_drafter(broken, on_step=lambda *_: None)
    files = [run.export_path / "model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {"tau_served", "tau_served_t1", "tau_simulated"} <= whole.metrics.keys()
    assert not config.data.corpus.exists()  # nothing of it was needed
    assert json.loads((whole.path / "inputs.json").read_text()).keys() == {"target", "target config"}
    card = json.loads((whole.export_path / "card.json").read_text())
    assert "20 prompts of" in card["data"] and "4 held-out prompts of the same source" in card["data"]
    # The engine decoded the very answers that simulation walked over: up to the end token, not past it.
    measured = AcceptanceResult.model_validate_json((whole.path / "acceptance.json").read_text())
    recipe, _ = built(config)
    text = recipe.heldout
    num_new = [length - prompt for length, prompt in zip(text.lengths, text.prompt_lengths, strict=True)]
    assert len(set(num_new)) > 1
    assert measured.overall.num_committed == sum(num_new) - len(num_new)  # the prefill makes the first token
    assert whole.metrics["acceptance_length"] == pytest.approx(measured.overall.acceptance_length)  # the same rounds


def test_simulation_of_unequal_answers_is_that_of_each_alone(recipe_and_model, monkeypatch):
    """Prompts and answers of any lengths, many anchors of which are no anchors of the sequence beside them."""
    recipe, _ = recipe_and_model
    ids_NT = recipe.heldout.ids_NT[:1].repeat(6, 1)
    prompt_lengths, lengths = [3, 20, 40, 10, 30, 50], [12, 60, 41, 11, 32, 52]

    def blocks_loss(windows: Windows) -> tuple[BlockLoss, torch.Tensor]:
        """Proposals that are right for as many tokens as the anchor's place, modulo 4, within the text."""
        assert windows.real_BA.any()
        ahead_J = torch.arange(1, 4)
        place_BAJ = windows.anchors_BA[..., None] + ahead_J
        inside_BAJ = place_BAJ < windows.predictable_BT.sum(1)[:, None, None]
        correct_BAJ = inside_BAJ & (ahead_J <= windows.anchors_BA[..., None] % 4) & windows.real_BA[..., None]
        mean = (windows.anchors_BA * windows.real_BA).sum() / windows.real_BA.sum()
        return BlockLoss(mean, correct_BAJ.flatten(0, 1), torch.zeros(0)), correct_BAJ

    monkeypatch.setattr(evaluation, "_ANCHORS_AT_ONCE", 8)
    together = simulate(GreedyText(ids_NT, prompt_lengths, lengths), blocks_loss)
    anchors: list[int] = []
    for row, (start, end) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        rounds, anchor = [], start
        while anchor < end - 1:
            rounds.append(min(anchor % 4 + 1, end - 1 - anchor))
            anchor += rounds[-1]
        assert together.rounds[row] == rounds and sum(rounds) == end - start - 1
        anchors += range(start, end - 1)
    assert together.loss == pytest.approx(sum(anchors) / len(anchors))
    with pytest.raises(ValueError, match="no held-out answer has 2 tokens"):
        simulate(GreedyText(ids_NT[2:4], [40, 10], [41, 11]), blocks_loss)
    with pytest.raises(ValueError, match="of the first 1 has 2 tokens"):
        simulate(GreedyText(ids_NT[2:5], [40, 10, 30], [41, 11, 32]), blocks_loss).acceptance_length(1)


def test_given_answers_train_without_a_word_of_the_targets(config, tmp_path, changed):
    prompts = config.drafter.prompts.model_dump() | {"responses": "given"}
    given = changed(config, drafter={"prompts": prompts, "text": tmp_path / "text"})
    recipe, _ = built(given)
    assert not (tmp_path / "text" / "train").exists() and (tmp_path / "text" / "heldout").exists()
    text = recipe.written
    assert text is not None
    tokenizer = Engine.from_pretrained(config.drafter.target, device="cpu", max_length=8).tokenizer
    answers = tokenizer.decode(text.ids_NT[text.predictable_NT].tolist()).split("<|endoftext|>")
    assert set(answers[:-1]) <= {f" {i} = x" for i in range(NUM_ROWS)} and len(answers) == NUM_ROWS - 3
    facts = json.loads((tmp_path / "text" / "prompts" / "prompts.json").read_text())
    assert len(facts["train_sha256"]) == len(facts["source_sha256"]) == 64


def test_an_interrupted_generation_loses_nothing(config, tmp_path, monkeypatch, changed):
    monkeypatch.setattr(selftext, "SEQUENCES_A_SHARD", 8)
    apart = changed(config, drafter={"text": tmp_path / "text", "temperatures": [0.8]})
    generate, num_calls = Engine.generate, 0

    def interrupted(self, *args, **kwargs):
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(apart)
    shards = sorted((tmp_path / "text").rglob("shard-*.safetensors"))
    assert len(shards) == 2
    written = {shard: shard.stat().st_mtime_ns for shard in shards}
    num_calls = 10
    counts: list[tuple[int, int]] = []
    write_text(apart, on_progress=lambda done, total: counts.append((done, total)))
    assert num_calls == 12 and counts[-1] == (24, 24)
    assert written == {shard: shard.stat().st_mtime_ns for shard in shards}
    whole = changed(apart, drafter={"text": tmp_path / "whole"})
    write_text(whole)
    for shard in (tmp_path / "whole").rglob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "text" / shard.relative_to(tmp_path / "whole")).read_bytes()


def test_text_of_another_temperature_or_template_is_refused(recipe_and_model, config, tmp_path, changed):
    with pytest.raises(ValueError, match="generated with another temperatures: choose another"):
        built(changed(config, drafter={"temperatures": [0.5]}))
    with pytest.raises(ValueError, match="generated with another temperatures, top_p"):
        built(changed(config, drafter={"top_p": 0.5, "temperatures": [0.5]}))
    model = tmp_path / "model"
    shutil.copytree(config.drafter.target, model)
    # The same weights, whose texts end elsewhere.
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    with pytest.raises(ValueError, match="generated with another target_sha256"):
        built(changed(config, drafter={"target": model}))
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("<assistant>", "<model>"))
    with pytest.raises(ValueError, match="made with another chat_template_sha256"):
        built(changed(config, drafter={"target": model}))


def ending_at(config: DrafterConfig, path: Path, ends: Any, changed: Any, **drafter: Any) -> DrafterConfig:
    """The job in `path`, for the same model with other end tokens: what is in `ends` of its vocabulary."""
    shutil.copytree(config.drafter.target, path / "model")
    vocab_size = json.loads((path / "model" / "config.json").read_text())["vocab_size"]
    (path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": ends(range(vocab_size))}))
    options = {"target": path / "model", "text": None, "num_eval_sequences": 8, "num_sequences": 12, **drafter}
    prompts = config.drafter.prompts.model_dump() | {"heldout_fraction": 0.4}
    return changed(
        config,
        run={"out": path},
        loop={"num_steps": 2, "eval_every": 1, "save_every": 0},
        drafter={"prompts": prompts} | options,
    )


def test_answers_of_one_token_are_left_out_of_what_is_measured(config, tmp_path, changed):
    short = ending_at(config, tmp_path, lambda ids: list(ids[::2]), changed, num_served_prompts=3)
    with pytest.warns(UserWarning, match=r"\d of 8 held-out answers have less than 2 tokens, so that .* on the others"):
        result = train_drafter(short, on_step=lambda *_: None)
    lines = read_metrics(result.path)
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [0, 1, 2]
    assert {"tau_served", "tau_served_t1_at_3", "engine_acceptance_length"} <= result.metrics.keys()
    assert result.metrics["acceptance_length"] == pytest.approx(result.metrics["engine_acceptance_length"])
    card = json.loads((result.export_path / "card.json").read_text())
    num_measured = int(card["measured"].split()[1])
    assert 0 < num_measured < 8


def test_nothing_to_measure_is_a_drafter_all_the_same(config, tmp_path, changed):
    """Every answer is an end token; the text to train on is given."""
    given = {"prompts": config.drafter.prompts.model_dump() | {"responses": "given"}}
    mute = ending_at(config, tmp_path, list, changed, num_served_prompts=2, **given)
    with pytest.warns(UserWarning) as caught:
        result = train_drafter(mute, on_step=lambda *_: None)
    said = "\n".join(str(warning.message) for warning in caught)
    assert (
        "held-out answers have less than 2 tokens, so that nothing is drafted there: acceptance is not measured" in said
    )
    assert f"the drafter is at {result.export_path}; its acceptance is not measured: no decode round ran" in said
    assert result.metrics == {} and (result.export_path / "model.safetensors").is_file()
    card = json.loads((result.export_path / "card.json").read_text())
    assert "acceptance" not in card and "measured" not in card
    # Later, the same command with a setting that only measures has the same drafter.
    with pytest.warns(UserWarning, match="num_served_prompts was 2, is 0"):
        assert train_drafter(changed(mute, drafter={"num_served_prompts": 0})).export_path == result.export_path


def test_text_that_trains_nothing_is_refused(config, tmp_path, changed):
    mute = ending_at(config, tmp_path, list, changed)
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"prompt": [i + 3]}) + "\n" for i in range(20)))
    with pytest.raises(ValueError, match="no block fits into the training text"):
        train_drafter(changed(mute, drafter={"prompts": {"source": str(tmp_path / "ids.jsonl")}}))


def test_serving_that_fails_in_training_is_said_and_no_more(config, tmp_path, monkeypatch, changed):
    def measure(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    for module in (recipe, drafter_job):
        monkeypatch.setattr(module, "measure_acceptance", measure)
    job = changed(config, run={"out": tmp_path}, loop={"num_steps": 1}, drafter={"num_served_prompts": 1})
    with pytest.warns(UserWarning, match="tau_served_t1 is not measured: no room"):
        result = train_drafter(job, on_step=lambda *_: None)
    assert "tau_simulated" in result.metrics and "tau_served" not in result.metrics
    assert result.export_path.is_dir() and not (result.path / "acceptance.json").exists()


def test_a_job_that_did_not_train_leaves_its_text_to_the_next(config, tmp_path, monkeypatch, changed):
    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    options = {"text": None, "features": "disk", "num_sequences": 6, "num_eval_sequences": 2}
    job = changed(config, run={"out": tmp_path}, loop={"num_steps": 1}, drafter=options)
    with pytest.raises(Stop):
        train_drafter(job, on_step=stop)
    text = tmp_path / "run" / "text"
    prompts, shard = text / "prompts" / "prompts.json", text / "train" / "shard-00000.safetensors"
    written = shard.stat().st_mtime_ns
    # What text does not depend on: it is used. Other temperatures: it is set aside, and so are its features.
    with pytest.raises(Stop):
        train_drafter(changed(job, optim={"lr": 0.01}), on_step=stop)
    assert shard.stat().st_mtime_ns == written
    repaired = changed(job, drafter={"temperatures": [0.7], "num_served_prompts": 1})
    with pytest.warns(UserWarning) as caught:
        result = train_drafter(repaired, on_step=lambda *_: None)
    moved = [str(warning.message) for warning in caught if "moved to" in str(warning.message)]
    assert [message.split(" holds ")[0] for message in moved] == [
        str(text / "train"),
        str(tmp_path / "run" / "features"),
    ]
    assert (text / "train-1" / shard.name).stat().st_mtime_ns == written
    assert result.export_path.is_dir() and not (text / "prompts-1").exists() and prompts.is_file()
    # Once it has trained, the run is bound to its text.
    with pytest.raises(ValueError, match=r"another configuration .drafter\.prompt_length was 48, is 40"):
        train_drafter(changed(repaired, drafter={"prompt_length": 40}), on_step=stop)


def test_other_prompts_are_made_where_nothing_was_trained(config, tmp_path, changed):
    job = changed(config, run={"out": tmp_path}, drafter={"text": None})
    write_text(job)
    (tmp_path / "run" / "text" / "train" / "shard-00000.safetensors").unlink()
    with pytest.warns(UserWarning, match="prompts holds prompts of another configuration, which has not trained"):
        write_text(changed(job, drafter={"prompt_length": 44}))
    names = {place.name for place in (tmp_path / "run" / "text").iterdir()}
    assert names == {"prompts", "prompts-1", "heldout", "heldout-1", "train"}  # of train there was no text


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_the_prompts_and_train_as_one_does(config, tmp_path, changed, train_by_two):
    alone, pair = (
        changed(
            config,
            run={"name": name, "out": tmp_path},
            loop={"num_steps": 2, "log_every": 1},
            optim={"name": "adamw", "lr": 1e-3},
            drafter={"num_served_prompts": 2, "text": tmp_path / f"{name}-text"},
        )
        for name in ("alone", "pair")
    )
    train_drafter(alone, on_step=lambda *_: None)
    train_by_two([pair], tmp_path)
    prompts = [(run.drafter.text / "prompts" / "prompts.json").read_bytes() for run in (alone, pair)]
    assert prompts[0] == prompts[1]
    texts = [built(run)[0] for run in (alone, pair)]
    assert texts[0].written is not None and texts[1].written is not None
    assert torch.equal(texts[0].written.ids_NT, texts[1].written.ids_NT)
    assert torch.equal(texts[0].heldout.ids_NT, texts[1].heldout.ids_NT)
    lines = [read_metrics(run.run_directory) for run in (alone, pair)]
    for ours, theirs in zip(*lines, strict=True):
        for key in {"loss", "heldout_loss", "grad_norm"} & ours.keys():
            # A process divides by the weights of its own windows, which hold unequally many answers: not by all.
            assert theirs[key] == pytest.approx(ours[key], rel=0.05), key
    assert (pair.run_directory / "acceptance.json").is_file()
