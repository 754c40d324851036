"""Hub encoders, offline: tiny random models saved in folders.

What is read, what trains, what is stored, and what one can do wrong.
"""

import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch

from mla_nb.core import InputError, Modality, call, discover, encoders
from mla_nb.encoders import hub
from mla_nb.encoders.base import check_encoder
from mla_nb.encoders.hub import (
    HubFbank,
    HubPixels,
    HubTokens,
    HubWave,
    blocks_of,
    freeze,
    hub_folder,
    pooled,
    portable,
    rebuilt,
)
from mla_nb.runs.run import Run, load_run, run

timm, tf = pytest.importorskip("timm"), pytest.importorskip("transformers")
discover()

TEXT, TEXTS = (
    Modality("text", "text"),
    ["a good day", "day", "", "good good good day day a"],
)
IMAGE, CLIP = Modality("image", "image"), Modality("video", "frames")
BANK = Modality(
    "audio", "features", {"shape": [64, 16], "feature": "fbank", "rate": 16000}
)
WAVE = Modality("audio", "wave", {"rate": 8000})
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def pictures(*shape):
    return list(
        torch.randint(
            0,
            256,
            (3, *shape),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )
    )


def waves():
    return [
        torch.rand(n, generator=torch.Generator().manual_seed(n)) - 0.5
        for n in (4000, 3000, 5000)
    ]


def banks():
    return list(torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0)))


ITEMS = {
    "text": (TEXT, lambda: TEXTS),
    "image": (IMAGE, lambda: pictures(3, 40, 48)),
    "clip": (CLIP, lambda: pictures(2, 3, 40, 48)),
    "bank": (BANK, banks),
    "wave": (WAVE, waves),
}


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tok = Tokenizer(
        models.WordLevel(
            {
                w: i
                for i, w in enumerate(
                    ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "good", "day"]
                )
            },
            unk_token="[UNK]",
        )
    )
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Folders as save_pretrained makes them"
    root, eye = tmp_path_factory.mktemp("models"), {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    convs = {
        "conv_dim": (8, 8),
        "conv_stride": (5, 4),
        "conv_kernel": (10, 4),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "vocab_size": 32,
    }
    words = dict(
        SMALL,
        vocab_size=60,
        max_position_embeddings=20,
        eos_token_id=3,
        bos_token_id=2,
        pad_token_id=0,
    )
    made = {
        "bert": [
            tf.BertModel(
                tf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)
            ),
            tokenizer(),
        ],
        "mlm": [
            tf.BertForMaskedLM(
                tf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)
            ),
            tokenizer(),
        ],
        "roberta": [
            tf.RobertaModel(
                tf.RobertaConfig(
                    **SMALL, vocab_size=60, max_position_embeddings=8, pad_token_id=0
                )
            ),
            tokenizer(),
        ],
        "gpt2": [
            tf.GPT2Model(
                tf.GPT2Config(
                    vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=32
                )
            ),
            tokenizer(),
        ],
        "clip": [
            tf.CLIPModel(
                tf.CLIPConfig(
                    text_config=words, vision_config=dict(SMALL, hidden_size=24, **eye)
                )
            ),
            tokenizer(),
            tf.CLIPImageProcessor(
                size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
            ),
        ],
        "vit": [
            tf.ViTModel(tf.ViTConfig(**SMALL, **eye)),
            tf.ViTImageProcessor(size={"height": 32, "width": 32}),
        ],
        "resnet": [
            tf.ResNetModel(
                tf.ResNetConfig(
                    embedding_size=8,
                    hidden_sizes=[8, 16],
                    depths=[1, 1],
                    layer_type="basic",
                )
            ),
            tf.ConvNextImageProcessor(size={"shortest_edge": 32}),
        ],
        "ast": [
            tf.ASTModel(tf.ASTConfig(**SMALL, max_length=64, num_mel_bins=16)),
            tf.ASTFeatureExtractor(num_mel_bins=16, max_length=64),
        ],
        "wav2vec2": [
            tf.Wav2Vec2Model(tf.Wav2Vec2Config(**SMALL, **convs, layerdrop=0.0)),
            tf.Wav2Vec2FeatureExtractor(),
        ],
        "whisper": [
            tf.WhisperModel(
                tf.WhisperConfig(
                    vocab_size=60,
                    d_model=16,
                    encoder_layers=1,
                    decoder_layers=1,
                    encoder_attention_heads=2,
                    decoder_attention_heads=2,
                    encoder_ffn_dim=16,
                    decoder_ffn_dim=16,
                    num_mel_bins=8,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    decoder_start_token_id=1,
                )
            )
        ],
    }
    for name, parts in made.items():
        for p in parts:
            p.save_pretrained(root / name)
    timm.models.save_for_hf(
        timm.create_model("test_resnet", num_classes=3),
        root / "timm",
        safe_serialization=True,
    )
    return root


