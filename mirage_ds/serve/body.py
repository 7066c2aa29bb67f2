"""A request's JSON → what is asked; a request that cannot be answered is Refused with its status."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from mirage_ds.errors import shown
from mirage_ds.evaluate.spec import Sampling

# Below it the likeliest token is certain, and dividing by it leaves float32.
COLDEST = 1e-4
# Keys that no answer follows from, those of an answer that is sent back among them.
IGNORED = "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls annotations latents"
# What asks for nothing that is not here.
NEUTRAL: dict[str, Any] = {
    **{"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "top_k": -1, "min_p": 0},
    **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": False, "logit_bias": {}},
}


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP; param: the request's key that it is about; code: a word for programs.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Shape(BaseModel):
    """A JSON object of the protocol; null is its way to leave a key out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known, ignored = NEUTRAL.get, IGNORED.split()
        return {key: one for key, one in values.items() if not (one is None or key in ignored or one == known(key))}


class ImageUrl(Shape):
    """Where a picture is: a data: or file: URL. `detail` is OpenAI's own affair."""

    url: str
    detail: str = ""


class Text(Shape):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Picture(Shape):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Shape):
    """A turn; a text is one part."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[Text | Picture, Field(discriminator="type")]],
        BeforeValidator(lambda one: [{"type": "text", "text": one}] if isinstance(one, str) else one),
    ]
    name: str = ""


class Asked(Shape):
    """What POST /v1/chat/completions takes."""

    model: str = ""
    messages: list[Message] = Field(min_length=1)
    n: int = Field(1, ge=1, le=128)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float = Field(1, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    stop: Annotated[
        list[Annotated[str, Field(max_length=200)]],
        Field(max_length=16),
        BeforeValidator(lambda one: [one] if isinstance(one, str) else one),
    ] = []
    stream: bool = False
    stream_options: dict[str, bool] = {}

    @property
    def sampling(self) -> Sampling | None:
        """How tokens are drawn; None for the likeliest, as `mirage-ds evaluate` takes it where nothing is said."""
        warmth = self.temperature or 0
        return Sampling(warmth, self.top_p) if warmth >= COLDEST else None

    @property
    def new_tokens(self) -> int:
        """Tokens of an answer, at most; 0 where nothing is said."""
        return self.max_completion_tokens or self.max_tokens or 0


def read_body(content: bytes | bytearray, model: str, most_tokens: int) -> Asked:
    """Parse a request.

    Args:
        model: the only one that is served; most_tokens: of an answer.

    Raises:
        Refused: it is no JSON, has a key or a value that is not known, or asks for what this server does not give.
    """
    try:
        asked = Asked.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Both may hold what was sent, at any length.
        param = ".".join(map(str, first["loc"]))[:100]
        said = "is not known here; leave it out" if first["type"] == "extra_forbidden" else first["msg"][:300]
        raise Refused(400, f"{param or 'the request'}: {said}", param or None, first["type"]) from None
    if asked.model not in ("", model):
        raise Refused(404, f"no model {shown(asked.model)}; {model} is served", "model", "model_not_found")
    if asked.n > 1 and asked.temperature is None:
        raise Refused(400, f"n {asked.n} without a temperature: all answers would be alike; give one", "temperature")
    if asked.new_tokens > most_tokens:
        what = f"max_tokens {asked.new_tokens}: answers have at most {most_tokens} tokens here (--max_new_tokens)"
        raise Refused(400, what, "max_tokens")
    return asked
