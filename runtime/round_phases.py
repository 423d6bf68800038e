"""The phases of a step that decide: which token follows a row, what of a round stands, and what the next round tries.

    draft    (only with look-up, before `embed`) proposals from a sequence's own text, and the rows of this step
    sample   the token after each row
    accept   which drafts are the tokens chosen, what that commits, and, without `draft`, the rows of the next step

`draft` and `accept` have one item a sequence and take three things across steps, all of them in GPU memory: `rows`,
what a step computes; `sequences`, how far each sequence is and when it ends; `history`, its text. `accept` writes what
`draft`, or `embed`, of the next step reads, so that their waits reach over the step's end. A sequence that the host
decodes, one step a launch, has an empty record in `sequences`, and both phases leave its rows alone.

A sequence owns the same rows for the whole launch, used or not: where they lie does not depend on how many drafts other
sequences have. So fewer sequences share a launch than would if rows were dealt out every round.

Left out: a DFlash drafter's forward. Its proposals come from the host, and take a launch a step.
"""

from dataclasses import dataclass

from speedstack.runtime.plan import Axis, Buffer, Phase, Read, Region, Signal, Wait, Work

RECORD_BYTES = 32  # of a row, and of a sequence
WIDE_BYTES = 4  # tokens, logits
OWN_ROWS = "every row belongs to one sequence, and its fields of sequences to the one of that index"
OWN_TEXT = "every sequence has a slot of its own"


@dataclass(frozen=True)
class RoundPhases:
    """Builds them for steps of up to `rows` rows. has_look_up: see the module."""

    num_programs: int
    rows: int
    max_context: int
    has_look_up: bool

    def buffers(self) -> list[Buffer]:
        """Those that no other phase writes."""
        R = self.rows
        buffers = [
            Buffer("rows", R, RECORD_BYTES),
            Buffer("sequences", R, RECORD_BYTES),
            Buffer("chosen", R, WIDE_BYTES),
            Buffer("outcome", R, 2 * WIDE_BYTES),  # for the host: rows of a sequence, and how many drafts stand
        ]
        if self.has_look_up:
            buffers.append(Buffer("history", R, self.max_context * WIDE_BYTES))
        return buffers

    def read_rows(self, region: Region | None = None) -> Read:
        """What a phase between `draft` and `accept` knows about the rows of its step."""
        last = ("draft", 0) if self.has_look_up else ("accept", 1)
        return Read(self._whole("rows") if region is None else region, *last)

    def begins_with(self) -> Wait:
        """What `embed` waits for: the rows of its step are known."""
        return self._all_programs("draft") if self.has_look_up else self._after_last_step()

    def draft(self) -> Phase:
        return self._of_sequences(
            "draft",
            reads=(Read(_own("sequences"), "accept", 1), Read(self._whole("history", OWN_TEXT), None)),
            writes=(self._whole("rows", OWN_ROWS),),
            wait=self._after_last_step(),
            work=Work(activation_bytes=2 * RECORD_BYTES),
        )

    def sample(self, vocab_size: int, num_tiles: int) -> Phase:
        return Phase(
            "sample",
            "sample",
            (Axis("row", self.rows, is_dynamic=True),),
            reads=(
                self.read_rows(_own("rows")),
                Read(Region("logits", vocab_size), "lm_head"),
                Read(Region("best", num_tiles), "lm_head"),
            ),
            writes=(_own("chosen"),),
            waits=(self._all_programs("lm_head"),),
            signals=(Signal("sample", "program"),),
            work=Work(activation_bytes=vocab_size * WIDE_BYTES),
        )

    def accept(self) -> Phase:
        rows = self._whole("rows") if self.has_look_up else self._whole("rows", OWN_ROWS)
        writes = [_own("sequences"), _own("outcome")]
        writes.append(self._whole("history", OWN_TEXT) if self.has_look_up else rows)
        return self._of_sequences(
            "accept",
            reads=(
                self.read_rows(rows),
                Read(_own("sequences"), "accept", 1),
                Read(self._whole("chosen"), "sample"),
            ),
            writes=tuple(writes),
            wait=self._all_programs("sample"),
            work=Work(activation_bytes=2 * RECORD_BYTES + 4 * WIDE_BYTES),
        )

    def _of_sequences(
        self, name: str, reads: tuple[Read, ...], writes: tuple[Region, ...], wait: Wait, work: Work
    ) -> Phase:
        axes = (Axis("sequence", self.rows),)  # all of them: one that is over says so to the host
        return Phase(name, name, axes, None, 0, reads, writes, (wait,), (Signal(name, "program"),), work)

    def _whole(self, buffer: str, exclusive: str = "") -> Region:
        return Region(buffer, self.rows, exclusive=exclusive)

    def _all_programs(self, phase: str) -> Wait:
        return Wait(phase, self.num_programs, self.num_programs)

    def _after_last_step(self) -> Wait:
        return Wait("accept", self.num_programs, 0)


def _own(buffer: str) -> Region:
    """The cell of the item's row, or of its sequence."""
    return Region(buffer, 1, 0, (1,))
