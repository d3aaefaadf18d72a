"""Conversations become text by the tokenizer's chat template, whatever they look like."""

import json

import datasets
import pytest

from optimum_dsa import DataConfig, DSAConfig, DSAPruner, RecoveryConfig, load_calibration, load_tokens
from optimum_dsa.common.texts import Reading, item_of, needed_columns

from ..tiny import bos_tokenizer, tiny_llama


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}"
    "{% endif %} {{ 80 if message.role == 'user' else 81 }} {{ message.content }}{% endfor %}"
    "{% if tools %} 85{% endif %} {{ eos_token }}"
)
BOS, EOS, FIRST = 0, 1, 3  # FIRST: the id of the word "0"
CHATS = [[("user", f"{10 + number} 1"), ("assistant", f"{20 + number} 2")] for number in range(8)]


def messages(chat, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: text} for who, text in chat]


def chat_tokenizer(adds=False):
    tokenizer = bos_tokenizer(adds)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def ids(*words):
    return [FIRST + word for word in words]


def expected(bos):
    found = []
    for number in range(8):
        found += ([BOS] if bos else []) + ids(80, 10 + number, 1, 81, 20 + number, 2) + [EOS]
    return found


FORMS = {
    "messages": [{"messages": messages(chat)} for chat in CHATS],
    "messages beside other columns": [{"id": 1, "messages": messages(chat), "source": "x"} for chat in CHATS],
    "conversations": [
        {"conversations": messages(chat, "from", "value", {"user": "human", "assistant": "gpt"})} for chat in CHATS
    ],
    "prompt and completion": [{"prompt": chat[0][1], "completion": chat[1][1]} for chat in CHATS],
    "prompt and completion as messages": [
        {"prompt": messages(chat[:1]), "completion": messages(chat[1:])} for chat in CHATS
    ],
    "parts": [
        {"messages": [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in chat]}
        for chat in CHATS
    ],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset", "streamed", "rows"])
def test_every_form_of_a_conversation_goes_through_the_template(tmp_path, form, kind):
    rows = FORMS[form]
    data = datasets.Dataset.from_list(rows)
    source = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        source.write_text(json.dumps(rows))
    elif kind == "parquet":
        data.to_parquet(str(source))
    else:
        source = {"dataset": data, "streamed": data.to_iterable_dataset(), "rows": rows}[kind]
    tokenizer = chat_tokenizer()
    found = load_tokens(source, tokenizer, sequence_length=8)
    # packed: one behind the other, the template's own tokens between them and no others
    assert found.flatten().tolist() == expected(bos=True)
    whole = [tokenizer.apply_chat_template(messages(chat), return_dict=False) for chat in CHATS]
    assert found.flatten().tolist() == sum(whole, [])


def test_a_token_in_front_stands_there_once():
    """The tokenizer adds it, or is told to, and the template does as well."""
    rows = FORMS["messages"]
    for tokenizer, bos in ((chat_tokenizer(adds=True), None), (chat_tokenizer(), True)):
        found = load_tokens(rows, tokenizer, sequence_length=8, bos=bos)
        assert (found[:, 0] == BOS).all() and found[:, 1:].flatten().tolist() == expected(bos=False)
    without = load_tokens(rows, chat_tokenizer(adds=True), sequence_length=7, bos=False)
    assert without.flatten().tolist() == expected(bos=False)


def test_another_column_and_one_chat_per_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(messages(chat)) for chat in CHATS))
    named = [{"talk": messages(chat), "text": "no"} for chat in CHATS]
    for source, column in (
        (tmp_path / "a.jsonl", "text"),
        (named, "talk"),
        ([messages(chat) for chat in CHATS], "text"),
    ):
        found = load_tokens(source, chat_tokenizer(), sequence_length=8, text_column=column)
        assert found.flatten().tolist() == expected(bos=True)


def test_tools_reach_the_template_and_texts_between_chats_keep_their_end():
    rows = [{"messages": messages(CHATS[0]), "tools": [{"name": "search"}]}]
    assert FIRST + 85 in load_tokens(rows, chat_tokenizer(), sequence_length=9).flatten().tolist()
    mixed = ["3 4", {"messages": messages(CHATS[0])}, "5"]
    found = load_tokens(mixed, chat_tokenizer(), sequence_length=12).flatten().tolist()
    assert found == ids(3, 4) + [EOS] + expected(bos=True)[:8] + ids(5)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"messages": [{"role": "tool", "content": "1"}]}], "row 1: the chat template refuses .*: no tools here"),
        ([{"messages": [{"content": "1"}]}], "row 1: a message has no role; it has content"),
        ([{"messages": "hello"}], "row 1: expected messages, each with a role and a content; got 'hello'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "a message holds 'image', and only text"),
        ([{"chosen": []}], "row 1: no column 'text'; it has chosen"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(rows, message):
    with pytest.raises(ValueError, match=message):
        load_tokens(rows, chat_tokenizer(), sequence_length=4)


def test_a_tokenizer_without_a_template_is_named():
    with pytest.raises(ValueError, match="row 1 is a conversation, and the tokenizer .* has no chat template; name a"):
        load_tokens(FORMS["messages"], bos_tokenizer(), sequence_length=4)


def test_rows_without_a_conversation_are_counted(caplog):
    rows = [{"messages": None}, {"messages": []}, *FORMS["messages"], {"prompt": "1", "completion": None}]
    reading = Reading()
    load_tokens(rows, chat_tokenizer(), sequence_length=8, reading=reading)
    assert (reading.passed.rows, reading.passed.null, reading.passed.empty) == (11, 2, 1)
    assert reading.passed.facts() == {"null_rows": 2, "conversations": 8}
    assert "3 of the 11 rows that were read hold no text (2 null, 1 empty)" in caplog.text


def test_chats_calibrate_train_and_measure(tmp_path):
    """One file through prune, recover and evaluate: the same tokens each time, and the report says what they were."""
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in FORMS["messages"] * 12))
    model, tokenizer = tiny_llama(), chat_tokenizer()
    data = DataConfig(num_samples=6, sequence_length=16)
    calibration = load_calibration(file, model, tokenizer, data)
    # 8 times as many windows as are drawn are looked at, and they are of so many conversations
    assert calibration.facts()["conversations"] == 96 and calibration.facts()["source"] == "chats.jsonl"
    pruner = DSAPruner(model, tokenizer)
    report = pruner.prune(str(file), DSAConfig(0.5, data=data))
    assert report.calibration["conversations"] == 96
    steps = RecoveryConfig(steps=1, batch_size=2, validation_windows=2, data=DataConfig(sequence_length=16))
    assert pruner.recover(str(file), steps).data["conversations"] > 0
    measured = pruner.measure(str(file), sequence_length=16)
    everything = load_tokens(file, tokenizer, sequence_length=16)
    assert measured.protocol.windows == len(everything) and measured.protocol.dataset == "chats.jsonl"


