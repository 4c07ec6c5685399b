"""One picture that shows images side by side, labelled: columns of shots, rows of ways to draw them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

from lora_utils.compare.labels import LINE_PX, drawable, width, wrapped, write_line
from lora_utils.compare.sampling import Shot, prompt_numbers

SHEET_COLUMNS = 8
TILE_PX = 256
PROMPT_LINES = 3
"""Of a prompt above its tile; the file has all of it."""
GAP_PX = 4
PADDING_PX = 6


def contact_sheet(shots: Sequence[Shot], rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """One picture: under each prompt a column with a tile per row label, at most eight columns to a band.

    Args:
        shots: What the columns show.
        rows: Label to images, one for each shot, all of one size.
    """
    first = next(iter(rows.values()))[0]
    tile_width = max(TILE_PX, first.width // 4)
    tile_height = round(tile_width * first.height / first.width)
    margin = 2 * PADDING_PX + max(round(width(label)) for label in rows)
    labels = _labels(shots, tile_width - 2 * PADDING_PX)
    bands = _bands(shots)
    heads = [PADDING_PX + LINE_PX * max(len(labels[column]) for column in band) for band in bands]
    height = sum(heads) + len(bands) * (len(rows) * tile_height + PADDING_PX)
    sheet = Image.new("RGB", (margin + max(map(len, bands)) * tile_width, height), "white")
    pen = ImageDraw.Draw(sheet)

    top = 0
    for band, head in zip(bands, heads, strict=True):
        for position, column in enumerate(band):
            left = margin + position * tile_width
            _write_label(pen, left, top + head, labels[column])
            for row, images in enumerate(rows.values()):
                size = (tile_width - GAP_PX, max(1, tile_height - GAP_PX))
                tile = images[column].resize(size, Image.Resampling.LANCZOS)
                sheet.paste(tile, (left, top + head + row * tile_height))
        for row, label in enumerate(rows):
            middle = top + head + (row + 0.5) * tile_height
            write_line(pen, PADDING_PX, middle - LINE_PX / 2, label, "black")
        top += head + len(rows) * tile_height + PADDING_PX
    return sheet


def _labels(shots: Sequence[Shot], width_px: int) -> list[list[tuple[str, str]]]:
    """Lines and colours: of the prompt what fits and can be drawn, and the numbers that name the files."""
    numbers = prompt_numbers(shots)
    prompts = {prompt: wrapped(drawable(prompt), width_px, PROMPT_LINES) for prompt in numbers}
    labels = []
    for shot in shots:
        named = wrapped(f"prompt {numbers[shot.prompt]}, seed {shot.seed}", width_px, 2)
        labels.append(
            [(line, "black") for line in prompts[shot.prompt]] + [(line, "dimgrey") for line in named]
        )
    return labels


def _write_label(
    pen: ImageDraw.ImageDraw, left_px: int, bottom_px: int, lines: list[tuple[str, str]]
) -> None:
    """Just above the tile, however many lines it has."""
    top_px = bottom_px - len(lines) * LINE_PX
    for text, colour in lines:
        write_line(pen, left_px, top_px, text, colour)
        top_px += LINE_PX


def _bands(shots: Sequence[Shot]) -> list[range]:
    """Columns in rows of nearly equal length, so that none is left alone; a prompt's seeds stay together."""
    count = len(shots)
    prompts = len(prompt_numbers(shots))
    seeds = count // prompts
    # Of a comparison that was interrupted some prompts have fewer seeds.
    unit = seeds if seeds * prompts == count and seeds <= SHEET_COLUMNS else 1
    units = count // unit
    bands = -(-units // (SHEET_COLUMNS // unit))
    ends = [unit * -(-units * band // bands) for band in range(bands + 1)]
    return [range(start, end) for start, end in pairwise(ends)]
