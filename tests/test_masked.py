"""M3AE and CAV-MAE as encoders.

Inputs that do not fit, options, freezing, weights from strangers, and runs.
"""

import collections
import json
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from mla_nb.core import InputError, Modality, call, encoders
from mla_nb.data.synthetic import faces, sentences, synthetic, voices
from mla_nb.encoders.masked import (
    CAVMAE,
    M3AE,
    POOLS,
    SIZES,
    Body,
    of_size,
    patchify,
    regrid,
    sincos,
    table,
)
from mla_nb.encoders.patched import (
    Bands,
    band_preprocessor,
    load_tokenizer,
    patch_preprocessor,
)
from mla_nb.encoders.weights import (
    fill,
    load_arrays,
    load_cavmae,
    load_m3ae,
    load_tensors,
    one_path,
    partly_frozen,
)
from mla_nb.runs.run import Run, encoder_names, load_run, make_encoders, run

TINY = of_size("tiny")
rng = np.random.default_rng(0)
FACES, WORDS = (
    list(torch.from_numpy(faces(np.arange(6), rng, size=40))),
    sentences(np.arange(6), rng),
)
IMAGE, TEXT = Modality("image", "image", {"size": 40}), Modality("text", "text")
FBANK, SPEC, WAVE = (
    Modality("audio", *f)
    for f in (
        ("features", {"feature": "fbank"}),
        ("features", {"feature": "spectrogram"}),
        ("wave", {"rate": 8000, "seconds": 0.6}),
    )
)


class Trojan:
    "A pickle that makes a folder when it is loaded"

    def __init__(self, at):
        self.at = str(at)

    def __reduce__(self):
        return os.mkdir, (self.at,)


