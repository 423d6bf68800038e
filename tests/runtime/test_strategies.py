"""However tokens are proposed, the text is the target's own; and what is proposed is what the option says."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from speedstack.dflash.checkpoint import load_drafter
from speedstack.dflash.model import DFlashDraftModel
from speedstack.dflash.tree import Draft
from speedstack.quant.checkpoint import load_checkpoint
from speedstack.runtime import Engine
from speedstack.runtime.assemble import Assembler, Buffers
from speedstack.runtime.backend import DraftRequest, Rows
from speedstack.runtime.budget import PYTORCH_BESIDE_COMPILED
from speedstack.runtime.compiled_drafter import CompiledDrafter
from speedstack.runtime.cpu import CpuBackend
from speedstack.runtime.module_drafter import ModuleDrafter, draft_scores
from speedstack.runtime.panels import panels
from speedstack.runtime.program import Program, Runner, records_of
from speedstack.runtime.reference import ReferenceBackend
from speedstack.runtime.sampling import NoiseTable, SamplingParams, sample
from speedstack.runtime.spec import AttentionSpec, DenseSpec, LayerSpec, spec_from_config
from speedstack.runtime.strategy import DraftStrategy
from speedstack.runtime.weights import ModelWeights, plain_matrix, read_weights

NUM_NEW = 16
PROMPTS = [[10, 20, 30, 40], list(range(100, 170)), [400, 3, 99, 12, 12, 12, 5]]
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p and top-k": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
}
WINDOWS: dict[str, Any] = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 12}
MIMO: dict[str, Any] = {
    "layer_types": ("sliding_attention", "sliding_attention"),
    "sliding_window": 12,
    "sliding_is_causal": False,
    "attention_sinks": True,
    "attention_value_scale": 0.7,
    "partial_rotary_factor": 0.5,
    "mask_embedding": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anchor slot": {"sample_from_anchor": True},
    "Markov head": {"markov_rank": 8},
    "pruned vocabulary": {"draft_vocab_size": 200},
    "causal windows": WINDOWS,
    "MiMo": MIMO,
    # Windows narrower than a block, an odd rank
    "everything": MIMO | {"sliding_window": 4, "sample_from_anchor": True, "markov_rank": 7, "draft_vocab_size": 200},
}
MakeDrafter = Callable[..., DFlashDraftModel]


@pytest.fixture(scope="module")
def make_drafter(tiny_packed_drafter_dir: Path) -> MakeDrafter:
    """`make_drafter(seed, **options)`: a random drafter for `tiny_packed_dir` with these fields of its config."""

    def make(seed: int = 1, **options: Any) -> DFlashDraftModel:
        model = DFlashDraftModel(replace(load_drafter(tiny_packed_drafter_dir).config, **options))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.uniform_(0.8, 1.2, generator=generator)
                else:
                    parameter.normal_(0.0, 0.2, generator=generator)
        if model.config.draft_vocab_size is not None:
            ids = torch.randperm(model.config.vocab_size, generator=generator)[: model.config.draft_vocab_size]
            model.set_draft_vocab(ids.sort().values)
        return model.bfloat16().float().eval()

    return make


@pytest.fixture(scope="module", params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(backend: str, tiny_packed_dir: Path) -> dict[str, list[list[int]]]:
    """Name of a sampling -> the texts without proposals."""
    engine = Engine.from_pretrained(tiny_packed_dir, backend=backend)  # type: ignore[arg-type]
    return {
        name: [engine.generate(p, NUM_NEW, seed=3, ignore_eos=True, **options).tokens for p in PROMPTS]
        for name, options in SAMPLING.items()
    }


@pytest.fixture(scope="module")
def weights(tiny_packed_dir: Path) -> ModelWeights:
    checkpoint = load_checkpoint(tiny_packed_dir)
    spec = spec_from_config(checkpoint.config)
    found = read_weights(spec, dict(checkpoint.tensors), torch.float32, torch.device("cpu"), tied=False)
    # The compiled backend drafts with matrices in bfloat16; here they hold nothing that rounding would change.
    found.lm_head_VD = plain_matrix(found.lm_head_VD, torch.float32).bfloat16().float()
    return found


def assert_same_text(engine: Engine, expected: dict[str, list[list[int]]]) -> None:
    """Together and alone, under every sampling."""
    for name, options in SAMPLING.items():
        together = engine.generate(PROMPTS, NUM_NEW, seed=3, ignore_eos=True, **options)
        assert [g.tokens for g in together] == expected[name], name
        alone = engine.generate(PROMPTS[2], NUM_NEW // 2, seed=3, ignore_eos=True, **options)
        assert alone.tokens == expected[name][2][: NUM_NEW // 2], name
        assert all(g.stats.num_drafted > 0 for g in (*together, alone))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_drafter_option_leaves_the_text_alone(
    option: str, backend: str, expected: dict[str, list[list[int]]], tiny_packed_dir: Path, make_drafter: MakeDrafter
) -> None:
    model = make_drafter(**OPTIONS[option])
    engine = Engine.from_pretrained(tiny_packed_dir, model, backend=backend)  # type: ignore[arg-type]
    assert engine.num_drafts == (8 if model.config.sample_from_anchor else 7)
    strategies = [DraftStrategy(), DraftStrategy("adaptive", noise="shared")]
    if backend == "reference":
        # One run of each way of drafting: what the option computes is the module's, and the same on both backends.
        strategies = [DraftStrategy(3 + len(option) % 4, noise="shared")]
    for strategy in strategies:
        engine.set_strategy(strategy)
        assert_same_text(engine, expected)


@pytest.mark.parametrize("option", OPTIONS)
def test_backends_draft_the_same(
    option: str, weights: ModelWeights, make_drafter: MakeDrafter, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_drafter(**OPTIONS[option])
    oracle = ReferenceBackend(weights, model, 2, 192)
    with caplog.at_level(logging.WARNING):
        backend = CpuBackend(weights, model, 2, 192)
    assert isinstance(backend.drafter, CompiledDrafter) and not caplog.text
    plain = CpuBackend(weights, make_drafter(), 2, 192).round_cost
    # Drafting costs what it reads: a head of fewer tokens less, a Markov head more with every proposal.
    assert (backend.round_cost.draft < plain.draft) == (model.config.draft_vocab_size is not None)
    assert (backend.round_cost.draft_token > plain.draft_token) == (model.config.markov_rank > 0)
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(5)).tolist()
    for slot, tokens in ((0, ids), (1, ids[::-1])):
        for one in (oracle, backend):
            one.step(Rows(tokens, [slot] * 40, list(range(40))), [])
    noise = NoiseTable(512, torch.device("cpu")).rows([(1, 2, 41 + i) for i in range(8)])
    params = SamplingParams(1.0, top_k=60)
    for requests in (
        [DraftRequest(7, 0, 40), DraftRequest(9, 1, 40)],
        [DraftRequest(7, 0, 40, params, noise), DraftRequest(9, 1, 40, params, noise)],
        [DraftRequest(7, 0, 40), DraftRequest(9, 1, 40, params, noise)],
        [DraftRequest(7, 0, 40, params)],
    ):
        for count in (model.config.num_proposals, 3):
            for got, wanted in zip(backend.draft(requests, count), oracle.draft(requests, count), strict=True):
                assert got.tokens == wanted.tokens and len(got.tokens) == count
                if requests[0].noise is not None:
                    # float32 sums in another order, through two layers and an exponential
                    assert got.probabilities == pytest.approx(wanted.probabilities, rel=1e-3)
    # A block whose last slots lie past the longest text
    for start in range(40, 191, 30):
        tokens = (ids * 5)[start : min(start + 30, 191)]
        for one in (oracle, backend):
            one.step(Rows(tokens, [1] * len(tokens), list(range(start, start + len(tokens)))), [])
    last, count = [DraftRequest(9, 1, 191)], model.config.num_proposals
    assert backend.draft(last, count)[0].tokens == oracle.draft(last, count)[0].tokens
    if option == "pruned vocabulary":
        allowed = set(model.target_ids(torch.arange(200)).tolist())
        assert set(oracle.draft([DraftRequest(7, 0, 40)], 7)[0].tokens) <= allowed


def test_what_the_kernels_lack_is_said_and_served_beside_them(
    weights: ModelWeights, make_drafter: MakeDrafter, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_drafter(head_dim=24, markov_rank=8)
    with caplog.at_level(logging.WARNING):
        backend = CpuBackend(weights, model, 1, 192)
    assert isinstance(backend.drafter, ModuleDrafter) and backend.round_cost == PYTORCH_BESIDE_COMPILED
    assert "PyTorch for the drafter: its kernels need a drafter head size that is a multiple of 16, not 24" in (
        caplog.text
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "options", [{}, {"sample_from_anchor": True, "draft_vocab_size": 200}], ids=["plain", "pruned"]
)
def test_a_compiled_markov_head_drafts_what_the_module_drafts(
    seed: int, options: dict[str, Any], weights: ModelWeights, make_drafter: MakeDrafter
) -> None:
    """Token for token over 60 rounds of two sequences, whatever the number of threads; without it most are others."""
    model = make_drafter(markov_rank=24, seed=seed, **options)
    num_threads = torch.get_num_threads()
    oracle = ReferenceBackend(weights, model, 2, 192)
    backend = CpuBackend(weights, model, 2, 192)
    without = ModuleDrafter(model, weights.embedding_VD, weights.lm_head_VD, 2, 192)
    without.contexts = oracle.drafter.contexts if oracle.drafter is not None else []
    generator = torch.Generator().manual_seed(seed)
    num_corrected = 0
    try:
        for start in range(0, 180, 3):
            for slot in (0, 1):
                tokens = torch.randint(3, 512, (3,), generator=generator).tolist()
                rows = Rows(tokens, [slot] * 3, list(range(start, start + 3)))
                oracle.step(rows, [])
                backend.step(rows, [])
            anchors = torch.randint(3, 512, (2,), generator=generator).tolist()
            requests = [DraftRequest(anchor, slot, start + 3) for slot, anchor in enumerate(anchors)]
            torch.set_num_threads(1 + start % 3)
            count = model.config.num_proposals - start % 4
            drafts, expected = backend.draft(requests, count), oracle.draft(requests, count)
            assert [draft.tokens for draft in drafts] == [draft.tokens for draft in expected]
            model.markov_head, head = None, model.markov_head
            num_corrected += sum(
                a.tokens != b.tokens for a, b in zip(drafts, without.draft(requests, count), strict=True)
            )
            model.markov_head = head
    finally:
        torch.set_num_threads(num_threads)
    assert num_corrected > 60


def test_a_float32_drafter_is_compiled_as_its_bfloat16_values(weights: ModelWeights, make_drafter: MakeDrafter) -> None:
    exact = make_drafter(markov_rank=8)
    model = copy.deepcopy(exact)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter is not model.get_parameter("markov_head.markov_w1.weight"):
                parameter.mul_(1 + 1e-4)  # less than bfloat16 resolves
    drafts = []
    for one in (exact, model):
        backend = CpuBackend(weights, one, 1, 192)
        backend.step(Rows(PROMPTS[1], [0] * 70, list(range(70))), [])
        drafts.append(backend.draft([DraftRequest(7, 0, 70)], 7))
    assert drafts[0] == drafts[1]


@pytest.mark.parametrize("is_pruned", [False, True])
def test_markov_kernel_is_exact_and_breaks_ties_as_argmax(is_pruned: bool) -> None:
    """On small integers every sum is exact: logits bit for bit, chains token for token, with many ties."""
    generator = torch.Generator().manual_seed(0)
    vocab, rank, num_drafts, num_blocks = 150, 6, 5, 10
    num_tokens = 75 if is_pruned else vocab
    ids_U = torch.randperm(vocab, generator=generator)[:num_tokens].sort().values
    w1_VR = torch.randint(-2, 3, (vocab, rank), generator=generator).float()
    w2_UR = torch.randint(-2, 3, (num_tokens, rank), generator=generator).float()
    layer = LayerSpec(AttentionSpec(1, 1, 16, 16, 16, 1e4), DenseSpec(16))
    buffers = Buffers.of(16, [layer], num_tokens)
    base = torch.randint(-3, 4, (num_blocks * num_drafts, num_tokens), generator=generator).float()
    base[3 * num_drafts + 2, 7] = float("nan")
    buffers.logits[: len(base), :num_tokens] = base
    anchors = torch.randint(0, vocab, (num_blocks,), generator=generator).tolist()

    programs = []
    w2 = panels(w2_UR.bfloat16())
    for depth in range(num_drafts):
        program = Program(part="drafter")
        assembler = Assembler(program, buffers, 1, 16)
        assembler.add_markov(w1_VR, w2, ids_U.int() if is_pruned else None, depth, num_drafts, first_slot=1)
        assembler.add_best(num_tokens, with_probability=True, first=depth, step=num_drafts)
        programs.append(program)
    tokens = [token for anchor in anchors for token in (anchor, *[2] * num_drafts)]
    wanted = [row for row in range(len(tokens)) if row % (num_drafts + 1)]
    unused, num_ties = [0] * len(tokens), 0
    Runner().run(records_of(*programs), tokens, unused, unused, unused, wanted)
    for block, anchor in enumerate(anchors):
        previous = anchor
        for depth in range(num_drafts):
            row = block * num_drafts + depth
            logits_U = base[row] + w1_VR[previous] @ w2_UR.T
            if bool(logits_U.isnan().any()):
                assert int(buffers.best[row]) == -1
                break
            assert torch.equal(buffers.logits[row, :num_tokens], logits_U)
            places = (logits_U == logits_U.max()).nonzero().flatten()
            num_ties += len(places) > 1
            assert int(buffers.best[row]) == int(places[0])
            previous = int(ids_U[places[0]]) if is_pruned else int(places[0])
    assert num_ties > 5


def test_shared_noise_samples_the_draft_as_the_target_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    ids_V = torch.arange(97)
    for params in (SamplingParams(1.0), SamplingParams(0.7, top_k=9), SamplingParams(1.3, top_p=0.6, top_k=40)):
        for position in range(30):
            logits_V = torch.randn(97, generator=generator) * 3
            noise = NoiseTable(97, torch.device("cpu")).rows([(5, 6, position)])
            request = DraftRequest(0, 0, 0, params, noise)
            drafted = int(draft_scores(logits_V, request, 0, ids_V).argmax())
            assert drafted == sample(logits_V, noise[0], params)


@pytest.mark.parametrize("sampling", ["temperature 1", "top-p and top-k"])
def test_a_drafter_that_is_the_target_is_always_right_with_shared_noise(
    sampling: str, tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise of a proposal is that of the position it is for, in every sequence of a batch."""
    plain = Engine.from_pretrained(tiny_packed_dir, backend="cpu")
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW + 1, "ignore_eos": True} | SAMPLING[sampling]
    seeds = [3, 4, 5]
    texts = [plain.generate(p, seed=s, **options).tokens for p, s in zip(PROMPTS, seeds, strict=True)]
    whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, texts, strict=True)]
    logits = [plain.logits(ids) for ids in whole]

    def draft(requests: Sequence[DraftRequest], num_drafts: int, tree_budget: int | None = None) -> list[Draft]:
        drafts = []
        for request in requests:
            at = slice(request.position, request.position + 1)
            text = next(i for i, ids in enumerate(whole) if ids[at] == [request.anchor])
            rows = logits[text][request.position : request.position + num_drafts]
            scores = [draft_scores(row_V, request, i, torch.arange(512)) for i, row_V in enumerate(rows)]
            drafts.append(Draft.chain([int(scores_V.argmax()) for scores_V in scores]))
        return drafts

    for noise, is_right in (("shared", True), ("none", False)):
        engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="cpu", draft_noise=noise)  # type: ignore[arg-type]
        monkeypatch.setattr(engine.backend, "draft", draft)
        found = engine.generate(PROMPTS, seed=seeds, **options)
        assert [g.tokens for g in found] == texts
        # One token of the prompt's pass, then two rounds of seven proposals and a bonus
        assert [g.stats.num_rounds == 2 for g in found] == [is_right] * 3


