"""The shape of an answer as people write it in Python, turned into a constraint.

Pydantic models, dataclasses, typed dicts and generics become JSON schemas; enums and literals of
strings become choices; what `outlines.types` offers becomes a schema, a regular expression, a
choice or a grammar.
"""

import contextlib
import enum
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import msgspec
import pydantic

from jobs.domain.errors import InvalidInput
from jobs.domain.request import Constraint


def load_output_type(name: str) -> Constraint:
    """Return the constraint that `module:name` stands for; runs that module.

    Raises:
        InvalidInput: there is no such module or name, or it describes no answer.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise _invalid(f"{name!r} is not of the form module:name, for example shapes:Person.")
    try:
        with _working_folder_importable():
            found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise _invalid(
            f"There is no module {error.name!r}; run this where it can be imported."
        ) from None
    except Exception as error:
        raise _invalid(f"Importing {module_name!r} fails: {type(error).__name__}.") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise _invalid(f"Module {module_name!r} has no {path!r}.") from None
    return to_constraint(found, name=name)


def load_schema_file(path: Path) -> Constraint:
    """Return the constraint of a file that holds a JSON schema.

    Raises:
        InvalidInput: the file cannot be read, or holds no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _invalid(f"{path} cannot be read: {error}.") from None
    try:
        schema = msgspec.json.decode(text)
    except msgspec.MsgspecError as error:
        raise _invalid(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(schema, dict):
        raise _invalid(f"{path} does not hold a JSON object.")
    return Constraint("json_schema", text)


def to_constraint(  # noqa: PLR0911 -- one for each kind of shape
    shape: Any,  # noqa: ANN401 -- anything may be tried
    *,
    name: str = "The output type",
) -> Constraint:
    """Return the constraint that a Python object stands for.

    Raises:
        InvalidInput: it describes no answer.
    """
    if isinstance(shape, Constraint):
        return shape
    if isinstance(shape, dict):
        return _schema(shape)
    if inspect.isclass(shape) and issubclass(shape, enum.Enum):
        return _choices([member.value for member in shape], name)
    if get_origin(shape) is Literal:
        return _choices(list(get_args(shape)), name)
    if type(shape).__module__.startswith("outlines."):
        return _from_outlines(shape, name)
    if inspect.isfunction(shape):
        return _from_signature(shape, name)
    if is_typeddict(shape):
        # pydantic takes typing's own only from Python 3.12 on.
        needed = shape.__required_keys__
        fields = {
            key: (kind, ... if key in needed else None)
            for key, kind in get_type_hints(shape).items()
        }
        return _schema(_model(shape.__name__, fields).model_json_schema())
    # Pydantic models, dataclasses, unions, lists of any of them, ...
    if inspect.isclass(shape) or get_origin(shape) is not None:
        with contextlib.suppress(TypeError, pydantic.errors.PydanticUserError):
            return _schema(pydantic.TypeAdapter(shape).json_schema())
    raise _invalid(
        f"{name} is a {type(shape).__name__}, which describes no answer; use a pydantic model, a "
        "dataclass, a TypedDict, an Enum, a Literal or an outlines type."
    )


def _from_outlines(shape: Any, name: str) -> Constraint:  # noqa: ANN401
    from outlines.types import CFG, Choice, JsonSchema, Regex  # noqa: PLC0415 -- an extra
    from outlines.types.dsl import Term, python_types_to_terms, to_regex  # noqa: PLC0415

    if isinstance(shape, JsonSchema):
        return Constraint("json_schema", shape.schema)
    if isinstance(shape, Regex):
        return Constraint("regex", shape.pattern)
    if isinstance(shape, CFG):
        return Constraint("grammar", shape.definition)
    if isinstance(shape, Choice):
        return _choices(list(shape.items), name)
    try:
        term = shape if isinstance(shape, Term) else python_types_to_terms(shape)
        return Constraint("regex", to_regex(term))
    except Exception:  # noqa: BLE001 -- outlines raises many kinds
        raise _invalid(
            f"{name} is an outlines object that cannot be turned into a constraint; use "
            "JsonSchema, Regex, Choice, CFG or a term."
        ) from None


def _from_signature(function: Any, name: str) -> Constraint:  # noqa: ANN401
    """Return the schema of a function's arguments."""
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if parameter.annotation is parameter.empty:
            raise _invalid(f"{name}: argument {parameter.name!r} has no type.")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (parameter.annotation, default)
    return _schema(_model(function.__name__, fields).model_json_schema())


def _model(name: str, fields: dict[str, Any]) -> type[pydantic.BaseModel]:
    made: type[pydantic.BaseModel] = pydantic.create_model(name, **fields)
    return made


def _schema(schema: dict[str, Any]) -> Constraint:
    return Constraint("json_schema", msgspec.json.encode(schema).decode())


def _choices(values: list[Any], name: str) -> Constraint:
    if values and all(isinstance(value, str) for value in values):
        return Constraint("choice", msgspec.json.encode(values).decode())
    if values and all(value is None or isinstance(value, str | int | float) for value in values):
        return _schema({"enum": values})
    raise _invalid(f"{name} has no values that can be written as JSON.")


def _invalid(message: str) -> InvalidInput:
    return InvalidInput(message, param="output_type", error_code="invalid_output_type")


@contextmanager
def _working_folder_importable() -> Iterator[None]:
    """Let modules beside the user be found, as `python -m` would."""
    folder = str(Path.cwd())
    if folder in sys.path:
        yield
        return
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
