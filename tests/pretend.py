"""A pretend GPU: `torch.device("pretend")`, whose tensors hold real numbers.

They lie in the memory of the CPU and behave like a GPU's where that can break a
program:

- A tensor of the CPU and one of the device do not meet in one operation, except where
  CUDA allows it: 0-dim CPU tensors in elementwise operations, and CPU indices.
- Whatever the host has to wait for is counted, with the line that asked for it:
  `with watch() as seen: …`. A copy from memory that is not pinned, and that was said to
  be free to go (`non_blocking`), may wait (`MAY_WAIT`); all other counts surely do.
- Random numbers come from a generator of its own, which `torch.manual_seed` seeds, as
  it would CUDA's. `with shared_numbers(): …` takes the CPU's instead, to compare runs.
- `with posing(): …` lets code that asks `torch.cuda` find a GPU. Copies on a side
  stream are then late: there is garbage until somebody waits for their event.
- `with single_precision(): …` refuses float64, as Apple's GPUs do.

What it cannot show: speed, memory, overlap, CUDA's kernels (accuracy of bf16 and TF32,
nondeterminism), `torch.compile`, NCCL.

A device tensor is a C++ tensor of PrivateUse1, the device type that PyTorch keeps for
others. DLPack makes it from a CPU tensor, and back, without a copy. One fallback in
Python runs every operation on CPU aliases of its arguments; autograd, optimizers and
autocast are PyTorch's own.

Importing this module changes the whole process (`torch.accelerator`, `Module.to`), so
tests that need it lie in `on_pretend.py`, which `test_pretend.py` runs in a process of
its own. PyTorch's private interfaces are used: where they have changed, `WHY_NOT` says
what is missing, and the tests skip.
"""

import ctypes
import functools
import os
import sys
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

NAME = "pretend"
CPU, OTHERS = 1, 12  # DLPack's numbers of device types: kDLCPU, kDLExtDev
aten = torch.ops.aten

# memory -------------------------------------------------------------------------------


@functools.cache
def pointer_of():
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return get


def relabeled(t, kind):
    "The same memory, as a tensor of another type of device"
    capsule = torch._C._to_dlpack(t)
    # DLTensor begins with the address of the data (8 bytes); the device type is next
    struct = pointer_of()(capsule, b"dltensor")
    ctypes.c_int32.from_address(struct + 8).value = kind
    return torch._C._from_dlpack(capsule)


def on_device(x):
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def host(x):
    "An alias on the CPU of a device tensor; anything else as it is"
    return relabeled(x, CPU) if on_device(x) else x


def device(x):
    "A device tensor over the memory of a new CPU tensor"
    return relabeled(x, OTHERS) if isinstance(x, torch.Tensor) else x


def mapped(f, x):
    "`f` of every value in a nest of lists and tuples"
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(f, v) for v in x])
    return f(x)


def leaves(x):
    "All values in a nest of lists and tuples"
    return [t for v in x for t in leaves(v)] if isinstance(x, (list, tuple)) else [x]


# what the host waits for --------------------------------------------------------------

UPLOAD, DOWNLOAD = "copy to the device", "copy to the CPU"
MAY_WAIT = "copy from memory that is not pinned"
READS = {  # operations whose result, or its shape, the host must know
    "_local_scalar_dense": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "equal": "equal",
    "bincount": "bincount",
    "unique_dim": "unique",
    "_unique": "unique",
    "_unique2": "unique",
    "unique_consecutive": "unique",
    "unique_dim_consecutive": "unique",
    "_linalg_eigh": "linalg",
    "_linalg_svd": "linalg",
    "_linalg_solve_ex": "linalg",
    "_linalg_det": "linalg",
    "linalg_cholesky_ex": "linalg",
    "linalg_inv_ex": "linalg",
    "linalg_lstsq": "linalg",
    "linalg_qr": "linalg",
    "histc": "histc",
    "multinomial": "multinomial",
}
HERE, TORCH = os.path.abspath(__file__), os.path.dirname(torch.__file__)
_watchers, _main = [], threading.main_thread().ident