PADDED = DataConfig(num_samples=3, sequence_length=9, packing=False)


def test_each_conversation_can_be_a_row_of_its_own(caplog, inputs):
    caplog.set_level("INFO", "optimum_dsa")
    rows = [
        {"messages": messages(CHATS[0])},
        {"messages": messages(CHATS[1][:1])},
        {"messages": messages(CHATS[2]) * 3},
    ]
    model = tiny_llama(vocab_size=93)
    found = load_calibration(rows, model, chat_tokenizer(), PADDED)
    ids_of, mask = found.inputs["input_ids"], found.inputs["attention_mask"]
    whole = [chat_tokenizer().apply_chat_template(row["messages"], return_dict=False)[:9] for row in rows]
    given = [row[seen.bool()].tolist() for row, seen in zip(ids_of, mask)]
    assert sorted(given) == sorted(whole) and ids_of.shape == (3, max(map(len, whole)))
    facts = found.facts()
    assert facts["tokens"] == sum(map(len, whole)) and facts["conversations"] == 3
    assert "3 conversations went through the tokenizer's chat template and are padded: each is a window" in caplog.text
    report = DSAPruner(model, chat_tokenizer()).prune(rows, DSAConfig(0.5, "wanda", "uniform", data=PADDED))
    assert report.calibration["tokens"] == facts["tokens"] and report.config.data.packing is False
    load_calibration(rows, model, chat_tokenizer(), DataConfig(num_samples=1, sequence_length=9))
    assert "are packed: they follow each other" in caplog.text


def test_texts_and_rows_of_ids_as_well():
    model, tokenizer = tiny_llama(vocab_size=93), bos_tokenizer()
    texts = ["1 2 3", " ", "4", " ".join(map(str, range(40)))]
    found = load_calibration(texts, model, tokenizer, PADDED)
    assert sorted(found.inputs["attention_mask"].sum(1).tolist()) == [2, 4, 9] and found.facts()["bos"] is True
    assert (found.inputs["input_ids"][:, 0] == BOS).all()
    made = datasets.Dataset.from_dict({"input_ids": [[5, 6], [7], [8, 9, 10]]})
    found = load_calibration(made, model, None, PADDED)
    assert found.inputs["attention_mask"].sum().item() == 6 and "bos" not in found.facts()


@pytest.mark.parametrize(
    "source,message", [(["1 2", "3"], "holds 2 texts, and 3 are needed"), ({"a.txt": 1.0}, "leave packing=False out")]
)
def test_too_few_and_several_sources_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_calibration(source, tiny_llama(vocab_size=93), bos_tokenizer(), PADDED)


def test_padding_is_for_calibration():
    with pytest.raises(ValueError, match="packing=False is for calibration"):
        RecoveryConfig(data=PADDED)
    with pytest.raises(ValueError, match="leave packing=False out"):
        DSAPruner(tiny_llama()).search(["1"], DSAConfig(0.5, data=PADDED))


class Tells:
    """Stands for a tokenizer: gives back what its template is told."""

    chat_template = "x"

    def apply_chat_template(self, messages, tokenize, **options):
        return messages, options


def told(row):
    return item_of(row, "row 1", "text").text(Tells())


def test_what_stands_beside_a_conversation_belongs_to_it():
    talk = [{"role": "user", "content": "hi"}]
    said, options = told({"messages": talk, "system": "be kind", "chat_template_kwargs": {"enable_thinking": False}})
    assert said == [{"role": "system", "content": "be kind"}, *talk] and options == {"enable_thinking": False}
    own = [{"role": "system", "content": "mine"}, *talk]
    assert told({"messages": own, "system": "be kind"})[0] == own
    assert needed_columns(["messages", "system", "score", "chat_template_kwargs"], "text") == [
        "messages", "system", "chat_template_kwargs",
    ]  # fmt: skip


def test_arguments_of_a_tool_may_be_json_in_a_text():
    def call(arguments):
        return {
            "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        }

    assert told(call('{"a": 1}')) == told(call({"a": 1}))
    assert told(call("no json"))[0][0]["tool_calls"][0]["function"]["arguments"] == "no json"


def test_who_speaks_is_known_or_refused():
    assert told({"conversations": [{"from": "chatgpt", "value": "hi"}]})[0][0]["role"] == "assistant"
    with pytest.raises(ValueError, match="row 1: a message is from 'narrator', and nobody is known by that"):
        told({"conversations": [{"from": "narrator", "value": "hi"}]})
