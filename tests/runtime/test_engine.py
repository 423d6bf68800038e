"""The engine's promises: transformers' tokens, the same text with and without drafts, clear refusals."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.accept import survival, walk_rounds
from speedstack.dflash.checkpoint import load_drafter, save_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.propose import Draft
from speedstack.eval.speed.acceptance import summarize
from speedstack.quant.checkpoint import load_model, weights_sha256
from speedstack.runtime import Engine
from speedstack.runtime.backends.base import DraftRequest
from speedstack.runtime.backends.cpu.backend import CpuBackend
from speedstack.runtime.backends.cpu.drafter import CompiledDrafter

NUM_NEW = 60
PROMPTS = [[10, 20, 30, 40], [7], list(range(100, 190)), [400, 3, 99, 12, 12, 12, 5]]
SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 50}]


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain(backend: str, tiny_packed_dir: Path) -> Engine:
    return Engine.from_pretrained(tiny_packed_dir, backend=backend)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def drafting(backend: str, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path) -> Engine:
    # All of them, whatever they cost here: what rounds do is what is tested.
    return Engine.from_pretrained(tiny_packed_dir, tiny_packed_drafter_dir, backend=backend, num_drafts="all")  # type: ignore[arg-type]


def propose(engine: Engine, texts: Sequence[Sequence[int]], num_right: Callable[[int], int]) -> Any:
    """A `draft` that knows the right continuations and proposes `num_right(position)` of them, then wrong tokens."""

    def draft(requests: Sequence[DraftRequest], num_drafts: int) -> list[Draft]:
        drafts = []
        for request in requests:
            position = request.position
            text = next(t for t in texts if len(t) > position and t[position] == request.anchor)
            right = list(text[position + 1 : position + 8])
            right += [0] * (7 - len(right))
            cut = num_right(position)
            wrong = [(token + 1) % engine.vocab_size for token in right[cut:]]
            probabilities = [0.95] * cut + [0.005] * (7 - cut)
            drafts.append(Draft((right[:cut] + wrong)[:num_drafts], probabilities[:num_drafts]))
        return drafts

    return draft


def test_greedy_equals_transformers_generate(plain: Engine, tiny_packed_dir: Path) -> None:
    model: Any = load_model(tiny_packed_dir)
    for prompt in PROMPTS:
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=1
            )[0, len(prompt) :]
        assert plain.generate(prompt, max_new_tokens=NUM_NEW, ignore_eos=True).tokens == expected.tolist()


@pytest.mark.parametrize("sampling", SAMPLING, ids=["greedy", "temperature-1", "top-p-top-k"])
def test_text_is_equal_with_and_without_drafter_alone_and_batched(
    plain: Engine, drafting: Engine, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(max_new_tokens=NUM_NEW, seed=11, ignore_eos=True) | sampling
    expected = [plain.generate(prompt, **options).tokens for prompt in PROMPTS]
    assert [g.tokens for g in plain.generate(PROMPTS, **options)] == expected
    # A random drafter is nearly always wrong; then one that is right for a varying number of proposals.
    assert [g.tokens for g in drafting.generate(PROMPTS, **options)] == expected
    texts = [prompt + tokens for prompt, tokens in zip(PROMPTS, expected, strict=True)]
    for num_right in (lambda position: 7, lambda position: 0, lambda position: position % 8):
        monkeypatch.setattr(drafting.backend, "draft", propose(drafting, texts, num_right))
        assert [drafting.generate(prompt, **options).tokens for prompt in PROMPTS] == expected
        together = drafting.generate(PROMPTS, **options)
        assert [g.tokens for g in together] == expected
        if num_right(1) == 7:
            assert all(g.stats.acceptance_length > 7 for g in together)
        elif num_right(1) == 0:
            assert all(g.stats.acceptance_length == 1.0 for g in together)


def test_statistics_count_rounds_and_positions(
    plain: Engine, drafting: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = plain.generate(PROMPTS[0], max_new_tokens=21, ignore_eos=True).tokens
    monkeypatch.setattr(drafting.backend, "draft", propose(drafting, [PROMPTS[0] + tokens], lambda position: 3))
    stats = drafting.generate(PROMPTS[0], max_new_tokens=21, ignore_eos=True).stats
    # One token from the prompt's own pass, then five rounds of three accepted drafts and a bonus
    assert (stats.num_rounds, stats.num_round_tokens, stats.num_new_tokens) == (5, 20, 21)
    assert stats.acceptance_length == 4.0
    assert stats.accepted_by_position == [5, 5, 5, 0, 0, 0, 0]
    # The last round may add four tokens only, so it verifies three drafts.
    assert stats.drafted_by_position == [5, 5, 5, 4, 4, 4, 4]
    assert stats.num_prompt_tokens == 4


def test_more_prompts_than_slots_are_decoded_in_turn(plain: Engine, tiny_packed_dir: Path) -> None:
    narrow = Engine.from_pretrained(tiny_packed_dir, backend=plain.backend_name, max_batch_size=2)  # type: ignore[arg-type]
    prompts = [[token] for token in range(5, 12)]
    lengths = [g.tokens for g in narrow.generate(prompts, max_new_tokens=9, ignore_eos=True)]
    assert lengths == [plain.generate(p, max_new_tokens=9, ignore_eos=True).tokens for p in prompts]


def test_end_of_sequence_inside_a_block(plain: Engine, drafting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = plain.generate(PROMPTS[0], max_new_tokens=30, ignore_eos=True).tokens
    eos = tokens[12]
    first = tokens.index(eos)
    for engine in (plain, drafting):
        monkeypatch.setattr(engine, "spec", engine.spec.__class__(**{**vars(engine.spec), "eos_token_ids": (eos,)}))
    monkeypatch.setattr(drafting.backend, "draft", propose(drafting, [PROMPTS[0] + tokens], lambda position: 7))
    for engine in (plain, drafting):
        result = engine.generate(PROMPTS[0], max_new_tokens=30)
        assert (result.finish_reason, result.tokens) == ("eos", tokens[: first + 1])
        assert result.stats.num_round_tokens == first  # the prompt's own pass yields one token more


@pytest.mark.parametrize("ends_by", ["eos", "stop", "length"])
def test_acceptance_is_the_simulations_and_adds_up_where_a_text_ends_inside_a_block(
    plain: Engine, drafting: Engine, monkeypatch: pytest.MonkeyPatch, ends_by: str
) -> None:
    prompt = PROMPTS[3]
    tokens = plain.generate(prompt, max_new_tokens=40, ignore_eos=True).tokens
    options: dict[str, Any] = {"max_new_tokens": 19 if ends_by == "length" else 40}
    if ends_by == "eos":
        for engine in (plain, drafting):
            spec = engine.spec.__class__(**{**vars(engine.spec), "eos_token_ids": (tokens[18], tokens[23])})
            monkeypatch.setattr(engine, "spec", spec)
    elif ends_by == "stop":
        text = plain.tokenizer.decode(tokens[:21])
        options["stop"] = [text[-3:]]

    def num_right(position: int) -> int:
        return (7 * position + 4) % 8

    # The drafter goes on with the right tokens behind the end.
    monkeypatch.setattr(drafting.backend, "draft", propose(drafting, [prompt + tokens], num_right))
    found = drafting.generate(prompt, **options)
    assert found.tokens == plain.generate(prompt, **options).tokens and found.finish_reason == ends_by
    rounds = walk_rounds([num_right(len(prompt) + i) for i in range(len(found.tokens) - 1)])
    assert rounds[-1] < 1 + num_right(len(prompt) + len(found.tokens) - 1 - rounds[-1]), "ends inside a block"
    stats = found.stats
    assert (stats.num_rounds, stats.num_round_tokens) == (len(rounds), sum(rounds))
    assert stats.num_rounds + sum(stats.accepted_by_position) == stats.num_round_tokens
    measured = summarize("set", [found])
    assert measured.survival == tuple(survival([rounds], 7))
    assert 1 + sum(measured.survival) == pytest.approx(measured.acceptance_length)


def test_seeds_are_per_prompt_and_reproducible(plain: Engine) -> None:
    options: dict[str, Any] = dict(max_new_tokens=20, temperature=1.0, ignore_eos=True)
    a, b, c = plain.generate([PROMPTS[0]] * 3, seed=[1, 2, 1], **options)
    assert a.tokens == c.tokens != b.tokens
    assert plain.generate(PROMPTS[0], seed=2, **options).tokens == b.tokens


def test_stop_strings_cut_the_text(plain: Engine) -> None:
    free = plain.generate(PROMPTS[3], max_new_tokens=40, ignore_eos=True)
    stop = free.text[10:13]
    result = plain.generate(PROMPTS[3], max_new_tokens=40, ignore_eos=True, stop=[stop, "never in there"])
    assert result.finish_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)]
    assert result.tokens == free.tokens[: len(result.tokens)] and len(result.tokens) < 40


def test_stream_yields_the_text_of_generate(plain: Engine) -> None:
    expected = plain.generate("def f(x):", max_new_tokens=40, ignore_eos=True)
    pieces = list(plain.stream("def f(x):", max_new_tokens=40, ignore_eos=True))
    assert "".join(pieces) == expected.text and len(pieces) > 5
    stop = expected.text[8:10]
    stopped = plain.generate("def f(x):", max_new_tokens=40, ignore_eos=True, stop=stop).text
    assert "".join(plain.stream("def f(x):", max_new_tokens=40, ignore_eos=True, stop=stop)) == stopped


def test_score_is_the_log_softmax_of_the_logits(plain: Engine, tiny_packed_dir: Path) -> None:
    ids = PROMPTS[2]
    score = plain.score(ids)
    logits_TV = plain.logits(ids)
    expected = torch.log_softmax(logits_TV[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    # log_softmax of chunks of 64 rows and of 90: torch may vectorize the last rows of each differently
    torch.testing.assert_close(score.logprobs, expected, rtol=1e-6, atol=1e-6)
    assert score.is_greedy.tolist() == (logits_TV[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
    several = plain.score([ids, PROMPTS[0]])
    assert torch.equal(several[0].logprobs, score.logprobs) and len(several[1].logprobs) == 3


def test_generated_tokens_score_as_greedy(plain: Engine) -> None:
    generated = plain.generate(PROMPTS[0], max_new_tokens=30, ignore_eos=True).tokens
    assert bool(plain.score(PROMPTS[0] + generated).is_greedy[len(PROMPTS[0]) - 1 :].all())


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[]], {}, "empty"),
        ("", {}, "empty"),
        ([1, 512], {}, "512 is outside the vocabulary of 512"),
        ([-1], {}, "-1 is outside"),
        ([5] * 250, {"max_new_tokens": 10}, "do not fit the buffers of 256"),
        ([5] * 300, {}, "300 tokens do not fit"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens"),
        ([5], {"temperature": -1.0}, "temperature"),
        ([5], {"stop": ""}, "stop strings"),
        ([[5], [6]], {"seed": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_bad_input_is_refused_in_one_line(plain: Engine, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        plain.generate(prompt, **({"max_new_tokens": 8} | options))
    assert "\n" not in str(error.value)


def test_loading_refuses_what_does_not_fit(
    tiny_packed_dir: Path, tiny_model_dir: Path, tiny_drafter_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="target"):
        Engine.from_pretrained(tiny_packed_dir, tiny_drafter_dir)
    with pytest.raises(ValueError, match="nowhere"):
        Engine.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="float32 on the CPU"):
        Engine.from_pretrained(tiny_model_dir, backend="cpu", dtype="bfloat16", device="cpu")
    for option in (
        {"backend": "gpu"},
        {"device": "tpu"},
        {"dtype": "float8"},
        {"max_length": 10**6},
        {"num_drafts": 3},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(option.values()))}"):
            Engine.from_pretrained(tiny_model_dir, **option)  # type: ignore[arg-type]


def test_a_drafter_in_memory_serves_as_the_same_on_disk(
    backend: str, plain: Engine, drafting: Engine, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    expected = drafting.generate(PROMPTS, **options)
    model = load_drafter(tiny_packed_drafter_dir).train()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = Engine.from_pretrained(tiny_packed_dir, model, backend=backend)  # type: ignore[arg-type]
    for _ in range(2):
        found = engine.generate(PROMPTS, **options)
        assert [g.tokens for g in found] == [g.tokens for g in expected]
        assert [g.stats.num_rounds for g in found] == [g.stats.num_rounds for g in expected]
        # Training goes on with the module: the engine has a copy.
        with torch.no_grad():
            model.norm.weight.fill_(float("nan"))
    assert model.training and all(p.requires_grad for p in model.parameters())
    model.load_state_dict(kept)
    plain_engine = Engine.from_pretrained(tiny_packed_dir, backend=backend)  # type: ignore[arg-type]
    plain_engine.set_drafter(model)
    assert plain_engine.num_drafts == 7
    assert [g.stats.num_rounds for g in plain_engine.generate(PROMPTS, **options)] == [
        g.stats.num_rounds for g in expected
    ]
    plain_engine.set_drafter(None)
    assert plain_engine.generate(PROMPTS[0], **options).stats.num_rounds == 29


def test_a_mask_embedding_in_a_file_of_its_own_is_a_weight(
    tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, tmp_path: Path
) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, tiny_packed_drafter_dir, backend="reference")
    assert engine.drafter_sha256 == weights_sha256(tiny_packed_drafter_dir)
    plain = load_drafter(tiny_packed_drafter_dir)
    model = DFlashDraftModel(replace(plain.config, mask_embedding=True))
    model.load_state_dict(plain.state_dict() | {"mask_embedding": torch.zeros(plain.config.hidden_size)})
    digests = set()
    for value in (0.0, 0.5, 0.0):
        model.mask_embedding.data.fill_(value)  # type: ignore[union-attr]
        save_drafter(model, tmp_path / "drafter", to="mimo")
        engine.set_drafter(tmp_path / "drafter")
        digests.add(engine.drafter_sha256)
    assert len(digests) == 2 and weights_sha256(tmp_path / "drafter") not in digests


def test_set_drafter_refuses_what_does_not_fit(
    plain: Engine, drafting: Engine, tiny_drafter_dir: Path, tiny_packed_drafter_dir: Path
) -> None:
    with pytest.raises(ValueError, match="drafter of another target"):
        plain.set_drafter(load_drafter(tiny_drafter_dir))
    assert plain.num_drafts == 0
    stream = drafting.stream("def f(x):", max_new_tokens=20, ignore_eos=True)
    next(stream)
    with pytest.raises(ValueError, match="decoding already"):
        drafting.set_drafter(load_drafter(tiny_packed_drafter_dir))
    stream.close()


def test_bfloat16_runs_on_the_reference_backend(tiny_packed_dir: Path, tiny_packed_drafter_dir: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "backend": "reference"}
    plain = Engine.from_pretrained(tiny_packed_dir, **options)
    drafting = Engine.from_pretrained(tiny_packed_dir, tiny_packed_drafter_dir, **options)
    prompts = PROMPTS[:2]
    expected = [plain.generate(p, max_new_tokens=16, ignore_eos=True).tokens for p in prompts]
    assert [g.tokens for g in drafting.generate(prompts, max_new_tokens=16, ignore_eos=True)] == expected


def test_memory_is_what_the_backend_holds(tiny_packed_dir: Path, tiny_packed_drafter_dir: Path) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, tiny_packed_drafter_dir, backend="cpu")
    assert isinstance(engine.backend, CpuBackend)
    drafter = engine.backend.drafter
    assert isinstance(drafter, CompiledDrafter)
    programs = [engine.backend._target, drafter.context, drafter._block]
    held = {t.data_ptr(): t.nbytes for program in programs for t in program.kept if t.dim() > 2}
    buffers = {cache.data_ptr() for cache in [*engine.backend._caches, *drafter._caches]}
    embedding = engine.backend._embedding_VD.nbytes
    weights = sum(size for pointer, size in held.items() if pointer not in buffers) + embedding
    assert sum(engine.memory_bytes().values()) == weights + engine.backend.cache_bytes()


def test_a_call_during_a_stream_is_refused(plain: Engine) -> None:
    expected = plain.generate("def f(x):", max_new_tokens=20, ignore_eos=True).text
    stream = plain.stream("def f(x):", max_new_tokens=20, ignore_eos=True)
    first = next(stream)
    for disturb in (lambda: plain.score([1, 2, 3]), lambda: plain.generate([5], max_new_tokens=2)):
        with pytest.raises(ValueError, match="decoding already"):
            disturb()
    assert first + "".join(stream) == expected
    next(plain.stream("def f(x):", max_new_tokens=20, ignore_eos=True))  # dropped half read
    assert plain.generate("def f(x):", max_new_tokens=20, ignore_eos=True).text == expected


def test_text_is_equal_with_a_drafter_of_nan(
    backend: str, plain: Engine, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path
) -> None:
    drafter = load_drafter(tiny_packed_drafter_dir)
    with torch.no_grad():
        drafter.norm.weight.fill_(float("nan"))
    broken = Engine.from_pretrained(tiny_packed_dir, drafter, backend=backend)  # type: ignore[arg-type]
    expected = plain.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True).tokens
    assert broken.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True).tokens == expected


def test_blocks_larger_than_a_step_are_refused(
    tiny_packed_dir: Path, tmp_path: Path, make_tiny_drafter: Callable[..., Path]
) -> None:
    path = make_tiny_drafter(tmp_path / "wide", tiny_packed_dir)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"block_size": 65}))
    with pytest.raises(ValueError, match="num_drafts 64 is more than the 63"):
        Engine.from_pretrained(tiny_packed_dir, path)
    options: dict[str, Any] = {"max_new_tokens": 30, "ignore_eos": True}
    expected = Engine.from_pretrained(tiny_packed_dir).generate(PROMPTS[2], **options).tokens
    assert (
        Engine.from_pretrained(tiny_packed_dir, path, num_drafts=63).generate(PROMPTS[2], **options).tokens == expected
    )


def test_ids_must_be_integers(plain: Engine) -> None:
    import numpy as np

    assert len(plain.score([5, np.int64(6), 7]).logprobs) == 2  # type: ignore[arg-type, list-item]
    assert len(plain.score([[5, 6, 7], (8, 9, 10)])) == 2  # type: ignore[arg-type, list-item]
    with pytest.raises(ValueError, match="integer token ids"):
        plain.score([5, 3.7, 7])  # type: ignore[arg-type, list-item]


def test_auto_falls_back_and_says_why(
    tiny_packed_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: Any) -> None:
        raise ValueError("there is no compiler today")

    monkeypatch.setattr("speedstack.runtime.backends.select.CpuBackend", refuse)
    assert Engine.from_pretrained(tiny_packed_dir, device="cpu").backend_name == "reference"
    assert "there is no compiler today" in caplog.text


def test_text_is_equal_with_adaptive_drafts(
    plain: Engine, tiny_packed_dir: Path, tiny_packed_drafter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = Engine.from_pretrained(
        tiny_packed_dir,
        tiny_packed_drafter_dir,
        backend=plain.backend_name,  # type: ignore[arg-type]
        num_drafts="adaptive",
    )
    tokens = plain.generate(PROMPTS[0], max_new_tokens=81, ignore_eos=True).tokens
    for num_right, least, most in ((7, 6.5, 8.0), (3, 3.5, 4.0), (0, 1.0, 1.0)):
        propose_some = propose(adaptive, [PROMPTS[0] + tokens], lambda position, count=num_right: count)  # type: ignore[misc]
        monkeypatch.setattr(adaptive.backend, "draft", propose_some)
        result = adaptive.generate(PROMPTS[0], max_new_tokens=81, ignore_eos=True)
        assert result.tokens == tokens
        assert least <= result.stats.acceptance_length <= most
        # Proposals that the drafter itself does not believe in cost no row.
        assert sum(result.stats.drafted_by_position[num_right:]) == 0
