"""Check a data set: kinds of errors and warnings (`KINDS`), the rules that detect them, missing and broken pictures.

`scan` finds all of them for `python -m milora_data check`; `TrainingCheck` finds what would stop a training, while the
records pass that it keeps; `read_training_records` reads them.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from milora_data.encode.templates import images_first, split_turns
from milora_data.formats.jsonfile import require_json
from milora_data.formats.stored import is_stored
from milora_data.keys import FileKeys, answered, digest, file_key, record_key
from milora_data.pictures.load import ImageError, ImagePolicy, Picture, described, load_image
from milora_data.pictures.videos import require_pyav, require_whole_video
from milora_data.records.record import IMAGE, CompactRecords, Record
from milora_data.stream import Source, load_records, mixed_records, record_items
from milora_vl.common.cli.console import amount, command_line
from milora_vl.common.cli.web import url_problem, web_address
from milora_vl.common.errors import DataError, Problem, UserError, no_folder, no_records, with_context

Severity = Literal["error", "warning"]


class FindingKind(NamedTuple):
    """One kind of finding. A record with an error cannot be used for training; a warning may be intended."""

    severity: Severity
    title: str


KINDS: Mapping[str, FindingKind] = {
    "broken_json": FindingKind("error", "broken JSON"),
    "not_a_record": FindingKind("error", "not a record of LLaVA's format"),
    "turn_order": FindingKind("error", "questions and answers do not alternate"),
    "no_answer": FindingKind("error", "no supervised tokens: no answer to a question"),
    "placeholders": FindingKind("error", f"the number of {IMAGE} is not that of pictures (a rule of every model)"),
    "missing_picture": FindingKind("error", "missing picture or video"),
    "corrupt_picture": FindingKind("error", "picture that cannot be read"),
    "corrupt_video": FindingKind("error", "video that cannot be read"),
    "broken_text": FindingKind("error", "text that is not valid Unicode (half of a surrogate pair)"),
    "embedded_picture": FindingKind("warning", "picture embedded as base64, which a training keeps in memory"),
    "tiny_picture": FindingKind("warning", "picture of less than 8 pixels on a side"),
    "duplicate": FindingKind("warning", "record that repeats an earlier one"),
    "contradiction": FindingKind(
        "warning", "another answer to the question of an earlier record; captions may have several"
    ),
    "leaked": FindingKind("warning", "the picture, video or whole question of a test record is in the data, or may be"),
    "repeated_id": FindingKind("warning", "different records with one id"),
    "empty_answer": FindingKind("warning", "empty answer: the model learns to answer nothing"),
    "empty_question": FindingKind("warning", "empty question"),
    "answer_first": FindingKind("warning", "starts with an answer, which is dropped"),
    "unanswered": FindingKind("warning", "ends with a question, which has no effect on training"),
    "special_token": FindingKind("warning", "text contains a special token, which is encoded as such"),
    "unread_key": FindingKind("warning", "key of a turn that is not read"),
}
# Special tokens of Llama, Vicuna, Qwen, SmolLM and GPT-2; a tokenizer has only some of them.
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>")
SMALLEST = 8  # pixels of a side, below which a picture shows nothing
OUTSIDE = " (outside the image folder)"
WEB = " (a web address: download the picture, and name the file)"
_BROKEN_TEXT = re.compile("[\ud800-\udfff]")
# Kinds whose messages are complete without the title.
_SENTENCES = ("broken_json", "not_a_record", "turn_order", "placeholders")
_STORED_AT_ONCE = 256  # pictures of shards and tables that are kept until they are decoded together
KEY_BYTES = 4  # of the key of each record and picture, by which a resumed run names the first that differs
_RecordsOf: TypeAlias = dict[Picture, list[tuple[str, str]]]  # picture or video -> place and id of each record with it


@dataclass(frozen=True, slots=True)
class Finding:
    """One error or warning: a key of `KINDS`, the place ("file:line"), the details, and the id of the record."""

    kind: str
    where: str
    message: str
    id: str = ""  # of the record

    def __post_init__(self) -> None:
        # Findings are printed: remove half surrogate pairs, which a terminal cannot print, and shorten long texts.
        text = self.message.encode("utf-8", "replace").decode()
        object.__setattr__(self, "message", text if len(text) <= 300 else text[:300] + " ...")

    @property
    def place(self) -> str:
        return f"{self.where} (id {self.id})" if self.id else self.where

    @property
    def sentence(self) -> str:
        """Return the message with the title of its kind, if the message is incomplete without it."""
        return self.message if self.kind in _SENTENCES else f"{KINDS[self.kind].title}: {self.message}"

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity


@dataclass(slots=True)
class Report:
    path: str
    image_folder: str
    records: int = 0
    with_pictures: int = 0
    with_videos: int = 0
    picture_files: int = 0  # and video files
    findings: list[Finding] = field(default_factory=list)
    num_missing: int = 0  # picture names without a file

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return the findings of each kind that occurs, errors first."""
        groups: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
        for finding in self.findings:
            groups[finding.kind].append(finding)
        return {kind: findings for kind, findings in groups.items() if findings}


