"""In memory as good as on disk: columns by position, gaps, labels, and scikit-learn.

A test per case of ../shared/cases that is about data in memory, and inputs of our own
of the same kinds.
"""

import io
import json
import math
import pickle
import re
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SHARED
from PIL import Image
from sklearn.base import clone
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator

from mla_nb.cli import main
from mla_nb.core import InputError, Modality, collate, discover, methods
from mla_nb.data.arrays import (
    as_forms,
    as_items,
    as_labels,
    infer_modality,
    samples_from_arrays,
    splits_from_arrays,
)
from mla_nb.estimator import MultimodalClassifier, held_out
from mla_nb.heads import make_net
from mla_nb.methods.base import Pred, class_scores, scores
from mla_nb.predict import Classifier, as_columns, fit, load, sentences
from mla_nb.runs.config import Run
from mla_nb.runs.run import make_dataset, run
from mla_nb.tools import set_seed
from mla_nb.train.checkpoints import BestEpoch, Saver, epoch_rank
from mla_nb.train.learner import Learner, Loaders, Shuffle, _toy
from mla_nb.train.loaders import Balanced, class_weights
from mla_nb.train.watching import StopOnNaN

discover()
FEW = {"epochs": 2, "batch_size": 16, "threads": 1}


def case(name):
    "The source of a shared case, or a reason to skip"
    path = SHARED / "cases" / name / "case.py"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path.read_text()


def adapted(source):
    "A case of the first edition with the names of this one"
    for old, new in {
        "mla_nb.core import splits_of": "mla_nb.data.arrays import splits_from_arrays",
        "splits_of": "splits_from_arrays",
        "from mla_nb.experiments import fit": "from mla_nb.predict import fit",
        "from mla_nb.learner import scores": "from mla_nb.methods.base import scores",
        "method='concat'))": "method='concat').learner)",
    }.items():
        source = source.replace(old, new)
    return source


def ran(source):
    "What a case prints"
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(source, "case.py", "exec"), {})
    return out.getvalue()


