"""A pretended GPU: tensors of the device `cudaish:0` lie in the CPU's memory, and what CUDA would refuse is refused.

`install` it before a model is loaded; torch keeps a backend for good, so each use is a process of its own. The name
begins with "cuda", so whatever asks for that goes the way of a GPU. Gradients, optimizers and files are real.

Refused: tensors of two devices in one operation, an index of the device into a tensor of the host, `.numpy()` of the
device, generators of the host for it, an allocation above `MEMORY.largest_bytes`, and memory that is written to while
its copy to the device may be under way.

Counted (`recorded`): launches, which are operations that compute or copy, and waits, by the thread that waits: copies
to the host, copies from it that are not both pinned and `non_blocking`, tensors made on the device from Python's
values, indices on the host, item(), tolist(), bool(), nonzero(), masks as indices, and waiting for an event.

Not seen: the order of streams, several GPUs, CUDA's own generators (a sweep needs dropout 0), number formats of
kernels, memory in use, time. One operation of torch's counts as one launch, whatever kernels it starts.
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "cudaish"
DEVICE = f"{NAME}:0"

COPIES = {"aten::copy_", "aten::_copy_from"}
INDEXING = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
WAITING = {
    "aten::_local_scalar_dense": "item()",
    "aten::is_nonzero": "bool()",
    "aten::nonzero": "nonzero()",
    "aten::masked_select": "masked_select()",
    "aten::equal": "equal()",
}
IDLE = {  # they only allocate, or give memory another shape
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
    *("aten::sym_size", "aten::is_same_size", "aten::_unsafe_view", "aten::_reshape_alias"),
}
_root = importlib.util.find_spec("deltaclip").submodule_search_locations[0]
PROJECT = str(Path(_root).resolve())
_library = []  # a registration lasts as long as its object


# ---- What happened on the device


class Record:
    """Launches by operation and waits by (what, where); `elsewhere` has the waits of other threads than the maker's.

    With `alone` nothing of other threads counts: of lanes that work side by side; a backward pass has its own thread.
    """

    def __init__(self, *, alone):
        self.alone = alone
        self.launches, self.waits = collections.Counter(), collections.Counter()
        self.elsewhere, self.bytes_to_device = collections.Counter(), 0
        self.copies = 0  # from the host to the device
        self._thread, self._lock = threading.get_ident(), threading.Lock()

    def counts(self):
        return not self.alone or threading.get_ident() == self._thread

    def add_launch(self, name):
        with self._lock:
            self.launches[name] += 1

    def add_wait(self, what):
        mine = threading.get_ident() == self._thread
        with self._lock:
            (self.waits if mine else self.elsewhere)[what, place()] += 1

    def add_copy(self, size_bytes):
        with self._lock:
            self.copies += 1
            self.bytes_to_device += size_bytes


_records = []


@contextlib.contextmanager
def recorded(*, alone=False):
    """Count what this thread, and others unless `alone`, do until the end of the block."""
    record = Record(alone=alone)
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def _launched(name):
    for record in filter(Record.counts, _records):
        record.add_launch(name)


def waited(what):
    """Count a wait, after which all copies are done."""
    UNDER_WAY.check()
    for record in filter(Record.counts, _records):
        record.add_wait(what)


def place():
    """The nearest two lines of the project on the stack, the innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        ours = file.startswith(PROJECT) and "site-packages" not in file and "pretended" not in file
        if ours and not file.startswith(f"{PROJECT}/tests/"):
            found.append(f"{file[len(PROJECT) + 1 :]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "(torch)"


class Memory:
    """What is free, and the largest tensor that the device has room for, None for any."""

    free_bytes, largest_bytes = 1 << 40, None

    def check(self, tensors):
        for tensor in tensors:
            if self.largest_bytes is not None and tensor.nbytes > self.largest_bytes:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tensor.nbytes} bytes.")


MEMORY = Memory()


class Decoder:
    """TorchCodec's for the device: the width above which it gives up on a picture, None for none."""

    widest = None

    def check(self, pictures):
        for picture in pictures:
            if self.widest is not None and picture.shape[-1] > self.widest:
                raise RuntimeError(f"pretended: wider than {self.widest}\nand more that nobody needs")


DECODER = Decoder()


class UnderWay:
    """Copies from pinned memory that nothing has waited for: what they read must stay as it is."""

    def __init__(self):
        self._copies, self._lock = [], threading.Lock()

    def add(self, source):
        flat = _bytes_of(source)
        with self._lock:
            self._copies = [*self._copies[-64:], (source, zlib.crc32(flat))]

    def check(self):
        with self._lock:
            copies, self._copies = self._copies, []
        for source, sum_then in copies:
            assert zlib.crc32(_bytes_of(source)) == sum_then, f"pinned memory changed under a copy [{place()}]"


UNDER_WAY = UnderWay()
_pinned = {}  # address: the tensor, kept so that an address is not given out again


