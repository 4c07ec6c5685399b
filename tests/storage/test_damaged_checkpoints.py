"""A damaged checkpoint is never used: the one before it is, and a sentence says so."""

from benchmarks.faults.damage import DAMAGES, corrupt


def test_every_damage_of_the_newest_checkpoint_is_found_and_the_older_one_used(tmp_path, caplog):
    def heard():
        text = caplog.text
        caplog.clear()
        return text

    found = corrupt(tmp_path, 108, seed=0, heard=heard)  # 500 in `python -m benchmarks faults`
    assert sum(found.values()) == 108
    assert found.keys() == DAMAGES.keys()
