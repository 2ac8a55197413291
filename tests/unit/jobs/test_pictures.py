"""Images in uploaded files: looked at by planning, read when their line runs."""

from datetime import timedelta
from typing import Any, cast

import msgspec
from typing_extensions import override

from jobs.domain.batch import Batch, BatchStatus
from jobs.domain.ids import DEFAULT_TENANT, FileId, TenantId, mint_file_id
from jobs.domain.images import Image, ImageLimits
from jobs.domain.request import Capabilities, Request
from jobs.domain.result import Result
from jobs.domain.shard import UnitKind
from jobs.domain.suspects import CAREFUL_STALLS, GROUP_LINES
from jobs.pictures import Pictures
from storage import files, units
from storage.blobs.base import BlobStore, hash_bytes, input_key
from storage.files import File
from tests.builders import Bench, ScriptedEngine, Worker, await_set, describe, make_line
from tests.seeing import image_part, make_bomb, make_image, text_part


def describe_seeing(name: str) -> Capabilities:
    return msgspec.structs.replace(describe(name), takes_images=True)


def upload(bench: Bench, content: bytes, tenant: TenantId = DEFAULT_TENANT) -> FileId:
    file_id = mint_file_id()
    bench.blobs.put(input_key(file_id), content)
    file = File(
        id=file_id,
        filename="a.png",
        purpose="vision",
        num_bytes=len(content),
        sha256=hash_bytes(content),
        blob_key=input_key(file_id),
        created_at=bench.db.now(),
        tenant_id=tenant,
    )
    files.insert(bench.db, file)
    return file_id