# what goes in -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_patches_can_be_put_together_again(size):
    x = torch.randn(2, 3, 32, 48)
    p = patchify(x, size)
    back = (
        p.view(2, 32 // size, 48 // size, 3, size, size)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(x.shape)
    )
    assert p.shape == (2, (32 // size) * (48 // size), 3 * size**2) and back.equal(x)


def test_tables_tell_rows_from_columns_and_do_not_depend_on_the_length():
    assert (
        table(32, 4, 6).view(4, 6, 32)[:, 2, :16].unique(dim=0).shape[0] == 1
    )  # first half: the column
    assert (
        table(32, 4, 6).view(4, 6, 32)[1, :, 16:].unique(dim=0).shape[0] == 1
    )  # second half: the row
    assert table(32, 50)[:20].equal(table(32, 20)) and sincos(8, [3])[0].equal(
        table(8, 9)[3]
    )


@pytest.mark.parametrize(
    "mod,item,shape",
    [
        (FBANK, (1024, 128), (128, 1024)),
        (FBANK, (100, 128), (128, 96)),
        (SPEC, (257, 188), (256, 176)),
        (SPEC, (64, 128), (64, 128)),
        (SPEC, (16, 16), (16, 16)),
    ],
)
def test_sound_of_any_size_is_cut_to_patches(mod, item, shape):
    items = [torch.randn(item) for _ in range(3)]
    preprocessor = band_preprocessor(mod, items)
    assert preprocessor.inputs(items).shape == (3, 1, *shape)
    x = (items[0].T if mod is FBANK else items[0])[: shape[0], : shape[1]]
    assert torch.allclose(
        preprocessor.inputs(items)[0, 0] * preprocessor.std + preprocessor.mean,
        x,
        atol=1e-4,
    )
    stored = json.loads(json.dumps(preprocessor.config()))  # as preprocessors.json
    assert Bands.from_config(stored).config() == preprocessor.config()


@pytest.mark.parametrize("item", [(15, 200), (200, 15), (3,)])
def test_sound_without_one_patch_is_refused(item):
    with pytest.raises(
        InputError, match=r"do not hold one patch of 16 × 16; use a smaller patch"
    ):
        band_preprocessor(SPEC, [torch.randn(item)])


def test_a_shorter_sound_than_in_training_is_refused():
    preprocessor = band_preprocessor(FBANK, [torch.randn(1024, 128)] * 2)
    with pytest.raises(
        InputError, match=r"a sound of \(128, 512\).* is smaller than the \(128, 1024\)"
    ):
        preprocessor([torch.randn(512, 128)])


@pytest.mark.parametrize(
    "side,patch,size", [(40, 16, 32), (40, 8, 40), (5, 16, 16), (256, 16, 256)]
)
def test_pictures_get_a_size_that_patches_fill(side, patch, size):
    assert (
        patch_preprocessor(
            Modality("image", "image", {"size": side}), FACES, patch=patch
        ).size
        == size
    )


@pytest.mark.parametrize("pixels", [50, 8, 17])
def test_pixels_must_fit_the_patch(pixels):
    with pytest.raises(
        InputError, match=f"pixels={pixels}: must be a multiple of the patch, 16; try"
    ):
        patch_preprocessor(IMAGE, FACES, pixels=pixels)


def test_cavmae_says_which_input_it_has_places_for():
    net = CAVMAE(**TINY, channels=1, grid=(8, 4))
    with pytest.raises(
        InputError,
        match=(
            r"gives \(8, 5\) patches of 16, and this encoder has places for \(8, 4\); "
            r"cut or resize it to \(128, 64\)"
        ),
    ):
        net(torch.randn(1, 1, 128, 80))


def test_m3ae_reads_pictures_of_any_whole_number_of_patches():
    net = M3AE(**TINY, reads=("image",)).eval()
    for shape in ((16, 16), (32, 80), (64, 48)):
        assert net(torch.randn(2, 3, *shape)).shape == (2, 64)


# padding ------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_padding_matters_only_as_released(pool):
    torch.manual_seed(0)
    net = M3AE(**TINY, reads=("text",), vocab=50, pool=pool).double().eval()
    ids, mask = torch.randint(1, 50, (2, 9)), torch.arange(9) < torch.tensor([[9], [4]])
    long = {
        "ids": torch.nn.functional.pad(ids * mask, (0, 20)),
        "mask": torch.nn.functional.pad(mask, (0, 20)),
    }
    moved = (net({"ids": ids * mask, "mask": mask}) - net(long)).norm(dim=1)
    assert (moved > 0.1).all() if pool == "all" else (moved < 1e-9).all()
    junk = {"ids": torch.where(long["mask"], long["ids"], 7), "mask": long["mask"]}
    if pool != "all":
        assert torch.allclose(net(long), net(junk))  # what is masked is not looked at


# options ------------------------------------------------------------------------------

MAKE = {
    "m3ae_text": (TEXT, WORDS),
    "m3ae_image": (IMAGE, FACES),
    "cavmae_image": (IMAGE, FACES),
    "cavmae_audio": (WAVE, list(torch.from_numpy(voices(np.arange(6), rng)))),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize(
    "options,says",
    [
        ({"size": "huge"}, "unknown size 'huge'"),
        (
            {"train_last": 3},
            "train_last=3: must be a whole number, at least -1 and at most 2",
        ),
        ({"train_last": "1"}, "train_last='1'"),
        ({"checkpoint": "yes"}, "checkpoint='yes': must be true or false"),
        ({"weights": "no.pkl"}, "there is no such"),
        ({"depth": 3}, "unknown option"),
    ],
)
def test_wrong_options(name, options, says):
    mod, items = MAKE[name]
    with pytest.raises(InputError, match=says):
        call(encoders[name], {"size": "tiny", **options}, mod=mod, items=items)


def test_an_error_names_encoder_and_modality():
    "Of three encoders, which one was it?"
    s = synthetic("balanced", n_train=12, n_valid=6, n_test=6)
    with pytest.raises(
        InputError, match=r"^encoder m3ae_image of visual: unknown size 'huge'.*tiny"
    ):
        make_encoders(
            encoder_names(
                "audio=small,visual=m3ae(size=huge),text=small", s.modalities
            ),
            s,
        )


@pytest.mark.parametrize("name", MAKE)
def test_train_last_decides_what_learns(name):
    mod, items = MAKE[name]
    for k, want in (
        (-1, {"0", "1", "other"}),
        (0, set()),
        (1, {"1", "norm"}),
        (2, {"0", "1", "norm"}),
    ):
        enc = call(
            encoders[name],
            {"size": "tiny", "train_last": k, "checkpoint": k == 1},
            mod=mod,
            items=items,
        ).train()
        z = enc(enc.preprocessor.inputs(items))
        if z.requires_grad:
            z.square().sum().backward()
        learns = {n for n, p in enc.named_parameters() if p.grad is not None}
        assert learns == {n for n, p in enc.named_parameters() if p.requires_grad}
        found = {
            n.split("blocks.")[1][0]
            if "blocks." in n
            else "norm"
            if "body.norm" in n
            else "other"
            for n in learns
        }
        assert found - ({"norm"} if k == -1 else set()) == want


def test_frozen_batch_norm_does_not_count():
    net = nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
    )
    partly_frozen(net, list(net), 1).train()
    net(torch.randn(8, 4)), net.train()(torch.randn(8, 4))
    assert [b[1].num_batches_tracked.item() for b in net] == [0, 0, 2]


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    net, x, mask = (
        Body(32, 3, 4).double(),
        torch.randn(2, 7, 32).double(),
        torch.arange(7) < torch.tensor([[7], [3]]),
    )
    grads = []
    for net.checkpoint in (False, True):
        grads.append(
            torch.autograd.grad(net(x, mask).square().sum(), list(net.parameters()))
        )
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


# dictionaries -------------------------------------------------------------------------


@pytest.fixture
def vocab(tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[unused0]", "[UNK]", "a", "hap", "##py", "face"]) + "\n"
    )
    return tmp_path / "vocab.txt"


def test_a_given_dictionary_is_kept_in_the_prep(vocab):
    enc = call(
        encoders["m3ae_text"],
        {"size": "tiny", "tokenizer": str(vocab), "length": 5},
        mod=TEXT,
        items=WORDS,
    )
    assert (
        enc.preprocessor(["A happy face", "xyz"])["ids"].tolist()
        == [[3, 4, 5, 6, 0], [2, 0, 0, 0, 0]]
        and enc.tokens.num_embeddings == 7
    )
    vocab.unlink()  # no file is needed from here on
    again = call(
        encoders["m3ae_text"],
        enc.recipe,
        mod=TEXT,
        preprocessor=json.loads(json.dumps(enc.preprocessor.config())),
    )
    assert (
        again.preprocessor(["happy"])["ids"].equal(enc.preprocessor(["happy"])["ids"])
        and "tokenizer" not in enc.recipe
        and "weights" not in enc.recipe
    )


def test_marks_of_begin_and_end_in_a_tokenizer_json_are_left_out(tmp_path):
    from tokenizers import Tokenizer, models, processors

    tok = Tokenizer(
        models.WordPiece(
            {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "a": 3}, unk_token="[UNK]"
        )
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tok.enable_padding(length=9)
    tok.save(str(tmp_path / "t.json"))
    assert load_tokenizer(tmp_path / "t.json", 4)(["a"])["ids"].tolist() == [
        [3, 0, 0, 0]
    ]


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("v.txt", "a\nb\n", r"has no \[UNK\]"),
        ("v.json", "{", "is not a tokenizer"),
        ("v.txt", "[UNK]\n[PAD]\n", r"piece 0 is '\[UNK\]', and must be padding"),
        ("v.txt", None, "there is no such file"),
    ],
)
def test_files_that_are_no_dictionary(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=says):
        load_tokenizer(tmp_path / name)


# weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_are_read_whatever_the_protocol(tmp_path, protocol):
    tree = {
        "a": {"kernel": np.arange(6, dtype="f4").reshape(2, 3)},
        "n": [np.float32(2), np.int64(3), (1, None, "x", b"y")],
        "o": collections.OrderedDict(z=np.zeros(0)),
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(tree, protocol))
    found = load_arrays(tmp_path / "w.pkl")
    assert (
        np.array_equal(found["a"]["kernel"], tree["a"]["kernel"])
        and found["n"] == tree["n"]
        and found["o"]["z"].shape == (0,)
    )


def jax_like(module, name):
    "A pickle as JAX writes one: a function of its own, called with an array's parts"
    fun, args, state = np.arange(3, dtype="f4").__reduce__()
    fake = type(name, (), {"__module__": module, "__qualname__": name})

    class Array:
        def __reduce__(self):
            return fake, (fun, args, state, {"weak_type": False})

    import sys
    import types

    top = module.split(".")
    for k in range(1, len(top) + 1):
        sys.modules.setdefault(".".join(top[:k]), types.ModuleType(".".join(top[:k])))
    setattr(sys.modules[module], name, fake)
    try:
        return pickle.dumps({"w": Array()})
    finally:
        for k in range(1, len(top) + 1):
            sys.modules.pop(".".join(top[:k]), None)


@pytest.mark.parametrize(
    "module,name",
    [
        ("jax._src.array", "_reconstruct_array"),
        ("jax._src.device_array", "reconstruct_device_array"),
    ],
)
def test_jax_arrays_become_numpy(tmp_path, module, name):
    (tmp_path / "w.pkl").write_bytes(jax_like(module, name))
    assert load_arrays(tmp_path / "w.pkl")["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "module,name",
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("numpy.testing", "rundocs"),
        ("jax", "jit"),
        ("functools", "partial"),
        ("collections", "namedtuple"),
        ("mla_nb.core", "write_atomic"),
    ],
)
def test_anything_but_arrays_is_refused_by_name(tmp_path, module, name):
    (tmp_path / "w.pkl").write_bytes(f"c{module}\n{name}\n(S'x'\ntR.".encode())
    with pytest.raises(
        InputError,
        match=(
            f"is refused: it holds {module}.{name}, which is not an array; nothing in "
            "it was run"
        ),
    ):
        load_arrays(tmp_path / "w.pkl")


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_trojan_does_not_run(tmp_path, protocol):
    (tmp_path / "bad.pkl").write_bytes(
        pickle.dumps(
            {"cls_token": np.zeros(3), "x": Trojan(tmp_path / "owned")}, protocol
        )
    )
    torch.save(
        {"w": torch.ones(2), "x": Trojan(tmp_path / "owned")}, tmp_path / "bad.pth"
    )
    for read, name in (
        (load_arrays, "bad.pkl"),
        (load_m3ae, "bad.pkl"),
        (load_tensors, "bad.pth"),
        (load_tensors, "bad.pkl"),
    ):
        with pytest.raises(
            InputError, match="nothing in it was run|not a readable"
        ) as e:
            read(tmp_path / name)
        assert "\n" not in str(e.value) and not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", pickle.dumps({"a": np.zeros(100)})[:60]]
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "w").write_bytes(content)
    for read in (load_arrays, load_tensors):
        with pytest.raises(InputError, match="is not a readable"):
            read(tmp_path / "w")


