"""Answers that a tenant's earlier batches gave: found while planning, kept when a batch ends.

    planning     line ─► key ─► found among what was kept? ─► its result is there before its shard
    finalizing   results of one model ─► answers by key ─► kept until they expire

A key is of the tenant, the model as it is, and all that the request says; only answers that are
determined (greedy or seeded) have one. What was taken from earlier batches is not kept again, so
that an answer is never older than the operator wants.
"""

import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from jobs.domain.batch import Batch
from jobs.domain.errors import BlobCorrupt, BlobMissing, StorageError
from jobs.domain.ids import BatchId, TenantId
from jobs.domain.result import FinishReason, Result
from jobs.domain.shard import Lease
from jobs.domain.tools import ToolCall
from jobs.telemetry import log
from storage import answers, batches
from storage.answers import INDEX, KEY_BYTES, AnswerBlob, check_of, pack_entry
from storage.blobs.base import BlobStore, BlobWriter, answers_key
from storage.database import Database
from storage.jsonl import KIND_OUTPUT, Entry
from storage.reorder import Reorder

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_BLOBS = 200
"""Batches of a model whose answers are looked through, the newest first."""
_FORMAT = "batchctl answer 1"
_HITS_AT_ONCE = 1 << 18
_PIECE_BYTES = 1 << 20
_NOTED_ANSWERS = 1000
_KEYS = np.dtype([("high", "<u8"), ("low", "<u8")])
_NO_KEY = bytes(KEY_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Where answers are kept, for how long, and how many bytes of them for each tenant."""

    db: Database
    blobs: BlobStore
    expire_seconds: float
    max_bytes: int


class Keys:
    """What tells the answer of each line of a batch: 16 bytes each."""

    def __init__(self, tenant_id: TenantId) -> None:
        """Begin without a line."""
        self.tenant_id = tenant_id
        self.identity = ""
        self._rows = bytearray()
        self._hash = sha256()

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._rows) // KEY_BYTES

    @property
    def content(self) -> bytearray:
        """All keys, one behind the other."""
        return self._rows

    def add(self, request: bytes | None, identity: str) -> None:
        """Note the next line.

        Args:
            request: all that it asks; None: nobody can know its answer before.
            identity: of the model, the same for each line; empty: unknown.
        """
        if request is None or not identity:
            self._rows += _NO_KEY
            return
        if not self.identity:
            self.identity = identity
            for part in (_FORMAT, self.tenant_id, identity):
                self._hash.update(f"{len(part)}:{part}".encode())
        digest = self._hash.copy()
        digest.update(request)
        self._rows += digest.digest()[:KEY_BYTES]

    def key_of(self, line: int) -> bytes:
        """Return the key of a line."""
        return bytes(self._rows[line * KEY_BYTES : (line + 1) * KEY_BYTES])


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """An answer as it is kept: what of a result does not depend on who asked."""

    text: str
    finish_reason: FinishReason
    constraint: Literal["enforced", "validated"] | None
    attempts: int
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


_encode_answer = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(_Answer).decode


# --- planning ---


class Found:
    """The answers that a batch need not compute.

    Attributes:
        is_reused: for each line, whether it has one.
        num_lines: how many have.
        num_bytes: of all these answers.
    """

    def __init__(self, keys: Keys, sources: Sequence[AnswerBlob], reorder: Reorder) -> None:
        self._keys = keys
        self._sources = sources
        self._reorder = reorder
        rows = np.frombuffer(keys.content, dtype=_KEYS)
        lines = np.flatnonzero((rows["high"] != 0) | (rows["low"] != 0)).astype(np.uint32)
        self._lines = lines[np.argsort(rows["high"][lines], kind="stable")]
        self._high = rows["high"][self._lines]
        self._low = rows["low"]
        self.is_reused = np.zeros(len(rows), dtype=np.bool_)
        self.num_lines = 0
        self.num_bytes = 0

    def look_through(self, cache: Cache, on_progress: Callable[[int], None]) -> None:
        """Take what there is; what is damaged or gone is not there."""
        for number, source in enumerate(self._sources):
            if self.num_lines == len(self._lines):
                return
            try:
                self._take_from(cache.blobs, source, number, on_progress)
            except (BlobMissing, BlobCorrupt) as error:
                log.warning("answers_lost", blob_key=source.blob_key, code=error.code)

    def read(self) -> Iterator[tuple[int, BatchId, Result]]:
        """Yield by line its index, the batch whose answer it is, and the result."""
        for line, number, content in self._reorder.read():
            answer = _decode_answer(content)
            result = Result(
                id=0,
                text=answer.text,
                finish_reason=answer.finish_reason,
                attempts=answer.attempts,
                constraint=answer.constraint,
                reasoning=answer.reasoning,
                tool_calls=answer.tool_calls,
            )
            yield line, self._sources[number].batch_id, result

    def _take_from(
        self, blobs: BlobStore, source: AnswerBlob, number: int, on_progress: Callable[[int], None]
    ) -> None:
        hits: list[tuple[NDArray[np.uint32], NDArray[Any]]] = []
        num_hits = num_seen = 0
        for block in answers.read_index(blobs, source):
            lines, entries = self._match(block)
            num_seen += len(block)
            on_progress(num_seen)
            if len(lines):
                hits.append((lines, block[entries]))
                num_hits += len(lines)
            if num_hits >= _HITS_AT_ONCE:
                self._fetch(blobs, source, number, hits, on_progress)
                hits, num_hits = [], 0
        if hits:
            self._fetch(blobs, source, number, hits, on_progress)

    def _match(self, block: "NDArray[Any]") -> "tuple[NDArray[np.uint32], NDArray[np.int64]]":
        """Return lines without an answer and, for each, the entry of `block` that has its key."""
        left = np.searchsorted(self._high, block["high"], side="left")
        counts = np.searchsorted(self._high, block["high"], side="right") - left
        entries = np.repeat(np.arange(len(block)), counts)
        within = np.arange(len(entries)) - np.repeat(np.cumsum(counts) - counts, counts)
        lines = self._lines[left[entries] + within]
        is_hit = (self._low[lines] == block["low"][entries]) & ~self.is_reused[lines]
        return lines[is_hit], entries[is_hit]

    def _fetch(
        self,
        blobs: BlobStore,
        source: AnswerBlob,
        number: int,
        hits: "list[tuple[NDArray[np.uint32], NDArray[Any]]]",
        on_progress: Callable[[int], None],
    ) -> None:
        lines = np.concatenate([one for one, _ in hits])
        entries = np.concatenate([one for _, one in hits])
        end = source.num_bytes - source.num_entries * INDEX.itemsize
        # An entry that is damaged may point anywhere.
        is_within = (entries["offset"] <= end) & (entries["length"] <= end - entries["offset"])
        order = np.flatnonzero(is_within)
        order = order[np.argsort(entries["offset"][order], kind="stable")]
        places = list(
            zip(entries["offset"][order].tolist(), entries["length"][order].tolist(), strict=True)
        )
        contents = answers.read_answers(blobs, source, places)
        num_damaged = len(lines) - len(order)
        checks = entries["check"][order].tolist()
        for line, check, content in zip(lines[order].tolist(), checks, contents, strict=True):
            if check_of(self._keys.key_of(line), content) != check:
                num_damaged += 1
            elif not self.is_reused[line]:
                self._reorder.add(line, number, content)
                self.is_reused[line] = True
                self.num_lines += 1
                self.num_bytes += len(content)
            if self.num_lines % _NOTED_ANSWERS == 0:
                on_progress(self.num_lines)
        if num_damaged:
            log.warning("answers_damaged", blob_key=source.blob_key, num_damaged=num_damaged)


@contextmanager
def finding(
    cache: Cache | None, keys: Keys | None, *, on_progress: Callable[[int], None] | None
) -> Iterator[Found | None]:
    """Yield what need not be computed of a batch; None where that is nothing."""
    if cache is None or keys is None or not keys.identity:
        yield None
        return
    sources = answers.list_newest(
        cache.db, tenant_id=keys.tenant_id, identity=keys.identity, limit=MAX_BLOBS
    )
    if not sources:
        yield None
        return
    num_bytes = sum(source.num_bytes for source in sources)
    per_answer = num_bytes // max(1, sum(source.num_entries for source in sources)) + 1
    expected = min(num_bytes, per_answer * len(keys))
    with Reorder(num_ranks=len(keys), num_bytes=expected) as reorder:
        found = Found(keys, sources, reorder)
        found.look_through(cache, on_progress or _ignore)
        yield found if found.num_lines else None


# --- finalizing ---


class _Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class _Call(msgspec.Struct, frozen=True):
    function: _Function


class _Message(msgspec.Struct, frozen=True):
    content: str | None
    reasoning: str | None = None
    tool_calls: tuple[_Call, ...] = ()


class _Choice(msgspec.Struct, frozen=True):
    finish_reason: FinishReason | Literal["tool_calls"]
    message: _Message | None = None
    text: str = ""
    logprobs: msgspec.Raw | None = None


class _Told(msgspec.Struct, frozen=True):
    constraint: Literal["enforced", "validated"] | None = None
    attempts: int = 1
    same_as: str | None = None


class _Part(msgspec.Struct, frozen=True):
    text: str
    logprobs: msgspec.Raw | None = None


class _Item(msgspec.Struct, frozen=True):
    type: Literal["reasoning", "message", "function_call"]
    content: tuple[_Part, ...] = ()
    name: str = ""
    arguments: str = ""


class _Body(msgspec.Struct, frozen=True):
    """The body of an answer; a response has a status and output, the others have choices."""

    status: str = ""
    output: tuple[_Item, ...] = ()
    choices: tuple[_Choice, ...] = ()
    batchctl: _Told = _Told()


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class _Line(msgspec.Struct, frozen=True):
    """What of a line of an output file makes its answer."""

    response: _Response


_decode_line = msgspec.json.Decoder(_Line).decode


class Harvest:
    """Gathers the answers of a batch that ends, for batches to come."""

    def __init__(
        self, cache: Cache, batch: Batch, *, identity: str, key: str, stack: ExitStack
    ) -> None:
        self._cache = cache
        self._batch = batch
        self._key = key
        self._stack = stack
        self._keys: mmap.mmap | None = None
        self._writer: BlobWriter | None = None
        self._index: IO[bytes] | None = None
        self._num_bytes = 0
        self._num_entries = 0
        self.identity = identity

    def load(self, blobs: BlobStore, keys_key: str) -> None:
        """Get the keys of the batch's lines.

        Raises:
            BlobMissing, BlobCorrupt, ValueError: they are gone or damaged.
            OSError: there is no room for them.
        """
        open_file = self._stack.enter_context
        self._index = open_file(TemporaryFile())  # noqa: SIM115  by the stack
        file = open_file(TemporaryFile())  # noqa: SIM115
        with blobs.open_reader(keys_key) as reader:
            while piece := reader.read(_PIECE_BYTES):
                file.write(piece)
        file.flush()
        self._keys = self._stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def add(self, entries: Sequence[Entry]) -> None:
        """Take those results of the batch that are worth it, computed by the model as it was.

        Raises:
            StorageError: they could not be written.
        """
        try:
            for index, kind, line in entries:
                if self._keys is None:
                    return
                key = self._keys[index * KEY_BYTES : (index + 1) * KEY_BYTES]
                if kind != KIND_OUTPUT or len(key) < KEY_BYTES or key == _NO_KEY:
                    continue
                answer = _answer_of(line)
                if answer is not None:
                    self._write(key, answer)
        except OSError as error:
            # Of the temporary folder: no reason to keep a batch from its end.
            log.warning("answers_not_kept", error=error.strerror)
            self._keys = self._writer = None

    def _write(self, key: bytes, answer: bytes) -> None:
        size = self._num_bytes + len(answer) + (self._num_entries + 1) * INDEX.itemsize
        if size > self._cache.max_bytes or self._index is None:
            self._keys = None  # there is no room for more
            return
        if self._writer is None:
            self._writer = self._stack.enter_context(self._cache.blobs.open_writer(self._key))
        self._writer.write(answer)
        self._index.write(pack_entry(key, self._num_bytes, len(answer), check_of(key, answer)))
        self._num_bytes += len(answer)
        self._num_entries += 1

    def keep(self) -> None:
        """Give what was gathered to batches to come.

        Raises:
            StorageError: it could not be written.
        """
        if self._writer is None or self._index is None:
            return
        self._index.seek(0)
        while piece := self._index.read(_PIECE_BYTES):
            self._writer.write(piece)
        info = self._writer.commit()
        cache, now = self._cache, self._cache.db.now()
        gone = answers.record(
            cache.db,
            AnswerBlob(
                batch_id=self._batch.id,
                tenant_id=self._batch.tenant_id,
                identity=self.identity,
                blob_key=info.key,
                num_entries=self._num_entries,
                num_bytes=info.num_bytes,
                created_at=now,
                expires_at=now + timedelta(seconds=cache.expire_seconds),
            ),
            max_bytes=cache.max_bytes,
        )
        for key in gone:
            with suppress(StorageError):  # the collector comes later
                cache.blobs.delete(key)
        log.info("answers_kept", num_answers=self._num_entries, num_bytes=info.num_bytes)


def _answer_of(line: bytes) -> bytes | None:
    """Return the answer in a line of an output file.

    None where another line has the same, and where it is more than one text: vectors and
    probabilities are large, several answers rare.
    """
    body = _decode_line(line).response.body
    told = body.batchctl
    choices = body.choices or ((_choice_of(body),) if body.output else ())
    if told.same_as is not None or len(choices) != 1:
        return None
    choice = choices[0]
    if choice.logprobs is not None and bytes(choice.logprobs) != b"null":
        return None
    said = choice.message or _Message(choice.text)
    return _encode_answer(
        _Answer(
            said.content or "",
            "length" if choice.finish_reason == "length" else "stop",
            told.constraint,
            told.attempts,
            said.reasoning,
            tuple(
                ToolCall(call.function.name, call.function.arguments) for call in said.tool_calls
            ),
        )
    )


def _choice_of(body: _Body) -> _Choice:
    """Return a response as the chat that says the same."""
    said = {item.type: item.content[0] for item in body.output if item.content}
    text, thought = said.get("message"), said.get("reasoning")
    return _Choice(
        "length" if body.status == "incomplete" else "stop",
        _Message(
            text.text if text is not None else None,
            thought.text if thought is not None else None,
            tuple(
                _Call(_Function(item.name, item.arguments))
                for item in body.output
                if item.type == "function_call"
            ),
        ),
        logprobs=text.logprobs if text is not None else None,
    )


@contextmanager
def harvesting(
    cache: Cache | None, db: Database, blobs: BlobStore, batch: Batch, lease: Lease
) -> Iterator[Harvest | None]:
    """Yield what gathers the answers of a batch that ends; None where it gives none."""
    wanted = batches.get_reuse(db, batch.id) if cache is not None and batch.reuse else None
    if cache is None or wanted is None:
        yield None
        return
    identity, keys_key = wanted
    with ExitStack() as stack:
        harvest = Harvest(
            cache, batch, identity=identity, key=answers_key(batch.id, lease.epoch), stack=stack
        )
        try:
            harvest.load(blobs, keys_key)
        except (BlobMissing, BlobCorrupt, OSError, ValueError) as error:
            log.warning("answers_not_kept", blob_key=keys_key, error=str(error))
        yield harvest


def _ignore(_number: int) -> None:
    """Nobody wants to know."""
