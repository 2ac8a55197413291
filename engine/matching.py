"""Which tokens may come next, in an answer that has a constraint."""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import llguidance
import numpy as np
import numpy.typing as npt

from engine.bounded import BoundedCache
from engine.config import ConstraintBackend
from engine.constraints import (
    ACCEPTOR_BYTES,
    ONE_SPACE,
    OUTLINES_IGNORES,
    SCHEMA_BYTES,
    Enforcement,
    choices_of,
    first_line,
    grammar_of,
    key_of,
    keywords_of,
    parse_schema,
)
from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint

Mask = npt.NDArray[np.int32]
_BITS = (1 << np.arange(32, dtype=np.uint32)).astype(np.uint32).view(np.int32)
"""Of a word of a mask, each alone."""


class Matcher(Protocol):
    """Where one answer stands in its constraint."""

    def fill(self, row: Mask, address: int) -> None:
        """Write one bit per token of the vocabulary: whether it may come next.

        Args:
            row: where to write.
            address: where `row` begins in memory.
        """
        ...

    def forced(self) -> Sequence[int]:
        """Return the tokens that have to come next, one behind the other; none where it may choose.

        They are those that `fill` would allow alone, one after the other.
        """
        ...

    def advance(self, token: int) -> bool:
        """Take the token that was chosen; False when it does not fit, or the library gave up."""
        ...

    def is_accepting(self) -> bool:
        """Return whether the answer may end here."""
        ...

    def is_finished(self) -> bool:
        """Return whether the answer has to end here."""
        ...


class ConstraintTooComplex(Exception):
    """The library cannot keep this constraint; the message never holds the constraint's text."""


class _LlguidanceMatcher:
    """Asks the library seldom: beside a small model each call is a good part of a step.

    Tokens that have to come are asked for once, need no mask, and are told to the library together
    once the last of them was taken.
    """

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._gave_up = False
        self._run: list[int] | None = None  # what has to come where the library stands, if asked
        self._num_taken = 0  # of the run

    @property
    def native(self) -> llguidance.LLMatcher | None:
        """The library's own matcher, for calls that take many; None where no mask is needed."""
        return None if self._run else self._matcher

    def fill(self, row: Mask, address: int) -> None:
        following = self.forced()
        if following:
            token = following[0]
            row.fill(0)
            row[token >> 5] = _BITS[token & 31]
            return
        self._matcher.unsafe_compute_mask_ptr(address, 4 * len(row))
        self.check(row)

    def check(self, row: Mask) -> None:
        """Allow everything in a row that was filled, if the library gave up."""
        if self._matcher.is_error():
            # A state too large to follow. The mask would allow the end alone, which is no answer:
            # leave the rest to validation.
            self._gave_up = True
            row.fill(-1)

    def forced(self) -> Sequence[int]:
        if self._gave_up:
            return ()
        if self._run is None:
            self._run = self._matcher.compute_ff_tokens()
        return self._run[self._num_taken :] if self._num_taken else self._run

    def advance(self, token: int) -> bool:
        if self._gave_up:
            return False
        run, num_taken = self._run, self._num_taken
        if not run:
            self._run = None
            return self._matcher.consume_token(token)
        if token == run[num_taken] and num_taken + 1 < len(run):
            self._num_taken += 1
            return True
        self._run, self._num_taken = None, 0
        return self._matcher.consume_tokens([*run[:num_taken], token])

    def is_accepting(self) -> bool:
        return not (self._gave_up or self._num_taken) and self._matcher.is_accepting()

    def is_finished(self) -> bool:
        return not (self._gave_up or self._num_taken) and self._matcher.is_stopped()


