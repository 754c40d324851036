"""Missing modalities: the masks, and the splits that lost items.

Every method is trained with half of its inputs gone.
"""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from test_learner import batch, learner

from mla_nb.cli import main
from mla_nb.compare import compared, plan, table
from mla_nb.core import (
    InputError,
    Modality,
    Samples,
    Splits,
    TensorSplit,
    check_dataset,
    collate,
    discover,
    encoders,
    methods,
)
from mla_nb.data.synthetic import synthetic
from mla_nb.encoders.base import Preprocessor
from mla_nb.heads import SharedHead, make_net
from mla_nb.methods.base import Method, joint_turn, predictions, scores
from mla_nb.methods.mla import mla
from mla_nb.methods.projection import GradProjection
from mla_nb.methods.qmf import QMFLoss
from mla_nb.missing import (
    Hidden,
    bayes_left,
    blank,
    hide,
    missing_mask,
    sweep,
    with_missing,
)
from mla_nb.runs.config import Run
from mla_nb.runs.run import load_run, make_dataset, run
from mla_nb.tools import as_rate, rate_text, read_json, set_seed
from mla_nb.train.learner import Learner, Schedule
from mla_nb.train.loaders import Shuffle, loaders
from mla_nb.train.watching import StopOnNaN

discover()
MODS = ["audio", "visual", "text"]
SIZES = "n_train=96,n_valid=48,n_test=64"
TINY = {"dataset_args": SIZES, "epochs": 1, "progress": False, "threads": 1}


@pytest.fixture(scope="module")
def tiny():
    return synthetic(n_train=96, n_valid=48, n_test=64)


# masks --------------------------------------------------------------------------------


def test_a_mask_is_fixed_by_its_seed_and_split_and_by_nothing_else():
    a = missing_mask(500, MODS, 0.5, 3)
    assert (
        a.equal(missing_mask(500, MODS, 0.5, 3))
        and a.dtype == torch.bool
        and a.shape == (3, 500)
    )
    assert not a.equal(missing_mask(500, MODS, 0.5, 4)) and not a.equal(
        missing_mask(500, MODS, 0.5, 3, part=1)
    )
    torch.manual_seed(9)  # no global state is read
    assert a.equal(missing_mask(500, MODS, 0.5, 3))
    assert a[:, :70].equal(missing_mask(70, MODS, 0.5, 3))  # nor the number of samples
    assert a.flip(0).equal(
        missing_mask(500, MODS[::-1], 0.5, 3)
    )  # nor the order of modalities


@pytest.mark.parametrize("rate", [0, 0.2, 0.5, 0.8, 0.99])
@pytest.mark.parametrize("M", [1, 2, 3])
def test_one_is_always_left_and_the_effective_rate_is_as_said(rate, M):
    stay = missing_mask(20000, MODS[:M], rate, 1)
    assert stay.any(0).all()
    assert abs((~stay).double().mean() - (rate - rate**M / M)) < 0.01
    if not rate or M == 1:
        assert stay.all()


def test_masks_of_higher_rates_hide_what_those_of_lower_rates_hide():
    masks = [missing_mask(1000, MODS, r, 5) for r in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for low, high in zip(masks, masks[1:]):
        assert not (high & ~low).any()


def test_rates_per_modality():
    stay = missing_mask(20000, MODS, {"audio": 0.6, "text": 0.2})
    hidden = 1 - stay.double().mean(1)
    assert (
        abs(hidden[0] - 0.6) < 0.02 and hidden[1] == 0 and abs(hidden[2] - 0.2) < 0.02
    )
    assert missing_mask(50, MODS, "audio=.6,text=.2").equal(stay[:, :50])


def test_what_a_sample_never_had_does_not_come_back_and_its_last_item_stays():
    had = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0)) > 0.5
    stay = missing_mask(5000, MODS, 0.9, 0, had=had)
    assert not (stay & ~had).any() and stay.any(0).equal(had.any(0))
    only = had.sum(0) == 1
    assert stay[:, only].equal(had[:, only])