@pytest.fixture
def mine(models, tmp_path):
    return shutil.copytree(models, tmp_path / "models")


def make(name, items, model="", **options):
    mod, made = ITEMS[items]
    return call(
        encoders[name],
        dict(options, model=str(model)),
        mod=mod,
        items=made(),
        preprocessor=None,
    ), made()


ALL = [
    ("hf_text", "bert", "text"),
    ("hf_text", "mlm", "text"),
    ("hf_text", "roberta", "text"),
    ("hf_text", "gpt2", "text"),
    ("hf_text", "clip", "text"),
    ("hf_image", "vit", "image"),
    ("hf_image", "clip", "image"),
    ("hf_image", "resnet", "image"),
    ("hf_image", "vit", "clip"),
    ("hf_audio", "ast", "bank"),
    ("hf_audio", "ast", "wave"),
    ("hf_audio", "wav2vec2", "wave"),
    ("timm_image", "timm", "image"),
    ("timm_image", "timm", "clip"),
]


@pytest.mark.parametrize("name,model,items", ALL)
def test_contract_and_rebuilding_without_the_model(
    models, monkeypatch, name, model, items
):
    "Recipe and prep are JSON, and with them the weights are all that is needed"
    enc, raw = make(name, items, models / model, train_last=1)
    check_encoder(enc, raw)
    recipe, preprocessor = json.loads(
        json.dumps([enc.recipe, enc.preprocessor.config()])
    )
    monkeypatch.setattr(
        hub, "hub_folder", lambda *_: pytest.fail("the model was looked up")
    )
    again = call(encoders[name], recipe, mod=ITEMS[items][0], preprocessor=preprocessor)
    again.load_state_dict(enc.state_dict())
    assert again.eval()(again.preprocessor.inputs(raw)).equal(
        enc.eval()(enc.preprocessor.inputs(raw))
    )
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in enc.parameters()
    ]


@pytest.mark.parametrize(
    "name,items", [("test_vit", "image"), ("test_convnext", "clip")]
)
def test_timm_by_name(name, items):
    enc, raw = make("timm_image", items, name, pretrained=False, train_last=2)
    check_encoder(enc, raw)
    assert (
        enc.weights_source == "random"
        and enc.recipe["model"] == name
        and 0
        < sum(p.numel() for p in enc.parameters() if p.requires_grad)
        < sum(p.numel() for p in enc.parameters())
    )


@pytest.mark.parametrize("name,model,items", ALL)
@pytest.mark.parametrize("k", [0, 1, -1])
def test_what_is_frozen_stays(models, name, model, items, k):
    "Parameters, batch statistics, dropout: training moves nothing that is frozen"
    enc, raw = make(name, items, models / model, train_last=k)
    enc.train()
    frozen = {n for n, p in enc.named_parameters() if not p.requires_grad}
    before = {n: v.clone() for n, v in enc.state_dict().items()}
    z = enc(enc.preprocessor.inputs(raw))
    if k:
        z.square().sum().backward()
        torch.optim.SGD(enc.parameters(), 0.1).step()
    else:
        assert not z.requires_grad and z.equal(enc.eval()(enc.preprocessor.inputs(raw)))
    moved = {n for n, v in enc.state_dict().items() if not v.equal(before[n])}
    assert bool(moved) == bool(k) and not moved & frozen
    assert bool(frozen - {n for n in frozen if "pooler" in n}) == (k != -1)


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_only_the_last_block_is_awake(models, model):
    enc, _ = make(
        "hf_text" if model == "bert" else "hf_image",
        "text" if model == "bert" else "image",
        models / model,
        train_last=1,
    )
    net = (enc.train() if model == "bert" else enc.train().net).net
    last, first = (net.get_submodule(blocks_of(net)[k].rstrip(".")) for k in (-1, 0))
    assert last.training and all(p.requires_grad for p in last.parameters())
    assert not any(m.training for m in first.modules()) and not any(
        p.requires_grad for p in first.parameters()
    )
    assert not net.training and not any(m.training for m in net.embeddings.modules())
    enc.eval()
    assert not any(m.training for m in enc.modules())