@pytest.mark.parametrize("thing", [{}, [torch.ones(1)], torch.ones(2), {"a": 1}])
def test_files_that_are_no_state_dict(tmp_path, thing):
    torch.save(thing, tmp_path / "w.pth")
    with pytest.raises(InputError, match="is not a state dict"):
        load_tensors(tmp_path / "w.pth")


def test_a_state_dict_may_be_wrapped(tmp_path):
    torch.save({"model": {"module.w": torch.ones(1)}, "epoch": 3}, tmp_path / "w.pth")
    assert list(load_tensors(tmp_path / "w.pth")) == ["w"]


def flax_of(net):
    "Parameters as flax names and lays them out, in a plain loop"
    s, tree = {k: v.detach().numpy() for k, v in net.state_dict().items()}, {}

    def put(path, v):
        at = tree
        for p in path[:-1]:
            at = at.setdefault(p, {})
        at[path[-1]] = v

    inner = {
        "attn.qkv": ("Attention_0", "Dense_0"),
        "attn.proj": ("Attention_0", "Dense_1"),
        "fc1": ("TransformerMLP_0", "fc1"),
        "fc2": ("TransformerMLP_0", "fc2"),
        "norm1": ("LayerNorm_0",),
        "norm2": ("LayerNorm_1",),
    }
    for k, v in s.items():
        name, last = k.rsplit(".", 1) if "." in k else (k, "")
        if name.startswith("body.blocks."):
            i, rest = name.removeprefix("body.blocks.").split(".", 1)
            path, w = (
                ("encoder", f"Block_{i}", *inner[rest]),
                "bias" if last == "bias" else "scale" if "norm" in rest else "kernel",
            )
            put((*path, w), v.T if w == "kernel" else v)
        elif name == "body.norm":
            put(("encoder", "LayerNorm_0", "scale" if last == "weight" else "bias"), v)
        elif name == "tokens":
            put(("text_embedding", "embedding"), v)
        elif k == "patches.weight":
            put(
                ("image_embedding", "kernel"),
                v.reshape(len(v), 3, 16, 16).transpose(2, 3, 1, 0).reshape(-1, len(v)),
            )
        elif k == "patches.bias":
            put(("image_embedding", "bias"), v)
        else:
            put(
                (
                    {
                        "cls": "cls_token",
                        "type_text": "encoder_text_type_embedding",
                        "type_image": "encoder_image_type_embedding",
                    }[k],
                ),
                v,
            )
    return tree | {
        "decoder": {"Block_0": {"x": np.zeros(3)}},
        "text_mask_embedding": np.zeros((1, 1, 8)),
    }