# rates as text ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "v,text",
    [
        ("", ""),
        (0, ""),
        ("0", ""),
        (0.5, "0.5"),
        (".50", "0.5"),
        ("text=.2, audio=0.5", "audio=0.5,text=0.2"),
        ({"audio": 0.5}, "audio=0.5"),
    ],
)
def test_every_way_to_write_a_rate_is_one(v, text):
    assert (
        rate_text(v) == text
        and rate_text(rate_text(v)) == text
        and as_rate(text) == as_rate(v)
    )


@pytest.mark.parametrize(
    "v",
    [
        1,
        -0.1,
        "1",
        "nan",
        "inf",
        "half",
        "audio",
        "audio=",
        "=.5",
        "audio=1.5",
        "audio=.5,.5",
        "audio=.5,audio=.2",
        True,
        None,
        [0.5],
        {"audio": None},
        {"audio": "x"},
    ],
)
def test_what_is_no_rate_is_refused(v):
    with pytest.raises(
        InputError, match="^missing=.*must be a rate from 0 to below 1.*e.g. "
    ) as e:
        as_rate(v, "missing")
    assert "\n" not in str(e.value)


# splits that lost items ---------------------------------------------------------------


def prepared(tmp_path):
    "A dataset on disk, some of whose samples lack an item to begin with"
    from mla_nb.data.decode import encode_image
    from mla_nb.data.prepared import load_prepared, prepare

    def read(k):
        return {
            "id": f"s{k}",
            "y": "ab"[k % 2],
            "image": None
            if k % 5 == 0
            else encode_image(torch.full((3, 8, 8), k).byte()),
            "text": f"say {k}",
        }

    mods = {"image": Modality("image", "image"), "text": Modality("text", "text")}
    return load_prepared(
        prepare(
            tmp_path / "p",
            "p",
            list("ab"),
            mods,
            {"train": list(range(40)), "valid": [1, 2], "test": [3, 4]},
            read,
            {},
            {},
            shard=15,
            progress=False,
        )
    )


@pytest.mark.parametrize("fill", ["skip", "zeros"])
def test_splits_in_memory_and_on_disk_lose_the_same_items(tmp_path, fill):
    disk = prepared(tmp_path)
    part = disk.train
    memory = Samples(
        {m: [part[i]["x"][m] for i in range(40)] for m in disk.modalities}, part.y
    )
    assert (
        part.has("image").equal(memory.has("image")) and part.has("image").sum() == 32
    )
    a, b = (
        with_missing(replace(disk, train=p), 0.5, seed=2, fill=fill).train
        for p in (part, memory)
    )
    for i, (v, w) in enumerate(
        zip(a.__getitems__(list(range(40))), (b[i] for i in range(40)))
    ):
        assert (
            v["idx"] == w["idx"] == i
            and v["y"] == w["y"]
            and v["x"]["text"] == w["x"]["text"]
        )
        assert (v["x"]["image"] is None) == (w["x"]["image"] is None) and (
            v["x"]["image"] is None or v["x"]["image"].equal(w["x"]["image"])
        )
    for m in disk.modalities:
        assert a.has(m).equal(b.has(m)) and len(a.column(m)) == len(b.column(m)) == int(
            (a.stay[m] & part.has(m)).sum()
        )
    assert len(a) == 40 and a.y.equal(part.y)
    left, kept = (
        a.column("text"),
        [part[i]["x"]["text"] for i in range(40) if a.stay["text"][i]],
    )
    assert (
        list(left) == left[:] == kept
        and left[::3] == kept[::3]
        and left[-1] == kept[-1]
    )