def examine(record: Record) -> Iterator[Finding]:
    """Yield the errors and warnings of the record itself; its pictures are not checked."""

    def finding(kind: str, message: str) -> Finding:
        return Finding(kind, record.source, message, record.id)

    try:
        exchange = split_turns(record.turns)[1]
    except DataError as error:
        yield finding("turn_order", error.first.message)
        return
    try:
        images_first(record.turns, len(record.images))
    except DataError as error:
        yield finding("placeholders", error.first.message)
    if record.unread:
        yield finding("unread_key", ", ".join(sorted(set(record.unread))))
    if not any(turn.weight for turn in exchange if turn.role == "assistant"):
        yield finding("no_answer", f"{amount(len(record.turns), 'turn')}, no answer to train")
    elif exchange[-1].role != "assistant":
        yield finding("unanswered", exchange[-1].text)
    if len(exchange) < sum(turn.role not in ("system", "tools") for turn in record.turns):
        yield finding("answer_first", next(turn.text for turn in record.turns if turn.role == "assistant"))
    for number, turn in enumerate(record.turns, start=1):
        where = f"turn {number}"
        if turn.is_blank and turn.role == "assistant":
            yield finding("empty_answer", where)
        elif turn.is_blank and turn.role == "user" and IMAGE not in turn.text:
            yield finding("empty_question", where)
        if _BROKEN_TEXT.search(turn.text):
            yield finding("broken_text", where)
        if specials := [token for token in SPECIAL_TOKENS if token in turn.text]:
            yield finding("special_token", f"{where}: {', '.join(specials)}")


def errors_of(record: Record) -> list[Finding]:
    return [finding for finding in examine(record) if finding.severity == "error"]


def scan(path: Path, folder: Path) -> Report:
    """Return a report on all records of `path` and their pictures below `folder`. Raises `DataError` without a file."""
    report = Report(str(path), str(folder))
    used: _RecordsOf = {}
    stored: _RecordsOf = {}
    videos: set[Picture] = set()
    contents: dict[str, dict[str, str]] = {}  # file -> id -> the key of its first record
    places: dict[str, str] = {}  # the key of a record -> its first place
    answers: dict[str, tuple[str, str]] = {}  # the key of a question -> its first answer and its place
    key_of = FileKeys(folder)
    for record in readable(path, report):
        report.records += 1
        report.with_pictures += bool(record.images)
        report.with_videos += bool(record.videos)
        report.findings += examine(record)
        videos.update(record.video_files)
        if not is_stored(path) and (embedded := next(filter(None, (file.content for file in record.files)), None)):
            size = f"{len(embedded):,} bytes"
            report.findings.append(Finding("embedded_picture", record.source, size, record.id))
        key, of_file = record_key(record, key_of), contents.setdefault(record.source.rpartition(":")[0], {})
        if record.id and of_file.setdefault(record.id, key) != key:
            report.findings.append(Finding("repeated_id", record.source, "an earlier record has this id", record.id))
        if (earlier := places.setdefault(key, record.source)) != record.source:
            report.findings.append(Finding("duplicate", record.source, f"equals {earlier}", record.id))
        for question, answer in answered(record, key_of):
            other, place = answers.setdefault(question, (answer, record.source))
            if answer != other:
                message = f'"{answer}", but "{other}" in {place}'
                report.findings.append(Finding("contradiction", record.source, message, record.id))
        for file in record.files:
            of_kind = used if file.content is None else stored
            of_kind.setdefault(file, []).append((record.source, record.id))
        if len(stored) >= _STORED_AT_ONCE:  # their contents are in memory
            _scan_pictures(stored, folder, videos, report)
            stored = {}
    for names in (stored, used):
        _scan_pictures(names, folder, videos, report)
    return report


