"""The decorators of every kernel: the one place that owns compile options and the cache."""

import hashlib
import types
from pathlib import Path

import numba


def _source_stamp():
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


SOURCE_STAMP = _source_stamp()
# No fastmath: arithmetic is done as written, with `fma` spelt out, and so gives the same bits everywhere.
# No references are counted, which would be an atomic operation for every array taken out of a tuple: kernels allocate
# nothing, and the caller holds what it gives them.
OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False, "_nrt": False}


def kernel(function=None, *, cache=True, **options):
    """Compile ``function`` with the options that every kernel shares.

    cache: False for what takes a user's functions, which Numba would take for new ones in every process.

    What is compiled is kept in ``NUMBA_CACHE_DIR``, beside the source or in the user's cache folder; where none of
    these can be written, it is compiled anew in every process. Numba's cache looks at the file that a function stands
    in; here an edit of any kernel's file makes it stale.
    """
    if function is None:
        return lambda function: kernel(function, cache=cache, **options)
    if not cache:
        return numba.njit(**OPTIONS, **options)(function)
    try:
        dispatcher = numba.njit(cache=True, **OPTIONS, **options)(function)
    except RuntimeError:  # there is no folder to cache in
        return numba.njit(**OPTIONS, **options)(function)
    cache_file = getattr(dispatcher._cache, "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = SOURCE_STAMP
        cache_file._load_index = _or_nothing(cache_file._load_index)
    return dispatcher


def _or_nothing(load_index):
    """Numba reads a cache's list before it asks for its age: an older version's may name classes that are no more."""

    def load():
        try:
            return load_index()
        except (AttributeError, ImportError):
            return {}

    return load


def renamed(template, module, name, **names):
    """A function of ``template``'s code, with other things for some global names: it is ``name`` of ``module``."""
    function = types.FunctionType(template.__code__, {**template.__globals__, **names}, name)
    function.__module__, function.__doc__ = module, template.__doc__
    # Numba's cache tells functions apart by file, line and this name.
    function.__qualname__ = f"{module.rpartition('.')[2]}_{name}"
    return function


def specialise(template, module, name, cache=True, forceinline=False, **names):
    """A kernel `renamed` from a template.

    Compiled once, where a function called with functions as arguments would be compiled, and then its caller again;
    and cached, which Numba does not do with closures that hold functions.
    """
    return kernel(renamed(template, module, name, **names), cache=cache, forceinline=forceinline)


def address_of(dispatcher, signature):
    """The address of a kernel's C function for a signature, compiled now if it has not been."""
    result = dispatcher.get_compile_result(signature)
    return result.library.get_pointer_to_function(result.fndesc.llvm_cfunc_wrapper_name)


def part(function=None, *, inline=True):
    """As `kernel`, for what only other kernels call: without a Python wrapper, and cached with its callers."""
    if function is None:
        return lambda function: part(function, inline=inline)
    return numba.njit(forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)
