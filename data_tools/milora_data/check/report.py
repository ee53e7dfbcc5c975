"""The result of `milora_data check`, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from milora_data.check.findings import KINDS, Finding
from milora_vl.cli.command_line import amount


@dataclass(slots=True)
class Report:
    """Counts and findings of a scan."""

    path: str
    image_folder: str
    records: int = 0
    with_pictures: int = 0
    picture_files: int = 0
    findings: list[Finding] = field(default_factory=list)
    num_missing: int = 0  # picture names without a file
    num_never_read: int = 0  # of these, names outside the image folder and web addresses
    has_embedded: bool = False  # records of a JSON file have pictures in base64

    def count(self, severity: str) -> int:
        """Return the number of findings with a severity, `error` or `warning`."""
        return sum(finding.severity == severity for finding in self.findings)

    def by_kind(self) -> dict[str, list[Finding]]:
        """Return the findings of each kind that occurs, errors first."""
        return {
            kind: findings
            for kind in KINDS
            if (findings := [finding for finding in self.findings if finding.kind == kind])
        }


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    content: dict[str, Any] = {
        "path": report.path,
        "image_folder": report.image_folder,
        "records": report.records,
        "with_pictures": report.with_pictures,
        "picture_files": report.picture_files,
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "kinds": Counter(finding.kind for finding in report.findings),
        "findings": [{"severity": finding.severity, **asdict(finding)} for finding in report.findings],
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def as_text(report: Report, limit: int) -> str:
    """Return the report as text: counts, then each kind of finding with its first cases."""
    files = amount(report.picture_files, "file")
    pictures = f"{report.with_pictures:,} with pictures ({files}, looked for in {report.image_folder})"
    lines = [f"{report.path}: {amount(report.records, 'record')}, {pictures if report.with_pictures else 'text only'}"]
    for kind, findings in report.by_kind().items():
        severity, title = KINDS[kind]
        lines += ["", f"{severity:<8} {len(findings):>7,}  {title}"]
        lines += [f"    {finding.where}: {finding.message}".replace("\n", "\n    ") for finding in findings[:limit]]
        if len(findings) > limit:
            lines.append(f"    ... and {len(findings) - limit:,} more (--limit {len(findings)} shows all)")
    counts = ", ".join(amount(report.count(severity), severity) for severity in ("error", "warning"))
    return "\n".join([*lines, "", counts if lines[1:] else "no errors or warnings", ""])