def test_with_missing_hides_where_it_was_told_to(tiny):
    s = with_missing(tiny, 0.5, "text=.9", seed=1)
    check_dataset(s)
    gone = {
        n: {m: 1 - p.has(m).double().mean().item() for m in MODS}
        for n, p in s.parts.items()
    }
    assert all(0.2 < gone[n][m] < 0.7 for n in ("train", "valid") for m in MODS)
    assert (
        gone["test"]["audio"] == gone["test"]["visual"] == 0
        and gone["test"]["text"] > 0.8
    )
    assert all(
        abs(s.info["missing"][n][m] - gone[n][m]) < 1e-3 for n in gone for m in MODS
    )
    assert (
        with_missing(tiny) is tiny
        and with_missing(tiny, 0.5).test is tiny.test
        and with_missing(tiny, rate_test=0.5).train is tiny.train
    )
    twice = with_missing(s, 0.5, seed=7)
    for m in MODS:
        assert not (twice.train.has(m) & ~s.train.has(m)).any()
    assert torch.stack([twice.train.has(m) for m in MODS]).any(0).all()


def test_zeros_pass_for_data_and_absence_does_not(tiny):
    skip, zeros = (with_missing(tiny, 0.5, 0.5, fill=f) for f in ("skip", "zeros"))
    lost = {m: int((~skip.test.stay[m]).nonzero()[0]) for m in MODS}
    for m, i in lost.items():
        assert skip.test[i]["x"][m] is None
        v, was = zeros.test[i]["x"][m], tiny.test[i]["x"][m]
        assert (
            v == ""
            if m == "text"
            else (v.shape == was.shape and v.dtype == was.dtype and not v.any())
        )
    assert (
        zeros.test.has("audio").all()
        and len(zeros.test.column("audio")) == len(skip.test.column("audio")) < 64
    )
    assert blank(torch.ones(4, 3, 8, 8).byte()).sum() == 0 and blank("words") == ""


def test_best_possible_accuracy_of_what_is_left(tiny):
    assert with_missing(tiny, 0.5).bayes == pytest.approx(
        tiny.bayes
    )  # nothing is missing on test
    stay = {
        "audio": torch.tensor([True, False]),
        "visual": torch.tensor([True, True]),
        "text": torch.tensor([False, False]),
    }
    b = bayes_left(tiny.bayes, stay)
    assert b["audio",] == tiny.bayes["audio",]  # over those who have it
    assert (
        b["audio", "visual"]
        == b[tuple(MODS)]
        == (tiny.bayes["audio", "visual"] + tiny.bayes["visual",]) / 2
    )
    assert b["text",] != b["text",]  # nobody has text


@pytest.mark.parametrize(
    "rates,says",
    [
        ((0.5, "smell=.5"), "unknown modality 'smell'"),
        ((1.5,), "^missing=1.5: must be"),
        ((0.5, "x"), "^missing_test='x': must be"),
    ],
)
def test_wrong_rates_of_a_dataset(tiny, rates, says):
    with pytest.raises(InputError, match=says):
        with_missing(tiny, *rates)


def test_wrong_fills(tiny):
    with pytest.raises(InputError, match="unknown fill 'zero': did you mean 'zeros'"):
        with_missing(tiny, 0.5, fill="zero")
    with pytest.raises(InputError, match="changes nothing where nothing is missing"):
        with_missing(tiny, fill="zeros")
    with pytest.raises(InputError, match="unknown fill 'nan'"):
        Hidden(tiny.train, {}, "nan")


# every method, with half of its inputs gone -------------------------------------------


def small_nets(s, method):
    set_seed(0)
    mods = {
        m: mod
        for m, mod in s.modalities.items()
        if m in (method.modalities or s.modalities)
    }
    return make_net(
        method.head,
        {
            m: encoders[f"small_{mod.kind}"](mod, s.train.column(m))
            for m, mod in mods.items()
        },
        len(s.classes),
    )


@pytest.fixture(scope="module")
def split_incomplete(tiny):
    return with_missing(tiny, 0.5, 0.5, seed=0)


