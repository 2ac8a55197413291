r"""Turns what a person has into request lines, as a stream of bytes.

    batch JSONL                       byte for byte
    batch JSONL and a constraint      lines that ask for no form of answer get it
    CSV or plain records and a prompt  a request for each record, at the record's own line number

Line numbers stay what they are in the person's file (blank lines stand where a header or the rest
of a record was), so that whatever planning reports about a line can be looked up there.
"""

import csv
import string
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn, Protocol, Self

import msgspec

from jobs.domain.errors import InvalidInput, NotFound
from jobs.domain.request import CHAT, CHAT_ENDPOINTS, Constraint
from jobs.domain.responses import RESPONSES

MAX_LINE_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CSV_SUFFIXES = frozenset({".csv", ".tsv"})
_JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_DELIMITERS = ",;\t"
_FORMS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "text",
)
_ID_COLUMNS = ("custom_id", "id")

_Raws = dict[str, msgspec.Raw]
_raws = msgspec.json.Decoder(_Raws)
_text = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode


class Lines(Protocol):
    """Bytes that are read forward."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes; nothing only at the end."""
        ...

    def readline(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes of one line, its end included."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Source:
    """An input that a person named, its beginning already read; use as a context manager."""

    def __init__(self, name: str, file: IO[bytes], *, path: Path | None) -> None:
        """Take over `file`; `path` is where to open it again, None for a pipe."""
        self.name = name
        self.path = path
        self._file: IO[bytes] | None = file
        try:
            self._head = _read_head(file)
        except BaseException:
            self.close()
            raise
        self.num_bytes = path.stat().st_size if path is not None else None

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return the source at `path`; "-" is standard input.

        Raises:
            NotFound: there is no such file.
            InvalidInput: it is a folder, or may not be read.
        """
        if str(path) == "-":
            return cls("stdin.jsonl", sys.stdin.buffer, path=None)
        path = Path(path)
        return cls(path.name, _open(path), path=path if path.is_file() else None)

    def __enter__(self) -> Self:
        """Keep the file open for the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file, unless it is standard input."""
        if self._file is not None and self._file is not sys.stdin.buffer:
            self._file.close()

    @property
    def repeatable(self) -> bool:
        """Whether it can be read more than once; a pipe cannot."""
        return self.path is not None

    @property
    def suffix(self) -> str:
        """The end of its name, in small letters."""
        return Path(self.name).suffix.lower() if self.path is not None else ""

    @property
    def is_table(self) -> bool:
        """Whether it is a CSV, by its name or else by how it begins."""
        if self.suffix in _CSV_SUFFIXES | _JSONL_SUFFIXES:
            return self.suffix in _CSV_SUFFIXES
        begin = self._head.removeprefix(_BOM).lstrip()[:1]
        return begin not in {b"", b"{", b"["}

    @property
    def endpoint(self) -> str | None:
        """The url of the first request line, or None where it has none."""
        url = (self._first_record() or {}).get("url")
        if url is None:
            return None
        try:
            return _text.decode(url)
        except msgspec.MsgspecError:
            return None

    @property
    def is_records(self) -> bool:
        """Whether its first line is an object that is no request."""
        first = self._first_record()
        return first is not None and not {"body", "url", "method"} & first.keys()

    def open_again(self) -> Lines:
        """Return the bytes from their beginning; a pipe only the first time.

        Raises:
            InvalidInput: it was a pipe and is read already.
        """
        if self.path is not None:
            return _open(self.path)
        file, self._file = self._file, None
        if file is None:
            raise InvalidInput("Standard input can be read only once; use a file.", param="input")
        return _Rejoined(self._head, file)

    def _first_record(self) -> _Raws | None:
        for line in self._head.removeprefix(_BOM).split(b"\n"):
            if line.strip():
                try:
                    return _raws.decode(line)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    return None
        return None


def prepare_input(
    source: Source | str | Path,
    *,
    prompt: str | None = None,
    model: str | None = None,
    constraint: Constraint | None = None,
    endpoint: str = CHAT,
    system: str | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    id_column: str | None = None,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[bytes]:
    """Yield pieces of the request lines that an input stands for; memory does not grow with it.

    A batch file passes unchanged, its bad lines as well, for planning reports them all.

    Args:
        source: an open source, a path, or "-" for standard input.
        prompt: makes a request of each record; `{name}` stands for a column, `{{` for a brace.
        model: what the made lines name; request lines keep their own.
        constraint: what every answer must look like, except where a line has its own.
        system, max_tokens, temperature: go into the made lines.
        id_column: gives the made lines their custom_id; else `custom_id` or `id`, else `row-N`.

    Raises:
        InvalidInput: the input cannot be made into requests; the message names the line.
        NotFound: there is no such file.
    """
    if not isinstance(source, Source):
        with Source.open(source) as opened:
            yield from prepare_input(
                opened,
                prompt=prompt,
                model=model,
                constraint=constraint,
                endpoint=endpoint,
                system=system,
                max_tokens=max_tokens,
                temperature=temperature,
                id_column=id_column,
                max_line_bytes=max_line_bytes,
            )
        return
    if prompt is not None:
        render = _template(
            prompt,
            model=model,
            form=_form(constraint, endpoint),
            endpoint=endpoint,
            system=system,
            limits={
                "max_output_tokens" if endpoint == RESPONSES else "max_tokens": max_tokens,
                "temperature": temperature,
            },
        )
        with closing(source.open_again()) as file:
            lines = _numbered(file, max_line_bytes)
            records = (
                _table(lines, delimiter="\t" if source.suffix == ".tsv" else None)
                if source.is_table
                else _records(lines)
            )
            yield from _requests(records, render, id_column=id_column)
        return
    if source.is_table:
        raise InvalidInput(
            f"{source.name} is a table; say what to ask about its rows, for example "
            "--prompt 'Classify: {text}'.",
            param="prompt",
        )
    if source.is_records:
        raise InvalidInput(
            f"Line 1 of {source.name} is a record and no request; say what to ask about it, for "
            "example --prompt 'Classify: {text}'.",
            param="prompt",
        )
    with closing(source.open_again()) as file:
        if constraint is None:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
        else:
            yield from _constrained(file, _form(constraint, endpoint), max_line_bytes)


def check_readable(path: Path) -> None:
    """Check that there is something to read at `path`.

    Raises:
        NotFound: there is no such file.
        InvalidInput: it is a folder, or may not be read.
    """
    _open(path).close()


# --- reading ---


class _Rejoined:
    """A pipe whose beginning was read already."""

    def __init__(self, head: bytes, file: IO[bytes]) -> None:
        self._head = head
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        if not self._head:
            return self._file.read(size)
        if size < 0:
            head, self._head = self._head, b""
            return head + self._file.read()
        head, self._head = self._head[:size], self._head[size:]
        return head

    def readline(self, size: int = -1, /) -> bytes:
        if not self._head:
            return self._file.readline(size)
        end = self._head.find(b"\n") + 1 or len(self._head)
        if 0 <= size < end:
            end = size
        line, self._head = self._head[:end], self._head[end:]
        if line.endswith(b"\n") or self._head or len(line) == size:
            return line
        return line + self._file.readline(size - len(line) if size >= 0 else -1)

    def close(self) -> None:
        """Leave the pipe to its owner."""


def _open(path: Path) -> IO[bytes]:
    try:
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder; name a file in it.", param="input")
        return path.open("rb")
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}.", param="input") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"{path} cannot be read: {reason}.", param="input") from None


def _read_head(file: IO[bytes]) -> bytes:
    """Return the beginning up to the end of the first line that says something."""
    head = bytearray()
    while len(head) < _HEAD_BYTES and (line := file.readline(MAX_LINE_BYTES + 1)):
        head += line
        if line.removeprefix(_BOM).strip():
            break
    if head.startswith(_UTF16):
        raise InvalidInput("The input is UTF-16; save it as UTF-8.", param="input")
    return bytes(head)


def _numbered(file: Lines, max_line_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield each line with its number, decoded, its end included."""
    number = 0
    while line := file.readline(max_line_bytes + 1):
        number += 1
        if len(line.removesuffix(b"\n")) > max_line_bytes:
            _refuse(number, f"it has more than {max_line_bytes} bytes")
        if number == 1:
            line = line.removeprefix(_BOM)
        try:
            yield number, line.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(number, f"it is not UTF-8 (byte {error.start}); save the file as UTF-8")


def _refuse(number: int, reason: str) -> NoReturn:
    raise InvalidInput(f"Line {number} of the input: {reason}.", param="input")


# --- request lines with a constraint ---


def _form(constraint: Constraint | None, endpoint: str) -> _Raws:
    """Return what a body says to ask for `constraint`."""
    if constraint is None:
        return {}
    spec: Any = constraint.spec
    match constraint.kind:
        case "json_object":
            form: dict[str, Any] = {"type": "json_object"}
        case "json_schema":
            form = {"name": "answer", "schema": msgspec.Raw(spec.encode()), "strict": True}
            if endpoint != RESPONSES:
                form = {"json_schema": form}
            form["type"] = "json_schema"
        case "choice":
            return {"structured_outputs": _raw({"choice": msgspec.Raw(spec.encode())})}
        case kind:
            return {"structured_outputs": _raw({kind: spec})}
    if endpoint == RESPONSES:
        return {"text": _raw({"format": form})}
    return {"response_format": _raw(form)}


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(_encode(value))


def _constrained(file: Lines, form: _Raws, max_line_bytes: int) -> Iterator[bytes]:
    first = True
    while line := file.readline(max_line_bytes + 1):
        if len(line.removesuffix(b"\n")) > max_line_bytes:
            # Planning will say that it is too long; here it only has to stay one line.
            while line and not line.endswith(b"\n"):
                yield line
                line = file.readline(_CHUNK_BYTES)
            yield line
        else:
            yield _with_form(line.removeprefix(_BOM) if first else line, form)
        first = False


def _with_form(line: bytes, form: _Raws) -> bytes:
    try:
        request = _raws.decode(line)
        body = _raws.decode(request["body"])
    except (msgspec.MsgspecError, KeyError, UnicodeDecodeError, RecursionError):
        return line
    if any(bytes(body.get(name, b"null")) != b"null" for name in _FORMS):
        return line
    for name in _FORMS:
        body.pop(name, None)
    body |= form
    request["body"] = _raw(body)
    end = line[len(line.rstrip(b"\r\n")) :]
    return _encode(request) + end


# --- records ---

_Record = Mapping[str, str]
_Render = Callable[[int, str, _Record], bytes]


def _requests(
    records: Iterator[tuple[int, _Record]], render: _Render, *, id_column: str | None
) -> Iterator[bytes]:
    """Yield a request for each record, each on the line where its record begins."""
    written = 0
    for ordinal, (number, record) in enumerate(records, 1):
        if id_column is not None and id_column not in record:
            _refuse(number, f"there is no column {id_column!r}; there are {_names(record)}")
        column = id_column or next((name for name in _ID_COLUMNS if name in record), None)
        custom_id = record[column].strip() if column is not None else f"row-{ordinal}"
        if not custom_id:
            _refuse(number, f"column {column!r}, which gives the custom_id, is empty")
        yield b"\n" * (number - 1 - written) + render(number, custom_id, record) + b"\n"
        written = number
    if not written:
        raise InvalidInput("The input has no records.", param="input")


def _table(
    lines: Iterator[tuple[int, str]], *, delimiter: str | None
) -> Iterator[tuple[int, _Record]]:
    """Yield the rows of a CSV by the names in its header, with the line where each begins."""
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        raise InvalidInput("The input is empty; a table begins with a header.", param="input")
    number, header_line = first
    if delimiter is None:
        delimiter = max(_DELIMITERS, key=header_line.count)
    # The limit is the module's, not the reader's; lines are limited before they come here.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
    read_up_to = number

    def texts() -> Iterator[str]:
        nonlocal read_up_to
        yield header_line
        for read_up_to, line in lines:  # noqa: B007  where the reader stands
            yield line

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader)]
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            _refuse(number, f"the header names {', '.join(sorted(map(repr, repeated)))} twice")
        begin = read_up_to + 1
        for row in reader:
            if row:
                if len(row) != len(header):
                    _refuse(begin, f"it has {len(row)} columns, and the header has {len(header)}")
                yield begin, dict(zip(header, row, strict=True))
            begin = read_up_to + 1
    except csv.Error as error:
        _refuse(read_up_to, f"it cannot be read as a table ({error})")


