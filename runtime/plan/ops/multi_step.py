"""The phases that choose tokens, accept drafts and propose new ones.

    draft            (with prompt lookup, before `embed`) proposals from a sequence's own text
    embed            (in `plan/ops/layers.py`) allocates the step's rows to sequences
    logit_histogram  counts and masses per logit bin, for rows with top-k or top-p
    sample           the token after each row, from `lm_head` and `logit_histogram`
    accept           which drafts equal the chosen tokens, and what is committed

`draft` and `accept` have one item per sequence and share two buffers across steps: `sequences` (progress and limits)
and `history` (texts). `accept` writes what the next step's `draft` or `embed` reads, so their waits cross steps. A
sequence decoded by the host has an empty record in `sequences`, and `embed` takes the rows the host named.

A sequence's rows depend on all proposals (`allocate_rows`). `embed` waits for all proposals anyway, so each of its
items computes its own row's owner, writes that row's record and embeds its token. A separate phase would add a
synchronization to every step. No item writes another's record, so the proof does not depend on the allocation.

`proposals` holds each sequence's number of drafts and their tokens (`plan/record_layout.py`), written by a drafter
(`plan/ops/drafter.py`) before `embed`.

A launch ends when no sequence is left. Every program learns this after the first phase's wait for the last `accept`
(`Phase.early_exit`): all read the same records, which nobody overwrites before all have read them, and all leave before
the step begins.
"""

from dataclasses import dataclass

from speedstack.runtime.plan.ir import Axis, Buffer, Phase, Read, Region, Signal, Wait, Work
from speedstack.runtime.plan.record_layout import OUTCOME
from speedstack.runtime.plan.tiling import ceil_div
from speedstack.runtime.rounds.histogram import NUM_BINS

RECORD_BYTES = 32  # of a row, and of a sequence
WIDE_BYTES = 4  # tokens, logits
ELEMENT_BYTES = 2  # activations and cache: bf16
SUM_BYTES = 8  # masses
OWN_TEXT = "every sequence has a slot of its own"
SUMS = "items add integers to them, each addition atomic: the sums are the same in any order"


