"""What scripts/build_corpus.py promises: plain text, a stable split, no repeats, same output."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import build_corpus as script

PROSE = "The quick brown fox jumps over the lazy dog, and then it sleeps.\n"
REPOSITORY = Path(__file__).resolve().parents[2]


def page(n: int) -> str:
    words = [
        f"Paragraph {'abcdefghij'[n % 10] * 3} number {'klmnopqrst'[i % 10] * (n + 1)} says "
        f"something about {'uvwxyz'[i % 6] * 4}."
        for i in range(20)
    ]
    return "\n".join(words) + "\n"


def test_html_loses_navigation_and_keeps_layout():
    pytest.importorskip("inscriptis")
    text = script.normalise(
        script.html_to_text(
            "<?xml version='1.0' encoding='UTF-8'?><html><head><title>T</title></head><body>"
            "<div class='navheader'>Prev Next</div><h1>VACUUM<a class='headerlink'>\u00b6</a></h1>"
            "<p>It\u2019s the  garbage\n collector \u2014 always.</p><pre>a = 1\n    b = 2</pre>"
            "<table><tr><td>one</td><td>two</td></tr></table><script>alert(1)</script>"
            "<ul><li>first</li><li>second</li></ul><footer>end</footer></body></html>"
        )
    )
    assert text.startswith("VACUUM\n")
    assert "It's the garbage collector -- always." in text
    assert "a = 1\n" in text
    assert "    b = 2" in text
    assert re.search(r"one +two", text)
    assert "* first" in text
    for gone in ("Prev", "alert", "end", "<", "\u00b6"):
        assert gone not in text


def test_main_part_is_preferred():
    pytest.importorskip("inscriptis")
    html = "<body><p>menu</p><div role='main'><p>words</p></div></body>"
    assert script.html_to_text(html).strip() == "words"
    assert script.html_to_text("") == ""


def test_rst_markup_goes():
    source = (
        ".. SPDX-License-Identifier: GPL-2.0\n.. _anchor:\n\n=======\nTitle\n=======\n\n"
        "Call :c:func:`kmalloc` or ``free``; see `the docs <x.html>`_::\n\n    code\n\n"
        ".. note:: Careful.\n"
    )
    text = script.normalise(script.rst_to_text(source))
    assert text == "Title\n\nCall kmalloc or free; see the docs:\n\n    code\n\nCareful.\n"


def test_man_without_groff():
    source = '.TH LS 1\n.\\" comment\n.SH NAME\nls \\- list \\fBfiles\\fR\n.PP\nMore.\n'
    text = script.normalise(script.strip_man(source))
    assert text == "NAME\n\nls - list files\n\nMore.\n"


def test_filters():
    assert script.why_drop("short") == "tiny"
    assert script.why_drop(PROSE * 20) is None
    assert script.why_drop((PROSE + "\u4e2d\u6587" * 3) * 20) == "not ASCII"
    assert script.why_drop((PROSE * 20) + "\u00e9" * 10) is None
    assert script.why_drop("0x1f, 0x2e, 0x3d, 0x4c;\n" * 50) == "mostly symbols"


def test_repeats_exact_and_near():
    repeats = script.Repeats()
    assert not repeats.seen(page(1))
    assert repeats.seen(page(1))
    assert repeats.seen(page(1).upper() + "One more line that nobody has seen before now.\n")
    assert not repeats.seen(page(2))


def test_split_is_stable_and_about_two_percent():
    assert script.split_of("git-doc/doc/git-doc/git-am.html") == "train"
    names = [f"package/file-{n}" for n in range(20_000)]
    held = [name for name in names if script.split_of(name) == "heldout"]
    assert 0.015 < len(held) / len(names) < 0.025
    assert held[:3] == ["package/file-36", "package/file-111", "package/file-119"]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The script with two packages made here instead of downloaded."""
    pytest.importorskip("pyarrow")
    sources = [script.Source(n, r"\.txt(\.gz)?$", "public domain") for n in ("one", "two")]

    def fetch(source, archives, root):
        folder = root / "usr/share/doc" / source.package
        folder.mkdir(parents=True)
        for n in range(30):
            text = page(n + (30 if source.package == "two" else 0)).encode()
            (folder / f"{n}.txt.gz").write_bytes(gzip.compress(text, mtime=0))
        (folder / "link.txt").symlink_to(folder / "0.txt.gz")
        (folder / "again.txt").write_bytes(page(0).encode())
        (folder / "broken.txt.gz").write_bytes(b"not gzip")
        return script.Unpacked(source, source.package, "1.0", root, "0" * 64)

    monkeypatch.setattr(script, "SOURCES", sources)
    monkeypatch.setattr(script, "fetch", fetch)
    monkeypatch.setattr(script, "refresh_lists", lambda: None)
    monkeypatch.setattr(script, "check_tools", lambda _: None)
    monkeypatch.setattr(script, "HELD_OUT", 0.2)
    return lambda name, *more: script.main(["--out", str(tmp_path / name), "--workers=1", *more])


