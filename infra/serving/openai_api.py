"""OpenAI's API: chats, completions and models. The classes are the bodies, and make the page /openapi.json.

A model's name is the lineage, with a version, a task, or both: support, support@7, support/billing, support@7/billing.
The server renders the task's prompt. A task of chats takes the messages; any other task takes one user message.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, StrictBool, StrictInt, StrictStr, ValidationError
from pydantic.json_schema import models_json_schema

from deal_core.data.chats import ROLES, normal_calls, role_of
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.answerer import Answered, Choice, GivenUpError, Pieces, Sampling
from deal_core.evaluation.answering import InputRow, ServedTask, ServedVersion, require_few_messages
from deal_core.safe_text import brief
from infra.serving.champion import Champion
from infra.serving.engines import MAX_TOPS, PASSED_ON
from infra.serving.formats import Caller, HttpAnswer, RefusalError, decode_object, refusing

DONE = "data: [DONE]\n\n"
BODY = '{"model": LINEAGE, "messages": [{"role": "user", "content": "the text"}]}'


# A field's description says what it has to be; a refusal shows it.
NumTokens = Annotated[StrictInt | None, Field(ge=1, le=1_000_000, description="number from 1 to 1000000")]
NumAnswers = Annotated[StrictInt | None, Field(ge=1, le=128, description="number from 1 to 128")]
NumTops = Annotated[StrictInt | None, Field(ge=0, le=MAX_TOPS, description=f"number from 0 to {MAX_TOPS}")]


class _Request(BaseModel):
    """What both kinds of requests may have. Other keys are ignored."""

    model: StrictStr = Field(description="name of a model: LINEAGE, LINEAGE/TASK, LINEAGE@VERSION/TASK")
    stream: StrictBool | None = Field(default=None, description="true or false")
    temperature: FiniteFloat | None = Field(default=None, description="number")
    top_p: FiniteFloat | None = Field(default=None, description="number")
    seed: StrictInt | None = Field(default=None, description="whole number")
    stop: StrictStr | list[StrictStr] | None = Field(default=None, description="text or list of texts")
    max_tokens: NumTokens = None
    max_completion_tokens: NumTokens = None
    n: NumAnswers = None
    user: StrictStr | None = Field(default=None, description="text, by which a canary chooses its requests")
    tools: Any = Field(default=None, description="nothing: the server has no tools")
    functions: Any = Field(default=None, description="nothing: the server has no functions")
    audio: Any = Field(default=None, description="nothing: the server has no audio")


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1, description="list of messages, each with role and content")
    logprobs: StrictBool | None = Field(default=None, description="true or false")
    top_logprobs: NumTops = None

    @property
    def num_tops(self) -> int | None:
        """For how many of the likeliest tokens the client wants log-probabilities; None: for none."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: StrictStr | Annotated[list[StrictStr], Field(min_length=1)] = Field(
        description="text or list of texts; token numbers are not read"
    )
    logprobs: NumTops = None

    @property
    def num_tops(self) -> int | None:
        """As that of a chat."""
        return self.logprobs


class TokenLogProb(BaseModel):
    """A token of a chat's answer, with the likeliest tokens at its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenLogProb]


class ChatLogProbs(BaseModel):
    """The log-probabilities of a chat's answer."""

    content: list[TokenLogProb]


class TextLogProbs(BaseModel):
    """The log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]


class Message(BaseModel):
    """An answer of a chat, or a piece of one. The first piece has the role."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class _Choice(BaseModel):
    """An answer. Of several rows, each has the id of its row, and a `problem` if it is no label of its task."""

    index: int
    finish_reason: str | None
    id: str = ""
    problem: str = ""


class ChatChoice(_Choice):
    """An answer of a chat."""

    message: Message
    logprobs: ChatLogProbs | None


class ChatPiece(_Choice):
    """A piece of an answer of a chat."""

    delta: Message
    logprobs: ChatLogProbs | None