class _OutlinesMatcher:
    def __init__(self, guide: Any, eos_tokens: tuple[int, ...]) -> None:  # noqa: ANN401 -- untyped
        self._guide = guide
        self._eos = eos_tokens

    def fill(self, row: Mask, address: int) -> None:
        self._guide.write_mask_into(address, row.size, row.itemsize)
        accepting = self._guide.is_finished()
        for token in self._eos:
            bit = np.int32(np.uint32(1 << (token & 31)).astype(np.int32))
            row[token >> 5] = row[token >> 5] | bit if accepting else row[token >> 5] & ~bit

    def forced(self) -> Sequence[int]:
        return ()  # it would take listing all tokens that may come, at every step

    def advance(self, token: int) -> bool:
        if token in self._eos:
            return bool(self._guide.is_finished())
        try:
            self._guide.advance(token, return_tokens=False)
        except ValueError:
            return False
        return True

    def is_accepting(self) -> bool:
        return bool(self._guide.is_finished())

    def is_finished(self) -> bool:
        if not self._guide.is_finished():
            return False
        return set(self._guide.get_tokens()) <= set(self._eos)


class Allowed(NamedTuple):
    """What the matchers of a step allow.

    Attributes:
        words: one bit per token, a row for each of `open`.
        open: the places of those that allow more than one token, or where nobody asked.
        known: the token that has to come, by the place of its matcher.
    """

    words: Mask
    open: list[int]
    known: dict[int, int]


class Masks:
    """The masks of a step: a row of one bit per token for each sequence that may choose.

    They depend on tokens that are known before the model runs. Where the model runs on a device
    of its own they are filled meanwhile, by all cores; where it takes the processor itself they
    are filled at once, which costs less than handing them over.
    """

    def __init__(self, num_rows: int, num_words: int, *, is_beside: bool = False) -> None:
        """Make room.

        Args:
            num_rows: the most sequences of a step.
            num_words: how many 32-bit words hold one bit per token.
            is_beside: whether to fill masks in threads, while the caller does something else.
        """
        self._words = np.full((num_rows, num_words), -1, dtype=np.int32)
        self._rows = [(row, int(row.ctypes.data)) for row in self._words]
        self._thread: ThreadPoolExecutor | None = None
        self._cores: llguidance.LLExecutor | None = None
        if is_beside:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._cores = llguidance.LLExecutor()
        self._running: Future[None] | None = None
        self._open: list[int] = []
        self._known: dict[int, int] = {}

    def begin(self, matchers: Sequence[Matcher]) -> None:
        """Fill a row for each that may choose; nothing else may touch them until `take`."""
        self._wait()
        self._known = {}
        if self._thread is None or self._cores is None:
            self._open = []
            for place, matcher in enumerate(matchers):
                forced = matcher.forced()
                if forced:
                    self._known[place] = forced[0]
                else:
                    matcher.fill(*self._rows[len(self._open)])
                    self._open.append(place)
        else:
            # Whether there is a choice is not worth asking where the processor waits anyway.
            self._open = list(range(len(matchers)))
            if matchers:
                self._running = self._thread.submit(
                    self._fill_together, self._cores, list(matchers)
                )

    def take(self) -> Allowed:
        """Return what the matchers of the last `begin` allow."""
        self._wait()
        return Allowed(self._words[: len(self._open)], self._open, self._known)

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _fill_together(self, cores: llguidance.LLExecutor, matchers: list[Matcher]) -> None:
        together: list[tuple[llguidance.LLMatcher, int]] = []
        checked: list[tuple[_LlguidanceMatcher, int]] = []
        for place, matcher in enumerate(matchers):
            native = matcher.native if isinstance(matcher, _LlguidanceMatcher) else None
            if isinstance(matcher, _LlguidanceMatcher) and native is not None:
                together.append((native, place))
                checked.append((matcher, place))
            else:
                matcher.fill(*self._rows[place])
        if together:
            cores.unsafe_compute_mask_ptr(
                together, self._rows[0][1], 4 * self._words.shape[1], len(self._rows)
            )
        for matcher, place in checked:
            matcher.check(self._rows[place][0])


