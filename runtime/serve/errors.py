"""Error answers: OpenAI's error object and the HTTP status."""

import asyncio
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from turbochain.runtime.errors import InputError


class Refused(Exception):
    """An answer that is an error. `status` is HTTP's; `type`, `param` and `code` mean as in OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Take the parts of the answer; `retry_after`: the seconds after which a client should try again."""
        super().__init__(message)
        self.status, self.message, self.type, self.param, self.code = status, message, type, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def body_at(self, path: str) -> dict[str, Any]:
        """Return the JSON of the answer to a request at this path: A1111's clients also find what they read."""
        return self.body | ({"detail": self.message, "errors": self.message} if path.startswith("/sdapi/") else {})

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        found = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        return found | ({"WWW-Authenticate": 'Bearer realm="turbochain"'} if self.status == 401 else {})

    def __reduce__(self) -> Any:
        """Let it pass from process to process, as Ray's replicas need it."""
        more = {"type": self.type, "param": self.param, "code": self.code, "retry_after": self.retry_after}
        return _again, (self.status, self.message, more)


def _again(status: int, message: str, more: dict[str, Any]) -> Refused:
    return Refused(status, message, **more)


_ARGUMENTS = (
    *("prompt", "negative_prompt", "image", "mask_image", "mask", "init_images", "strength", "num_inference_steps"),
    *("guidance_scale", "seed", "n", "size", "height", "output_format", "response_format", "loras", "low", "high"),
    *("control_image", "controlnet_conditioning_scale", "controlnet", "control_guidance_start", "control_guidance_end"),
)
_PARAMS = {"mask_image": "mask", "height": "size", "low": "canny", "high": "canny"}
"""The names that clients have for some arguments."""


def of_input(error: InputError) -> Refused:
    """Return the answer to a bad argument; a message that begins with an argument's name says which."""
    named = re.match(rf"(?:the )?({'|'.join(_ARGUMENTS)})\b", str(error))
    return Refused(400, str(error), param=_PARAMS.get(named[1], named[1]) if named else None)


def of_validation(errors: Sequence[Any]) -> Refused:
    """Return the answer to a body with a wrong form, in which pydantic found these errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    if not where:
        return Refused(400, "the body is no JSON object: one with a prompt was expected")
    return Refused(400, f"{'.'.join(where)}: {first['msg']}", param=where[0])


def overloaded(message: str, seconds: float, *, status: int = 503) -> Refused:
    """Return the answer if the queue has no room; `seconds`: when there may be some."""
    return Refused(status, message, type="server_error", code="overloaded", retry_after=seconds)


def unavailable(message: str, code: str, seconds: float = 1.0) -> Refused:
    """Return the answer if the server cannot draw now: it starts, it ends, or its GPU has failed."""
    return Refused(503, message, type="server_error", code=code, retry_after=seconds)


def failed(error: BaseException) -> Refused:
    """Return the answer if drawing failed although the input was sound."""
    return Refused(500, f"the picture could not be drawn: {error}", type="server_error", code="failed")


@asynccontextmanager
async def in_time(seconds: float, mean: float) -> AsyncIterator[None]:
    """Let the block take so long, waiting included; Refused (503) if it takes longer. `mean`: seconds of a picture."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise unavailable(f"the picture was not ready after {seconds:g} s", "timeout", mean) from None