def _foreign(path):
    return (
        path.startswith((TORCH, "<")) or path == HERE or path.endswith("contextlib.py")
    )


def asking_line():
    "folder/file.py:line of the project, or of a library, that is being executed"
    own = threading.get_ident() == _main
    # a backward pass runs in a thread of C++: the main one waits for it
    f = sys._getframe() if own else sys._current_frames()[_main]
    while f and _foreign(f.f_code.co_filename):
        f = f.f_back
    return f"{'/'.join(f.f_code.co_filename.split(os.sep)[-2:])}:{f.f_lineno}"


def note(what):
    for seen in _watchers:
        seen[what, asking_line()] += 1


@contextmanager
def watch():
    "A Counter of (what was waited for, who asked)"
    seen = Counter()
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers[:] = [w for w in _watchers if w is not seen]


def certain(seen):
    "The waits that surely happen on a GPU"
    return Counter({k: n for k, n in seen.items() if k[0] != MAY_WAIT})


# operations ---------------------------------------------------------------------------

NUMBERS = {  # take 0-dim CPU tensors, besides elementwise operations
    "index_put_",
    "_index_put_impl_",
    "fill_",
    "masked_fill_",
    "where",
    "clamp",
    "clamp_",
    "lerp",
    "lerp_",
}
INDEXED = {
    "index",
    "index_put_",
    "_index_put_impl_",
}  # their indices may lie on the CPU
generator = torch.Generator().manual_seed(0)


class Settings:
    own_numbers = True  # False: draw what the CPU would draw
    doubles = True  # False: float64 is refused
    stream = None  # the side stream in use


def written(op, args, kwargs):
    "The ids of the tensors that an operation changes"
    changed = (
        kwargs.get(a.name, args[i] if i < len(args) else None)
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info and a.alias_info.is_write
    )
    return {id(t) for t in leaves(list(changed))}


def check_devices(op, known, args, kwargs):
    "CUDA's rule: all on one device, except for numbers and indices"
    given = [
        t for t in leaves([*args, *kwargs.values()]) if isinstance(t, torch.Tensor)
    ]
    hosts = [t for t in given if t.device.type != NAME]
    if not hosts or len(hosts) == len(given):
        return
    free = {id(t) for t in leaves(args[1])} if known.name in INDEXED else set()
    for t in hosts:
        number = known.takes_numbers and t.dim() == 0
        if id(t) in free or number and id(t) not in written(op, args, kwargs):
            continue
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu! (when checking arguments of {op})"
        )


def check_layouts(name, args):
    "Fused optimizers want parameters, gradients and state in one layout"
    lists = [a for a in args if isinstance(a, (list, tuple)) and a]
    sized = [a for a in lists if all(isinstance(t, torch.Tensor) for t in a)]
    for same in zip(*(a for a in sized if len(a) == len(sized[0]))):
        big = [t for t in same if t.dim() and t.shape == same[0].shape]
        if len({t.stride() for t in big}) > 1:
            raise RuntimeError(
                f"{name}: params, grads and momentum must have the same strides"
            )


def note_indices(args):
    "What masks, and indices of the CPU, of an assignment cost"
    one_number = args[2].numel() == 1 and not (len(args) > 3 and args[3])
    for i in args[1]:
        if i is not None and not on_device(i):
            note(UPLOAD)
        elif i is not None and i.dtype in (torch.bool, torch.uint8) and not one_number:
            note("mask as index")


def note_reads(name, args, kwargs):
    if name in READS:
        note(READS[name])
    elif name == "repeat_interleave" and kwargs.get("output_size") is None:
        note(name)
    elif name in INDEXED - {"index"}:  # `index` asks for nonzero and copies by itself
        note_indices(args)


