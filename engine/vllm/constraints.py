"""A constraint as vLLM's structured outputs take it, judged before vLLM sees it."""

from typing import Any

from vllm.sampling_params import StructuredOutputsParams

from engine import constraints
from engine.bounded import BoundedCache
from engine.config import AskingConfig
from engine.constraints import Enforcement
from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint

_NOT_OUTLINES = ("grammar", "json_object")
_Prepared = tuple[dict[str, Any] | None, Enforcement, str]


class Constraints:
    """Says how each constraint is handed to vLLM; what was found is kept for reuse."""

    def __init__(self, config: AskingConfig) -> None:
        self._backend = config.backend
        self._known: BoundedCache[_Prepared] = BoundedCache(max_entries=4096, max_bytes=64 << 20)

    def prepare(
        self, constraint: Constraint
    ) -> tuple[StructuredOutputsParams | None, Enforcement, str]:
        """Return vLLM's parameters, how much they keep, and what of the constraint they do not.

        Without parameters nothing is kept while generating. A grammar that a library cannot
        compile would end in an answer without a token, so it never gets there.
        """
        key = constraints.key_of(constraint)
        found = self._known.find(key)
        if found is None:
            found = self._known.keep(
                key, self._judge(constraint), weight=2 * len(constraint.spec) + 512
            )
        fields, kept, complaint = found
        # vLLM writes into its parameters, so each request gets its own.
        return StructuredOutputsParams(**fields) if fields is not None else None, kept, complaint

    def _judge(self, constraint: Constraint) -> _Prepared:
        try:
            kept, complaint = constraints.examine(constraint, backend=self._backend)
        except InvalidInput as error:
            return None, "validated", f"The constraint cannot be enforced: {error.message}"
        if self._backend == "outlines_core" and constraint.kind in _NOT_OUTLINES:
            return None, "validated", f"outlines_core cannot enforce a {constraint.kind}."
        return self._fields(constraint, kept), kept, complaint

    def _fields(self, constraint: Constraint, kept: Enforcement) -> dict[str, Any]:
        if constraint.kind == "regex":
            return {"regex": constraint.spec}
        if constraint.kind == "choice":
            return {"choice": constraints.choices_of(constraint)}
        if constraint.kind == "grammar":
            return {"grammar": constraint.spec}
        if self._backend == "outlines_core":
            return {"json": constraint.spec}
        return {"json": constraints.schema_with_options(constraint, lenient=kept != "enforced")}
