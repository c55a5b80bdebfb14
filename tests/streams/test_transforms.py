"""Transforms of training rows: deterministic, rule-based, and never of test rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mllm_cl.data.rows import Rows, assistant_message, message_text, text_block, user_message
from mllm_cl.data.validate import Checks
from mllm_cl.errors import StreamError
from mllm_cl.streams import Stream, Task, arrange, validate_stream
from mllm_cl.streams.transforms import LETTER, SHORT, bare

COLOURS = ("red", "blue", "green", "black", "white", "brown")


def row(name: str, question: str, answer: str, images: int = 0) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [user_message(question, images), assistant_message(answer)],
        "images": [f"{name}.png"] * images,
    }


def stream(train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> Stream:
    task = Task("a", train=Rows(train), test=Rows(test or train[:3]))  # type: ignore[arg-type]
    return Stream("s", (task,))


def colours(count: int = 400) -> list[dict[str, Any]]:
    return [row(f"r{n}", f"Which colour? ({n})\n{SHORT[0]}", COLOURS[n % 6], images=1) for n in range(count)]


def changed(transforms: list[dict[str, Any]], train: list[dict[str, Any]], seed: int = 0) -> list[Any]:
    return list(arrange(stream(train), transforms=transforms, seed=seed)["a"].train)


def question(found: Any) -> str:
    return message_text(found["messages"][-2])


def answer(found: Any) -> str:
    return message_text(found["messages"][-1])


def test_answer_styles_change_the_asked_share_and_keep_the_truth() -> None:
    train = colours()
    found = changed([{"answer_styles": {"share": 0.3}}], train)
    styles = Counter(new.get("style") for new in found)
    assert 90 <= 400 - styles[None] <= 150
    assert set(styles) == {None, "yes_no", "choice", "sentence"}
    for old, new in zip(train, found):
        assert new["id"] == old["id"]
        assert new["images"] == old["images"]
        truth = answer(old)
        if new.get("style") is None:
            assert new == old
            continue
        assert [block["type"] for block in new["messages"][-2]["content"]] == ["image", "text"]
        assert SHORT[0] not in question(new)
        if new["style"] == "sentence":
            assert answer(new) == f"The answer is {truth}."
        elif new["style"] == "yes_no":
            assert (f'Is the answer "{truth}"?' in question(new)) == (answer(new) == "Yes")
        else:
            line = next(line for line in question(new).splitlines() if line.startswith(answer(new) + ". "))
            assert line == f"{answer(new)}. {truth}"
            assert question(new).endswith(LETTER[0])
            assert len({line[3:] for line in question(new).splitlines() if line[1:3] == ". "}) == 4
    assert 0.3 < sum(answer(new) == "Yes" for new in found if new.get("style") == "yes_no") / styles["yes_no"] < 0.7


def test_a_row_changes_the_same_way_in_every_subset_and_order() -> None:
    train = colours(120)
    options = [{"answer_styles": {"share": 0.5, "styles": ["sentence"]}}]
    whole = {new["id"]: new for new in changed(options, train)}
    for new in changed(options, list(reversed(train[:40]))):
        assert new == whole[new["id"]]
    assert list(whole.values()) != changed(options, train, seed=1)


def test_rows_for_which_no_style_fits_stay() -> None:
    talk = row("talk", "What?", "red")
    talk["messages"] = [user_message("Hi"), assistant_message("Hello"), *talk["messages"]]
    inside = row("inside", "What?", "blue", images=1)
    inside["messages"][0]["content"] = [text_block("Look:"), {"type": "image"}, text_block("What is it?")]
    kept = [
        row("box", "Where?", "[0.1, 0.2, 0.3, 0.4]"),
        row("letter", "Which?\nA. x\nB. y", "A"),
        row("long", "Tell me.", "A very long answer that goes on and on, far beyond what anybody could call short."),
        talk,
        inside,
    ]
    assert changed([{"answer_styles": {"share": 1.0}}], kept) == kept
    yes = changed([{"answer_styles": {"share": 1.0}}], [row("1", "Is it?", "yes"), row("2", "Is it?", "no")])
    assert [new["style"] for new in yes] == ["sentence", "sentence"]
    alone = changed([{"answer_styles": {"share": 1.0, "styles": ["choice"]}}], [row("1", "What?", "red")])
    assert "style" not in alone[0]


def test_instructions_are_rewritten_with_the_same_meaning() -> None:
    train = [*colours(60), row("other", "What?", "red")]
    found = changed([{"rewrite_instructions": {}}], train)
    assert found[-1] == train[-1]
    ends = Counter(next(text for text in SHORT if question(new).endswith(text)) for new in found[:-1])
    assert SHORT[0] not in ends
    assert set(ends) == set(SHORT[1:])
    assert [answer(new) for new in found] == [answer(old) for old in train]
    assert bare(question(found[0])) == "Which colour? (0)"
    mine = [["What is it?", "Name it."]]
    asked = [row("1", "What is it?", "red"), row("2", "Name it.", "red")]
    assert [question(new) for new in changed([{"rewrite_instructions": {"phrases": mine}}], asked)] == [
        "Name it.",
        "What is it?",
    ]


def test_test_rows_stay_and_transformed_rows_are_valid() -> None:
    base = stream([row(f"r{n}", f"Which?\n{SHORT[0]}", COLOURS[n % 6]) for n in range(60)])
    made = arrange(base, transforms=[{"rewrite_instructions": {}}, {"answer_styles": {"share": 0.5}}])
    assert list(made["a"].test) == list(base["a"].test)
    assert validate_stream(made, checks=Checks(images="none")).problems == validate_stream(base).problems
    assert made.fingerprint != arrange(base, limit=60).fingerprint


@pytest.mark.parametrize(
    ("transforms", "part"),
    [
        ([{"answer_style": {}}], "did you mean 'answer_styles'?"),
        (["answer_styles"], "one `name: {options}`"),
        ([{"answer_styles": {"shares": 1}}], "did you mean 'share'?"),
        ([{"answer_styles": {"share": 0}}], "transforms[0].answer_styles.share: 0 given"),
        ([{"answer_styles": {"styles": ["yesno"]}}], "did you mean 'yes_no'?"),
        ([{"rewrite_instructions": {"phrases": ["one"]}}], "lists of at least two texts"),
    ],
)
def test_mistakes_in_a_recipe(transforms: list, part: str) -> None:
    with pytest.raises(StreamError) as caught:
        arrange(stream(colours(4)), transforms=transforms)
    assert part in str(caught.value)
