"""What a model says to itself before it answers, told apart from the answer."""

_THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_SPACE = " \t\r\n"


def begins_with_thought(text: str) -> bool:
    """Return whether an answer begins with the mark of a thought."""
    return text.lstrip(_SPACE).startswith(tuple(start for start, _ in _THOUGHTS))


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Return what a model said to itself first, without its marks, and the rest.

    A prompt may end inside of the reasoning already: then only its end stands in the text.
    """
    begun = text.lstrip(_SPACE)
    for start, end in _THOUGHTS:
        if begun.startswith(start):
            thought, mark, rest = begun[len(start) :].partition(end)
            return thought.strip(), rest.lstrip(_SPACE) if mark else ""
    for start, end in _THOUGHTS:
        thought, mark, rest = text.partition(end)
        if mark and start not in thought:
            return thought.strip(), rest.lstrip(_SPACE)
    return None, text
