"""Files that a config could be: real ones with faults, made ones, noise; and what loading them comes to."""

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from lora_utils import UserError
from lora_utils.config.loading import PRESETS, all_settings, load_config
from lora_utils.config.schema import RunConfig

CONFIGS = sorted(PRESETS.glob("*.yaml"))
LONGEST_LINE = 301
"""Characters of a message."""
NASTY = [
    # Words and numbers that YAML 1.1, YAML 1.2 and Python read differently.
    "",
    *[
        "~",
        "null",
        "true",
        "False",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "0",
        "1",
        "-1",
        "8",
        "010",
        "0o17",
        "0x1F",
        "09",
    ],
    *["1e-4", "1E5", ".5e3", "1.", "-.5", "1e400", "1e-400", ".nan", "-.inf", ".INF", "1_000", "12:30"],
    "1" * 400,
    *("2024-01-01", "#fff", "# note", "#", "fp32", "none", "auto", "red", "1280x720", "64", "a: b", "a:b"),
    # Structure, whole and broken.
    *("[", "]", "[1, 2]", "[]", "[[1], [2]]", "{}", "{a: 1}", "[a, b: c]", "- 1", "? a"),
    *["|", ">-", "|9", "%", "@", "`", "<<", "="],
    # Quotes and escapes: a null, half of a surrogate pair, no code point at all; what editors hide.
    *('"\\0"', '"\\ud800"', '"\\UFFFFFFFF"', '"\\xe9"', '"\\q"', "'it''s'", '"open', "'open"),
    *("\t", " x", "é", "😀", "\x07"),
    # Tags, which other loaders run as code, and anchors, one of them within itself.
    *("!!str 5", "!!int x", "!!python/object/apply:os.system [ls]", "!<%FF> 1", "!", "!x y"),
    *("&a 1", "*a", "&a [*a]", "&b [1, 2]", "*b"),
    # Documents, directives, and what counts as the end of a line here or there.
    *("..", "...", "---", "--- x", "%YAML 1.1", "%YAML 9.9", "%YAML 1.99999", "\ufeff", "\u2028", "\x85"),
    # What the settings' own checks read: colours, paths, secrets.
    *("rgb(999,999,999)", "hsl(9999,1%,1%)", "hsv(0,0%,0%)"),
    *("a" * 300, "../../etc", "/", "C:\\x", "hf_" + "A1" * 10),
]
"""Values; their order decides with the seed what the inputs are."""
BOMBS = [
    # Nine references to a list of nine references, and so on: 9**8 items when it is followed.
    "a: &a [1]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in itertools.pairwise("abcdefghi")),
    # Deep, for parsers that call themselves.
    *("[" * 3000, "{a: " * 3000, "- " * 3000, "? " * 3000, "a:\n" * 3000),
    # Long: in one list, one line, one comment, nothing at all, one text, one key after the other.
    "prompt: [" + "a," * 20000 + "]\n",
    "prompt: " + "word " * 24000,
    "#" + "x" * 120000,
    "\n" * 120000,
    "prompt: |\n" + " x\n" * 40000,
    " " * 130000,
    "prompt:\n" + "- x\n" * 30000,
    "seeds: [" + "1e5, " * 6000 + "]",
    "".join(f"k{i}: v\n" for i in range(9000)),
    # One long text, referred to by a list of many.
    "prompt: &p " + "x" * 100000 + "\nseeds: [" + "*p, " * 5000 + "]",
]
"""Small files that take all the time or memory of a loader that trusts them."""


def inputs(seed: int, count: int) -> Iterator[bytes]:
    """The same contents of files for the same seed; about one in a thousand is large or deep."""
    generator = random.Random(seed)
    configs = [path.read_bytes() for path in CONFIGS]
    for _ in range(count):
        share = generator.random()
        if share < 0.45:
            yield _with_faults(generator, generator.choice(configs), configs)
        elif share < 0.85:
            yield _generated(generator).encode("utf-8", "surrogatepass")  # a surrogate alone is no UTF-8
        elif share < 0.9:
            text = _generated(generator)
            encoding = generator.choice(["utf-16", "utf-16-le", "latin-1", "utf-8-sig"])
            yield text.encode(encoding, "replace")
        elif share < 0.999:
            yield generator.randbytes(generator.randrange(200))
        else:
            yield generator.choice(BOMBS).encode()


def outcome(content: bytes, file: Path) -> str:
    """What loading a config file comes to.

    Args:
        content: Of the file.
        file: Where it is written.

    Returns:
        ``valid`` or ``refused``; anything else raises.
    """
    file.write_bytes(content)
    try:
        config = load_config(file)
    except UserError as error:
        message = str(error)
        for line in message.split("\n"):  # one, or one for each unknown name; no codes for the terminal
            assert line.isprintable(), repr(message)
            assert 10 < len(line) <= LONGEST_LINE, message
        return "refused"
    assert isinstance(config, RunConfig)
    return "valid"


def _with_faults(generator: random.Random, config: bytes, others: list[bytes]) -> bytes:
    content = bytearray(config)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        at = generator.randrange(len(content) + 1)
        to = min(len(content), at + generator.randrange(1, 30))
        fault = generator.randrange(6)
        if fault == 0 and at < len(content):
            content[at] ^= 1 << generator.randrange(8)
        elif fault == 1:
            del content[at:to]
        elif fault == 2:
            content[at:at] = content[at:to]
        elif fault == 3:
            content[at:at] = generator.choice(NASTY).encode("utf-8", "surrogatepass")
        elif fault == 4:  # the end of another config in its middle
            other = generator.choice(others)
            content[at:to] = other[generator.randrange(len(other)) :]
        else:
            content = _with_another_value(generator, content)
    return bytes(content)


def _with_another_value(generator: random.Random, content: bytearray) -> bytearray:
    lines = bytes(content).split(b"\n")
    at = generator.randrange(len(lines))
    name, colon, _ = lines[at].partition(b": ")
    if colon:
        lines[at] = name + colon + generator.choice(NASTY).encode("utf-8", "surrogatepass")
    return bytearray(b"\n".join(lines))


def _generated(generator: random.Random) -> str:
    lines = []
    for _ in range(generator.randrange(1, 7)):
        leaf = generator.choice(list(all_settings()))
        section = all_settings()[leaf][0]
        value = generator.choice(NASTY) if generator.random() < 0.8 else _nested(generator, 4)

        # In its section, as a list, under a wrong name, or flat: a config may be written in all these ways.
        shape = generator.randrange(4)
        if shape == 0:
            lines += [f"{section}:", f"  {leaf}: {value}"]
        elif shape == 1:
            lines += [f"{leaf}:", f"  - {value}", f"  - {generator.choice(NASTY)}"]
        elif shape == 2:
            lines.append(f"{generator.choice([leaf, leaf, section, generator.choice(NASTY)])}: {value}")
        else:
            lines.append(f"{leaf}: {value}")
    return generator.choice(["\n", "\n", "\n", "\r\n", "\r"]).join(lines) + generator.choice(["\n", ""])


def _nested(generator: random.Random, depth: int) -> str:
    if depth == 0 or generator.random() < 0.3:
        return generator.choice(NASTY)
    values = [_nested(generator, depth - 1) for _ in range(generator.randrange(4))]
    if generator.random() < 0.6:
        return f"[{', '.join(values)}]"
    return "{" + ", ".join(f"k: {value}" for value in values) + "}"
