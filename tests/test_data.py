"""What is trained is what was said: masks, prompts, templates, lengths, the split and the cache."""

from __future__ import annotations

import io
import json
import time
from collections import Counter

import pytest
import tiny_tokenizers as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from loraloom.config import DataConfig
from loraloom.data import (
    DataReport,
    Example,
    Style,
    Turn,
    end_tokens,
    length_histogram,
    prepare,
    preview,
    render_prompt,
    show,
)
from loraloom.data.pipeline import draft_of
from loraloom.data.template import Writer
from loraloom.data.tokens import encode, encode_scripts
from loraloom.data.turns import Conversation
from loraloom.errors import DataError


def write(folder, name, rows):
    """A data file of the kind its name says; gives its path as text."""
    path = folder / name
    if name.endswith(".jsonl") and not isinstance(rows, str):
        rows = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(
        rows if isinstance(rows, str) else json.dumps(rows, indent=1), encoding="utf-8", newline=""
    )
    return str(path)


def ready(path, tokenizer=None, *, length=512, seed=0, cache=None, **settings):
    settings = {"eval": 0, "max_lost": 0.9, **settings}
    config = DataConfig(train=path, **settings)
    return prepare(
        config, tokenizer or tiny.chatml(), model_max_length=length, seed=seed, cache=cache, progress=False
    )


def trained_text(tokenizer, example):
    return "".join(text for text, trained in preview(tokenizer, example) if trained)


def pairs(count, **more):
    return [{"prompt": f"what is {n} and {n}?", "completion": f"it is {2 * n}", **more} for n in range(count)]


# ---- prompts and masks -------------------------------------------------------------------------------


def example_of(tokenizer, style, turns, loss_on="completion"):
    talk = Conversation(tuple(turns), "here:1")
    script = Writer(tokenizer, style).example(talk, every=loss_on == "completion")
    draft = draft_of(encode_scripts(tokenizer, [script])[0], talk, 0, loss_on)
    ids = list(draft.ids)
    labels = [token if flag else -100 for token, flag in zip(ids, draft.trained)]
    return Example(ids, labels, draft.row, draft.answer)


def test_chatml_row_is_the_template_and_trains_the_answer_and_its_end(tmp_path):
    tokenizer = tiny.chatml()
    [example] = ready(write(tmp_path, "a.jsonl", pairs(1)), tokenizer).train
    text = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nwhat is 0 and 0?<|im_end|>\n"
        "<|im_start|>assistant\nit is 0<|im_end|>"
    )
    assert tokenizer.decode(example.ids) == text
    assert example.ids == encode(tokenizer, [text])[0]
    assert preview(tokenizer, example) == [
        (text[: -len("it is 0<|im_end|>")], False),
        ("it is 0<|im_end|>", True),
    ]
    assert tokenizer.decode(example.answer_ids) == "it is 0"
    assert example.prompt_ids == render_prompt(tokenizer, Style("chat"), "what is 0 and 0?")
    assert example.row == "a.jsonl:1"


def test_every_answer_ends_in_a_trained_end_token():
    tokenizer = tiny.chatml()
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    every = example_of(tokenizer, Style("chat"), turns)
    assert trained_text(tokenizer, every) == "b<|im_end|>d<|im_end|>"
    last = example_of(tokenizer, Style("chat"), turns, "last_turn")
    assert (last.ids, trained_text(tokenizer, last)) == (every.ids, "d<|im_end|>")
    everything = example_of(tokenizer, Style("chat"), turns, "all")
    assert everything.labels == [-100, *everything.ids[1:]]
    assert everything.answer_ids == every.answer_ids == last.answer_ids


def test_no_double_bos(tmp_path):
    tokenizer = tiny.llama()
    path = write(tmp_path, "a.jsonl", pairs(3))
    bos = tokenizer.bos_token_id
    for prompt in ("chat", "plain", "alpaca"):
        for example in ready(path, tokenizer, prompt=prompt).train:
            assert example.ids[0] == bos
            assert example.ids.count(bos) == 1
            assert example.ids[-1] == example.labels[-1] == tokenizer.eos_token_id
            assert example.labels[0] == -100
    assert all(bos not in example.ids for example in ready(path, tiny.bare(), prompt="plain").train)


