"""What other programs put beside images besides captions and masks: caches, workflows, settings."""

import os
import re
from collections import Counter
from collections.abc import Collection

from lora_utils.data.findings import Remarks
from lora_utils.data.sources.file_tree import CAPTION_ENDINGS, FileTree
from lora_utils.data.sources.names import alike

_MOST_PARTS = 5
"""Of a name such as a.1024x1024_sdxl_te.npz, which belongs to a.png."""


def remark_on_strays(tree: FileTree, remarks: Remarks) -> None:
    """Remark on files that are neither images nor captions: by name where they belong to an image."""
    stems = {alike(os.path.splitext(image)[0]) for image in [*tree.images, *tree.unusable]}
    strays: Counter[str] = Counter()
    for name in tree.strays:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in CAPTION_ENDINGS and _belongs_to_image(alike(name), stems):
            problem = f"file of another program beside an image ({suffix})"
            remarks.tally(tree.prefix + name, problem, "not used; captions come from text files and tables")
        else:
            strays[suffix or "no ending"] += 1

    # One line for all: README, Thumbs.db and the like lie in most folders.
    if strays:
        endings = ", ".join(ending for ending, _ in strays.most_common(5))
        count = f"{strays.total()} file{'s' if strays.total() > 1 else ''}"
        problem = f"neither image nor caption ({count}: {endings})"
        remarks.notice(tree.prefix.rstrip("/") or tree.root.resolve().name, problem, "passed over")


def _belongs_to_image(name: str, stems: Collection[str]) -> bool:
    # a.json, a.jpg.json, a_sdxl.npz, a_1024x1024_sdxl.npz: all of them begin with a.
    for _ in range(_MOST_PARTS):
        name = re.sub(r"[._-][^._/-]*$", "", name)
        if name in stems:
            return True
    return False
