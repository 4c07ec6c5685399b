"""A precompute killed at any moment goes on when the same command is given again, and ends in the same
cache.
"""

import random

from benchmarks.faults.precompute_kills import contents, precompute_under_kills, same
from lora_utils import stages

KILLS = 20  # a hundred in `python -m benchmarks kills`


def test_killed_precomputes_end_in_the_cache_of_one_that_was_not(make_config, tmp_path):
    straight = stages.precompute(make_config(precompute_dir=tmp_path / "straight"))
    generator, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        config = make_config(precompute_dir=tmp_path / f"killed{runs}")
        kills += precompute_under_kills(config, generator, longest_seconds=1.0)
        runs += 1
        found = stages.precompute(config)
        assert (found.encoded_images, found.encoded_captions) == (0, 0)
        assert same(contents(found), contents(straight))
        assert found.entries == straight.entries
        assert len(list(found.folder.glob("*.safetensors"))) < 10
        assert not list(found.folder.glob(".bad-*"))
