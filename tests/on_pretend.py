"""The project on the pretend GPU of `pretend.py`, beside the same on the CPU.

`test_pretend.py` runs this file in a process of its own.
"""

import copy
import inspect
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pretend
import pytest
import torch
from conftest import ROOT, together
from ends import end_of, keep_ends
from pretend import DOWNLOAD, MAY_WAIT, NAME, UPLOAD, certain, host, on_device, watch

if pretend.WHY_NOT:
    pytest.skip(pretend.WHY_NOT, allow_module_level=True)

import pretend_runs as P
from pretend_runs import ACTIVE, DEVICE, Twins, configure, gpu

from mla_nb import evaluation, missing
from mla_nb.core import InputError, methods, rules
from mla_nb.encoders.image import Pixels, augment_image
from mla_nb.encoders.masked import M3AE
from mla_nb.features import Extractor
from mla_nb.methods.base import Callback, predict, predictions
from mla_nb.methods.fusion import make_rule
from mla_nb.predict import load
from mla_nb.runs import run as runs
from mla_nb.runs.run import environment
from mla_nb.tools import digest
from mla_nb.train import runtime
from mla_nb.train.checkpoints import explain_failure
from mla_nb.train.learner import Diverged, LocalRuntime
from mla_nb.train.loaders import loaders
from mla_nb.train.runtime import start_accelerator


def on(*values, **kw):
    return torch.tensor(values, device=DEVICE, **kw)


# the device ---------------------------------------------------------------------------


def test_tensors_of_two_devices_do_not_meet():
    x, y = on(1.0, 2.0), torch.ones(2)
    for mixed in (
        lambda: x + y,
        lambda: x @ y,
        lambda: torch.where(torch.tensor([True, False]), x, 0),
        lambda: torch.stack([x, y]),
        lambda: y.add_(x),
        lambda: y.mul_(x.sum()),
    ):
        with pytest.raises(RuntimeError, match="two devices"):
            mixed()
    with pytest.raises(TypeError, match="Tensor.cpu"):
        x.numpy()
    assert (x * torch.tensor(2.0)).tolist() == [2, 4]  # a number may lie anywhere
    assert x[torch.tensor([1])].tolist() == [2]  # and so may an index
    assert (x.sum() > 1) | True


def test_waits_are_counted_with_the_line_that_asked():
    x, two = on(1.0, 2.0, 3.0, requires_grad=True), on(5.0, 6.0)
    with watch() as seen:
        (x * 2).sum().backward()
        x.to(torch.half).to(DEVICE)
    assert not seen
    waits = {
        "item": lambda: float(x.sum()),
        "nonzero": lambda: x[x > 1],
        DOWNLOAD: lambda: x.detach().cpu(),
        UPLOAD: lambda: torch.ones(3).to(DEVICE),
        "unique": lambda: x.detach().unique(),
        "mask as index": lambda: x.detach().index_put_((x > 1,), two),
    }
    for what, f in waits.items():
        with watch() as seen:
            f()
        assert [w for w, _ in seen] == [what], (what, seen)
        assert all("on_pretend.py:" in line for _, line in seen)
    with watch() as seen:
        torch.ones(3).to(DEVICE, non_blocking=True)
    assert [w for w, _ in seen] == [MAY_WAIT] and not certain(seen)


def test_its_random_numbers_are_its_own():
    torch.manual_seed(0)
    a, b = torch.rand(3, device=DEVICE), torch.rand(3)
    torch.manual_seed(0)
    assert torch.rand(3).equal(b)  # the device took none of them
    assert host(torch.rand(3, device=DEVICE)).equal(host(a))
    torch.default_generator.manual_seed(1)
    assert not host(torch.rand(3, device=DEVICE)).equal(host(a))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


