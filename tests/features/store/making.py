"""Small caches for tests, whose vectors say what they are of, and what a whole one must give back."""

from __future__ import annotations

import contextlib
from pathlib import Path

import h5py
import numpy as np

from deltaclip.base.vocabulary import CONSISTENCY, QUALITY
from deltaclip.features.data.images import ImageContent
from deltaclip.features.data.manifest import Manifest
from deltaclip.features.store.integrity import write_seal
from deltaclip.features.store.reader import FeatureStore
from deltaclip.features.store.schema import make_plan, text_key
from deltaclip.features.store.writer import open_writer

VERSION_ONE = Path(__file__).parents[2] / "data" / "cache_version_1.h5"  # `small`, as the release before views wrote it
REQUEST = {"weights_sha256": "a" * 64, "precision": "fp32"}
FACTS = {"dim": 3, "precision": "fp32", "backbone": "test"}
ANEW = "give another path, or remove it and extract again"


def manifest(tmp_path, rows):
    """A manifest from (content or None, prompt, explanation, group, quality) of each row."""
    numbers = {name: np.full(len(rows), np.nan) for name in ("consistency", "quality_std", "consistency_std")}
    return Manifest(
        name="set",
        path=tmp_path / "set.csv",
        image_root=tmp_path,
        images=[f"{number}.png" for number in range(len(rows))],
        prompts=[row[1] for row in rows],
        targets=(QUALITY, CONSISTENCY),
        labels=numbers | {"quality": np.array([row[4] for row in rows], dtype=float)},
        explanations=[row[2] for row in rows],
        groups=[row[3] for row in rows],
        sources=[f"s{number % 2}" if number % 3 else "" for number in range(len(rows))],
        splits=[""] * len(rows),
        places=[""] * len(rows),
    )


def key(content):
    return bytes([content]) * 32


def plan_of(tmp_path, rows):
    contents = [
        ImageContent(key(row[0]), "") if row[0] is not None else ImageContent(None, "no such file") for row in rows
    ]
    return make_plan(manifest(tmp_path, rows), contents)


def vector_of(content):
    """An embedding that says what it is of."""
    return np.random.default_rng(list(content)).standard_normal(3).astype(np.float32)


def norms_of(vectors):
    return np.linalg.norm(vectors, axis=1)


def fill(writer, plan, *, batch=2, fail=(), log=None):
    for kind, keys in (("texts", plan.text_keys), ("images", plan.image_keys)):
        todo = writer.todo(kind)
        for start in range(0, len(todo), batch):
            entries = todo[start : start + batch]
            good = [int(entry) for entry in entries if kind == "texts" or keys[entry][0] not in fail]
            vectors = np.array([vector_of(keys[entry].tobytes()) for entry in good]).reshape(-1, 3)
            norms = norms_of(vectors)
            if log is not None:
                log += [(kind, keys[entry].tobytes()) for entry in entries]
            if kind == "texts":
                writer.put_tokens(entries, keys[entries][:, 0] % 2 == 1, keys[entries][:, 1] + np.uint64(1))
                writer.put(kind, entries, vectors, norms)
            else:
                bad = [(int(entry), f"broken {keys[entry][0]}") for entry in entries if int(entry) not in good]
                writer.put_images({"center": (good, vectors, norms)} if good else {}, bad)


def write(path, plan, *, request=REQUEST, facts=FACTS, **options):
    log = []
    writer = open_writer(path, plan, request=request, facts=facts)
    fill(writer, plan, log=log, **options)
    writer.finish(path)
    return log


def check(path, rows, *, fail=()):
    """Every row of the cache says what the manifest said, and its vectors are those of its content."""
    with FeatureStore.open(path) as store:
        found = store.rows()
        usable = [number for number, row in enumerate(rows) if row[0] is not None and row[0] not in fail]
        assert store.num_rows == len(rows)
        assert store.dim == 3
        assert list(found.text["file"]) == [f"{number}.png" for number in usable]
        assert list(found.text["prompt"]) == [rows[number][1] for number in usable]
        assert list(found.text["group"]) == [rows[number][3] for number in usable]
        assert list(found.text["source"]) == [f"s{number % 2}" if number % 3 else "" for number in usable]
        np.testing.assert_array_equal(found.numbers["quality"], np.float32([rows[number][4] for number in usable]))
        v, t, texts = store.embeddings("images"), store.embeddings("texts"), store.texts()
        for place, number in enumerate(usable):
            content, prompt, explanation = rows[number][:3]
            np.testing.assert_array_equal(v[found.image[place]], vector_of(key(content)))
            assert store.norms()[found.image[place]] == norms_of(vector_of(key(content))[None])[0]
            np.testing.assert_array_equal(t[found.prompt[place]], vector_of(text_key(prompt)))
            entry = found.explanation[place]
            assert (texts[entry] if entry >= 0 else "") == explanation
        assert len(set(texts)) == len(texts)
        np.testing.assert_array_equal(store.truncated(), [text_key(text)[0] % 2 == 1 for text in texts])
        lost = {row[0] for row in rows if row[0] in fail}
        missing = [f"{number}.png" for number, row in enumerate(rows) if row[0] is None]
        assert {file for file, reason in store.failed() if reason == "no such file"} == set(missing)
        assert sorted(reason for _, reason in store.failed() if reason != "no such file") == sorted(
            f"broken {content}" for content in lost
        )


def small(tmp_path):
    rows = [(1, "a", "", "g", 0.5), (2, "b", "why", "g", 0.1), (None, "a", "", "h", 0.2), (1, "c", "", "g", 1.0)]
    return rows, plan_of(tmp_path, rows)


@contextlib.contextmanager
def edited(path):
    """Change a finished cache and seal it again, as a program that knows of seals could."""
    with h5py.File(path, "r+") as file:
        yield file
        kinds = [file["texts"], *(file["views"].values() if "views" in file else ())]
        kinds += [file["anchors"]] if "anchors" in file else []
        places = [kind["embedding"].id for kind in kinds if "embedding" in kind]
        parts = [(place.get_offset(), place.get_storage_size()) for place in places]
    write_seal(path, parts)