def test_llama_template_trains_the_answer_without_the_blank_of_the_prompt():
    tokenizer = tiny.llama()
    turns = [
        Turn("user", "hello"),
        Turn("assistant", " five \n"),
        Turn("user", "more"),
        Turn("assistant", "six"),
    ]
    example = example_of(tokenizer, Style("chat"), turns)
    assert tokenizer.decode(example.ids) == "<s>[INST] hello [/INST] five</s>[INST] more [/INST] six</s>"
    assert trained_text(tokenizer, example) == " five</s> six</s>"


def test_alpaca_style_is_the_published_text(tmp_path):
    tokenizer = tiny.bare()
    rows = [
        {"instruction": "Add.", "input": "2 3", "output": "5"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    ]
    prepared = ready(write(tmp_path, "a.json", rows), tokenizer)
    assert prepared.report.style == {"name": "alpaca", "system": None}
    first, second = (tokenizer.decode(example.ids) for example in prepared.train)
    assert first == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 3\n\n### Response:5<|endoftext|>"
    )
    assert second == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSay hi.\n\n### Response:hi<|endoftext|>"
    )
    assert [trained_text(tokenizer, e) for e in prepared.train] == ["5<|endoftext|>", "hi<|endoftext|>"]
    asked = [{"role": "user", "content": "Add.", "input": "2 3"}]
    assert render_prompt(tokenizer, Style("alpaca"), asked) == prepared.train[0].prompt_ids


def test_alpaca_rows_in_chat_style_join_instruction_and_input(tmp_path):
    tokenizer = tiny.chatml()
    rows = [{"instruction": "Add.", "input": "2 3", "output": "5"}, {"instruction": "Hi.", "output": "hi"}]
    first, second = ready(write(tmp_path, "a.json", rows), tokenizer).train
    assert "user\nAdd.\n\n2 3<|im_end|>" in tokenizer.decode(first.ids)
    assert "user\nHi.<|im_end|>" in tokenizer.decode(second.ids)


def test_system_text_of_the_row_wins_over_the_setting(tmp_path):
    tokenizer = tiny.chatml()
    rows = [*pairs(1), *pairs(1, system="Rhyme.")]
    first, second = ready(write(tmp_path, "a.jsonl", rows), tokenizer, system="Be short.").train
    assert "system\nBe short.<|im_end|>" in tokenizer.decode(first.ids)
    assert "system\nRhyme.<|im_end|>" in tokenizer.decode(second.ids)
    style = Style.from_dict(json.loads(json.dumps(Style("chat", "Be short.").to_dict())))
    assert render_prompt(tokenizer, style, "what is 0 and 0?") == first.prompt_ids
    assert render_prompt(tokenizer, style, "what is 0 and 0?", system="Rhyme.") == second.prompt_ids
    plain = example_of(tiny.bare(), Style("plain", "Be short."), [Turn("user", "a "), Turn("assistant", "b")])
    assert tiny.bare().decode(plain.ids) == "Be short.\n\na b<|endoftext|>"


words = st.text(st.sampled_from("ab cé日\n?"), min_size=1, max_size=12).filter(lambda text: text.strip())
talks = st.lists(st.tuples(words, words), min_size=1, max_size=4).map(
    lambda pairs: [turn for asked, said in pairs for turn in (Turn("user", asked), Turn("assistant", said))]
)
STYLES = ["chatml", "llama", "alpaca", "plain", "endless"]


def setup(name):
    if name in ("alpaca", "plain"):
        return tiny.bare(), Style(name)
    return {
        "chatml": tiny.chatml(),
        "llama": tiny.llama(),
        "endless": tiny.chatml(tiny.ENDLESS),
    }[name], Style("chat")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(STYLES), talks)