def test_shared_noise_of_a_pruned_vocabulary_is_that_of_its_tokens() -> None:
    logits_V = torch.randn(97, generator=torch.Generator().manual_seed(0))
    ids_U = torch.arange(0, 97, 3)
    noise = NoiseTable(97, torch.device("cpu")).rows([(5, 6, 7)])
    scores_U = draft_scores(logits_V[ids_U], DraftRequest(0, 0, 0, SamplingParams(1.0), noise), 0, ids_U)
    assert torch.equal(scores_U, (logits_V + noise[0])[ids_U])


def test_noise_is_drawn_once_and_is_its_positions_own() -> None:
    table = NoiseTable(50, torch.device("cpu"))
    first = table.rows([(1, 2, 3), (1, 2, 4), (1, 2, 3)])
    assert first[0] is first[2] and not torch.equal(first[0], first[1])
    again = NoiseTable(50, torch.device("cpu")).rows([(1, 2, 4)])
    assert torch.equal(again[0], first[1]) and table.rows([(1, 2, 4)])[0] is first[1]


def test_greedy_proposals_know_no_noise(tiny_packed_dir: Path, make_drafter: MakeDrafter) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="cpu", draft_noise="shared")
    shared = engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True)
    engine.set_strategy(DraftStrategy())
    assert engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds == shared.stats.num_rounds