def file_part(file_id: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": file_id}}


def line_of(custom_id: str, *parts: dict[str, Any], **body: Any) -> bytes:  # noqa: ANN401
    return make_line(custom_id, messages=[{"role": "user", "content": list(parts)}], **body) + b"\n"


def plan(bench: Bench, *lines: bytes, **limits: int) -> Batch:
    bench.submit(b"".join(lines))
    return bench.plan(describe=describe_seeing, images=ImageLimits(**limits))


def faults(batch: Batch) -> list[tuple[int | None, str]]:
    assert batch.status is BatchStatus.FAILED, batch.status
    return [(problem.line, problem.code) for problem in batch.errors]


class SeeingEngine(ScriptedEngine):
    """Notes by what each request says what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[bytes]] = {}

    @override
    def _answer(self, request: Request) -> Result:
        (message,) = request.messages or ()
        self.seen[message.content] = [image.content for image in message.images]
        return super()._answer(request)


def run(bench: Bench, batch: Batch, engine: ScriptedEngine) -> Batch:
    assert batch.status is BatchStatus.IN_PROGRESS, batch.errors
    with Worker(bench, engine) as worker:
        worker.result()
    return bench.finalize()


def test_a_worker_is_shown_images_of_lines_and_of_files(bench: Bench) -> None:
    engine, images = SeeingEngine(), [make_image(n) for n in range(3)]
    file_id = upload(bench, images[0])
    planned = plan(
        bench,
        line_of("a", text_part("a"), file_part(file_id), image_part(images[1])),
        line_of("b", text_part("b"), image_part(images[2])),
        line_of("c", text_part("c")),
        line_of("d", text_part("d"), {"type": "input_image", "file_id": file_id}),
    )
    assert run(bench, planned, engine).request_counts.completed == 4
    assert engine.seen == {"a": images[:2], "b": images[2:], "c": [], "d": images[:1]}


def test_a_model_without_eyes_refuses_each_line_with_images(bench: Bench) -> None:
    bench.submit(
        line_of("a", text_part("a"))
        + line_of("b", image_part(make_image()))
        + line_of("c", file_part(upload(bench, make_image())))
    )
    assert faults(bench.plan()) == [(2, "unsupported_parameter"), (3, "unsupported_parameter")]


def test_each_line_with_a_wrong_image_is_named_and_no_other(bench: Bench) -> None:
    good, bomb = make_image(), make_bomb()
    notes = upload(bench, b"These are notes, and no image at all.")
    planned = plan(
        bench,
        line_of("good", image_part(good)),
        line_of("bomb", image_part(bomb)),
        line_of("bomb in a file", file_part(upload(bench, bomb))),
        line_of("far", {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
        line_of("many", *[image_part(good)] * 3),
        line_of("gone", file_part("file-gone")),
        line_of("other", file_part(upload(bench, good, TenantId("tenant_other")))),
        line_of("notes", file_part(notes)),
        line_of("notes again", file_part(notes)),
        line_of("good too", file_part(upload(bench, good)), image_part(good)),
        max_images=2,
    )
    assert faults(planned) == [
        (2, "image_too_large"),
        (3, "image_too_large"),
        (4, "remote_images_refused"),
        (5, "too_many_images"),
        (6, "image_missing"),
        (7, "image_missing"),
        (8, "invalid_image"),
        (9, "invalid_image"),
    ]


def test_bytes_of_files_and_lines_count_together(bench: Bench) -> None:
    image = make_image()
    both = line_of("both", file_part(upload(bench, image)), image_part(image))
    one = line_of("one", file_part(upload(bench, image)))
    planned = plan(bench, one, both, max_bytes=2 * len(image) - 1)
    assert faults(planned) == [(2, "image_too_large")]
    alone = plan(bench, one, max_bytes=len(image) - 1)
    assert faults(alone) == [(1, "image_too_large")]


def test_a_file_that_went_after_planning_costs_its_line(bench: Bench) -> None:
    deleted, lost, kept = (upload(bench, make_image(n)) for n in range(3))
    planned = plan(
        bench,
        line_of("deleted", text_part("deleted"), file_part(deleted)),
        line_of("lost", text_part("lost"), file_part(lost)),
        line_of("kept", text_part("kept"), file_part(kept)),
    )
    files.mark_deleted(bench.db, deleted)
    bench.blobs.delete(input_key(lost))
    engine = SeeingEngine()
    batch = run(bench, planned, engine)
    assert set(engine.seen) == {"kept"}
    assert [line["custom_id"] for line in bench.output_of(batch)] == ["kept"]
    failed = {
        line["custom_id"]: line["response"]["body"]["error"]["code"]
        for line in bench.errors_of(batch)
    }
    assert failed == {"deleted": "image_missing", "lost": "image_missing"}


def test_equal_questions_about_other_images_are_asked_each(bench: Bench) -> None:
    engine, images = SeeingEngine(), [make_image(n) for n in range(2)]
    planned = plan(
        bench,
        *(
            line_of(f"{n}", text_part("same"), image_part(images[n % 2]), temperature=0)
            for n in range(6)
        ),
    )
    batch = run(bench, planned, engine)
    assert engine.num_answered == 2
    assert len(bench.output_of(batch)) == 6


def test_a_file_is_looked_at_once_however_many_lines_show_it(bench: Bench) -> None:
    pictures = Pictures(bench.db, bench.blobs, DEFAULT_TENANT)
    file_id = upload(bench, make_image())
    pictures.check([Image(file_id=file_id)], ImageLimits())
    bench.blobs.delete(input_key(file_id))
    pictures.check([Image(file_id=file_id)], ImageLimits())  # what is known of it stays known


class CountsReads:
    """The bench's blobs, and which of them were read."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self.read: set[str] = set()

    def get(self, key: str) -> bytes:
        self.read.add(key)
        return self._store.get(key)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._store, name)


def test_images_of_suspects_are_read_when_it_is_their_turn(bench: Bench) -> None:
    uploads = [upload(bench, make_image(n)) for n in range(100)]
    planned = plan(
        bench,
        *(line_of(f"r{n}", text_part(f"r{n}"), file_part(one)) for n, one in enumerate(uploads)),
    )
    for _ in range(CAREFUL_STALLS):
        bench.claim(UnitKind.SHARD)
        assert units.reap(bench.db, now=bench.db.now() + timedelta(hours=1))
        bench.clock.advance(2 * 3600)
    gone = files.get(bench.db, uploads[50])
    bench.blobs.delete(gone.blob_key)
    engine, blobs = SeeingEngine(), CountsReads(bench.blobs)
    engine.pause_after(0)
    with Worker(bench, engine, blobs=cast("BlobStore", blobs)) as worker:
        await_set(engine.paused)
        assert 0 < len({input_key(one) for one in uploads} & blobs.read) <= GROUP_LINES
        engine.go_on()
        worker.result()
    batch = bench.finalize()
    assert batch.id == planned.id
    assert engine.seen == {f"r{n}": [make_image(n)] for n in range(100) if n != 50}
    (error,) = bench.errors_of(batch)
    assert error["custom_id"] == "r50"
    assert error["response"]["body"]["error"]["code"] == "image_missing"
