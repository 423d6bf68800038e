"""Is what a GPU backend computes right, on tiny models of each family?

The oracle is the reference backend in float32 on the same device, with copies of the weights and key/value buffers.
Compared are each phase's buffer (if the backend runs by phase), logits and tokens. Rows whose choice of experts, and
tokens whose best two logits, are closer than rounding error are counted and left out. MiMo, released so, is also
checked with attention, dense MLP and LM head in FP8.

Row invariance has no tolerance: a row's logits are bitwise the same alone, among others, at other places and in a
draft, and text equals what scoring finds, token by token. Tokens drawn by a backend equal the sampler's from its
logits, also at a vocabulary of 150k. A special model has ties and extreme numbers (`edges`). Qwen3's text must not
change with prompt lookup or a random DFlash drafter, which are in the `resident` backend's kernel.

Legend: R rows, V vocabulary, D any width, E experts.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from speedstack.dflash.model import DFlashDraftModel
from speedstack.eval.gpu_suite.edges import edge_spec, edge_weights, lose_expert, moe_of
from speedstack.eval.gpu_suite.near_ties import decided_rows, is_near_tie, pair_gap
from speedstack.eval.gpu_suite.scale import Scale
from speedstack.runtime.backends.base import Backend, Draw, Rows
from speedstack.runtime.backends.gpu.expected_buffers import expected_buffers, found_buffer
from speedstack.runtime.backends.gpu.graph import GraphBackend
from speedstack.runtime.backends.reference import ReferenceBackend
from speedstack.runtime.backends.select import make_backend
from speedstack.runtime.engine import Engine
from speedstack.runtime.model.device import DTYPES
from speedstack.runtime.model.families.registry import spec_from_config
from speedstack.runtime.model.moe import route
from speedstack.runtime.model.released_models import drafter_config, tiny_config
from speedstack.runtime.model.synthetic_weights import random_weights
from speedstack.runtime.model.weights import ModelWeights
from speedstack.runtime.rounds.sampling import SamplingParams, gumbel_noise, sample

# Largest error relative to a row's norm. bfloat16: up to about 20 independent roundings of 2**-9 over two or three
# layers give about sqrt(20) * 2**-9 = 0.9 %. float32: sums of up to 96 terms in another order.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}

# The models of this check have 70 tokens.
SAMPLINGS = (
    SamplingParams(0.7),
    SamplingParams(5.0, top_k=6),
    SamplingParams(1.0),
    SamplingParams(5.0, top_p=0.5),
    SamplingParams(5.0),
    SamplingParams(5.0, top_k=30, top_p=0.8),
)
# For a large vocabulary.
LARGE_SAMPLINGS = (
    SamplingParams(1.0, top_k=50, top_p=0.95),
    SamplingParams(0.7, top_p=0.9),
    SamplingParams(5.0, top_k=1000),
    SamplingParams(5.0, top_p=0.99),
    SamplingParams(1.0),
)


class Checker:
    """One backend on a tiny model. Made in a worker."""

    def __init__(self, scale: Scale, model: str, backend: str) -> None:
        self.scale, self.backend_name = scale, backend
        self.device, self.dtype = torch.device(scale.device), DTYPES[scale.dtype]
        self.tolerance = TOLERANCE[self.dtype]
        self.spec = spec_from_config(tiny_config(model))
        self.weights = random_weights(self.spec, self.dtype, self.device, is_packed=True, seed=1)
        self.num_rows = scale.check_rows
        self.max_length = scale.check_length
        generator = torch.Generator().manual_seed(2)
        shape = (self.num_rows, self.max_length)
        self.ids = torch.randint(0, self.spec.vocab_size, shape, generator=generator).tolist()
        # Sequences of different lengths, the longest first; each row of a step continues one.
        step = max(1, scale.check_context // (2 * self.num_rows))
        self.lengths = [scale.check_context - slot * step for slot in range(self.num_rows)]

    def load(self) -> None:
        """Wait until the weights are on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def check_buffers(self) -> dict[str, Any]:
        """Compare phases, logits and tokens with the oracle. Raises RuntimeError naming the first wrong phase."""
        oracle = ReferenceBackend(widened(self.weights), None, self.num_rows, self.max_length)
        self._fill(oracle)
        backend = self._backend()
        copy_caches(oracle, backend)
        rows = self._next_rows(range(self.num_rows))
        expected = expected_buffers(oracle, rows)
        decided_R = decided_rows(self.weights, expected, self.tolerance)
        if not decided_R.any():
            raise RuntimeError("no row's choice of experts is clear of roundings: give the check another seed")
        errors: dict[str, float] = {}
        logits_RV, tokens = backend.step(rows, range(self.num_rows))
        if isinstance(backend, GraphBackend):
            errors |= self._phase_errors(backend, expected, decided_R)
        wanted_RV = expected["lm_head"]
        errors["logits"] = row_error(logits_RV, wanted_RV, decided_R)
        top_R2 = wanted_RV.topk(2, dim=-1).values
        # An error within the row's tolerance, spread over its entries, moves the two best by at most this.
        clear_R = top_R2[:, 0] - top_R2[:, 1] > 2 * self.tolerance * wanted_RV.square().mean(-1).sqrt()
        compared = [row for row in range(self.num_rows) if decided_R[row] and clear_R[row]]
        wrong = [row for row in compared if tokens[row] != int(wanted_RV[row].argmax())]
        found = {
            "largest_error": max(errors.values()),
            "tolerance": self.tolerance,
            "errors": errors,
            "num_rows": self.num_rows,
            "num_near_ties_of_experts": int((~decided_R).sum()),
            "num_tokens_compared": len(compared),
            "num_tokens_different": len(wrong),
        }
        # Not `>`, so that NaN fails.
        off = [name for name, error in errors.items() if not error <= self.tolerance]
        if off:
            raise RuntimeError(f"{off[0]} is off by {errors[off[0]]:.2e} of its norm, allowed {self.tolerance:.0e}")
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {len(compared)} tokens differ from the reference's")
        if not compared:
            raise RuntimeError("no row's token is clear of roundings: give the check another seed")
        return found

    def check_fp8(self) -> dict[str, Any]:
        """`check_buffers` with FP8 weights, which the oracle dequantizes."""
        plain = self.weights
        self.weights = random_weights(self.spec, self.dtype, self.device, is_packed=True, seed=1, has_fp8=True)
        try:
            return self.check_buffers()
        finally:
            self.weights = plain

    def check_edges(self) -> dict[str, Any]:
        """Ties between experts, extreme scales, and sampling, on the model of `edges`.

        Raises RuntimeError as `check_buffers` and `check_sampling`, and if rows are lost other than those that chose
        the NaN expert.
        """
        plain = self.spec, self.weights
        self.spec, self.weights = edge_spec(self.scale), edge_weights(self.scale, self.dtype, self.device)
        try:
            return self._edges()
        finally:
            self.spec, self.weights = plain

    def _edges(self) -> dict[str, Any]:
        backend, everybody = self._backend(), range(self.num_rows)
        rows = Rows([ids[0] for ids in self.ids], list(everybody), [0] * self.num_rows)
        expected = expected_buffers(ReferenceBackend(widened(self.weights), None, self.num_rows, self.max_length), rows)
        router_RE = expected["L00.router"]
        decided_R = pair_gap(router_RE, moe_of(self.spec)) > 2 * self.tolerance * router_RE.square().mean(-1).sqrt()
        logits_RV = backend.step(rows, everybody)[0].clone()
        errors = {"logits": row_error(logits_RV, expected["lm_head"], decided_R)} if decided_R.any() else {}
        if isinstance(backend, GraphBackend):
            errors = self._phase_errors(backend, expected, decided_R) | errors
        off = [name for name, error in errors.items() if not error <= self.tolerance]
        if off:
            raise RuntimeError(f"{off[0]} is off by {errors[off[0]]:.2e} where experts tie or scales are extreme")
        sampling = self.check_sampling(LARGE_SAMPLINGS)
        experts_RK, _ = route(router_RE, None, moe_of(self.spec))
        chosen_RE = torch.zeros_like(router_RE, dtype=torch.bool).scatter_(1, experts_RK, True)
        # An expert that some decided rows chose and some did not.
        counts_E = chosen_RE[decided_R].sum(0)
        experts = ((counts_E > 0) & (counts_E < decided_R.sum())).nonzero()
        if not len(experts):
            raise RuntimeError("no rows' choices of experts are clear of roundings: give the check another seed")
        lost_R = chosen_RE[:, experts[0, 0]]
        lose_expert(self.weights, int(experts[0, 0]))
        after_RV = backend.step(rows, everybody)[0]
        if not bool(after_RV[decided_R & lost_R].isnan().all()):
            raise RuntimeError("a row that chose an expert that is no number has logits")
        if not torch.equal(after_RV[decided_R & ~lost_R], logits_RV[decided_R & ~lost_R]):
            raise RuntimeError("an expert that is no number changes rows that did not choose it")
        return {
            "largest_error": max(errors.values()),
            "num_rows_decided": int(decided_R.sum()),
            "num_rows_lost": int((decided_R & lost_R).sum()),
            "sampling": sampling,
        }

    def _phase_errors(
        self, backend: GraphBackend, expected: dict[str, torch.Tensor], decided_R: torch.Tensor
    ) -> dict[str, float]:
        """Errors of the newest step, run phase by phase; it rewrites the same keys and values."""
        errors = {}
        for index, launch in enumerate(backend.launches):
            launch.run(is_dependent=self.device.type == "cuda" and index > 0)
            found = found_buffer(backend, launch.phase, self.num_rows)
            if found is not None:
                name = launch.phase.name
                errors[name] = row_error(found, expected[name], decided_R)
        if set(errors) != set(expected):
            raise RuntimeError(f"phases not compared: {sorted(set(expected) ^ set(errors))}")
        return errors

    def check_row_invariance(self) -> dict[str, Any]:
        """Compare one row bitwise among different rows. Raises RuntimeError naming the rows that changed it."""
        backend = self._backend()
        self._fill(backend)
        alone_V = self._logits_of(backend, self._next_rows([0]), 0)
        if not bool(torch.isfinite(alone_V).all()):
            raise RuntimeError("the row's logits are not finite")
        first, others = self._next_rows([0]), list(range(1, self.num_rows))
        before = self.lengths[0] - 1
        draft = Rows(self.ids[0][before : before + 2], [0, 0], [before, before + 1])
        half, company = len(others) // 2, f"among {len(others)} others"
        companies = {
            f"first {company}": (self._next_rows([0, *others]), 0),
            f"in the middle {company}": (self._next_rows([*others[:half], 0, *others[half:]]), half),
            f"last {company}": (self._next_rows([*others, 0]), len(others)),
            "behind its own last token, as a draft": (draft, 1),
            "alone again": (first, 0),
        }
        for name, (rows, place) in companies.items():
            if not torch.equal(self._logits_of(backend, rows, place), alone_V):
                raise RuntimeError(f"a row's bits change when it is {name}")
        return {"companies": ["alone", *companies], "context": self.lengths[0]}

    def check_text(self) -> dict[str, Any]:
        """The engine's decoding: each token must be exactly the best one in scoring the text."""
        num_new = self.scale.num_generated
        engine = Engine(
            self.weights, backend=self.backend_name, max_length=self.max_length, max_batch_size=self.num_rows
        )  # fmt: skip
        prompts = [self.ids[slot][: 5 + slot] for slot in range(2)]
        texts = [out.tokens for out in engine.generate(prompts, max_new_tokens=num_new, ignore_eos=True)]
        for prompt, text in zip(prompts, texts, strict=True):
            best = engine.logits(prompt + text)[len(prompt) - 1 : -1].argmax(-1).tolist()
            if best != text:
                place = next(i for i, (a, b) in enumerate(zip(best, text, strict=True)) if a != b)
                raise RuntimeError(f"token {place + 1} of a text is not the one that scoring the text finds best")
        return {"num_texts": len(texts), "num_tokens": sum(map(len, texts))}

    def check_sampling(self, samplings: tuple[SamplingParams, ...] | None = None) -> dict[str, Any]:
        """Compare the backend's tokens with `sample` of its logits, except near ties; skipped if the host draws.

        Raises RuntimeError if they differ, and if noise decides nothing.
        """
        backend = self._backend()
        if backend.rounds is None:
            return {"is_drawn_by_host": True}
        self._fill(backend)
        rows, num_compared, num_ties, num_changed = self._next_rows(range(self.num_rows)), 0, 0, 0
        samplings = samplings or SAMPLINGS
        for number in range(len(samplings)):
            # Seeds and sequences that use all 64 bits.
            draws = [
                Draw(
                    2**64 - 1 - self.num_rows * number - row,
                    2**63 + 2**32 * row + number,
                    samplings[(number + row) % len(samplings)],
                )
                for row in range(self.num_rows)
            ]
            logits_RV, tokens = backend.step(replace(rows, draws=draws), range(self.num_rows))
            seeds, sequences = [draw.seed for draw in draws], [draw.sequence for draw in draws]
            positions = [position + 1 for position in rows.positions]
            noise_RV = gumbel_noise(seeds, sequences, positions, self.spec.vocab_size, self.device)
            for row, (logits_V, noise_V) in enumerate(zip(logits_RV, noise_RV, strict=True)):
                params = draws[row].params
                if is_near_tie(logits_V, noise_V, params):
                    num_ties += 1
                    continue
                wanted = sample(logits_V, noise_V, params)
                if tokens[row] != wanted:
                    raise RuntimeError(f"with {params} token {tokens[row]} is drawn, not {wanted}")
                num_compared += 1
                num_changed += wanted != int(logits_V.argmax())
        if not num_changed:
            raise RuntimeError("no token that is drawn differs from the most probable one")
        return {"num_tokens_compared": num_compared, "num_near_ties": num_ties, "num_not_most_probable": num_changed}

    def check_prompt_lookup(self) -> dict[str, Any]:
        """Compare texts with and without prompt lookup, greedy and sampled.

        Raises RuntimeError if they differ or no draft was accepted.
        """
        found = self._compare_texts("ngram", "that are looked up", self.scale.num_lookup_tokens)
        if not found["num_accepted"]:
            raise RuntimeError(f"none of {found['num_drafted']} drafts was accepted: give the check longer texts")
        return found

    def check_drafter(self) -> dict[str, Any]:
        """Compare texts with and without a random DFlash drafter, whose drafts are hardly ever accepted.

        Raises RuntimeError if they differ or nothing was drafted.
        """
        drafter = DFlashDraftModel(drafter_config(self.spec))
        drafter.init_weights(4)
        drafter = drafter.to(self.device, self.dtype).eval().requires_grad_(False)
        found = self._compare_texts(drafter, "of a drafter", self.scale.num_with_drafter)
        if not found["num_drafted"]:
            raise RuntimeError("nothing was drafted: give the check longer texts")
        return found

    def _compare_texts(self, drafter: DFlashDraftModel | Literal["ngram"], what: str, num_new: int) -> dict[str, Any]:
        """Compare two texts of `num_new` tokens, greedy and sampled, with and without a drafter."""
        engine = Engine(
            self.weights, drafter, backend=self.backend_name, max_length=self.max_length, max_batch_size=self.num_rows
        )
        prompts = [self.ids[slot][: 3 + slot] * 2 for slot in range(2)]

        def texts() -> list[Any]:
            greedy = engine.generate(prompts, max_new_tokens=num_new, ignore_eos=True)
            return greedy + engine.generate(prompts, max_new_tokens=num_new, temperature=1.0, seed=3, ignore_eos=True)

        with_drafts = texts()
        engine.set_drafter(None)
        if [out.tokens for out in with_drafts] != [out.tokens for out in texts()]:
            raise RuntimeError(f"a text changes with drafts {what}")
        return {
            "num_tokens": sum(len(out.tokens) for out in with_drafts),
            "num_drafted": sum(out.stats.num_drafted for out in with_drafts),
            "num_accepted": sum(sum(out.stats.accepted_by_position) for out in with_drafts),
        }

    def _backend(self) -> Backend:
        return make_backend(self.backend_name, self.weights, None, self.num_rows, self.max_length)

    def _fill(self, backend: Backend) -> None:
        """Compute the context of every sequence."""
        places = [(slot, position) for slot, length in enumerate(self.lengths) for position in range(length)]
        tokens = [self.ids[slot][position] for slot, position in places]
        backend.step(Rows(tokens, [slot for slot, _ in places], [position for _, position in places]), [])

    def _next_rows(self, slots: Iterable[int]) -> Rows:
        """The next token of each sequence."""
        chosen = list(slots)
        positions = [self.lengths[slot] for slot in chosen]
        return Rows([self.ids[s][p] for s, p in zip(chosen, positions, strict=True)], chosen, positions)

    def _logits_of(self, backend: Backend, rows: Rows, place: int) -> torch.Tensor:
        return backend.step(rows, [place])[0][0].clone()


