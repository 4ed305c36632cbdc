from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightschool.content import content_id
from nightschool.errors import InputError
from nightschool.memory.conversations import Owner, Review
from nightschool.memory.formats import conversation_of

NOW = datetime(2025, 1, 1, tzinfo=UTC).timestamp()
HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(record):
    return conversation_of(record, NOW)


def said(record):
    return [(m["role"], m["content"]) for m in read(record).messages]


def chatgpt(*messages, **record):
    """Nodes in one line, each the parent of the next."""
    mapping = {"root": {"message": None, "parent": None}}
    for n, message in enumerate(messages):
        mapping[str(n)] = {"message": message, "parent": str(n - 1) if n else "root"}
    return {"mapping": mapping, "current_node": str(len(messages) - 1) if messages else "root"} | record


def spoken(role, *parts, kind="text", **message):
    return {"author": {"role": role}, "content": {"content_type": kind, "parts": list(parts)}} | message


# -- OpenAI ---


def test_chat_with_owner_times_and_reviews_is_read_whole():
    answer = {"role": "assistant", "content": "hello", "rating": -1, "correction": "good day", "created_utc": 7}
    record = {"messages": [HI[0], answer], "user_id": 12, "agent_id": "a", "session_id": "s", "created_utc": 5.5}
    read_back = read(record | {"model": "x", "temperature": 1})
    assert read_back.owner == Owner("12", "a", "s")
    assert read_back.messages == tuple(HI)
    assert read_back.created_utc == (5.5, 7.0)
    assert read_back.reviews == {1: Review(-1, "good day", None)}


def test_what_is_missing_is_the_default_user_the_hash_of_the_content_and_now():
    read_back = read({"messages": HI})
    assert read_back.owner == Owner("default", "", content_id(HI))
    assert (read_back.created_utc, read_back.reviews) == ((NOW, NOW), {})
    assert read({"messages": HI, "created_utc": 9, "agent_id": "", "session_id": ""}).owner == read_back.owner
    assert read({"messages": HI, "id": 0}).owner == read_back.owner  # many files count their lines so


def test_who_is_not_named_is_whom_the_caller_names():
    assert conversation_of({"messages": HI, "session_id": "s"}, NOW, "ada", "desk").owner == Owner("ada", "desk", "s")
    named = {"messages": HI, "session_id": "s", "user_id": "bo", "agent_id": "shop"}
    assert conversation_of(named, NOW, "ada", "desk").owner == Owner("bo", "shop", "s")
    with pytest.raises(InputError, match="did you mean user_id"):
        conversation_of({"messages": HI, "user": "bo"}, NOW, "ada")


def test_rating_of_zero_is_a_rating_and_null_is_none():
    zero = {"messages": [HI[0], HI[1] | {"rating": 0, "comment": None}]}
    assert read(zero).reviews == {1: Review(0, None, None)}
    assert read({"messages": [HI[0], HI[1] | {"rating": None}]}).reviews == {}


def test_keys_of_other_exporters_are_left_alone():
    kept = HI[1] | {"comments": None, "events": [], "rated_by": "x", "weight": 1, "rating": 1}
    assert read({"messages": [HI[0], kept]}).reviews == {1: Review(1.0)}


def test_what_was_done_with_a_reply_is_read():
    again = [HI[1] | {"event": "regenerated", "rating": -1}, HI[1] | {"content": "hey", "event": "copied"}]
    reviews = read({"messages": [HI[0], *again]}).reviews
    assert reviews == {1: Review(-1, event="regenerated"), 2: Review(event="copied")}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], "one\ntwo"),
        ([{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": "data:…"}}], "see\n[image_url]"),
        (["plain"], "plain"),
        ([], ""),
    ],
)
def test_parts_are_joined_and_what_is_no_text_leaves_its_kind(content, text):
    assert said({"messages": [{"role": "user", "content": content}]}) == [("user", text)]


def test_tool_calls_are_the_words_of_the_message():
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    record = {
        "messages": [
            {"role": "developer", "content": "be kind"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "rain", "tool_call_id": "1"},
            {"role": "assistant", "content": "Wait.", "tool_calls": calls},
            {"role": "assistant", "content": None, "refusal": "I cannot."},
        ]
    }
    written = '{"tool_calls":[{"function":{"arguments":"{}","name":"weather"},"id":"1","type":"function"}]}'
    assert said(record) == [
        ("system", "be kind"),
        ("assistant", written),
        ("tool", "rain"),
        ("assistant", f"Wait.\n{written}"),
        ("assistant", "I cannot."),
    ]


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        ("2024-01-02T03:04:05Z", datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("2024-01-02T03:04:05+02:00", datetime(2024, 1, 2, 1, 4, 5, tzinfo=UTC)),
        ("2018-10-29 03:32:08.296000", datetime(2018, 10, 29, 3, 32, 8, 296000, tzinfo=UTC)),
        ("2024-01-02", datetime(2024, 1, 2, tzinfo=UTC)),
    ],
)
def test_times_in_iso_form_are_read_and_are_utc_unless_they_say_otherwise(time, expected):
    assert read({"messages": HI, "created_utc": time}).created_utc == (expected.timestamp(),) * 2


