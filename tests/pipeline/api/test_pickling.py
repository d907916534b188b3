"""What people keep can be copied, pickled, saved by torch and sent to a new process."""

from __future__ import annotations

import copy
import io
import pickle

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch.utils.data import DataLoader, Dataset

from deltaclip import DeltaclipMetric, DeltaclipRegressor, Reward, Scorer, UserError


@pytest.fixture(scope="module")
def scorer(demo_run):
    return Scorer.load(demo_run, device="cpu")


@pytest.fixture(scope="module")
def exact(demo_run):
    return Scorer.load(demo_run, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def path(demo_folder, demo_rows):
    return demo_folder / demo_rows[0]["image"]


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # noqa: TID251 - our own


def dumped(value):
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved, "joblib": dumped}


@pytest.fixture(params=COPIES.values(), ids=COPIES.keys())
def copied(request):
    return request.param


def test_a_copy_of_a_scorer_scores_the_same(scorer, path, copied):
    found, expected = copied(scorer).score(path, "a red circle"), scorer.score(path, "a red circle")
    assert found.q == expected.q
    assert found.c == expected.c
    assert copied(found).q == expected.q


def test_a_pickled_scorer_needs_no_run_and_holds_its_weights_once(scorer):
    size_bytes = sum(value.numel() * value.element_size() for value in scorer.backbone.model.state_dict().values())
    size_bytes += sum(value.numel() * value.element_size() for value in scorer.heads.state_dict().values())
    assert size_bytes < len(pickle.dumps(scorer)) < size_bytes + 3_000_000  # the tokenizer's vocabulary


def test_a_copy_of_a_reward_gives_the_same(exact, copied, monkeypatch):
    # With views that hold what cannot be copied, as block means do: here all that a base might see.
    monkeypatch.setattr(Scorer, "seen_views", [["center", "stages", "statistics"]])
    with pytest.warns(UserWarning, match="statistics"):
        reward = Reward(exact)
    pixels = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    expected = reward(pixels, "a red circle")
    for target, score in copied(reward)(pixels, "a red circle").items():
        assert torch.equal(score, expected[target])


def test_a_copy_of_a_metric_goes_on_where_it_was(scorer, path, copied):
    metric = DeltaclipMetric(scorer)
    metric.update(path, "a red circle")
    found = copied(metric)
    found.update(path, "a red circle")
    assert (int(metric.quality_count), int(found.quality_count)) == (1, 2)
    assert found.compute()["q"] == metric.compute()["q"]
    assert int(metric.clone().quality_count) == 1


def test_a_copy_of_an_estimator_predicts_the_same(copied):
    x_NF, y_N = np.random.default_rng(0).normal(size=(40, 8)), np.linspace(0, 1, 40)
    fitted = DeltaclipRegressor(epochs=1).fit(x_NF, y_N)
    assert copied(fitted).predict(x_NF).tolist() == fitted.predict(x_NF).tolist()
    assert clone(fitted).get_params() == fitted.get_params()


def test_results_and_errors_can_be_pickled(train_demo, copied):
    done = train_demo(epochs=1)
    assert copied(done).to_json() == done.to_json()
    error = copied(UserError("is wrong", place="a.csv", remedy="mend it"))
    assert (str(error), error.remedy) == ("a.csv: is wrong; mend it", "mend it")


class Scored(Dataset):
    """Pictures that are scored where they are loaded."""

    def __init__(self, scorer, paths):
        self.scorer, self.paths = scorer, paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return float(self.scorer.score(self.paths[row], "a red circle").q[0])


@pytest.mark.slow
def test_a_spawned_worker_of_a_loader_scores_what_this_process_scores(scorer, demo_folder, demo_rows):
    paths = [demo_folder / row["image"] for row in demo_rows[:4]]
    loader = DataLoader(Scored(scorer, paths), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    found = torch.cat(list(loader)).tolist()
    assert found == pytest.approx([float(scorer.score(path, "a red circle").q[0]) for path in paths], abs=1e-6)
