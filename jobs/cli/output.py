"""What the command line shows: data on standard output, everything said to people on the other.

A terminal gets tables and live progress, anything else plain lines. Text that came out of a file,
a server or a model loses its control characters on the way: a name may not move the cursor.
"""

import codecs
import json
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NoReturn, Self

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
"""Standard error: messages and progress."""

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
"""Standard output: tables."""

_ESCAPE = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # operating system commands: titles, links
    r"|\x1b[P_^X][^\x1b]*(?:\x1b\\)?"  # strings for the device
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # cursor and colour
    r"|\x1b[ -/]*[0-~]?"
)
# Control characters but tab and newline, and those that reorder, join or hide what stands beside.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)
_PLAIN_SECONDS = 5.0
_RATE_SECONDS = 20.0
_MIN_SAMPLES = 2
_GAP = 2
_MIN_FOLDED = 16
_KILO = 1000


def clean(text: object) -> str:
    """Return `text` without terminal escapes and control characters; newlines and tabs stay."""
    return _CONTROL.sub("", _ESCAPE.sub("", str(text)))


def one_line(text: object) -> str:
    """Return `text` cleaned, on one line."""
    return " ".join(clean(text).split())


def say(message: str, *, style: str | None = None) -> None:
    """Tell the person something, on standard error."""
    console.print(Text(clean(message), style=style or ""))


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong in one line and end with `code`."""
    report(message)
    raise typer.Exit(code)


def report(message: str) -> None:
    """Say what went wrong; the command goes on or ends elsewhere."""
    text = Text("error: ", style="bold red")
    text.append(clean(message).strip(), style="default not bold")
    console.print(text)


def write(text: str) -> None:
    """Write data to standard output."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value: object) -> None:
    """Write one JSON document to standard output."""
    write(_visible(json.dumps(value, indent=2, ensure_ascii=False, default=str)) + "\n")


def print_json_line(value: object) -> None:
    """Write one line of a JSONL stream to standard output."""
    write(_visible(json.dumps(value, ensure_ascii=False, default=str)) + "\n")


def _visible(document: str) -> str:
    r"""Return JSON with its control characters as \u escapes: only strings can hold any."""
    return _CONTROL.sub(
        lambda found: found[0] if found[0] in "\n\t" else f"\\u{ord(found[0]):04x}", document
    )