@pytest.mark.parametrize("name", sorted(methods))
def test_every_method_trains_at_half_and_never_reads_what_is_absent(
    name, split_incomplete
):
    """Weights, statistics and answers are the same to the bit.

    Absent inputs become NaN, absent tokens a number that no embedding has.
    """
    nets, preds = [], []
    for poison in (False, True):
        method = methods[name]()
        net = small_nets(split_incomplete, method)
        before = {k: v.clone() for k, v in net.state_dict().items()}
        dls = loaders(
            split_incomplete, {m: e.preprocessor for m, e in net.encoders.items()}, 32
        )
        for dl in (dls.train, dls.valid, dls.test) if poison else ():
            b = dl.dataset.batch
            for m in b.x:
                gone = ~b.present[m]
                if m == "text":
                    b.x[m]["ids"][gone], b.x[m]["mask"][gone] = 10**6, True
                else:
                    floats = b.x[m].is_floating_point()  # pictures are bytes
                    b.x[m][gone] = float("nan") if floats else 255
                assert gone.any()
        learn = Learner(net, dls, method, callbacks=[Schedule(), StopOnNaN()]).fit(2)
        learn.validate()
        nets.append(net.state_dict())
        preds.append(predictions(net, learn.method, dls.test))
    assert all(v.isfinite().all() for v in nets[0].values())
    assert all(a.equal(nets[1][k]) for k, a in nets[0].items())
    assert preds[0].fused.isfinite().all() and preds[0].fused.equal(preds[1].fused)
    frozen = {k for k in before if name == "mla_frozen" and k.startswith("head")}
    assert not [
        k
        for k, v in nets[0].items()
        if v.equal(before[k]) and k.endswith("weight") and k not in frozen
    ], "some weights never moved"


def test_encoders_and_their_batch_norm_see_present_rows_only(split_incomplete):
    net = small_nets(split_incomplete, mla())
    seen = dict.fromkeys(MODS, 0)
    for m, e in net.encoders.items():

        def count(_, args, m=m):
            seen[m] += len(args[0]["ids"] if m == "text" else args[0])

        e.register_forward_pre_hook(count)
    for make in (methods["concat"], mla):
        seen.update(dict.fromkeys(MODS, 0))
        dls = loaders(
            split_incomplete, {m: e.preprocessor for m, e in net.encoders.items()}, 32
        )
        Learner(make_net(make().head, dict(net.encoders), 6), dls, make()).fit(1)
        assert seen == {m: int(split_incomplete.train.has(m).sum()) for m in MODS}


def test_projection_remembers_the_mean_of_those_who_are_there():
    "In turns of one modality, and when the edit is given a joint turn"

    class Spy(GradProjection):
        def update(self, turn):
            features = turn.features.items()
            rows = torch.cat([z[turn.batch.present[m]] for m, z in features])
            mean = rows.detach().mean(0)

            def spied(P, r, *_):
                means.append(torch.allclose(r, mean, atol=1e-6))
                return P

            with patch("mla_nb.methods.projection.update_projection", spied):
                super().update(turn)

    for method in (
        mla(),
        Method(SharedHead, joint_turn, grad_transforms=[GradProjection()]),
    ):
        means = []
        learner(
            replace(method, grad_transforms=[Spy()]),
            [batch(missing=0.5, seed=k) for k in range(3)],
        ).fit(1)
        assert means and all(means)