def _bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def _is_pinned(tensor):
    return tensor.untyped_storage().data_ptr() in _pinned


# ---- Tensors of the device


class OnGpu(torch.Tensor):
    """A tensor of the device; `inner`, on the CPU, holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnGpu({self.inner!r})"

    __str__ = __repr__

    def __getitem__(self, index):
        return super().__getitem__(_moved_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_moved_index(index), value)

    def __deepcopy__(self, memo):
        copied = OnGpu(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        return copied

    def tolist(self):
        waited("tolist()")
        return self.inner.tolist()

    def record_stream(self, _stream):
        """Keep the memory until the stream is done with it: nothing is given back here anyway."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _moved_index(index):
    # torch moves a list or an array in C++, where nothing is seen of it.
    if isinstance(index, list | np.ndarray):
        waited("index by a list or an array")
        return OnGpu(torch.from_numpy(np.asarray(index)))
    return index


def _is_here(device):
    return device is not None and torch.device(device).type == NAME


def _inner(value):
    return value.inner if isinstance(value, OnGpu) else value


def _outer(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _tensors(*values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


# ---- Operations


def _run(func, args, kwargs):
    """Run an operation in the CPU's memory, after what CUDA would count, wait for or refuse."""
    name = func._schema.name
    if not _is_view(func):
        _launched(name)
    here = [tensor for tensor in _tensors(args, kwargs) if isinstance(tensor, OnGpu)]
    _refuse_or_wait(func, args, kwargs, bool(here))
    if name == "aten::_to_copy":
        return _copied(func, args, kwargs)
    if name in ATTENTION:
        return tree_map(_outer, ATTENTION[name](*tree_map(_inner, args), **tree_map(_inner, kwargs)))
    to_host = name == "aten::copy_" and not isinstance(args[0], OnGpu)
    inner_args, inner_kwargs = tree_map(_inner, (args, _for_cpu(kwargs)))
    out = func(*inner_args, **inner_kwargs)
    if to_host:
        return args[0]
    if not here and not _is_here(kwargs.get("device")):
        return out
    MEMORY.check(_tensors(out))
    wrapped = tree_map(_outer, out)
    if name.endswith("_") or any(argument.alias_info is not None for argument in func._schema.arguments):
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


def _is_view(func):
    returned = [one.alias_info for one in func._schema.returns]
    return func._schema.name in IDLE or any(alias is not None and not alias.is_write for alias in returned)


def _for_cpu(kwargs):
    inner = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if _is_here(kwargs.get("device")):
        inner["device"] = torch.device("cpu")
    return inner


def _refuse_or_wait(func, args, kwargs, any_here):
    name, generator = func._schema.name, kwargs.get("generator")
    if not any_here:
        return
    if name in WAITING:
        waited(WAITING[name])
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' [{place()}]")
    if name in INDEXING and any(one is not None and one.dtype == torch.bool for one in tree_leaves(args[1])):
        waited("mask as an index")
    # CUDA takes numbers, which are tensors without dimensions, from the host.
    apart = [tensor for tensor in _tensors(args, kwargs) if not isinstance(tensor, OnGpu)]
    large = [tensor for tensor in apart if tensor.dim()]
    if name in COPIES and apart:
        source, target = (args[1], args[0]) if name == "aten::copy_" else args[:2]
        _count_copy(source, target, non_blocking=bool(kwargs.get("non_blocking") or (len(args) > 2 and args[2])))
    elif name == "aten::_foreach_copy_" and apart:
        waited("foreach_copy_ between devices")
    elif name in INDEXING and large and isinstance(args[0], OnGpu):
        waited("index on the host")
    elif large and name != "aten::_to_copy":
        shapes = [tuple(tensor.shape) for tensor in _tensors(args, kwargs)]
        words = f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu!"
        raise RuntimeError(f"{words} {func} {shapes} [{place()}]")


def _count_copy(source, target, *, non_blocking):
    if isinstance(source, OnGpu):
        if not (non_blocking and target is not None and _is_pinned(target)):
            waited("device to host")
        return
    for record in filter(Record.counts, _records):
        record.add_copy(source.nbytes)
    if not _is_pinned(source):
        waited("host to device, pageable")
    elif not non_blocking:
        waited("host to device, blocking")
    else:
        UNDER_WAY.add(source)


def _copied(func, args, kwargs):
    """`.to(...)`: another device, another type, or both; memory is never shared between devices."""
    source, wanted = args[0], kwargs.get("device")
    was_here = isinstance(source, OnGpu)
    will_be = _is_here(wanted) if wanted is not None else was_here
    if was_here != will_be:
        _count_copy(source, None, non_blocking=bool(kwargs.get("non_blocking")))
    out = func(_inner(source), *args[1:], **_for_cpu(kwargs))
    if was_here != will_be and out.untyped_storage().data_ptr() == _inner(source).untyped_storage().data_ptr():
        out = out.clone()
    if will_be:
        MEMORY.check([out])
    return OnGpu(out) if will_be else out


def _attend(query, key, value, *more, scale=None):
    attn_bias, dropout_p, is_causal = [*more, *(None, 0.0, False)[len(more) :]][:3]
    out, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_bias, scale=scale
    )
    nothing = torch.empty(0, dtype=torch.int64)
    lengths = query.shape[2], key.shape[2]
    return out, log_sums, nothing, nothing, *lengths, nothing, nothing, torch.empty(0)


def _attend_backward(grad, *given, scale=None):
    query, key, value, attn_bias, _, out, log_sums = given[:7]
    dropout_p, is_causal = given[11:13]
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, log_sums, dropout_p, is_causal, attn_mask=attn_bias, scale=scale
    )
    return *grads, torch.empty(0)


