"""What was found wrong with the data, by name, and what was done about it."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Literal

SHOWN = 20
WIDEST = 100
Kind = Literal["refused", "fixed", "noticed"]


@dataclass(frozen=True)
class Finding:
    """One problem of one file or row."""

    source: str
    """File, row or example, as the user knows it."""
    problem: str
    """What is wrong, in a few words; equal problems share their words up to a bracket."""
    action: str
    """What was done; of what was refused, what to do."""
    kind: Kind
    """refused: left out. fixed: used after a change. noticed: used as it is."""

    def of(self, source: str) -> "Finding":
        """The same of a file or row: what looks at bytes does not know where they come from."""
        return replace(self, source=source)


def refused(problem: str, action: str) -> Finding:
    """Something that is left out, and what to do about it; its source is filled in by ``of``."""
    return Finding("", problem, action, "refused")


def fixed(problem: str, action: str) -> Finding:
    """Something that is used after a change, likewise."""
    return Finding("", problem, action, "fixed")


def noticed(problem: str, action: str) -> Finding:
    """Something that is used as it is, likewise."""
    return Finding("", problem, action, "noticed")


def as_csv(findings: Sequence[Finding]) -> bytes:
    """All of them, for a spreadsheet."""
    text = io.StringIO()
    csv.writer(text).writerows([("file", "kind", "problem", "what was done")])
    csv.writer(text).writerows(
        (finding.source, finding.kind, finding.problem, _done(finding)) for finding in findings
    )
    # With the mark, without which a spreadsheet takes it for another encoding.
    return text.getvalue().encode("utf-8-sig", errors="backslashreplace")


def table(findings: Sequence[Finding]) -> str:
    """File → problem → what was done, refusals first; of each kind of problem the first few and a count."""
    if not findings:
        return "no problems found"
    # What is left out matters most.
    order = {"refused": 0, "fixed": 1, "noticed": 2}
    groups: dict[tuple[int, str], list[Finding]] = {}
    for finding in findings:
        # Problems that share their words up to a bracket are of one kind.
        groups.setdefault((order[finding.kind], finding.problem.split(" (")[0]), []).append(finding)
    rows = [("file", "problem", "what was done")]
    for _, group in sorted(groups.items(), key=lambda item: item[0]):
        for finding in group[:SHOWN]:
            rows.append((finding.source, finding.problem, shorten(_done(finding), WIDEST)))
        if len(group) > SHOWN:
            rows.append((f"… and {len(group) - SHOWN} more", group[0].problem.split(" (")[0], ""))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows)


def _done(finding: Finding) -> str:
    return f"left out; {finding.action}" if finding.kind == "refused" else finding.action


@dataclass
class Remarks:
    """Collects findings while data is looked through."""

    _named: list[Finding] = field(default_factory=list)
    _tallied: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Take up a finding; text in it may come from outside."""
        source = showable(finding.source)
        self._named.append(Finding(source, showable(finding.problem), showable(finding.action), finding.kind))

    def refuse(self, source: str, problem: str, action: str) -> None:
        """It is left out."""
        self.add(refused(problem, action).of(source))

    def fix(self, source: str, problem: str, action: str) -> None:
        """It is used after a change."""
        self.add(fixed(problem, action).of(source))

    def notice(self, source: str, problem: str, action: str) -> None:
        """It is used as it is."""
        self.add(noticed(problem, action).of(source))

    def tally(self, source: str, problem: str, action: str) -> None:
        """A notice that counts its sources in a single line, for what may well be meant."""
        self._tallied.setdefault((problem, action), []).append(source)

    def findings(self) -> list[Finding]:
        """Everything so far, the counted notices last."""
        counted = [
            Finding(
                showable(sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"),
                showable(problem),
                action,
                "noticed",
            )
            for (problem, action), sources in self._tallied.items()
        ]
        return self._named + counted


def showable(text: str) -> str:
    """Text from outside, with control characters and lone surrogates escaped: neither may reach a
    terminal.
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in ("Cc", "Cs") else char
        for char in text
    )
