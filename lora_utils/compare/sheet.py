"""One picture that shows images side by side, labelled: columns of shots, rows of ways to draw them."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from lora_utils.compare.sampling import Shot

SHEET_COLUMNS = 8
TILE_PX = 256
MARGIN_PX = 96
"""On the left, for the rows' labels."""
LABEL_PX = 34
"""Above the tiles, for two lines of prompt and seed."""
GAP_PX = 4
FONT_PX = 13


def contact_sheet(shots: Sequence[Shot], rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One picture: under each prompt a column with a tile per row label, at most eight columns to a band.

    Args:
        shots: What the columns show.
        rows: Label to images, one for each shot, all of one size.
    """
    first = next(iter(rows.values()))[0]
    width = max(TILE_PX, first.width // 4)
    height = round(width * first.height / first.width)
    band_px = LABEL_PX + len(rows) * height + 8
    starts = range(0, len(shots), SHEET_COLUMNS)
    size = (MARGIN_PX + min(len(shots), SHEET_COLUMNS) * width, band_px * len(starts))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    # Pillow's own font lacks most letters; matplotlib, which the notebooks need anyway, brings one that has
    # them.
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), FONT_PX)

    for band, start in enumerate(starts):
        top = band * band_px
        for column, index in enumerate(range(start, min(start + SHEET_COLUMNS, len(shots)))):
            left = MARGIN_PX + column * width
            label = _fit(shots[index], font, width - 8)
            pen.multiline_text((left + 4, top + 2), label, "black", font, spacing=1)
            for row, images in enumerate(rows.values()):
                tile = images[index].resize((width - GAP_PX, height - GAP_PX), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + LABEL_PX + row * height))
        for row, label in enumerate(rows):
            pen.text((6, top + LABEL_PX + (row + 0.45) * height), label, "black", font)
    return sheet


def _fit(shot: Shot, font: ImageFont.FreeTypeFont, width_px: int) -> str:
    """Prompt and seed on two lines; of the prompt what fits."""
    words = shot.prompt.split()
    seed = f"(seed {shot.seed})"
    for kept in range(len(words), 0, -1):
        dots = [] if kept == len(words) else ["…"]
        lines = [""]
        for word in [*words[:kept], *dots, *seed.split()]:
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width_px:
                lines[-1] = longer
            else:
                lines.append(word)
        if len(lines) <= 2:
            return "\n".join(lines)
    return seed
