"""Whatever console, pipe or stream is at the other end: what is printed never ends a run."""

import io
import os
import subprocess
import sys

import pytest
from PIL import Image

from lora_utils import stages
from lora_utils.cli import main
from lora_utils.system import console
from lora_utils.system.progress import progress_bar
from tests.conftest import ROOT, TINY

WORDS = "уни 日本 é ø 😀 x²"
CONSOLES = ["ascii", "cp1252", "cp437", "cp850", "latin-1", "koi8-r", "shift_jis", "gbk", "utf-8", "utf-16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures whose names and captions are in several scripts."""
    folder = tmp_path_factory.mktemp(WORDS)
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (64, 64), colour).save(folder / f"{WORDS} {number}.png")
        (folder / f"{WORDS} {number}.txt").write_text(f"a {colour} {WORDS}", encoding="utf-8")
    return folder


class Strict:
    """A stream of somebody's own, which knows ``write`` and ``flush`` and takes ASCII alone."""

    def __init__(self):
        self.bytes = b""

    def write(self, text):
        self.bytes += text.encode("ascii")

    def flush(self):
        pass


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def text_stream(encoding, errors="strict"):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def check_data(folder, *more):
    options = ["--train_data_dir", str(folder), "--pretrained_model_name_or_path", str(TINY)]
    return main(["check", "--data", *options, "--resolution", "64", "--validation_split", "0", *more])


@pytest.mark.parametrize("encoding", CONSOLES)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_every_line_reaches_a_console_of_any_encoding(folder, monkeypatch, encoding, errors):
    stream = text_stream(encoding, errors)
    monkeypatch.setattr(sys, "stdout", stream)
    console.accept_any_text()
    print(f"a {WORDS} █ … \udcff end")
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert text.startswith("a ")
    assert text.endswith(" end\n")
    for letter in WORDS:
        escaped = letter.encode("ascii", "backslashreplace").decode()
        assert letter in text or escaped in text or letter == "²"
    assert "█ " in text or "# " in text
    assert "\\udcff" in text


def test_what_stands_for_a_letter_is_named_once(monkeypatch):
    stream = text_stream("ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.accept_any_text()
    print("██ 8–9 × 3 ≤ 4 → уж…")
    stream.flush()
    assert stream.buffer.getvalue().splitlines() == [b"## 8-9 x 3 <= 4 -> \\u0443\\u0436..."]


def test_a_handler_of_the_users_own_choice_stays(monkeypatch):
    stream = text_stream("ascii", "replace")
    monkeypatch.setattr(sys, "stdout", stream)
    console.accept_any_text()
    assert sys.stdout is stream
    assert stream.errors == "replace"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_check_ends_well_on_a_console_that_lacks_letters(folder, monkeypatch, encoding):
    stream = text_stream(encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", text_stream(encoding))
    assert check_data(folder) == 0
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert "64x64     " + "#" * 30 + " 2" in text
    assert "2 usable" in text
    assert "\\u65e5" in text


@pytest.mark.parametrize("make", [lambda: None, closed, Strict, io.StringIO])
def test_a_stream_that_is_odd_closed_or_absent_ends_nothing(folder, monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", make())
    assert check_data(folder) == 0


@pytest.mark.parametrize("make", [lambda: None, closed, Strict, io.StringIO])
def test_stages_called_without_main_draw_bars_anywhere(monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", make())
    monkeypatch.setattr(sys, "stderr", make())
    assert list(progress_bar(range(3), "files")) == [0, 1, 2]


def test_an_odd_stream_gets_what_it_can_take(monkeypatch):
    stream = Strict()
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(3):  # a second call wraps nothing twice
        console.accept_any_text()
    print("уж █")
    assert stream.bytes == b"\\u0443\\u0436 #\n"
    assert not console.is_terminal(sys.stdout)


def test_a_run_whose_folder_the_console_cannot_name_is_trained_and_said(make_config, monkeypatch, tmp_path):
    config = make_config(output_dir=tmp_path / "уни", max_train_steps=1)
    monkeypatch.setattr(sys, "stdout", text_stream("cp1252"))
    # As the command line has it: the stage's own lines, then the folder's name.
    console.accept_any_text()
    assert len(list(stages.train(config))) == 1
    print(config.paths.output_dir)
    sys.stdout.flush()
    assert b"\\u0443" in sys.stdout.buffer.getvalue()
    assert (config.paths.output_dir / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="a shell and locales of POSIX")
@pytest.mark.parametrize(
    ("setting", "redirection"),
    [("PYTHONIOENCODING=cp1252", ""), ("PYTHONUTF8=0", ""), ("PYTHONUTF8=0", "<&- >&- 2>&-")],
)
def test_a_whole_process_ends_well_in_the_posix_locale_and_with_closed_descriptors(
    folder, tmp_path, setting, redirection
):
    plain = tmp_path / "pictures"  # Python itself cannot name other files in the POSIX locale
    plain.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (plain / f"{number // 2}{path.suffix}").write_bytes(path.read_bytes())
    name, _, value = setting.partition("=")
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", name: value}
    # With a worker process, which inherits what is closed.
    settings = f"--pretrained_model_name_or_path {TINY} --resolution 64 --validation_split 0"
    command = f"{sys.executable} -m lora_utils check --data --train_data_dir pictures {settings}"
    done = subprocess.run(
        ["sh", "-c", f"{command} --dataloader_num_workers 1 {redirection}"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert redirection or b"2 usable" in done.stdout