# --- trees


def branching(depth: int, seed: int) -> Draft:
    """A random tree of at most `depth`: every node follows a random earlier one."""
    generator = torch.Generator().manual_seed(seed)
    parents, depths = [-1], [1]
    while len(parents) < 19:
        parent = int(torch.randint(-1, len(parents), (1,), generator=generator))
        if (depths[parent] if parent >= 0 else 0) < depth:
            parents.append(parent)
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
    tokens = torch.randperm(500, generator=generator)[: len(parents)].tolist()
    return Draft(tokens, parents, [])


@pytest.mark.parametrize("start", [3, 70, 122], ids=["beginning", "ring wrapped", "two chunks of keys"])
def test_a_tree_row_has_the_bits_of_a_plain_row(start: int, weights: ModelWeights, make_drafter: MakeDrafter) -> None:
    ids = torch.randint(3, 512, (start + 1,), generator=torch.Generator().manual_seed(start)).tolist()
    drafter = make_drafter(**MIMO)
    backend = ReferenceBackend(weights, drafter, 3, 192)
    for buffer in (t for cache in backend.caches for t in (cache.k_SLGH, cache.v_SLGH)):
        buffer.fill_(float("nan"))

    def feed(one: ReferenceBackend, slot: int, tokens: Sequence[int], first: int = 0) -> torch.Tensor:
        rows = Rows(tokens, [slot] * len(tokens), list(range(first, first + len(tokens))))
        return one.step(rows, range(len(tokens)))[0]

    drafts = {0: branching(6, start), 2: branching(3, start + 1)}
    tokens: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    parents: list[int] = []
    anchors: dict[int, int] = {}
    for slot, draft in drafts.items():
        feed(backend, slot, ids[:start])
        anchors[slot] = anchor = len(tokens)
        tokens += [ids[start], *draft.tokens]
        slots += [slot] * (1 + len(draft.tokens))
        positions += [start, *(start + depth for depth in draft.depths())]
        parents += [-1, *(anchor + 1 + parent for parent in draft.parents)]
    tree_WV = backend.step(Rows(tokens, slots, positions, parents), range(len(tokens)))[0].clone()

    def path(draft: Draft, node: int) -> list[int]:
        return [] if node < 0 else [*path(draft, draft.parents[node]), node]

    plain = ReferenceBackend(weights, None, 1, 192)
    feed(plain, 0, ids[:start])
    for slot, draft in drafts.items():
        for node in range(-1, len(draft.tokens)):
            chain = [ids[start], *(draft.tokens[n] for n in path(draft, node))]
            assert torch.equal(feed(plain, 0, chain, start)[-1], tree_WV[anchors[slot] + 1 + node])
    # One path of each tree is committed; what follows is what follows the same tokens decoded plainly.
    chosen = {slot: path(draft, max(range(19), key=draft.depths().__getitem__)) for slot, draft in drafts.items()}
    backend.commit(
        [row for slot, nodes in chosen.items() for row in (anchors[slot], *(anchors[slot] + 1 + n for n in nodes))]
    )
    for slot, nodes in chosen.items():
        plain = ReferenceBackend(weights, drafter, 1, 192)
        text = [*ids, *(drafts[slot].tokens[n] for n in nodes)]
        feed(plain, 0, text[:start])
        feed(plain, 0, text[start:], start)
        after = len(text)
        assert torch.equal(feed(plain, 0, [5, 6, 7], after), feed(backend, slot, [5, 6, 7], after))
        assert plain.draft([DraftRequest(9, 0, after)], 7)[0].tokens == (
            backend.draft([DraftRequest(9, slot, after)], 7)[0].tokens
        )


