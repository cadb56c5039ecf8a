"""`train_datasets` entries and dataset objects: every data form, every error, mixing, aligning."""

import datetime
import gzip
import json
import time
from collections import Counter

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

from grpo_trl.data import load_datasets, parse_entries
from grpo_trl.data_forms import LOADERS
from grpo_trl.prompts import check_prompt_dataset, check_template_kwargs, first_rows

ROWS = [{"question": f"What is {i} + {i}?", "answer": f"{2 * i}", "level": i} for i in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """`datasets` keeps what it converts in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def entry(path, type="jsonl", input="question", output="answer", **more):
    return {"path": str(path), "type": type, "input": input, "output": output, **more}


def write(form, folder):
    """ROWS in one of the data forms; returns the path for the entry."""
    folder.mkdir()
    rows = Dataset.from_list(ROWS)
    if form == "disk":
        rows.save_to_disk(str(folder / "saved"))
        return folder / "saved"
    if form == "arrow":
        rows.save_to_disk(str(folder))
        return folder  # the folder's *.arrow file
    path = folder / f"rows.{form}"
    if form == "hub":  # a folder of data files loads as a Hub id does
        rows.to_parquet(str(folder / "train-00000-of-00001.parquet"))
        return folder
    if form == "json":
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif form == "jsonl":
        jsonl(path, ROWS)
    elif form == "csv":
        rows.to_csv(str(path))
    else:
        rows.to_parquet(str(path))
    return path


@pytest.mark.parametrize("form", sorted(LOADERS))
def test_every_data_form(form, tmp_path):
    rows = load_datasets([entry(write(form, tmp_path / "data"), form)])
    assert rows["prompt"][:] == rows["question"][:] == [row["question"] for row in ROWS]
    assert rows["answer"][:] == rows["solution"][:] == [row["answer"] for row in ROWS]  # text, in a CSV file too
    assert rows["level"][:] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", sorted(LOADERS))
def test_split_takes_a_slice(form, tmp_path):
    path = write(form, tmp_path / "data")
    assert load_datasets([entry(path, form, split="train[2:4]")])["level"][:] == [2, 3]
    assert load_datasets([entry(path, form, split="train[:50%]")])["level"][:] == [0, 1, 2]


def test_seed_entry_with_a_parquet_file(tmp_path, monkeypatch):
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "your_dataset.parquet"))
    monkeypatch.chdir(tmp_path)  # relative paths are relative to the current directory
    seed_entry = {"path": "your_dataset.parquet", "type": "parquet", "input": "question", "output": "answer"}
    assert load_datasets([seed_entry])[5] == {**ROWS[5], "prompt": "What is 5 + 5?", "solution": "10"}


def test_gsm8k_slice(gsm8k):
    rows = load_datasets([entry(gsm8k, split="train[:64]")])
    assert len(rows) == 64
    assert rows[0]["prompt"].startswith("Natalia sold clips")
    assert rows[0]["answer"] == rows[0]["solution"]
    assert rows[0]["answer"].endswith("#### 72")


def test_whole_gsm8k_is_checked_quickly(gsm8k):
    load_datasets([entry(gsm8k)])  # converted and cached by `datasets`
    start = time.process_time()  # not the wall: the machine may be busy
    assert len(load_datasets([entry(gsm8k)])) == 7473
    assert time.process_time() - start < 2


def test_saved_dataset_dict_and_hub_splits(tmp_path):
    parts = {"train": Dataset.from_list(ROWS[:4]), "test": Dataset.from_list(ROWS[4:])}
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    for name, part in parts.items():
        part.to_parquet(str(tmp_path / f"{name}.parquet"))
    assert load_datasets([entry(tmp_path / "saved", "disk", split="test")])["level"][:] == [4, 5]
    assert load_datasets([entry(tmp_path / "saved", "disk", split="test+train[:1]")])["level"][:] == [4, 5, 0]
    hub = tmp_path / "hub"
    hub.mkdir()
    for name in parts:
        (tmp_path / f"{name}.parquet").rename(hub / f"{name}.parquet")
    assert load_datasets([entry(hub, "hub", split="test")])["level"][:] == [4, 5]


def test_hub_name_is_the_configuration(tmp_path):
    Dataset.from_list(ROWS[:2]).to_parquet(str(tmp_path / "a.parquet"))
    Dataset.from_list(ROWS[2:]).to_parquet(str(tmp_path / "b.parquet"))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: easy\n  data_files: a.parquet\n"
        "- config_name: hard\n  data_files: b.parquet\n---\n"
    )
    assert load_datasets([entry(tmp_path, "hub", name="hard")])["level"][:] == [2, 3, 4, 5]


def test_glob_folder_and_compressed_files(tmp_path):
    folder = tmp_path / "shards [v1]"  # a name with glob characters is still a name
    folder.mkdir()
    jsonl(folder / "b.jsonl", ROWS[2:])
    jsonl(folder / "a.jsonl", ROWS[:2])
    (folder / "notes.txt").write_text("not data")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "a.jsonl").write_text("of yesterday")
    (tmp_path / "d.jsonl").mkdir()
    assert load_datasets([entry(folder)])["level"][:] == [0, 1, 2, 3, 4, 5]
    assert load_datasets([entry(tmp_path / "*" / "?.jsonl")])["level"][:] == [0, 1, 2, 3, 4, 5]
    (folder / "[c].csv").write_text("question,answer\nQ,1\n")
    assert load_datasets([entry(folder / "[c].csv", "csv")])["answer"][:] == ["1"]
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROWS[3]) + "\n")
    assert load_datasets([entry(tmp_path / "rows.jsonl.gz")])["level"][:] == [3]


def test_csv_text_stays_text(tmp_path):
    (tmp_path / "a.csv").write_text('question,answer,score\n"NA, or None?",007,1.5\nnull,NA,\n')
    rows = load_datasets([entry(tmp_path / "a.csv", "csv")])
    assert rows["prompt"][:] == ["NA, or None?", "null"]
    assert rows["answer"][:] == ["007", "NA"]
    assert rows["score"][:] == [1.5, None]


def test_messages_and_prompts_without_output(tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": messages}])
    rows = load_datasets([{"path": path, "type": "jsonl", "input": "prompt"}])
    assert rows.column_names == ["prompt"]
    assert rows[0]["prompt"] == messages


def test_values_of_mixed_types_keep_their_own(tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    path = jsonl(tmp_path / "a.jsonl", [{"question": "5", "answer": 1}, {"question": messages, "answer": "1"}])
    rows = load_datasets([entry(path)])
    assert rows["prompt"][:] == ["5", messages]
    assert rows["answer"][:] == rows["solution"][:] == [1, "1"]


@pytest.mark.parametrize(
    ("numbers", "kept"),
    [
        ([72, 0.5, 0.0058338203945503125, 5e-324], None),  # as Arrow: 72.0, of which `accuracy` makes 72 again
        ([72, 0.5, 2**60 + 1], [72, 0.5, 2**60 + 1]),  # no decimal number is the last
    ],
)
def test_numbers_of_two_kinds(tmp_path, numbers, kept):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": number} for number in numbers])
    assert list(map(repr, load_datasets([entry(path)])["answer"])) == list(map(repr, kept or map(float, numbers)))


@pytest.mark.parametrize("number", [10**30, [10**30], {"id": 10**30}], ids=str)
def test_numbers_beyond_64_bit_are_refused(tmp_path, number):
    rows = [{"question": "q", "answer": "1", "meta": value} for value in (number, number)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="column 'meta' has a whole number beyond 64 bit; put it in quotes"):
        load_datasets([entry(path)])


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_files_with_a_byte_order_mark(tmp_path, form):
    path = write(form, tmp_path / "rows")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_datasets([entry(path, form)])["answer"][:] == [row["answer"] for row in ROWS]


def test_lines_that_are_blank_in_a_file_of_windows(tmp_path):
    text = "\r\n".join(["", *(json.dumps(row) for row in ROWS), " ", ""])
    (tmp_path / "rows.jsonl").write_bytes(text.encode())
    assert load_datasets([entry(tmp_path / "rows.jsonl")])["answer"][:] == [row["answer"] for row in ROWS]


def test_json_text_stays_text_in_every_file(tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"question": "When?", "answer": "2024-01-01"}])
    jsonl(tmp_path / "b.jsonl", [{"question": [{"role": "user", "content": "5"}], "answer": 5}])
    rows = load_datasets([entry(tmp_path)])
    assert rows["answer"][:] == ["2024-01-01", 5]
    assert rows["prompt"][:] == ["When?", [{"role": "user", "content": "5"}]]


def test_columns_in_the_way_are_kept_under_another_name(tmp_path, caplog):
    row = {
        "problem": "p",
        "final": "f",
        "prompt": "own",
        "answer": "own",
        "solution": "s",
        "original_answer": 7,
    }
    rows = load_datasets([entry(jsonl(tmp_path / "a.jsonl", [row]), input="problem", output="final")])
    assert rows[0] == {
        **{"problem": "p", "final": "f", "prompt": "p", "answer": "f", "solution": "f"},
        **{"original_prompt": "own", "original_original_answer": "own", "original_solution": "s"},
        "original_answer": 7,
    }
    assert "its own 'solution' is 'original_solution'" in caplog.text


def test_input_named_answer(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"answer": "An answer. Its question?", "question": "Q"}])
    rows = load_datasets([entry(path, input="answer", output="question")])
    assert rows[0] == {
        **{"prompt": "An answer. Its question?", "original_answer": "An answer. Its question?"},
        **{"answer": "Q", "solution": "Q", "question": "Q"},
    }


def test_a_new_data_form_is_one_loader(monkeypatch):
    monkeypatch.setitem(LOADERS, "sums", lambda entry: Dataset.from_list(ROWS[: int(entry.path)]))
    assert load_datasets([entry(2, "sums")])["level"][:] == [0, 1]
    with pytest.raises(ValueError, match="0: no rows in split 'train'"):
        load_datasets([entry(0, "sums")])


# --- several entries


def test_entries_follow_each_other_and_columns_are_unified(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"question": "Q1", "answer": 1, "level": 3}])
    b = jsonl(tmp_path / "b.jsonl", [{"problem": [{"role": "user", "content": "Q2"}], "result": "72", "tags": ["x"]}])
    (tmp_path / "c.csv").write_text("question,answer\nQ3,73\n")
    rows = load_datasets([entry(a), entry(b, input="problem", output="result"), entry(tmp_path / "c.csv", "csv")])
    assert rows["prompt"][:] == ["Q1", [{"role": "user", "content": "Q2"}], "Q3"]
    assert rows["answer"][:] == [1, "72", "73"]  # each value keeps its own type
    assert rows["level"][:] == [3, None, None]
    assert rows["tags"][:] == [None, ["x"], None]


@pytest.mark.parametrize("when", [datetime.datetime(2024, 1, 1), [datetime.datetime(2024, 1, 1)]], ids=["one", "list"])
def test_columns_that_cannot_be_unified(tmp_path, when):
    a = jsonl(tmp_path / "a.jsonl", [{"question": "Q", "answer": "1", "when": "today"}])
    Dataset.from_list([{"question": "Q", "answer": "1", "when": when}]).to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match=r"Column 'when' has different types .*string.*timestamp"):
        load_datasets([entry(a), entry(tmp_path / "b.parquet", "parquet")])


def test_mixed_by_weight(tmp_path, caplog):
    a = jsonl(tmp_path / "a.jsonl", [{"question": f"a{i}"} for i in range(300)])
    b = jsonl(tmp_path / "b.jsonl", [{"question": f"b{i}"} for i in range(20)])
    entries = [entry(a, output=None, weight=3), entry(b, output=None, weight=1)]
    rows = load_datasets(entries, seed=1)
    counts = Counter(prompt[0] for prompt in rows["prompt"])
    assert counts["a"] / len(rows) == pytest.approx(0.75, abs=0.05)
    assert len(set(rows["prompt"])) == 320  # every row of each entry is there
    assert f"to {len(rows)} rows" in caplog.text
    assert load_datasets(entries, seed=1)["prompt"][:] == rows["prompt"][:]
    assert load_datasets(entries, seed=2)["prompt"][:] != rows["prompt"][:]


# --- errors


def test_all_problems_of_entries_in_one_error():
    entries = [
        {"path": "a.jsonl", "type": "jsonlines", "input": "q", "outputs": "a"},
        {"type": "json", "input": 3, "weight": 0, "name": "main"},
        "data.jsonl",
    ]
    with pytest.raises(ValueError) as error:
        load_datasets(entries)
    for problem in (
        "entry 1: unknown key 'outputs'; known: path, type, input, output, split, weight, name",
        "entry 1: unknown type 'jsonlines'; use one of parquet, json, jsonl, csv, arrow, disk, hub",
        "entry 2: 'path' is missing",
        "entry 2: input must be text, got 3",
        "entry 2: weight must be a number above 0, got 0",
        "entry 2: name is the configuration of a Hub dataset; remove it from type json",
        "entry 3: got 'data.jsonl'",
        "entries without weight: 1",
    ):
        assert problem in str(error.value)


@pytest.mark.parametrize("weight", [True, -1, float("inf"), float("nan"), "1"])
def test_what_is_no_weight(weight):
    with pytest.raises(ValueError, match="entry 1: weight must be a number above 0, got"):
        parse_entries([entry("a.jsonl", weight=weight)])


@pytest.mark.parametrize("entries", [[], {"path": "x"}, "x.jsonl", None])
def test_entries_must_be_a_list(entries):
    with pytest.raises(ValueError, match="train_datasets must be a list of entries"):
        parse_entries(entries)


def test_errors_name_the_list_that_is_wrong():
    with pytest.raises(ValueError, match=r"^eval_datasets\[hard\] must be a list"):
        parse_entries([], "eval_datasets[hard]")
    with pytest.raises(ValueError, match=r"^eval_datasets:\n  - entry 1: unknown type 'xml'"):
        parse_entries([entry("a.xml", "xml")], "eval_datasets")


def test_missing_files_are_named_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path / 'nowhere.jsonl'}: no such file"):
        load_datasets([entry("nowhere.jsonl")])
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path / 'folder'}: no \*\.jsonl file in this folder"):
        load_datasets([entry("folder")])
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "nowhere")):
        load_datasets([entry("nowhere", "disk")])


def test_missing_column_lists_the_columns(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"a\.jsonl: no column 'problem'; its columns are question, answer, level"):
        load_datasets([entry(path, input="problem")])
    with pytest.raises(ValueError, match=r"a\.jsonl: no column 'result'"):
        load_datasets([entry(path, output="result")])


@pytest.mark.parametrize(
    ("form", "text", "message"),
    [
        ("jsonl", "", "empty file"),
        ("jsonl", "\n\n", "no rows"),
        ("json", "[]", "no rows"),
        ("csv", "question,answer\n", "no rows"),
        ("jsonl", '{"question": "a", "answer": "1"}\n\n{"question": "b", \n', "line 3, character 19: .*property name"),
        ("jsonl", '{"question": "a", "answer": "1"}\n5\n', "line 2: expected a JSON object, got 5"),
        ("json", '[{"question": "a"},\n {"question": }]', "line 2, character 15: Expecting value"),
        ("csv", "question,answer\na,1\nb,1,2\n", "Expected 2 fields in line 3, saw 3"),
        ("csv", "question,answer\na,1,2\nb,1,2\n", "more fields than the header"),
        ("parquet", "not parquet", "cannot be read as parquet"),
        ("arrow", "not arrow", "cannot be read as arrow"),
    ],
)
def test_broken_files_are_named_with_their_line(tmp_path, form, text, message):
    (tmp_path / f"b.{form}").write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)b\.{form}: .*{message}"):
        load_datasets([entry(tmp_path / f"b.{form}", form)])


def test_the_broken_one_of_several_files_is_named(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_bytes('{"question": "é", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.jsonl: .*line 1: 'utf-8' codec can't decode"):
        load_datasets([entry(tmp_path)])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "column 'question': missing or null"),
        ({"question": None, "answer": "1"}, "column 'question': missing or null"),
        ({"question": " ", "answer": "1"}, "column 'question': empty text"),
        ({"question": 5, "answer": "1"}, "column 'question': a value of type int"),
        ({"question": [], "answer": "1"}, "column 'question': an empty list"),
        (
            {"question": ["Hi"], "answer": "1"},
            "column 'question': a list with 'Hi', expected {role, content}",
        ),
        ({"question": [{"role": "user", "content": 5}], "answer": "1"}, "column 'question': a message whose content"),
        ({"question": [{"role": 1, "content": "a"}], "answer": "1"}, "column 'question': a message whose role is 1"),
        ({"question": "b", "answer": None}, "column 'answer': missing or null"),
    ],
)
def test_bad_values_are_named_with_file_row_and_column(tmp_path, row, message):
    jsonl(tmp_path / "a.jsonl", ROWS)
    jsonl(tmp_path / "b.jsonl", [ROWS[0], row, ROWS[1]])
    with pytest.raises(ValueError) as error:
        load_datasets([entry(tmp_path, split="train[3:]")])  # rows are those of the file, not of the slice
    assert f"{tmp_path / 'b.jsonl'}, row 2, {message}" in str(error.value)


def test_the_first_row_of_a_second_file_is_named_as_that(tmp_path):
    jsonl(tmp_path / "a.jsonl", ROWS)
    jsonl(tmp_path / "b.jsonl", [{"question": None, "answer": "1"}])
    with pytest.raises(ValueError, match=r"b\.jsonl, row 1, column 'question'"):
        load_datasets([entry(tmp_path)])


def test_bad_values_in_other_forms(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,1\nb\n")  # a row that ends early
    with pytest.raises(ValueError, match=r"a\.csv, row 2, column 'answer': missing or null"):
        load_datasets([entry(tmp_path / "a.csv", "csv")])
    Dataset.from_dict({"question": [1, 2], "answer": ["a", "b"]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"saved, row 1 of split 'train', column 'question': .*int.*\(1 more rows"):
        load_datasets([entry(tmp_path / "saved", "disk")])


def test_bad_splits(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"a\.jsonl: split 'test': Unknown split"):
        load_datasets([entry(path, split="test")])
    with pytest.raises(ValueError, match=r"a\.jsonl: split 'train\[': Unrecognized"):
        load_datasets([entry(path, split="train[")])
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows in split 'train\[6:\]'"):
        load_datasets([entry(path, split="train[6:]")])


# --- dataset objects


def test_dataset_objects_that_are_accepted():
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    for good in (
        Dataset.from_list(rows[:1]),
        Dataset.from_list(rows[1:]),
        Dataset.from_list(rows[1:]).with_format("torch"),
        Dataset.from_dict({"x": ["a"]}).with_transform(lambda batch: {"prompt": batch["x"]}),
        Dataset.from_dict({"prompt": [1, 2]}).with_transform(
            lambda batch: {"prompt": list(map(str, batch["prompt"]))}
        ),
        IterableDataset.from_generator(lambda: iter(rows)),
        Dataset.from_list(rows[:1]).to_iterable_dataset(),
        rows,
    ):
        check_prompt_dataset(good, where="train_dataset")


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        (Dataset.from_dict({"prompt": []}), ValueError, "train_dataset has no rows"),
        (Dataset.from_dict({"question": ["a"]}), ValueError, "no 'prompt' column; its columns are question"),
        (Dataset.from_dict({"question": ["a"]}).to_iterable_dataset(), ValueError, "no 'prompt' column"),
        (
            Dataset.from_dict({"prompt": ["a", None, ""]}),
            ValueError,
            r"row 2, column 'prompt': missing.*\(2 such",
        ),
        (Dataset.from_dict({"prompt": [1]}).to_iterable_dataset(), ValueError, "row 1, column 'prompt': .* int"),
        ([{"prompt": "a"}, {"prompt": 5}], ValueError, "row 2, column 'prompt': a value of type int"),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
            ValueError,
            "row 1, column 'prompt': .*content is of type list, expected text; join the text of its parts",
        ),
        (["a"], TypeError, "rows must be dicts with a 'prompt', got str"),
        ([{"prompt": "a"}, "b"], TypeError, "row 2: expected a dict with a 'prompt', got str"),
        (DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}), TypeError, r"dictionary of datasets \(train\)"),
        ((row for row in [{"prompt": "a"}]), TypeError, "got generator"),
        ("data.jsonl", TypeError, "got str"),
    ],
)
def test_dataset_objects_that_are_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        check_prompt_dataset(dataset, where="train_dataset")


CHAT = [{"role": "user", "content": "b"}]
MIXED = [{"prompt": "a"}, {"prompt": "c"}, {"prompt": CHAT}, {"prompt": CHAT, "chat_template_kwargs": {"x": 1}}]


@pytest.mark.parametrize(
    ("dataset", "prompts"),
    [
        (MIXED, ["a", CHAT]),
        (MIXED[2:], [CHAT]),
        (MIXED[::-1], [CHAT, "c"]),
        (Dataset.from_list(MIXED[:2]), ["a"]),
        (Dataset.from_dict({"x": ["a", "b"]}).with_transform(lambda batch: {"prompt": batch["x"]}), ["a"]),
        (IterableDataset.from_generator(lambda: iter(MIXED)), ["a"]),
    ],
)
def test_first_rows_of_each_kind(dataset, prompts):
    assert [row["prompt"] for row in first_rows(dataset)] == prompts


def test_template_kwargs_of_every_row_are_checked():
    rows = [{"prompt": "a", "chat_template_kwargs": {"x": 1}}, {"prompt": "a", "chat_template_kwargs": None}]
    for good in (rows, MIXED, Dataset.from_list(rows), Dataset.from_list([{"prompt": "a"}])):
        check_template_kwargs(good)
    bad = [*rows, {"prompt": "a", "chat_template_kwargs": "{}"}]
    with pytest.raises(ValueError, match=r"row 3, column 'chat_template_kwargs': the str '{}', expected a mapping"):
        check_template_kwargs(bad)
    with pytest.raises(ValueError, match="row 1, column 'chat_template_kwargs': the list"):
        check_template_kwargs(Dataset.from_dict({"prompt": ["a"], "chat_template_kwargs": [[1]]}))


def test_large_string_columns_match_string_columns(tmp_path):
    features = Features(
        {"question": Value("large_string"), "answer": Value("large_string"), "m": List(Value("int32"))}
    )
    Dataset.from_dict({"question": ["Q"], "answer": ["72"], "m": [[1]]}, features=features).to_parquet(
        str(tmp_path / "a.parquet")
    )
    b = jsonl(tmp_path / "b.jsonl", [{"question": "R", "answer": "73", "m": [2]}])
    rows = load_datasets([entry(tmp_path / "a.parquet", "parquet"), entry(b)])
    assert rows["answer"][:] == ["72", "73"]
    assert rows["m"][:] == [[1], [2]]
