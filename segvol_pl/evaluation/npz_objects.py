"""Read an .npz file whose object arrays are pickles, without executing them. Everything is bounded in size.

1. `NpzReader` opens the zip. `array` reads numbers, `objects` reads an object array; both from the .npy header on.
2. `plain_objects` reads the opcodes of a pickle and builds plain values from them: None, bools, numbers, text, bytes,
   lists, tuples, dicts, numpy's scalars and arrays. No class is imported and no function is called, not even numpy's:
   their names are only recognised. Any other opcode or name is refused.
"""

from __future__ import annotations

import math
import pickletools
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.lib import format as npy

from segvol_pl.errors import ChallengeError

MOST_VOXELS = 2**30
"""Elements of an array of numbers: 1024 x 1024 x 1024."""
MOST_PICKLED = 2**22
"""Bytes of an object array: some ten thousand clicks."""
MOST_OBJECTS = 2**18
"""Values of an object array, counted as often as they occur: a pickle may name one list many times."""
MOST_NESTED = 16
"""Levels of lists, tuples, dicts and arrays."""

NUMBERS = "biuf"
"""numpy's kinds of bool, whole numbers and floating point."""

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What a damaged, truncated, encrypted or unknown zip or header raises."""


class NpzReader:
    """An open .npz file; a context manager.

    Args:
        path: the file.

    Raises:
        ChallengeError: it cannot be opened, or is no zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise ChallengeError(f"{path}: cannot be read as .npz ({_reason(error)}): copy it again") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._zip.close()

    def __contains__(self, key: str) -> bool:
        return f"{key}.npy" in self._zip.namelist()

    @property
    def keys(self) -> list[str]:
        """The names of the arrays."""
        return [name.removesuffix(".npy") for name in self._zip.namelist()]

    def array(self, key: str) -> np.ndarray:
        """Read an array of numbers, of at most MOST_VOXELS elements. It may be read-only.

        Raises:
            ChallengeError: it is missing, damaged, too large, or holds anything but numbers.
        """
        with self._member(key) as (stream, size):
            shape, fortran, dtype = _header(stream)
            if dtype.kind not in NUMBERS:
                raise ValueError(f"holds {dtype}, not numbers")
            return _numbers(stream, size, shape, fortran, dtype)

    def objects(self, key: str) -> Any:
        """Read an object array, without executing its pickle, or an array of numbers or text.

        Returns:
            Nested lists, as `ndarray.tolist` makes them; for an array without axes its only value. Within it arrays of
            numbers are ndarrays.

        Raises:
            ChallengeError: it is missing, damaged or too large, or its pickle holds anything but plain values.
        """
        with self._member(key) as (stream, size):
            if size > MOST_PICKLED:
                raise ValueError(f"holds {size} bytes; at most {MOST_PICKLED} are read")
            shape, fortran, dtype = _header(stream)
            if dtype.hasobject:
                return plain_objects(stream.read())
            if dtype.kind not in f"{NUMBERS}U":
                raise ValueError(f"holds {dtype}, neither numbers, text nor objects")
            return _numbers(stream, size, shape, fortran, dtype).tolist()

    def _member(self, key: str) -> _Member:
        if key not in self:
            raise ChallengeError(f"{self.path}: has no array {key}; it has {', '.join(self.keys) or 'none'}")
        return _Member(self._zip, self.path, key)


class _Member:
    """One array's stream and size in bytes, for a `with` statement that gives every fault the names of file and key."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, key: str) -> None:
        self._archive, self._path, self._key = archive, path, key
        self._stream: IO[bytes] | None = None

    def __enter__(self) -> tuple[IO[bytes], int]:
        entry = self._archive.getinfo(f"{self._key}.npy")
        try:
            self._stream = self._archive.open(entry)
        except DAMAGED as error:
            raise self._fault(error) from error
        return self._stream, entry.file_size

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None:
            self._stream.close()
        if isinstance(error, DAMAGED):
            raise self._fault(error) from error

    def _fault(self, error: BaseException) -> ChallengeError:
        return ChallengeError(f"{self._path}: {self._key}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran's order, and dtype."""
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"its .npy header has the unknown version {version}")
    with warnings.catch_warnings():  # Python 2's headers are read all the same
        warnings.simplefilter("ignore")
        shape, fortran, dtype = readers[version](stream)
    return shape, fortran, dtype


