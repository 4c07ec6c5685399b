"""A canary token goes through every way out of the program; none lets it pass."""

import json
import logging
import os
import subprocess
import sys
import threading
import warnings

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from lora_utils.cli import main
from lora_utils.config.loading import ConfigError, dump_config, load_config
from lora_utils.config.schema import ModelConfig, RunConfig
from lora_utils.config.strict_yaml import read_yaml
from lora_utils.system import redaction
from lora_utils.system.redaction import holds_secret, holds_token, install, redacted, without_tokens
from tests.conftest import ROOT

CANARY = "hf_" + "CANARYcanary0123456789CANARYcanary"
HALVES = '"hf_" + "CANARYcanary0123456789CANARYcanary"'  # source that a traceback quotes shows no token


@pytest.fixture
def lines():
    """What a handler that is added after install() prints."""
    install()
    written = []

    class Kept(logging.Handler):
        def emit(self, record):
            written.append(self.format(record))

    handler = Kept()
    logging.getLogger().addHandler(handler)
    yield written
    logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"token {CANARY}!", "token ***!"),
        (f"'\\n{CANARY}\\n'", "'\\n***\\n'"),
        ("hf_oauth_eyJhbGciOi.J-x_9.abc", "***"),
        ("sk-proj-" + "aB3" * 10, "***"),
        ("ghp_" + "a1" * 18, "***"),
        ("github_pat_" + "a1_" * 20, "***"),
        ("glpat-" + "a1-" * 7, "***"),
        ("Authorization: Bearer abcdef", "Authorization: Bearer ***"),
        ("bearer " + "a1" * 10 + "==", "bearer ***"),
        ("https://me:secret@host/x", "https://***@host/x"),
        ("https://:p@ss@host:80/x", "https://***@host:80/x"),
    ],
)
def test_what_looks_like_a_token_is_masked_once_and_for_all(text, left):
    assert redacted(text) == left
    assert redacted(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download of hf-internal-testing/tiny_hf_model with hf_transfer",
        "a ring bearer internationalization standing at http://localhost:8080/a@b",
        "task-aaaaaaaaaaaaaaaaaaaaaaaaaaaa9 sk-a-folder-with-a-rather-long-name git@github.com",
        "0123456789abcdef0123456789abcdef01234567",
        "keep_tokens: 3, max_token_length: 77, stabilityai/stable-diffusion-xl-base-1.0",
    ],
)
def test_what_only_resembles_one_stays(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "HUGGINGFACE_HUB_TOKEN"]
)
def test_the_value_of_a_secret_variable_is_masked_as_it_is_now(monkeypatch, name):
    value = "0123456789abcdef0123456789abcdef01234567\\"
    assert not holds_secret(value)
    monkeypatch.setenv(name, value)
    assert redacted(f"key={value} {value!r}") == "key=*** '***'"
    monkeypatch.setenv(name, "none")
    assert not holds_secret("none")


WORDS = [
    "cat",
    "portrait",
    "watercolour",
    "photographofacat",
    "correct horse battery staple",
    "my-secret-folder-2024",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "/home/me/Pictures/2024-11-03",
    "12345678901234567890",
    "naruto_t4_rank_32_run",
]
TOKENS = [
    "0123456789abcdef0123456789abcdef01234567",
    "d41d8cd98f00b204e9800998ecf8427e",
    "550e8400-e29b-41d4-a716-446655440000",
    "aB3-xY9_kLm2-Qr7T.s8",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "xoxb-17653285-nJk3Bq8Wz",
]


@pytest.mark.parametrize("name", ["JUPYTER_PASSWORD", "JUPYTER_TOKEN", "DB_PASSWORD", "APP_SECRET"])
@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_is_a_password_too_may_be_a_prompt_and_a_path(monkeypatch, tmp_path, name, word):
    monkeypatch.setenv(name, word)
    config = load_config(None, {"prompt": f"a {word}", "output_dir": tmp_path / word, "trigger_word": word})
    assert config.compare.prompt == [f"a {word}"]
    assert config.paths.output_dir == tmp_path / word
    # What is written down means the same again; what is shown does not give it away.
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config
    assert word not in redacted(f"a {word}") or len(word) < 8
    assert not holds_token(f"a {word}")


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_of_the_environment_is_refused_in_a_setting(monkeypatch, token):
    assert load_config(None, {"prompt": token}).compare.prompt == [token]
    monkeypatch.setenv("SOME_TOKEN", token)
    for leaf in ("prompt", "output_dir", "revision"):
        with pytest.raises(ConfigError, match=f"{leaf} holds a token") as error:
            load_config(None, {leaf: f"a{token}b"})
        assert token not in str(error.value)
    assert without_tokens(f"a{token}b") == redacted(f"a{token}b") == "a***b"
    # A name that only looks alike is none.
    assert load_config(None, {"prompt": token[:-1]})


def test_a_password_is_masked_in_what_the_command_line_says(monkeypatch, capsys):
    monkeypatch.setenv("JUPYTER_PASSWORD", "watercolour")
    assert main(["train", "--train_data_dir", "absent/watercolour"]) == 2
    error = capsys.readouterr().err
    assert "no folder absent/***" in error
    assert "watercolour" not in error


