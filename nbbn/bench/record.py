"""A report as JSON: all that is needed to do it again, and to compare it with another."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from nbbn.bench.cases import Case
from nbbn.bench.contenders import Group
from nbbn.bench.measure import LIMIT, NBBN, Report, Result, Settings
from nbbn.bench.peers import PEERS, cores
from nbbn.info import facts

FORMAT = 1
# What decides how many threads others take, and which code runs.
_ENVIRONMENT = ("NUMBA_", "OMP_", "MKL_", "XLA_", "JAX_", "KMP_", "TBB_", "CUDA_")


@dataclass
class Record:
    """A report, and what it was measured with.

    Attributes
    ----------
    command : str
        The command line.
    machine : dict of str to str
        Processor, versions, threads: whatever figures depend on.
    """

    command: str
    machine: dict[str, str]
    settings: dict[str, Any]
    report: Report


def machine(peers: Sequence[Any] = PEERS) -> dict[str, str]:
    """Return what figures depend on."""
    found = {"date": date.today().isoformat(), "processor": processor(), "cores": str(cores())}
    # Where files lie is nobody else's business.
    found |= {name: value for name, value in facts().items() if name != "kernel cache"}
    found |= {peer.name: peer.version() for peer in peers if peer.missing() is None and peer.name != "numpy"}
    for name, value in sorted(os.environ.items()):
        if name.startswith(_ENVIRONMENT) and not name.endswith(("_DIR", "_HOME", "_PATH")):
            found[name] = value
    return found


def processor() -> str:
    """Return the name that the processor calls itself by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def recorded(settings: Settings, report: Report, arguments: Sequence[str]) -> Record:
    """Return a report together with where it comes from."""
    told = {
        "rounds": settings.rounds,
        "cold": settings.cold,
        "new outputs": settings.new_outputs,
        "seed": settings.seed,
    }
    return Record(" ".join(("nbbn", *arguments)), machine(settings.peers), told, report)


def dumped(record: Record) -> str:
    """Return JSON."""
    report = record.report
    lines = ",\n  ".join(json.dumps(_line(result)) for result in report.results)  # one each, to be read
    return json.dumps(
        {
            "format": FORMAT,
            "command": record.command,
            "python": sys.version.split()[0],
            "machine": record.machine,
            "settings": record.settings,
            "memory": [
                {"path": group.path, "threads": group.threads, "what": name, "GB/s": rate}
                for (group, name), rate in report.memory.items()
            ],
            "results": [],
            "wrong": report.wrong,
            "left out": report.left_out,
            "interrupted": report.interrupted,
        },
        indent=1,
    ).replace('"results": []', f'"results": [\n  {lines}\n ]')


def _line(result: Result) -> dict[str, Any]:
    spread = result.spread
    return {
        "mode": result.case.mode,
        "layout": result.case.layout,
        "dtype": result.case.dtype,
        "shape": result.case.shape,
        "path": result.group.path,
        "threads": result.group.threads,
        "name": result.name,
        "bytes": result.nbytes,
        "median": spread.median,
        "low": spread.low,
        "high": spread.high,
        "first": result.first,
        "how": result.how,
        "seconds": [s if s == s else None for s in result.seconds],
    }


def load(path: Path) -> Record:
    """Return what is in a file.

    Raises
    ------
    ValueError
        If the file cannot be read, or is not one of `nbbn bench --json`.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"got {str(path)!r}, which cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"got {str(path)!r}, which is no JSON; needs a file of nbbn bench --json") from error
    try:
        if found["format"] != FORMAT:
            raise ValueError(f"got {str(path)!r} in format {found['format']}, needs format {FORMAT}")
        report = Report(
            results=[_result(line) for line in found["results"]],
            memory={(Group(m["path"], m["threads"]), m["what"]): m["GB/s"] for m in found["memory"]},
            wrong=found["wrong"],
            left_out=found["left out"],
            interrupted=found["interrupted"],
        )
        return Record(found["command"], found["machine"], found["settings"], report)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"got {str(path)!r}, which is not a file of nbbn bench --json") from error


def _result(line: dict[str, Any]) -> Result:
    case = Case(line["mode"], line["layout"], line["dtype"], tuple(line["shape"]))
    seconds = [float("nan") if s is None else float(s) for s in line["seconds"]]
    if not any(s > 0 for s in seconds):
        raise TypeError("a result that nobody took a turn for")
    group = Group(line["path"], line["threads"])
    return Result(case, group, line["name"], seconds, line["bytes"], line["first"], line["how"])


@dataclass(frozen=True)
class Row:
    """nbbn on one path and one case, and the others beside it."""

    case: Case
    group: Group
    own: Result
    limit: Result | None
    others: dict[str, Result]

    @property
    def percent(self) -> float | None:
        """How near it comes to the machine's limit, which is 100."""
        return None if self.limit is None else 100 * self.own.rate / self.limit.rate

    def ratio(self, name: str) -> float | None:
        """Return another's time divided by nbbn's."""
        other = self.others.get(name)
        return None if other is None else other.spread.median / self.own.spread.median


def rows(report: Report) -> list[Row]:
    """Return the results beside each other, in the order of headings, shapes and paths."""
    places: dict[tuple[Case, Group], dict[str, Result]] = {}
    for result in report.results:
        places.setdefault((result.case, result.group), {})[result.name] = result
    found = []
    for (case, group), beside in places.items():
        own, limit = beside.pop(NBBN.name, None), beside.pop(LIMIT, None)
        if own is not None:
            found.append(Row(case, group, own, limit, beside))
    headings = list(dict.fromkeys(row.case.heading for row in found))
    return sorted(found, key=lambda row: headings.index(row.case.heading))
