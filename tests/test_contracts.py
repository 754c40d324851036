"""Every entry of every registry keeps its contract, also those added tomorrow."""

import copy
import json
import pickle

import pytest
import torch

from mla_nb.core import (
    InputError,
    Modality,
    check_dataset,
    datasets,
    discover,
    encoders,
    methods,
    rules,
)
from mla_nb.data.synthetic import FAMILIES, faces, sentences, synthetic, voices
from mla_nb.encoders.base import Encoder, Preprocessor, check_encoder
from mla_nb.heads import ConcatHead, Head, check_head
from mla_nb.methods.base import GradTransform, Method
from mla_nb.methods.fusion import check_rule, make_rule
from mla_nb.methods.joint import Conditioned
from mla_nb.methods.projection import check_projection
from mla_nb.train.learner import check_method

discover()


def subclasses(cls):
    return {s for c in cls.__subclasses__() for s in (c, *subclasses(c))}


@pytest.mark.parametrize("name", sorted(rules))
def test_rule(name):
    check_rule(make_rule(name))


HEADS = sorted(
    (h for h in subclasses(Head) - {Conditioned} if h.__module__.startswith("mla_nb")),
    key=lambda h: h.__name__,
)
NEED_TWO = {"film", "gated"}  # they let one modality act on the others


@pytest.mark.parametrize("head", HEADS, ids=lambda h: h.__name__)
def test_head(head):
    for mods in (("audio", "visual"), ("audio", "visual", "text"), tuple("abcd")):
        check_head(head, mods)
    if not issubclass(head, Conditioned):
        check_head(head, ("audio",))


STAGES = {"g2d": 2, "reconboost": 4}  # epochs until every part has had its turn


@pytest.mark.parametrize("name", sorted(NEED_TWO))
def test_one_modality_cannot_be_joined(name):
    with pytest.raises(InputError, match="joins two or more modalities; there is only"):
        check_method(methods[name], ("audio",))


@pytest.mark.parametrize(
    "mods",
    [
        ("audio",),
        ("audio", "visual"),
        ("audio", "video", "text"),
        ("audio", "b", "c", "d"),
    ],
    ids=len,
)
@pytest.mark.parametrize("name", sorted(methods))
def test_method(name, mods):
    if len(mods) > 1 or name not in NEED_TWO:
        check_method(methods[name], mods, STAGES.get(name, 1))


@pytest.mark.parametrize("rule", sorted(rules))
@pytest.mark.parametrize("name", sorted(methods))
def test_method_with_any_rule(name, rule):
    "A rule given by name works with every method, trained for it or not"
    from dataclasses import replace

    def factory():
        return replace(methods[name](), rule=make_rule(rule))

    factory.__name__ = f"{name} with {rule}"
    check_method(factory, epochs=STAGES.get(name, 1))


def _items(kind, form):
    import numpy as np

    rng, state = np.random.default_rng(0), np.arange(6)
    return {
        "wave": lambda: list(torch.from_numpy(voices(state, rng))),
        "features": lambda: list(torch.randn(6, 32, 32)),
        "image": lambda: list(torch.from_numpy(faces(state, rng))),
        "text": lambda: sentences(state, rng),
        "frames": lambda: [torch.from_numpy(faces(state[:3], rng)) for _ in range(6)],
        "vector": lambda: list(torch.randn(6, 12)),
        "series": lambda: [torch.randn(5 + 3 * k, 2) for k in range(6)],
        "row": lambda: [[k if k % 4 else None, "ab"[k % 2]] for k in range(6)],
    }[form]()


FORMS = {
    "audio": ("wave", "features"),
    "image": ("image",),
    "video": ("frames",),
    "text": ("text",),
    "series": ("series",),
    "vector": ("row",),
}
HUB = {
    "hf_audio",
    "hf_text",
    "hf_image",
    "hf_video",
    "timm_image",
    "timm_video",
}  # need a model to be named: the same contract is in test_hub.py
ENCODERS = [
    (n, k, f)
    for n in sorted(set(encoders) - HUB)
    for k in FORMS
    if n.endswith("_" + k)
    for f in (("vector",) if n == f"features_{k}" else FORMS[k])
]


@pytest.mark.parametrize("name,kind,form", ENCODERS)
def test_encoder(name, kind, form):
    items, mod = (
        _items(kind, form),
        Modality(kind, form, {"rate": 8000, "seconds": 0.6} if form == "wave" else {}),
    )
    torch.manual_seed(0)
    enc = encoders[name](mod, items)
    check_encoder(enc, items)
    stored = json.loads(json.dumps(enc.preprocessor.config()))
    # a stored config builds the same encoder without any data
    again = encoders[name](mod, preprocessor=stored)
    assert again.preprocessor.config() == enc.preprocessor.config()
    again.load_state_dict(enc.state_dict())
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in enc.state_dict().items()
    }