# The CPU's own kernel, so that numbers are the CPU's.
ATTENTION = {
    "aten::_scaled_dot_product_fused_attention_overrideable": _attend,
    "aten::_scaled_dot_product_fused_attention_overrideable_backward": _attend_backward,
}


# ---- Installation


class Backend:
    """What torch asks of the module of a backend."""

    def is_initialized(self):
        return True

    def is_available(self):
        return True

    def current_device(self):
        return 0

    def device_count(self):
        return 1

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)


class Stream:
    """A stream that orders nothing."""

    def __init__(self, device=None, **_):
        self.device = device

    def wait_stream(self, _other):
        pass

    def wait_event(self, _event):
        pass

    def record_event(self, event=None):
        return event or Event()

    def synchronize(self):
        waited("stream")


class Event:
    """A mark in a stream; whoever waits for it waits for the device."""

    def __init__(self, *_, **__):
        pass

    def record(self, _stream=None):
        pass

    def wait(self, _stream=None):
        pass

    def synchronize(self):
        waited("event")


class Generator(torch.Generator):
    """One of the device: what takes its device is there, but only what draws nothing can use it."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu" if _is_here(device) else device)
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


def install():
    """Register the device with torch, and replace what torch cannot be told about it, for the whole process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=Backend())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    _library.append(library)
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()
    torch.cuda.current_stream = Stream
    torch.cuda.get_device_name = lambda _device=None: "pretended"
    torch.cuda.synchronize = lambda _device=None: waited("synchronize()")
    torch.cuda.mem_get_info = lambda _device=None: (MEMORY.free_bytes, 1 << 40)
    torch.Generator = Generator
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data =` would leave `inner` as it was
    torch.inference_mode = lambda mode=True: torch.no_grad()  # a wrapper cannot be a tensor of inference
    torch.nn.utils.clip_grad._has_foreach_support = lambda *_, **__: True
    _fuse_attention()
    _make_constructors()
    if importlib.util.find_spec("torchcodec"):
        _decode_there()


def _decode_there():
    """Let TorchCodec decode JPEG files for the device, on the CPU: a wait a call, as it reads memory of the host."""
    from torchcodec import decoders

    plain = decoders.decode_jpeg

    def decode_jpeg(source, *, device="cpu", **options):
        if not _is_here(device):
            return plain(source, device=device, **options)
        waited("decode_jpeg()")
        _launched("decode_jpeg")
        decoded = plain(list(source), device="cpu", **options)
        DECODER.check(decoded)
        MEMORY.check(decoded)
        return [OnGpu(each) for each in decoded]

    decoders.decode_jpeg = decode_jpeg


def _fuse_attention():
    """Let attention be one operation, as CUDA has it: torch lets no backend of Python's choose that."""
    plain, fused = F.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_fused_attention_overrideable

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):  # noqa: PLR0917 - torch's
        if not isinstance(query, OnGpu) or more.get("enable_gqa"):
            return plain(query, key, value, attn_mask, dropout_p, is_causal, **more)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=more.get("scale"))[0]

    F.scaled_dot_product_attention = attention


def _make_constructors():
    empty, tensor, as_tensor = torch.empty, torch.tensor, torch.as_tensor

    def pinning(*size, pin_memory=False, **kwargs):
        made = empty(*size, **kwargs)
        if pin_memory:
            _pinned[made.untyped_storage().data_ptr()] = made
        return made

    def from_values(data, *, device=None, **kwargs):
        if not _is_here(device):
            return tensor(data, device=device, **kwargs)
        waited("torch.tensor(device=)")
        return OnGpu(tensor(data, **kwargs))

    def from_data(data, dtype=None, device=None):
        if isinstance(data, OnGpu) or not _is_here(device):
            return as_tensor(data, dtype=dtype, device=device)
        waited("torch.as_tensor(device=)")
        return OnGpu(as_tensor(data, dtype=dtype))

    torch.empty, torch.tensor, torch.as_tensor = pinning, from_values, from_data