def propose_tree(texts: Sequence[Sequence[int]], num_right: Callable[[int], int]) -> Any:
    """A `draft` with `num_right(position)` right tokens, each beside and before decoys, and wrong leaves after."""

    def draft(requests: Sequence[DraftRequest], num_drafts: int, tree_budget: int | None = None) -> list[Draft]:
        assert tree_budget is not None
        drafts = []
        for request in requests:
            position = request.position
            text = next(t for t in texts if len(t) > position and t[position] == request.anchor)
            right = list(text[position + 1 : position + 1 + min(num_right(position), num_drafts)])
            tokens, parents, parent = list[int](), list[int](), -1
            for depth in range(num_drafts):
                token = right[depth] if depth < len(right) else None
                for decoy in (1, 2):
                    base = token if token is not None else 100 + depth
                    tokens.append((base + decoy) % 512 if token is not None else 500 + decoy)
                    parents.append(parent)
                if token is None:
                    break
                tokens.append(token)
                parents.append(parent)
                parent = len(tokens) - 1
            drafts.append(Draft(tokens, parents, [0.5] * len(tokens)))
        return drafts

    return draft


def test_trees_leave_the_text_alone(
    tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Engine.from_pretrained(tiny_packed_dir, backend="reference")
    texts = {
        name: [plain.generate(p, NUM_NEW, seed=3, ignore_eos=True, **options).tokens for p in PROMPTS]
        for name, options in SAMPLING.items()
    }
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="reference", tree_budget=12)
    assert_same_text(engine, texts)
    engine.set_drafter(make_drafter(**OPTIONS["everything"]))
    engine.set_strategy(DraftStrategy(noise="shared", tree_budget=9))
    assert_same_text(engine, texts)
    # A random drafter is nearly always wrong; trees with right paths of a varying depth are not.
    for name, options in SAMPLING.items():
        whole = [prompt + tokens for prompt, tokens in zip(PROMPTS, texts[name], strict=True)]
        for num_right, least in ((lambda position: 7, 5.0), (lambda position: position % 8, 1.5)):
            monkeypatch.setattr(engine.backend, "draft", propose_tree(whole, num_right))
            found = engine.generate(PROMPTS, NUM_NEW, seed=3, ignore_eos=True, **options)
            assert [g.tokens for g in found] == texts[name]
            assert all(g.stats.acceptance_length > least for g in found)


