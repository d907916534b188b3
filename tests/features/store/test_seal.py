"""Seals and checksums: no flipped bit and no cut of a finished cache goes unseen."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import zlib

import h5py
import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.store.integrity import (
    MAGIC,
    SEAL_BYTES,
    break_seal,
    damaged_rows,
    find_damage,
    has_seal,
    row_checksums,
    write_seal,
)
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import DONE, FAILED, PENDING
from deltaclip.features.store.verify import find_problems
from deltaclip.features.store.writer import open_writer, part_path
from deltaclip.tests.features.store.making import ANEW, FACTS, REQUEST, plan_of, small, write

ROWS = [(number, f"prompt {number % 5}", "", "g", number / 40) for number in range(1, 40)] + [(None, "x", "", "g", 0.1)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_checksum_of_a_row_is_the_crc_of_its_bytes(dtype, count):
    vectors = np.random.default_rng(0).standard_normal((count, 7)).astype(dtype)
    found = row_checksums(vectors)
    assert found.dtype == np.uint32
    assert found.tolist() == [zlib.crc32(vector.tobytes()) for vector in vectors]
    assert row_checksums(np.asfortranarray(vectors)).tolist() == found.tolist()


def test_only_rows_that_count_are_damaged():
    vectors = np.ones((4, 3), np.float32)
    checksums = row_checksums(vectors)
    vectors[[0, 2, 3], 1] = np.nextafter(np.float32(1), np.float32(2))
    status = np.array([DONE, DONE, PENDING, FAILED], np.uint8)
    assert damaged_rows(vectors, checksums, status).tolist() == [0]
    assert damaged_rows(vectors[:0], checksums[:0], status[:0]).tolist() == []


def vector_bytes(path):
    """Places of the vectors in the file, from h5py."""
    with h5py.File(path, "r") as file:
        sets = [file["texts/embedding"], *(view["embedding"] for view in file["views"].values())]
        return sorted([place.id.get_offset(), place.id.get_storage_size()] for place in sets)


def test_the_seal_is_the_sha256_of_all_but_the_vectors(tmp_path):
    path = tmp_path / "c.h5"
    write(path, small(tmp_path)[1])
    content, places = path.read_bytes(), vector_bytes(path)
    text = content[len(MAGIC) : SEAL_BYTES].rstrip(b"\0")
    assert content.startswith(MAGIC)
    assert text.endswith(b"\n")
    facts = json.loads(text)
    digest = facts.pop("sha256")
    assert facts == {"size": len(content), "vectors": places}
    rest = bytearray(content)
    for first, size in reversed(places):
        del rest[first : first + size]
    assert digest == hashlib.sha256(json.dumps(facts).encode() + rest[SEAL_BYTES:]).hexdigest()


# The piece that is read at a time is 1 MiB; gaps end before, at and after its end.
@pytest.mark.parametrize("size", [SEAL_BYTES, SEAL_BYTES + 1, *(SEAL_BYTES + (1 << 20) + more for more in (-1, 0, 1))])
@pytest.mark.parametrize("parts", [[], [(SEAL_BYTES, 0)], [(SEAL_BYTES, 1)]])
def test_every_byte_of_a_file_of_any_size_counts(tmp_path, size, parts):
    path = tmp_path / "x"
    path.write_bytes(bytes(size))
    if parts and size < SEAL_BYTES + parts[0][1]:
        return
    assert (has_seal(path), find_damage(path)) == (False, None)
    write_seal(path, parts)
    assert (has_seal(path), find_damage(path)) == (True, None)
    for place in {SEAL_BYTES, SEAL_BYTES + 1, size // 2, size - 1}:
        if not SEAL_BYTES <= place < size:
            continue
        flip(path, place, 3)
        is_left_out = any(first <= place < first + length for first, length in parts)
        assert (find_damage(path) is None) == is_left_out
        flip(path, place, 3)
    with path.open("ab") as file:
        file.write(b"\0")
    assert find_damage(path) == "is damaged or was changed (checksum of names, labels and structure)"
    break_seal(path)
    assert (has_seal(path), find_damage(path)) == (False, None)


def flip(path, place, bit):
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def read_all(path):
    """What a training reads."""
    with FeatureStore.open(path) as store:
        for kind in ("images", "texts"):
            store.embeddings(kind)
        store.norms()
        store.rows()
        return store.header, store.facts, store.dataset


def unused(path):
    """Bytes that count for nothing: vectors of rows without one."""
    with h5py.File(path, "r") as file:
        found = set()
        for group in (file["texts"], *file["views"].values()):
            embedding = group["embedding"]
            width = embedding.id.get_storage_size() // len(embedding)
            for row in np.flatnonzero(group["status"][:] != DONE):
                start = embedding.id.get_offset() + int(row) * width
                found |= set(range(start, start + width))
        return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sealed")
    write(folder / "c.h5", plan_of(folder, ROWS))
    return folder / "c.h5"


def places(cache, count, seed):
    """Random places of the file, and some of every kind of content."""
    size, generator = cache.stat().st_size, random.Random(seed)
    spread = [generator.randrange(size) for _ in range(count)]
    of_seal = [0, 1, len(MAGIC), len(MAGIC) + 5, len(MAGIC) + 80, SEAL_BYTES - 1, SEAL_BYTES]
    of_vectors = [first + length // 2 for first, length in vector_bytes(cache)]
    return [*spread, *of_seal, *of_vectors, size - 1]


def test_a_hundred_flipped_bits(cache, tmp_path):
    path, generator, skipped = tmp_path / "c.h5", random.Random(1), unused(cache)
    shutil.copy(cache, path)
    hits = [place for place in places(cache, 100, seed=1) if place not in skipped]
    assert len(hits) >= 100
    for place in hits:
        bit = generator.randrange(8)
        flip(path, place, bit)
        with pytest.raises(UserError, match=r"is damaged|is no readable HDF5|is cut off|is not complete") as caught:
            read_all(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert str(caught.value).endswith(f"; {ANEW}")
        assert len(find_problems(path)) == 1
        flip(path, place, bit)
    assert read_all(path) == read_all(cache)
    assert find_problems(path) == []


@pytest.mark.slow
def test_every_byte_flipped(cache, tmp_path):
    path, skipped = tmp_path / "c.h5", unused(cache)
    shutil.copy(cache, path)
    for place in set(range(cache.stat().st_size)) - skipped:
        flip(path, place, place % 8)
        with pytest.raises(UserError):
            read_all(path)
        flip(path, place, place % 8)
    assert read_all(path) == read_all(cache)


def test_a_hundred_cuts(cache, tmp_path):
    path, content = tmp_path / "c.h5", cache.read_bytes()
    for length in places(cache, 100, seed=2):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"is damaged|is no readable HDF5|is cut off"):
            read_all(path)
        assert len(find_problems(path)) == 1


def test_a_flipped_bit_of_a_vector_is_named_by_its_row(cache, tmp_path):
    path = tmp_path / "c.h5"
    shutil.copy(cache, path)
    with h5py.File(path, "r") as file:
        offset = file["views/center/embedding"].id.get_offset()
    flip(path, offset + 17 * 12, 0)
    flip(path, offset + 30 * 12 + 11, 6)
    line = f"{path}: is damaged (views/center/embedding: 2 of 40 rows, the first is row 17); {ANEW}"
    with FeatureStore.open(path) as store, pytest.raises(UserError) as caught:
        store.embeddings("images")
    assert str(caught.value) == line
    assert find_problems(path) == [
        "views/center/embedding: 2 of 40 rows are not what was computed, the first is row 17"
    ]
    # A new layout takes nothing over from it, and what is there stays.
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        open_writer(path, plan_of(tmp_path, ROWS[:30]), request=REQUEST, facts=FACTS)
    assert str(caught.value) == line.replace("2 of 40", "1 of 40")  # it stops at the rows that it takes over
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["c.h5"]


def test_a_reader_of_blocks_checks_what_it_has_read(cache, tmp_path):
    path = tmp_path / "c.h5"
    shutil.copy(cache, path)
    with h5py.File(path, "r") as file:
        flip(path, file["views/center/embedding"].id.get_offset() + 17 * 12, 0)
    line = f"{path}: is damaged (views/center/embedding: 1 of 40 rows, the first is row 17); {ANEW}"
    with FeatureStore.open(path) as store:
        dataset = store.group("images")["embedding"]
        good = [slice(0, 17), slice(18, 40), slice(5, 5), np.array([16, 18, 3, 3]), np.array([], np.int64)]
        for rows in good:
            store.check_vectors(dataset[:][rows], "images", rows=rows)
        for rows in (slice(None), slice(17, 18), slice(10, 30), np.array([17]), np.array([20, 17, 16, 20])):
            with pytest.raises(UserError) as caught:
                store.check_vectors(dataset[:][rows], "images", rows=rows)
            assert str(caught.value) == line


def test_a_change_through_h5py_is_no_longer_what_was_sealed(cache, tmp_path):
    path = tmp_path / "c.h5"
    shutil.copy(cache, path)
    with h5py.File(path, "r+") as file:
        file["rows/quality"][3] = 0.25
    line = "is damaged or was changed (checksum of names, labels and structure)"
    with pytest.raises(UserError) as caught:
        FeatureStore.open(path)
    assert str(caught.value) == f"{path}: {line}; {ANEW}"


def test_checksums_come_with_the_batch_and_stay_with_the_row(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    facts = FACTS | {"precision": "bf16"}
    writer = open_writer(path, plan, request=REQUEST, facts=facts)
    vectors = np.random.default_rng(0).standard_normal((1, 3))
    writer.put_images({"center": ([1], vectors, np.ones(1))}, [])
    writer.close()
    part = part_path(path)
    assert not has_seal(part)
    with h5py.File(part, "r") as file:
        crc = int(file["views/center/crc32"][1])
        assert crc == zlib.crc32(vectors[0].astype("<f2").tobytes())
        place = file["views/center/embedding"].id.get_offset() + 6
    assert find_problems(part) == []
    with FeatureStore.open(part, unfinished=True) as store:
        store.embeddings("images")
    flip(part, place, 0)
    assert find_problems(part) == ["views/center/embedding: 1 of 3 rows are not what was computed, the first is row 1"]
    with pytest.raises(UserError, match=r"c.h5.part: is damaged \(views/center/embedding: 1 of 3 rows"):
        open_writer(path, plan_of(tmp_path, [(2, "new", "", "g", 0.1)]), request=REQUEST, facts=facts)
    flip(part, place, 0)
    write(path, plan_of(tmp_path, [(9, "new", "", "g", 0.1), (2, "new", "", "g", 0.1)]), facts=facts)
    with h5py.File(path, "r") as file:
        assert int(file["views/center/crc32"][1]) == crc


def test_a_run_killed_between_seal_and_rename_goes_on(tmp_path):
    path, (_, plan) = tmp_path / "c.h5", small(tmp_path)
    write(path, plan)
    whole = path.read_bytes()
    path.rename(part_path(path))  # what a kill there leaves
    with FeatureStore.open(part_path(path), unfinished=True) as store:
        assert store.is_complete
    writer = open_writer(path, plan, request=REQUEST, facts=FACTS)
    assert not has_seal(part_path(path))  # not while it may change
    writer.finish(path)
    assert path.read_bytes() == whole


def test_a_cache_without_its_seal_is_not_complete(cache, tmp_path):
    path = tmp_path / "c.h5"
    shutil.copy(cache, path)
    break_seal(path)
    with pytest.raises(UserError) as caught:
        FeatureStore.open(path)
    assert str(caught.value) == f"{path}: is not complete; {ANEW}"