def draw(op, args, kwargs):
    "Run an operation that draws random numbers, from the device's generator"
    if not Settings.own_numbers:
        return op(*args, **kwargs)
    if any(a.name == "generator" for a in op._schema.arguments):
        given = [v for v in (*args, *kwargs.values()) if type(v) is torch.Generator]
        if given:
            raise RuntimeError(f"Expected a '{NAME}' generator but found 'cpu'")
        return op(*args, **{**kwargs, "generator": generator})
    before = torch.get_rng_state()
    try:
        torch.set_rng_state(generator.get_state())
        out = op(*args, **kwargs)
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    return out


class About:
    "What the schema of an operation says"

    def __init__(self, op):
        schema = op._schema
        self.name = schema.name.split("::")[1]
        info = [r.alias_info for r in schema.returns]
        views = bool(info) and all(a and not a.is_write for a in info)
        # nothing but sizes and strides
        self.is_view = self.name.startswith("set_") or views
        self.seeded = torch.Tag.nondeterministic_seeded in op.tags
        self.tensors = [str(a.type) == "Tensor" for a in schema.arguments]
        numbers = torch.Tag.pointwise in op.tags or self.name in NUMBERS
        self.takes_numbers = numbers or self.name.startswith("_foreach")


about = functools.cache(About)


class Aliases:
    "CPU aliases of the device tensors among the arguments of an operation"

    def __init__(self):
        self.of = {}

    def __call__(self, t):
        if not on_device(t):
            return t
        if id(t) not in self.of:
            # what is empty may have to grow
            empty = not t.numel()
            a = empty and torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            self.of[id(t)] = t, a if empty else host(t)
        return self.of[id(t)][1]

    def back(self, out, keys):
        "Device tensors for results; what was resized in place gets its new memory"
        for t, a in self.of.values():
            moved = t.numel() and t.data_ptr() != a.data_ptr()
            if t.shape != a.shape or moved:
                new = device(a)
                where = new.untyped_storage(), new.storage_offset()
                set_ = aten.set_.source_Storage_storage_offset
                set_.redispatch(keys, t, *where, new.shape, new.stride())
        theirs = {id(a): t for t, a in self.of.values()}
        return mapped(lambda x: theirs[id(x)] if id(x) in theirs else device(x), out)


def check_precision(out):
    for t in leaves(out):
        if isinstance(t, torch.Tensor) and t.dtype == torch.double:
            raise TypeError("Cannot convert to float64: the device has no doubles")


def run(op, *args, **kwargs):
    "Any operation, on CPU aliases of its arguments"
    known, keys = about(op), torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    name = known.name
    if known.is_view:
        return op.redispatch(keys, *args, **kwargs)
    # a fallback gets numbers in the place of some tensors
    args = [
        torch.tensor(v) if wanted and isinstance(v, (bool, int, float)) else v
        for v, wanted in zip(args, known.tensors)
    ]
    check_devices(op, known, args, kwargs)
    if name.startswith("_fused_"):
        check_layouts(name, args)
    note_reads(name, args, kwargs)
    if getattr(kwargs.get("device"), "type", None) == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
    alias = Aliases()
    hosted, named = (
        mapped(alias, args),
        {k: mapped(alias, v) for k, v in kwargs.items()},
    )
    with torch._C._AutoDispatchBelowAutograd():
        out = draw(op, hosted, named) if known.seeded else op(*hosted, **named)
    if not Settings.doubles:
        check_precision(out)
    return alias.back(out, keys)


def copy_(self, src, non_blocking=False):
    "Between devices and within one"
    if on_device(src) and not on_device(self):
        if non_blocking:
            raise RuntimeError("a copy to the CPU that nobody waits for: its values")
        note(DOWNLOAD)
    elif on_device(self) and not on_device(src):
        if not Settings.doubles:
            check_precision([self])
        if not non_blocking:
            note(UPLOAD)
        elif not getattr(src, "_pinned", False):
            note(MAY_WAIT)
        elif Settings.stream is not None:
            return Settings.stream.later(self, src)
    with torch._C._AutoDispatchBelowAutograd():
        host(self).copy_(host(src))
    return self


