"""compare.sheet: carried out of sampling."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lora_utils.compare.sampling import Shot

SHEET_COLUMNS = 8
TILE_PX = 256
LABEL_PX = 34
GAP_PX = 4


def contact_sheet(shots: Sequence[Shot], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One picture: under each prompt a column with a tile per row label, at most eight columns to a band."""
    first = next(iter(rows.values()))[0]
    width = max(TILE_PX, first.width // 4)
    height = round(width * first.height / first.width)
    bands = [
        range(start, min(start + SHEET_COLUMNS, len(shots))) for start in range(0, len(shots), SHEET_COLUMNS)
    ]
    margin, band_px = 96, LABEL_PX + len(rows) * height + 8
    sheet = Image.new("RGB", (margin + min(len(shots), SHEET_COLUMNS) * width, band_px * len(bands)), "white")
    pen, font = (
        ImageDraw.Draw(sheet),
        ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 13),
    )
    for number, band in enumerate(bands):
        top = number * band_px
        for place, index in enumerate(band):
            left = margin + place * width
            pen.multiline_text(
                (left + 4, top + 2), _fit(shots[index], font, width - 8), "black", font, spacing=1
            )
            for row, images in enumerate(rows.values()):
                tile = images[index].resize((width - GAP_PX, height - GAP_PX), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + LABEL_PX + row * height))
        for row, label in enumerate(rows):
            pen.text((6, top + LABEL_PX + (row + 0.45) * height), label, "black", font)
    return sheet


def _fit(shot: Shot, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Prompt and seed on two lines; of the prompt what fits."""
    words, seed = shot.prompt.split(), f"(seed {shot.seed})"
    for kept in range(len(words), 0, -1):
        lines = [""]
        for word in [*words[:kept], *([] if kept == len(words) else ["…"]), *seed.split()]:
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= width_px else [*lines, word]
        if len(lines) <= 2:
            return "\n".join(lines)
    return seed