def _numbers(stream: IO[bytes], size: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any]) -> np.ndarray:
    count = math.prod(shape)
    if min(shape, default=1) < 0 or count > MOST_VOXELS:
        raise ValueError(f"its header promises {' x '.join(map(str, shape))} elements; at most {MOST_VOXELS} are read")
    promised, held = count * dtype.itemsize, size - stream.tell()
    if promised != held:
        raise ValueError(f"its header promises {promised} bytes, it holds {held}")
    content = stream.read(promised)
    if len(content) != promised:
        raise ValueError(f"its header promises {promised} bytes, it holds {len(content)}")
    return _filled(content, dtype, shape, fortran)


def _filled(content: bytes, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool) -> np.ndarray:
    if dtype.kind == "U":  # numpy fails with SystemError where a code is no character
        content.decode("utf-32-le" if dtype.newbyteorder("<") == dtype else "utf-32-be")
    values_N: np.ndarray = np.frombuffer(content, dtype) if content else np.empty(0, dtype)
    return values_N.reshape(shape, order="F" if fortran else "C")


# ---- pickles ----

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    }
)
"""Opcodes whose argument is the value."""
EMPTY = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}
SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = frozenset({"PROTO", "FRAME"})

RECONSTRUCT, SCALAR, NDARRAY, DTYPE = "_reconstruct", "scalar", "ndarray", "dtype"
MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
KNOWN = {
    **{(module, name): name for module in MULTIARRAY for name in (RECONSTRUCT, SCALAR)},
    ("numpy", NDARRAY): NDARRAY,
    ("numpy", DTYPE): DTYPE,
}
"""Names of a pickle that numpy writes for arrays and scalars. They are recognised, never looked up."""

DTYPES = re.compile(r"b1|[iu][1248]|f[248]|U[1-9]\d{0,3}")
"""The dtypes of scalars and of arrays that are not objects, without their order of bytes."""
OBJECTS = ("O", "O8", "O4")


class _Name(str):
    """One of the names in KNOWN."""


class _Mark:
    """Where a list, tuple or dict begins on the stack."""


class _Dtype:
    """A dtype that a pickle describes."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
            raise ValueError("its pickle describes a dtype with fields")
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError(f"its pickle names the unknown order of bytes {state[1]!r}")
        self.order = state[1]

    @property
    def plain(self) -> np.dtype[Any]:
        if not DTYPES.fullmatch(self.code):
            raise ValueError(f"its pickle holds a numpy value of dtype {self.code!r}, which is refused")
        return np.dtype(self.order + self.code)


class _Array:
    """An array that a pickle describes: first without content, then with it."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype: _Dtype | None = None
        self.fortran = False
        self.content: Any = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("its pickle describes an array in an unknown form")
        _, shape, dtype, fortran, content = state
        sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not sizes or not isinstance(dtype, _Dtype) or math.prod(shape) > MOST_OBJECTS:
            raise ValueError("its pickle describes an array of a shape or dtype that is refused")
        self.shape, self.dtype, self.fortran, self.content = shape, dtype, bool(fortran), content


class _Machine:
    """The stack on which the opcodes of a pickle work."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one opcode. Raises ValueError for one that is refused, and IndexError for an empty stack."""
        if name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in LITERALS:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in SHORT_TUPLES:
            self.stack.append(tuple(self._taken(SHORT_TUPLES[name])))
        elif name == "MARK":
            self.stack.append(_Mark())
        elif name in ("LIST", "TUPLE", "DICT"):
            held = self._since_mark()
            self.stack.append(list(held) if name == "LIST" else tuple(held) if name == "TUPLE" else _paired(held))
        elif name in ("APPEND", "APPENDS"):
            held = self._taken(1) if name == "APPEND" else self._since_mark()
            self._top(list).extend(held)
        elif name in ("SETITEM", "SETITEMS"):
            held = self._taken(2) if name == "SETITEM" else self._since_mark()
            self._top(dict).update(_paired(held))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            named = tuple(argument.split(" ", 1)) if name == "GLOBAL" else tuple(self._taken(2))
            self.stack.append(_known(named))
        elif name == "REDUCE":
            self.stack.append(_reduced(*self._taken(2)))
        elif name == "BUILD":
            (state,) = self._taken(1)
            built = self.stack[-1]
            if not isinstance(built, (_Array, _Dtype)):
                raise ValueError("its pickle sets the state of something that is no array: it is refused")
            built.build(state)
        elif name not in IGNORED:
            raise ValueError(f"its pickle has the opcode {name}: only plain values are read")

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"its pickle adds to something that is no {kind.__name__}")
        return self.stack[-1]

    def _taken(self, count: int) -> list[Any]:
        held = [self.stack.pop() for _ in range(count)][::-1]
        if any(isinstance(value, _Mark) for value in held):
            raise ValueError("its pickle is damaged")
        return held

    def _since_mark(self) -> list[Any]:
        held: list[Any] = []
        while not isinstance(self.stack[-1], _Mark):
            held.append(self.stack.pop())
        self.stack.pop()
        return held[::-1]