def test_modules_keep_their_parameters_and_can_be_copied(tmp_path):
    net = torch.nn.Linear(2, 2)
    before = list(net.parameters())
    assert all(p is q for p, q in zip(net.to(DEVICE).parameters(), before))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.weight.zero_()
    assert on_device(twin.weight) and host(net.weight.detach()).any()
    torch.save(net.state_dict(), tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", map_location=NAME)
    assert on_device(found["bias"]) and digest(found) == digest(net.state_dict())


def test_copies_on_a_side_stream_are_late():
    with gpu():
        side, x = torch.cuda.Stream(), torch.ones(3).pin_memory()
        with torch.cuda.stream(side):
            y, copied = x.to(DEVICE, non_blocking=True), side.record_event()
        assert host(y).isnan().all()
        torch.cuda.current_stream().wait_event(copied)
        assert host(y).equal(x)


def test_it_refuses_doubles_and_odd_layouts_when_told_to():
    with pretend.single_precision(), pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.double, device=DEVICE)
    p = torch.nn.Parameter(torch.zeros(2, 3, 4, 4, device=DEVICE))
    opt = torch.optim.SGD([p], momentum=0.9, fused=True)
    flipped = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last).to(DEVICE)
    opt.state[p]["momentum_buffer"], p.grad = flipped, torch.ones_like(p)
    with pytest.raises(RuntimeError, match="strides"):
        opt.step()


# training -----------------------------------------------------------------------------

# what must wait: rows are dropped by scores of the device, and flags lie on the CPU
WAITS = {"opm": 2}
LATE = {*ACTIVE, "opm", "amco", "valuation", "qmf", "reconboost", "pmr"} - {"unimodal"}


@pytest.mark.parametrize("gaps", ["", "0.4"])
@pytest.mark.parametrize("name", sorted(methods))
def test_every_method_equals_the_cpu_and_never_waits(name, gaps):
    how = {"method_args": ACTIVE.get(name, {}), "missing": gaps}
    twins = Twins(method=name, epochs=1 + (name in LATE), **how)
    twins.check(waits=WAITS.get(name, 0))


