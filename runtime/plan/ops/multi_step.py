"""The phases of a step that decide: which token follows a row, what of a round stands, and what the next round tries.

    draft    (only with prompt lookup, before `embed`) proposals from a sequence's own text
    embed    (in `phases`) allocates the rows of the step to the sequences, see below
    logit_histogram    how the tokens of rows with top-k or top-p are spread over bins of logits; nothing for other rows
    sample   the token after each row, out of what `lm_head` and `logit_histogram` have left
    accept   which drafts are the tokens chosen, and what that commits

`draft` and `accept` have one item a sequence and take two things across steps, both in GPU memory: `sequences`, how far
each sequence is and when it ends; `history`, its text. `accept` writes what `draft`, or `embed`, of the next step
reads, so that their waits reach over the step's end. A sequence that the host decodes, one step a launch, has an empty
record in `sequences`; both phases leave it alone, and `embed` takes the rows that the host has named.

Which rows a sequence has depends on what was proposed for all of them (`allocate_rows`), so that somebody has to see
all proposals before anybody knows a row. That is `embed`: it has to wait for every proposal anyway, and an item of it
works out, from one number a sequence, whose row it is, writes that row's record and embeds its token. A phase that only
allocates would be one more synchronization of programs in every step, and readers that each allocated for themselves
would do so in every layer. No item writes another's record, so that nothing here rests on how rows are shared out.

`proposals` says for each sequence how many tokens to try and which (`records`): whatever writes it before `embed`,
which has to wait for that, is a drafter.

A launch is over when no sequence is left. Every program finds that out where the step's first phase has waited for the
last round's `accept` (`Phase.early_exit`): all of them see the same records there, which are not written before all of
them have gone on, and leave before the step has begun.

The drafter itself is in `drafter_phases`.
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
    """Builds them for steps of up to `rows` rows. has_prompt_lookup, has_drafter: who drafts, see the module."""

    num_programs: int
    rows: int
    max_context: int
    has_prompt_lookup: bool
    has_drafter: bool = False

    def buffers(self) -> list[Buffer]:
        """Those that no other phase writes."""
        R = self.rows
        buffers = [
            Buffer("rows", R, RECORD_BYTES),
            Buffer("sequences", R, RECORD_BYTES),
            Buffer("chosen", R, WIDE_BYTES),
            Buffer("bins", R, 2 * NUM_BINS * SUM_BYTES),  # masses, and numbers of tokens
            Buffer("outcome", R, OUTCOME * WIDE_BYTES),
        ]
        if self.proposer is not None:
            buffers.append(Buffer("proposals", R, R * WIDE_BYTES))
        if self.has_prompt_lookup:
            buffers.append(Buffer("history", R, self.max_context * WIDE_BYTES))
        return buffers

    @property
    def proposer(self) -> str | None:
        """The phase that writes proposals, if any does."""
        return "draft" if self.has_prompt_lookup else "pick" if self.has_drafter else None

    def opening(self) -> tuple[Read, Wait]:
        """What a step's first phase reads, also to learn that all are over, and what it waits for."""
        return self._early_exit(), self._after_last_step()

    def first_phases(self) -> list[Phase]:
        """What comes before `embed`, but for a drafter's."""
        return [self._draft()] if self.has_prompt_lookup else []

    def row_allocation(self) -> tuple[tuple[Read, ...], tuple[Region, ...], Wait, Read | None]:
        """What `embed` reads to allocate rows, what of each it writes, what it waits for; what says that all are over.

        It empties the row's bins too, long before `logit_histogram` adds to them.
        """
        own = _own("rows")
        reads = (Read(self._whole("sequences"), "accept", 1), Read(own, None))  # the host's, where it named them
        if self.proposer is not None:
            read = Read(self._whole("proposals"), self.proposer)
            return (*reads, read), (own, _own("bins")), self._all_programs(self.proposer), None
        return reads, (own, _own("bins")), self._after_last_step(), self._early_exit()

    def read_rows(self, region: Region | None = None) -> Read:
        """What a phase behind `embed` knows about the rows of its step."""
        return Read(self._whole("rows") if region is None else region, "embed")

    def choosing(self, vocab_size: int, num_tiles: int) -> tuple[list[Buffer], list[Phase]]:
        """The phases that choose tokens out of what `lm_head` has left in so many tiles, and their own buffers."""
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
            work=Work(activation_bytes=num_tiles * 2 * WIDE_BYTES),  # of a row without top-k and top-p
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
            (Axis("sequence", self.rows),),  # all of them: one that is over says so to the host
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
            # The text once: what runs of other sizes read lies in the L1 cache by then.
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
    """The cell of the item's row, or of its sequence."""
    return Region(buffer, 1, 0, (1,))
