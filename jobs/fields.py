"""Nested values and the nested fields of pydantic models, both addressed by path."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Path = tuple[str, ...]

MISSING = object()
"""What `get` returns where nothing was said; None is a value."""


def get(values: Any, path: Path) -> object:  # noqa: ANN401  nested values of any kind
    """Return what stands at `path`; of a model only what was set."""
    for part in path:
        if isinstance(values, BaseModel) and part in values.model_fields_set:
            values = getattr(values, part)
        elif isinstance(values, Mapping) and part in values:
            values = values[part]
        else:
            return MISSING
    return values


def put(values: dict[str, Any], path: Path, value: object) -> None:
    """Write `value` at `path`, making the dicts on the way."""
    for part in path[:-1]:
        values = values.setdefault(part, {})
    values[path[-1]] = value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return both; where both say something, `over` holds."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def leaves(values: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """Yield each value below models and dicts with its path."""
    if isinstance(values, BaseModel):
        for name in type(values).model_fields:
            yield from leaves(getattr(values, name), (*path, name))
    elif isinstance(values, Mapping):
        for name, value in values.items():
            yield from leaves(value, (*path, str(name)))
    else:
        yield path, values


def fields(model: type[BaseModel], path: Path = ()) -> Iterator[tuple[Path, FieldInfo]]:
    """Yield each field that holds a value with its path; any key of a dict is called NAME."""
    for name, field in model.model_fields.items():
        inner = _model_in(field.annotation)
        if inner is None:
            yield (*path, name), field
        else:
            key = ("NAME",) if _is_dict(field.annotation) else ()
            yield from fields(inner, (*path, name, *key))


def annotation_at(model: type[BaseModel], path: Path) -> object | None:
    """Return the type of what may stand at `path`, or None when nothing may."""
    annotation: object = model
    for part in path:
        if _is_dict(annotation):
            annotation = get_args(annotation)[1]
            continue
        inner = _model_in(annotation)
        if inner is None or part not in inner.model_fields:
            return None
        annotation = inner.model_fields[part].annotation
    return annotation


def names_at(model: type[BaseModel], path: Path) -> tuple[str, ...]:
    """Return the names of the fields below `path`."""
    inner = _model_in(annotation_at(model, path))
    return tuple(inner.model_fields) if inner else ()


def _is_dict(annotation: object) -> bool:
    return get_origin(annotation) is dict


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    origin = get_origin(annotation)
    if origin is None:
        return None
    parts = get_args(annotation)[:1] if origin is Annotated else get_args(annotation)
    return next((inner for part in parts if (inner := _model_in(part))), None)