VARIANTS = {
    "agm": {"form": "features"},
    "cggm": {"form": "released"},
    "inforeg": {"window": 1, "least": -9.0},
    "mbsd": {"form": "released"},
    "mmpareto": {"form": "released"},
    "ogm_ge": {"form": "released"},
    "pmr": {"form": "paper"},
    "qmf": {"branch": "m3ae"},
    "film": {"by": "image"},
    "mla_fixed": {"weights": "published"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_methods(name):
    epochs = 1 + (name in ("inforeg", "pmr"))
    how = {"method_args": VARIANTS[name], "missing": "0.4", "epochs": epochs}
    Twins(method=name, **how).check()


@pytest.mark.parametrize(
    "options",
    [
        {"when": "update_first"},
        {"denominator": "elementwise", "norm": True},
        {"rescale": True},
    ],
    ids=str,
)
def test_the_projection(options):
    Twins(method="mla", method_args=options, missing="0.4").check()


def test_the_projection_with_a_rank():
    twins = Twins(method="mla", method_args={"rank": 3}, missing="0.4")
    # a wait for every time the factor is cut back: eigenvectors
    assert {what for what, _ in twins.waits} <= {"linalg"}
    twins.check(1e-4, waits=sum(twins.waits.values()))


# AdamW divides by the size of a gradient: where that is rounding, the sign is chance
OPTIONS = {
    "augment": {"augment": "crop,flip"},
    "bf16": {"precision": "bf16", "tol": 5e-2},
    "channels_last": {"channels_last": True},
    "fused": {"fused": True},
    "fused channels_last": {"fused": True, "channels_last": True},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "tol": 5e-3},
    "adamw fused": {"optimizer": "adamw", "lr": 1e-3, "fused": True, "tol": 5e-3},
    "zeros": {"missing_fill": "zeros"},
    "tf32": {"tf32": True},
    "cosine": {"schedule": "cosine"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    options = dict(OPTIONS[name])
    tol = options.pop("tol", 1e-5)
    epochs = 1 + (name == "cosine")
    Twins(method="mla", missing="0.4", epochs=epochs, **options).check(tol)


@pytest.mark.parametrize("name", ["concat", "mla", "qmf", "ogm", "mmpareto"])
@pytest.mark.parametrize("gaps", ["", "0.6"])
def test_micro_batches(name, gaps):
    how = {"method_args": ACTIVE.get(name, {}), "missing": gaps, "epochs": 1}
    Twins(method=name, batch_size=2, accumulation_steps=4, **how).check(5e-5)


def test_batches_that_workers_prepare():
    few = mock.patch.object(
        runs, "loaders", lambda *a, **kw: loaders(*a, ready=0, **kw)
    )
    with few:
        Twins(method="mla", missing="0.4", workers=1, augment="flip").check()


ENCODERS = {
    "resnet18": "audio=resnet18,image=resnet18,text=small",
    "m3ae": "audio=small,image=m3ae(size=tiny,patch=8),"
    "text=m3ae(size=tiny,checkpoint=True)",
    "cavmae": "audio=cavmae(size=tiny,patch=8),"
    "image=cavmae(size=tiny,patch=8,train_last=1),text=small",
}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name, precision):
    if (name, precision) == ("resnet18", "bf16"):
        pytest.skip("nothing that the small encoders do not show; ten million weights")
    how = {"encoder": ENCODERS[name], "precision": precision, "epochs": 1, "lr": 1e-3}
    Twins(method="mla", **how).check(5e-2 if precision == "bf16" else 2e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    "A tiny random model with its tokenizer, as a folder"
    tf = pytest.importorskip("transformers")
    from test_hub import SMALL, tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    shape = tf.BertConfig(**SMALL, vocab_size=60, max_position_embeddings=32)
    tf.BertModel(shape).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_hub_encoders(bert):
    spec = f"audio=small,image=small,text=hf:{bert}"
    Twins(method="concat", encoder=spec, epochs=1).check()


# files --------------------------------------------------------------------------------

RESUMED = {
    "mla": {},
    "mla rank": {"method": "mla", "method_args": {"rank": 3}},
    "qmf": {"missing": "0.4"},
    "concat": {"optimizer": "adamw", "lr": 1e-3},
    # three batches: one is varied while another one is trained
    "ogm_ge": {"augment": "crop,flip", "dataset_args": "n=36"},
    "pmr": {},
    "agm": {},
    "inforeg": {},
    "valuation": {},
    "umt": {},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(name, tmp_path):
    fields = {"method": name, "method_args": ACTIVE.get(name, {}), **RESUMED[name]}
    whole, cut, _, steps = P.cut_and_whole(tmp_path, **fields)
    assert P.same_files(whole, cut) == 0
    waits = certain(sum(steps, P.Counter()))
    if name != "mla rank":
        assert not waits, dict(waits)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run on the device, and the waits of it"
    root = tmp_path_factory.mktemp("runs")
    cfg = configure(method="mla", temperature="validation", root=str(root))
    with keep_ends(), gpu(), watch() as seen:
        result = runs.run(cfg)
    return cfg, result, seen


def test_a_finished_run_names_its_device(finished):
    _, result, _ = finished
    assert result["environment"]["device"] == NAME


def test_a_run_on_the_cpu_does_not_name_the_gpu():
    with gpu():
        learn = P.trained(configure(method="concat", device="cpu", epochs=1))
        assert learn.runtime.device.type == "cpu"
        assert environment(learn.runtime.device)["device"] == "cpu"
        assert environment(DEVICE)["device"] == NAME


def test_an_epoch_waits_a_few_times_and_not_once_per_turn_or_weight(finished):
    "Validation downloads predictions, the epoch its losses, a checkpoint every tensor"
    _, _, seen = finished
    lines, appraisal = P.Counter(), 0
    code, first = inspect.getsourcelines(LocalRuntime.encode_split)
    for (what, line), n in certain(seen).items():
        file, number = line.split(":")
        if file == "train/learner.py" and first <= int(number) < first + len(code):
            appraisal += n  # after training, validation is encoded once
        else:
            lines[file, what] += n
    assert sum(n for (f, _), n in lines.items() if f == "train/learner.py") <= 2
    assert 0 < appraisal <= 6
    assert lines["methods/base.py", UPLOAD] == 0
    tensors = sum(1 for _ in finished_state(finished)) + 10
    saved = [lines[f, w] for f, w in lines if f in ("train/checkpoints.py", "tools.py")]
    # twice the state, once the best weights, the test's weights
    assert sum(saved) <= 4 * tensors, dict(lines)


def finished_state(finished):
    yield from tensors_in(end_of(finished[0].folder))


def tensors_in(x):
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):
        for v in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(v)


def test_a_resumed_optimizer_counts_its_steps_on_the_cpu(tmp_path):
    _, cut, seen, steps = P.cut_and_whole(
        tmp_path, method="concat", optimizer="adamw", lr=1e-3
    )
    assert not any(what == "item" for what, _ in certain(sum(steps, P.Counter())))
    assert not any(what == DOWNLOAD and "optim" in line for what, line in seen)


def test_predictions_on_the_device_are_those_on_the_cpu(finished):
    cfg, _, _ = finished
    with gpu():
        p, q = (load(cfg.folder, device=d) for d in (NAME, "cpu"))
        part = runs.make_dataset(cfg).test
        asked = [dict(part[i]["x"]) for i in range(3)]
        asked[2]["image"] = None
        with watch() as seen:
            a = p.predict_items(asked)
        b = q.predict_items(asked)
    assert (a.fused - b.fused).abs().max() < 1e-5 and a.fused.device.type == "cpu"
    assert sum(n for (w, _), n in seen.items() if w == DOWNLOAD) <= 8


def test_an_export_leaves_the_net_where_it_is(finished, tmp_path):
    from mla_nb import export

    cfg, _, _ = finished
    with gpu():
        p = load(cfg.folder, device=NAME)
        with mock.patch.object(export, "traced", side_effect=InputError("no")):
            for f, name in (
                (export.export_program, "m.pt2"),
                (export.export_onnx, "m.onnx"),
            ):
                with pytest.raises(InputError):
                    f(p, tmp_path / name)
        assert p.device == NAME
        assert all(on_device(v) for v in p.net.state_dict().values())


# evaluation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    "A net on the device with its loaders, and the same on the CPU"
    twins = Twins(method="mla", epochs=1)
    twins.cpu.net.load_state_dict(
        {k: host(v) for k, v in twins.gpu.net.state_dict().items()}
    )
    return twins.gpu, twins.cpu


@pytest.mark.parametrize("name", sorted(rules))
def test_every_rule(learned, name):
    rule = make_rule(name)
    for learn in learned:
        learn.method = replace(learn.method, rule=rule)
    with gpu():
        a = learned[0].predictions(learned[0].dls.test)
    b = learned[1].predictions(learned[1].dls.test)
    assert (a.fused - b.fused).abs().max() < 1e-5
    assert (a.weights - b.weights).abs().max() < 1e-5


@pytest.mark.parametrize("name", sorted(rules))
def test_every_rule_works_without_doubles(name):
    "Apple GPUs have none"
    logits, here = torch.randn(3, 4, 5), torch.rand(3, 4) > 0.3
    want = make_rule(name)(logits, here)
    with pretend.single_precision():
        got = make_rule(name)(logits.to(DEVICE), here.to(DEVICE))
    assert torch.allclose(host(got), want, atol=1e-6)


def test_temperatures_and_fixed_weights():
    for how in ({"temperature": "validation"}, {"rule": "fixed"}):
        Twins(method="mla", missing="0.4", **how).check()


class Lazily:
    "A loader whose batches are made when they are asked for; how many are alive?"

    def __init__(self, dl):
        self.dl, self.most = dl, 0

    def __iter__(self):
        import gc
        import weakref

        alive = []
        for b in self.dl:
            rows = [b.select_rows(torch.tensor([i])) for i in range(len(b))]
            for k in range(len(rows)):
                one, rows[k] = rows[k], None
                alive.append(weakref.ref(one))
                yield one
                del one
                gc.collect()
                self.most = max(self.most, sum(r() is not None for r in alive))


def test_no_evaluation_holds_the_whole_split(learned):
    net, method, dls = learned[0].net, learned[0].method, learned[0].dls
    with gpu():
        whole = predictions(net, method, dls.test)
        dl = Lazily(dls.test)
        swept = missing.sweep(net, method, dl, [0.0, 0.5])
        assert (swept[0.0].fused - whole.fused).abs().max() < 1e-5 and dl.most <= 2
        dl = Lazily(dls.test)
        found = evaluation.subset_accuracy(net, method, dl)
        assert len(found) == 8 and dl.most <= 2
        z, _ = evaluation.features_of(net, dls.test)
        assert evaluation.modality_gap(z)
        item = learned[0].dls.test.dl.dataset.batch  # prepared rows
        assert predict(net, method, item.to(DEVICE)).fused.shape[0] == len(item)
        p = learned[0].validate()
        assert evaluation.metrics(p) and evaluation.temperatures(p)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_features_are_extracted(learned, precision):
    cfg = configure()
    s = missing.with_missing(runs.make_dataset(cfg), "0.3")
    encs = {m: copy.deepcopy(e) for m, e in learned[0].net.encoders.items()}
    with gpu():
        got = Extractor(s, encs, 3, precision, NAME).block("valid", 0)
        want = Extractor(s, {m: e.cpu() for m, e in encs.items()}, 3, precision).block(
            "valid", 0
        )
    for m in want:
        for a, b in zip(got[m], want[m]):
            assert (a is None) == (b is None)
            near = 0.1 if precision == "bf16" else 1e-2
            assert a is None or np.abs(a.astype("f4") - b.astype("f4")).max() < near


# settings of the whole process --------------------------------------------------------


def test_runs_on_two_devices_in_one_process():
    "Accelerate remembers the first device of a process, unless it is told to forget"
    with pretend.posing(), mock.patch.object(torch.cuda, "set_device"):
        found = [start_accelerator(d).device.type for d in ("auto", "cpu", "auto")]
    assert found == ["cuda", "cpu", "cuda"]
    assert start_accelerator("auto").device.type == "cpu"


class Notes(Callback):
    "What the process is set to while it trains"

    def after_step(self, learn, turn):
        cudnn = torch.backends.cudnn
        self.seen = (
            torch.get_float32_matmul_precision(),
            cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
            cudnn.deterministic,
        )


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_arithmetic_is_set_and_restored(tf32, deterministic):
    notes, outside = Notes(), Notes()
    outside.after_step(None, None)
    cfg = configure(method="concat", tf32=tf32, deterministic=deterministic, epochs=1)
    with gpu():
        learn = P.trained(cfg, callbacks=[notes])
        learn.predictions(learn.dls.test)
    matmul = "high" if tf32 else "highest"
    assert notes.seen == (matmul, tf32, deterministic, deterministic)
    after = Notes()
    after.after_step(None, None)
    assert after.seen == outside.seen == ("highest", True, False, False)


def test_what_cannot_repeat_its_numbers_is_named():
    e = RuntimeError(
        "upsample_bicubic2d_backward_out_cuda does not have a deterministic "
        "implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    )
    said = str(explain_failure(e, configure()))
    assert said.startswith("deterministic=True: upsample_bicubic2d_backward_out_cuda")
    assert "leave deterministic out" in said


def test_a_child_process_is_not_forked_from_one_that_uses_the_gpu():
    from mla_nb import reliability

    started = []

    class Context:
        class Process:
            exitcode = 0

            def __init__(self, target, args):
                started.append((target, args))

            def start(self):
                pass

            def join(self, seconds):
                pass

            def is_alive(self):
                return False

    fork = mock.patch.object(os, "fork", side_effect=AssertionError("forked"))
    fresh = mock.patch.object(reliability, "get_context", lambda how: Context)
    cfg = configure()
    with pretend.posing(), fork, fresh:
        assert reliability.forked(cfg) == 0
    assert started == [(reliability._only_run, (cfg,))]


# small things that differ on a GPU ----------------------------------------------------


def test_a_varied_picture_leaves_the_generator_of_the_device_alone():
    x, before = torch.zeros(3, 8, 8, dtype=torch.uint8), pretend.generator.get_state()
    augment_image(x, 5)
    Pixels(8).augment(x, 6)
    assert pretend.generator.get_state().equal(before)


def test_varied_pictures_are_pinned_again():
    with gpu():
        learn = P.trained(configure(method="concat", augment="flip", epochs=1))
        with watch() as seen:
            for b in learn.dls.train:
                assert on_device(b.x["image"]) and b.numbers.device.type != NAME
    assert not seen, dict(seen)


def test_pictures_come_in_the_layout_asked_for():
    seen = []
    for last in (False, True):
        with gpu():
            cfg = configure(method="concat", channels_last=last, epochs=1)
            learn = P.trained(cfg)
            first = next(
                m
                for m in learn.net.encoders["image"].modules()
                if isinstance(m, torch.nn.Conv2d)
            )
            first.register_forward_hook(
                lambda m, x, y: seen.append(
                    x[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
            learn.predictions(learn.dls.valid)
    assert seen[0] is False and seen[-1] is True
    clips = torch.zeros(2, 3, 3, 8, 8)
    last = runtime._channels_last(clips)
    frames = last.flatten(0, 1)
    assert last.shape == clips.shape
    assert frames.is_contiguous(memory_format=torch.channels_last)


class Poison(Callback):
    "One gradient overflows in one turn; the loss stays finite"

    order = -9

    def after_backward(self, learn, turn):
        if (learn.epoch, learn.step) == (0, 0):
            next(p for p in learn.net.parameters() if p.grad is not None).grad[0] = (
                float("inf")
            )
            self.rows = turn.rows.idx.tolist()


def test_the_guard_names_the_turn_that_broke_and_not_a_later_one():
    poison = Poison()
    with (
        gpu(),
        pytest.raises(Diverged, match="gradient is inf in epoch 1, batch 1") as e,
    ):
        P.trained(configure(method="concat"), callbacks=[poison])
    assert f"samples {poison.rows[:5]}" in str(e.value)


def test_batches_of_validation_follow_the_training_batch():
    cfg = configure(batch_size=2, accumulation_steps=3)
    learn = runs.build(cfg, runs.make_dataset(cfg))
    assert [learn.dls.valid.batch_size, learn.dls.test.batch_size] == [8, 8]
    assert learn.dls.train.batch_size == 6
    learn.runtime.prepare(learn)
    assert max(len(b) for b in learn.training_rows()) == 8
    big = cfg.replace(batch_size=300, accumulation_steps=1)
    assert runs.build(big, runs.make_dataset(big)).dls.valid.batch_size == 256
    said = str(explain_failure(torch.OutOfMemoryError("x"), cfg))
    assert "batch_size=1 accumulation_steps=6" in said and "validation" in said


def test_position_tables_are_made_once_and_move_with_the_net():
    net = M3AE(16, 1, 2, patch=4, vocab=9)
    x = {"ids": torch.ones(2, 5).long(), "mask": torch.ones(2, 5).bool()}
    with torch.inference_mode():
        a, b = net(x), net(torch.rand(2, 3, 8, 8))
    names = {k for k, _ in net.named_buffers()}
    assert names == {"places_5_0", "places_2_2"} and not set(net.state_dict()) & names
    net.to(DEVICE)
    with watch() as seen:
        c = net({k: v.to(DEVICE, non_blocking=True) for k, v in x.items()})
        c.sum().backward()
    assert not certain(seen) and torch.allclose(host(c.detach()), a, atol=1e-5)
    assert b.shape == (2, 16)


# two processes ------------------------------------------------------------------------


def test_two_processes(tmp_path):
    here = Path(__file__).parent
    done = subprocess.run(
        together(here / "pretend_team.py"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("same") == 4, done.stdout + done.stderr[-3000:]
