"""The C++ of `native/` as one shared library, built for this processor on first use.

Needs a C++ compiler (`CXX`, or `c++`). Where there is none, `available()` is False, says why once, and
callers use torch's own operations. `MINIRLHF_KERNELS=0` asks for that.
"""

import ctypes
import functools
import os
import platform
import subprocess
import warnings
from pathlib import Path

from minirlhf.runs.compiled import compiler, kept_library

_SOURCES = sorted(Path(__file__).with_name("native").iterdir())
_COMPILE = (
    "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=gnu++17",
)  # fmt: skip

_long, _pointer = ctypes.c_long, ctypes.c_void_p


def available() -> bool:
    """Whether the kernels can be used on this machine; builds them if need be."""
    return _library() is not None


def built() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it is not available.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the CPU kernels are not available; ask available() first")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("MINIRLHF_KERNELS") == "0":
        return None
    if ctypes.sizeof(_long) != 8:
        return _without("a C long has less than 64 bits here")
    try:
        library = ctypes.CDLL(str(_build()))
    except subprocess.CalledProcessError as error:
        return _without(f"{' '.join(error.cmd[:1])} said: {error.stderr.strip()[-400:]}")
    except OSError as error:
        return _without(str(error))
    _declare(library)
    return library


def _declare(library: ctypes.CDLL) -> None:
    """What the functions take."""
    library.panel.restype = _long
    library.pack.argtypes = [_pointer, _long, _long, _long, _long, _pointer]
    library.product.argtypes = [_pointer, _long, _long, _pointer, _long, _pointer, _pointer]
    if library.has_tiles():
        library.tiles_depth.restype, library.tiles_depth.argtypes = _long, [_long]
        library.pack_tiles.argtypes, library.product_tiles.argtypes = (
            library.pack.argtypes, library.product.argtypes,
        )  # fmt: skip
        matrix = [_pointer, _long, _long]
        rest = [_long] * 3 + [_pointer, ctypes.c_int, _pointer, _long]
        library.matmul_tiles.argtypes = matrix + matrix + rest
    library.draw.argtypes = [_pointer, _long, _long, _pointer, ctypes.c_double, _pointer, _pointer]
    library.draw_tempered.argtypes = [
        _pointer, _long, _long, ctypes.c_float, _pointer, ctypes.c_double, *[_pointer] * 4
    ]  # fmt: skip
    library.logsumexp.argtypes = [_pointer, _long, _long, _pointer]
    library.absorb.argtypes = [_pointer, _long, _long, _pointer, _pointer, _pointer]
    library.to_gradient.argtypes = [_pointer, _long, _long, _pointer, _pointer, _pointer, _pointer]
    library.gelu.argtypes = [_pointer, _long, _pointer]
    library.gelu_gradient.argtypes = [_pointer, _pointer, _long, _pointer]
    library.attend.argtypes = [_pointer] * 7 + [ctypes.c_float, _long, _pointer]


def _without(why: str) -> None:
    warnings.warn(
        "torch's products are used, about 1.5 times slower, since the kernels could not be built"
        f": {why}. Install a C++ compiler, or set MINIRLHF_KERNELS=0",
        stacklevel=2,
    )


def _build() -> Path:
    command, units = compiler(), [str(each) for each in _SOURCES if each.suffix == ".cpp"]
    steps = [
        [*command, *_COMPILE, "-c", *units],
        # Without an OpenMP of its own: it takes the one torch has loaded, and so torch's threads.
        [*command, "-shared", *(f"{Path(each).stem}.o" for each in units), "-o", "cpu"],
    ]
    processor = "\n".join([platform.machine(), platform.processor(), _processor_flags()])
    return kept_library("cpu", steps, _SOURCES, also=processor)


def _processor_flags() -> str:
    """What the compiler's -march=native depends on; one home may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