def test_batch_statistics_of_frozen_layers_rest(models):
    enc, raw = make("timm_image", "image", models / "timm", train_last=1)
    before = {n: v.clone() for n, v in enc.state_dict().items() if "running_mean" in n}
    enc.train()(enc.preprocessor.inputs(raw))
    moved = {n for n, v in before.items() if not enc.state_dict()[n].equal(v)}
    assert moved and all("layer4" in n for n in moved)


def test_freeze_by_hand():
    net = torch.nn.ModuleDict(
        {
            "stem": torch.nn.Linear(2, 2),
            "blocks": torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3)),
            "norm": torch.nn.LayerNorm(2),
        }
    )

    def trained():
        return {n for n, p in net.named_parameters() if p.requires_grad}

    assert blocks_of(net) == ["blocks.0.", "blocks.1.", "blocks.2."]
    assert freeze(net, blocks_of(net), 0) == [] and trained() == set()
    assert net["norm"] in freeze(net, blocks_of(net), 1) and trained() == {
        "blocks.2.weight",
        "blocks.2.bias",
        "norm.weight",
        "norm.bias",
    }
    freeze(net, blocks_of(net), 3)
    assert not any(n.startswith("stem") for n in trained()) and len(trained()) == 8
    assert freeze(net, blocks_of(net), -1) == [net] and len(trained()) == 10
    for k in (4, -2):
        with pytest.raises(
            InputError, match=rf"train_last={k}: the model has 3 blocks; give 0"
        ):
            freeze(net, blocks_of(net), k)


def test_mean_pooling_does_not_count_padding(models):
    enc, raw = (
        make("hf_text", "text", models / "bert")[0].eval(),
        TEXTS[:3],
    )  # the last one is longer than most, and cut
    longer = HubTokens(
        **{**enc.preprocessor.config(), "length": enc.preprocessor.length + 5}
    )
    assert torch.allclose(
        enc(enc.preprocessor.inputs(raw)), enc(longer(raw)), atol=1e-6
    )
    x = enc.preprocessor.inputs(raw)
    hidden = enc.net(
        input_ids=x["ids"], attention_mask=x["mask"].long()
    ).last_hidden_state
    by_hand = torch.stack([h[:n].mean(0) for h, n in zip(hidden, x["mask"].sum(1))])
    assert torch.allclose(enc(x), by_hand, atol=1e-6)


def test_pools(models):
    vit, raw = make("hf_image", "image", models / "vit")
    x, out = (
        vit.preprocessor.inputs(raw),
        vit.eval().net.net(pixel_values=vit.preprocessor.inputs(raw)),
    )
    assert pooled(out, None, "cls").equal(out.last_hidden_state[:, 0]) and pooled(
        out, None, "pooler"
    ).equal(out.pooler_output)
    assert torch.allclose(pooled(out), out.last_hidden_state.mean(1)) and vit(x).equal(
        pooled(out)
    )
    with pytest.raises(InputError, match="did you mean 'mean'"):
        make("hf_image", "image", models / "vit", pool="means")
    for model, pool, what in (
        ("wav2vec2", "pooler", "no pooler"),
        ("resnet", "cls", "no class token"),
    ):
        enc, raw = make(
            "hf_audio" if model == "wav2vec2" else "hf_image",
            "wave" if model == "wav2vec2" else "image",
            models / model,
            pool=pool,
        )
        with pytest.raises(InputError, match=what):
            enc(enc.preprocessor.inputs(raw))
    with pytest.raises(InputError, match="nothing about single positions"):
        pooled(object())


def test_weights_are_those_of_the_folder(models):
    from safetensors.torch import load_file

    stored = load_file(models / "clip/model.safetensors")
    enc, _ = make("hf_text", "text", models / "clip")
    theirs = {
        k.removeprefix("text_model."): v
        for k, v in stored.items()
        if k.startswith("text_model.")
    }
    mine = {
        k.removeprefix("net.").removeprefix("text_model."): v
        for k, v in enc.state_dict().items()
    }
    assert set(theirs) == set(mine) and all(v.equal(mine[k]) for k, v in theirs.items())
    stored = load_file(models / "timm/model.safetensors")
    enc, _ = make("timm_image", "image", models / "timm")
    assert all(
        v.equal(stored[k.removeprefix("net.net.")]) for k, v in enc.state_dict().items()
    )
    enc, other = (
        make("hf_text", "text", models / "clip", pretrained=k)[0] for k in (True, False)
    )
    assert (
        enc.weights_source == str(models / "clip") and other.weights_source == "random"
    )
    assert not all(v.equal(other.state_dict()[k]) for k, v in enc.state_dict().items())


