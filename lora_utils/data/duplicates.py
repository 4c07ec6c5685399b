"""Pictures that are nearly the same, found by how they look from afar.

A difference hash (Krawetz, 2013) compares each cell of a small grey picture with its right neighbour. It sees
edges but neither colour nor light, so a thumbnail is compared as well.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

BANDS = 4
MOST_BITS = 3
"""Bits that two hashes may differ in; fewer than BANDS, so that one band at least agrees."""
MOST_COLOUR = 4 * 192
"""By how much two thumbnails may differ, summed over their 192 values: 4 of 255 on average."""
NEIGHBOURS = 32


def perceptual_hash(image: Image.Image) -> tuple[int, bytes]:
    """A 64-bit difference hash of the brightness and an 8 × 8 RGB thumbnail of 192 bytes."""
    # 72 x 64 serves both: 8 rows of 9 cells for the hash, 8 rows of 8 cells for the thumbnail.
    cells = np.asarray(image.convert("RGB").resize((72, 64), Image.Resampling.BOX), dtype=np.float64)
    grey = (cells @ (0.299, 0.587, 0.114)).reshape(8, 8, 9, 8).mean(axis=(1, 3))  # weights of BT.601
    bits = np.diff(grey, axis=1) > 1  # not 0: compression noise on flat areas is no difference
    thumbnail = cells.reshape(8, 8, 8, 9, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return int.from_bytes(np.packbits(bits).tobytes(), "big"), thumbnail.tobytes()


def near_duplicates(perceptual_hashes: Sequence[tuple[int, bytes]]) -> list[tuple[int, int]]:
    """Pairs of indices of images that nearly look the same, the smaller index first, sorted.

    Their hashes differ in at most 3 bits and their thumbnails by at most 4 of 255 on average. Such hashes
    agree in one of 4 bands of 16 bits. Images that share a band are sorted by brightness and compared with
    the next 32 only, so N copies of one image give no N² pairs, but enough to link them all.

    Args:
        perceptual_hashes: From ``perceptual_hash``.
    """
    hashes = np.array([number for number, _ in perceptual_hashes], dtype=np.uint64)
    joined = b"".join(thumbnail for _, thumbnail in perceptual_hashes)
    # int16, as differences of uint8 wrap around.
    thumbnails = np.frombuffer(joined, np.uint8).reshape(-1, 192).astype(np.int16)
    brightness = thumbnails.sum(axis=1, dtype=np.int64)

    pairs: set[tuple[int, int]] = set()
    for band in range(BANDS):
        keys = hashes >> np.uint64(16 * band) & np.uint64(0xFFFF)
        order = np.lexsort((brightness, keys))  # by key, and by brightness within a key
        for distance in range(1, min(NEIGHBOURS + 1, len(order))):
            first = order[:-distance]
            second = order[distance:]
            # Thumbnails are at least as far apart as their sums, which are cheap to compare.
            near = (keys[first] == keys[second]) & (brightness[second] - brightness[first] <= MOST_COLOUR)
            if not near.any():
                break  # neighbours further away in the order are further away in brightness, too

            first = first[near]
            second = second[near]
            differing = (hashes[first] ^ hashes[second]).view(np.uint8)
            flipped_bits = np.unpackbits(differing).reshape(-1, 64).sum(axis=1)
            colour = np.abs(thumbnails[first] - thumbnails[second]).sum(axis=1)
            close = (flipped_bits <= MOST_BITS) & (colour <= MOST_COLOUR)
            # Sets, because a pair may share several bands.
            for pair in np.stack((first, second), axis=1)[close].tolist():
                pairs.add((min(pair), max(pair)))
    return sorted(pairs)