@pytest.fixture
def m3ae(tmp_path):
    "A network, its parameters as flax keeps them, and a function that writes those"
    torch.manual_seed(0)
    net = M3AE(**TINY, vocab=40).eval()

    def write(tree, wrap=lambda t: t):
        (tmp_path / "m3ae.pkl").write_bytes(pickle.dumps(wrap(tree)))
        return tmp_path / "m3ae.pkl"

    return net, flax_of(net), write


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"params": t},
        lambda t: {"epoch": 1, "state": {"params": {"params": t}}},
    ],
    ids=["plain", "params", "state"],
)
def test_m3ae_from_its_published_form(m3ae, wrap):
    net, tree, write = m3ae
    got = load_m3ae(write(tree, wrap))
    assert got.state_dict().keys() == net.state_dict().keys() and all(
        v.equal(net.state_dict()[k]) for k, v in got.state_dict().items()
    )
    for m in ("text", "image"):
        load_m3ae(write(tree, wrap), M3AE(**TINY, vocab=40, reads=(m,)))
    x = torch.randn(1, 3, 32, 32)  # a patch of theirs is row, column, channel
    patch = (
        x[0, :, :16, 16:].permute(1, 2, 0).flatten().numpy()
        @ tree["image_embedding"]["kernel"]
        + tree["image_embedding"]["bias"]
    )
    assert np.allclose(
        got.patches(patchify(x))[0, 1].detach().numpy(), patch, atol=1e-4
    )