def test_mask_covers_the_answers_and_prompts_are_those_of_generation(name, turns):
    tokenizer, style = setup(name)
    example = example_of(tokenizer, style, turns)
    answers = [
        turn.text.strip() if name == "llama" else turn.text for turn in turns if turn.role == "assistant"
    ]
    end = tokenizer.eos_token
    pieces = [text for text, trained in preview(tokenizer, example) if trained]
    if name == "llama":
        assert pieces == [f" {answer}{end}" for answer in answers]
    elif name == "endless":  # the template ends no turn: the last answer gets the tokenizer's end token
        assert pieces == [f"{answer}\n" for answer in answers[:-1]] + [f"{answers[-1]}\n{end}"]
    else:
        assert pieces == [answer + end for answer in answers]
    assert example.labels[0] == -100
    assert example.labels[-1] == tokenizer.eos_token_id
    # the prompt of every answer: a prefix of what was trained, made by the function generation uses
    for at in range(1, len(turns), 2):
        prompt = render_prompt(tokenizer, style, turns[:at])
        assert example.ids[: len(prompt)] == prompt
        assert example.labels[len(prompt)] != -100
        assert example.labels[len(prompt) - 1] == -100
    assert example.prompt_ids == render_prompt(tokenizer, style, turns[:-1])


def test_prompt_ids_are_those_of_generation():
    # "it is" + " five" would join the blank to the word; the prompt's own ids must stand in training
    tokenizer = tiny.bare()
    turns = [Turn("user", "the answer is "), Turn("assistant", "five")]
    example = example_of(tokenizer, Style("plain"), turns)
    alone, together = encode(tokenizer, ["the answer is ", "the answer is five"])
    assert together[: len(alone)] != alone
    assert example.prompt_ids == alone
    assert example.answer_ids == encode(tokenizer, ["five"])[0]
    assert tokenizer.decode(example.ids) == "the answer is five<|endoftext|>"


def test_no_blank_is_added_between_prompt_and_answer():
    # this tokenizer writes a blank before every text; an answer tokenised apart must not get one
    tokenizer = tiny.blank_prefix()
    for asked, said in [("what is", " two"), ("what is ", "two"), ("what is", "two"), ("what is\n", "\ntwo")]:
        example = example_of(tokenizer, Style("plain"), [Turn("user", asked), Turn("assistant", said)])
        assert example.prompt_ids == encode(tokenizer, [asked])[0]
        assert tokenizer.decode(example.ids) == asked + said + "</s>"


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_counts(tmp_path):
    tokenizer = tiny.chatml(tiny.FORGETFUL)
    turns = [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d")]
    with pytest.raises(DataError, match=r"here:1: the chat template is not prefix preserving") as caught:
        example_of(tokenizer, Style("chat"), turns)
    assert "data.loss_on=last_turn" in caught.value.hint
    assert len(caught.value.details) == 2
    last = example_of(tokenizer, Style("chat"), turns, "last_turn")
    assert trained_text(tokenizer, last) == "<think>\n\n</think>\n\nd<|im_end|>"
    assert last.prompt_ids == render_prompt(tokenizer, Style("chat"), turns[:-1])
    single = example_of(tokenizer, Style("chat"), turns[:2])
    assert trained_text(tokenizer, single) == "<think>\n\n</think>\n\nb<|im_end|>"


def test_end_tokens_stop_generation():
    tokenizer = tiny.chatml()
    tokenizer.eos_token = "<|endoftext|>"
    ids = tokenizer.convert_tokens_to_ids
    assert end_tokens(tokenizer, Style("chat")) == [ids("<|im_end|>"), ids("<|endoftext|>")]
    assert end_tokens(tiny.bare(), Style("plain")) == [ids("<|endoftext|>")]


@pytest.mark.parametrize("said", ["m", "<", "im_end", "a <|im_end|> b", "end|>", "assistant"])
def test_the_end_is_found_whatever_the_answer_says(said):
    tokenizer = tiny.chatml()
    example = example_of(tokenizer, Style("chat"), [Turn("user", "q"), Turn("assistant", said)])
    assert trained_text(tokenizer, example) == said + "<|im_end|>"


# ---- formats -----------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hi"}]
SHARE = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "hi"}]


