"""Routes of models: the catalogue's and those that workers published, the default one first."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from jobs.api.context import Context, InContext, unix
from jobs.api.problems import Problem
from storage import models

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelObject(BaseModel):
    """A model that requests may name."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When this server learnt of it, in unix seconds.")
    owned_by: str = "batchctl"


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("", operation_id="listModels", summary="List models")
def list_models(context: InContext) -> ModelList:
    """List the models of the catalogue and those that workers published, `default_model` first."""
    return ModelList(
        data=[ModelObject(id=name, created=created) for name, created in _known(context).items()]
    )


@router.get(
    "/{model_id:path}",
    operation_id="retrieveModel",
    summary="Look at a model",
)
def retrieve_model(model_id: str, context: InContext) -> ModelObject:
    """Return a model; slashes in its name may be encoded or not."""
    created = _known(context).get(model_id)
    if created is None:
        raise Problem(
            404,
            f"The model '{model_id[:128]}' does not exist.",
            code="model_not_found",
            param="model",
        )
    return ModelObject(id=model_id, created=created)


def _known(context: Context) -> dict[str, int]:
    """Return the models by name, each with when this server learnt of it."""
    app = context.app
    found = dict.fromkeys(app.settings.models, unix(context.started_at))
    if app.db.is_postgres:  # only a fleet publishes
        for model in models.list_all(app.db):
            found.setdefault(model.name, unix(model.published_at))
    return {
        name: found[name]
        for name in sorted(found, key=lambda name: name != app.settings.default_model)
    }