def test_m3ae_tells_all_that_does_not_fit(m3ae):
    _, tree, write = m3ae
    del tree["encoder"]["Block_1"]["TransformerMLP_0"]["fc2"]["bias"]
    tree["surprise"], tree["cls_token"] = np.zeros(2), np.zeros((1, 1, 32))
    with pytest.raises(
        InputError,
        match=(
            r"1 missing \(body.blocks.1.fc2.bias\); 1 unexpected \(surprise\); 1 "
            r"misshaped \(cls is \(1, 1, 32\), not \(1, 1, 64\)\)"
        ),
    ):
        load_m3ae(write(tree), M3AE(**TINY, vocab=40))


def test_m3ae_of_another_size_or_dictionary(m3ae):
    _, tree, write = m3ae
    with pytest.raises(
        InputError, match=r"misshaped \(.*tokens.weight is \(40, 64\), not \(41, 64\)"
    ):
        load_m3ae(write(tree), M3AE(**TINY, vocab=41))
    with pytest.raises(InputError, match="missing"):
        load_m3ae(write(tree), M3AE(64, 3, 4, vocab=40))
    del tree["encoder"]["Block_1"]
    with pytest.raises(
        InputError, match="64 wide and 1 blocks deep, which is none of tiny, small"
    ):
        load_m3ae(write(tree))
    with pytest.raises(InputError, match="holds no class token"):
        load_m3ae(write({"a": np.zeros(2)}))
    with pytest.raises(InputError, match="holds no class token"):
        load_m3ae(write([np.zeros(2)]))


def test_cavmae_paths_do_not_mix():
    "Every kind of entry has its own number; a modality's path must hold just its own"
    state = {}
    for s in "av":
        state |= {
            f"pos_embed_{s}": s,
            f"modality_{s}": s,
            f"patch_embed_{s}.proj.weight": s,
            f"norm_{s}.weight": s,
        }
    for at in ("blocks_a.0", "blocks_v.0", "blocks_v.1", "blocks_u.0"):
        state |= {
            f"{at}.norm{i}{x}.weight": f"{at}{x}"
            for i in (1, 2)
            for x in ("", "_a", "_v")
        } | {f"{at}.attn.qkv.weight": at, f"{at}.mlp.fc1.weight": at}
    state |= {
        "norm.weight": "joint",
        "decoder_blocks.0.norm1.weight": "d",
        "mlp_head.0.weight": "h",
    }
    a, v = one_path(state, "a"), one_path(state, "v")
    assert {k: a[f"body.blocks.{k}.norm1.weight"] for k in (0, 1)} == {
        0: "blocks_a.0",
        1: "blocks_u.0_a",
    } and a["body.blocks.1.fc1.weight"] == "blocks_u.0"
    assert [v[f"body.blocks.{k}.norm2.weight"] for k in range(3)] == [
        "blocks_v.0",
        "blocks_v.1",
        "blocks_u.0_v",
    ] and v["places"] == v["kind"] == v["body.norm.weight"] == "v"
    assert len(a) == 4 + 2 * 4 and len(v) == 4 + 3 * 4