class TextChoice(_Choice):
    """An answer of a completion, or a piece of one."""

    text: str
    logprobs: TextLogProbs | None


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Response(BaseModel):
    """The id is that of the row in the prediction log. The model is the version that answered."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatCompletion(_Response):
    """The answer to POST /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ChatChunk(_Response):
    """An event of a stream of POST /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPiece]


class Completion(_Response):
    """The answer to POST /v1/completions, or an event of its stream."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ModelCard(BaseModel):
    """A name that a client may give as its model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "deal"


class ModelList(BaseModel):
    """The answer to GET /v1/models: the champion, its version, and the champion for each task."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


async def complete(serving: Champion, body: bytes, caller: Caller, *, is_chat: bool) -> HttpAnswer:
    """Answer a body of POST /v1/chat/completions (`is_chat`) or /v1/completions.

    An engine gets the settings of sampling (temperature, top_p, seed, stop, max_tokens, logprobs, n). Without an engine
    they have no effect: an answer is the most likely one, up to the task's longest answer.
    """
    asked = _read(await decode_object(body, BODY), ChatRequest if is_chat else CompletionRequest)
    served = serving.served
    name, _, task_name = asked.model.partition("/")
    lineage, _, version = name.partition("@")
    if lineage != served.lineage:
        raise _not_found(f"model is {asked.model[:100]!r}; {served.lineage} is served here, or {served.lineage}/TASK.")
    sampling = _sampling(asked, serving)
    task = served.task(task_name or None)
    if task is None:
        names = ", ".join(task.schema.name for task in served.tasks)
        raise _not_found(f"model names the task {task_name!r}; the version that answers knows {names}.")
    texts = _chat_input(asked, task.schema) if isinstance(asked, ChatRequest) else _prompts(asked, task.schema)
    rows = [InputRow(text, task.schema.name) for text in texts]

    def require_version(*answering: str | None) -> None:
        if version and version not in answering:
            raise _not_found(f"Version {version} does not answer here; version {answering[0]} does.")

    require_version(serving.version, serving.canary)
    ids = serving.new_ids(len(rows)) if asked.stream and serving.streams else ()
    writer = _Writer(is_chat, bool(asked.stream), sampling.num_answers, ids)
    if asked.stream and serving.streams:

        async def pass_on(piece: Choice, served: ServedVersion, answering: str) -> None:
            if version not in ("", answering):
                raise GivenUpError(f"Version {version} does not answer any more; ask again.")
            await caller.send(answering, writer.event(served, answering, [writer.choice(piece)]))

        sampling = replace(sampling, pieces=Pieces(pass_on))
    with refusing():
        answered = await serving.ask(rows, caller.key or asked.user, version or None, sampling, ids)
    require_version(answered.version)  # the champion may have moved
    if not asked.stream:
        return HttpAnswer(writer.whole(answered, task), answered.version)
    rest = writer.usage_event(answered) if serving.streams else writer.events(answered, task)
    return HttpAnswer(rest + DONE, answered.version, "text/event-stream")


def _read(values: Mapping[str, Any], kind: type[ChatRequest | CompletionRequest]) -> ChatRequest | CompletionRequest:
    """Check a request. A refusal says what the first wrong key has to be."""
    for key in ("tools", "functions", "audio"):
        if values.get(key):
            raise _wrong(f"{key}: the server has no {key}; leave {key} out.")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, value = str(first["loc"][0]), first["input"]
        wanted = kind.model_fields[name].description
        if first["type"] == "missing":
            raise _wrong(f"{name} is missing; give a {wanted}.") from None
        shown = f" {brief(value)}, which is" if isinstance(value, str | int | float) else ""
        raise _wrong(f"{name} is{shown} no {wanted}.") from None


def _sampling(asked: ChatRequest | CompletionRequest, serving: Champion) -> Sampling:
    """Return what a client wants of the engine, which checks what is passed on. Without an engine some is refused."""
    if serving.streams:
        passed_on = {key: value for key in PASSED_ON if (value := getattr(asked, key)) is not None}
        longest = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
        return Sampling(passed_on=passed_on, max_tokens=longest, num_answers=asked.n or 1, num_tops=asked.num_tops)
    if asked.num_tops is not None:
        raise _wrong("logprobs: the server has no log-probabilities; leave logprobs out.")
    if asked.n not in (None, 1):
        raise _wrong("n: the server gives one answer, the most likely one; leave n out.")
    return Sampling()