def test_same_packages_same_corpus(offline, tmp_path):
    import pyarrow.parquet as pq

    assert offline("a") == 0
    assert offline("b") == 0
    first, second = (json.loads((tmp_path / x / "corpus.json").read_text()) for x in "ab")
    assert first == second
    tables = {s: pq.read_table(tmp_path / "a" / f"{s}.parquet").to_pylist() for s in first["splits"]}
    assert all(tables.values())
    assert len(tables["train"]) + len(tables["heldout"]) == 60
    assert first["dropped"] == {"repeat": 2, "tiny": 2}
    assert all(script.split_of(r["id"]) == split for split, rs in tables.items() for r in rs)
    assert sum(p["characters"] for p in first["packages"]) == first["characters"]
    assert {r["id"].split("/")[0] for rs in tables.values() for r in rs} == {"one", "two"}


def test_small_runs(offline, tmp_path, capsys):
    assert offline("a", "--packages", "two", "--max-characters", "5000") == 0
    facts = json.loads((tmp_path / "a" / "corpus.json").read_text())
    assert [p["package"] for p in facts["packages"]] == ["two"]
    assert 5000 <= facts["characters"] < 10_000
    capsys.readouterr()
    assert offline("a") == 0
    assert "already built" in capsys.readouterr().out
    assert offline("b", "--packages", "three") == 2
    assert capsys.readouterr().err.strip() == "build_corpus: three: not one of one, two"


def test_token_files(offline, tmp_path):
    np = pytest.importorskip("numpy")
    tokenizers = pytest.importorskip("tokenizers")
    model = tmp_path / "model"
    model.mkdir()
    vocabulary = {"<unk>": 0, "<end>": 1, "Paragraph": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert offline("a", "--tokenize", str(model)) == 0
    facts = json.loads((tmp_path / "a" / "corpus.json").read_text())
    for split, mine in facts["splits"].items():
        ids = np.load(tmp_path / "a" / f"{split}.u16.npy")
        assert ids.dtype == np.uint16
        assert len(ids) == mine["tokens"]
        assert (ids == 1).sum() == mine["documents"]
        assert ids[-1] == 1


def test_no_model_folder_is_one_line(offline, capsys):
    assert offline("a", "--tokenize", "nowhere") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_demo_pick_is_even_and_bounded():
    records = [{"id": f"{p}/{n}", "text": "x" * 1000} for p in "ab" for n in range(20)]
    picked = script.pick_demo(records, 10_500)
    assert [sum(r["id"][0] == p for r in picked) for p in "ab"] == [5, 5]
    assert picked == script.pick_demo(records[::-1], 10_500)


def test_notice_is_cut_from_the_copyright_file():
    text = "Files: *\nCopyright: D. Richard Hipp <x>\nLicense: public-domain\n\nFiles: debian/*\n"
    assert script.notice("sqlite3-doc", text).endswith("License: public-domain")
    text = (
        "Copyright: Portions Copyright (c) A\nLicense: PostgreSQL\n\nLicense: other\n Permission to"
        " use that.\n MODIFICATIONS.\n\nLicense: PostgreSQL\n Permission to use this.\n .\n NO"
        " MODIFICATIONS.\n\nLicense: last\n"
    )
    found = script.notice("postgresql-doc", text)
    assert found.splitlines()[-3:] == ["Permission to use this.", "", "NO MODIFICATIONS."]
    assert "that" not in found
    with pytest.raises(script.UserError, match="notice"):
        script.notice("sqlite3-doc", "something else")


def test_shipped_demo_text():
    folder = REPOSITORY / "recipes" / "data"
    seen: set[str] = set()
    for split, size in script.DEMO_SIZES.items():
        lines = (folder / f"demo-{split}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        total = sum(len(r["text"]) for r in records)
        assert 0.9 * size < total <= size
        assert all(list(r) == ["id", "text"] for r in records)
        assert all(2_000 <= len(r["text"]) <= 40_000 for r in records)
        assert not seen & {r["id"] for r in records}
        seen |= {r["id"] for r in records}
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(name.split("/")[0] in readme for name in seen)
