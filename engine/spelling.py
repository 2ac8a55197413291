"""From token ids back to text: whole answers, and stop strings as they appear."""

from collections.abc import Sequence

from engine.chat import ChatTokenizer


def decode(tokenizer: ChatTokenizer, said: Sequence[int], *, keeps_marks: bool = False) -> str:
    """Return the text of an answer, without special tokens.

    Args:
        keeps_marks: leave them in: models that call tools mark their calls with them.
    """
    text: str = tokenizer.backend_tokenizer.decode(list(said), skip_special_tokens=not keeps_marks)
    return text


def spell(tokenizer: ChatTokenizer, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the tokens of texts that must not appear, at the start of a text and within one.

    Source: vLLM's `bad_words`, which are met in both spellings.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        plain, behind = (
            tuple(one.ids)
            for one in tokenizer.backend_tokenizer.encode_batch_fast(
                [word.lstrip(), f" {word.lstrip()}"], add_special_tokens=False
            )
        )
        found.append(plain)
        if plain and behind[:1] != plain[:1] and len(behind) == len(plain):
            found.append(behind)
    return [one for one in found if one]


class StopStrings:
    """Watches one answer for the strings that end it, wherever token borders fall."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        keeps_marks: bool = False,
    ) -> None:
        """Begin before the first token.

        Args:
            keeps_marks: as `decode` has it.
            min_tokens: what has ended by then ends nothing, as in vLLM.
        """
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._min_tokens = min_tokens
        self._keeps_marks = keeps_marks
        self._from = 0
        self._upto = 0
        self.text = ""

    def found(self, said: Sequence[int]) -> bool:
        """Return whether one has appeared now; then `text` is the answer before it.

        Call it after every token. Decodes only the last few tokens: those of the piece of text
        that was last known to be whole, and what came since.
        """
        marks = self._keeps_marks
        known = decode(self._tokenizer, said[self._from : self._upto], keeps_marks=marks)
        now = decode(self._tokenizer, said[self._from :], keeps_marks=marks)
        if len(now) <= len(known) or now.endswith("\ufffd"):
            return False  # part of a character; wait for the rest
        self._from, self._upto = self._upto, len(said)
        num_known = len(self.text)
        self.text += now[len(known) :]
        if len(said) <= self._min_tokens:
            return False
        places = [
            place
            for stop in self._stops
            if (place := self.text.find(stop, max(0, num_known - len(stop) + 1))) >= 0
        ]
        if not places:
            return False
        self.text = self.text[: min(places)]
        return True