def readable(source: str | Path, report: Report) -> Iterator[Record]:
    """Yield the records and add a finding to `report` for each other value. Raises `DataError` for a missing file."""
    if not is_stored(source):
        require_json(Path(source))
    for item in record_items(source):
        if isinstance(item, Record):
            yield item
            continue
        kind = "corrupt_picture" if isinstance(item, ImageError) else "not_a_record"
        kind = "broken_json" if item.first.code in ("json-syntax", "data-not-utf8") else kind
        report.records += kind != "broken_json"
        message = "\n".join(filter(None, (item.first.message, item.first.hint)))
        report.findings.append(Finding(kind, str(item.first.where), message))


def _scan_pictures(used: _RecordsOf, folder: Path, videos: Collection[Picture], report: Report) -> None:
    def add(kind: str, file: Picture, message: str) -> None:
        report.findings += [Finding(kind, where, message, identifier) for where, identifier in used[file]]

    report.picture_files += len(used)
    missing = find_missing(used, folder)
    for file in missing:
        path = file.within(folder).path
        if _num_bytes(file, folder) == 0:
            add("corrupt_video" if file in videos else "corrupt_picture", file, f"{file}: the file is empty")
            continue
        shown, why = str(file), OUTSIDE if path is None else _cause(path)
        if web_address(file.name) is not None:
            shown, why = described(file.name), WEB
        report.num_missing += 1
        add("missing_picture", file, shown + why)
    gone = set(missing)
    for file, kind, message in _find_faults([file for file in used if file not in gone], folder, videos):
        add(kind, file, f"{file}: {message}")


def find_missing(files: Iterable[Picture], folder: Path) -> list[Picture]:
    return [file for file in files if not _num_bytes(file, folder)]


def _num_bytes(file: Picture, folder: Path) -> int | None:
    """Return the size of a picture or video in bytes; None if there is no file."""
    if file.content is not None:
        return len(file.content)
    path = file.within(folder).path
    try:
        status = None if path is None else path.stat()
    except (OSError, ValueError):  # for example, a name that is too long for the file system
        return None
    return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None


def _cause(path: Path) -> str:
    """Return why there is no file at `path`, behind its name: a broken link, or another case; "" if neither."""
    try:
        if path.is_symlink():
            return f": a broken link to {path.readlink()}"
        near = _names_in(path.parent).get(path.name.lower())
    except (OSError, ValueError):  # no such folder, or a name that is too long for the file system
        return ""
    return f": the folder has {near}, in another case" if near else ""


@lru_cache(maxsize=64)
def _names_in(folder: Path) -> dict[str, str]:
    return {file.name.lower(): file.name for file in folder.iterdir()}


def _find_faults(
    files: Sequence[Picture], folder: Path, videos: Collection[Picture]
) -> Iterator[tuple[Picture, str, str]]:
    """Yield (file, kind of finding, details) of each bad picture or video; shows a progress bar on a terminal."""
    from tqdm import tqdm

    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda file: _fault(file.within(folder), file in videos), files)
        bar = tqdm(results, "pictures", len(files), disable=None, leave=False)
        yield from ((file, *fault) for file, fault in zip(files, bar, strict=True) if fault)


def _fault(path: Picture, is_video: bool) -> tuple[str, str] | None:
    try:
        if is_video:
            require_whole_video(path)
        elif min(size := load_image(path).size) < SMALLEST:
            return "tiny_picture", f"{size[0]} x {size[1]} pixels"
    except ImageError as error:
        details = "\n".join(filter(None, (error.reason, error.first.hint)))
        return "corrupt_video" if is_video else "corrupt_picture", details
    return None


