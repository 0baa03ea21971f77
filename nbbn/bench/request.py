"""What is asked for on the command line, read and checked before anything is measured."""

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from nbbn.bench.cases import DTYPES, LAYOUTS, MODES, Case, numpy_dtype
from nbbn.bench.contenders import PATHS, Contender, Group, no_cuda
from nbbn.bench.measure import Settings, most_threads
from nbbn.bench.peers import PEERS
from nbbn.bench.shapes import QUICK, Shape, shapes
from nbbn.compiler import pool

ROUNDS, QUICK_ROUNDS = 15, 5


class Refused(ValueError):
    """An option that cannot be met.

    Attributes
    ----------
    option : str
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(reason)
        self.option = option


def chosen(option: str, text: str, names: Sequence[str], every: str = "", none: str = "") -> tuple[str, ...]:
    """Return the names in a list with commas, each once; `every` stands for all of them, `none` for none."""
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if every and found == (every,):
        return tuple(names)
    if none and found == (none,):
        return ()
    for name in found:
        if name not in names:
            also = "".join(f", {alone}" for alone in (every, none) if alone)
            raise Refused(
                option, f"got {name!r}, needs some of {', '.join(names)}{also}, with commas between"
            )
    return found


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers in a list with commas, each once."""
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise Refused(
            option, f"got {text!r}, needs a whole number of at least 1, or several with commas between"
        )
    return found


def wanted_shapes(texts: Sequence[str], batches: Sequence[int], quick: bool) -> tuple[Shape, ...]:
    """Return the shapes, each for each batch."""
    found: list[Shape] = []
    try:
        for batch in batches or (None,):
            for text in texts or (() if quick else ("resnet50",)):
                found += shapes(text, batch)
            if quick and not texts:
                found += [shape if batch is None else (batch, *shape[1:]) for shape in QUICK]
    except ValueError as error:
        raise Refused("--shapes", str(error)) from error
    return tuple(dict.fromkeys(found))


def groups(paths: str | None, threads: str | None) -> tuple[Group, ...]:
    """Return the paths that are asked for, or all that this machine has, and on how many threads."""
    most = min(pool.threads(), most_threads())
    counts = numbers("--threads", threads) if threads else ()
    for count in counts:
        if count > most:
            raise Refused(
                "--threads",
                f"got {count}, needs at most {most}, the threads of Numba here (NUMBA_NUM_THREADS)",
            )
    reason = no_cuda()
    names: tuple[str, ...]
    if paths is None:
        # Numbers of threads say all there is to say of the CPU.
        names = ("parallel",) if counts else ("serial", "parallel") if most > 1 else ("serial",)
        if reason is None and not counts:
            names = (*names, "cuda")
    else:
        names = chosen("--path", paths, PATHS)
        if "cuda" in names and reason is not None:
            raise Refused(
                "--path", f"got 'cuda', which needs a GPU: {reason}; serial and parallel would work"
            )
        if "parallel" in names and most < 2:
            raise Refused("--path", "got 'parallel', and there is one thread here; serial would work")
    found = [Group("serial", 1)] if "serial" in names else []
    if "parallel" in names:
        found += [Group("parallel" if count > 1 else "serial", count) for count in counts or (most,)]
    if "cuda" in names:
        found.append(Group("cuda", 1))
    return tuple(dict.fromkeys(found))


def wanted_peers(text: str) -> tuple[Contender, ...]:
    """Return the peers that are asked for, or all that are installed."""
    by_name = {peer.name: peer for peer in PEERS}
    names = chosen("--peer", text, list(by_name), every="all", none="none")
    if text == "all":
        return tuple(peer for peer in PEERS if peer.missing() is None)
    for name in names:
        package = by_name[name].missing()
        if package is not None:
            there = ", ".join(peer.name for peer in PEERS if peer.missing() is None)
            raise Refused(
                "--peer",
                f"got {name!r}, which needs {package}, not installed here: pip install {package}; what is "
                f"here: {there}",
            )
    return tuple(by_name[name] for name in names)


def settings(
    *,
    texts: Sequence[str] = (),
    batches: str | None = None,
    layout: str = "channels-first",
    dtype: str = "float32",
    mode: str = "all",
    path: str | None = None,
    threads: str | None = None,
    peer: str = "all",
    rounds: int | None = None,
    cold: bool = False,
    new_outputs: bool = False,
    quick: bool = False,
    seed: int | None = None,
) -> Settings:
    """Return what is asked for.

    Raises
    ------
    Refused
        If an option has no meaning, or this machine lacks what it needs.
    """
    found = Settings(
        shapes=wanted_shapes(texts, numbers("--batch", batches) if batches else (), quick),
        layouts=chosen("--layout", layout, LAYOUTS, every="all"),
        dtypes=chosen("--dtype", dtype, DTYPES, every="all"),
        modes=chosen("--mode", mode, MODES, every="all"),
        groups=groups(path, threads),
        peers=wanted_peers(peer),
        rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
        cold=cold,
        new_outputs=new_outputs,
        seed=secrets.randbits(32) if seed is None else seed,
    )
    if "bfloat16" in found.dtypes:
        try:
            numpy_dtype("bfloat16")
        except ModuleNotFoundError as error:
            raise Refused(
                "--dtype",
                "got 'bfloat16', which NumPy has from the package ml_dtypes only: pip install ml_dtypes",
            ) from error
    _fits(found.cases())
    return found


def _fits(cases: Iterable[Case]) -> None:
    """Raise if the arrays of a case are larger than what an address can tell."""
    for case in cases:
        if case.nbytes > 1 << 46:
            raise Refused("--shapes", f"got {case.text}, whose arrays have {case.nbytes:,} bytes")


def writable_file(option: str, path: Path, endings: Sequence[str] = ()) -> Path:
    """Return a path that a file can be written to, or raise; what is there is left as it is."""
    if endings and path.suffix not in endings:
        raise Refused(option, f"got {str(path)!r}, needs a name that ends in {' or '.join(endings)}")
    if path.is_dir():
        raise Refused(option, f"got {str(path)!r}, which is a directory; needs the name of a file")
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise Refused(
            option, f"got {str(path)!r}, needs a file that can be written to ({error.strerror})"
        ) from error
    return path