def test_a_timm_model_by_name_reads_what_was_fetched_for_it(models, monkeypatch):
    "The folder stands for the cache: only it is asked, and its weights are used"
    from safetensors.torch import load_file

    asked = []
    monkeypatch.setattr(
        hub,
        "hub_folder",
        lambda name, weights=True: asked.append(name) or models / "timm",
    )
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: pytest.fail("somebody called home")
    )
    enc, _ = make("timm_image", "image", "test_resnet", train_last=0)
    stored = load_file(models / "timm/model.safetensors")
    assert (
        asked == ["timm/test_resnet.r160_in1k"] and enc.weights_source == "test_resnet"
    )
    assert all(
        v.equal(stored[k.removeprefix("net.net.")]) for k, v in enc.state_dict().items()
    )


def test_checkpointing_changes_memory_not_gradients(models):
    grads = []
    for again in (False, True):
        enc, raw = make("hf_image", "image", models / "vit", checkpoint=again)
        enc.train()(enc.preprocessor.inputs(raw)).square().sum().backward()
        grads.append([p.grad for p in enc.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0 and all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)
    )
    with pytest.raises(InputError, match="checkpoint=True: this model cannot"):
        make("hf_image", "image", models / "resnet", checkpoint=True)


def test_preps_do_what_the_library_does(models):
    vit, raw = make("hf_image", "image", models / "vit")
    theirs = tf.AutoImageProcessor.from_pretrained(models / "vit")(
        list(raw), return_tensors="pt"
    )["pixel_values"]
    assert (vit.preprocessor.inputs(raw) - theirs).abs().max() < 0.02
    clip, raw = make("hf_image", "image", models / "clip")
    theirs = tf.AutoImageProcessor.from_pretrained(models / "clip")(
        list(raw), return_tensors="pt"
    )["pixel_values"]
    assert (
        clip.preprocessor.inputs(raw).shape == theirs.shape
        and (clip.preprocessor.inputs(raw) - theirs).abs().mean() < 0.01
    )  # theirs rounds between the two passes
    ast, raw = make("hf_audio", "wave", models / "ast")
    at16k = [hub._as_rate(w, 8000, 16000) for w in raw]
    theirs = tf.AutoFeatureExtractor.from_pretrained(models / "ast")(
        [w.numpy() for w in at16k], sampling_rate=16000, return_tensors="pt"
    )["input_values"]
    assert torch.allclose(ast.preprocessor.inputs(raw), theirs, atol=1e-3)
    w2v, raw = make("hf_audio", "wave", models / "wav2vec2")
    theirs = tf.AutoFeatureExtractor.from_pretrained(models / "wav2vec2")(
        [hub._as_rate(raw[2], 8000, 16000)[:9000].numpy()],
        sampling_rate=16000,
        return_tensors="pt",
    )["input_values"]
    assert torch.allclose(
        HubWave(8000, seconds=9000 / 16000).inputs([raw[2]]), theirs, atol=1e-4
    )
    bert, raw = make("hf_text", "text", models / "bert")
    theirs = tf.AutoTokenizer.from_pretrained(models / "bert")(
        raw,
        padding="max_length",
        truncation=True,
        max_length=bert.preprocessor.length,
        return_tensors="pt",
    )
    assert bert.preprocessor(raw)["ids"].equal(
        theirs["input_ids"]
    ) and bert.preprocessor(raw)["mask"].equal(theirs["attention_mask"].bool())


def test_texts_are_never_longer_than_a_model_can_read(models):
    enc, _ = make(
        "hf_text", "text", models / "roberta"
    )  # 8 places, of which RoBERTa counts from 1
    many = ["good " * 50] * 4
    tok = call(
        encoders["hf_text"], {"model": str(models / "roberta")}, mod=TEXT, items=many
    )
    assert (
        tok.preprocessor.length == 7
        and tok(tok.preprocessor(many)).isfinite().all()
        and tok.preprocessor(many)["ids"][0, -1] == 3
    )  # the closing token is kept
    assert enc(enc.preprocessor([""])).isfinite().all()


