"""Typed getters: right values pass, everything else is refused with the path of the key."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbackupd.errors import GuestProtocolError
from vmbackupd.typed import (
    TypedError,
    get_bool,
    get_float,
    get_int,
    get_list,
    get_object,
    get_objects,
    get_str,
    get_strs,
    parse_object,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
OBJECT = {
    "text": "vda",
    "number": 7,
    "real": 1.5,
    "yes": True,
    "list": ["a", "b"],
    "object": {"x": 1},
    "objects": [{"size": 1}, {"size": -1}],
    "null": None,
}


def test_right_values() -> None:
    assert get_str(OBJECT, "text", max_length=3) == "vda"
    assert get_int(OBJECT, "number", minimum=7, maximum=7) == 7
    assert get_float(OBJECT, "real") == 1.5
    assert get_float(OBJECT, "number") == 7.0
    assert get_bool(OBJECT, "yes") is True
    assert get_list(OBJECT, "list") == ["a", "b"]
    assert get_strs(OBJECT, "list") == ["a", "b"]
    assert get_object(OBJECT, "object") == {"x": 1}
    assert get_objects(OBJECT, "objects") == [("objects[0]", {"size": 1}), ("objects[1]", {"size": -1})]


def test_defaults_for_absent_and_null() -> None:
    assert get_str(OBJECT, "absent", None) is None
    assert get_int(OBJECT, "null", 3) == 3
    assert get_list(OBJECT, "null", []) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_str(OBJECT, "absent"), "absent: missing"),
        (lambda: get_str(OBJECT, "null"), "null: missing"),
        (lambda: get_str(OBJECT, "number"), "number: expected a string, got 7"),
        (
            lambda: get_str(OBJECT, "text", max_length=2),
            "text: expected a string of 0 to 2 characters, got 3 characters",
        ),
        (lambda: get_str({"a": "x\0"}, "a"), "a: expected text without NUL"),
        (lambda: get_str({"a": "\ud800"}, "a"), "a: expected text without NUL"),
        (lambda: get_int(OBJECT, "yes"), "yes: expected an integer from 0 to 9223372036854775807, got True"),
        (lambda: get_int(OBJECT, "real"), "real: expected an integer"),
        (lambda: get_int({"a": 10**100}, "a"), "a: expected an integer .*, got a huge integer"),
        (lambda: get_float({"a": float("nan")}, "a"), "a: expected a number"),
        (lambda: get_bool(OBJECT, "number"), "number: expected true or false, got 7"),
        (lambda: get_list(OBJECT, "list", max_length=1), "list: expected a list of 0 to 1 items, got 2 items"),
        (lambda: get_strs({"a": ["x", 1]}, "a"), r"a\[1\]: expected a string, got 1"),
        (lambda: get_object(OBJECT, "list"), "list: expected an object, got a list"),
        (lambda: get_objects(OBJECT, "list"), r"list\[0\]: expected an object, got 'a'"),
    ],
)
def test_wrong_values(call: object, message: str) -> None:
    with pytest.raises(TypedError, match=f"^{message}"):
        call()  # type: ignore[operator]


def test_paths_and_error_class() -> None:
    for path, item in get_objects(OBJECT, "objects", at="report"):
        if item["size"] < 0:
            with pytest.raises(GuestProtocolError, match=r"^report\.objects\[1\]\.size: expected an integer"):
                get_int(item, "size", at=path, error=GuestProtocolError)


@given(JSON)
def test_no_value_makes_a_getter_stumble(value: object) -> None:
    for getter in (get_str, get_int, get_float, get_bool, get_list, get_object, get_objects, get_strs):
        try:
            getter({"key": value}, "key")  # type: ignore[operator]
        except TypedError as reason:
            assert str(reason).startswith("key")
            assert len(str(reason)) < 300


@given(st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()))
def test_documents(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data, what="reply"), dict)
    except TypedError as reason:
        assert str(reason).startswith("reply")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a":' * 100_000, '{"a": ' + "1" * 10_000 + "}", "\ud800"]
)
def test_refused_documents(text: str) -> None:
    with pytest.raises(TypedError, match="^reply"):
        parse_object(text, what="reply")


@pytest.mark.parametrize(
    "text", ['{"a": "\\ud800"}', '{"\\uDfff": 1}', '{"a": ["\ud800"]}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xff"}']
)
def test_half_a_surrogate_pair_is_no_text(text: str | bytes) -> None:
    """It could be read, and then neither written nor hashed."""
    with pytest.raises(TypedError, match="^reply is not valid JSON"):
        parse_object(text, what="reply")


def test_whole_surrogate_pairs_are() -> None:
    assert parse_object('{"a": "\\ud83d\\ude00"}', what="reply") == {"a": "😀"}


def test_long_documents() -> None:
    with pytest.raises(TypedError, match="at most 10"):
        parse_object("{}" + " " * 10, what="reply", max_length=10)