def _records(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, _Record]]:
    """Yield the objects of a JSONL file, each value as text."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = _raws.decode(line)
        except (msgspec.MsgspecError, RecursionError) as error:
            _refuse(number, f"it is not a JSON object ({error})")
        if "body" in record and "url" in record:
            _refuse(number, "it is a request already, and --prompt is for plain records")
        yield number, {name: _as_text(value) for name, value in record.items()}


def _as_text(value: msgspec.Raw) -> str:
    raw = bytes(value)
    if raw.startswith(b'"'):
        return _text.decode(raw)
    return "" if raw == b"null" else raw.decode()


def _template(
    prompt: str,
    *,
    model: str | None,
    form: _Raws,
    endpoint: str,
    system: str | None,
    limits: Mapping[str, object],
) -> _Render:
    """Return what renders a record as a request line."""
    pieces = _parse_template(prompt)
    fixed: dict[str, object] = {"model": model} if model is not None else {}
    rest = {name: value for name, value in limits.items() if value is not None} | form
    if system is not None and endpoint not in CHAT_ENDPOINTS:
        raise InvalidInput(
            f"A system message needs the endpoint {' or '.join(CHAT_ENDPOINTS)}.", param="system"
        )
    if system is not None and endpoint == RESPONSES:
        fixed["instructions"] = system
    before = [{"role": "system", "content": system}] if system is not None else []

    def render(number: int, custom_id: str, record: _Record) -> bytes:
        text = "".join(
            literal + (_value(record, name, number) if name is not None else "")
            for literal, name in pieces
        )
        asked: dict[str, object] = (
            {"messages": [*before, {"role": "user", "content": text}]}
            if endpoint == CHAT
            else {"input" if endpoint == RESPONSES else "prompt": text}
        )
        return _encode(
            {
                "custom_id": custom_id,
                "method": "POST",
                "url": endpoint,
                "body": fixed | asked | rest,
            }
        )

    return render


def _parse_template(prompt: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise InvalidInput(
            f"The prompt is no template: {str(error).lower()}; a brace itself is written {{{{ or "
            "}}.",
            param="prompt",
        ) from None
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if form or conversion or not name or any(sign in name for sign in ".[]"):
            raise InvalidInput(
                f"The prompt has a field {{{name}}} that is no plain name of a column; "
                "a brace itself is written {{ or }}.",
                param="prompt",
            )
    if all(name is None for _, name, _, _ in parts):
        raise InvalidInput(
            "The prompt names no column, so every record would get the same; write one as {text}.",
            param="prompt",
        )
    return [(literal, name) for literal, name, _, _ in parts]


def _value(record: _Record, name: str, number: int) -> str:
    value = record.get(name)
    if value is None:
        _refuse(number, f"there is no column {name!r}; there are {_names(record)}")
    return value


def _names(record: _Record) -> str:
    return ", ".join(record) or "none"