def test_logs_hold_no_token(lines, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an opaque value")
    logger = logging.getLogger("some.library")
    logger.warning("token %s and %d", CANARY, 3)
    logger.warning("opaque %s", "an opaque value")
    logger.warning("https://%s:%s@host", "me", "word")
    logger.warning({"token": CANARY})
    logger.warning("%d", CANARY)
    try:
        raise OSError(CANARY)
    except OSError:
        logger.exception("failed", stack_info=True)
    assert CANARY not in "".join(lines)
    assert lines[:4] == ["token *** and 3", "opaque ***", "https://***@host", "{'token': '***'}"]
    assert "OSError: ***" in lines[5]


def test_a_record_without_secret_keeps_its_arguments(lines):
    record = logging.getLogger().makeRecord("a", logging.INFO, "f", 1, "%s of %d", ("one", 2), None)
    assert record.args == ("one", 2)


def test_a_record_from_elsewhere_is_redacted_by_the_handlers_that_were_there(monkeypatch):
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    install()
    record = logging.LogRecord("a", logging.INFO, "f", 1, CANARY, (), None)
    assert handler.filter(record)
    assert record.getMessage() == "***"


def test_warnings_hold_no_token(capsys):
    install()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkey = warnings.formatwarning(UserWarning(CANARY), UserWarning, "file.py", 1, f"warn('{CANARY}')")
    assert CANARY not in monkey
    assert monkey.count("***") == 2


def test_installing_twice_wraps_once():
    install()
    hooks = (sys.excepthook, threading.excepthook, warnings.formatwarning, logging.getLogRecordFactory())
    install()
    assert hooks == (
        sys.excepthook,
        threading.excepthook,
        warnings.formatwarning,
        logging.getLogRecordFactory(),
    )


ESCAPES = {
    "an error": f"raise RuntimeError({HALVES})",
    "an error behind an error": f"try:\n    {{}}[{HALVES}]\n"
    "except KeyError:\n    raise RuntimeError('second')",
    "an error in a thread": f"import threading\nthreading.Thread(target=int, args=({HALVES},)).start()",
    "a warning": f"import warnings\nwarnings.warn({HALVES})",
    "a log": f"import logging\nlogging.basicConfig()\nlogging.error({HALVES})",
    "a captured warning": "import logging, warnings\nlogging.basicConfig()\nlogging.captureWarnings(True)\n"
    f"warnings.warn({HALVES})",
}


@pytest.mark.parametrize("escape", ESCAPES.values(), ids=ESCAPES)
def test_a_program_prints_no_token(escape):
    code = f"from lora_utils.system import redaction\nredaction.install()\n{escape}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert CANARY not in done.stdout + done.stderr
    assert "***" in done.stderr


@pytest.mark.parametrize(
    "source",
    [
        f"raise RuntimeError({HALVES})",
        f"raise KeyError('{CANARY}')",
        f"from lora_utils import UserError\nraise UserError({HALVES})",
        f"token = '{CANARY}' +",
    ],
    ids=["an error", "its source", "a message to the user", "a syntax error"],
)
def test_a_failing_cell_shows_no_token_and_sends_none_to_whoever_runs_it(source):
    cells = ["from lora_utils.system import redaction\nredaction.install()\nredaction.install()", source]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    with pytest.raises(CellExecutionError) as failure:
        client.execute()
    shown = json.dumps(notebook.cells[1].outputs)
    assert CANARY not in shown + failure.value.evalue
    assert CANARY in source or CANARY not in str(failure.value)  # which quotes the cell itself
    assert "***" in shown
    assert failure.value.ename in source + " SyntaxError"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--pretrained_model_name_or_path", CANARY],
        ["train", f"--prompt={CANARY}"],
        ["train", "--prompt", "one", f"two {CANARY}"],
        ["train", "--hub_token", CANARY],
        ["train", f"--hf_token={CANARY}"],
        ["train", f"--{CANARY}", "1"],
        ["train", "--config", CANARY],
        ["train", "--rank", CANARY],
        ["train", CANARY],
        [CANARY],
        ["check", "--card", CANARY],
    ],
    ids=lambda arguments: " ".join(arguments).replace(CANARY, "hf_"),
)
def test_the_command_line_echoes_no_token(capsys, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert CANARY not in printed.out + printed.err
    assert "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text",
    [f"revision: {CANARY}", f"prompt: [a, 'b {CANARY}']", f"hf_token: {CANARY}", f"hub_token: {CANARY}"],
    ids=["revision", "prompt", "hf_token", "hub_token"],
)
def test_a_token_in_a_config_is_refused_with_the_place_where_it_belongs(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    for load in (lambda: load_config(file), lambda: load_config(None, read_yaml(file))):
        with pytest.raises(ConfigError, match=r"HF_TOKEN.*hf auth login") as error:
            load()
        assert CANARY not in str(error.value)
        assert text.split(":")[0] in str(error.value)


def test_a_mistyped_setting_with_token_in_its_name_is_no_secret():
    with pytest.raises(ConfigError, match="did you mean 'keep_tokens'"):
        load_config(None, {"keep_token": 1})


def test_the_resolved_config_holds_no_token_even_when_it_was_built_by_hand():
    config = RunConfig(model=ModelConfig(revision=CANARY))
    assert CANARY not in dump_config(config)


def test_redaction_loads_in_a_moment():
    code = "import sys; import lora_utils.system.redaction\n"
    code += "assert not {'torch', 'IPython', 'pydantic'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ)
    assert redaction.MASK == "***"
