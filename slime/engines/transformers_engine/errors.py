"""The errors a request can end in, each with the status and body a real SGLang server gives for it."""

from typing import Any


class RequestError(Exception):
    """A request that is answered with an error; `body` is sent as JSON, or as text when it is a string."""

    status = 400

    @property
    def body(self) -> Any:
        """The answer's body."""
        return {"error": {"message": str(self)}}


class InvalidValue(RequestError):  # noqa: N818 - named for what the client sent
    """A well-formed request whose values cannot be served."""


class ContractViolation(RequestError):  # noqa: N818
    """A body whose keys or types break the API's contract."""

    @property
    def body(self) -> Any:
        """The gate's flat form."""
        return {"error": str(self)}


class MalformedBody(RequestError):  # noqa: N818
    """A body that is no JSON object of the expected shape at all."""

    @property
    def body(self) -> Any:
        """The validator's form."""
        return {"object": "error", "message": str(self), "type": "Bad Request", "param": None, "code": 400}


class InternalFault(RequestError):  # noqa: N818
    """A request that crashes the real server's handler (an expanded pad, a missing file)."""

    status = 500

    @property
    def body(self) -> Any:
        """Plain text, as the real server answers; the reason goes to the log."""
        return "Internal Server Error"


class NotServing(RequestError):  # noqa: N818
    """The engine lives, and takes no work at the moment: it gave its memory back."""

    status = 503

    @property
    def body(self) -> Any:
        """The form of a scheduler's failure."""
        return {"object": "error", "message": str(self), "type": "503", "param": None, "code": 503}


class EngineFailed(NotServing):
    """The model thread died; the engine ends and every open request with it."""
