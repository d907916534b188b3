"""Which rows a shard has, and who says which shard a process is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import Target
from deltaclip.features.data.sharding import Shard, local_rank, part_of, read_shard, shard_of
from deltaclip.tests.features.store.making import manifest

NAMES = st.lists(st.text(min_size=1, max_size=8), max_size=30)


def of(names):
    rows = [(1, f"p{number % 3}", "", "g", number / 100) for number in range(len(names))]
    return dataclasses.replace(manifest(Path("folder"), rows), images=list(names))


@given(NAMES, st.integers(1, 9))
def test_every_row_is_in_one_shard_and_rows_of_one_name_in_the_same(names, count):
    parts = [part_of(of(names), Shard(number, count)) for number in range(1, count + 1)]
    positions = np.concatenate([part.position for _, part in parts])
    assert sorted(positions.tolist()) == list(range(len(names)))
    for mine, part in parts:
        assert mine.images == [names[row] for row in part.position]
        assert len(mine.places) == len(mine)
        assert mine.prompts == [f"p{row % 3}" for row in part.position]
        np.testing.assert_array_equal(mine.labels["quality"], part.position / 100)
        assert (np.diff(part.position) > 0).all()  # in the order of the table
    assert sum(len(set(mine.images)) for mine, _ in parts) == len(set(names))
    assert len({part.table for _, part in parts}) == 1


@given(NAMES, NAMES, st.integers(1, 9))
def test_rows_that_come_or_go_move_no_other(names, more, count):
    before = {name: shard_of(name, count) for name in names}
    for number in range(1, count + 1):
        mine, _ = part_of(of([*more, *reversed(names)]), Shard(number, count))
        assert {name for name in mine.images if name in before} == {n for n in names if before[n] == number}


def test_shards_are_of_about_one_size():
    count, num_images = 16, 16_000
    sizes = np.bincount([shard_of(f"images/{n:06}.png", count) for n in range(num_images)], minlength=count + 1)[1:]
    # Binomial: a mean of 1,000 with an SD of 31; five of them are one chance in a million for 16 shards.
    assert np.abs(sizes - 1000).max() < 5 * 31


def test_the_split_never_changes():
    # Caches of the world depend on these numbers: a change would compute everything anew.
    assert [shard_of(name, 7) for name in ("a.png", "images/0001.png", "Ünïcode ☃.jpg", "")] == GOLDEN


GOLDEN = [3, 7, 2, 1]


def test_what_makes_another_table():
    base = of(["a", "b", "c"])

    def table(changed):
        return part_of(changed, Shard(1, 2))[1].table

    same = dataclasses.replace(base, image_root=Path("elsewhere"), path=Path("other.csv"), places=["x"] * 3)
    assert table(same) == table(base)
    labels = base.labels | {"quality": np.array([0.0, 0.01, 0.5])}
    for other in (
        of(["a", "b", "d"]),
        of(["a", "c", "b"]),
        of(["a", "b", "c", "d"]),
        dataclasses.replace(base, prompts=["x", *base.prompts[1:]]),
        dataclasses.replace(base, explanations=["x", "", ""]),
        dataclasses.replace(base, labels=labels),
        dataclasses.replace(base, targets=(*base.targets, Target("fit", "pair"))),
    ):
        assert table(other) != table(base)
    fits = [dataclasses.replace(base, targets=(*base.targets, Target("fit", sees))) for sees in ("image", "pair")]
    assert table(fits[0]) != table(fits[1])


def test_names_of_shards():
    assert Shard(2, 4).path(Path("cache/x.h5")) == Path("cache/x.shard-2-of-4.h5")
    assert Shard(2, 128).path(Path("cache/x.y.h5")) == Path("cache/x.y.shard-002-of-128.h5")
    assert Shard(1, 1).path(Path("plain")) == Path("plain.shard-1-of-1")


@pytest.mark.parametrize(
    ("text", "environment", "shard", "named_by"),
    [
        ("3/4", {"RANK": "0", "WORLD_SIZE": "2"}, Shard(3, 4), ""),  # given: no variable counts
        ("auto", {"RANK": "0", "WORLD_SIZE": "2"}, Shard(1, 2), "RANK=0 and WORLD_SIZE=2"),
        ("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, Shard(4, 4), "SLURM_PROCID=3 and SLURM_NTASKS=4"),
        (  # torchrun within a job of SLURM
            "auto",
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "5", "WORLD_SIZE": "8", "SLURM_ARRAY_TASK_ID": "1"},
            Shard(6, 8),
            "RANK=5 and WORLD_SIZE=8",
        ),
    ],
)
def test_who_says_which_shard(text, environment, shard, named_by):
    assert read_shard(text, environment) == (shard, named_by)


NOTHING = (
    "--shard: auto finds no shard in the environment (looked for RANK and WORLD_SIZE; SLURM_PROCID and SLURM_NTASKS); "
    "give I/N"
)


@pytest.mark.parametrize(
    ("text", "environment", "line"),
    [
        ("0/4", {}, "--shard: '0/4' is no shard; give I/N from 1/N to N/N, or auto"),
        ("5/4", {}, "--shard: '5/4' is no shard; give I/N from 1/N to N/N, or auto"),
        ("1/0", {}, "--shard: '1/0' is no shard; give I/N from 1/N to N/N, or auto"),
        ("1-4", {}, "--shard: '1-4' is no shard; give I/N from 1/N to N/N, or auto"),
        ("auto", {}, NOTHING),
        ("auto", {"RANK": "1"}, NOTHING),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, NOTHING),
        (
            "auto",
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "7"},
            "--shard: auto does not know how many shards this job array stands for; "
            "give $SLURM_ARRAY_TASK_ID/N with --array=1-N",
        ),
    ],
)
def test_what_is_no_shard(text, environment, line):
    with pytest.raises(UserError) as caught:
        read_shard(text, environment)
    assert str(caught.value) == line


def test_processes_of_one_machine():
    assert local_rank({"LOCAL_RANK": "3", "SLURM_LOCALID": "0"}) == 3
    assert local_rank({"SLURM_LOCALID": "1"}) == 1
    assert local_rank({}) is None
