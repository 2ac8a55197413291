"""One type per identifier, and the one function that mints them."""

from typing import NewType

import uuid_utils

BatchId = NewType("BatchId", str)
FileId = NewType("FileId", str)
UnitId = NewType("UnitId", str)
WorkerId = NewType("WorkerId", str)
TenantId = NewType("TenantId", str)

DEFAULT_TENANT = TenantId("default")


def mint(prefix: str) -> str:
    """Return a new identifier: `prefix` and a time-ordered UUID (version 7) in hexadecimal."""
    return f"{prefix}{uuid_utils.uuid7().hex}"


def mint_batch_id() -> BatchId:
    """Return a new batch id, `batch_...`."""
    return BatchId(mint("batch_"))


def mint_file_id() -> FileId:
    """Return a new file id, `file-...`, spelled with a hyphen as the OpenAI API spells it."""
    return FileId(mint("file-"))


def mint_unit_id() -> UnitId:
    """Return a new unit id, `unit_...`."""
    return UnitId(mint("unit_"))


def mint_worker_id() -> WorkerId:
    """Return a new worker id, `worker_...`; a restarted worker gets another one."""
    return WorkerId(mint("worker_"))
