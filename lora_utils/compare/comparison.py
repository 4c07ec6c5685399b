"""Base model and LoRA on equal seeds, as files: two PNGs for each shot, and one sheet of all."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lora_utils.compare.album import (
    BASELINE,
    ELSEWHERE,
    FINETUNED,
    SHEET,
    AlbumError,
    drop_if_repeated,
    require_writable,
    set_aside,
)
from lora_utils.compare.png import save_image, save_sheet
from lora_utils.compare.sampling import Picture, SamplingSettings, Shot, prompt_numbers
from lora_utils.compare.sheet import contact_sheet
from lora_utils.storage.log import CONFIG
from lora_utils.system.files import sweep, write_atomically

NOTHING = "no picture was written, and nothing changed"


@dataclass(frozen=True)
class Comparison:
    """What was drawn, in the order of the shots."""

    folder: Path
    shots: list[Shot]
    baseline: list[Image.Image]
    finetuned: list[Image.Image]
    sheet: Image.Image


@dataclass(frozen=True)
class ComparisonPlan:
    """What is to be drawn, and where it goes."""

    folder: Path
    shots: Sequence[Shot]
    settings: SamplingSettings
    adapter_scale: float
    """Strength of the LoRA."""
    lora_sha256: str
    """Of its file: which LoRA it was, when it has been trained further."""
    resolved_config: str
    """All settings as they are used, YAML."""

    @property
    def size(self) -> int:
        """How many pictures there will be."""
        return 2 * len(self.shots)

    def __str__(self) -> str:
        prompts = len(prompt_numbers(self.shots))
        counts = f"prompts: {prompts}, seeds: {len(self.shots) // prompts}, each without and with the LoRA"
        size = f"{self.settings.width}x{self.settings.height} px"
        return f"{self.size} pictures ({counts}; {size}, steps: {self.settings.num_inference_steps})"

    def require_writable(self) -> None:
        """Try the folder before anything is loaded.

        Raises:
            AlbumError: The pictures could not be written there.
        """
        require_writable(self.folder, self.size, (self.settings.width, self.settings.height))


def write(plan: ComparisonPlan, pictures: Iterable[Picture]) -> Comparison:
    """Write baseline_*.png and finetuned_*.png as they come, then sheet.png; config.yaml stands beside them.

    Raises:
        AlbumError: The disk is full or fails; says what is kept.
        KeyboardInterrupt: Whoever draws was interrupted; says what is kept, with a sheet of the whole pairs.
    """
    written = _Written(plan)
    try:
        for picture in pictures:
            written.add(picture)
        sheet = written.write_sheet()
    except KeyboardInterrupt:
        if written.finetuned:
            written.write_sheet()
        raise KeyboardInterrupt(written.account()) from None
    if written.earlier:
        drop_if_repeated(written.earlier)
    return Comparison(plan.folder, list(plan.shots), written.baseline, written.finetuned, sheet)


@dataclass
class _Written:
    """What of a comparison is on disk."""

    plan: ComparisonPlan
    baseline: list[Image.Image] = field(default_factory=list)
    finetuned: list[Image.Image] = field(default_factory=list)
    earlier: Path | None = None
    """Where the comparison is now that was there before."""
    has_sheet: bool = False

    @property
    def count(self) -> int:
        return len(self.baseline) + len(self.finetuned)

    def add(self, picture: Picture) -> None:
        """Write a picture; the first one makes room for itself."""
        folder = self.plan.folder
        name = FINETUNED if picture.is_finetuned else BASELINE
        number = prompt_numbers(self.plan.shots)[picture.shot.prompt]
        path = folder / f"{name}_{number:03d}_seed{picture.shot.seed}.png"
        with self._explaining():
            is_first = self.count == 0
            if is_first:
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
                self.earlier = set_aside(folder)
            save_image(picture.image, path, self._facts(picture))
            (self.finetuned if picture.is_finetuned else self.baseline).append(picture.image)
            if is_first:  # not before: a folder without a picture would be none of a comparison
                write_atomically(folder / CONFIG, self.plan.resolved_config.encode())

    def write_sheet(self) -> Image.Image:
        """One picture of all whole pairs. Base above, LoRA below: moving the eyes once shows what changed."""
        pairs = len(self.finetuned)
        rows = {"base": self.baseline[:pairs], f"LoRA × {self.plan.adapter_scale:g}": self.finetuned}
        sheet = contact_sheet(self.plan.shots[:pairs], rows)
        with self._explaining():
            save_sheet(sheet, self.plan.folder / SHEET)
        self.has_sheet = True
        return sheet

    def account(self) -> str:
        """What there is of the comparison now."""
        if not self.count:
            return NOTHING
        sheet = f", side by side in {SHEET}" if self.has_sheet else ""
        return f"{self.count} of {self.plan.size} pictures are in {self.plan.folder}{sheet}"

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Turn what the disk says into a sentence."""
        try:
            yield
        except OSError as error:
            raise AlbumError(
                f"the disk refused a picture ({error.strerror or error}), and {self.account()}; "
                f"free some room, or {ELSEWHERE}"
            ) from error

    def _facts(self, picture: Picture) -> dict[str, Any]:
        """All that decides the picture."""
        facts = asdict(picture.shot) | asdict(self.plan.settings)
        if not picture.is_finetuned:
            return facts | {"adapter_scale": 0.0}
        return facts | {"adapter_scale": self.plan.adapter_scale, "lora_sha256": self.plan.lora_sha256}