def _to_copy(
    self,
    *,
    dtype=None,
    layout=None,
    device=None,
    pin_memory=None,
    non_blocking=False,
    memory_format=None,
):
    keep = torch.preserve_format if memory_format is None else memory_format
    out = torch.empty_like(self, dtype=dtype, device=device, memory_format=keep)
    return out.copy_(self, non_blocking)


# autocast, with CUDA's lists of operations --------------------------------------------


def words(text):
    return text.split()


LOWER = words(
    """
    _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution prelu addmm addmv addr
    matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul
    linalg_multi_dot scaled_dot_product_attention
    """
)
FLOAT = words(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm
    native_layer_norm group_norm cosine_similarity nll_loss nll_loss2d kl_div
    l1_loss smooth_l1_loss huber_loss mse_loss binary_cross_entropy_with_logits dist
    pdist cdist renorm logsumexp norm.Scalar norm.ScalarOpt_dim upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_nearest2d prod softmax.int log_softmax.int
    cumprod cumsum sum sum.dim_IntList
    """
)
PROMOTE = words(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot index_put tensordot scatter_add
    cat stack
    """
)


def _floats(t):
    return on_device(t) and t.is_floating_point() and t.dtype != torch.double


def autocast(name, kind):
    "An operation that first changes the precision of its arguments"
    full = name if "." in name else f"{name}.default"
    op = functools.reduce(getattr, full.split("."), aten)
    own = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(own):
            given = [t for t in leaves([*args, *kwargs.values()]) if _floats(t)]
            full = any(t.dtype == torch.float for t in given)
            low = torch.get_autocast_dtype(NAME)
            to = torch.float if kind == "float" or kind == "promote" and full else low
            change = lambda t: t.to(to) if _floats(t) and t.dtype != to else t  # noqa: E731
            named = {k: mapped(change, v) for k, v in kwargs.items()}
            return op(*mapped(change, args), **named)

    return cast


# the device ---------------------------------------------------------------------------


class Module:
    "What PyTorch finds at `torch.pretend`"

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def _is_in_bad_fork(self):
        return False

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed):
        generator.manual_seed(seed)

    def get_rng_state(self, device=None):
        return generator.get_state()

    def set_rng_state(self, state, device=None):
        generator.set_state(state)

    def synchronize(self, device=None):
        note("synchronize")