class MissingImages(DataError):
    """Records name pictures that are missing or empty; `used` maps each picture to the first record that names it."""

    def __init__(self, missing: Sequence[Picture], used: Mapping[Picture, str], folder: Path) -> None:
        shown = [described(file.name) if web_address(file.name) else str(file) for file in missing[:5]]
        is_here = str(folder) == "."
        empty = sum(_num_bytes(file, folder) == 0 for file in missing)
        state = "missing or empty" if empty else "missing"
        more = ", ..." if len(missing) > 5 else ""
        searched = "in the current folder" if is_here else f"in {folder}"
        hints = ["name their folder:  --image_folder FOLDER"] if is_here else []
        if empty:
            hints.append(f"{amount(empty, 'empty file')} (0 bytes): copy or download again")
        if (other := _elsewhere(missing, folder)) is not None:
            hints.append(f"files with these names exist in another folder: --image_folder {other}")
        if addresses := sum(web_address(file.name) is not None for file in missing):
            hints.append(f"{addresses:,} at a web address: download the pictures, and name the files")
        if outside := sum(file.within(folder).path is None for file in missing):
            hints.append(f"{outside:,} lead out of that folder and are never read; absolute paths: --image_folder /")
        hints.append("skip their records: --bad_images skip")
        super().__init__(
            f"{len(missing):,} of {len(used):,} pictures are {state} {searched}: {', '.join(shown)}{more}",
            code="data-missing-pictures",
            where=used[missing[0]],
            hint="\n".join(hints),
        )


def _elsewhere(missing: Sequence[Picture], folder: Path) -> Path | None:
    """Return a folder near `folder` that contains one of the first missing pictures, or None."""
    near = (folder.parent, folder / "images")
    return next((other for other in near if any(_num_bytes(file, other) for file in missing[:5])), None)


def files_of(record: Record) -> list[Picture]:
    """Return the pictures and videos of a record that are files."""
    return [file for file in record.files if not file.content]


class TrainingCheck:
    """What a training has to know about all of its records, collected while they pass: there may be millions."""

    def __init__(self) -> None:
        self.with_images = bytearray()  # 1 for each record with an image, 0 for each other
        self.num_with_videos = 0
        self.unread = Counter[str]()  # keys of turns that are not read
        self.unlearnable: list[int] = []  # the indices of records without an answer; the collator skips them
        self.keys = bytearray()  # KEY_BYTES of each record: of its texts and its stored pictures
        self._errors: list[Finding] = []
        self._used: dict[Picture, str] = {}  # picture or video in a file -> the first record with it
        self._reads_video_files = False

    def add(self, record: Record) -> Record:
        errors = errors_of(record)
        if any(finding.kind == "no_answer" for finding in errors):
            self.unlearnable.append(len(self.with_images))
        self._errors += [finding for finding in errors if finding.kind != "no_answer"]
        self.with_images.append(bool(record.images))
        self.num_with_videos += bool(record.videos)
        self.unread.update(record.unread)
        self._reads_video_files = self._reads_video_files or bool(record.video_files)
        key = record_key(record, lambda file: "" if file.content is None else file_key(file))
        self.keys += bytes.fromhex(key)[:KEY_BYTES]
        for file in files_of(record):
            self._used.setdefault(file, record.source)
        return record

    def without(self, kept: Iterable[Record]) -> TrainingCheck:
        """Return the check of some of the records."""
        check = TrainingCheck()
        for record in kept:
            check.add(record)
        return check

    def finish(self, image_folder: str | Path | None, bad_images: ImagePolicy) -> set[Picture]:
        """Return the pictures that are missing or empty.

        Raises `DataError` with the count, the first cases and a hint if there are no records, if turns are out of
        order, or if the number of `<image>` differs from the number of pictures, and `MissingImages` for missing
        pictures if `bad_images` is `raise`. No picture is decoded.
        """
        folder = Path(image_folder or "")
        if not folder.is_dir():
            raise DataError(problems=[no_image_folder(folder)])
        if self._reads_video_files:
            require_pyav()
        if not self.with_images:
            raise DataError(problems=[no_records("the data")])
        if self._errors:
            raise _broken(self._errors)
        missing = find_missing(self._used, folder)
        if missing and bad_images == "raise":
            raise MissingImages(missing, self._used, folder)
        return set(missing)


def picture_files(records: Iterable[Record]) -> list[Picture]:
    """Return the pictures and videos of the records that are files, each once, in the order of first use."""
    return list(dict.fromkeys(chain.from_iterable(map(files_of, records))))


def _picture_keys(records: Iterable[Record], folder: Path) -> bytes:
    """Return KEY_BYTES of each of the `picture_files`, of its whole content."""
    keys = (digest(file_key(file.within(folder))) for file in picture_files(records))
    return b"".join(bytes.fromhex(key)[:KEY_BYTES] for key in keys)