# -- ShareGPT ---


def test_sharegpt_names_are_read_as_roles():
    record = {
        "id": "identity_0",
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "hello", "rating": 1},
            {"from": "observation", "value": "rain"},
            {"from": "function_call", "value": "{}"},
        ],
    }
    roles = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("tool", "rain"), ("assistant", "{}")]
    assert said(record) == roles
    assert read(record).reviews == {2: Review(1, None, None)}


# -- the ChatGPT export ---


def test_export_is_read_along_the_branch_that_is_shown():
    record = {
        "title": "greetings",
        "create_time": 5.0,
        "conversation_id": "c-1",
        "current_node": "d",
        "mapping": {
            "root": {"message": None, "parent": None, "children": ["a"]},
            "a": {"message": spoken("user", "hi", create_time=6.0), "parent": "root", "children": ["b", "c"]},
            "b": {"message": spoken("assistant", "a first try"), "parent": "a", "children": []},
            "c": {"message": spoken("assistant", "hello"), "parent": "a", "children": ["d"]},
            "d": {"message": spoken("user", "thanks", create_time=None), "parent": "c", "children": []},
        },
    }
    assert said(record) == [("user", "hi"), ("assistant", "hello"), ("user", "thanks")]
    assert read(record).owner == Owner("default", "", "c-1")
    assert read(record).created_utc == (6.0, 5.0, 5.0)


def test_export_leaves_out_what_nobody_said():
    record = chatgpt(
        spoken("system", ""),
        spoken("user", "what?", kind="user_editable_context"),
        spoken("user", {"content_type": "image_asset_pointer", "asset_pointer": "x"}, "see", kind="multimodal_text"),
        spoken("assistant", kind="thoughts"),
        {"author": {"role": "assistant"}, "content": {"content_type": "code", "text": "print(1)"}},
        {"author": {"role": "tool"}, "content": {"content_type": "execution_output", "text": "1"}},
        {"author": {"role": "assistant"}, "content": {"content_type": "unknown"}},
        id="c-2",
    )
    assert said(record) == [("user", "[image_asset_pointer]\nsee"), ("assistant", "print(1)"), ("tool", "1")]
    assert read(record).owner.session_id == "c-2"


def test_export_in_which_nothing_was_said_is_no_conversation():
    assert read(chatgpt()) is None
    assert read({"mapping": {}}) is None


def test_circle_of_parents_ends():
    record = chatgpt(spoken("user", "hi"))
    record["mapping"]["root"]["parent"] = "0"
    assert said(record) == [("user", "hi")]


