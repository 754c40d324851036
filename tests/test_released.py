"""Checkpoints of the released code: told apart and loaded.

Those that are damaged or dangerous are refused with a sentence.
"""

import math
import os
import pickle

import pytest
import torch

from mla_nb.core import Batch, InputError
from mla_nb.encoders.masked import CAVMAE, M3AE
from mla_nb.heads import ConcatHead, SeparateHead, SharedHead, SumHead
from mla_nb.methods.base import predict
from mla_nb.released import (
    HEADS,
    LIKELY,
    SLOTS,
    cavmae_shapes,
    load_released,
    m3ae_shapes,
    released_shapes,
    which_head,
    which_model,
)

SMALL = {"m3ae": m3ae_shapes(64, 2, 50), "cavmae": cavmae_shapes(64, 2, 1, 64, 32)}
INPUTS = {
    "text": lambda n: {
        "ids": torch.randint(1, 50, (n, 12)),
        "mask": torch.arange(12) < torch.randint(1, 12, (n, 1)),
    },
    "video": lambda n: torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8),
    "image": lambda n: torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8),
}


def made(model, head="gs", classes=4):
    "Random numbers under the released names, of a small size"
    g = torch.Generator().manual_seed(0)

    def value(k, s):
        if k.endswith("num_batches_tracked"):
            return torch.zeros((), dtype=torch.long)
        if k.endswith("running_var") or (len(s) == 1 and k.endswith("weight")):
            return torch.ones(s)
        return torch.randn(s, generator=g) * (2 / max(1, math.prod(s[1:]))) ** 0.5

    return {
        k: value(k, s)
        for k, s in released_shapes(model, head, classes, **SMALL).items()
    }


