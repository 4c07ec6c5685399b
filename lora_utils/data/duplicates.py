"""Pictures that are nearly the same, found by how they look from afar."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def perceptual_hash(image: Image.Image) -> tuple[int, bytes]:
    """A 64-bit difference hash of the brightness and an 8 × 8 RGB thumbnail of 192 bytes."""
    cells = np.asarray(image.convert("RGB").resize((72, 64), Image.Resampling.BOX), dtype=np.float64)
    grey = (cells @ (0.299, 0.587, 0.114)).reshape(8, 8, 9, 8).mean(axis=(1, 3))
    bits = np.diff(grey, axis=1) > 1  # not 0: compression noise on flat areas is no difference
    thumbnail = cells.reshape(8, 8, 8, 9, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail.tobytes()


def near_duplicates(perceptual_hashes: Sequence[tuple[int, bytes]]) -> list[tuple[int, int]]:
    """Pairs of indices whose hashes differ in at most 3 bits and whose thumbnails by at most 4 of 255 on
    average.

    Such hashes agree in one of 4 bands of 16 bits. Images that share a band are sorted by brightness and
    compared with the next 32 only, so N copies of one image give no N² pairs, but enough to link them all.
    """
    hashes = np.array([number for number, _ in perceptual_hashes], dtype=np.uint64)
    thumbnails = (
        np.frombuffer(b"".join(t for _, t in perceptual_hashes), np.uint8).reshape(-1, 192).astype(np.int16)
    )
    brightness = thumbnails.sum(axis=1, dtype=np.int64)
    pairs: set[tuple[int, int]] = set()
    for band in range(4):
        # Of 4 bands, 3 flipped bits leave one untouched (pigeonhole), so near hashes share a band.
        keys = hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)
        # Sorted by band, then by brightness: what can be near is close by.
        order = np.lexsort((brightness, keys))
        for step in range(1, min(33, len(order))):
            first = order[:-step]
            second = order[step:]
            near = (keys[first] == keys[second]) & (brightness[second] - brightness[first] <= 4 * 192)
            if not near.any():
                break
            first = first[near]
            second = second[near]
            flipped = (
                np.unpackbits((hashes[first] ^ hashes[second]).view(np.uint8)).reshape(-1, 64).sum(axis=1)
            )
            # int16 above, because differences of bytes can be negative.
            close = (flipped <= 3) & (np.abs(thumbnails[first] - thumbnails[second]).sum(axis=1) <= 4 * 192)
            pairs.update((min(pair), max(pair)) for pair in np.stack((first, second), axis=1)[close].tolist())
    return sorted(pairs)