@dataclass(frozen=True)
class RunData:
    train: Sequence[Record]
    evaluation: Sequence[Record] | None
    skipped: int = 0  # an image is missing, with --bad_images skip
    unlearnable: int = 0  # they have no answers
    broken: tuple[Finding, ...] = ()  # invalid records, if --bad_images is not raise
    streamed: bool = False  # `train` holds the first records of a stream
    keys: bytes = b""  # of each record of `train`: of its texts and its stored pictures (`TrainingCheck.keys`)
    evaluation_keys: bytes = b""  # of each record of `evaluation`
    folder: Path = Path()  # of the picture files
    with_images: bytes = b""  # 1 for each record of `train` with an image, 0 for each other
    num_with_videos: int = 0  # of `train`
    unread: Mapping[str, int] = field(default_factory=dict)  # keys of turns that are not read

    @cached_property
    def picture_keys(self) -> bytes:
        """The keys of the picture files of `train`, which are read whole when this is first used."""
        return _picture_keys(self.train, self.folder)

    @cached_property
    def held_out_keys(self) -> bytes:
        """The keys of the records of `evaluation`, then of its picture files."""
        return self.evaluation_keys + _picture_keys(self.evaluation or (), self.folder)

    @property
    def fingerprint(self) -> str:
        """Return the key of the records in their order."""
        return digest(self.keys.hex())

    @property
    def pictures(self) -> str:
        """Return the key of the picture files in their order, "" without any."""
        return digest(self.picture_keys.hex()) if self.picture_keys else ""

    def describe(self) -> str:
        if self.streamed:
            return f"a stream; the first {len(self.train):,} records were checked"
        kinds = (("images", sum(self.with_images)), ("videos", self.num_with_videos))
        shown = ", ".join(f"{number:,} with {what}" for what, number in kinds if number)
        return f"{amount(len(self.train), 'record')}, {shown or 'text only'}"

    def warnings(self) -> list[str]:
        messages = []
        if self.skipped:
            messages.append(f"{amount(self.skipped, 'record')} skipped: images missing or empty (--bad_images skip)")
        messages += [f"{finding.where}: {finding.sentence}" for finding in self.broken[:5]]
        if self.broken:
            messages.append(f"{amount(len(self.broken), 'broken record')} skipped (python -m milora_data check)")
        if self.unlearnable:
            messages.append(f"{amount(self.unlearnable, 'record')} without an answer skipped")
        messages += [f'"{key}" of {amount(count, "turn")} is not read' for key, count in self.unread.items()]
        return messages

    def counts(self) -> dict[str, int]:
        """Return the counts for environment.json; the length of a stream is unknown."""
        known = {} if self.streamed else {"train": len(self.train)}
        skipped = self.skipped + self.unlearnable + len(self.broken)
        return {**known, "eval": len(self.evaluation or ()), "skipped": skipped}


def read_training_records(
    path: str | list[Source],
    *,
    eval_path: str | None = None,
    image_folder: str | None = None,
    bad_images: ImagePolicy = "raise",
    limit: int | None = None,
    stream: Iterable[Record | UserError] | None = None,
) -> RunData:
    """Return all records of `path`, or those of `stream`, the first items of an endless stream of them.

    Raises UserError for data with which a training would fail.
    """
    read = partial(_load_checked, image_folder=image_folder, bad_images=bad_images, limit=limit)
    held_out = None if eval_path is None else read(eval_path)  # it is small: first
    train = read(path) if stream is None else replace(read(path, _once(stream, bad_images)), streamed=True)
    if held_out is None:
        return train
    return replace(
        train,
        evaluation=held_out.train,
        evaluation_keys=held_out.keys,
        skipped=train.skipped + held_out.skipped,
        unlearnable=train.unlearnable + held_out.unlearnable,
        broken=train.broken + held_out.broken,
    )


def source_text(path: str | list[Source] | None) -> str:
    return ", ".join(f"{each.weight:g} x {each.path}" for each in path) if isinstance(path, list) else str(path)


def _once(stream: Iterable[Record | UserError], bad_images: ImagePolicy) -> Iterator[Record]:
    """Yield the records of a stream, which repeats them if they are few. Raises the first error if it is to be told."""
    seen = set()
    for item in stream:
        if isinstance(item, Record) and (content := (item.turns, item.images, item.videos)) not in seen:
            seen.add(content)
            yield item
        elif isinstance(item, DataError) and bad_images == "raise":
            raise item