@pytest.mark.parametrize(
    ("row", "format", "columns", "guessed"),
    [
        ({"instruction": "Hello", "output": "hi"}, "alpaca", {}, False),
        ({"instruction": "Hello", "context": "", "response": "hi"}, "alpaca", {"output": "response"}, True),
        ({"prompt": "Hello", "completion": "hi"}, "prompt_completion", {}, False),
        ({"Question": "Hello", "Answer": "hi", "id": "1"}, "prompt_completion", {"prompt": "Question"}, True),
        ({"input": "Hello", "output": "hi"}, "prompt_completion", {"completion": "output"}, True),
        ({"prompt": "Hello", "response": "hi"}, "prompt_completion", {"completion": "response"}, True),
        ({"prompt": "x", "messages": CHAT}, "messages", {}, False),
        ({"messages": json.dumps(CHAT)}, "messages", {}, False),
        ({"conversations": CHAT}, "messages", {"messages": "conversations"}, True),
        ({"conversations": SHARE}, "sharegpt", {}, False),
    ],
)
def test_shapes_are_seen_from_the_columns(tmp_path, row, format, columns, guessed):
    tokenizer = tiny.chatml()
    prepared = ready(write(tmp_path, "a.jsonl", [row]), tokenizer)
    [source] = prepared.report.sources
    assert (source.format, source.guessed) == (format, guessed)
    assert columns.items() <= source.columns.items()
    assert set(source.unused) == set(row) - set(source.columns.values())
    [example] = prepared.train
    assert tokenizer.decode(example.ids).endswith(
        "user\nHello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>"
    )
    assert trained_text(tokenizer, example) == "hi<|im_end|>"


def test_text_rows_are_trained_whole_and_never_put_in_a_template(tmp_path):
    prepared = ready(write(tmp_path, "a.jsonl", [{"text": "Hello there."}]), tiny.llama())
    [example] = prepared.train
    assert tiny.llama().decode(example.ids) == "<s>Hello there.</s>"
    assert example.labels == [-100, *example.ids[1:]]
    assert prepared.report.style["name"] == "plain"
    assert example.prompt_ids == [tiny.llama().bos_token_id]
    [document] = ready(write(tmp_path, "b.txt", "One.\n\nTwo.\n"), tiny.bare()).train
    assert tiny.bare().decode(document.ids) == "One.\n\nTwo.\n<|endoftext|>"
    assert document.row == "b.txt:1"


def test_map_names_the_columns(tmp_path):
    rows = [{"q": "Hello", "a": "hi", "text": "x"}]
    path = write(tmp_path, "a.jsonl", rows)
    [source] = ready(path, map={"prompt": "q", "completion": "a"}).report.sources
    assert (source.format, source.guessed, source.unused) == ("prompt_completion", False, ["text"])
    [source] = ready(path, map={"instruction": "q", "output": "a", "input": "text"}).report.sources
    assert source.format == "alpaca"
    [source] = ready(path, format="text", map={"text": "a"}).report.sources
    assert source.columns == {"text": "a"}
    rows = [{"instruction": "Hello", "output": "hi", "lead": "Be short."}]
    path = write(tmp_path, "b.jsonl", rows)
    [example] = ready(path, map={"system": "lead"}).train
    assert "system\nBe short.<|im_end|>" in tiny.chatml().decode(example.ids)


def test_files_of_every_kind_hold_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"prompt": f'say "{n}",\nplease', "completion": f"né {n}"} for n in range(3)]
    csv_text = "prompt,completion\r\n" + "".join(f'"say ""{n}"",\nplease",né {n}\r\n' for n in range(3))
    files = {
        "a.jsonl": rows,
        "b.json": rows,
        "c.json": json.dumps({"version": 1, "data": rows}),
        "d.json": "\n\n".join(json.dumps(row) for row in rows),  # lines in a .json file
        "e.csv": csv_text,
        "f.tsv": csv_text.replace('please",', 'please"\t').replace("prompt,", "prompt\t"),
        "g.csv": csv_text.replace('please",', 'please";').replace("prompt,", "prompt;"),
    }
    paths = [write(tmp_path, name, content) for name, content in files.items()]
    for name, encoding in [("h.csv", "utf-8-sig"), ("i.csv", "utf-16"), ("j.csv", "utf-32")]:
        (tmp_path / name).write_bytes(csv_text.encode(encoding))
        paths.append(str(tmp_path / name))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "k.parquet")
    paths.append(str(tmp_path / "k.parquet"))
    expected = [example.ids for example in ready(paths[0]).train]
    for path in paths:
        assert [example.ids for example in ready(path).train] == expected, path
    (tmp_path / "l.csv").write_bytes(csv_text.encode("latin-1"))
    latin = ready(str(tmp_path / "l.csv"), encoding="latin-1")
    assert [example.ids for example in latin.train] == expected