def _paired(held: list[Any]) -> dict[Any, Any]:
    keys, values = held[::2], held[1::2]
    if len(keys) != len(values) or not all(isinstance(key, str | int | float | bool | None) for key in keys):
        raise ValueError("its pickle holds a dict whose keys are neither text nor numbers")
    return dict(zip(keys, values, strict=True))


def _known(named: tuple[Any, ...]) -> _Name:
    """Recognise a name. Raises ValueError for any other: it is not looked up."""
    if len(named) != 2 or not all(isinstance(part, str) for part in named) or named not in KNOWN:
        said = ".".join(str(part) for part in named)[:100]
        raise ValueError(f"its pickle names {said}: only plain values and numpy arrays are read, nothing is executed")
    return _Name(KNOWN[named])


def _reduced(name: Any, arguments: Any) -> Any:
    """What numpy's functions would give for these arguments."""
    if isinstance(name, _Name) and isinstance(arguments, tuple):
        if name == RECONSTRUCT and arguments[:1] == (NDARRAY,) and isinstance(arguments[0], _Name):
            return _Array()
        if name == DTYPE and arguments and isinstance(arguments[0], str):
            return _Dtype(arguments[0])
        if name == SCALAR and len(arguments) == 2 and isinstance(arguments[0], _Dtype):
            dtype, content = arguments[0].plain, arguments[1]
            if isinstance(content, bytes) and len(content) == dtype.itemsize:
                return _filled(content, dtype, (), False).item()
    raise ValueError("its pickle calls a function in a way that numpy's arrays do not: it is refused")


def plain_objects(pickled: bytes) -> Any:
    """Build the plain values of a pickle, as numpy writes it for an object array, without executing it.

    Returns:
        None, bools, numbers, text, bytes, lists, tuples, dicts, and ndarrays of numbers or text. numpy's scalars become
        Python's; object arrays become nested lists, or their only value if they have no axes.

    Raises:
        ValueError: it is damaged, holds anything else, or more than MOST_OBJECTS values or MOST_NESTED levels.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        held = machine.stack.pop()
    except (IndexError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    return _Unwrapping().value(held, 0)


class _Unwrapping:
    """Replaces what a pickle describes by values, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def value(self, held: Any, level: int) -> Any:
        self.count += 1
        if self.count > MOST_OBJECTS or level > MOST_NESTED:
            raise ValueError(f"its pickle holds more than {MOST_OBJECTS} values or {MOST_NESTED} levels")
        if isinstance(held, list | tuple):
            return type(held)(self.value(each, level + 1) for each in held)
        if isinstance(held, dict):
            return {key: self.value(each, level + 1) for key, each in held.items()}
        if isinstance(held, _Array):
            return self._array(held, level)
        if isinstance(held, _Name | _Dtype | _Mark):
            raise ValueError("its pickle holds a function or a dtype in place of a value: it is refused")
        return held

    def _array(self, held: _Array, level: int) -> Any:
        size = math.prod(held.shape)
        if held.dtype is None:
            raise ValueError("its pickle describes an array without content")
        if held.dtype.code in OBJECTS:
            if not isinstance(held.content, list) or len(held.content) != size:
                raise ValueError("its pickle describes an array of another size than its content")
            values = np.empty(size, object)
            for place, each in enumerate(held.content):
                values[place] = self.value(each, level + 1)
            # numpy lists objects in C's order, also those of an array in Fortran's.
            return values.reshape(held.shape).tolist()
        dtype = held.dtype.plain
        if not isinstance(held.content, bytes) or len(held.content) != size * dtype.itemsize:
            raise ValueError("its pickle describes an array of another size than its content")
        return _filled(held.content, dtype, held.shape, held.fortran)
