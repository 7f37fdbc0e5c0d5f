"""README and cards say what results/*.json say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("fill_tables", ROOT / "scripts" / "fill_tables.py")
assert spec and spec.loader
fill_tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fill_tables)


@pytest.mark.parametrize("name", fill_tables.FILES)
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    assert fill_tables.filled(text) == text, "run python scripts/fill_tables.py"


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    start = text.index("<!-- alignment -->")
    assert fill_tables.filled(text[:start] + text[start:].replace("0.", "9.", 1)) == text


def test_every_table_is_used():
    everything = "".join((ROOT / name).read_text() for name in fill_tables.FILES)
    assert all(f"<!-- {name} -->" in everything for name in fill_tables.TABLES)