def test_rows_know_their_lines(tmp_path):
    def places(name, text):
        return [example.row for example in ready(write(tmp_path, name, text)).train]

    rows = pairs(2)
    assert places("a.json", json.dumps(rows, indent=1)) == ["a.json:2", "a.json:6"]
    assert places("b.json", json.dumps(rows)) == ["b.json:item 1", "b.json:item 2"]
    assert places("c.json", json.dumps(rows[0])) == ["c.json:1"]
    lines = (
        "\n"
        + json.dumps(rows[0])
        + "\n\n"
        + json.dumps({"prompt": "a", "completion": "b\u2028c"}, ensure_ascii=False)
    )
    assert places("d.jsonl", lines) == ["d.jsonl:2", "d.jsonl:4"]
    assert places("e.csv", 'prompt,completion\n"a\n\nb",c\n\nd,e\n') == ["e.csv:2", "e.csv:6"]
    assert places("f.json", json.dumps({"messages": CHAT})) == ["f.json:1"]


def test_hugging_face_sets_are_read_by_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(pairs(4))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepared = ready([{"path": "hf:org/set:main", "split": "train[:4]"}], cache=tmp_path)
    assert asked == [("org/set", "main", "train[:4]")]
    assert prepared.train[3].row == "hf:org/set:main[train[:4]]:4"
    assert prepared.report.sources[0].split == "train[:4]"
    assert ready([{"path": "hf:org/set:main", "split": "train[:4]"}], cache=tmp_path).report.cached


def test_sources_repeat_and_keep_their_own_format(tmp_path):
    (tmp_path / "more").mkdir()
    first = write(tmp_path, "a.jsonl", pairs(2))
    second = write(tmp_path / "more", "a.jsonl", [{"conversations": SHARE}])
    prepared = ready([{"path": first, "repeat": 3}, {"path": second}])
    assert Counter(example.row for example in prepared.train) == {
        f"{first}:1": 3,
        f"{first}:2": 3,
        f"{second}:1": 1,
    }
    formats = [(item.format, item.repeat, item.read, item.kept) for item in prepared.report.sources]
    assert formats == [("prompt_completion", 3, 2, 2), ("sharegpt", 1, 1, 1)]
    assert [e.row for e in ready([first, second], limit=1).train] == [f"{first}:1"]


# ---- lengths, losses, split --------------------------------------------------------------------------