def test_cavmae_side_and_missing_path(tmp_path):
    torch.save({"module.pos_embed_v": torch.zeros(1, 4, 64)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="unknown side 'x'"):
        load_cavmae(tmp_path / "w.pth", CAVMAE(**TINY, channels=1, grid=(8, 4)), "x")
    with pytest.raises(InputError, match="missing"):
        load_cavmae(tmp_path / "w.pth", CAVMAE(**TINY, channels=1, grid=(8, 4)), "a")


def test_regrid_keeps_what_is_smooth():
    flat, ramp = (
        torch.ones(1, 24, 3),
        torch.arange(8.0).repeat_interleave(6)[None, :, None],
    )
    assert torch.allclose(regrid(flat, (4, 6), (2, 9)), torch.ones(1, 18, 3), atol=1e-5)
    assert regrid(ramp, (8, 6), (4, 6)).view(4, 6).diff(dim=0).min() > 1


def test_fill_leaves_the_network_alone_if_anything_is_odd():
    net = nn.Linear(2, 2)
    before = net.weight.clone()
    with pytest.raises(InputError, match="1 missing"):
        fill(net, {"weight": torch.zeros(2, 2)}, "a file")
    assert net.weight.equal(before)


def test_sizes_are_the_published_ones():
    assert [(s["width"], s["depth"], s["heads"]) for s in SIZES.values()] == [
        (64, 2, 4),
        (384, 12, 6),
        (768, 12, 12),
        (1024, 24, 16),
    ]


# runs ---------------------------------------------------------------------------------

SPEC_ALL = (
    "audio=cavmae(size=tiny,patch=8,train_last=1),"
    "visual=m3ae(size=tiny,patch=8,checkpoint=true),"
    "text=m3ae(size=tiny,pool=cls)"
)


def test_a_run_with_masked_encoders_is_loaded_without_its_files(tmp_path, m3ae):
    _, tree, write = m3ae
    path = write({**tree, "text_embedding": {"embedding": np.zeros((40, 64), "f4")}})
    cfg = Run(
        dataset_args="n_train=64,n_valid=24,n_test=24",
        epochs=1,
        lr=0.01,
        encoder=SPEC_ALL.replace(
            "patch=8,checkpoint=true", f"checkpoint=true,weights={path}"
        ),
        progress=False,
        threads=1,
        root=str(tmp_path),
    )
    r = run(cfg)
    path.unlink()
    loaded, method, about = load_run(tmp_path / r["id"])
    assert about["encoders"]["visual"]["options"] == {
        "size": "tiny",
        "patch": 16,
        "pool": "present",
        "checkpoint": True,
        "train_last": -1,
    }
    assert set(r["test"]["accuracy"]) == {"fused", "audio", "visual", "text"}
    frozen = [
        k for k, p in loaded.encoders["audio"].named_parameters() if not p.requires_grad
    ]
    assert any("blocks.0" in k for k in frozen) and not any(
        "blocks.1" in k for k in frozen
    )


def test_m3ae_cannot_listen_and_says_who_can():
    with pytest.raises(InputError, match="unknown encoder of audio .*'m3ae'.*cavmae"):
        encoder_names("m3ae", {"audio": WAVE, "text": TEXT})


def test_a_traced_net_keeps_no_table_of_the_trace():
    "A table that belonged to a graph would come back in later predictions"
    net = M3AE(16, 1, 2, patch=4, vocab=9).eval()
    x = torch.rand(3, 3, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        graph = torch.export.export(
            net, (x,), dynamic_shapes=({0: batch},), strict=False
        ).module()
        assert not dict(net.named_buffers())
        assert torch.allclose(graph(x[:2]), net(x[:2]), atol=1e-5)
    assert all(type(v) is torch.Tensor for v in net.buffers())