def test_statistics_of_trees(tiny_packed_dir: Path, make_drafter: MakeDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), backend="reference", tree_budget=12)
    engine.set_strategy(DraftStrategy(3, tree_budget=12))
    tokens = engine.generate(PROMPTS[0], 21, ignore_eos=True).tokens
    monkeypatch.setattr(engine.backend, "draft", propose_tree([PROMPTS[0] + tokens], lambda position: 3))
    stats = engine.generate(PROMPTS[0], 21, ignore_eos=True).stats
    # Five rounds, each an anchor and three levels of two decoys and the right token
    assert (stats.num_rounds, stats.num_rows, stats.num_drafted) == (5, 50, 45)
    assert stats.accepted_by_position == [5, 5, 5] == stats.drafted_by_position
    assert (stats.rows_per_token, stats.drafted_per_token) == (50 / 20, 45 / 20)


# --- prompt look-up


def test_prompt_look_up_leaves_the_text_alone(
    backend: str, expected: dict[str, list[list[int]]], tiny_packed_dir: Path
) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, "ngram", backend=backend)  # type: ignore[arg-type]
    assert engine.num_drafts == 7 and engine.drafter_sha256 is None
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2]]
    for strategy in (DraftStrategy(), DraftStrategy(3, ngram_size=1), DraftStrategy("adaptive")):
        engine.set_strategy(strategy)
        for name, options in SAMPLING.items():
            found = engine.generate(prompts, NUM_NEW, seed=3, ignore_eos=True, **options)
            assert [g.tokens for g in found] == expected[name]