def test_pictures_are_resized_and_cut():
    x = torch.zeros(3, 20, 60, dtype=torch.uint8)
    x[:, :, 20:40] = 200
    assert HubPixels(20, edge=20).encode(x).float().mean() == 200  # the center
    assert 60 < HubPixels(20).encode(x).float().mean() < 70  # the whole, squeezed
    assert HubPixels(10, edge=12)([x, x]).shape == (2, 3, 10, 10)
    assert HubPixels(10, edge=12).encode(torch.stack([x, x])).shape == (2, 3, 10, 10)


def test_filter_banks_of_waveforms_and_stored_ones():
    bank = HubFbank(1.0, 2.0, 64, 16)
    assert torch.allclose(
        bank.inputs([torch.full((64, 16), 5.0)]), torch.ones(1, 64, 16)
    )
    assert HubFbank(0.0, 1.0, 64, 16, 8000)([waves()[0]]).shape == (1, 64, 16)


def test_no_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(
        socket.socket,
        "connect",
        lambda *_: (_ for _ in ()).throw(OSError("no network")),
    )
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("no network")),
    )
    for name in ("no-such-organization/no-such-model", "not a name"):
        with pytest.raises(
            InputError,
            match=(
                r"no such folder, it is not in the cache.*give its folder in place of "
                r"the name"
            ),
        ):
            hub_folder(name)
    with pytest.raises(
        InputError, match=r"timm/resnet18.*give its folder in place of the name"
    ):
        make("timm_image", "image", "resnet18")
    with pytest.raises(InputError, match="needs a model: hf:NAME"):
        make("hf_text", "text")
    with pytest.raises(InputError, match="needs a model: timm:NAME"):
        make("timm_image", "image")
    with pytest.raises(InputError, match="did you mean 'resnet50"):
        make("timm_image", "image", "resnet5o")


def test_folders_are_read_without_the_network(models, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("somebody called home")

    (
        monkeypatch.setattr(socket.socket, "connect", refuse),
        monkeypatch.setattr(socket, "getaddrinfo", refuse),
    )
    for name, model, items in ALL[:1] + ALL[5:6] + ALL[9:10] + ALL[12:13]:
        make(name, items, models / model)


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "x"))


def test_pickles_and_foreign_code_are_never_run(mine, monkeypatch):
    monkeypatch.chdir(mine)
    for name in ("bert", "timm"):
        (
            (mine / name / "model.safetensors").unlink(),
            (mine / name / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb())),
        )
    with pytest.raises(
        InputError,
        match=r"holds no \*\.safetensors; weights in other formats are pickles",
    ):
        make("hf_text", "text", mine / "bert")
    with pytest.raises(InputError, match=r"holds no \*\.safetensors"):
        make("timm_image", "image", mine / "timm")
    config = json.loads((mine / "roberta/config.json").read_text())
    (mine / "roberta/evil.py").write_text("open('exploded', 'w')")
    (mine / "roberta/config.json").write_text(
        json.dumps(
            {
                **config,
                "auto_map": {"AutoModel": "evil.M", "AutoConfig": "evil.C"},
                "attn_implementation": "evil/kernel",
            }
        )
    )
    enc, _ = make(
        "hf_text", "text", mine / "roberta"
    )  # the library's own code reads it
    assert not {"auto_map", "attn_implementation"} & set(enc.recipe["config"])
    (mine / "roberta/config.json").write_text(
        json.dumps(
            {**config, "model_type": "mystery", "auto_map": {"AutoConfig": "evil.C"}}
        )
    )
    with pytest.raises(InputError, match="cannot be used"):
        make("hf_text", "text", mine / "roberta")
    assert not Path("exploded").exists()


def test_a_stored_config_cannot_name_code(models):
    enc, _ = make("hf_text", "text", models / "bert")
    cfg = rebuilt(
        {
            **portable(enc.cfg),
            "auto_map": {"AutoModel": "evil.M"},
            "_attn_implementation": "evil/kernel",
            "attn_implementation": "evil/kernel",
        }
    )
    assert (
        not hasattr(cfg, "auto_map")
        and cfg._attn_implementation != "evil/kernel"
        and portable(cfg) == portable(enc.cfg)
    )