@dataclass(frozen=True)
class MultiStepOps:
    """Builds these phases for steps of up to `rows` rows. has_prompt_lookup, has_drafter: who drafts."""

    num_programs: int
    rows: int
    max_context: int
    has_prompt_lookup: bool
    has_drafter: bool = False

    def buffers(self) -> list[Buffer]:
        """The buffers that no other phase writes."""
        R = self.rows
        buffers = [
            Buffer("rows", R, RECORD_BYTES),
            Buffer("sequences", R, RECORD_BYTES),
            Buffer("chosen", R, WIDE_BYTES),
            Buffer("bins", R, 2 * NUM_BINS * SUM_BYTES),  # masses and token counts
            Buffer("outcome", R, OUTCOME * WIDE_BYTES),
        ]
        if self.proposer is not None:
            buffers.append(Buffer("proposals", R, R * WIDE_BYTES))
        if self.has_prompt_lookup:
            buffers.append(Buffer("history", R, self.max_context * WIDE_BYTES))
        return buffers

    @property
    def proposer(self) -> str | None:
        """The phase that writes proposals, None without one."""
        return "draft" if self.has_prompt_lookup else "pick" if self.has_drafter else None

    def opening(self) -> tuple[Read, Wait]:
        """The first phase's read, which also tells that all sequences are finished, and its wait."""
        return self._early_exit(), self._after_last_step()

    def first_phases(self) -> list[Phase]:
        """The phases before `embed`, except a drafter's."""
        return [self._draft()] if self.has_prompt_lookup else []

    def row_allocation(self) -> tuple[tuple[Read, ...], tuple[Region, ...], Wait, Read | None]:
        """The reads, own writes and wait of `embed`, and the read that tells that all sequences are finished.

        `embed` also clears its row's bins, long before `logit_histogram` adds to them.
        """
        own = _own("rows")
        reads = (Read(self._whole("sequences"), "accept", 1), Read(own, None))  # rows that the host named
        if self.proposer is not None:
            read = Read(self._whole("proposals"), self.proposer)
            return (*reads, read), (own, _own("bins")), self._all_programs(self.proposer), None
        return reads, (own, _own("bins")), self._after_last_step(), self._early_exit()

    def read_rows(self, region: Region | None = None) -> Read:
        """The row records, for a phase after `embed`."""
        return Read(self._whole("rows") if region is None else region, "embed")

    def choosing(self, vocab_size: int, num_tiles: int) -> tuple[list[Buffer], list[Phase]]:
        """The phases that choose tokens from `num_tiles` tiles of logits, and their buffers."""
        R, own = self.rows, self.read_rows(_own("rows"))
        slice_size = ceil_div(vocab_size, self.num_programs)
        num_slices = ceil_div(vocab_size, slice_size)
        buffers = [
            Buffer("chains", R * num_slices, (NUM_BINS + slice_size) * WIDE_BYTES),
            Buffer("notes", R, (2 * vocab_size + num_tiles) * WIDE_BYTES),
        ]
        peaks = Read(Region("peaks", num_tiles), "lm_head")
        sums = Region("bins", 1, 0, (1, 0), SUMS)
        logit_histogram = Phase(
            "logit_histogram",
            "logit_histogram",
            (Axis("row", R, is_dynamic=True), Axis("slice", num_slices)),
            tile=slice_size,
            reads=(
                self.read_rows(Region("rows", 1, 0, (1, 0))),
                peaks,
                Read(Region("logits", slice_size, 0, (0, slice_size)), "lm_head"),
                Read(sums, "embed"),
            ),
            writes=(sums, Region("chains", 1, 0, (num_slices, 1))),
            waits=(self._all_programs("lm_head"),),
            signals=(Signal("logit_histogram", "program"),),
        )
        sample = Phase(
            "sample",
            "sample",
            (Axis("row", R, is_dynamic=True),),
            reads=(
                own,
                peaks,
                Read(Region("logits", vocab_size), "lm_head"),
                Read(Region("best", num_tiles), "lm_head"),
                Read(_own("bins"), "logit_histogram"),
                Read(Region("chains", num_slices, 0, (num_slices,)), "logit_histogram"),
            ),
            writes=(_own("chosen"), _own("notes")),
            waits=(self._all_programs("logit_histogram"),),
            signals=(Signal("sample", "program"),),
            work=Work(activation_bytes=num_tiles * 2 * WIDE_BYTES),  # for a row without top-k and top-p
        )
        return buffers, [logit_histogram, sample]

    def accept(self) -> Phase:
        reads = [self.read_rows(), Read(_own("sequences"), "accept", 1), Read(self._whole("chosen"), "sample")]
        writes = [_own("sequences"), _own("outcome")]
        if self.proposer is not None:
            reads.append(Read(_own("proposals"), self.proposer))
        if self.has_prompt_lookup:
            writes.append(self._whole("history", OWN_TEXT))
        return Phase(
            "accept",
            "accept",
            (Axis("sequence", self.rows),),  # all: one that is finished must tell the host
            reads=tuple(reads),
            writes=tuple(writes),
            waits=(self._all_programs("sample"),),
            signals=(Signal("accept", "program"),),
            work=Work(activation_bytes=2 * RECORD_BYTES + 4 * WIDE_BYTES),
        )

    def _draft(self) -> Phase:
        return Phase(
            "draft",
            "draft",
            (Axis("sequence", self.rows, is_dynamic=True),),
            reads=(Read(_own("sequences"), "accept", 1), Read(self._whole("history", OWN_TEXT), None)),
            writes=(_own("proposals"),),
            waits=(self._after_last_step(),),
            signals=(Signal("draft", "program"),),
            # The text is counted once: later run sizes read it from L1.
            work=Work(kv_bytes=WIDE_BYTES, activation_bytes=RECORD_BYTES + self.rows * WIDE_BYTES),
            early_exit=self._early_exit(),
        )

    def _early_exit(self) -> Read:
        return Read(self._whole("sequences"), "accept", 1)

    def _whole(self, buffer: str, exclusive: str = "") -> Region:
        return Region(buffer, self.rows, exclusive=exclusive)

    def _all_programs(self, phase: str) -> Wait:
        return Wait(phase, self.num_programs, self.num_programs)

    def _after_last_step(self) -> Wait:
        return Wait("accept", self.num_programs, 0)


def _own(buffer: str) -> Region:
    """The cell of the item's row or sequence."""
    return Region(buffer, 1, 0, (1,))