def sources_of(path: str | list[Source]) -> list[Source]:
    return [Source(path=path)] if isinstance(path, str) else path


def _load_checked(
    path: str | list[Source],
    stream: Iterator[Record] | None = None,
    *,
    image_folder: str | None,
    bad_images: ImagePolicy,
    limit: int | None,
) -> RunData:
    report = Report(str(path), str(image_folder))
    reader = load_records if bad_images == "raise" else partial(readable, report=report)
    name, stream = source_text(path), stream or mixed_records(sources_of(path), reader)
    if bad_images != "raise":
        stream = _usable(stream, report)
    check = TrainingCheck()
    try:
        records = CompactRecords(map(check.add, islice(stream, limit)))
    except DataError as error:
        if error.first.hint or not Path(name).is_file():
            raise
        hint = f"see: python -m milora_data check {name}; --fix OUT writes a file without such records"
        raise with_context(error, hint=hint) from None
    if not records:
        raise UserError(problems=[_none_left(name, report)])
    missing = check.finish(image_folder, bad_images)
    missing = missing if bad_images == "skip" else set()
    kept, skipped = records, 0
    if missing or check.unlearnable:
        complete = [index for index, record in enumerate(records) if missing.isdisjoint(record.files)]
        skipped = len(records) - len(complete)
        unlearnable = set(check.unlearnable)
        kept = records.only(index for index in complete if index not in unlearnable)
        check = check.without(kept)
    if not kept:
        raise UserError(problems=[_none_left(name, report, missing_picture=skipped, no_answer=len(records) - skipped)])
    return RunData(
        kept,
        None,
        skipped,
        unlearnable=len(records) - skipped - len(kept),
        broken=tuple(report.findings),
        keys=bytes(check.keys),
        folder=Path(image_folder or ""),
        with_images=bytes(check.with_images),
        num_with_videos=check.num_with_videos,
        unread=check.unread,
    )


def _none_left(path: str, report: Report, **others: int) -> Problem:
    """Return the problem of data without usable records; `others` counts those that the report does not have."""
    reasons = Counter(finding.kind for finding in report.findings) + Counter(others)
    if not reasons:
        return no_records(path)
    counts = "; ".join(f"{amount(number, 'record')}: {KINDS[kind].title}" for kind, number in reasons.items())
    hint = f"see: {command_line('milora_data', 'check', path)}"
    return Problem(f"every record is left out: {counts}", "data-all-records-left-out", path, hint)


def _usable(records: Iterable[Record], report: Report) -> Iterator[Record]:
    """Yield the records that can be encoded; add the problem of every other record to `report`."""
    for record in records:
        errors = errors_of(record)
        if all(finding.kind == "no_answer" for finding in errors):
            yield record
        else:
            report.findings.append(errors[0])


def image_folder(data: Path, option: Path | None) -> Path:
    """Return the folder that picture names are relative to.

    It is the value of the option, else the folder of the data file or its subfolder `images`, whichever contains the
    first picture. Raises `UserError` if the folder does not exist.
    """
    if option is not None:
        if not option.is_dir():
            raise UserError(problems=[no_image_folder(option)])
        return option
    try:
        first = next((record.files[0] for record in load_records(data) if record.files), None)
    except DataError:
        return data.parent  # the command itself reports the error
    folders = (data.parent, data.parent / "images")
    return next((folder for folder in folders if first and _num_bytes(first, folder) is not None), data.parent)


def no_image_folder(folder: Path) -> Problem:
    address = url_problem(folder)
    if address is not None:
        return replace(address, where="--image_folder")
    return no_folder(folder, "--image_folder", "image folder")


def _broken(findings: Sequence[Finding]) -> DataError:
    lines = [f"{finding.place}: {finding.sentence}" for finding in findings[:5]]
    more = [f"... and {len(findings) - 5:,} more"] if len(findings) > 5 else []
    path = findings[0].where.rpartition(":")[0] or "DATA"
    return DataError(
        "\n".join([amount(len(findings), "broken record"), *lines, *more]),
        code="data-broken-records",
        hint=f"see: python -m milora_data check {path}; --fix OUT writes a file without them, or with what is repaired",
    )
