"""The row formats of the field, and how each becomes a row of `mllm_cl.data.rows`.

A format is one entry of `FORMATS`: which keys it consumes and how it lists its turns as `(role, content, key)`. What is
the same for all of them (images, placeholders, answers, the instruction suffix, kept keys) is done once, in
`convert_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllm_cl.data.content import (
    answer_text,
    answer_texts,
    check_no_image_left,
    content_blocks,
    image_references,
    is_missing,
    own_id,
    resolve_image,
    type_name,
    wrong_type,
)
from mllm_cl.data.grounding import fill_objects
from mllm_cl.data.problems import RowError
from mllm_cl.data.rows import Row, message_text, text_block
from mllm_cl.errors import DataError, suggest

Turn = tuple[str, Any, str]  # role, content as read, key for messages

_LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_ROLES = {
    **_LLAVA_ROLES,
    "user": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# ms-swift's names of a question and of its answer (ResponsePreprocessor); `answer` and `answers` are read everywhere.
_QUESTION_KEYS = ("query", "question", "prompt", "instruction", "problem", "input")
_RESPONSE_KEYS = ("response", "output", "solution", "target", "targets", "completion", "answer_key")
_SYSTEM_KEYS = ("system", "system_prompt")
_PAIR_KEYS = ("conversation", "texts")


@dataclass(frozen=True)
class RowFormat:
    """One format: a line for listings, the keys that become messages, and the turns of a raw row."""

    description: str
    consumed: frozenset[str]
    turns: Callable[[Mapping[str, Any]], Iterator[Turn]]


def _required(raw: Mapping[str, Any], key: str, format: str) -> Any:
    if raw.get(key) is None:
        found = detect_row_format(raw)
        other = f"it looks like format {found[0]!r}" if found else f"its keys are: {', '.join(map(str, raw)) or 'none'}"
        raise RowError(
            f"no `{key}`; {other}.",
            kind="missing_key",
            expected=f"rows of format {format!r}: {FORMATS[format].description}",
            fix=f"add `{key}`, or set `format:` to what the file holds.",
        )
    return raw[key]


def _records(value: Any, key: str) -> Sequence[Mapping[str, Any]]:
    """Returns a list of turns; an object of lists (how Arrow may store it) is turned around."""
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, cells)) for cells in zip(*value.values())]
    if not isinstance(value, (list, tuple)):
        raise wrong_type(key, value, "a list of turns")
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            raise wrong_type(f"{key}[{number}]", turn, "an object with a role and a text")
    return value


def _role(value: Any, key: str, roles: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in roles:
        raise RowError(
            f"`{key}`: unknown role {value!r}.",
            kind="unknown_role",
            expected=", ".join(sorted(roles)),
            fix="rename the role (format 'sharegpt' knows more), or remove the row; tool calls are not supported.",
        )
    return roles[value]


def _system_turn(raw: Mapping[str, Any], turns: Any = ()) -> Iterator[Turn]:
    """The text of `system`, unless the conversation begins with a system turn of its own."""
    first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
    has_own = isinstance(first, Mapping) and "system" in (first.get("from"), first.get("role"))
    if isinstance(raw.get("system"), str) and raw["system"] and not has_own:
        yield "system", raw["system"], "system"


def _check_weight(turn: Mapping[str, Any], key: str) -> None:
    for name in ("loss", "weight"):
        value = turn.get(name)
        if value is not None and not value:
            raise RowError(
                f"`{key}.{name}` is {value!r}: an answer that is not to be learnt.",
                kind="wrong_type",
                expected="answers that are all learnt",
                fix="move the answer's text into the question before it, or remove the row.",
            )


def _conversation_turns(raw: Mapping[str, Any], format: str, roles: Mapping[str, str]) -> Iterator[Turn]:
    name = "conversation" if raw.get("conversations") is None and "conversation" in raw else "conversations"
    conversation = _required(raw, name, format)
    yield from _system_turn(raw, conversation)
    for number, turn in enumerate(_records(conversation, name)):
        key = f"{name}[{number}]"
        _check_weight(turn, key)
        role, text = (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
        if role is None or text is None:
            raise RowError(
                f"`{key}` has no {'`from`' if role is None else '`value`'}.",
                kind="missing_key",
                expected='turns {"from": "human", "value": ...}',
                fix="complete the turn, or remove the row.",
            )
        yield _role(role, key, roles), text, key


def _llava_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    return _conversation_turns(raw, "llava", _LLAVA_ROLES)


def _sharegpt_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    return _conversation_turns(raw, "sharegpt", _ROLES)


def _message_turns(value: Any, key: str) -> Iterator[Turn]:
    for number, turn in enumerate(_records(value, key)):
        place = f"{key}[{number}]"
        _check_weight(turn, place)
        yield _role(turn.get("role", turn.get("from")), place, _ROLES), turn.get("content", turn.get("value")), place


def _messages_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    messages = _required(raw, "messages", "messages")
    yield from _system_turn(raw, messages)
    yield from _message_turns(messages, "messages")


def _pair_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    key = next((name for name in _PAIR_KEYS if raw.get(name) is not None), _PAIR_KEYS[0])
    yield from _system_turn(raw)
    for number, pair in enumerate(_records(_required(raw, key, "turn_pairs"), key)):
        for names, role in ((("human", "user"), "user"), (("assistant",), "assistant")):
            name = next((name for name in names if pair.get(name) is not None), None)
            if name is not None:
                yield role, pair[name], f"{key}[{number}].{name}"


def _prompt_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    _required(raw, "prompt", "prompt_completion")
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = raw.get(key)
        if isinstance(value, str):
            yield role, value, key
        elif value is not None:
            yield from _message_turns(value, key)


def _llava_test_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    yield "user", _required(raw, "text", "llava_test"), "text"


def _query_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    question = next((key for key in _QUESTION_KEYS if not is_missing(raw.get(key))), None)
    system = next((raw[key] for key in _SYSTEM_KEYS if not is_missing(raw.get(key))), None)
    text = _required(raw, question or "query", "query_response")
    yield from _framed_turns({**raw, "system": system}, text, question or "query")
    response = next((key for key in _RESPONSE_KEYS if not is_missing(raw.get(key))), None)
    if response is not None and (response == "response" or not answer_texts(raw)):
        yield "assistant", answer_text(raw[response], response), response


def _alpaca_turns(raw: Mapping[str, Any]) -> Iterator[Turn]:
    instruction = _required(raw, "instruction", "alpaca")
    if isinstance(instruction, str) and isinstance(raw.get("input"), str) and raw["input"]:
        instruction = f"{instruction}\n{raw['input']}" if instruction else raw["input"]
    yield from _framed_turns(raw, instruction, "instruction")
    if not is_missing(raw.get("output")):
        yield "assistant", raw["output"], "output"


def _framed_turns(raw: Mapping[str, Any], question: Any, key: str) -> Iterator[Turn]:
    """The system text, the pairs of `history` and the question, as ms-swift and LLaMA-Factory order them."""
    yield from _system_turn(raw)
    for number, pair in enumerate(raw.get("history") or []):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise wrong_type(f"history[{number}]", pair, "a pair [question, answer]")
        yield "user", pair[0], f"history[{number}][0]"
        yield "assistant", pair[1], f"history[{number}][1]"
    yield "user", question, key


def _format(description: str, consumed: str, turns: Callable[[Mapping[str, Any]], Iterator[Turn]]) -> RowFormat:
    return RowFormat(description, frozenset(consumed.split()), turns)


FORMATS: dict[str, RowFormat] = {
    "llava": _format(
        "`conversations` of `from` human/gpt and `value` with `<image>`, `image`", "conversations system", _llava_turns
    ),
    "llava_test": _format("`question_id`, `image`, `text`, `answer`", "text", _llava_test_turns),
    "sharegpt": _format(
        "`conversations` with any usual role names, `images`", "conversations conversation system", _sharegpt_turns
    ),
    "messages": _format("`messages` of `role` and `content` (text or blocks), `images`", "system", _messages_turns),
    "prompt_completion": _format(
        "`prompt` and `completion` (texts or lists of messages), `images`", "prompt completion", _prompt_turns
    ),
    "query_response": _format(
        "`query`, `question`, `prompt`, `problem`, ... and `response`, `answer`, `output`, `solution`, ...; `images`",
        "query question response system system_prompt history",
        _query_turns,
    ),
    "alpaca": _format(
        "`instruction`, `input`, `output`, `images`", "instruction input output system history", _alpaca_turns
    ),
    "turn_pairs": _format(
        "`conversation` of `human` and `assistant`, or `texts` of `user` and `assistant`; `images`",
        "conversation texts system",
        _pair_turns,
    ),
}


def check_format(format: str) -> None:
    """Raises `DataError` with a suggestion if `format` is neither `"auto"` nor in `FORMATS`."""
    if format != "auto" and format not in FORMATS:
        raise DataError(f"format: unknown format {format!r}.", expected=suggest(format, ["auto", *FORMATS]))


def detect_row_format(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns the format of a raw row and the reason, or `None` if it looks like none of them.

    Example:

    ```python
    >>> from mllm_cl.data.formats import detect_row_format
    >>> detect_row_format({"question_id": 1, "text": "What is it?", "answer": "a cat"})
    ('llava_test', 'it has `text` with `question_id` or an answer')

    ```
    """
    has = {key for key, value in raw.items() if value is not None}
    if "messages" in has:
        return "messages", "it has `messages`"
    if "conversations" in has:
        try:
            turns = _records(raw["conversations"], "conversations")
        except RowError:
            turns = []
        roles = [turn.get("from") for turn in turns]
        if "images" not in has and all(isinstance(role, str) and role in _LLAVA_ROLES for role in roles):
            return "llava", "it has `conversations` of `from` human/gpt"
        return "sharegpt", "it has `conversations` with `images` or with other roles than human/gpt"
    for key in _PAIR_KEYS:
        keys = _first_keys(raw.get(key))
        if "assistant" in keys and {"human", "user"} & keys:
            return "turn_pairs", f"it has `{key}` of questions and answers"
    if {"from", "value"} <= _first_keys(raw.get("conversation")):
        return "sharegpt", "it has `conversation` of `from` and `value`"
    others = [key for key in _RESPONSE_KEYS if key in has and key != "completion"]
    if isinstance(raw.get("prompt"), str) and "completion" not in has and others:
        return "query_response", f"it has `prompt` with `{others[0]}`"
    if "prompt" in has:
        return "prompt_completion", "it has `prompt`"
    if "instruction" in has and has & {"output", "input"}:
        return "alpaca", "it has `instruction` with `input` or `output`"
    if "text" in has and has & {"question_id", "answer", "answers"}:
        return "llava_test", "it has `text` with `question_id` or an answer"
    for key in ("query", "question"):
        if key in has:
            return "query_response", f"it has `{key}`"
    for key in ("instruction", "problem", "input"):
        answers = [name for name in (*_RESPONSE_KEYS, "answer", "answers") if name in has]
        if key in has and answers:
            return "query_response", f"it has `{key}` with `{answers[0]}`"
    return None