@pytest.fixture
def saved(tmp_path):
    def save(state, name="released.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return save


def batch(mods, model, n=5):
    torch.manual_seed(1)
    x = {
        m: torch.randn(n, 128, 64)
        if m == "audio" and model != "av"
        else torch.randn(n, 40, 33)
        if m == "audio"
        else INPUTS[m](n)
        for m in mods
    }
    return Batch(
        x,
        torch.zeros(n, dtype=torch.long),
        {m: torch.ones(n, dtype=torch.bool) for m in mods},
        torch.arange(n),
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("model", SLOTS)
def test_every_model_and_head_is_told_and_predicts(saved, model, head):
    state, classes = made(model, head, 5), 5
    net, method, about = load_released(saved(state))
    assert (about["model"], about["head"], about["classes"], about["modalities"]) == (
        model,
        head,
        classes,
        list(SLOTS[model]),
    ) and not net.training
    assert (
        type(net.head)
        is {
            "gs": SharedHead,
            "concat": ConcatHead,
            "sum": SumHead,
            "qmf": SeparateHead,
        }[head]
    )
    p = predict(net, method, b := batch(about["modalities"], model))
    assert (
        p.fused.shape == (5, 5)
        and p.fused.isfinite().all()
        and set(p.uni) == set(SLOTS[model])
    )
    bare, z = {k.removeprefix("module."): v for k, v in state.items()}, net.features(b)
    names = {
        "gs": ["fusion_module.fc_out"] * 3,
        "sum": [f"fusion_module.fc_{x}" for x in "xyz"],
        "qmf": ["audio_fc", "visual_fc", "txtual_fc"],
    }.get(head)
    if names:  # each modality's logits are its own matrix times its features
        for name, (m, f) in zip(names, z.items()):
            if head != "sum":
                assert torch.allclose(
                    p.uni[m],
                    f @ bare[f"{name}.weight"].T + bare[f"{name}.bias"],
                    atol=1e-5,
                )
    if head == "sum":
        assert torch.allclose(
            p.fused,
            sum(
                f @ bare[f"{n}.weight"].T + bare[f"{n}.bias"]
                for n, f in zip(names, z.values())
            ),
            atol=1e-4,
        )
    if head == "concat":
        assert torch.allclose(
            p.fused,
            torch.cat(list(z.values()), 1) @ bare["fusion_module.fc_out.weight"].T
            + bare["fusion_module.fc_out.bias"],
            atol=1e-4,
        )


@pytest.mark.parametrize("model", SLOTS)
def test_every_entry_is_used_or_known_to_be_idle(saved, model):
    "Changing a used entry changes the answer, changing an idle one does not"
    state = made(model)
    net, method, about = load_released(saved(state))
    b = batch(about["modalities"], model)
    before = predict(net, method, b).fused
    idle = {f"module.{k}" for k in about["idle"]}
    spoilt = {k: v + 1 if k in idle else v for k, v in state.items()}
    assert predict(*load_released(saved(spoilt))[:2], b).fused.equal(before)
    assert len(idle) + len(net.state_dict()) == len(state)
    for k in [k for k in state if k not in idle and state[k].is_floating_point()][
        :: 97 if model == "av" else 23
    ]:
        state[k] += 0.5 * torch.randn(state[k].shape)
        after = predict(*load_released(saved(state))[:2], b).fused
        assert not after.equal(before), f"{k} makes no difference"
        before = after


def test_words_and_pictures_are_in_the_slots_of_sound_and_video(saved):
    net = load_released(saved(made("m3ae")))[0]
    assert (
        isinstance(net.encoders["text"].net, M3AE)
        and isinstance(net.encoders["image"].net, M3AE)
        and net.encoders["text"].net.pool == "all"
    )
    assert hasattr(net.encoders["text"].net, "tokens") and not hasattr(
        net.encoders["image"].net, "tokens"
    )
    net = load_released(saved(made("modal3")))[0]
    assert [type(getattr(e, "net", e)) for e in net.encoders.values()] == [
        CAVMAE,
        M3AE,
        M3AE,
    ]


@pytest.mark.parametrize("likely", LIKELY)
def test_likely_dataset(saved, likely):
    model, classes = likely
    assert (
        load_released(saved(made(model, "gs", classes)))[2]["likely"] == LIKELY[likely]
    )


def test_names_without_module_are_read_too(saved):
    a, b = (
        load_released(saved({k.removeprefix(p): v for k, v in made("m3ae").items()}))[
            0
        ].state_dict()
        for p in ("", "module.")
    )
    assert all(v.equal(b[k]) for k, v in a.items())


@pytest.mark.parametrize("rule", ["mean", "entropy", "energy"])
def test_rule_of_a_shared_head(saved, rule):
    net, method, about = load_released(saved(made("m3ae")), rule=rule)
    assert predict(net, method, batch(about["modalities"], "m3ae")).weights.shape == (
        2,
        5,
    )


def test_unknown_rule(saved):
    with pytest.raises(InputError, match="did you mean 'entropy'"):
        load_released(saved(made("m3ae")), rule="entropi")


def test_raw_items(saved, tmp_path):
    net = load_released(saved(made("cav")))[0]
    assert net.encoders["audio"].preprocessor.inputs(
        [torch.zeros(64, 128)]
    ).mean().item() == pytest.approx(5.081 / 4.4849)  # stored with time downwards
    assert net.encoders["video"].preprocessor.inputs(
        [torch.zeros(3, 50, 40, dtype=torch.uint8)]
    ).shape == (1, 3, 32, 32)
    path = saved(made("m3ae"))
    with pytest.raises(
        InputError, match="does not hold the dictionary.*give its vocab.txt"
    ):
        load_released(path)[0].encoders["text"].preprocessor(["a"])
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    assert load_released(path, tokenizer=str(tmp_path / "vocab.txt"))[0].encoders[
        "text"
    ].preprocessor(["a b"])["ids"].shape == (1, 256)


# damaged, foreign, dangerous ----------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_sentence(saved):
    state = made("cav")
    del (
        state["module.mae_a.blocks_a.0.attn.qkv.bias"],
        state["module.mae_v.norm_v.weight"],
    )
    state["module.mae_v.surprise"], state["module.extra"] = (
        torch.zeros(1),
        torch.zeros(1),
    )
    state["module.mae_a.blocks_u.0.mlp.fc1.bias"] = torch.zeros(7)
    with pytest.raises(
        InputError,
        match=(
            r"2 missing \(encoders.audio.net.body.blocks.0.attn.qkv.bias, "
            r"encoders.video.net.body.norm.weight\); 2 unexpected \(extra, "
            r"mae_v.surprise\); 1 misshaped "
            r"\(encoders.audio.net.body.blocks.2.fc1.bias is \(7,\), not \(256,\)"
        ),
    ) as e:
        load_released(saved(state))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "lost,says",
    [
        ("cls_token", "cls_token is missing"),
        ("text_embedding.weight", "text_embedding.weight is missing"),
        ("image_embedding.weight", "image_embedding.weight is missing"),
        ("fusion_module.fc_out.weight", "holds no head"),
        ("encoder.blocks.1.", "missing"),
        ("encoder.layer_norm.bias", "missing"),
    ],
)
def test_what_is_missing_is_named(saved, lost, says):
    with pytest.raises(InputError, match=says):
        load_released(
            saved(
                {k: v for k, v in made("m3ae").items() if lost not in k or "mae_v" in k}
            )
        )


@pytest.mark.parametrize(
    "state,says",
    [
        (
            {"bert.w": torch.ones(1)},
            "is not a checkpoint of the released code: it holds bert",
        ),
        ({}, "is not a state dict"),
        ({"module.mae_a.x": torch.ones(1)}, "it holds mae_a, where"),
    ],
)
def test_foreign_files(saved, state, says):
    with pytest.raises(InputError, match=says):
        load_released(saved(state))


def test_head_of_an_odd_width(saved):
    state = made("av")
    state["module.fusion_module.fc_out.weight"] = torch.zeros(4, 700)
    with pytest.raises(
        InputError,
        match=r"its head reads 700 features, and its encoders give 512 \+ 512",
    ):
        load_released(saved(state))
    assert (
        which_head(
            {"fusion_module.fc_out.weight": torch.zeros(4, 512)},
            {"audio": 512, "video": 512},
        )
        == "gs"
        and which_model({"audio_net.x": 0, "visual_net.y": 0}) == "av"
    )


def test_a_missing_or_cut_file(saved, tmp_path):
    with pytest.raises(InputError, match="there is no such checkpoint"):
        load_released(tmp_path / "nowhere.pth")
    path = saved(made("m3ae"))
    for n in (0, 10, 5000):
        (tmp_path / "cut.pth").write_bytes(path.read_bytes()[:n])
        with pytest.raises(InputError, match="is not a readable checkpoint"):
            load_released(tmp_path / "cut.pth")


class Trojan:
    def __init__(self, at):
        self.at = str(at)

    def __reduce__(self):
        return os.mkdir, (self.at,)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda x, f: torch.save(x, f, _use_new_zipfile_serialization=False),
        lambda x, f: f.write_bytes(pickle.dumps(x, 2)),
    ],
    ids=["zip", "legacy", "pickle"],
)
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, save):
    save(
        {
            **(made("m3ae") if save is torch.save else {}),
            "module.x": Trojan(tmp_path / "owned"),
        },
        tmp_path / "bad.pth",
    )
    with pytest.raises(
        InputError,
        match=(
            "is refused: it holds .*mkdir, which is not a tensor; nothing in it was "
            "run|is not a readable checkpoint"
        ),
    ) as e:
        load_released(tmp_path / "bad.pth")
    assert "\n" not in str(e.value) and not (tmp_path / "owned").exists()


def test_a_whole_pickled_network_is_refused(saved):
    with pytest.raises(
        InputError, match="is refused: it holds torch.nn.modules.linear.Linear"
    ):
        load_released(saved({"module.x": torch.nn.Linear(2, 2)}))