def table(n=60, seed=0):
    "Three kinds of columns, each with gaps; rows are shuffled and some filtered out"
    g = np.random.default_rng(seed)
    k = np.arange(2 * n) % 2
    vectors = [v if i % 5 else None for i, v in enumerate(np.eye(2, 4)[k] * 3)]
    text = pd.array([f"the word is {('no', 'yes')[c]}" for c in k], dtype="string")
    frame = pd.DataFrame({"v": vectors, "note": text, "price": 4.0 * k})
    frame["price"] += g.normal(0, 0.1, 2 * n)
    frame.loc[frame.index % 7 == 0, "note"] = pd.NA
    frame.loc[frame.index % 11 == 0, "price"] = np.nan
    frame["label"] = np.array(["neg", "pos"])[k]
    frame = frame.sample(frac=1, random_state=seed)
    return frame[frame.index >= n // 2][:n]


# The shared cases


def test_case_pandas_shuffled():
    said = ran(adapted(case("pandas_shuffled")))
    assert said.startswith("0 of 160")
    assert "filtered frame" not in said


def test_case_fit_nan_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = ran(adapted(case("fit_nan_traceback"))).splitlines()
    assert said[0].startswith("NaN in some vectors InputError: a, row 0 holds NaN")
    assert re.match("lr far too large InputError: the (loss|gradient) is", said[1])
    assert not list(tmp_path.iterdir())


def test_case_nan_in_test_is_scored():
    source = adapted(case("nan_in_test_is_scored"))
    with pytest.raises(InputError, match=r"a: sample \d+ of the test split holds NaN"):
        ran(source)


def test_case_notebook_run_all_twice(monkeypatch):
    "The cells of the notebook are sorted: parameters, imports, the run"
    source = case("notebook_run_all_twice")
    cells = json.loads((ROOT / "nbs/experiments/run.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"][:3]
    assert code[0].startswith("# mixed precision") and code[2].startswith("cfg = ")
    source = source.replace(
        "== 'code'][:3]", "== 'code'][:3]\ncells[:2] = cells[1::-1]"
    )
    monkeypatch.setenv("MLA_REPO", str(ROOT))
    out = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert "first time : ('concat', 1)" in out.stdout
    assert "cell 2 and 3: ('qmf', 1)" in out.stdout
    assert "second time: ('ogm', 1)" in out.stdout


# Columns


def test_columns_are_read_by_position():
    s = pd.Series([1.5, None, 2.5], index=[2, 0, 1])
    assert as_items("a", s) == [1.5, None, 2.5]
    assert as_items("a", s.astype("Float64")) == [1.5, None, 2.5]
    assert as_items("a", pd.Series(["a", pd.NA], dtype="string")) == ["a", None]
    assert as_items("a", pd.Series(pd.to_datetime(["2020-01-01", None])))[1] is None
    assert as_items("a", pd.Categorical(["x", None])) == ["x", None]
    wide = pd.DataFrame({"p": [1.0, 2.0], "q": [3.0, 4.0]}, index=[1, 0])
    assert [v.tolist() for v in as_items("a", wide)] == [[1, 3], [2, 4]]
    for odd in ("text", 5, {"a": 1}, None, iter([1])):
        with pytest.raises(InputError, match="is no column"):
            as_items("a", odd)


def test_hugging_face_columns():
    import datasets as hf

    frame = table()
    d = hf.Dataset.from_dict(
        {"note": list(frame.note.fillna("")), "price": list(frame.price)}
    )
    labels = hf.Dataset.from_dict({"y": [int(v == "pos") for v in frame.label]})
    p = fit(d, labels["y"], method="concat", **FEW)
    assert list(p.modalities) == ["note", "price"]
    assert p.predict(note=d["note"], price=d["price"]) == p.predict(
        note=frame.note, price=frame.price
    )
    pixels = [np.full((6, 6, 3), 9 * k, np.uint8) for k in range(4)]
    features = hf.Features({"photo": hf.Image()})
    photos = hf.Dataset.from_dict(
        {"photo": [Image.fromarray(v) for v in pixels]}, features=features
    )
    found = as_columns(photos)["photo"]
    assert [v.shape for v in found] == [(3, 6, 6)] * 4
    assert [int(v[0, 0, 0]) for v in found] == [0, 9, 18, 27]


def test_a_filtered_and_shuffled_frame_trains_and_is_saved(tmp_path):
    frame = table()
    x = frame.drop(columns="label")
    p = fit(x, frame.label, method="mla", **{**FEW, "epochs": 6})
    assert isinstance(p, Classifier)
    assert p.score(frame.label, **x) > 0.9
    again = load(p.save(tmp_path / "saved"))
    assert again.predict(**x) == p.predict(**x)
    assert p.explain(**x)[3].names == [p.predict(**x)[3]]
    shuffled = x.sample(frac=1, random_state=3)
    by_label = dict(zip(x.index, p.predict(**x)))
    assert p.predict(**shuffled) == [by_label[i] for i in shuffled.index]
    assert "in memory" in (tmp_path / "saved" / "README.md").read_text()


def test_columns_with_temperatures_are_saved_with_them(tmp_path):
    frame = table()
    x = frame[["v", "price"]]
    x = x[x.notna().any(axis=1)]
    y = frame.label[x.index]
    p = fit(x, y, method="mla", temperature="validation", **FEW)
    q = load(p.save(tmp_path / "saved"))
    assert q.predict_proba(**x).allclose(p.predict_proba(**x), atol=1e-5)
    assert p.result["temperatures"].keys() == {"fused", "v", "price"}


@pytest.mark.parametrize(
    "x, said",
    [
        ({"a": [[1.0, 2.0], [1.0]]}, r"a: row 1 has shape \(1,\) and row 0 has \(2,\)"),
        ({"a": [[math.nan, math.nan], [1.0, 2.0]]}, "a, row 0 holds NaN only"),
        ({"a": [[1.0, 2.0], [1.0, math.inf]]}, "a, row 1: holds infinity"),
        ({"a": np.array([[1.0, 2.0], [1.0, math.inf]])}, "a, row 1 holds infinity"),
        ({"a": [[1.0], [[1.0, 2.0], [3.0]]]}, "a, row 1 is no array of numbers"),
        ({"a": ["x", 5]}, "a, row 1 is int and not text"),
        ({"a": [[1.0], "x"]}, "a, row 1 is str and not an array"),
        ({"a": ["x", ""], "b": [[1.0], None]}, "row 1 has no modality"),
        ({"a": [None, None]}, "a: no sample has it"),
        ({"a": [object(), None]}, "items of type object"),
        ({"a": ["x"]}, "there are 1 a, 2 labels"),
        ({"my text": ["x", "y"]}, "'my text' cannot name a modality"),
        ({"fused": ["x", "y"]}, "'fused' cannot name"),
        ({"keep": ["x", "y"]}, "'keep' cannot name"),
        (["x", "y"], "list has no columns"),
        ({"a": [np.zeros((2, 2, 3), np.uint8), "x"]}, "a, row 1"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_row(x, said):
    with pytest.raises(InputError, match=said) as e:
        fit(x, [0, 1], **FEW)
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def test_half_an_emoji_becomes_a_mark():
    text = ["ab\ud83d", "a\ud83d\ude00"] * 20
    p = fit({"note": text, "v": np.eye(2)[[0, 1] * 20]}, ["n\udc00", "y"] * 20, **FEW)
    assert p.classes == ["n\ufffd", "y"]
    assert set(p.predict(note=text, v=np.eye(2)[[0, 1] * 20])) <= set(p.classes)


def test_pictures_of_any_layout_and_size_in_memory():
    g = np.random.default_rng(0)
    sizes = [(8, 9), (12, 10), (9, 16)] * 16
    k = np.arange(48) % 2
    gray = [g.integers(0, 60, s).astype(np.uint8) + 150 * c for s, c in zip(sizes, k)]
    gray = [v.astype(np.uint8) for v in gray]
    p = fit({"photo": gray}, k, method="concat", **{**FEW, "epochs": 8})
    assert p.modalities["photo"].info == {"size": 8}
    colored = [Image.fromarray(v).convert("RGB") for v in gray]
    assert p.predict(photo=colored) == p.predict(photo=gray)
    tested = scores(p.learner.predictions(p.learner.dls.test))
    assert tested == p.result["test"]
    assert p.score(k, photo=gray) > 0.8


# Labels


def test_labels_of_every_usual_type():
    assert as_labels(np.array([2, 0, 2])) == ([2, 0, 2], [0, 2])
    assert as_labels(torch.tensor([1.0, 0.0])) == ([1, 0], [0, 1])
    assert as_labels(pd.Series([True, False])) == ([True, False], [False, True])
    names = pd.Series(["b", "a", "b"], index=[2, 0, 1])
    assert as_labels(names) == (["b", "a", "b"], ["a", "b"])
    assert as_labels(names.astype("category"))[0] == ["b", "a", "b"]
    assert as_labels(pd.get_dummies(names)) == (["b", "a", "b"], ["a", "b"])
    assert as_labels(names.to_frame())[0] == ["b", "a", "b"]
    assert as_labels(torch.eye(3)[[2, 0, 2]])[0] == [2, 0, 2]
    assert as_labels(np.array([["x"], ["y"]], object))[0] == ["x", "y"]


@pytest.mark.parametrize(
    "y, said",
    [
        ([[1, 1], [0, 1]], "row 0 is .1, 1., which is not one-hot"),
        ([[0.3, 0.7], [0, 1]], "row 0 is .0.3, 0.7., which is not one-hot"),
        ([[0, 1], None], "row 1 has none"),
        (["a", None, "b"], "row 1 has none"),
        ([1.0, math.nan], "row 1 has none"),
        (torch.tensor([1.0, math.nan]), "row 1 has none"),
        (pd.Series(["a", pd.NA], dtype="string"), "row 1 has none"),
        (["a", 1], "row 0 is 'a' .str. and row 1 is 1 .int."),
        ([0.5, 1.0], "numbers with fractions"),
        (list(range(50)), "numeric target"),
        (["a", "a"], "2 rows of 1 class"),
        ([], "0 rows of 0 class"),
        (pd.to_datetime(["2020-01-01", "2021-01-01"]), "type (Timestamp|int)"),
        ([("a", "b"), ("a", "c")], "not one-hot"),
    ],
)
def test_labels_that_cannot_be_classes_are_refused_with_their_row(y, said):
    with pytest.raises(InputError, match=said):
        as_labels(y)


def test_a_score_takes_classes_by_name_even_if_they_are_numbers():
    v, y = np.eye(2)[[0, 1] * 30] * 3, np.array([1, 2] * 30)
    p = fit({"v": v, "w": v}, y, method="concat", **{**FEW, "epochs": 8})
    assert p.classes == ["1", "2"]
    assert p.score(y, v=v, w=v) == 1.0
    assert p.score(pd.Series(y, index=range(60, 0, -1)), v=v, w=v) == 1.0
    with pytest.raises(InputError, match="label of row 1"):
        p.score([1, 7], v=v[:2], w=v[:2])
    with pytest.raises(InputError, match="sample 1: v: holds NaN"):
        p.predict(v=[v[0], v[1] * math.nan])


# Scores and the choice of the epoch


def pred(logits, y, present=None):
    logits = torch.as_tensor(logits)
    here = torch.ones(1, len(y), dtype=torch.bool) if present is None else present
    y = torch.as_tensor(y)
    return Pred(["a"], logits[None], logits, None, here, y, torch.arange(len(y)))


def test_rows_without_an_answer_are_wrong():
    logits = torch.eye(3)[[0, 1, 2, 0]]
    logits[0] = math.nan
    p = pred(logits, [0, 1, 2, 0])
    assert scores(p)["accuracy"] == {"fused": 0.75, "a": 0.75}
    assert class_scores(p)["balanced_accuracy"]["fused"] == pytest.approx(5 / 6)


def test_class_scores_are_those_of_scikit_learn():
    g = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.7, 0.2, 0.1, 0.0]), 200, True, generator=g)
    p = pred(torch.randn(200, 4, generator=g) + torch.eye(4)[y], y)
    found, seen = p.fused.argmax(1), y.unique()
    s = class_scores(p)
    assert s["f1"]["a"] == pytest.approx(
        f1_score(y, found, average="macro", labels=seen)
    )
    recall = (found == y)[:, None] * torch.nn.functional.one_hot(y, 4)
    recall = recall.sum(0)[seen] / y.bincount(minlength=4)[seen]
    assert s["balanced_accuracy"]["a"] == pytest.approx(recall.double().mean().item())
    some = torch.isin(found, seen)
    assert class_scores(pred(p.fused[some], y[some]))["balanced_accuracy"][
        "a"
    ] == pytest.approx(balanced_accuracy_score(y[some], found[some]))


def row(epoch, accuracy=0.5, loss=1.0, f1=0.5):
    valid = {"accuracy": accuracy, "loss": loss, "f1": f1, "balanced_accuracy": f1}
    return {"epoch": epoch, "valid": {k: {"fused": v} for k, v in valid.items()}}


def chosen(rows, best_by, kind=BestEpoch):
    "The epoch that a callback keeps"

    class Learn:
        net = torch.nn.Linear(1, 1)

    keeper = kind(best_by)
    for r in rows:
        Learn.row = r
        keeper.after_epoch(Learn)
    return keeper.best[-1]


def test_the_best_epoch_and_its_ties():
    rows = [row(0, 0.5, 1.0, 0.3), row(1, 0.6, 1.0, 0.2), row(2, 0.6, 0.9, 0.3)]
    assert chosen(rows, "accuracy") == 2
    assert chosen(rows[:2], "f1") == 0
    assert chosen([*rows, row(3, 0.1, 9.0, 0.3)], "balanced_accuracy") == 3
    assert chosen([row(0), row(1), row(2)], "accuracy") == 2  # equal: the last
    assert epoch_rank(row(4), "f1") > epoch_rank(row(3), "f1")
    assert Saver("x", best_by="f1").best_by == "f1"


def test_a_fit_returns_the_best_epoch():
    frame = table()
    p = fit(frame[["price"]].fillna(0), frame.label, **{**FEW, "epochs": 4})
    best = p.result["best_epoch"] - 1
    history = [h["valid"]["accuracy"]["fused"] for h in p.learner.history]
    assert history[best] == max(history)
    again = scores(p.learner.predictions(p.learner.dls.valid))
    assert again["accuracy"]["fused"] == pytest.approx(history[best])


# Classes of unequal size


@pytest.mark.parametrize("name", sorted(methods))
def test_every_method_trains_with_class_weights(name):
    def weights_after(w):
        set_seed(0)
        method = methods[name]()
        mods = list(method.modalities or ("audio", "visual"))
        b, encs = _toy(mods, 24, 0)
        net = make_net(method.head, encs, 3)
        dls = Loaders([b, b], [b], [b], Shuffle(24))
        learn = Learner(net, dls, method, callbacks=[StopOnNaN()], class_weights=w)
        learn.fit(1)
        return torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    plain, ones = weights_after(None), weights_after(torch.ones(3))
    assert torch.allclose(plain, ones, atol=1e-4), "weights of 1 change something"
    assert not torch.allclose(plain, weights_after(torch.tensor([0.1, 1.0, 3.0])))


def test_weights_and_samples_of_rare_classes():
    y = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    w = class_weights(y, 4)
    assert torch.allclose(
        w * y.bincount(minlength=4), torch.tensor([100 / 3] * 3 + [0])
    )
    assert w[y].mean().item() == pytest.approx(1)
    order = Balanced(y, seed=3)
    first = order.rows()
    assert first.equal(order.rows()) and y[first].bincount().tolist() == [34, 33, 33]
    assert set(first[y[first] == 2].tolist()) == set(range(95, 100))
    order.epoch = 1
    assert not order.rows().equal(first)


def test_options_for_unequal_classes_are_fields_of_a_run():
    odd = {"class_weights": "balanced", "sampling": "balanced", "best_by": "f1"}
    assert Run(**odd).id != Run().id
    for k in odd:
        with pytest.raises(InputError, match=f"{k}='equal': must be"):
            Run(**{k: "equal"})


# scikit-learn


def test_scikit_learn_is_imported_when_it_is_needed():
    code = "import sys, mla_nb.estimator; print('sklearn' in sys.modules)"
    code += "; mla_nb.estimator.MultimodalClassifier; print('sklearn' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert out.stdout.split() == [b"False", b"True"], out.stderr
    with pytest.raises(AttributeError, match="no attribute 'Multi'"):
        sys.modules["mla_nb.estimator"].Multi  # noqa: B018


@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_own_checks():
    model = MultimodalClassifier(epochs=20, batch_size=16)
    done = []
    for estimator, check in estimator_checks_generator(model):
        if "array_api" not in str(check):  # needs a switch of SciPy at its import
            check(estimator)
            done.append(check)
    assert len(done) >= 40


def test_frames_in_cross_validation_grids_and_pipelines():
    frame = table(80)
    x, y = frame.drop(columns="label"), frame.label
    model = MultimodalClassifier(epochs=6, batch_size=16)
    assert cross_val_score(model, x, y, cv=2).mean() > 0.75
    grid = GridSearchCV(model, {"method": ["concat", "mla"]}, cv=2).fit(x, y)
    assert isinstance(grid.best_estimator_.classifier_, Classifier)
    assert set(grid.predict(x)) <= {"neg", "pos"}
    pipe = make_pipeline(FunctionTransformer(lambda t: t[["v", "price"]]), model)
    full = x[["v", "price"]].notna().any(axis=1)
    assert list(pipe.fit(x[full], y[full])[-1].feature_names_in_) == ["v", "price"]
    numbers = make_pipeline(StandardScaler(), clone(model))
    assert numbers.fit(frame[["price"]].fillna(0), y).n_features_in_ == 1


def test_an_estimator_is_pickled_with_its_net_and_answers_alike():
    frame = table()
    x = frame.drop(columns="label")
    model = MultimodalClassifier(epochs=2, class_weights="balanced").fit(x, frame.label)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
    assert again.classifier_.about["run"]["class_weights"] == "balanced"
    with pytest.raises(InputError, match="no column 'note'"):
        model.predict(x.drop(columns="note"))
    gone = x.assign(note=None)[x[["v", "price"]].notna().any(axis=1)]
    assert len(model.predict(gone)) == len(gone)
    with pytest.raises(InputError, match="sample 0 has none"):
        model.predict(x[:2].assign(v=None, note=None, price=None))


def test_held_out_rows_are_shared_out():
    y = [0] * 50 + [1] * 9 + [2]
    out = held_out(y, 0.2)
    assert out.sum() == 12 and torch.tensor(y)[~out].unique().tolist() == [0, 1, 2]
    assert not held_out(y, 0.0).any()


def test_waves_keep_their_rate_and_length():
    waves = [
        np.sin(np.arange(800 + 50 * (k % 3)) * (0.1, 0.9)[k % 2]) for k in range(40)
    ]
    forms = {"voice": Modality("audio", "wave", {"rate": 8000, "seconds": 0.1})}
    p = fit({"voice": waves}, [k % 2 for k in range(40)], forms, **FEW)
    assert len(p.predict(voice=waves)) == 40
    s = splits_from_arrays({"voice": waves}, [k % 2 for k in range(40)], forms)
    assert {len(v) for v in s.train.x["voice"]} == {800, 850, 900}


# What columns are: series, vectors, categories


def waves(n, seed=0):
    "Series of one class each, 20 to 40 moments of two channels"
    g, out = np.random.default_rng(seed), []
    for k in range(n):
        t = np.arange(g.integers(20, 41))[:, None]
        noise = g.normal(0, 0.3, (len(t), 2))
        out.append(np.sin((0.3, 1.2)[k % 2] * t) + noise)
    return out


@pytest.mark.parametrize(
    "items, kind, form",
    [
        ([3, None, 4.5], "vector", "row"),
        ([True, False], "vector", "row"),
        (list(torch.tensor([1.0, 2.0])), "vector", "row"),
        ([None, [1, 2, 3], [4, 5, 6]], "vector", "row"),
        (np.zeros((2, 768)), "vector", "row"),
        ([[1.0, "oak"], [None, "elm"]], "vector", "row"),
        (waves(4), "series", "series"),
        (np.zeros((4, 128, 3)), "series", "series"),
        ([np.zeros((20, 12)), np.zeros((31, 12))], "series", "series"),
        ([v.tolist() for v in waves(4)], "series", "series"),
        (np.zeros((4, 64, 94)), "audio", "features"),
        (["a b", None], "text", "text"),
    ],
)
def test_what_items_are_taken_for(items, kind, form):
    mod = infer_modality("a", items)
    assert (mod.kind, mod.form) == (kind, form)


@pytest.mark.parametrize(
    "items",
    [
        np.zeros((4, 4, 4)),  # four bands or four channels?
        np.zeros((4, 3, 128)),  # channels first?
        [np.zeros((3, 20)), np.zeros((3, 31))],
        [np.zeros((9, 20)), np.zeros((12, 31))],
        np.zeros((2, 16000)),  # a second of sound?
        np.zeros((4, 2, 2, 2)),
    ],
)
def test_what_can_be_several_things_is_refused_with_the_spelling(items):
    with pytest.raises(InputError, match=r"say .*forms=dict\(a=") as e:
        infer_modality("a", items)
    assert str(e.value).count(". ") == 0 and str(e.value).endswith(".")


def numbers_of(p, m):
    "What the preprocessor of a modality was fitted to"
    pre = p.net.encoders[m].preprocessor
    return type(pre).__name__, [round(v, 3) for v in pre.mean.tolist()]


def test_columns_of_numbers_are_standardized_and_their_gaps_flagged():
    y = np.arange(80) % 2
    v = np.column_stack([1000.0 * y, np.full(80, 7.0)])
    v[::7, 1] = np.nan
    frame = pd.DataFrame({"price": 100.0 + y, "wood": np.array(["oak", "elm"])[y]})
    frame["wood"] = frame["wood"].astype("category")
    frame["sold"] = y == 1
    frame["v"] = list(v)
    frame["wave"] = waves(80)
    p = fit(frame, y, method="mla", verbose=False, **{**FEW, "epochs": 4})
    kinds = {m: mod.kind for m, mod in p.modalities.items()}
    one = ("price", "wood", "sold", "v")
    assert kinds == {**dict.fromkeys(one, "vector"), "wave": "series"}
    assert p.modalities["wood"].info == {"columns": ["wood"], "numbers": [False]}
    assert p.modalities["wave"].info == {"channels": 2}
    assert numbers_of(p, "price") == ("Facts", [100.5, 0])
    assert numbers_of(p, "v")[1] == [500, 0, 7, 0]
    assert p.net.encoders["wood"].preprocessor.categories == [["elm", "oak"]]
    assert p.net.encoders["sold"].preprocessor.categories == [["False", "True"]]
    flagged = p.net.encoders["v"].preprocessor.inputs([np.array([1000.0, np.nan])])
    assert flagged[0].tolist() == pytest.approx([1.0, 0, 0, 1])
    assert p.score(y, **as_columns(frame, p.modalities)) > 0.9
    assert p.predict(v=v[1], price=101.0) == p.predict(v=v[1:2], price=[101.0])[0]
    assert p.predict(wood="elm", wave=waves(2)[1], sold=True) == "1"


def test_columns_are_joined_to_one_vector():
    y = np.arange(60) % 2
    frame = pd.DataFrame({"price in €": 10.0 * y, "wood": ["oak", "elm"] * 30})
    frame.loc[::5, "price in €"] = np.nan
    frame.loc[::10, "wood"] = None
    frame["note"] = ["so it is", "so it goes"] * 30
    joint = {"facts": ["price in €", "wood"]}
    p = fit(frame, y, joint, method="concat", verbose=False, **FEW)
    assert list(p.modalities) == ["note", "facts"]
    assert p.modalities["facts"].info["numbers"] == [True, False]
    assert p.net.encoders["facts"].preprocessor.categories == [None, ["elm", "oak"]]
    columns = as_columns(frame, p.modalities)
    assert columns["facts"][:2] == [None, [10, "elm"]]  # as an empty cell in a file
    assert columns["facts"][5] == [None, "elm"]
    same = {"note": frame.note, "facts": frame[["price in €", "wood"]]}
    again = fit(same, y, method="concat", verbose=False, **FEW)
    assert again.predict(**same) == p.predict(**columns)
    model = MultimodalClassifier(forms=joint, method="concat", epochs=2)
    model.fit(frame, y)
    assert list(model.feature_names_in_) == ["price in €", "wood", "note"]
    assert len(model.predict(frame[::-1])) == 60
    with pytest.raises(InputError, match="no column 'wood'"):
        model.predict(frame.drop(columns="wood"))


@pytest.mark.parametrize(
    "forms, said",
    [
        ({"pric": "vector"}, "did you mean 'price'"),
        ({"facts": ["price", "wod"]}, "did you mean 'wood'"),
        ({"price": "vectr"}, "did you mean 'vector'"),
        ({"price": "audio"}, "with the rate in Hz"),
        ({"wood": "series"}, "wood, row 0.*(str|not a series)"),
        ({"values": ["price"]}, "'values' cannot name a modality"),
    ],
)
def test_a_wrong_declaration_is_refused(forms, said):
    frame = pd.DataFrame({"price": [1.0, 2.0] * 20, "wood": ["oak", "elm"] * 20})
    with pytest.raises(InputError, match=said):
        fit(frame, [0, 1] * 20, forms, verbose=False, **FEW)


def test_a_word_in_a_column_of_numbers_is_named():
    x = {"a": [[1.0, "oak"], ["n/a", "elm"]] * 10}
    with pytest.raises(InputError, match="a, row 1: 'n/a' stands in a column of num"):
        fit(x, [0, 1] * 10, **FEW)


def test_columns_are_said_in_a_line(capsys):
    x = {"pulse": waves(60), "wood": ["oak", "elm"] * 30}
    fit(x, [0, 1] * 30, **FEW)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "pulse: series of 2 channels, wood: text"
    assert "forms=dict(wood='vector')" in second
    fit(x, [0, 1] * 30, {"wood": "vector"}, **FEW)
    assert "wood: vector of 1 category\n" in capsys.readouterr().out


def test_names_that_moved_still_lead_there():
    with pytest.warns(DeprecationWarning, match="mla_nb.data.arrays.as_items"):
        from mla_nb.core import as_items as old
    assert old is as_items
    with pytest.raises(ImportError):
        from mla_nb.core import as_item  # noqa: F401


# What a training says about itself


def test_a_fit_says_what_a_run_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"n_train": 60, "n_valid": 30, "n_test": 40, "size": 16}
    same = {"method": "mla", "epochs": 2, "encoder": "small", "threads": 1}
    cfg = Run(dataset_args=data, progress=False, **same)
    s, stored = make_dataset(cfg), run(cfg)
    capsys.readouterr()
    p = fit(s, **same)
    keys = {"id", "run", "seconds", "environment", "split"}
    assert set(p.result) == set(stored) - {"id"}
    for k in set(stored) - keys:
        assert p.result[k] == stored[k], k
    said = sentences(p.result)
    assert said and capsys.readouterr().out.splitlines() == said
    fit(s, verbose=False, **same)
    assert capsys.readouterr().out == ""
    again = load(p.save("saved"))
    assert sentences(again.result) == said
    page = (tmp_path / "saved/README.md").read_text()
    assert all(f"- {text}\n" in page for text in said)


def test_findings_name_the_rows_they_were_measured_on():
    same, y = pd.DataFrame({"a": list(np.ones((60, 3)))}), np.arange(60) % 2
    model = MultimodalClassifier(epochs=1, random_state=0)
    for share, part in ((0.1, "validation"), (0, "training")):
        model.set_params(validation_fraction=share)
        model.fit(same, y)
        result = model.classifier_.result
        assert result["tested_on"] == part
        assert any(f"samples of {part}" in text for text in result["findings"])
        assert not any("test split" in text for text in result["thin_classes"])


# One table: in memory, saved, as a graph, and as files with a report


def seats(n=36, seed=0):
    "Two pictures, a ragged series, a price and a wood per row; each may be missing"
    g, y = np.random.default_rng(seed), np.arange(n) % 2
    pixels = g.integers(0, 60, (n, 2, 16, 16, 3)) + 150 * y[:, None, None, None, None]
    front, back = (list(pixels[:, k].astype(np.uint8)) for k in (0, 1))
    frame = pd.DataFrame({"front": front, "back": back, "wave": waves(n, seed)})
    frame["price"] = 100 + 20.0 * y
    frame["wood"] = np.array(["oak", "elm"])[y]
    for k, name in enumerate(("front", "back", "wave")):
        frame.loc[frame.index % 9 == k, name] = None
    frame.loc[frame.index % 5 == 0, "price"] = np.nan
    frame.loc[frame.index % 7 == 0, "wood"] = None
    return frame.sample(frac=1, random_state=seed), np.array(["sell", "keep"])


def stored(frame, y, folder):
    "The same table as files"
    folder.mkdir()
    out = frame.assign(verdict=y)
    for i, r in frame.iterrows():
        for side in ("front", "back"):
            if r[side] is not None:
                Image.fromarray(r[side]).save(folder / f"{side}{i}.png")
                out.loc[i, side] = f"{side}{i}.png"
        if r.wave is not None:
            np.save(folder / f"{i}.npy", r.wave)
            out.loc[i, "wave"] = f"{i}.npy"
    out.to_csv(folder / "seats.csv", index=False)
    return folder / "seats.csv"


JOINT = {"facts": ["price", "wood"]}


@pytest.mark.filterwarnings("ignore")
def test_one_table_is_fitted_scored_saved_and_exported(tmp_path):
    frame, names = seats()
    y = names[frame.index % 2]
    p = fit(frame, y, JOINT, method="mla", verbose=False, **{**FEW, "epochs": 5})
    kinds = {m: (mod.kind, mod.form) for m, mod in p.modalities.items()}
    images = dict.fromkeys(("front", "back"), ("image", "image"))
    more = {"wave": ("series", "series"), "facts": ("vector", "row")}
    assert kinds == {**images, **more}
    model = MultimodalClassifier(method="mla", forms=JOINT, epochs=4, batch_size=16)
    assert cross_val_score(model, frame, y, cv=2).mean() > 0.8
    new, names = seats(10, seed=1)
    asked = as_columns(new, p.modalities)
    again = load(p.save(tmp_path / "saved"))
    told = again.explain(**asked)
    assert told.names == p.predict(**asked)
    assert again.score(names[new.index % 2], **asked) > 0.8
    told.plot()
    run_onnx = pytest.importorskip("mla_nb.export").run_onnx
    pytest.importorskip("onnxruntime")
    graph = run_onnx(again.export(tmp_path / "seats.onnx"))
    read = [{"x": x, "y": 0, "idx": i} for i, x in enumerate(told.items)]
    b = collate(read, {m: e.preprocessor for m, e in again.net.encoders.items()})
    fused = graph(b.x, torch.stack([b.present[m] for m in b.x], 1))[0]
    assert torch.as_tensor(fused).softmax(1).allclose(told.probs, atol=1e-5)


def test_the_same_table_as_files_has_the_same_items_and_a_report(tmp_path, monkeypatch):
    pm = pytest.importorskip("papermill")
    monkeypatch.chdir(tmp_path)
    frame, names = seats(60)
    y = names[frame.index % 2]
    what = "label=verdict,front:image,back:image,wave:series,facts=price+wood:vector"
    table = stored(frame, y, tmp_path / "files")
    main(["prepare", "own", "--table", str(table), "--columns", what, "--size", "16"])
    s = make_dataset(Run(dataset="own", dataset_args="variant=seats"))
    columns = as_columns(frame, JOINT)
    ours, _, modalities = samples_from_arrays(columns, y, as_forms(frame, JOINT))
    for m, mod in s.modalities.items():
        assert (mod.kind, mod.form) == (modalities[m].kind, modalities[m].form)
    assert s.modalities["facts"].info == modalities["facts"].info
    for part in s.parts.values():
        for i, name in enumerate(part.ids):
            item = part[i]["x"]
            mine = {m: v[int(name) - 1] for m, v in ours.x.items()}
            assert {m for m, v in item.items() if v is None} == {
                m for m, v in mine.items() if v is None
            }
            assert item["facts"] is None or item["facts"] == mine["facts"]
            if item["wave"] is not None:
                assert torch.as_tensor(item["wave"]).allclose(mine["wave"])
    report = ROOT / "nbs/experiments/run.ipynb"
    fields = {"dataset": "own", "dataset_args": "variant=seats", "method": "mla"}
    fields |= {**FEW, "progress": False}
    done = pm.execute_notebook(report, "report.ipynb", fields, progress_bar=False)
    outputs = [o for c in done.cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 4


def test_a_saved_classifier_answers_a_table_of_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame, names = seats(60)
    p = fit(frame, names[frame.index % 2], JOINT, verbose=False, **{**FEW, "epochs": 4})
    p.save("saved")
    new, names = seats(12, seed=1)
    table = stored(new, names[new.index % 2], tmp_path / "files")
    text = table.read_text().replace("verdict", "label").replace("100.0", '"100,0"')
    table.write_text(text)
    main(["predict", "saved", "--csv", str(table), "--out", "told.csv"])
    told = pd.read_csv("told.csv")
    assert list(told.answer) == p.predict(**as_columns(new, p.modalities))


def test_a_category_may_be_a_number():
    y = np.arange(60) % 2
    frame = pd.DataFrame({"size": pd.Categorical(40 + y), "shop": y})
    p = fit(frame, y, verbose=False, **{**FEW, "epochs": 6})
    assert p.net.encoders["size"].preprocessor.categories == [["40", "41"]]
    assert p.predict(size=[40, 41.0, "41"]) == ["0", "1", "1"]
    joint = fit(frame, y, {"both": ["size", "shop"]}, verbose=False, **FEW)
    assert joint.modalities["both"].info["numbers"] == [False, True]