# -- what is refused ---


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1, 2], "the record is a list of 2, not an object"),
        ("text", "the record is text, not an object"),
        (None, "the record is null"),
        ({"message": []}, "none of messages (OpenAI), conversations (ShareGPT), mapping"),
        ({"messages": []}, "messages is a list of 0, not a list with messages"),
        ({"messages": "hi"}, "messages is text, not a list"),
        ({"conversations": {}}, "conversations is an object, not a list"),
        ({"messages": ["hi"]}, "messages[0].message is text, not an object"),
        ({"messages": [*HI, {"role": "robot", "content": "x"}]}, "messages[2].role is text, not one of system"),
        ({"messages": [{"content": "x"}]}, "messages[0].from is null, not one of"),
        ({"messages": [{"role": 3, "content": "x"}]}, "messages[0].role is 3, not one of"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content is 5, not text or a list of parts"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0] is 5, not a part"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0] has neither text nor type"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [1e999]}]}, "tool_calls holds a number"),
        ({"messages": [HI[0] | {"created_utc": "soon"}]}, "messages[0].created_utc is text that is no ISO date"),
        ({"messages": [HI[0], HI[1] | {"ratng": 1}]}, "messages[1].ratng is no key known here; did you mean rating?"),
        ({"messages": [HI[0], HI[1] | {"comments": "x"}]}, "did you mean comment? Else give it another name"),
        (
            {"messages": [HI[0], HI[1] | {"thumbs": "down"}]},
            "messages[1].thumbs is no key known here; did you mean rat",
        ),
        ({"messages": [HI[0], HI[1] | {"thumbs_up": True}]}, "thumbs_up is no key known here; did you mean rat"),
        ({"messages": [HI[0], HI[1] | {"Stars": 5}]}, "messages[1].Stars is no key known here; did you mean rat"),
        ({"messages": [HI[0], HI[1] | {"COMMENT": "x"}]}, "messages[1].COMMENT is no key known here; did you mean com"),
        ({"messages": HI, "created_utc": "1712120912345"}, "created_utc is text that is no ISO date"),
        (
            {"messages": [HI[0], HI[1] | {"feedback": {"rating": -1}}]},
            "feedback is no key known here; did you mean rat",
        ),
        ({"messages": HI, "rating": -1}, "rating is beside the messages; put it into the assistant message"),
        ({"conversations": HI, "Rating": 1}, "Rating is beside the messages; put it into the assistant message"),
        ({"messages": HI, "correction": "no"}, "correction is beside the messages"),
        ({"messages": HI, "RATING": 1}, "RATING is beside the messages"),
        ({"messages": HI, "created_utc": True}, "created_utc is not a finite number"),
        ({"messages": HI, "created_utc": 1735603600000}, "created_utc is 1735603600000, more than a day ahead of the"),
        ({"messages": HI, "created_utc": 1735603600000}, "seconds since 1970: are these milliseconds?"),
        ({"messages": [HI[0], HI[1] | {"created_utc": 1e300}]}, "messages[1].created_utc is 1e+300, more than a day"),
        ({"messages": HI, "created_utc": "2925-01-01"}, "created_utc is a date, more than a day ahead of the clock"),
        (chatgpt(spoken("user", "hi"), create_time=NOW * 1000), "create_time is 1735689600000.0, more than a day"),
        (chatgpt(spoken("user", "hi", create_time=NOW * 1000)), "are these milliseconds?"),
        (chatgpt(spoken("user", "hi"), user="ann"), "user is no key known here; did you mean user_id? Else"),
        (
            {"messages": [HI[0] | {"timestamp": 5}]},
            "messages[0].timestamp is no key known here; did you mean created_u",
        ),
        ({"messages": HI, "user_id": ["a"]}, "user_id is a list of 1, not text"),
        ({"messages": HI, "session_id": True}, "session_id is true, not text"),
        ({"mapping": 5}, "mapping is 5, not an object"),
        ({"mapping": {"a": {}}, "current_node": "b"}, "current_node is not in mapping"),
        ({"mapping": {"a": 5}, "current_node": "a"}, "a node of mapping is 5"),
        ({"messages": HI, "user_id": ""}, "user_id is empty; leave it out"),
        (chatgpt({"author": 1}), "a message of mapping has no author or no content"),
        (chatgpt(spoken("martian", "x")), "author.role is none of system"),
        (chatgpt(spoken("user", 5)), "content.parts[0] is 5"),
    ],
)
def test_refusal_names_the_field_and_the_kind_of_its_value(record, reason):
    with pytest.raises(InputError) as raised:
        read(record)
    assert reason in str(raised.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *((key, "user_id") for key in ("userid", "user", "userId", "User-ID", "user_id ", "usr_id", "username")),
        *((key, "agent_id") for key in ("agent", "agentId", "agents_id")),
        *((key, "session_id") for key in ("session", "sessionid", "sesion_id")),
        *(
            (key, "created_utc")
            for key in (
                "created_at",
                "createdAt",
                "timestamp",
                "create_utc",
                "created_utc_ms",
                "created",
                "create_time",
                "date",
            )
        ),
    ],
)
def test_mistyped_owner_or_time_is_refused_unless_the_right_one_is_given(key, meant):
    with pytest.raises(InputError) as raised:
        read({"messages": HI, key: "2024-01-02"})
    assert str(raised.value) == f"{key} is no key known here; did you mean {meant}? Else give it another name"
    assert read({"messages": HI, key: "x", meant: "2024-01-02"}).messages == tuple(HI)


def test_keys_that_no_owner_and_no_time_is_lost_by_are_left_alone():
    named = {"id": "a", "conversation_id": "b", "name": "c", "time": 1, "updated_at": 2, "used": 3, "sessions": 4}
    open_ai = {"object": "chat.completion", "model": "x", "agentic": True, "users": ["ann"], "user": None}
    message = HI[1] | {"name": "ann", "user": "ann", "session": "s", "update_time": 5}
    assert read({"messages": [HI[0], message]} | named | open_ai).owner.user_id == "default"
    exported = {"create_time": 1.0, "update_time": 2.0, "timestamp": 3, "is_archived": False, "gizmo_id": None}
    assert read(chatgpt(spoken("user", "hi"), **exported)).created_utc == (1.0,)


def test_time_of_a_clock_that_is_a_little_ahead_is_kept():
    assert read({"messages": HI, "created_utc": NOW + 80_000}).created_utc == (NOW + 80_000,) * 2


KEYS = st.sampled_from(
    "messages conversations mapping current_node role from content value parts author message parent rating user_id"
    " created_utc text type tool_calls x".split()
)
JSON = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, JSON, max_size=5) | JSON)
def test_any_json_is_a_conversation_or_refused(record):
    try:
        read(record)
    except InputError as error:
        assert str(error)


@pytest.mark.parametrize(("depth", "number", "reason"), [(1, float("nan"), "not finite"), (100_000, 1, "too deeply")])
def test_calls_that_no_json_can_hold_are_refused(depth, number, reason):
    calls = number
    for _ in range(depth):
        calls = [calls]
    with pytest.raises(InputError, match=rf"tool_calls .*{reason}"):
        read({"messages": [HI[0], {"role": "assistant", "tool_calls": calls}]})
