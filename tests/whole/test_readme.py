"""What the pages promise: commands that parse, files that exist, no placeholders."""

import re
import shlex

import pytest

from lora_utils.cli import parse
from lora_utils.config.data import DataConfig
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "lora_utils" / "tiny" / "README.md",
    *ROOT.glob("docs/*.md"),
]


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [
        line for block in blocks for line in block.splitlines() if line.startswith("python -m lora_utils")
    ]


@pytest.mark.parametrize(("page", "count"), [("README.md", 3), ("docs/data.md", 5)])
def test_every_command_of_a_page_is_understood(monkeypatch, page, count):
    monkeypatch.chdir(ROOT)
    found = commands(ROOT / page)
    assert len(found) >= count
    for command in found:
        assert parse(shlex.split(command)[3:]).stage in shlex.split(command)


def test_every_setting_of_data_is_explained():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in DataConfig.model_fields if f"`{name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:lora_utils|notebooks|benchmarks|tools|tests|docs)/[\w./]+)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    rooms = "|".join(
        folder.name for folder in (ROOT / "lora_utils").iterdir() if (folder / "__init__.py").exists()
    )
    inside = re.findall(rf"`((?:{rooms})/[\w./]+)`", text)  # CONTRIBUTING speaks of files by their rooms
    missing += [
        path for path in inside if not (ROOT / "lora_utils" / path).exists() and not (ROOT / path).exists()
    ]
    assert missing == []
    assert "@" not in text.replace("@param", "")


def test_configs_open_with_a_command_that_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = [file for file in (ROOT / "lora_utils" / "presets").glob("*.yaml") if file.name != "ci.yaml"]
    assert len(files) >= 4
    for file in files:
        first = file.read_text().splitlines()[0]
        parse(shlex.split(first.split("python -m lora_utils ")[1]))