def test_prompt_look_up_finds_what_was_there(tiny_packed_dir: Path) -> None:
    plain = Engine.from_pretrained(tiny_packed_dir, backend="cpu")
    tokens = plain.generate(PROMPTS[0], 40, ignore_eos=True).tokens
    # The prompt holds its own continuation already; then only the first look-ups can miss.
    prompt = [*PROMPTS[0], *tokens, 3, 3]
    engine = Engine.from_pretrained(tiny_packed_dir, "ngram", backend="cpu", num_drafts=5)
    found = engine.generate(prompt, 40, ignore_eos=True)
    assert found.tokens == plain.generate(prompt, 40, ignore_eos=True).tokens
    assert found.stats.num_drafted >= sum(found.stats.drafted_by_position) > 0


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree_budget": 0}, "tree_budget must be between 1 and 63 nodes, got 0"),
        ({"tree_budget": 64}, "tree_budget must be between 1 and 63 nodes, got 64"),
        ({"tree_budget": 8, "num_drafts": "adaptive"}, "choose one"),
        ({"tree_budget": 8, "backend": "cpu"}, "backend 'cpu' verifies no draft trees: its kernels write .*reference"),
        ({"draft_noise": "gaussian"}, "draft_noise must be 'none' or 'shared', not 'gaussian'"),
        ({"num_drafts": 8}, "num_drafts 8 must be 'adaptive' or between 1 and the drafter's 7"),
        ({"num_drafts": 0}, "num_drafts 0 must be"),
        ({"num_drafts": "some"}, "num_drafts 'some' must be 'adaptive' or a number"),
        ({"drafter": None, "draft_noise": "shared"}, "draft_noise 'shared' needs a drafter"),
        ({"drafter": None, "tree_budget": 8}, "tree_budget 8 needs a drafter"),
        ({"drafter": "ngram", "draft_noise": "shared"}, "draft_noise needs a drafter's probabilities"),
        ({"drafter": "ngram", "tree_budget": 8}, "tree_budget needs a drafter's probabilities"),
        ({"drafter": "ngram", "num_drafts": 64}, "num_drafts 64 must be 'adaptive' or between 1 and one step's 63"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    options: dict[str, Any], message: str, tiny_packed_dir: Path, make_drafter: MakeDrafter
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Engine.from_pretrained(tiny_packed_dir, **({"drafter": make_drafter()} | options))
    assert "\n" not in str(error.value)


def test_refusals_of_a_running_engine_change_nothing(tiny_packed_dir: Path, make_drafter: MakeDrafter) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(sample_from_anchor=True), backend="cpu", num_drafts=8)
    rounds = engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds
    with pytest.raises(ValueError, match="verifies no draft trees"):
        engine.set_strategy(DraftStrategy(tree_budget=8))
    with pytest.raises(ValueError, match="the drafter's 7"):
        engine.set_drafter(make_drafter())
    assert engine.num_drafts == 8 and engine.strategy == DraftStrategy(8)
    assert engine.generate(PROMPTS[0], NUM_NEW, ignore_eos=True).stats.num_rounds == rounds
    with pytest.raises(ValueError, match="ngram_size"):
        DraftStrategy(ngram_size=0)


def test_auto_takes_the_backend_that_has_trees(
    tiny_packed_dir: Path, make_drafter: MakeDrafter, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine.from_pretrained(tiny_packed_dir, make_drafter(), device="cpu", tree_budget=8)
    assert engine.backend_name == "reference" and "verifies no draft trees" in caplog.text
