"""What was found wrong with the data, by name, and what was done about it."""

import csv
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Literal

SHOWN = 20
"""Findings of each group that a table shows; the rest is a count."""
WIDEST = 100
"""Characters of the last column of a table."""
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
    """Something that is used after a change, and which; its source is filled in by ``of``."""
    return Finding("", problem, action, "fixed")


def noticed(problem: str, action: str) -> Finding:
    """Something that is used although it may not be meant; its source is filled in by ``of``."""
    return Finding("", problem, action, "noticed")


def as_csv(findings: Sequence[Finding]) -> bytes:
    """All of them, for a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("file", "kind", "problem", "what was done"))
    # All of them, unlike a table: here a thousand rows can be sorted and filtered.
    for finding in findings:
        writer.writerow((finding.source, finding.kind, finding.problem, _done(finding)))
    # With the mark, without which a spreadsheet takes it for another encoding.
    return text.getvalue().encode("utf-8-sig", errors="backslashreplace")


def table(findings: Sequence[Finding]) -> str:
    """File → problem → what was done, refusals first; of each kind of problem the first few and a count."""
    if not findings:
        return "no problems found"

    # What stands in brackets is of one file, such as its size, and would give every file its own group.
    order = {"refused": 0, "fixed": 1, "noticed": 2}
    groups: dict[tuple[int, str], list[Finding]] = {}
    for finding in findings:
        group = (order[finding.kind], finding.problem.split(" (")[0])
        groups.setdefault(group, []).append(finding)

    rows = [("file", "problem", "what was done")]
    for (_, problem), members in sorted(groups.items(), key=lambda item: item[0]):
        # One cause often spoils thousands of files, and their lines would hide the other causes.
        for finding in members[:SHOWN]:
            rows.append((finding.source, finding.problem, shorten(_done(finding), WIDEST)))
        if len(members) > SHOWN:
            rows.append((f"… and {len(members) - SHOWN} more", problem, ""))

    # The last column is ragged: padding it would only wrap lines of a narrow terminal.
    source_width = max(len(source) for source, _, _ in rows)
    problem_width = max(len(problem) for _, problem, _ in rows)
    lines = [
        f"{source:<{source_width}}  {problem:<{problem_width}}  {done}".rstrip()
        for source, problem, done in rows
    ]
    return "\n".join(lines)


def _done(finding: Finding) -> str:
    return f"left out; {finding.action}" if finding.kind == "refused" else finding.action


@dataclass
class Remarks:
    """Collects findings while data is looked through."""

    _named: list[Finding] = field(default_factory=list)
    _tallied: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    """Sources by problem and action."""

    def add(self, finding: Finding) -> None:
        """Take up a finding; text in it may come from outside."""
        # Each text apart: the message of a library may quote the file's own bytes.
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
        counted = []
        for (problem, action), sources in self._tallied.items():
            # One name as an example of where to look; all would be a list of the whole data set.
            source = sources[0]
            if len(sources) > 1:
                source = f"{sources[0]} and {len(sources) - 1} more"
            counted.append(noticed(showable(problem), action).of(showable(source)))
        return self._named + counted


def showable(text: str) -> str:
    """Text from outside, control characters and lone surrogates escaped: neither may reach a terminal."""
    shown = []
    for char in text:
        # A file's name can hold an escape sequence that rewrites the screen, or bytes that no print encodes.
        is_unsafe = unicodedata.category(char) in ("Cc", "Cs")
        shown.append(char.encode("unicode_escape").decode() if is_unsafe else char)
    return "".join(shown)
