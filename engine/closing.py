"""Ends a constrained answer where its constraint allows before its tokens run out.

A model that rambles inside a string or a list runs into `max_tokens`, and what was cut off there
fits nothing. So the shortest ending of the answer is kept in sight: once what is left is less
than twice as long, strings and lists are closed as soon as they may be, and no token is taken
after which the ending no longer fits. What the model may still decide (a number, one of some
values, a field that has to come) it decides. Such an answer has finish_reason "length".

Endings are found over bytes, with a matcher of their own: a mask over 256 bytes costs a few
microseconds whatever the vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import llguidance

from engine.bounded import BoundedCache
from engine.constraints import Enforcement, byte_tokenizer, grammar_of, key_of
from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint

_FIRST_LOOK, _EARLY_LOOK = 0.5, 0.75
"""Of the tokens left when an ending is looked for first: most answers have ended by then. Early for
a constraint that may take long to end."""
_LONG = 2
"""Bytes of a constraint for each token of the answer that make its ending long. A schema says of a
field much more than the shortest answer does: some ten bytes for a token."""
_LENGTHENING = re.compile(r'"(?:min(?:Items|Length|Properties|Contains)|\$ref|\$dynamicRef)"')
"""What makes the shortest answer longer than what is said about it."""
_FEW = 32
"""Tokens for an answer with which it is looked for at once."""
_NEAR = 8
"""Tokens above the border at which every single token is looked at."""
_MAX_STEPS = 2_000
"""Bytes and turns of one search; some milliseconds."""
_MAX_DEAD_ENDS = 16
"""Of one search at one depth, and one more for each eight bytes that it gets farther: what is wrong
is most often the depth, not the letters."""
_MAX_FAILURES = 3
"""Searches that found nothing before an answer is left alone."""
_MATCHER_BYTES = 160 * 1024
_BYTES_PER_TOKEN = 16
_JOINTS, _MAX_JOINTS = b'",]}', 8
_EXTRA_LEVELS = (0, 1, 2, 4, 8, 32)
"""How much deeper than now an ending may nest, tried in this order."""

_QUOTE, _BACKSLASH, _SPACE = b'"'[0], b"\\"[0], b" "[0]
_OPEN, _CLOSED, _CLOSERS = b"[{", b"]}", (b'"', b"]", b"}")
_BEGINNERS = b"[{,"
"""After one of them outside of strings more may have to come than before."""
_IN_VALUE = b'}],:n0123456789tf"[{-.eE+'
_STRUCTURAL = sum(1 << byte for byte in b'}],n"[{tf')
_IN_WORD = b"@.:-/_TZP+0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TAILS = (b'"', b'a"', b'0"', b'.aa"', b'a.aa"', b'@a.aa"', b'a@a.aa"', b'://a.aa"')
"""Ends of strings to try before going byte by byte."""
_MANY_BYTES = 24
_IN_TEXT = b"abcdefghijklmnopqrstuvwxyz0123456789"


class _Place:
    """Where in a JSON text a byte stands; for a text of another kind always inside a string."""

    __slots__ = ("in_string", "is_escaped", "is_json", "level")

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self.in_string = not is_json
        self.is_escaped = False
        self.level = 0

    def copy(self) -> "_Place":
        made = _Place(is_json=self.is_json)
        made.in_string, made.is_escaped, made.level = self.in_string, self.is_escaped, self.level
        return made

    def advance(self, text: bytes) -> int:
        """Move over `text`; return the deepest level on the way."""
        deepest = self.level
        if not self.is_json:
            return deepest
        for byte in text:
            if self.in_string:
                if self.is_escaped:
                    self.is_escaped = False
                elif byte == _BACKSLASH:
                    self.is_escaped = True
                elif byte == _QUOTE:
                    self.in_string = False
            elif byte == _QUOTE:
                self.in_string = True
            elif byte in _OPEN:
                self.level += 1
                deepest = max(deepest, self.level)
            elif byte in _CLOSED:
                self.level -= 1
        return deepest

    def begins_something(self, text: bytes) -> bool:
        """Return whether `text` begins a value or a field outside of strings."""
        if not self.is_json or not any(byte in _BEGINNERS for byte in text):
            return False
        walked = self.copy()
        for byte in text:
            if not walked.in_string and byte in _BEGINNERS:
                return True
            walked.advance(bytes((byte,)))
        return False


class _Walk:
    """One way after another from where a matcher stands, none of them nested too deep."""

    def __init__(self, matcher: llguidance.LLMatcher, place: _Place, *, max_level: int) -> None:
        self._matcher = matcher
        self._place = place.copy()
        self._max_level = max_level
        # How often a byte was tried for a set of bytes that may follow: in a string or a number
        # the same set is the same place in its pattern, as far as can be seen, so they take turns.
        self._tried: dict[int, dict[int, int]] = {}
        self._turns: list[tuple[int, _Place, Iterator[int]]] = []
        self.said = bytearray()
        self.num_dead_ends = 0

    def go_on(self) -> bool:
        """Say what has to follow, or one byte of what may; False at a dead end."""
        forced = self._matcher.compute_ff_bytes()
        if forced and self._matcher.consume_tokens(list(forced)):
            self.said += forced
            return self._place.advance(forced) <= self._max_level
        if self._end_string():
            return True
        self._turns.append((len(self.said), self._place, self._candidates(self._place)))
        return self._turn()

    def _end_string(self) -> bool:
        """Say the rest of a string where it may be a usual one; many patterns are of an address."""
        if not (self._place.is_json and self._place.in_string) or self._place.is_escaped:
            return False
        if self._mask().bit_count() < _MANY_BYTES:
            return False  # perhaps one of a few values, of which another leads out of here
        for tail in _TAILS:
            num_taken = self._matcher.try_consume_tokens(list(tail))
            if num_taken == len(tail):
                self.said += tail
                self._place = self._place.copy()
                self._place.advance(tail)
                return True
            self._matcher.rollback(num_taken)
        return False

    def go_back(self) -> bool:
        """Go another way from the last place where there is one; False where there is none."""
        self.num_dead_ends += 1
        while self._turns:
            if self._turn():
                return True
            self._turns.pop()
            self.num_dead_ends += 1
        return False

    def leave(self) -> None:
        """Put the matcher back to where it stood."""
        if self.said:
            self._matcher.rollback(len(self.said))

    def _turn(self) -> bool:
        length, at, candidates = self._turns[-1]
        if len(self.said) > length:
            self._matcher.rollback(len(self.said) - length)
            del self.said[length:]
        for byte in candidates:
            place = at.copy()
            is_shallow = place.advance(bytes((byte,))) <= self._max_level
            if is_shallow and self._matcher.consume_token(byte):
                self.said.append(byte)
                self._place = place
                return True
        return False

    def _mask(self) -> int:
        """Return one bit for each byte: whether it may follow."""
        return int.from_bytes(self._matcher.compute_bitmask()[:32], "little")

    def _candidates(self, place: _Place) -> Iterator[int]:
        mask = self._mask()
        if place.is_json and place.in_string and not place.is_escaped and mask >> _QUOTE & 1:
            yield _QUOTE
            if mask >> _SPACE & 1:
                return  # more of a text never leads anywhere else
        order = _IN_VALUE
        if place.in_string:
            order = _IN_TEXT if mask >> _SPACE & 1 else _IN_WORD
        ranked = [byte for byte in order if mask >> byte & 1]
        if not ranked or place.in_string:
            known = {*ranked, _BACKSLASH}
            ranked += [byte for byte in range(256) if mask >> byte & 1 and byte not in known]
            ranked += [_BACKSLASH] if mask >> _BACKSLASH & 1 else []
        counts = self._tried.setdefault(mask, {})
        if place.in_string:
            ranked.sort(key=lambda byte: counts.get(byte, 0))
        elif not mask & _STRUCTURAL:
            # A multiple of a thousand ends in three zeros.
            ranked.sort(key=lambda byte: counts.get(byte, 0) // 3)
        for byte in ranked:
            counts[byte] = counts.get(byte, 0) + 1
            yield byte


def _search(matcher: llguidance.LLMatcher, place: _Place, *, max_bytes: int) -> bytes | None:
    """Return a short ending, or None; leaves the matcher as it was.

    Goes depth first, and not much deeper than the answer is nested already.
    """
    num_steps = 0
    for levels in _EXTRA_LEVELS if place.is_json else _EXTRA_LEVELS[:1]:
        walk = _Walk(matcher, place, max_level=place.level + levels)
        farthest = 0
        while num_steps < _MAX_STEPS and walk.num_dead_ends < _MAX_DEAD_ENDS + farthest // 8:
            num_steps += 1
            if matcher.is_accepting():
                walk.leave()
                return bytes(walk.said)
            farthest = max(farthest, len(walk.said))
            goes = len(walk.said) <= max_bytes and walk.go_on()
            if not goes and not walk.go_back():
                break
        walk.leave()
    return None


def _joints(ending: bytes) -> Iterator[int]:
    """Yield where an ending may go on when something else was said than its beginning."""
    yield 0
    num_found = 0
    for place in range(1, len(ending)):
        if ending[place] in _JOINTS:
            yield place
            num_found += 1
            if num_found == _MAX_JOINTS:
                return


def _ending(
    matcher: llguidance.LLMatcher, place: _Place, *, known: bytes | None, num_left: int
) -> bytes | None:
    """Return what of `known` ends the answer from here too, else what a search finds."""
    for start in _joints(known or b""):
        rest = list(known[start:]) if known else []
        num_taken = matcher.try_consume_tokens(rest)
        ends = num_taken == len(rest) and matcher.is_accepting()
        matcher.rollback(num_taken)
        if ends:
            return bytes(rest)
    return _search(matcher, place, max_bytes=_BYTES_PER_TOKEN * num_left)


class Closing:
    """Watches one answer and ends it in time."""

    def __init__(
        self,
        compile_: Callable[[], llguidance.LLMatcher | None],
        tokenizer: llguidance.LLTokenizer,
        constraint: Constraint,
    ) -> None:
        """Do nothing until it may be needed.

        Args:
            compile_: makes a matcher over bytes that nobody else moves, where there can be one.
            tokenizer: the model's.
            constraint: what `compile_` compiles.
        """
        self._compile = compile_
        self._matcher: llguidance.LLMatcher | None = None
        self._tokenizer = tokenizer
        self._eos = frozenset(tokenizer.eos_tokens)
        self._constraint = constraint
        self._place = _Place(is_json=constraint.kind.startswith("json"))
        self._num_seen = 0
        self._ending: bytes | None = None
        self._num_failures = 0
        self._look_at: int | None = None
        self._first_look = 0
        self.has_cut = False
        """Whether a token was taken that the model had not chosen."""

    def choose(self, said: Sequence[int], token: int, *, num_left: int) -> int:
        """Return the token to take instead of `token`, or that one where there is time for it.

        Args:
            said: the tokens before it.
            num_left: how many tokens may still be said, this one included.
        """
        if self._look_at is None:
            self._look_at = self._first_look = self._first(num_left + len(said))
        if num_left > self._first_look or token in self._eos:
            return token
        if num_left > self._look_at:
            return self._watch_beginning(said, token, num_left)
        ending = self._look(said, num_left)
        tokens = None if ending is None else self._spell(ending)
        if ending is None or tokens is None:
            return token
        above = num_left - 2 * len(tokens)
        if above > _NEAR:
            # What the model opens before the next look makes the ending longer.
            self._look_at = num_left - above // 4
            return self._watch_beginning(said, token, num_left)
        text = self._tokenizer.decode_bytes([token])
        closes = self._place.is_json and ending[:1] in _CLOSERS
        if (above > 0 or not closes or text[:1] == ending[:1]) and self._fits(text, num_left - 1):
            return token
        self.has_cut = True
        return tokens[0] if tokens else self._tokenizer.eos_token

    def _first(self, max_tokens: int) -> int:
        """Return how many tokens are left when an ending is looked for first."""
        if max_tokens <= _FEW:
            return max_tokens
        spec = self._constraint.spec
        is_long = len(spec) > _LONG * max_tokens or _LENGTHENING.search(spec)
        return int((_EARLY_LOOK if is_long else _FIRST_LOOK) * max_tokens)

    def _watch_beginning(self, said: Sequence[int], token: int, num_left: int) -> int:
        """Return the token to take between two looks.

        One item more of a list may have to hold more than there is time for, however short the
        ending is before it.
        """
        text = self._tokenizer.decode_bytes([token])
        if not any(byte in _BEGINNERS for byte in text) or not self._follow(said):
            return token
        if not self._place.begins_something(text):
            return token
        matcher = self._matcher
        after = self._tokens_after(text, num_left - 1)
        if after is None or matcher is None:
            return token  # nobody knows
        if len(after) < num_left:
            self._look_at = max(self._look_at or 0, min(num_left - 1, 2 * len(after) + _NEAR))
            return token
        ending = _ending(matcher, self._place, known=None, num_left=num_left)
        tokens = None if ending is None else self._spell(ending)
        if tokens is None or len(tokens) > num_left:
            return token
        self.has_cut = True
        return tokens[0] if tokens else self._tokenizer.eos_token

    def _follow(self, said: Sequence[int]) -> bool:
        """Move to the end of what was said; return whether that is known to be a place."""
        if self._num_failures >= _MAX_FAILURES:
            return False
        if self._matcher is None:
            self._matcher = self._compile()
        fresh = self._tokenizer.decode_bytes(list(said[self._num_seen :]))
        self._num_seen = len(said)
        if self._matcher is None or not self._matcher.consume_tokens(list(fresh)):
            self._num_failures = _MAX_FAILURES
            return False
        self._place.advance(fresh)
        if self._ending is not None:
            self._ending = self._ending[len(fresh) :] if self._ending.startswith(fresh) else None
        return True

    def _look(self, said: Sequence[int], num_left: int) -> bytes | None:
        """Return a short ending of what was said so far, or None."""
        known = self._ending
        if not self._follow(said) or self._matcher is None:
            return None
        if self._ending is None:
            self._ending = _ending(self._matcher, self._place, known=known, num_left=num_left)
        if self._ending is None:
            self._num_failures += 1
            self._look_at = num_left * 3 // 4
        return self._ending

    def _fits(self, text: bytes, num_left: int) -> bool:
        """Return whether the answer still ends within `num_left` tokens after `text`."""
        if self._ending is not None and self._ending.startswith(text):
            return True
        tokens = self._tokens_after(text, num_left)
        return tokens is not None and len(tokens) <= num_left

    def _tokens_after(self, text: bytes, num_left: int) -> list[int] | None:
        """Return what ends the answer after `text`, or None where nothing is found."""
        place = self._place.copy()
        place.advance(text)
        if self._matcher is None:
            return None
        matcher = self._matcher.deep_copy()
        if not matcher.consume_tokens(list(text)):
            return None
        ending = _ending(matcher, place, known=self._ending, num_left=num_left)
        return None if ending is None else self._spell(ending)

    def _spell(self, text: bytes) -> list[int] | None:
        """Return the tokens of `text`, or None where the tokenizer makes something else of it."""
        tokens = self._tokenizer.tokenize_bytes(text)
        return tokens if self._tokenizer.decode_bytes(tokens) == text else None


class Closings:
    """Makes what ends answers over one tokenizer; compiled constraints are kept for reuse."""

    def __init__(self, tokenizer: llguidance.LLTokenizer) -> None:
        """Take llguidance's view of the model's tokenizer."""
        self._tokenizer = tokenizer
        self._prototypes: BoundedCache[llguidance.LLMatcher] = BoundedCache(
            max_entries=256, max_bytes=32 << 20
        )

    def open(self, constraint: Constraint, enforcement: Enforcement) -> Closing:
        """Return what ends one answer in time.

        Args:
            enforcement: how the answer's own matcher keeps the constraint.
        """
        return Closing(
            partial(self._compile, constraint, is_lenient=enforcement != "enforced"),
            self._tokenizer,
            constraint,
        )

    def _compile(self, constraint: Constraint, *, is_lenient: bool) -> llguidance.LLMatcher | None:
        key = key_of(constraint)
        prototype = self._prototypes.find(key)
        if prototype is None:
            try:
                grammar = grammar_of(constraint, lenient=is_lenient)
            except InvalidInput:
                return None
            prototype = llguidance.LLMatcher(byte_tokenizer(), grammar, log_level=0)
            self._prototypes.keep(key, prototype, weight=16 * len(constraint.spec) + _MATCHER_BYTES)
        return None if prototype.is_error() else prototype.deep_copy()