def write_line(line: bytes, *, flush: bool) -> None:
    """Write a line of a results file: byte for byte, unless a terminal would obey what is in it.

    Args:
        flush: whether the next line may be long in coming.
    """
    if sys.stdout.isatty():
        write(_visible(line.decode("utf-8", "replace")) + "\n")
        return
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:
        write(line.decode("utf-8", "replace") + "\n")
        return
    binary.write(line + b"\n")
    if flush:
        binary.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table: fitted to a terminal, one tab-separated line for each row elsewhere.

    Cells are never cut off, since people copy them.

    Args:
        columns: names; one with ">" before it is aligned to the right, one with "~" is folded
            where space is short, one with "?" is left out then.
    """
    names = [name.lstrip(">~?") for name in columns]
    cells = [[one_line(cell) for cell in row] for row in rows]
    if not out.is_terminal:
        write("".join("\t".join(row) + "\n" for row in ([n.upper() for n in names], *cells)))
        return
    widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
    shown = list(range(len(names)))
    while sum(_needed(columns[n], widths[n]) for n in shown) > out.width + _GAP and (
        dropped := next((n for n in reversed(shown) if columns[n].startswith("?")), None)
    ):
        shown.remove(dropped)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for number in shown:
        folds = columns[number].startswith("~")
        table.add_column(
            names[number],
            justify="right" if columns[number].startswith(">") else "left",
            no_wrap=not folds,
            overflow="fold",
            min_width=min(widths[number], _MIN_FOLDED) if folds else widths[number],
        )
    for row in cells:
        table.add_row(*(Text(row[number]) for number in shown))
    out.print(table, soft_wrap=False)


def _needed(column: str, width: int) -> int:
    return _GAP + (min(width, _MIN_FOLDED) if column.startswith("~") else width)


def print_problems(
    problems: Iterable[tuple[int | None, str, str | None, str]],
) -> None:
    """Write a table of faults: line, code, param and message of each."""
    print_table(
        (">line", "code", "param", "~message"),
        ((line or "", code, param or "", message) for line, code, param, message in problems),
    )


def print_fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Write names and values one below the other; a value of None is left out."""
    shown = [(name, one_line(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        if not out.is_terminal:
            write(f"{name:<{width}}  {value}\n")
            continue
        line = Text(f"{name:<{width}}  ", style="bold")
        line.append(value, style="not bold")
        out.print(line)


def count(number: int) -> str:
    """Return a number for people: 1,234,567."""
    return f"{number:,}"


def reused(number: int, total: int) -> str:
    """Return how many answers were those of earlier batches."""
    return f"{count(number)} of {count(total)} answers"


def size(num_bytes: float) -> str:
    """Return a number of bytes for people: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < _KILO:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= _KILO
    return f"{num_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Return a length of time for people: 42s, 3m05s, 2h07m."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def quiet_stdout() -> None:
    """Send what is still to be flushed nowhere: whoever read it went away."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)


class _Rate:
    """Growth per second over the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, now: float, value: int) -> float:
        samples = self._samples
        if samples and value < samples[-1][1]:
            samples.clear()
        samples.append((now, value))
        while len(samples) > _MIN_SAMPLES and now - samples[0][0] > _RATE_SECONDS:
            samples.popleft()
        elapsed = now - samples[0][0]
        return (value - samples[0][1]) / elapsed if elapsed > 0 else 0.0


class _Lines:
    """A live line on a terminal, or plain lines now and then, or silence."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = (
            Live(console=console, refresh_per_second=8, transient=False)
            if console.is_terminal and not quiet
            else None
        )
        self._shown_at = float("-inf")
        self._shown = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self, row: Table, plain: str, *, at_once: bool = False) -> None:
        if self._live is not None:
            self._live.start()
            self._live.update(row)
            return
        now = time.monotonic()
        due = at_once or now - self._shown_at >= _PLAIN_SECONDS
        if self._quiet or not due or plain == self._shown:
            return
        self._shown_at, self._shown = now, plain
        console.print(Text(plain))


def _row(*cells: object) -> Table:
    row = Table.grid(padding=(0, 1), expand=True)
    for cell in cells:
        if isinstance(cell, ProgressBar):
            row.add_column(ratio=1)
        else:
            row.add_column(no_wrap=True)
    row.add_row(*cells)  # type: ignore[arg-type]  # texts and one bar
    return row


class BatchProgress(_Lines):
    """Shows how a batch goes: requests, tokens per second, time left, failures.

    Use as a context manager and call `update` as often as there is news.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Prepare to show; `quiet` shows nothing."""
        super().__init__(quiet=quiet)
        self._requests = _Rate()
        self._tokens = _Rate()
        self._phase = ""

    def update(
        self,
        *,
        total: int | None,
        completed: int = 0,
        failed: int = 0,
        completion_tokens: int | None = None,
        phase: str = "running",
    ) -> None:
        """Show the present counts.

        Args:
            total: None or 0 while it is not known; `completed` then counts lines read.
            completion_tokens: tokens generated so far; None where nobody knows.
            phase: what happens now, in a word: "planning", "running", "finalizing".
        """
        now = time.monotonic()
        phase = one_line(phase)
        changed, self._phase = phase != self._phase, phase
        done = completed + failed
        per_second = self._requests.add(now, done)
        tokens = self._tokens.add(now, completion_tokens) if completion_tokens is not None else None
        if not total:
            lines = f"{count(done)} lines" if done else ""
            self._show(
                _row(Text(phase, style="bold"), ProgressBar(pulse=True), Text(lines)),
                f"{phase}: {lines}" if lines else phase,
                at_once=changed,
            )
            return
        left = (total - done) / per_second if per_second > 0 and done < total else None
        told = [f"{count(done)}/{count(total)}"]
        if tokens:
            told.append(f"{count(round(tokens))} tok/s")
        if left is not None:
            told.append(f"{duration(left)} left")
        self._show(
            _row(
                Text(phase, style="bold"),
                ProgressBar(total=total, completed=done),
                Text("  ".join(told)),
                *([Text(f"{count(failed)} failed", style="red")] if failed else []),
            ),
            f"{phase}: {told[0]} requests"
            + "".join(f", {part}" for part in told[1:])
            + (f", {count(failed)} failed" if failed else ""),
            at_once=changed or done == total,
        )


class TransferProgress(_Lines):
    """Shows how far an upload or download is, in bytes."""

    def __init__(self, label: str, total: int | None, *, quiet: bool = False) -> None:
        """Prepare to show; `total` is None where the size is not known."""
        super().__init__(quiet=quiet)
        self._label = one_line(label)
        self._total = total
        self._rate = _Rate()
        self._started_at = time.monotonic()
        # A transfer that takes no time needs no plain line.
        self._shown_at = self._started_at

    def update(self, done: int) -> None:
        """Show that `done` bytes went through."""
        rate = self._rate.add(time.monotonic(), done)
        told = f"{size(done)}/{size(self._total)}" if self._total else size(done)
        if rate:
            told += f"  {size(rate)}/s"
        bar = (
            ProgressBar(total=self._total, completed=min(done, self._total))
            if self._total
            else ProgressBar(pulse=True)
        )
        self._show(_row(Text(self._label, style="bold"), bar, Text(told)), f"{self._label}: {told}")


def write_pieces(pieces: Iterable[bytes]) -> None:
    """Write the content of a file to standard output; a terminal gets it without its escapes."""
    if sys.stdout.isatty():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for piece in pieces:
            write(_visible(decoder.decode(piece)))
        return
    for piece in pieces:
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
