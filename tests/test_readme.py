"""What the pages promise: commands that parse, files that exist, no placeholders."""

import re
import shlex

import pytest

from lora_utils.cli import parse
from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "lora_utils" / "tiny" / "README.md",
    *ROOT.glob("docs/*.md"),
]


def commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("python -m lora_utils")]


def test_every_command_of_the_readme_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(commands()) >= 3
    for command in commands():
        stage, config = parse(shlex.split(command)[3:])
        assert stage in command
        assert config.model.variant == "fp16"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_path_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:configs|notebooks|tools|tests|docs)/[\w./]+)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []
    assert "@" not in text.replace("@param", "")


def test_configs_open_with_a_command_that_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    for file in (ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "t4.yaml"):
        first = file.read_text().splitlines()[0]
        parse(shlex.split(first.split("python -m lora_utils ")[1]))