def _moving(old):
    """`Module.to` gives data on CUDA to the same parameters.

    For other devices PyTorch does that only if it is asked to swap.
    """

    @functools.wraps(old)
    def to(self, *args, **kwargs):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return old(self, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return to


def _stored(storage, location):
    "torch.load(map_location='pretend')"
    if location.split(":")[0] != NAME:
        return None
    note(UPLOAD)
    plain = storage.untyped() if hasattr(storage, "untyped") else storage
    return device(torch.empty(0, dtype=torch.uint8).set_(plain)).untyped_storage()


def _cloning(old):
    "copy.deepcopy: only DLPack can make memory of this device"

    def clone(self):
        if self.device.type != NAME:
            return old(self)
        bytes_ = torch.empty(0, dtype=torch.uint8, device=NAME).set_(self)
        return bytes_.clone().untyped_storage()

    return clone


def register():
    "Make the device known to PyTorch; it is gone with the libraries that come back"
    from torch.utils import backend_registration as b

    guard, hook = b._DummyDeviceGuard(), b._DummyPrivateUse1Hook()
    b._setup_privateuseone_for_python_backend(NAME, Module(), hook, guard)
    every = torch.library.Library("_", "IMPL")
    ours = torch.library.Library("aten", "IMPL")
    every.fallback(run, "PrivateUse1")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    ours.impl("copy_", copy_, "PrivateUse1")
    ours.impl("_to_copy", _to_copy, "PrivateUse1")
    for name in ("convolution", "convolution_backward", "_convolution"):
        op = getattr(aten, name).default
        ours.impl(name, functools.partial(run, op), "PrivateUse1")
    for names, kind in ((LOWER, "lower"), (FLOAT, "float"), (PROMOTE, "promote")):
        for name in names:
            ours.impl(name, autocast(name, kind), "AutocastPrivateUse1")
    torch.nn.Module.to = _moving(torch.nn.Module.to)
    torch.UntypedStorage.clone = _cloning(torch.UntypedStorage.clone)
    name_of = lambda s: f"{NAME}:0" if s.device.type == NAME else None  # noqa: E731
    torch.serialization.register_package(1, name_of, _stored)
    return every, ours


def _try():
    "Register the device, and see whether it works"
    try:
        libraries = register()
        x = torch.ones(2, 2, requires_grad=True)
        (x.to(NAME) @ x.to(NAME)).sum().backward()
        good = host(x.to(NAME).detach()).sum().item() == 4 and x.grad.sum() == 16
        return libraries, "" if good else "the pretend device computes something else"
    except Exception as e:  # a private interface may have changed in any way
        return (), f"PyTorch {torch.__version__} has changed: {type(e).__name__}: {e}"


_libraries, WHY_NOT = _try()

# what it can be told ------------------------------------------------------------------


@contextmanager
def shared_numbers():
    "Random numbers of the device are those that the CPU would draw"
    Settings.own_numbers = False
    try:
        yield
    finally:
        Settings.own_numbers = True


@contextmanager
def single_precision():
    "The device has no float64"
    Settings.doubles = False
    try:
        yield
    finally:
        Settings.doubles = True


# posing as CUDA -----------------------------------------------------------------------


class Stream:
    "Copies from pinned memory that begin only when somebody waits for them"

    def __init__(self, device=None):
        self.copies, self.done = [], 0

    def later(self, to, src):
        h = host(to)
        floats, flags = h.is_floating_point(), h.dtype == torch.bool
        top = None if floats or flags else torch.iinfo(h.dtype).max
        h.fill_(float("nan") if floats else True if flags else top)
        self.copies.append((to, src))
        return to

    def record_event(self):
        return self, len(self.copies)

    def wait_event(self, event):
        stream, n = event
        for k in range(stream.done, n):
            to, src = stream.copies[k]
            host(to).copy_(src)
            stream.copies[k], stream.done = None, k + 1

    def synchronize(self):
        note("synchronize")
        self.wait_event(self.record_event())


@contextmanager
def on_stream(s):
    before, Settings.stream = Settings.stream, s
    try:
        yield
    finally:
        Settings.stream = before


def pinned(t, *_):
    out = t.clone()
    out._pinned = True
    return out


@contextmanager
def posing():
    "`torch.cuda` says that there is a GPU; `torch.device('cuda')` cannot be had"
    main = Stream()
    fakes = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "get_rng_state": lambda *_: generator.get_state(),
        "set_rng_state": lambda s, *_: generator.set_state(s),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda s: generator.set_state(s[0]),
        "get_device_name": lambda *_: NAME,
        "mem_get_info": lambda *_: (2**30, 2**30),
        "max_memory_allocated": lambda *_: 2**20,
        "reset_peak_memory_stats": lambda *_: None,
        "Stream": Stream,
        "stream": on_stream,
        "current_stream": lambda *_: main,
        "manual_seed_all": lambda s: None,
    }
    with ExitStack() as stack:
        for name, fake in fakes.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        for name, fake in (
            ("pin_memory", pinned),
            ("record_stream", lambda self, s: None),
        ):
            stack.enter_context(mock.patch.object(torch.Tensor, name, fake))
        yield
