"""Text sources by specification string: what `--calibration` and `--text` read.

    notes.txt                   a text file, cut at paragraph ends into documents of at most 8,000 characters
    c4.jsonl                    an object a line: `text`, or instruction + input + output, or question + answer
    c4.jsonl#body               … or the field `body`
    c4.jsonl.gz, notes.txt.zst  the same, compressed
    c4.parquet                  a row a document, fields as above
    folder                      every such file below it, in sorted order
    hf:owner/name:config:split  a Hub data set, streamed; config may be left out, and split (then `train`)
    owner/name                  the same, when no local path has that name
    arrow:PATH#field            an Arrow data set folder or file; repeated texts are read once
    python:docs                 this Python's own language reference and docstrings: English prose, always there
    python:source               this Python's standard library, as code
    python                      both
    web, wiki, books, …         a domain: see `shallower.corpus.domains` (`domain:books` where a path has that name)
    self                        text sampled from the model itself, from its BOS or a random first token
    self:bos, self:token        … from the one or the other

`#field` may follow any source that has records. Files are read as they are needed, never as a whole.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import re
import sys
import sysconfig
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from functools import partial
from pathlib import Path
from typing import IO, Any

from shallower import progress
from shallower.corpus.domains import DOMAINS, resolve
from shallower.corpus.pieces import PIECE, pieces
from shallower.corpus.supply import NOTHING, START, Supply
from shallower.errors import CorpusError, OutputError, UnknownName, first_line, require_package

EXTENSIONS = (".txt", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
_JOINED_FIELDS = (
    ("text",),
    ("instruction", "input", "output"),
    ("question", "answer"),
    *((name,) for name in ("sentence", "ctx", "context", "goal")),
)
_AT_ONCE = 1_000  # rows of a parquet file
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")
_SPLITS = ("train", "validation", "test")
_KINDS = (
    f"a {', '.join(EXTENSIONS)} file (the first two also with {' or '.join(COMPRESSED)}), a folder of them, "
    f"hf:owner/name, arrow:PATH, python:docs, python:source, self, or a domain: {', '.join(DOMAINS)}"
)
# of the texts that `shallower eval` knows by name, the part that is trained on
_TRAINED_ON = {"c4": "web", "wikitext2": "hf:Salesforce/wikitext:wikitext-2-raw-v1:train"}
_TABLES = ("encodings", "pydoc_data")  # of the library's modules, those that are data and not code
_STANDALONE_STRING = re.compile(r'^[ \t]*[rR]?"""(.*?)"""', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Document:
    """One text. `source` is the file or data set it came from; `id` is unique within the specification's source.

    record: the row it was read from, where there are rows. whole: the file that it is of, where other documents repeat
    its text: all of them are held out, or none.
    """

    text: str
    id: str
    source: str
    record: Mapping[str, Any] | None = attribute(default=None, repr=False, compare=False)
    whole: str | None = None

    def line(self) -> str:
        """The row as it was, else id and text, as a line of a .jsonl file without its end."""
        row = dict(self.record or {"id": self.id, "text": self.text})
        # half a surrogate pair, which UTF-8 does not take, is written as JSON's escape (\ud800)
        return json.dumps(row, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Source:
    """Documents behind a specification. `read()` starts from the beginning each time, lazily.

    streamed: too long to be read to its end (a Hub data set). endless: in random order already (the model's own text).
    spec: names the same source on any day, where the text given depends on what can be reached.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    streamed: bool = False
    endless: bool = False
    spec: str | None = None


def open_source(text: str, supply: Supply = NOTHING) -> Source:
    """Find the source that `text` names (see the module's docstring); nothing is read yet but the file listing.

    supply: what later layers have: the model's own text, and texts fetched from the package index.

    Raises CorpusError when there is none. Reading raises CorpusError for files that are empty, not text, or lack the
    field.
    """
    # os.path: the name of a text may be longer than that of a file can be
    name, _, field_name = text.partition("#") if not os.path.exists(text) else (text, "", "")
    field = field_name or None
    if name in DOMAINS or name.startswith("domain:"):
        if not os.path.exists(name):
            found = resolve(name.removeprefix("domain:"), supply)
            found = f"{found.partition('#')[0]}#{field}" if field else found
            return replace(open_source(found, supply), spec=found)
        progress.note(f"{name} is read from the path of that name; write domain:{name} for the domain.")
    if name.split(":")[0] == "self":
        return _self(name, field, supply)
    if name.startswith("demo:"):
        return _demo(name, field, supply)
    if name.split(":")[0] == "python":
        return _python(name, field)
    if name.startswith("hf:"):
        return _hub(name.removeprefix("hf:"), field)
    if name.startswith("arrow:"):
        return _arrow(Path(os.path.expanduser(name.removeprefix("arrow:"))), field)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return _folder(path, field)
    if os.path.exists(path):
        return Source(path.name, partial(_read_file, path, path.name, field))
    if _HUB_NAME.fullmatch(name) and path.suffix not in (*EXTENSIONS, *COMPRESSED):
        return _hub(name, field)
    if name in _TRAINED_ON:
        raise UnknownName("text or domain", name, DOMAINS, meant=_TRAINED_ON[name])
    if name.partition(":")[0] == "auto":
        raise CorpusError(
            f"no text at {name!r}: there is no such file, and only 'shallower search' chooses texts (--calibration "
            "auto --for TEXT): name a text here, or search first and go on with its plan."
        )
    near = difflib.get_close_matches(name, DOMAINS, n=1)
    if near and "/" not in name and not path.suffix:
        raise UnknownName("text or domain", name, DOMAINS, f"Text is also {_KINDS.partition(', self')[0]}.")
    raise CorpusError(f"no text at {name!r}: there is no such file. Text is {_KINDS}.")


def place_of(text: str) -> Path:
    """What `text` names, to be compared with what others name: of a file or folder its real path, else its name as a
    path, such as `owner/name`. The field that is read makes no difference.
    """
    name = (text if os.path.exists(os.path.expanduser(text)) else text.partition("#")[0]).removeprefix("arrow:")
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Path(os.path.realpath(path))
    kind, colon, rest = name.partition(":")
    if kind == "python":  # docstrings stand in both of its texts
        return Path(kind)
    return Path(rest if colon and kind in ("hf", "domain") else name)


def path_named(text: str) -> Path:
    """The path that `text` names, if it names one."""
    # os.path: what is no path may be longer than a name can be
    return Path(os.path.expanduser(text if os.path.exists(text) else text.partition("#")[0].removeprefix("arrow:")))


def require_outside(text: str, written: Path) -> None:
    """Raise OutputError for a place in a folder of text: what is written there would be read as text, too."""
    place = path_named(text)
    if os.path.isdir(place) and written.resolve().is_relative_to(place.resolve()):
        raise OutputError(f"{written} is in {text}, where it would be read as text the next time: name another place.")


def _folder(path: Path, field: str | None) -> Source:
    files = text_files(path)
    if not files:
        hint = f" It has Arrow files: write arrow:{path}#FIELD." if any(path.glob("*.arrow")) else ""
        raise CorpusError(f"the folder {path} holds no {', '.join(EXTENSIONS)} file.{hint}")

    def read() -> Iterator[Document]:
        for file in files:
            fields = None if file_kind(file) == ".txt" else field
            yield from _read_file(file, file.relative_to(path).as_posix(), fields)

    return Source(path.name, read)


def text_files(folder: Path) -> list[Path]:
    """The files of text below a folder, in the order in which they are read; hidden ones are not."""
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and file_kind(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def file_kind(path: Path) -> str | None:
    """`.txt`, `.jsonl` or `.parquet`, compressed or not; None for a file that is not read."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in EXTENSIONS and not (suffix == ".parquet" != path.suffix) else None


def _read_file(path: Path, name: str, field: str | None) -> Iterator[Document]:
    kind = file_kind(path)
    if kind is None:
        raise CorpusError(
            f"{path} has the extension {path.suffix!r}; text files end in {', '.join(EXTENSIONS)}, the first two also "
            f"with {' or '.join(COMPRESSED)}: convert it."
        )
    rows: Iterable[tuple[str, Mapping[str, Any] | None]]
    if kind == ".txt":
        if field is not None:
            raise CorpusError(f"{path} is plain text and has no field {field!r}: leave #{field} out.")
        rows = ((text, None) for text in pieces((line for _, line in text_lines(path)), PIECE))
    else:
        records = json_records(path) if kind == ".jsonl" else _parquet_records(path)
        unit = "line" if kind == ".jsonl" else "row"
        rows = ((text_of_record(record, field, f"{path}, {unit} {number}"), record) for number, record in records)
    documents = (Document(text, f"{name}:{number}", name, record) for number, (text, record) in enumerate(rows))
    return _not_empty(documents, str(path))


def _parquet_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows of a parquet file, numbered from 1, some at a time; with all columns, as cleaned rows keep them."""
    require_package("pyarrow", "data", str(path))
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_AT_ONCE):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as parquet: {str(error).rstrip('.')}.") from None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return typing.cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix != ".zst":
        return path.open("rb")
    require_package("pyarrow", "data", str(path))
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd"))


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their ends, which become a plain newline, numbered from 1.

    Raises CorpusError when the file cannot be opened, has NUL bytes or is not UTF-8.
    """
    try:
        with _opened(path) as file:
            for number, raw in enumerate(file, 1):
                if b"\0" in raw:
                    raise CorpusError(f"{path} is not text: line {number} has a NUL byte. Text must be UTF-8.")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line[:-2] + "\n" if line.endswith("\r\n") else line
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CorpusError(
            f"{path} is not text: line {number} has the byte 0x{byte:02x}, which is not UTF-8. Convert it with iconv."
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def json_records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Objects of a .jsonl file with their lines, numbered from 1; empty lines are passed over.

    Raises CorpusError for a line that is not a JSON object, and as `text_lines` does.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(
                f"{path}, line {number} is not JSON ({error.msg}): a .jsonl file has one JSON object a line."
            ) from None
        except (ValueError, RecursionError) as error:
            what = "is nested too deeply" if isinstance(error, RecursionError) else "has a number of too many digits"
            raise CorpusError(f"{path}, line {number} {what} to be read: change the line, or leave it out.") from None
        if not isinstance(record, dict):
            raise CorpusError(
                f'{path}, line {number} is {_shown(line)}, not a JSON object: write {{"text": …}} on each line.'
            )
        yield number, record


def name_digest(text: str) -> bytes:
    """SHA-256 of what names a document: the name of a file may hold bytes that are no UTF-8."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair: JSON can hold one, which no tokenizer takes."""
    return text.encode(errors="replace").decode()


def text_of_record(record: Mapping[str, Any], field: str | None, where: str) -> str:
    """What a row says: the field, or those that the module's docstring names.

    Raises CorpusError, which names the row by `where`, when there are none of these, or they are not text.
    """
    if field is None and isinstance(record.get("messages"), list) and "text" not in record:
        said = (turn.get("content") for turn in record["messages"] if isinstance(turn, dict))
        # a call of a tool says nothing, and content in parts may be pictures
        return encodable("\n\n".join(content for content in said if isinstance(content, str)))
    if field is None:
        fields = next((names for names in _JOINED_FIELDS if names[0] in record), ())
        if not fields:
            raise CorpusError(
                f"{where} has no field text, instruction or question, only {', '.join(record)}: name one after the "
                "path, #FIELD."
            )
    elif field in record:
        fields = (field,)
    else:
        near = difflib.get_close_matches(field, record, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise CorpusError(f"{where} has no field {field!r}, only {', '.join(record)}{hint}")
    # a question that is answered by true or false says nothing as text
    values = {name: record.get(name) for name in fields if not isinstance(record.get(name), (bool, type(None)))}
    for name, value in values.items():
        if not isinstance(value, str):
            raise CorpusError(f"{where}: field {name!r} holds {_shown(json.dumps(value, default=str))}, not text.")
    text = "\n\n".join(filter(None, values.values()))
    return encodable(text)


def _hub(name: str, field: str | None) -> Source:
    repository, *rest = name.split(":")
    if "/" not in repository or len(rest) > 2:
        raise CorpusError(
            f"{name!r} is not a Hub data set: write hf:owner/name, hf:owner/name:split or hf:owner/name:config:split."
        )
    split = rest.pop() if rest and (len(rest) == 2 or rest[-1].split("[")[0] in _SPLITS) else "train"
    config = rest[0] if rest else None
    full = ":".join(["hf", repository, *([config] if config else []), split])

    def read() -> Iterator[Document]:
        require_package("datasets", "data", full)
        from datasets import load_dataset

        number = -1
        try:
            for number, record in enumerate(load_dataset(repository, name=config, split=split, streaming=True)):
                yield Document(text_of_record(record, field, f"{full}, row {number}"), f"{full}:{number}", full, record)
        except CorpusError:
            raise
        # whatever the network, the Hub client or a format's reader raises, the user needs the same sentence
        except Exception as error:
            raise CorpusError(
                f"{full} cannot be read from the Hub: {first_line(error)} Check the name (a local path must "
                "exist), the connection and `hf auth login`; python:docs is text that needs no network."
            ) from error
        if number < 0:
            raise CorpusError(f"{full} is empty.")

    return Source(full, read, streamed=True)


def _arrow(path: Path, field: str | None) -> Source:
    files = sorted(path.glob("*.arrow")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise CorpusError(f"no Arrow data at {str(path)!r}: name a .arrow file or a folder that holds one.")

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        require_package("pyarrow", "data", str(path))
        import pyarrow

        seen: set[bytes] = set()  # digests, as the texts themselves could be more than memory holds
        for file in files:
            try:
                with pyarrow.memory_map(str(file)) as mapped:
                    records = (row for batch in pyarrow.ipc.open_stream(mapped) for row in batch.to_pylist())
                    for number, record in enumerate(records):
                        text = text_of_record(record, field, f"{file}, row {number}")
                        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
                        if digest not in seen:
                            seen.add(digest)
                            yield text, record
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise CorpusError(f"{file} cannot be read as an Arrow stream: {error}.") from None

    name = "/".join(path.parts[-3:])  # as in boolq/none/validation

    def read() -> Iterator[Document]:
        documents = (Document(text, f"{name}:{number}", name, record) for number, (text, record) in enumerate(rows()))
        return _not_empty(documents, str(path))

    return Source(name, read)


def _demo(name: str, field: str | None, supply: Supply) -> Source:
    """A text of the package index, which a later layer fetches."""
    text = name.removeprefix("demo:")
    if text not in supply.texts:
        raise UnknownName("demo text", text, supply.texts, "The command line and the verbs know wiki and science.")

    def read() -> Iterator[Document]:
        path = supply.texts[text]()
        return _read_file(path, name, field)

    return Source(name, read)


def _self(name: str, field: str | None, supply: Supply) -> Source:
    """The model's own text."""
    start = name.partition(":")[2] or "auto"
    if start not in START or field is not None:
        known = ", ".join("self" if word == "auto" else f"self:{word}" for word in START)
        raise CorpusError(f"{name + ('#' + field if field else '')!r} is not a source: write {known}.")
    sample = supply.sample
    if sample is None:
        raise CorpusError(
            f"{name} is text sampled from the model itself, and there is no model here: use it for --calibration of a "
            "model, or with `shallower corpus build`."
        )

    def read() -> Iterator[Document]:
        for number, text in enumerate(sample(start, tokens=supply.tokens, seed=supply.seed)):
            yield Document(text, f"{name}:{number}", name)

    return Source(name, read, streamed=True, endless=True)


def _python(name: str, field: str | None) -> Source:
    kinds: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
        "python:docs": _python_docs,
        "python:source": _python_source,
    }
    if name not in ("python", *kinds) or field is not None:
        known = ", ".join(("python", *kinds))
        raise CorpusError(f"{name + ('#' + field if field else '')!r} is not a source: write {known}.")
    label = f"{name} {platform.python_version()}"

    def read() -> Iterator[Document]:
        for kind in tuple(kinds) if name == "python" else (name,):
            for key, text in kinds[kind]():
                for number, piece in enumerate(pieces(text.splitlines(keepends=True), PIECE)):
                    # docstrings stand in the source, too: one may not be held out and the other read
                    yield Document(piece, f"{kind}:{key}:{number}", label, whole=key)

    return Source(label, read)


def _python_docs() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics

        yield from sorted(topics.items())
    except ImportError:  # some distributions leave the reference out; the docstrings remain
        pass
    for key, source in _python_source():
        # by pattern: parsing the whole library takes six seconds, and a string alone on its line is a docstring
        strings = [inspect.cleandoc(match[1]) for match in _STANDALONE_STRING.finditer(source)]
        if strings:
            yield key, "\n\n".join(strings)


def _python_source() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        if module.startswith("_") or module in _TABLES:
            continue
        files = sorted((library / module).glob("*.py")) if (library / module).is_dir() else [library / f"{module}.py"]
        for file in filter(Path.is_file, files):
            yield file.relative_to(library).as_posix(), file.read_bytes().decode("utf-8", errors="replace")


def _not_empty(documents: Iterator[Document], where: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        empty = empty and not document.text.strip()
        yield document
    if empty:
        raise CorpusError(f"{where} is empty: it holds no text.")


def _shown(text: str, limit: int = 40) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "…"
