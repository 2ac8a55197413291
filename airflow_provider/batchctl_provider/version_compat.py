"""Names that moved between the Airflow releases this provider runs on (3.1 and newer)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow.sdk import conf
    from airflow.sdk.exceptions import (
        AirflowException,
        AirflowNotFoundException,
        AirflowSkipException,
    )
else:

    def _find(name: str, *modules: str) -> Any:
        for module in modules:
            try:
                return getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                continue
        raise ImportError(f"Airflow has no {name}; this provider needs 3.1 or newer.")

    conf = _find("conf", "airflow.sdk", "airflow.configuration")
    _EXCEPTIONS = ("airflow.sdk.exceptions", "airflow.exceptions")
    AirflowException = _find("AirflowException", *_EXCEPTIONS)
    AirflowNotFoundException = _find("AirflowNotFoundException", *_EXCEPTIONS)
    AirflowSkipException = _find("AirflowSkipException", *_EXCEPTIONS)

__all__ = ["AirflowException", "AirflowNotFoundException", "AirflowSkipException", "conf"]