@pytest.mark.parametrize("name,kind,form", ENCODERS)
def test_preprocessor(name, kind, form):
    "Encoded items are small, normalized from buffers; so does the copy of a worker"
    items = _items(kind, form)
    mod = Modality(kind, form, {"rate": 8000, "seconds": 0.6} if form == "wave" else {})
    enc = encoders[name](mod, items)
    p = enc.preprocessor
    assert isinstance(enc, Encoder) and isinstance(p, Preprocessor)
    assert not list(p.parameters()) and not p.state_dict()  # weights are the encoder's
    encoded, x = p(items), p.inputs(items)
    flat = [encoded] if isinstance(encoded, torch.Tensor) else encoded.values()
    assert all(len(v) == len(items) for v in flat)
    if form in ("image", "frames"):
        assert encoded.dtype == torch.uint8  # a quarter of the floats
    for other in (p.copy(), pickle.loads(pickle.dumps(p)), copy.deepcopy(p)):
        assert other.config() == p.config()
        assert _same(other.inputs(items), x)
    one = [p.encode(i) for i in items]
    assert _same(stacked(one), encoded, 1e-4)
    moved = [v.device.type for v in copy.deepcopy(p).to("meta").buffers()]
    assert set(moved) <= {"meta"}  # nothing is left behind when the encoder moves


def stacked(rows):
    if isinstance(rows[0], dict):
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    return torch.stack(rows)


def _same(a, b, eps=0.0):
    if isinstance(a, dict):
        return all(_same(a[k], b[k], eps) for k in b)
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=eps)


def test_every_encoder_has_a_kind():
    assert {n for n, *_ in ENCODERS} | HUB == set(encoders)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_synthetic(family):
    check_dataset(synthetic(family, n_train=60, n_valid=20, n_test=20))


def test_datasets_are_known_to_these_tests():
    "A new dataset needs its check; one that needs files is checked where they are made"
    from mla_nb.data.miniature import MINIATURES

    discover()
    assert set(datasets) == {
        "synthetic",
        "digits",
        "own",
        *MINIATURES,
    }  # miniatures: test_all_datasets.py; own: test_own.py


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"norm": True},
        {"when": "update_first"},
        {"when": "update_first", "norm": True},
        {"denominator": "elementwise", "norm": True},
        {"skip": 1},
    ],
    ids=str,
)
def test_projection(kw):
    check_projection(**kw)


def test_registries_hold_factories():
    for r in (encoders, datasets, methods):
        for name, f in r.items():
            assert callable(f) and f.__doc__, f"{r.kind} {name} has no docstring"


def test_a_name_that_is_taken_is_refused():
    "Two modules may not register one name; a cell of a notebook may run again"
    from mla_nb.tools import Registry

    names = Registry("method")

    def mine():
        "A factory"

    mine.__module__ = "one"
    names(mine)
    names(mine)

    def other():
        "Another one"

    other.__module__ = "two"
    with pytest.raises(InputError, match="two methods are called 'mine', in one and"):
        names(other, "mine")
    other.__module__ = "__main__"
    assert names(other, "mine") is names["mine"]


def test_what_the_package_passes_on_is_no_option():
    from mla_nb.core import call

    def factory(mod, items=None, bins: int = 3):
        return bins

    assert call(factory, {"bins": 5}, mod=1, items=2) == 5
    with pytest.raises(InputError, match=r"unknown option of factory 'items'.*bins"):
        call(factory, {"items": 8}, mod=1, items=2)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Method(ConcatHead({"a": 2}, 3)), "the class of a head"),
        (lambda: Method(ConcatHead, grad_transforms=[GradTransform]), "is a list of"),
    ],
)
def test_a_method_that_is_put_together_wrongly(make, says):
    with pytest.raises(InputError, match=says):
        make()


def test_a_state_that_no_checkpoint_can_hold_is_found():
    import numpy as np

    class Forgetful(GradTransform):
        def state_dict(self):
            return {"n": np.float64(3.0)}

    def forgetful():
        return Method(ConcatHead, grad_transforms=[Forgetful()])

    with pytest.raises(AssertionError, match=r"Forgetful.state_dict\(\) may hold only"):
        check_method(forgetful)


def test_a_preprocessor_keeps_its_arguments():
    from mla_nb.encoders.base import Preprocessor

    class Lost(Preprocessor):
        def __init__(self, bins: int = 3):
            super().__init__()

    with pytest.raises(InputError, match="Lost takes 'bins' and keeps no attribute"):
        Lost().config()


@pytest.mark.parametrize(
    "method, option, value",
    [
        ("mla_released", "rows", 0),
        ("mla_released", "rows", -2),
        ("mla_released", "fusion", "fixd"),
        ("pmr", "alpha", -1),
        ("pmr", "alpha", "x"),
        ("mmpareto", "gamma", "abc"),
        ("mmpareto", "gamma", 0),
        ("cggm", "lam", -1),
        ("cggm", "rho", "abc"),
        ("agm", "alpha", -1),
        ("arl", "gamma", "abc"),
        ("dropout", "p", 1.5),
        ("g2d", "tau", 0),
        ("mses", "patience", 0),
        ("ogm", "alpha", -1),
        ("ogm_plus", "factor", 0.5),
        ("relearning", "every", 0),
        ("umt", "scale", -1),
    ],
)
def test_a_wrong_option_of_a_method_is_one_sentence(method, option, value):
    with pytest.raises(InputError, match=f"{option}|{value}"):
        methods[method](**{option: value})
