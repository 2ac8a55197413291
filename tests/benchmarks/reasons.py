"""Why a goal is missed where it is, and what is to be tried next: printed beside the figures."""

from collections.abc import Mapping
from typing import Any

UNKNOWN = "not explained yet"
# By the beginning of a row's id; the longest that fits counts.
REASONS: Mapping[str, str] = {
    "C1": "What the control plane adds is some tens of microseconds a request; the rest is the "
    "machine's own unrest, whose range goes past 1. Next: more pairs.",
    "C3": "A line is parsed by the planner and again by the feed, crosses a socket both ways and "
    "is rendered once, all in Python. Next: hand on what the planner has parsed.",
    "C4": "Decoding a line costs about twice what copying it does; looking at what it holds, "
    "hashing and scanning as much again, all in Python. Next: a decoder that leaves what stands "
    "beside the prompt as bytes and compares them with those of the line before.",
    "C4 ordered": "Beside that, lines are sorted in buckets on disk and written a second time. "
    "Next: bytes that are copied by ranges of the input where these are long.",
    "C5": "Only whole blocks of the cache are shared, so that of each beginning up to a block "
    "less one token is computed again. Next: smaller blocks.",
    "C6 shared": "Only what is shared of a prompt is saved: the rest of it and the answer cost "
    "both arms the same, and C5 says that little of the shared part is left. Next: cheaper steps.",
    "C6 nothing": "No run order is written there, and as many tokens are computed in both arms: "
    "what the control beside it shows is the spread of equal arms. Next: more rounds.",
    "C7 demo": "Steps of so small a model take milliseconds, of which scheduling and choosing in "
    "Python are a good part; the larger model reaches it. Next: fewer calls a row.",
    "C9": "Every schema is new: compiling it, filling masks over automata that are built on "
    "the way and taking tokens is the library's work, and beside a model that takes the "
    "processor's caches costs three times what it does by itself. The row says which share of the "
    "constrained arm that is: for the demo model, whose steps take milliseconds, about what the "
    "must leaves. Next: a library that keeps what schemas have in common.",
    "C11": "Pairs of short runs, whose spread goes to both sides of 1; the folded half is never "
    "computed. Next: more pairs.",
    "T1": "With 128 slots at the start both arms do nearly the same; what is left was not looked "
    "into. Next: more rounds.",
    "C10": "While the order is decided some arrays have a few bytes for each line. Next: sort "
    "these in parts on disk, as the lines themselves are.",
    "C10 ordered": "Lines and results are sorted in buckets of 8 MiB, which a batch of ten "
    "thousand lines does not fill; from there on it hardly grows. Next: smaller buckets.",
    "P repeats": "Two is all there is to gain. The copies are read and written as well, and by the "
    "clock a few pairs spread to both sides. Next: more pairs.",
    "C12": "What the slots held, and up to a second of results that were not written yet; both "
    "are a smaller share of a longer batch. Next: flush by tokens at stake, not by time.",
}


def reason_of(row_id: str) -> str:
    """Return why a row misses its goal, and the next idea."""
    fitting = [name for name in REASONS if f"{row_id} ".startswith(f"{name} ")]
    return REASONS[max(fitting, key=len)] if fitting else UNKNOWN


def explained(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return each reason with the rows that miss a goal by it."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(reason_of(row["id"]), []).append(row["id"])
    return [(", ".join(ids), reason) for reason, ids in found.items()]
