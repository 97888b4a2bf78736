# SPDX-License-Identifier: MIT
"""What differs between array libraries: making an array, lending its memory, the stream to run on."""

from __future__ import annotations

import functools
from typing import Any

from . import _C


Tensors = dict[str, Any]  #: by their names in the argument struct; None where one is not given
Options = dict[str, Any]  #: numbers, likewise


def written_names(function: _C.Function, options: Options) -> tuple[str, ...]:
    """Names of the tensors that a call with these options writes."""
    if function in (_C.decode, _C.decode_describe):
        return ("out",) if options["flags"] & _C.KEEP_STATE else _C.DECODE_WRITTEN
    if function is _C.fold:
        return ("states", "prefixes")
    if function in (_C.prefill_half, _C.prefill_half_workspace_size):
        return (*_C.WRITTEN, "summaries")
    if function in (_C.backward_half, _C.backward_half_workspace_size):
        return (*_C.BACKWARD_WRITTEN, "summaries")
    return _C.BACKWARD_WRITTEN if function in (_C.backward, _C.backward_describe) else _C.WRITTEN


class Library:
    """An array library without DLPack's C exchange: every array is lent by a capsule."""

    writable = True
    float32: Any = "float32"

    def __init__(self, array_type: type):
        self.array_type = array_type

    def traced(self, q: Any) -> bool:
        """Is this call being recorded, rather than run?"""
        return False

    def record(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        """A call that is traced, instead of run()."""
        raise NotImplementedError

    def differentiated(self, *inputs: Any) -> bool:
        """Will gradients with respect to any of these be asked for?"""
        return False

    def record_prefill(self, inputs: Tensors, output_final_state: bool, options: Options) -> Any:
        """A prefill() that writes to nothing but new arrays, where it is traced or differentiated."""
        raise NotImplementedError

    def record_backward(self, inputs: Tensors, names: tuple[str, ...], options: Options) -> Tensors:
        """A backward() that is traced: the gradients of these names."""
        raise NotImplementedError

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        """A compact array on the device of `like`, contents undefined."""
        raise NotImplementedError

    def lend(self, array: Any, **how: Any) -> Any:
        """A DLPack capsule of an array of this library."""
        raise NotImplementedError

    def check(self, array: Any, name: str) -> None:
        if not isinstance(array, self.array_type):
            raise TypeError(f"{name} is of type {type(array)}; expected {self.array_type}, as q is")

    def capsule(self, array: Any, name: str, **how: Any) -> Any:
        if array is None:
            return None
        self.check(array, name)
        try:
            return self.lend(array, **how)
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an array: {error}") from error

    def capsules(self, tensors: Tensors, **how: Any) -> Tensors:
        return {name: self.capsule(array, name, **how) for name, array in tensors.items()}

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        """Calls an entry of the extension on the library's current stream."""
        raise NotImplementedError


def lend_numeric(array: Any, **how: Any) -> Any:
    """A capsule of a numpy or cupy array: ml_dtypes' bf16, which they do not export, goes as integers."""
    if array.dtype.name == "bfloat16":
        return _C.as_bfloat16(array.view("uint16").__dlpack__(**how))
    return array.__dlpack__(**how)


class Numpy(Library):
    def __init__(self) -> None:
        import numpy

        super().__init__(numpy.ndarray)
        self.numpy = numpy
        # Version 1 of the protocol says which arrays are read-only. Before numpy 2.1 none of those can be lent.
        self.modern = numpy.lib.NumpyVersion(numpy.__version__) >= "2.1.0"
        self.dlpack_arguments = {"max_version": (1, 0)} if self.modern else {}

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.numpy.empty(shape, dtype)

    def check(self, array: Any, name: str) -> None:
        super().check(array, name)
        if type(array) is not self.array_type and isinstance(array, self.numpy.ma.MaskedArray):
            raise TypeError(f"{name} is a masked array, whose mask would be lost; expected a plain one, as {name}.filled(0) "
                            f"or {name}.data")

    def lend(self, array: Any, **how: Any) -> Any:
        return lend_numeric(array, **self.dlpack_arguments)

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        lent = tensors if self.modern else self._lendable(tensors, written_names(function, options))
        return function(self.capsules(lent), options, None, self.capsule(workspace, "workspace"))

    def _lendable(self, tensors: Tensors, written: tuple[str, ...]) -> Tensors:
        """Inputs that are read-only become arrays on the same memory that do not say so."""
        return {name: _LikeWritable(array).array(self.numpy)
                if isinstance(array, self.array_type) and not array.flags.writeable and name not in written else array
                for name, array in tensors.items()}


class _LikeWritable:
    """Memory of a read-only numpy array."""

    def __init__(self, array: Any):
        self.dtype = array.dtype
        self.memory = array.view("uint16") if array.dtype.name == "bfloat16" else array
        interface = self.memory.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}

    def array(self, numpy: Any) -> Any:
        return numpy.asarray(self).view(self.dtype)