def row_error(found_RD: torch.Tensor, wanted_RD: torch.Tensor, chosen_R: torch.Tensor) -> float:
    """Largest error norm of a chosen row, relative to the wanted row's norm."""
    difference_RD = found_RD.float() - wanted_RD.float()
    ratio_R = difference_RD.norm(dim=-1) / wanted_RD.float().norm(dim=-1)
    return float(ratio_R[chosen_R].max())


def widened(weights: ModelWeights) -> ModelWeights:
    """The weights in float32; packed experts stay."""

    def wide(owner: Any) -> Any:
        plain = {name: value.float() for name, value in vars(owner).items() if isinstance(value, torch.Tensor)}
        return replace(owner, **plain)

    layers = [replace(layer, attention=wide(layer.attention), mlp=wide(layer.mlp)) for layer in weights.layers]
    return replace(wide(weights), layers=layers)


def copy_caches(oracle: ReferenceBackend, backend: Any) -> None:
    """Copy the oracle's keys and values to a GPU backend, rounded to its dtype."""
    for cache, wanted in zip(backend.memory.caches, oracle.caches, strict=True):
        both_SLGH = torch.cat([wanted.k_SLGH, wanted.v_SLGH], dim=-1)
        cache.copy_(both_SLGH[: cache.shape[1]].permute(2, 0, 1, 3))
