"""Loading and unloading adapters over HTTP: admin key, and folders below one root only."""

import asyncio
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from fastapi import APIRouter, Depends, Request

from qlorachat_http.errors import ApiError, no_model
from qlorachat_http.gate import check_key
from qlorachat_http.schemas import LoadAdapterBody, UnloadAdapterBody
from qlorachat_http.service import Service


def adapter_routes(service: Service) -> APIRouter:
    """The routes over one service; without an admin key they answer 403."""
    changing = asyncio.Lock()  # one change at a time: two loads could exceed the memory
    options = service.options

    async def require_admin(request: Request) -> None:
        if options.admin_key is None:
            message = "Adapters are fixed here: set admin_key and adapter_root to change them."
            raise ApiError(403, message, code="adapters_fixed")
        check_key(request.headers, [options.admin_key])

    router = APIRouter(dependencies=[Depends(require_admin)])

    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterBody) -> dict[str, Any]:
        assert options.adapter_root is not None, "checked with the options"
        service.check_available()
        folder = await asyncio.to_thread(adapter_folder, options.adapter_root, body.lora_path)
        replace = bool(body.load_inplace)
        async with changing:
            _check_free(service, body.lora_name, replace=replace)
            await asyncio.to_thread(
                service.engine.load_adapter, body.lora_name, folder, replace=replace
            )
        return service.models.cards()[body.lora_name]

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterBody) -> dict[str, Any]:
        service.check_available()
        async with changing:
            if body.lora_name not in service.engine.adapters:
                raise no_model(body.lora_name)
            await asyncio.to_thread(service.engine.unload_adapter, body.lora_name)
        return {"id": body.lora_name, "object": "model", "deleted": True}

    return router


def adapter_folder(root: Path, asked: str) -> Path:
    """The real folder `asked` below `root`; ApiError if it is elsewhere or not there.

    What can be seen from the name alone is refused without a look at the disk.
    """
    parts = {*PurePath(asked).parts, *PureWindowsPath(asked).parts}
    if "\0" in asked or ".." in parts or not (root / asked).is_relative_to(root):
        raise _outside()
    try:
        folder = _real(root, root / asked)
        for file in folder.iterdir():
            _real(root, file)
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        message = "There is no such folder below the adapter root."
        raise ApiError(404, message, code="adapter_not_found", param="lora_path") from None
    return folder


def _real(root: Path, path: Path) -> Path:
    real = path.resolve(strict=True)
    if not real.is_relative_to(root.resolve()):
        raise _outside()
    return real


def _outside() -> ApiError:
    message = "`lora_path` must lie below the adapter root, links included."
    return ApiError(400, message, code="path_not_allowed", param="lora_path")


def _check_free(service: Service, name: str, *, replace: bool) -> None:
    taken = name in service.engine.adapters and not replace
    if taken or service.models.reserved(name):
        message = "The adapter's name is in use; choose another, or set load_inplace to replace it."
        raise ApiError(400, message, code="adapter_in_use", param="lora_name")