def test_auto_length_is_the_percentile_rounded_up_and_capped(tmp_path):
    rows = [{"text": "a " * (n + 1)} for n in range(404)]
    path = write(tmp_path, "a.jsonl", rows)
    report = ready(path, tiny.bare(), length=4096).report
    lengths = sorted(len(encode(tiny.bare(), [row["text"]])[0]) + 1 for row in rows)
    assert report.max_length == -(-lengths[402 - 1] // 8) * 8  # 99.5 % of 404 are 401.98
    assert report.max_length > lengths[402 - 1]
    assert report.lengths["max"] == lengths[-1]
    assert report.lengths["median"] == lengths[201]
    capped = ready(path, tiny.bare(), length=100).report
    assert (capped.max_length, capped.max_length_origin) == (100, "auto: what the model takes")


def test_what_is_too_long_is_dropped_cut_or_refused_and_always_counted(tmp_path):
    tokenizer = tiny.chatml()
    long = {"prompt": "what?", "completion": "five " * 60}
    path = write(tmp_path, "a.jsonl", [*pairs(30), long])
    dropped = ready(path, tokenizer, max_length=80)
    assert len(dropped.train) == 30
    [problem] = dropped.report.problems
    assert (problem.kind, problem.effect, problem.count, problem.rows) == (
        "too long",
        "dropped",
        1,
        ["a.jsonl:31"],
    )
    assert dropped.report.issues[0].row == "a.jsonl:31"
    assert "a.jsonl:31,too long," in dropped.report.issues_csv()
    cut = ready(path, tokenizer, max_length=80, too_long="truncate")
    [example] = [example for example in cut.train if example.row == "a.jsonl:31"]
    assert len(example.ids) == 80
    assert example.labels[-1] != -100
    assert example.prompt_ids == render_prompt(tokenizer, Style("chat"), "what?")
    assert not cut.report.all_ended
    assert "1 of 31 examples do not end in a trained end token" in cut.report.notes
    for mode in ("error", "split"):
        with pytest.raises(DataError, match="1 row over max_length 80") as caught:
            ready(path, tokenizer, max_length=80, too_long=mode)
        assert caught.value.details[0].startswith("a.jsonl:31: ")


def test_a_cut_row_with_nothing_left_to_train_is_dropped(tmp_path):
    long = {"prompt": "what " * 100, "completion": "five"}
    path = write(tmp_path, "a.jsonl", [*pairs(5), long])
    prepared = ready(path, max_length=60, too_long="truncate")
    assert [problem.kind for problem in prepared.report.problems] == ["nothing to train on"]
    assert all(example.targets for example in prepared.train)


@pytest.mark.parametrize("tokenizer", [tiny.bare(), tiny.llama()], ids=["no BOS", "BOS"])
def test_text_is_split_so_that_each_token_is_trained_once(tmp_path, tokenizer):
    text = "what is two and three? " * 40
    path = write(tmp_path, "a.txt", text)
    parts = ready(path, tokenizer, max_length=33, too_long="split").train
    whole = encode(tokenizer, [text])[0] + [tokenizer.eos_token_id]
    labels = [label for part in parts for label in part.labels if label != -100]
    assert labels == (whole if tokenizer.bos_token_id is not None else whole[1:])
    assert all(len(part.ids) <= 33 for part in parts)
    assert [part.row for part in parts][:2] == ["a.txt:1#1", "a.txt:1#2"]
    report = ready(path, tokenizer, max_length=33, too_long="split").report
    assert (report.read, report.kept, report.train) == (1, 1, len(parts))
    if tokenizer.bos_token_id is not None:
        assert {part.ids[0] for part in parts} == {tokenizer.bos_token_id}


def test_too_much_lost_stops_with_two_ways_out(tmp_path):
    long = [{"prompt": f"{n}", "completion": "five " * 60} for n in range(3)]
    path = write(tmp_path, "a.jsonl", [*pairs(17), *long])
    with pytest.raises(DataError, match=r"15\.0% of the rows \(3 of 20\) would be dropped or cut") as caught:
        ready(path, max_length=80, max_lost=0.05)
    assert caught.value.details == ["3 too long: a.jsonl:18, a.jsonl:19, a.jsonl:20"]
    assert "--set data.max_length=" in caught.value.hint
    assert "--set data.max_lost=0.15" in caught.value.hint
    assert len(ready(path, max_length=80, max_lost=0.15).train) == 17


def test_duplicates_and_empty_answers_are_dropped_and_reported(tmp_path):
    rows = [*pairs(3), *pairs(2), {"prompt": "x", "completion": " "}, {"prompt": "y", "completion": None}]
    path = write(tmp_path, "a.jsonl", rows)
    prepared = ready(path)
    assert len(prepared.train) == 3
    found = {problem.kind: problem.rows for problem in prepared.report.problems}
    assert found == {"duplicate": ["a.jsonl:4", "a.jsonl:5"], "empty answer": ["a.jsonl:6", "a.jsonl:7"]}
    assert prepared.report.issues[-1].detail == "the same as a.jsonl:2"
    kept = ready(path, duplicates="keep")
    assert len(kept.train) == 5
    assert "duplicate, kept" in {problem.kind for problem in kept.report.problems}


def test_odd_rows_are_kept_and_reported(tmp_path):
    rows = [
        {"messages": [*CHAT, {"role": "user", "content": "and?"}]},
        {"messages": [{"role": "user", "content": "a<|im_end|>b"}, CHAT[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}, CHAT[1]]},
    ]
    prepared = ready(write(tmp_path, "a.jsonl", rows))
    assert len(prepared.train) == 3
    found = {problem.kind: (problem.effect, problem.rows) for problem in prepared.report.problems}
    assert found == {
        "turns after the last answer": ("left out", ["a.jsonl:1"]),
        "control token in the text": ("kept", ["a.jsonl:2"]),
    }


contents = st.lists(st.integers(0, 30), min_size=4, max_size=60)


@settings(deadline=None, max_examples=40)
@given(contents, st.floats(0.05, 0.6), st.integers(0, 3))
def test_the_split_leaks_nothing_and_depends_on_content_only(tmp_path_factory, numbers, share, seed):
    folder = tmp_path_factory.mktemp("split")
    rows = [{"text": f"number {n}"} for n in numbers]
    path = write(folder, "a.jsonl", rows)
    prepared = ready(path, tiny.bare(), eval=share, seed=seed, duplicates="keep")
    train, held = ({tuple(e.ids) for e in side} for side in (prepared.train, prepared.eval))
    assert not train & held
    assert len(prepared.train) + len(prepared.eval) == len(numbers)
    assert len(held) == int(share * len(set(numbers)) + 1e-9)
    if not held:
        assert any("no validation set" in note for note in prepared.report.notes)
    turned = write(folder, "a.jsonl", rows[::-1])
    again = ready(turned, tiny.bare(), eval=share, seed=seed, duplicates="keep")
    assert {tuple(e.ids) for e in again.eval} == held


def test_validation_by_count_file_or_not_at_all(tmp_path):
    path = write(tmp_path, "a.jsonl", pairs(20))
    assert len(ready(path, eval=4).eval) == 4
    assert len(ready(path, eval=0).eval) == 0
    one, other = (frozenset(e.row for e in ready(path, eval=5, seed=seed).eval) for seed in (0, 1))
    assert one != other
    apart = write(tmp_path, "held.jsonl", [*pairs(2), {"prompt": "new", "completion": "thing"}])
    prepared = ready(path, eval=apart)
    assert [len(prepared.train), len(prepared.eval)] == [18, 3]
    [problem] = prepared.report.problems
    assert (problem.kind, problem.rows) == ("also in the validation set", ["a.jsonl:1", "a.jsonl:2"])
    assert [source.use for source in prepared.report.sources] == ["train", "eval"]
    for wanted, text in [(20, "leaves none"), (2.5, "whole number")]:
        with pytest.raises(DataError, match=text):
            ready(path, eval=wanted)


def test_a_row_of_100k_tokens_takes_no_quadratic_time(tmp_path):
    long = {"prompt": "é " * 50_000, "completion": "five " * 25_000}
    path = write(tmp_path, "a.jsonl", [*pairs(30), long])
    started = time.perf_counter()
    prepared = ready(path, max_length=2048, length=2048)
    assert time.perf_counter() - started < 5
    assert prepared.report.lengths["max"] > 100_000
    assert len(prepared.train) == 30


# ---- store, report, cache ----------------------------------------------------------------------------


def test_examples_are_a_compact_list(tmp_path):
    examples = ready(write(tmp_path, "a.jsonl", pairs(7))).train
    every = list(examples)
    assert len(examples) == len(every) == 7
    assert every[-1] == examples[-1] == examples[6]
    assert examples[1:3] == every[1:3]
    assert examples.lengths.tolist() == [len(example.ids) for example in every]
    assert examples.targets.tolist() == [example.targets for example in every]
    assert examples.ids.dtype == torch.int32
    with pytest.raises(IndexError):
        examples[7]
    assert not len(ready(write(tmp_path, "a.jsonl", pairs(7))).eval)


def test_an_example_knows_its_last_answer_without_help():
    example = Example([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100], "a:1")
    assert (example.targets, example.prompt_ids, example.answer_ids) == (3, [1, 2, 3], [4, 5])


def test_the_report_is_json_and_adds_up(tmp_path):
    rows = [*pairs(40), *pairs(1), {"prompt": "x", "completion": ""}]
    prepared = ready(write(tmp_path, "a.jsonl", rows), eval=0.1)
    report = prepared.report
    back = DataReport.from_dict(json.loads(json.dumps(report.to_dict())), report.issues)
    assert back == report
    assert report.to_dict()["target_share"] == report.targets / report.tokens
    assert (report.read, report.kept, report.train, report.eval) == (42, 40, 36, 4)
    assert report.tokens == int(prepared.train.lengths.sum())
    assert report.targets == int(prepared.train.targets.sum())
    assert (report.end_token, report.all_ended) == ("<|im_end|>", True)


def test_the_cache_is_used_only_for_the_very_same_data(tmp_path, monkeypatch):
    path = write(tmp_path, "a.jsonl", pairs(20))
    cache = tmp_path / "cache"
    first = ready(path, cache=cache, eval=0.2)
    assert not first.report.cached
    with monkeypatch.context() as patch:
        patch.setattr("loraloom.data.pipeline.encode_scripts", None)  # tokenising again would fail
        second = ready(path, cache=cache, eval=0.2)
    assert second.report.cached
    assert list(second.train) == list(first.train)
    assert list(second.eval) == list(first.eval)
    assert second.report.to_dict() == first.report.to_dict()
    assert second.report.issues == first.report.issues
    changed = [{"seed": 1}, {"loss_on": "all"}, {"length": 400}, {"system": "x"}, {"max_length": 100}]
    for change in changed:
        assert not ready(path, cache=cache, **{"eval": 0.2, **change}).report.cached
    other = tiny.chatml(tiny.CHATML.replace("kind", "rude"))
    assert not ready(path, other, cache=cache, eval=0.2).report.cached
    write(tmp_path, "a.jsonl", pairs(21))
    assert not ready(path, cache=cache, eval=0.2).report.cached


@pytest.mark.parametrize("name", ["facts.json", "tokens.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, name, damage):
    path = write(tmp_path, "a.jsonl", pairs(5))
    good = ready(path, cache=tmp_path / "cache")
    [folder] = (tmp_path / "cache").iterdir()
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-20] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    again = ready(path, cache=tmp_path / "cache")
    assert not again.report.cached
    assert list(again.train) == list(good.train)
    assert ready(path, cache=tmp_path / "cache").report.cached


def test_histogram():
    lines = length_histogram([5, 6, 7, 15, 15, 25, 99], bins=5).splitlines()
    assert lines[0].split() == ["0", "-", "19", "█" * 40, "5"]
    assert [line.split()[-1] for line in lines] == ["5", "1", "0", "0", "1"]
    assert lines[-1].startswith("80 - 99")
    assert length_histogram([]) == "no examples"
    assert length_histogram([7] * 3).split() == ["7", "-", "7", "█" * 40, "3"]
    counts = [int(line.split()[-1]) for line in length_histogram(range(1, 3000)).splitlines()]
    assert sum(counts) == 2999


def test_preview_keeps_characters_of_several_tokens_whole():
    tokenizer = tiny.bare()
    turns = [Turn("user", "日本 é"), Turn("assistant", "語 ü")]
    example = example_of(tokenizer, Style("plain"), turns)
    assert preview(tokenizer, example) == [("日本 é", False), ("語 ü<|endoftext|>", True)]
    ids = encode(tokenizer, ["é"])[0]
    assert len(ids) == 2
    broken = Example(ids, [-100, ids[1]], "a:1")  # a border within a character
    assert preview(tokenizer, broken) == [("", False), ("é", True)]


def test_show_prints_counts_histogram_and_coloured_rows(tmp_path):
    rows = [{"question": f"what is {n}?", "answer": f"[it] is {n}"} for n in range(12)]
    prepared = ready(write(tmp_path, "a.jsonl", [*rows, rows[0]]), eval=0.05)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=300, color_system="standard", highlight=False)
    show(prepared, tiny.chatml(), console, previews=2)
    plain = io.StringIO()
    show(prepared, tiny.chatml(), Console(file=plain, width=300, highlight=False), previews=2)
    said = plain.getvalue()
    for part in [
        "question → prompt, answer → completion (guessed; data.map to change)",
        "13 read · 12 kept · 1 duplicate (dropped)",
        "every row ends in <|im_end|> (trained)",
        "no validation set: 0.05 of 12 rows is less than one",
        "Tokens per training example",
        "█",
        "grey = not trained, green = trained",
        "assistant␤[it] is ",
    ]:
        assert part in said, part
    assert said.count("Preview") == 2
    assert "\x1b[32m[it] is" in text.getvalue()
    assert "\x1b[90m<|im_start|>system" in text.getvalue()