def test_qmf_measures_history_against_samples_that_have_the_modality():
    "A sample without a modality keeps a history of zero; it is not the easiest one"
    loss = QMFLoss()
    loss.history = {"audio": torch.tensor([2.0, 4.0, 0.0, 0.0])}
    rows = torch.tensor([0, 1])
    loss.later = True
    assert loss.remember("audio", rows, torch.tensor([1.0, 1.0])).tolist() == [0.0, 1.0]
    loss.later = False  # in the first epoch nobody knows who will come
    assert loss.remember(
        "audio", rows, torch.tensor([1.0, 1.0])
    ).tolist() == pytest.approx([4 / 6, 1.0])
    b = batch(missing=0.5)
    learn = learner(methods["qmf"](), [b])
    learn.dls = replace(learn.dls, sampler=Shuffle(12))
    learn.fit(3)
    h = learn.method.grad_transforms[0].history["audio"]
    assert (h > 0).equal(b.present["audio"]) and learn.method.grad_transforms[0].later


def test_a_first_sample_that_lacks_much_does_not_hide_how_large_a_split_is():
    big = Samples(
        {"audio": [None] + [torch.zeros(1000)] * 31, "text": [torch.zeros(1)] * 32},
        [0, 1] * 16,
    )
    s = Splits(
        "s",
        ["a", "b"],
        {m: Modality("audio", "wave") for m in ("audio", "text")},
        big,
        big,
        big,
    )
    preprocessors = {m: Preprocessor() for m in s.modalities}
    for ready, kept in ((10**6, TensorSplit), (50_000, Samples)):
        assert type(loaders(s, preprocessors, ready=ready).train.dataset) is kept


def test_a_sweep_is_what_the_hidden_split_would_give(tiny):
    net = small_nets(tiny, mla())
    dls = loaders(tiny, {m: e.preprocessor for m, e in net.encoders.items()})
    swept = sweep(net, mla(), dls.test, (0, 0.4, 0.8), seed=3)
    assert swept[0].fused.equal(predictions(net, mla(), dls.test).fused)
    for r in (0.4, 0.8):
        hidden = loaders(
            with_missing(tiny, rate_test=r, seed=3),
            {m: e.preprocessor for m, e in net.encoders.items()},
        ).test
        p = predictions(net, mla(), hidden)
        assert p.present.equal(swept[r].present) and torch.allclose(
            p.fused, swept[r].fused, atol=1e-6
        )
    b = collate(
        [tiny.test[i] for i in (5, 2)],
        {m: e.preprocessor for m, e in net.encoders.items()},
    )
    assert (
        hide(b, dict.fromkeys(MODS, torch.arange(64) == 2)).present["audio"].tolist()
        == [False, True]
        and b.present["audio"].all()
    )


# runs ---------------------------------------------------------------------------------


