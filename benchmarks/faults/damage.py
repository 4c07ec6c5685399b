"""Ways in which a checkpoint on disk goes bad.

Each damages one file, with the files of an older checkpoint to take from and its own choice to make. Above
all they try what looks right to a reader: sound files of another checkpoint, and a manifest that is sound
JSON.
"""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.small_checkpoints import assert_is, save
from lora_utils.storage.checkpoint import newest_checkpoint
from lora_utils.system.files import MANIFEST

Damage = Callable[[Path, Path, random.Random], None]


def flip_a_bit(file: Path, older: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def cut_short(file: Path, older: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: chance.randrange(len(content))])


def zero_the_end(file: Path, older: Path, chance: random.Random) -> None:
    content = file.read_bytes()
    kept = chance.randrange(len(content.rstrip(b"\0")))  # zeros over zeros would be no damage
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


def append(file: Path, older: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes() + chance.randbytes(chance.randint(1, 99)))


def delete(file: Path, older: Path, chance: random.Random) -> None:
    file.unlink()


def take_from_the_older(file: Path, older: Path, chance: random.Random) -> None:
    shutil.copy(older / file.name, file)


def replace_by_the_older(file: Path, older: Path, chance: random.Random) -> None:
    # Whole in itself, manifest and all; that it is another step's only the folder's name says.
    for path in older.iterdir():
        shutil.copy(path, file.parent)


def make_a_folder(file: Path, older: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


def edit_the_manifest(file: Path, older: Path, chance: random.Random) -> None:
    """One entry's hash, size or name is another, or it is gone, or the layout's number is another."""
    path = file.parent / MANIFEST
    manifest = json.loads(path.read_text())
    name = chance.choice(list(manifest["files"]))
    entry = manifest["files"][name]
    edits = {
        "hash": lambda: entry.update(sha256=entry["sha256"][::-1]),
        "size": lambda: entry.update(bytes=entry["bytes"] + 1),
        "name": lambda: manifest["files"].update({f"../{name}": manifest["files"].pop(name)}),
        "gone": lambda: manifest["files"].pop(name),
        "layout": lambda: manifest.update(schema=manifest["schema"] + 1),
        "empty": lambda: manifest.update(files={}),
    }
    edits[chance.choice(list(edits))]()
    path.write_text(json.dumps(manifest, indent=1))


DAMAGES: dict[str, Damage] = {
    "a flipped bit": flip_a_bit,
    "cut short": cut_short,
    "zeros at the end": zero_the_end,
    "bytes appended": append,
    "a deleted file": delete,
    "a file of the older one": take_from_the_older,
    "all files of the older one": replace_by_the_older,
    "a folder in place of a file": make_a_folder,
    "an edited manifest": edit_the_manifest,
}


def corrupt(folder: Path, count: int, seed: int, heard: Callable[[], str]) -> Counter[str]:
    """Damage the newest of two checkpoints again and again: it is always noticed, and the older one used.

    Args:
        folder: An empty one to work in.
        count: How many damages, of all sorts in turn.
        seed: Decides which file, and what of it.
        heard: What was logged since it was last called.

    Returns:
        How often each sort of damage was noticed.
    """
    chance = random.Random(seed)
    noticed = Counter()
    for step in (1, 2):
        save(folder / "sound", step)

    for number in range(count):
        name = list(DAMAGES)[number % len(DAMAGES)]
        shutil.rmtree(folder / "damaged", ignore_errors=True)
        shutil.copytree(folder / "sound", folder / "damaged")
        older, newest = sorted((folder / "damaged").iterdir())
        file = chance.choice(sorted(newest.iterdir()))
        DAMAGES[name](file, older, chance)

        used = newest_checkpoint(folder / "damaged")
        assert used is not None, f"{number}: {name} of {file.name} left nothing"
        assert used.folder == older, f"{number}: {name} of {file.name} was not found"
        assert_is(used, 1)

        # The user is told what was damaged, where it is now, and what it costs.
        message = heard()
        for words in (
            "the checkpoint of step 2 is damaged",
            ".bad-step-000000002",
            "going on from step 1: 1 steps",
        ):
            assert words in message, message
        assert not newest.exists()
        noticed[name] += 1
    return noticed
