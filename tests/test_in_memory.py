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

from mla_nb.core import (
    InputError,
    Modality,
    as_items,
    as_labels,
    discover,
    methods,
    splits_from_arrays,
)
from mla_nb.estimator import MultimodalClassifier, held_out
from mla_nb.heads import make_net
from mla_nb.methods.base import Pred, class_scores, scores
from mla_nb.predict import Classifier, as_columns, fit, load
from mla_nb.runs.config import Run
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
        ({"a": [[1.0, math.nan], [1.0, 2.0]]}, "a, row 0 holds NaN"),
        ({"a": [[1.0, 2.0], [1.0, math.inf]]}, "a, row 1 holds NaN or infinity"),
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
    return keeper.best[2]


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