class _Writer:
    """Writes the answers to one request, whole or as the events of a stream."""

    def __init__(self, is_chat: bool, is_stream: bool, num_answers: int, ids: Sequence[str]) -> None:
        self._is_chat, self._is_stream, self._num_answers, self._ids = is_chat, is_stream, num_answers, ids
        self._head: dict[str, Any] = {}
        self._begun: set[int] = set()
        """The answers of which a piece was written."""

    def choice(self, answer: Choice, problem: str | None = None) -> ChatChoice | ChatPiece | TextChoice:
        """Return an answer, or a piece of one."""
        more: dict[str, Any] = {"index": answer.place, "finish_reason": answer.finish_reason}
        if len(self._ids) > 1:
            more["id"] = self._ids[answer.place // self._num_answers]
        if problem:
            more["problem"] = problem
        if not self._is_chat:
            return TextChoice(text=answer.text, logprobs=_text_log_probs(answer), **more)
        more["logprobs"] = _chat_log_probs(answer)
        if not self._is_stream:
            return ChatChoice(message=Message(role="assistant", content=answer.text), **more)
        is_first = answer.place not in self._begun
        self._begun.add(answer.place)
        role: dict[str, Any] = {"role": "assistant"} if is_first else {}
        return ChatPiece(delta=Message(content=answer.text, **role), **more)

    def event(self, served: ServedVersion, version: str, choices: Sequence[Any], **more: Any) -> str:
        """Return an event of a stream."""
        return f"data: {self._response(served, version, choices, **more)}\n\n"

    def usage_event(self, answered: Answered) -> str:
        """Return the event after the pieces of an engine, with the numbers of tokens."""
        return self.event(answered.served, answered.version, [], usage=_usage(answered))

    def events(self, answered: Answered, task: ServedTask) -> str:
        """Return the events of answers that come at once, each as one piece."""
        self._ids = answered.ids
        events: list[Any] = []
        for answer, problem in _answers(answered, task):
            piece = self.choice(answer, problem)
            if self._is_chat:  # the end of a chat is a piece of its own
                events.append(piece.model_copy(update={"finish_reason": None}))
                piece = piece.model_copy(update={"delta": Message.model_construct()})
            events.append(piece)
        return "".join(self.event(answered.served, answered.version, [event]) for event in events)

    def whole(self, answered: Answered, task: ServedTask) -> str:
        """Return the body of an answer that is no stream."""
        self._ids = answered.ids
        choices = [self.choice(answer, problem) for answer, problem in _answers(answered, task)]
        more = {"usage": usage} if (usage := _usage(answered)) else {}
        return self._response(answered.served, answered.version, choices, **more)

    def _response(self, served: ServedVersion, version: str, choices: Sequence[Any], **more: Any) -> str:
        if not self._head:
            own_id = [*self._ids, uuid.uuid4().hex][0]
            self._head = {"id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{own_id}", "created": int(time.time())}
        more = {**self._head, "model": f"{served.lineage}@{version}", "choices": choices, **more}
        response: _Response
        if not self._is_chat:
            response = Completion(object="text_completion", **more)
        elif self._is_stream:
            response = ChatChunk(object="chat.completion.chunk", **more)
        else:
            response = ChatCompletion(object="chat.completion", **more)
        return response.model_dump_json(exclude_unset=True)


def _answers(answered: Answered, task: ServedTask) -> Iterator[tuple[Choice, str | None]]:
    """Yield the whole answers, and what is wrong with each."""
    answers = answered.choices
    if not answers:  # of the model in this process
        is_cut = answered.is_cut or [False] * len(answered.answers)
        answers = [
            Choice(number, text, "length" if cut else "stop")
            for number, (text, cut) in enumerate(zip(answered.answers, is_cut, strict=True))
        ]
    for answer in answers:
        stripped = answer._replace(text=answer.text.strip())
        yield stripped, task.problem_of(stripped.text)


def _usage(answered: Answered) -> Usage | None:
    return Usage(**answered.usage, total_tokens=sum(answered.usage.values())) if answered.usage else None


def _text_log_probs(answer: Choice) -> TextLogProbs | None:
    if answer.log_probs is None:
        return None
    return TextLogProbs(
        tokens=[token for token, _, _ in answer.log_probs],
        token_logprobs=[value for _, value, _ in answer.log_probs],
        top_logprobs=[dict(tops) for _, _, tops in answer.log_probs],
    )


def _chat_log_probs(answer: Choice) -> ChatLogProbs | None:
    if answer.log_probs is None:
        return None

    def entry(token: str, value: float, tops: Sequence[tuple[str, float]] = ()) -> TokenLogProb:
        top_logprobs = [entry(*top) for top in tops]
        return TokenLogProb(token=token, logprob=value, bytes=list(token.encode()), top_logprobs=top_logprobs)

    return ChatLogProbs(content=[entry(*log_prob) for log_prob in answer.log_probs])


def list_models(served: ServedVersion, version: str) -> ModelList:
    """Return the body of GET /v1/models."""
    tasks = [f"{served.lineage}/{task.schema.name}" for task in served.tasks]
    return ModelList(data=[ModelCard(id=name) for name in (served.lineage, f"{served.lineage}@{version}", *tasks)])


def openapi() -> dict[str, Any]:
    """Return the body of GET /openapi.json: OpenAPI's description of the paths below /v1."""
    kinds = (ChatRequest, CompletionRequest, ChatCompletion, ChatChunk, Completion, ModelList)
    _, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}"
    )

    def content(kind: type[BaseModel]) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}}

    def path(request: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
        answers = {"200": {"description": response.__doc__, **content(response)}}
        return {"post": {"requestBody": {"required": True, **content(request)}, "responses": answers}}

    return {
        "openapi": "3.1.0",
        "info": {"title": "deal serve", "version": "1"},
        "paths": {
            "/v1/chat/completions": path(ChatRequest, ChatCompletion),
            "/v1/completions": path(CompletionRequest, Completion),
            "/v1/models": {"get": {"responses": {"200": {"description": ModelList.__doc__, **content(ModelList)}}}},
        },
        "components": {"schemas": definitions["$defs"]},
    }


def _wrong(message: str) -> RefusalError:
    return RefusalError(400, message, code="invalid_request_error")


def _not_found(message: str) -> RefusalError:
    return RefusalError(404, message, code="model_not_found")


def _chat_input(asked: ChatRequest, task: TaskSchema) -> list[str]:
    try:
        require_few_messages(len(asked.messages), "The chat")
    except ConfigError as error:
        raise _wrong(str(error)) from None
    chat = [_message(message) for message in asked.messages]
    if task.format == "chat":
        return [json.dumps(chat, ensure_ascii=False)]
    if [message["role"] for message in chat] != ["user"]:
        raise _wrong(
            f"The task {task.name} takes one text, under the server's instruction; send one message of the role user."
        )
    return [chat[0]["content"]]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with the keys that rows of chats are stored with (see `deal_core.data.chats`)."""
    if message.keys() == {"role", "content"} and type(message["content"]) is str and message["role"] in ROLES:
        return dict(message)  # most messages; a chat may have thousands
    role, calls = role_of(message), message.get("tool_calls")
    if not isinstance(role, str):
        raise _wrong("A message's role is no text; give role and content for each message.")
    if role not in ROLES:
        raise _wrong(f"A message has the role {brief(role)}; the roles are {', '.join(ROLES)}.")
    if calls and normal_calls(calls) is None:
        raise _wrong('tool_calls is no list of {"function": {"name": …, "arguments": …}}.')
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    if content is None and calls:
        content = ""
    elif parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        content = "\n".join(part["text"] for part in parts)  # as training joins them
    if not isinstance(content, str):
        raise _wrong("A message's content is no text; the server reads texts only.")
    names = ("tool_calls", "tool_call_id", "name") if role == "tool" else ("tool_calls",)
    kept = {name: message[name] for name in names if message.get(name)}  # clients send null for what is not there
    return {"role": role, "content": content, **kept}


def _prompts(asked: CompletionRequest, task: TaskSchema) -> list[str]:
    if task.format == "chat":
        raise _wrong(f"The task {task.name} takes chats; send its messages to /v1/chat/completions.")
    return [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
