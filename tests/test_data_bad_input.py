"""Bad data stops with its file, line, field and a way out; all bad rows at once; never a traceback."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_tokenizers as tiny

from loraloom.config import DataConfig
from loraloom.data import prepare
from loraloom.errors import DataError


def fails(path, tokenizer=None, **settings):
    """The DataError that preparing this file stops with."""
    config = DataConfig(train=str(path), **{"eval": 0, **settings})
    with pytest.raises(DataError) as caught:
        prepare(config, tokenizer or tiny.chatml(), model_max_length=512, progress=False)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(folder, *rows):
    return put(folder, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


GOOD = {"prompt": "a", "completion": "b"}


def test_missing_files_and_folders(tmp_path):
    put(tmp_path, "tickets.jsonl", "")
    error = fails(tmp_path / "tickts.jsonl")
    assert error.message == f"there is no data file {tmp_path / 'tickts.jsonl'}"
    assert error.hint == f"did you mean {tmp_path / 'tickets.jsonl'}?"
    assert "no folder" in fails(tmp_path / "gone" / "a.jsonl").hint
    folder = fails(tmp_path)
    assert folder.message == f"data {tmp_path} is a folder"
    assert folder.details == ["tickets.jsonl"]
    put(tmp_path, "a.xlsx", b"PK")
    assert "'.xlsx' cannot be read" in fails(tmp_path / "a.xlsx").message


def test_an_evaluation_file_is_held_to_the_same(tmp_path):
    path = jsonl(tmp_path, GOOD)
    assert "no data file" in fails(path, eval=str(tmp_path / "gone.jsonl")).message
    put(tmp_path, "b.jsonl", '{"prompt": "a"')
    assert "b.jsonl:1 column 15" in str(fails(path, eval=str(tmp_path / "b.jsonl")))


def test_map_names_an_unknown_column_or_field(tmp_path):
    path = jsonl(tmp_path, {"question": "a", "answer": "b"})
    error = fails(path, map={"prompt": "qestion", "completion": "answer"})
    assert "has no column 'qestion'" in error.message
    assert error.details == ["its columns: question, answer"]
    assert error.hint == "did you mean question?"
    error = fails(path, map={"promt": "question"})
    assert error.message == "data.map: promt is not a field"
    assert error.hint == "did you mean prompt?"
    error = fails(path, format="text", map={"prompt": "question"})
    assert error.message == "data.map: prompt is not a field of the format text"


def test_a_map_that_leaves_the_format_open(tmp_path):
    error = fails(jsonl(tmp_path, {"a": "x", "b": "y"}), map={"system": "a"})
    assert "no known shape" in error.message
    error = fails(jsonl(tmp_path, {"prompt": "x", "b": "y"}), map={"completion": "b", "prompt": "c"})
    assert "no column 'c'" in error.message
    error = fails(jsonl(tmp_path, {"x": "x", "b": "y"}), map={"completion": "b"})
    assert "the format prompt_completion needs prompt" in error.message


def test_no_shape_fits(tmp_path):
    error = fails(put(tmp_path, "a.csv", "Question,Best Answer,Source\na,b,c\n"))
    assert error.message.endswith("no known shape fits the rows")
    assert error.details[0] == "its columns: Question, Best Answer, Source"
    assert "{prompt: Question, completion: Best Answer}" in error.hint
    error = fails(jsonl(tmp_path, GOOD), format="alpaca")
    assert "the format alpaca needs instruction, and no column is called so" in error.message.replace(
        "instruction and output", "instruction"
    )


def test_two_columns_could_be_the_answer(tmp_path):
    error = fails(jsonl(tmp_path, {"query": "a", "answer": "b", "response": "c"}))
    assert "answer and response could each be the completion" in error.message
    assert error.hint == "say which: --set data.map='{completion: answer}'"


def test_broken_json_lines_are_all_named(tmp_path):
    lines = [json.dumps(GOOD), '{"prompt": "a" "completion": "b"}', json.dumps(GOOD), "[1]", "nonsense"]
    error = fails(put(tmp_path, "a.jsonl", "\n".join(lines)))
    assert "3 problems" in error.message
    text = str(error)
    assert "a.jsonl:2 column 16: Expecting ',' delimiter" in text
    assert '{"prompt": "a" "completion"' in text
    assert "a.jsonl:4 is a list: [1]" in text
    assert "a.jsonl:5 column 1" in text


def test_only_the_first_of_many_bad_lines_are_listed(tmp_path):
    error = fails(put(tmp_path, "a.jsonl", "{\n" * 25))
    assert "not JSON (25 rows)" in error.message
    assert len(error.details) == 11
    assert error.details[-1] == "... and 15 more"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n {"a": 1},\n {"a" 2}\n]', "line 3 column 7: not JSON: Expecting ':' delimiter"),
        ('[{"a": 1}', "line 1 column 10: not JSON: expecting ',' or ']'"),
        ('[{"a": 1}] x', "line 1 column 12: not JSON: something follows the end"),
        ('{"rows": [{"a": 1}', "line 1 column 19: not JSON: expecting ',' or ']'"),
        ('{"a": [{}], "b": [{}]}', "holds an object with 2 lists"),
        ('{"a": {"b": 1}}', "holds an object with 0 lists"),
        ("", "line 1 column 1: not JSON: expecting a list or an object"),
        ('"text"', "line 1 column 1: not JSON: expecting a list or an object"),
        ("[" * 100_000, "not JSON: "),
    ],
)
def test_broken_json_files(tmp_path, text, said):
    assert said in fails(put(tmp_path, "a.json", text)).message


def test_a_list_item_that_is_no_object(tmp_path):
    error = fails(put(tmp_path, "a.json", '[\n{"prompt": "a", "completion": "b"},\n["x"],\n"y"\n]'))
    assert error.details == [
        'a.json:3 item 2 is a list: …"completion": "b"},␤["x"],␤"y"␤]',
        'a.json:4 item 3 is a text: …tion": "b"},␤["x"],␤"y"␤]',
    ]


def test_fields_missing_or_not_text(tmp_path):
    error = fails(
        jsonl(
            tmp_path, GOOD, {"prompt": "a"}, {"prompt": 3, "completion": "b"}, {**GOOD, "completion": ["b"]}
        )
    )
    assert "3 problems" in error.message
    text = str(error)
    assert "a.jsonl:2: no field 'completion'; it has prompt" in text
    assert "a.jsonl:3: field 'prompt' is a number: 3" in text
    assert "a.jsonl:4: field 'completion' is a list" in text


def test_half_a_character_is_found(tmp_path):
    error = fails(put(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "b\\ud83d"}\n'))
    assert error.details == ["a.jsonl:1: field 'completion' has a lone surrogate \\ud83d at 1"]


USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([SAID, USER], "turn 1 is assistant, and user was expected in assistant, user"),
        ([USER, USER, SAID], "turn 2 is user, and assistant was expected in user, user, assistant"),
        ([USER, SAID, {"role": "system", "content": "x"}], "turn 3 is system, and user was expected"),
        ([USER], "no assistant turn in user"),
        ([], "no assistant turn in an empty list"),
        ("hello", "field 'messages' is 'hello'"),
        ([USER, "b"], "messages[1] is 'b'"),
        (
            [USER, {"role": "robot", "content": "b"}],
            "messages[1].role is 'robot'; use system, user or assistant",
        ),
        ([USER, {"role": "assistant"}], "messages[1] needs role and content"),
        ([USER, {"role": "assistant", "content": 5}], "field messages[1].content is a number: 5"),
        ([USER, {**SAID, "tool_calls": [{}]}], "messages[1] calls tools"),
    ],
)
def test_chat_rows_that_are_no_conversation(tmp_path, turns, said):
    error = fails(jsonl(tmp_path, {"messages": [USER, SAID]}, {"messages": turns}))
    assert len(error.details) == 1
    assert error.details[0].startswith("a.jsonl:2: ")
    assert said in error.details[0]


def test_bytes_that_are_not_utf8(tmp_path):
    text = "prompt,completion\na,b\ncafé,b\n"
    error = fails(put(tmp_path, "a.csv", text.encode("latin-1")))
    assert error.message == f"{tmp_path / 'a.csv'} line 3: byte 25 is 0xe9, which is not utf-8"
    assert "--set data.encoding=latin-1" in error.hint
    assert "nonsense" in fails(put(tmp_path, "a.csv", text), encoding="nonsense").message
    assert "which is not ascii" in fails(put(tmp_path, "a.csv", text), encoding="ascii").message


def test_csv_rows_that_do_not_fit(tmp_path):
    error = fails(put(tmp_path, "a.csv", 'prompt,completion\n"x\ny",b\na\na,b,c\n'))
    assert "a row with another number of fields (2 rows)" in error.message
    assert error.details == [
        "a.csv:4 has 1 fields, the header has 2: 'a'",
        "a.csv:5 has 3 fields, the header has 2: 'a,b,c'",
    ]
    error = fails(put(tmp_path, "a.csv", 'prompt,completion\na,b\nc,"open\nd,e\n'))
    assert error.message.endswith("a.csv line 3: a quote is opened and never closed")
    assert error.details == ['c,"open']
    assert "line 2" in fails(put(tmp_path, "a.csv", 'prompt,completion\n"a"b,c\n')).message
    assert "names 'prompt' twice" in fails(put(tmp_path, "a.csv", "prompt,prompt\na,b\n")).message
    assert "is empty" in fails(put(tmp_path, "a.csv", "")).message


def test_nothing_to_train_on(tmp_path):
    assert "has no rows" in fails(put(tmp_path, "a.jsonl", "\n")).message
    assert "has no rows" in fails(put(tmp_path, "a.json", "[]")).message
    assert "has no rows" in fails(put(tmp_path, "a.csv", "prompt,completion\n")).message
    assert fails(put(tmp_path, "a.txt", " \n")).details == ["1 empty text: a.txt:1"]
    empty = {"prompt": "a", "completion": ""}
    error = fails(jsonl(tmp_path, empty, empty))
    assert "100.0% of the rows (2 of 2) would be dropped or cut" in error.message
    assert error.details == ["2 empty answer: a.jsonl:1, a.jsonl:2"]
    error = fails(jsonl(tmp_path, GOOD), eval=str(jsonl(tmp_path, GOOD)))
    assert "nothing to train on: none of the 2 rows is left" in error.message
    assert error.details == [f"1 also in the validation set: {tmp_path / 'a.jsonl'}:1"]


def test_everything_is_too_long(tmp_path):
    error = fails(jsonl(tmp_path, {"prompt": "a", "completion": "five " * 200}), max_length=32)
    assert "100.0% of the rows" in error.message
    assert "--set data.max_length=" in error.hint
    error = fails(put(tmp_path, "a.txt", "five " * 2000), tiny.bare())
    assert "data.too_long=split" in error.hint


def test_a_length_over_the_models(tmp_path):
    error = fails(jsonl(tmp_path, GOOD), max_length=1024)
    assert "data.max_length is 1,024, and the model takes at most 512 tokens" in error.message


def test_styles_that_do_not_fit(tmp_path):
    assert "no chat template" in fails(jsonl(tmp_path, GOOD), tiny.bare(), prompt="chat").message
    assert "have no prompt" in fails(jsonl(tmp_path, {"text": "a"}), prompt="alpaca").message
    mixed = [str(jsonl(tmp_path, GOOD)), str(put(tmp_path, "b.jsonl", '{"instruction": "a", "output": "b"}'))]
    with pytest.raises(DataError, match="suggest two styles"):
        prepare(DataConfig(train=mixed, eval=0), tiny.bare(), model_max_length=512, progress=False)
    no_end = tiny.bare()
    no_end.eos_token = None
    assert "no end token" in fails(jsonl(tmp_path, GOOD), no_end).message


def test_the_templates_own_refusal_is_passed_on(tmp_path):
    error = fails(jsonl(tmp_path, {**GOOD, "system": "x"}), tiny.llama())
    assert error.message.startswith("a.jsonl:1: the chat template refuses the turns (system, user)")
    assert "no system turns here" in error.message


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("hf:org/set", "datasets")])
def test_extras_that_are_not_installed(tmp_path, monkeypatch, name, package):
    for module in [key for key in sys.modules if key.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    put(tmp_path, "a.parquet", b"PAR1")
    error = fails(name if name.startswith("hf:") else tmp_path / name)
    assert error.message.startswith(f"{package} is needed to read ")
    assert error.hint == 'pip install "loraloom[data]"'


def test_a_parquet_file_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    error = fails(put(tmp_path, "a.parquet", b"this is no parquet file"))
    assert "is not a Parquet file that can be read" in error.message


def test_a_hugging_face_set_that_cannot_be_loaded(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config, split):
        raise ValueError('Unknown split "trian". Should be one of ["train"].')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = fails("hf:org/set")
    assert error.message == "hf:org/set (split train) cannot be loaded: ValueError"
    assert error.details == ['Unknown split "trian". Should be one of ["train"].']