def test_a_run_with_missing_modalities_by_any_door(tmp_path, monkeypatch):
    cfg = Run(**TINY, missing=0.5, missing_test={"text": 0.2, "audio": 0.5})
    assert (cfg.missing, cfg.missing_test) == ("0.5", "audio=0.5,text=0.2")
    a = run(cfg, root=tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    main(
        [
            "train",
            "--dataset_args",
            SIZES,
            "--epochs",
            "1",
            "--progress",
            "false",
            "--threads",
            "1",
            "--missing",
            ".5",
            "--missing_test",
            "text=.2,audio=.5",
            "--root",
            "b",
        ]
    )
    b = read_json(tmp_path / "b" / a["id"] / "result.json")
    assert (
        a["test"] == b["test"]
        and a["run"]["missing"] == "0.5"
        and a["bayes"]["fused"] < 0.96
    )
    w = [load_file(tmp_path / r / a["id"] / "model.safetensors") for r in "ab"]
    assert all(w[0][k].equal(w[1][k]) for k in w[0])
    net, method, about = load_run(tmp_path / "a" / a["id"])
    s = make_dataset(Run(**about["run"]))
    assert about["dataset"]["missing"] == s.info["missing"]
    again = predictions(
        net,
        method,
        loaders(s, {m: e.preprocessor for m, e in net.encoders.items()}).test,
    )
    assert scores(again)["accuracy"] == pytest.approx(a["test"]["accuracy"])
    assert run(cfg, root=tmp_path / "a") == a  # done, and not done again


def test_missing_at_test_only_is_the_same_net_under_a_mask(tmp_path):
    plain, masked, zeros = (
        run(Run(**TINY, **kw), root=tmp_path)
        for kw in (
            {},
            {"missing_test": 0.6},
            {"missing_test": 0.6, "missing_fill": "zeros"},
        )
    )
    w = [
        load_file(tmp_path / r["id"] / "model.safetensors")
        for r in (plain, masked, zeros)
    ]
    assert all(w[0][k].equal(w[1][k]) and w[0][k].equal(w[2][k]) for k in w[0])
    net, method, _ = load_run(tmp_path / plain["id"])
    dl = loaders(
        make_dataset(Run(**TINY)), {m: e.preprocessor for m, e in net.encoders.items()}
    ).test
    assert scores(sweep(net, method, dl, [0.6])[0.6])["accuracy"] == pytest.approx(
        masked["test"]["accuracy"]
    )
    assert (
        zeros["test"]["loss"] != masked["test"]["loss"]
    )  # zeros are read, absence is not


def test_tables_tell_rates_apart_and_old_runs_stay_known(tmp_path):
    old = run(Run(**TINY), root=tmp_path)
    for n in ("config.json", "result.json"):  # as written before these fields existed
        path = tmp_path / old["id"] / n
        about = read_json(path)
        for k in ("missing", "missing_test", "missing_fill"):
            del about["run"][k]
        path.write_text(json.dumps(about))
    (tmp_path / old["id"] / "checksums.json").unlink()
    run(Run(**TINY, seed=1), root=tmp_path)
    run(Run(**TINY, missing_test=0.5), root=tmp_path)
    run(Run(**TINY, missing_test=0.5, missing_fill="zeros"), root=tmp_path)
    assert run(Run(**TINY), root=tmp_path)["id"] == old["id"] == Run(**TINY).id
    t = table(tmp_path)
    assert (
        "| mla epochs=1 | 2 |" in t
        and "mla epochs=1, missing_test=0.5 | 1 |" in t
        and "mla epochs=1, missing_test=0.5, missing_fill=zeros | 1 |" in t
    )
    groups = compared(tmp_path)  # other rates are groups of their own
    assert sorted(len(rows) for g in groups.values() for rows in g.values()) == [
        1,
        1,
        2,
    ]
    assert len(groups) == 3 and sum("missing_test=0.5" in h for h in groups) == 2
    with pytest.raises(InputError, match="missing_test is '' there and '0.5' here"):
        run(Run(**TINY, missing_test=0.5, name=old["id"]), root=tmp_path)


@pytest.mark.parametrize(
    "flags,says",
    [
        (["--missing", "1"], "missing='1': must be a rate from 0 to below 1"),
        (["--missing", "-.5"], "missing='-.5': must be a rate"),
        (["--missing_test", "lots"], "missing_test='lots': must be a rate"),
        (["--missing", "audio=.5,audio=.6"], "must be a rate"),
        (["--missing", "adio=.5"], "unknown modality 'adio': did you mean 'audio'?"),
        (["--missing_test", "smell=.5"], "unknown modality 'smell'"),
        (
            ["--missing", ".5", "--missing_fill", "nan"],
            "missing_fill='nan': must be 'skip' or 'zeros'",
        ),
        (["--missing_fill", "zeros"], "changes nothing where nothing is missing"),
        (["--mising", ".5"], "unknown option '--mising': did you mean '--missing'?"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    flags, says, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["train", "--dataset_args", SIZES, *flags])
    assert (
        says in str(e.value.code)
        and str(e.value.code).startswith("mla train: ")
        and "\n" not in str(e.value.code)
    )
    assert not any(tmp_path.iterdir())


def test_plans(tmp_path):
    with pytest.raises(InputError, match="unknown modality 'smell'"):
        plan(f"synthetic({SIZES})", "concat", "0:2", missing="smell=.5")
    assert not any(tmp_path.iterdir())
