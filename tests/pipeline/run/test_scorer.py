"""The scorer for callers of the Python API."""

from __future__ import annotations

import numpy as np
import pytest

from deltaclip.pipeline.run.scorer import Scorer


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


def test_load_takes_a_string_and_keeps_what_was_trained(scorer, demo_run):
    assert Scorer.load(str(demo_run), device="cpu").labels == scorer.labels == ("quality", "consistency")
    assert not scorer.heads.training
    assert not scorer.backbone.model.training


def test_rows_may_repeat_images_and_prompts(scorer, demo_folder, demo_rows):
    paths = [demo_folder / row["image"] for row in demo_rows[:3]]
    prompts = [row["prompt"] for row in demo_rows[:3]]
    found = scorer.score_files([*paths, *paths[::-1]], [*prompts, *prompts[::-1]], batch_size=2)
    for values in found.scores.columns().values():
        assert values[:3] == pytest.approx(values[3:][::-1], abs=5e-3)  # other batches, other bf16 rounding
    assert found.failed == {}


def test_links_that_leave_the_root_are_refused(scorer, demo_folder, demo_rows, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(demo_folder / demo_rows[0]["image"])
    inside = scorer.score_files([root / "link.png"], ["x"], root=root)
    assert inside.failed == {0: "links to a file outside the image root"}
    assert np.isnan(inside.scores.q).all()
    assert scorer.score_files([root / "link.png"], ["x"]).failed == {}
