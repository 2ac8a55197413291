"""Routes of models: those of the catalogue, the demo model first."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from jobs.api.context import Context, InContext, unix
from jobs.api.problems import Problem

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
    """List the models of the catalogue, the demo model first."""
    return ModelList(data=[_describe(context, name) for name in _names(context)])


@router.get(
    "/{model_id:path}",
    operation_id="retrieveModel",
    summary="Look at a model",
)
def retrieve_model(model_id: str, context: InContext) -> ModelObject:
    """Return a model of the catalogue; slashes in its name may be encoded or not."""
    if model_id not in _names(context):
        raise Problem(
            404,
            f"The model '{model_id[:128]}' does not exist.",
            code="model_not_found",
            param="model",
        )
    return _describe(context, model_id)


def _names(context: Context) -> list[str]:
    return sorted(context.app.settings.models, key=lambda name: name != "demo")


def _describe(context: Context, name: str) -> ModelObject:
    return ModelObject(id=name, created=unix(context.started_at))