class Cupy(Library):
    def __init__(self) -> None:
        import cupy

        super().__init__(cupy.ndarray)
        self.cupy = cupy

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        with like.device:
            return self.cupy.empty(shape, dtype)

    def lend(self, array: Any, **how: Any) -> Any:
        # -1: no synchronisation, for the call runs on the stream that cupy itself would use.
        return lend_numeric(array, stream=-1)

    def allocate(self, size: int) -> Any:
        return self.lend(self.cupy.empty(size, "uint8"))

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        with tensors["q"].device:
            capsules = self.capsules(tensors)
            memory = self.allocate if workspace is None else self.capsule(workspace, "workspace")
            return function(capsules, options, self.cupy.cuda.get_current_stream().ptr, memory)


class Jax(Library):
    """jax arrays never change: only arrays that were made for the call and that nobody has seen are written."""

    writable = False

    def __init__(self) -> None:
        import jax

        super().__init__(jax.Array)
        self.jax = jax

    def empty(self, like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        if isinstance(like, self.jax.core.Tracer):
            raise TypeError("q is traced by jax; expected a concrete array, outside of jit, grad and vmap")
        return self.jax.numpy.zeros(shape, dtype, device=like.device)

    def lend(self, array: Any, **how: Any) -> Any:
        return array.__dlpack__(**how)

    def run(self, function: _C.Function, tensors: Tensors, options: Options, workspace: Any) -> Any:
        given: list[Any] = [array for array in tensors.values() if isinstance(array, self.array_type)]
        if workspace is not None:
            raise ValueError("workspace is given with jax arrays, which cannot be written; expected None")
        if all(device.platform == "cpu" for array in given for device in array.devices()):
            capsules = self.capsules(tensors)
            self.jax.block_until_ready(given)
            return function(capsules, options, None, None)
        return _JaxOnCuda(self, function, tensors, options).run()


class _JaxOnCuda:
    """jax names a stream of its own only to a producer of DLPack that it imports from. So the call poses as one: asked
    for its array, it runs on the stream that it is asked for, and jax waits for what it has enqueued there."""

    def __init__(self, library: Jax, function: _C.Function, tensors: Tensors, options: Options):
        self.library, self.function, self.tensors, self.options = library, function, tensors, options
        self.scratch: list[Any] = []
        self.result: Any = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensors["q"].__dlpack_device__()

    def __dlpack__(self, *, stream: int, **_: Any) -> Any:
        def allocate(size: int) -> Any:
            self.scratch.append(self.library.empty(self.tensors["q"], (size,), "uint8"))
            return self.library.lend(self.scratch[-1], stream=stream)

        capsules = self.library.capsules(self.tensors, stream=stream)
        self.result = self.function(capsules, self.options, stream, allocate)
        return self.library.lend(self.tensors["q"], stream=stream)

    def run(self) -> Any:
        jax = self.library.jax
        # Nothing may be freed or read before the stream has come to its end.
        jax.block_until_ready(jax.dlpack.from_dlpack(self))
        return self.result


def _torch_library() -> Library:
    from . import _torch

    return _torch.LIBRARY


_MAKERS = {"torch": _torch_library, "numpy": Numpy, "cupy": Cupy, "jax": Jax, "jaxlib": Jax}
_by_type: dict[type, Library] = {}


@functools.cache
def _library(root: str) -> Library:
    return _MAKERS[root]()


def _find(array: Any) -> Library:
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in _MAKERS:
            _by_type[type(array)] = _library("jax" if root == "jaxlib" else root)
            return _by_type[type(array)]
    raise TypeError(f"q is of type {type(array)}; expected an array of torch, numpy, cupy or jax")


def library_of(array: Any) -> Library:
    """The library of an array, which is that of q."""
    library = _by_type.get(type(array))
    return _find(array) if library is None else library
