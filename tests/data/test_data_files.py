"""Reading records: every kind of path, and errors that name file and line."""

import pytest

from mage_tune.data.files import find_files, read_records

DOCUMENTS = [{"text": "one"}, {"text": "two", "n": 2}, {"text": "drei – ü"}]


def texts(path, **options):
    return [r.text("text") for r in read_records(path, **options)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_records_come_in_order(write, name, streaming):
    path = write(name, DOCUMENTS)
    records = list(read_records(path, streaming=streaming))
    assert [r.fields["text"] for r in records] == [d["text"] for d in DOCUMENTS]
    assert [r.place for r in records] == [f"{path}:{i}" for i in (1, 2, 3)]


def test_long_parquet_keeps_count(write):
    path = write("a.parquet", [{"text": str(i)} for i in range(1000)])
    records = list(read_records(path))
    assert [r.fields["text"] for r in records] == [str(i) for i in range(1000)]
    assert records[999].place == f"{path}:1000"


def test_txt_is_one_document(write):
    assert texts(write("a.txt", "first\n\nsecond\n")) == ["first\n\nsecond\n"]


def test_glob_and_folder_are_sorted_and_mixed(write, tmp_path):
    write("d/b.txt", "B")
    write("d/a.jsonl", [{"text": "A"}])
    write("d/sub/c.txt", "C")
    write("d/notes.md", "no")
    assert texts(str(tmp_path / "d")) == ["A", "B"]
    assert texts(str(tmp_path / "d" / "*.txt")) == ["B"]
    assert texts(str(tmp_path / "d" / "**" / "*.txt")) == ["B", "C"]


def test_blank_lines_byte_order_mark_and_crlf_are_fine(write):
    path = write("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}')
    assert texts(path) == ["x", "y"]
    assert list(read_records(path))[1].place == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', r"a\.jsonl:17: not valid JSON: .* at column 13"),
        (b"plain text", r"a\.jsonl:17: not valid JSON: Expecting value at column 1"),
        (b'["x"]', r"a\.jsonl:17: expected one JSON object, found a list"),
        (b"null", r"a\.jsonl:17: expected one JSON object, found null"),
        (b'{"text": "\xff"}', r"a\.jsonl:17: not UTF-8 \(byte 10\)"),
        (b'{"body": "x"}', r"a\.jsonl:17: no field 'text' \(the record's fields: 'body'\)"),
        (b'{"text": 3}', r"a\.jsonl:17: 'text' is a number \(3\), expected a string"),
        (b'{"text": null}', r"a\.jsonl:17: 'text' is null, expected a string"),
    ],
)
def test_a_bad_line_is_named(write, line, message):
    path = write("a.jsonl", b'{"text": "fine"}\n' * 16 + line + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        texts(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(write, name, content):
    with pytest.raises(ValueError, match=rf"{name}: no records in this file"):
        texts(write(name, content))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", r"missing\.jsonl: no such file \(looked in /.*\)"),
        ("data/missing.jsonl", "no such file"),
        ("/nowhere/at/all.parquet", r"all\.parquet: no such file, and not a Hub id"),
        ("no such thing", "not a Hub id of the form owner/name"),
        ("a/b/c", "not a Hub id"),
        ("../up", "not a Hub id"),
        ("nothing/*.jsonl", r"nothing/\*\.jsonl: no file matches"),
        ("https://example.org/x.jsonl", "no such file"),
    ],
)
def test_no_such_data(path, message):
    with pytest.raises(ValueError, match=message):
        texts(path)


def test_unknown_types_of_files(write, tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv: unknown type of file '\.csv'"):
        texts(write("e/a.csv", "x"))
    with pytest.raises(ValueError, match=r"no \.jsonl, \.parquet, \.txt file in this folder"):
        texts(str(tmp_path / "e"))
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        texts(write("a.parquet", b"PAR1 not really"))


def test_a_hub_id_goes_through_datasets(monkeypatch):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter(DOCUMENTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert find_files("owner/name") is None
    records = list(read_records("owner/name:main", "validation", streaming=True))
    assert [r.fields["text"] for r in records] == [d["text"] for d in DOCUMENTS]
    assert records[1].place == "owner/name:main[validation]:2"
    assert calls == [(("owner/name", "main"), {"split": "validation", "streaming": True})]


def test_a_hub_id_that_cannot_be_loaded(monkeypatch):
    import datasets

    def load_dataset(*args, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' doesn't exist\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"^o/n: no such .*\(Dataset 'o/n' doesn't exist\)$"):
        texts("o/n")