def _first_keys(records: Any) -> set[str]:
    """The keys of the first of some records, whichever way Arrow stored them."""
    first = records[0] if isinstance(records, (list, tuple)) and records else records
    return set(first) if isinstance(first, Mapping) else set()


def convert_row(
    raw: Any,
    *,
    format: str,
    default_id: str,
    split: str = "train",
    image_root: str = "",
    suffix: str | None = None,
) -> Row:
    """Returns the row that a raw row of a known format stands for.

    Args:
        raw (`dict`): the row as it was read.
        format (`str`): a key of `FORMATS`.
        default_id (`str`): the id of a row that brings none.
        split (`str`, defaults to `"train"`): every other split gets `answers`.
        image_root (`str`): folder that relative image paths are relative to.
        suffix (`str`, *optional*): instruction appended to the last user turn on its own line, unless already there.

    Raises:
        RowError: the row cannot be converted; `kind` says why.
    """
    if not isinstance(raw, Mapping):
        raise RowError(
            f"the row is {type_name(raw)}.", kind="not_an_object", expected="an object", fix="correct or remove it."
        )
    style = FORMATS[format]
    row_id = own_id(raw) or default_id
    messages: list[dict[str, Any]] = []
    inline: list[Any] = []
    for role, content, key in style.turns(raw):
        blocks, references = content_blocks(content, role, key)
        messages.append({"role": role, "content": blocks})
        inline += [resolve_image(reference, image_root, key) for reference in references]
    fill_objects(messages, raw.get("objects"))
    images = image_references(raw, image_root) or inline
    if not images:
        check_no_image_left(raw)
    answers = answer_texts(raw)
    is_answered = bool(messages) and messages[-1]["role"] == "assistant"
    if answers and not is_answered and messages and split == "train":
        messages.append({"role": "assistant", "content": [text_block(answers[0])]})
    elif not answers and is_answered and split != "train":
        answers = [message_text(messages[-1])]
    row: dict[str, Any] = {key: value for key, value in raw.items() if key not in style.consumed}
    row.pop("image", None)
    row.update(id=row_id, messages=messages, images=images)
    row.pop("answers", None)
    if answers:
        row["answers"] = answers
    _place_images(row)
    if suffix:
        _append_suffix(messages, suffix)
    return row  # type: ignore[return-value]


def _place_images(row: dict[str, Any]) -> None:
    """Checks one block per image; without any block the images go first in the first user turn, as TRL does."""
    images, turns = row["images"], [message["content"] for message in row["messages"] if message["role"] == "user"]
    blocks = sum(block["type"] == "image" for turn in turns for block in turn)
    if blocks == len(images):
        return
    if blocks == 0 and turns:
        turns[0][:0] = [{"type": "image"} for _ in images]
        return
    raise RowError(
        f"{blocks} `<image>` in the text but {len(images)} image{'s' * (len(images) != 1)}.",
        kind="placeholders",
        expected="one `<image>` per image, or none at all (images then come first)",
        fix="add or remove `<image>` in the text, or correct `image`/`images`.",
        partial=row,
    )


def _append_suffix(messages: Sequence[Mapping[str, Any]], suffix: str) -> None:
    content = next((message["content"] for message in reversed(messages) if message["role"] == "user"), None)
    if content is None:
        return
    texts = [block for block in content if block["type"] == "text"]
    if not texts:
        content.append(text_block(suffix))
    elif not texts[-1]["text"].rstrip().endswith(suffix.strip()):
        texts[-1]["text"] = f"{texts[-1]['text'].rstrip()}\n{suffix}"