class TokenizerConstraints:
    """Makes matchers over one tokenizer's vocabulary; compiled constraints are kept for reuse."""

    def __init__(
        self,
        tokenizer: llguidance.LLTokenizer,
        *,
        backend: ConstraintBackend = "llguidance",
    ) -> None:
        """Take llguidance's view of the tokenizer, made for the width of the model's logits."""
        self._tokenizer = tokenizer
        self._backend = backend
        self._prototypes: BoundedCache[tuple[llguidance.LLMatcher, Enforcement]] = BoundedCache(
            max_entries=1024, max_bytes=128 << 20
        )
        self._indexes: BoundedCache[tuple[Any, Enforcement]] = BoundedCache(
            max_entries=64, max_bytes=64 << 20
        )
        self._vocabulary: Any = None

    @property
    def num_words(self) -> int:
        """How many 32-bit words hold one bit per token."""
        return (self._tokenizer.vocab_size + 31) // 32

    def matcher(self, constraint: Constraint) -> tuple[Matcher, Enforcement]:
        """Return a fresh matcher, and whether it keeps all of the constraint.

        Raises:
            ConstraintTooComplex: the library cannot keep it.
        """
        if self._backend == "outlines_core" and constraint.kind in (
            "json_schema",
            "regex",
            "choice",
        ):
            return self._outlines_matcher(constraint)
        key = key_of(constraint)
        found = self._prototypes.find(key)
        if found is None:
            found = self._prototypes.keep(
                key,
                self._compile(constraint),
                weight=16 * len(constraint.spec)
                + (SCHEMA_BYTES if constraint.kind.startswith("json") else ACCEPTOR_BYTES),
            )
        prototype, enforcement = found
        return _LlguidanceMatcher(prototype.deep_copy()), enforcement

    def _compile(self, constraint: Constraint) -> tuple[llguidance.LLMatcher, Enforcement]:
        enforcement: Enforcement = "enforced"
        try:
            matcher = self._new(grammar_of(constraint))
            if matcher.is_error() and constraint.kind == "json_schema":
                enforcement = "validated"
                matcher = self._new(grammar_of(constraint, lenient=True))
        except InvalidInput as error:
            raise ConstraintTooComplex(error.message) from None
        if matcher.is_error():
            raise ConstraintTooComplex(first_line(matcher.get_error()))
        return matcher, enforcement

    def _new(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)

    def _outlines_matcher(self, constraint: Constraint) -> tuple[Matcher, Enforcement]:
        import outlines_core  # noqa: PLC0415 -- an extra, and only where it was chosen

        key = key_of(constraint)
        found = self._indexes.find(key)
        if found is None:
            try:
                regex, enforcement = _regex_of(constraint)
                index = outlines_core.Index(regex, self._outlines_vocabulary())
            except (ValueError, TypeError, InvalidInput):
                raise ConstraintTooComplex("outlines_core refuses it") from None
            # It tells no size. What it is pickled as was measured to be about half of it: from ten
            # kilobytes to tens of megabytes for schemas of the same length.
            weight = 4096 + 2 * len(index.__reduce__()[1][0])
            found = self._indexes.keep(key, (index, enforcement), weight=weight)
        index, enforcement = found
        return _OutlinesMatcher(outlines_core.Guide(index), tuple(self._eos())), enforcement

    def _eos(self) -> list[int]:
        return list(self._tokenizer.eos_tokens)

    def _outlines_vocabulary(self) -> Any:  # noqa: ANN401 -- outlines_core has no types
        import outlines_core  # noqa: PLC0415

        if self._vocabulary is None:
            tokenizer, eos = self._tokenizer, set(self._eos())
            tokens: dict[bytes, list[int]] = {}
            for token in range(tokenizer.vocab_size):
                if token in eos or tokenizer.is_special_token(token):
                    continue
                spelled = tokenizer.decode_bytes([token])
                if spelled:
                    tokens.setdefault(spelled, []).append(token)
            self._vocabulary = outlines_core.Vocabulary(tokenizer.eos_token, tokens)
        return self._vocabulary


def _regex_of(constraint: Constraint) -> tuple[str, Enforcement]:
    if constraint.kind == "regex":
        return constraint.spec, "enforced"
    if constraint.kind == "choice":
        escaped: Callable[[str], str] = re.escape
        return "(" + "|".join(
            escaped(choice) for choice in choices_of(constraint)
        ) + ")", "enforced"
    from outlines_core.json_schema import build_regex_from_schema  # noqa: PLC0415

    schema = parse_schema(constraint.spec)
    ignored = not OUTLINES_IGNORES.isdisjoint(keywords_of(schema))
    regex = build_regex_from_schema(constraint.spec, whitespace_pattern=ONE_SPACE)
    return regex, "validated" if ignored else "enforced"
