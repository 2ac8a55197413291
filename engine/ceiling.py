"""How much a step may have after the device ran out of memory in one."""

_FLOOR_TOKENS = 16
"""A step of so few tokens with one sequence needs about what the weights themselves need."""
_FIRST_PATIENCE, _MAX_PATIENCE = 64, 1 << 14


class Ceiling:
    """Bounds on sequences and tokens of a step: halved at once, doubled after many that went well.

    They hold for what was asked for too: the alternative is no answer at all. Steps that fail
    after the bounds rose make the next rise wait twice as long, so that a device whose memory
    somebody else took is used again when it is free, and trying costs next to nothing when it
    never is.
    """

    def __init__(self) -> None:
        """Begin without bounds."""
        self.slots: int | None = None
        self.batch_tokens: int | None = None
        self.num_shrinks = 0
        self._quiet = 0
        self._patience = _FIRST_PATIENCE

    def shrink(self, *, num_rows: int, num_tokens: int) -> bool:
        """Take in a step for which there was no memory; return whether a smaller one may do.

        Args:
            num_rows: its sequences.
            num_tokens: its tokens, those of prompts too.
        """
        prompts_dominate = num_tokens > max(2 * num_rows, _FLOOR_TOKENS)
        if num_rows <= 1 and not prompts_dominate:
            # Whatever the others need is less: it is this sequence that is too large.
            self._clear()
            return False
        self.num_shrinks += 1
        if self._quiet and self.slots is not None:
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        self._quiet = 0
        self.slots = max(1, num_rows if prompts_dominate else num_rows // 2)
        self.batch_tokens = max(_FLOOR_TOKENS, num_tokens // 2 if prompts_dominate else num_tokens)
        return True

    def note_step(self, *, most_slots: int, most_tokens: int) -> None:
        """Take in a step that went well.

        Args:
            most_slots: what there would be without bounds; the same for `most_tokens`.
        """
        if self.slots is None or self.batch_tokens is None:
            return
        self._quiet += 1
        if self._quiet < self._patience:
            return
        self._quiet = 1
        self.slots, self.batch_tokens = 2 * self.slots, 2 * self.batch_tokens
        if self.slots >= most_slots and self.batch_tokens >= most_tokens:
            self._clear()

    def _clear(self) -> None:
        self.slots = self.batch_tokens = None