def test_damaged_and_incomplete_folders(mine):
    (mine / "empty").mkdir()
    with pytest.raises(InputError, match="holds no config.json"):
        make("hf_text", "text", mine / "empty")
    with pytest.raises(InputError, match="lacks 2 weights.*pooler.*or another pool"):
        make("hf_text", "text", mine / "mlm", pool="pooler")
    for f in (mine / "bert").glob("token*"):
        f.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        make("hf_text", "text", mine / "bert")
    (mine / "vit/preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="cannot be used"):
        make("hf_image", "image", mine / "vit")
    (mine / "clip/model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="cannot be used .*Safetensor"):
        make("hf_text", "text", mine / "clip")
    (mine / "gpt2/config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be used"):
        make("hf_text", "text", mine / "gpt2")


def test_weights_that_are_missing_are_not_made_up(mine):
    from safetensors.torch import load_file, save_file

    state = load_file(mine / "vit/model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "layers.1" not in k and "layer.1" not in k},
        mine / "vit/model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(InputError, match="weights, which would be random; the first: "):
        make("hf_image", "image", mine / "vit")


@pytest.mark.parametrize(
    "name,model,items,what",
    [
        (
            "hf_text",
            "vit",
            "text",
            "reads pixel_values, and an encoder of text needs one that reads input_ids",
        ),
        ("hf_image", "bert", "image", "reads input_ids"),
        (
            "hf_audio",
            "clip",
            "wave",
            "reads text and image, not audio; name an encoder for each",
        ),
        ("hf_audio", "whisper", "wave", "reads input_features"),
        (
            "hf_audio",
            "wav2vec2",
            "bank",
            "reads waveforms, and this dataset stores fbank 64 × 16.*--audio fbank",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(models, name, model, items, what):
    with pytest.raises(InputError, match=what):
        make(name, items, models / model)


def test_filter_banks_of_another_kind(models):
    for info in (
        {"shape": [64, 128], "feature": "log_mel"},
        {"shape": [1024, 128], "feature": "fbank"},
        {"shape": [64, 16], "feature": "log_mel"},
    ):
        with pytest.raises(
            InputError,
            match="64 frames and 16 bins.*prepare the dataset again with --audio fbank",
        ):
            call(
                encoders["hf_audio"],
                {"model": str(models / "ast")},
                mod=Modality("audio", "features", info),
                items=banks(),
            )


def test_options_are_checked(models):
    with pytest.raises(InputError, match="did you mean 'train_last'"):
        make("hf_text", "text", models / "bert", train_lst=1)
    with pytest.raises(InputError, match="train_last='2': must be a whole number"):
        make("hf_text", "text", models / "bert", train_last="2")
    with pytest.raises(InputError, match="for stored runs only"):
        make("hf_text", "text", models / "bert", config="bert")


def test_a_run_and_its_net_without_the_models(mine, tmp_path):
    "Three widths, one shared head; afterwards the run folder is enough"
    spec = (
        f"audio=small,visual=hf:{mine}/vit(train_last=1),text=hf:{mine}"
        "/bert(train_last=0, pool=cls)"
    )
    cfg = Run(
        dataset="synthetic",
        dataset_args="n_train=48,n_valid=16,n_test=16",
        encoder=spec,
        epochs=1,
        batch_size=16,
        root=str(tmp_path / "runs"),
        progress=False,
        threads=1,
    )
    r = run(cfg)
    assert set(r["test"]["accuracy"]) == {"fused", "audio", "visual", "text"}
    first = load_run(cfg.folder)[0]
    assert (
        set(first.adapters) == {"visual", "text"} and first.head.out.in_features == 64
    )
    shutil.rmtree(mine)
    net, method, about = load_run(cfg.folder)
    assert about["encoders"]["visual"]["options"]["pretrained"] is False and all(
        v.equal(net.state_dict()[k]) for k, v in first.state_dict().items()
    )
    with pytest.raises(InputError, match="no such folder"):
        run(Run(**{**dict(cfg), "seed": 1}))


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "clip"])
def test_a_mask_of_four_dimensions_changes_no_feature(models, name):
    "It makes no GPU wait; models that read it otherwise get two dimensions"
    enc = call(
        encoders["hf_text"], {"model": str(models / name)}, mod=TEXT, items=TEXTS
    )
    x, enc = enc.preprocessor.inputs(TEXTS), enc.eval()
    with torch.no_grad():
        given = enc.attended(x["mask"])
        plain = enc.net(input_ids=x["ids"], attention_mask=x["mask"].long())
        here = pooled(plain, x["mask"], enc.pool)
        assert torch.allclose(enc(x), here, atol=1e-5)
    assert given.dim() == (4 if name in ("bert", "roberta") else 2)
