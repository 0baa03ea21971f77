"""nbbn bench: what it measures, what it says of it, and what it refuses."""

import json
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import reference
from nbbn import cli
from nbbn.bench import compare, limits, measure, model, record, request, run, shapes, tables, timing
from nbbn.bench.cases import EPS, MODES, MOMENTUM, Case, Data
from nbbn.bench.contenders import Contender, Group, Prepared, Unsupported
from nbbn.bench.peers import PEERS

ROOT = Path(__file__).parent.parent
SERIAL, PARALLEL = Group("serial", 1), Group("parallel", 2)
DTYPES = ("float32", "float64", "float16")
INSTALLED = tuple(peer for peer in PEERS if peer.missing() is None)


def settings(**changes):
    """Return a small request."""
    chosen = {
        "shapes": ((2, 3, 4, 4), (3, 5)),
        "layouts": ("channels-first", "channels-last"),
        "dtypes": ("float32",),
        "modes": MODES,
        "groups": (SERIAL,),
        "peers": (),
        "rounds": 1,
        "cold": False,
        "new_outputs": False,
        "seed": 7,
    }
    return measure.Settings(**{**chosen, **changes})


@pytest.fixture
def no_large_arrays(monkeypatch):
    """Let the memory's limit be measured on little."""
    monkeypatch.setattr(measure, "LARGE", 1 << 16)
    monkeypatch.setattr(timing, "SETTLE", 1e-4)


def measured(**changes):
    return measure.measure(settings(**changes), lambda what, part: None)


# --- shapes ----------------------------------------------------------------------------------------


def test_models():
    assert len(shapes.shapes("resnet50")) == 12
    assert shapes.shapes("resnet50")[0] == (32, 64, 112, 112)
    assert shapes.shapes("resnet50", 4)[-1] == (4, 2048, 7, 7)
    assert shapes.shapes("inception3")[0] == (96, 32, 149, 149)


def test_a_shape_and_a_file(tmp_path):
    assert shapes.shapes("8,64,32,32") == [(8, 64, 32, 32)]
    assert shapes.shapes("8,64,32,32", 2) == [(2, 64, 32, 32)]
    file = tmp_path / "mine.txt"
    file.write_text("# of my network\n8,64,32,32  # the first\n\n2, 3\n")
    assert shapes.shapes(str(file)) == [(8, 64, 32, 32), (2, 3)]


@pytest.mark.parametrize(
    "text",
    [
        "resnet",
        "8",
        "8,0",
        "8,-1,3",
        "8,x",
        "8,1.5",
        "",
        "1,5",
        "1,5,1,1",
        "-8,3",
        "8,,3",
        "x" * 5000,
        "8," * 3000,
    ],
)
def test_no_shape(text):
    with pytest.raises(ValueError, match="got"):
        shapes.shapes(text)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"8,64\n8,0\n", b"\xff\xfe\x00"])
def test_a_file_without_shapes(tmp_path, content):
    file = tmp_path / "mine.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="got"):
        shapes.shapes(str(file))


# --- the oracle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["channels-first", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 5), (5, 4, 3, 7)])
def test_the_oracle_agrees_with_that_of_the_tests(mode, layout, shape, seed):
    """And notices a single value that is off: in any result, and at any place."""
    data = Data(shape, layout, "float64", seed)
    results = by_the_tests_oracle(data, mode)
    assert data.oracle.fault(mode, results) == ""
    rng = np.random.default_rng(seed)
    for name, array in results.items():
        for wrong in (1e-6, np.nan):
            changed = array.copy()
            at = tuple(rng.integers(0, n) for n in array.shape)
            changed[at] += wrong * (1 + abs(changed[at]))
            assert name in data.oracle.fault(mode, {**results, name: changed})


def by_the_tests_oracle(data, mode):
    """Return the results as tests/reference.py has them."""
    axis = data.axis
    stored = np.moveaxis(data.x, axis, 0).shape

    def large(rows):
        return np.moveaxis(rows.hi.reshape(stored), 0, axis)

    def small(column):
        return column.hi.reshape(-1)

    parameters = {"eps": EPS, "axis": axis}
    if mode == "evaluation":
        state = data.running_mean, data.running_var, data.weight, data.bias
        return {"out": large(reference.evaluate(data.x, *state, **parameters).out)}
    forward = reference.forward(data.x, data.weight, data.bias, **parameters)
    if mode == "forward":
        new_var = reference.unbiased(forward.var, forward.count)
        return {
            "out": large(forward.out),
            "running_mean": small(reference.running(data.running_mean, forward.mean, MOMENTUM)),
            "running_var": small(reference.running(data.running_var, new_var, MOMENTUM)),
        }
    back = reference.backward(
        data.grad_out, data.x, data.weight, mean=forward.mean, invstd=forward.invstd, axis=axis
    )
    return {"grad_x": large(back.x), "grad_weight": small(back.weight), "grad_bias": small(back.bias)}


def test_small_results_of_float16_are_rounded_to_what_there_is():
    """Below 2⁻¹⁴ its steps do not shrink any more."""
    data = Data((4, 3, 50), "channels-first", "float16", 0)
    data.weight[...] = 1e-6
    exact = by_the_tests_oracle(data, "backward")
    exact["grad_x"] = exact["grad_x"].astype(np.float16)
    assert (np.abs(exact["grad_x"]) < 2**-14).all()
    assert data.oracle.fault("backward", exact) == ""
    exact["grad_x"][1, 2, 3] += np.float16(2**-22)
    assert "grad_x[1], channel 2, value 3" in data.oracle.fault("backward", exact)


# --- timing ----------------------------------------------------------------------------------------


def test_everybody_takes_a_turn_in_every_round():
    order = []
    turns = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    *_, taken = timing.rounds(turns, 4)
    assert order == list("abc") * 4
    assert taken == {name: [1.0] * 4 for name in "abc"}


def test_slow_ones_are_left_out_of_some_rounds(monkeypatch):
    monkeypatch.setattr(timing, "SLOW", 0.0)
    *_, taken = timing.rounds({"a": lambda: 1.0}, 12)
    assert [k for k, s in enumerate(taken["a"]) if s == s] == [0, 1, 2, 5, 10]


def test_spread():
    spread = timing.Spread.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (spread.low, spread.median, spread.high) == (2.0, 3.0, 4.0)
    assert spread.percent == pytest.approx(100 / 3)
    assert timing.Spread.of([2.0]) == timing.Spread(2.0, 2.0, 2.0)


def test_a_turn_counts_what_the_clock_says(monkeypatch):
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    calls = []
    turn = timing.Turn(
        call=lambda: calls.append("call"),
        enter=lambda: calls.append("enter"),
        wait=lambda: calls.append("wait"),
        clock=lambda timed: timed() or 6.0,
        disturb=lambda: calls.append("disturb"),
    )
    assert turn() == 6.0
    assert calls == ["enter", "call", "wait", "disturb", "wait", "call", "wait"]


# --- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 4097])
def test_limits_move_all_of_it(size, seed):
    rng = np.random.default_rng(seed)
    x, y, out = (limits.aligned((size,)) for _ in range(3))
    x[...], y[...] = rng.standard_normal((2, size))
    for name, expected in (("copy", x), ("triad", x + y)):
        for call in limits.limits(name, x, y, out).values():
            out.fill(np.nan)
            call()
            np.testing.assert_array_equal(out, expected)


def test_limits_keep_their_arrays():
    """What they write to must not be given to anybody else meanwhile."""
    arrays = [limits.aligned((64,)) for _ in range(3)]
    calls = limits.limits("triad", *arrays)
    alive = [weakref.ref(array) for array in arrays]
    del arrays
    assert all(array() is not None for array in alive)
    del calls
    assert all(array() is None for array in alive)


# --- measuring -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_everybody_is_right(no_large_arrays, dtype):
    report = measured(dtypes=(dtype,), peers=INSTALLED, groups=(SERIAL, PARALLEL))
    assert report.wrong == []
    found = record.rows(report)
    # Of two shapes, two layouts, three modes and two paths.
    assert len(found) == 24
    assert all(row.own.spread.median > 0 and row.percent > 0 for row in found)
    if "torch" in {peer.name for peer in INSTALLED}:
        assert all("torch" in row.others for row in found)
    assert all(("numpy" in row.others) == (dtype != "float16") for row in found)


def test_new_outputs_and_cold_caches(no_large_arrays):
    report = measured(peers=INSTALLED, new_outputs=True, cold=True, shapes=((2, 3, 4, 4),))
    assert report.wrong == []
    assert len(record.rows(report)) == 6


class Wrong(Contender):
    """Gives an answer, with one value that is off."""

    name, packages = "wrong", ("numpy",)

    def prepare(self, case, data, group):
        def call():
            data.out[...] = 0
            return {"grad_x" if case.mode == "backward" else "out": data.out}

        return Prepared(call, lambda found: found)


class Unable(Contender):
    name, packages = "unable", ("numpy",)

    def prepare(self, case, data, group):
        raise Unsupported("it is not able to")


def test_a_wrong_answer_is_told_and_not_timed(no_large_arrays, tmp_path, capsys):
    from rich.console import Console

    wanted = settings(peers=(Wrong(), Unable()))
    file = tmp_path / "out.json"
    assert run.run(wanted, ["bench"], Console(), json=file) == run.FAILED
    found = json.loads(file.read_text())
    assert {line["name"] for line in found["results"]} == {"nbbn", "limit"}
    assert len(found["wrong"]) == 12
    assert "wrong, forward, channels-first, float32, 2×3×4×4, serial: out[0]" in found["wrong"][0]
    printed = capsys.readouterr().out
    assert "WRONG, and not timed: wrong, forward" in printed
    assert "left out: unable (6 times): it is not able to" in printed


class Raising(Contender):
    name, packages = "raising", ("numpy",)

    def prepare(self, case, data, group):
        raise RuntimeError("not implemented\nfor 'Half'")


def test_a_peer_that_raises_is_left_out(no_large_arrays):
    report = measured(peers=(Raising(),))
    assert len(record.rows(report)) == 12
    assert set(report.left_out.values()) == {"it raised RuntimeError: not implemented for 'Half'"}


def test_nbbn_must_not_raise(no_large_arrays, monkeypatch):
    monkeypatch.setattr(measure.Nbbn, "prepare", Raising.prepare)
    report = measured()
    assert record.rows(report) == []
    assert len(report.wrong) == 12
    assert "nbbn, forward, channels-first, float32, 2×3×4×4, serial: it raised" in report.wrong[0]


def test_control_c_leaves_what_was_measured(no_large_arrays, tmp_path, capsys):
    from rich.console import Console

    def interrupt(what, part):
        if what.startswith("backward") and part:
            raise KeyboardInterrupt

    report = measure.measure(settings(rounds=2), interrupt)
    assert report.interrupted
    modes = [row.case.mode for row in record.rows(report)]
    assert modes == ["forward", "evaluation", "backward"]
    made = record.recorded(settings(), report, ["bench"])
    tables.show(made, Console())
    assert "Interrupted" in capsys.readouterr().out
    assert json.loads(record.dumped(made))["interrupted"] is True


def test_too_little_memory_for_one_shape(no_large_arrays, monkeypatch):
    def made(shape, *others):
        if len(shape) == 4:
            raise MemoryError("no room")
        return Data(shape, *others)

    monkeypatch.setattr(measure, "Data", made)
    report = measured()
    assert {row.case.shape for row in record.rows(report)} == {(3, 5)}
    assert any("no room" in why for why in report.left_out.values())


# --- records, tables, comparison -------------------------------------------------------------------


def synthetic(scale=1.0, machine=1.0, noise=0.0, batches=(8,)):
    """Return a record with known times: nbbn takes 2 ms × `scale`, the limit 1 ms, torch 6 ms."""
    results = []
    for n in batches:
        case = Case("forward", "channels-first", "float32", (n, 3, 4, 4))
        for name, milliseconds in (("nbbn", 2.0 * scale), ("limit", 1.0), ("torch", 6.0)):
            seconds = [machine * 1e-3 * milliseconds * (1 + noise * k) for k in range(-2, 3)]
            results.append(measure.Result(case, SERIAL, name, seconds, case.nbytes))
    return record.Record("nbbn bench", {"date": "2026-01-01"}, {"rounds": 5}, measure.Report(results))


def test_figures():
    (row,) = record.rows(synthetic().report)
    assert row.own.rate == pytest.approx(2 * 8 * 48 * 4 / 2e-3 / 1e9)
    assert row.percent == pytest.approx(50)
    assert row.ratio("torch") == pytest.approx(3)
    assert row.ratio("jax") is None


def test_what_is_written_can_be_read_again(no_large_arrays, tmp_path):
    made = record.recorded(settings(), measured(peers=INSTALLED), ["bench", "--quick"])
    file = tmp_path / "out.json"
    file.write_text(record.dumped(made))
    again = record.load(file)
    assert record.dumped(again) == record.dumped(made)
    assert again.command == "nbbn bench --quick"
    assert again.machine["Numba"]
    assert str(Path.home()) not in file.read_text()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 0}', '{"format": 1}', '{"format": 1, "results": [{}]}', "1"]
)
def test_no_record(tmp_path, content):
    file = tmp_path / "out.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"got .*out\.json"):
        record.load(file)


def test_compare_adjusts_for_the_machine():
    (nbbn, limit, torch) = compare.changes(synthetic(), synthetic(machine=2.0))
    assert (nbbn.ratio, nbbn.adjusted) == (pytest.approx(2), pytest.approx(1))
    assert (nbbn.verdict, torch.verdict) == ("", "")
    assert limit.verdict == "slower"


@pytest.mark.parametrize(("scale", "verdict"), [(1.5, "slower"), (0.5, "faster"), (1.01, "")])
def test_compare_sees_a_change(scale, verdict):
    nbbn, _, torch = compare.changes(synthetic(), synthetic(scale))
    assert (nbbn.verdict, torch.verdict) == (verdict, "")


def test_compare_takes_noise_for_noise():
    noisy = synthetic(), synthetic(1.05)
    for side in noisy:
        (own,) = (r for r in side.report.results if r.name == "nbbn")
        own.seconds = [s * factor for s, factor in zip(own.seconds, (0.8, 0.9, 1.0, 1.1, 1.2), strict=True)]
    assert compare.changes(*noisy)[0].verdict == ""


def test_compare_of_nothing_in_common():
    with pytest.raises(ValueError, match="no case in common"):
        compare.changes(synthetic(), synthetic(batches=(9,)))


def test_the_model_finds_its_constants():
    made = synthetic(batches=(1, 2, 4, 8, 16))
    for result in made.report.results:
        result.seconds = [20e-6 + result.nbytes / 40e9]
    (fitted,) = model.models(record.rows(made.report))
    assert fitted.call == pytest.approx(20e-6)
    assert fitted.rate == pytest.approx(40e9)
    assert fitted.off < 1e-9
    assert fitted.points == 5


def test_the_model_of_a_call_that_costs_nothing():
    made = synthetic(batches=(1, 2, 4, 8))
    for result in made.report.results:
        result.seconds = [result.nbytes / 40e9 - 1e-9]
    (fitted,) = model.models(record.rows(made.report))
    assert fitted.call == 0
    assert fitted.rate == pytest.approx(40e9, rel=0.2)


def test_too_few_sizes_for_a_model():
    assert model.models(record.rows(synthetic(batches=(1, 2, 3)).report)) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.018412, "0.0184"), (1.5, "1.50"), (99.96, "100.0"), (12345.6, "12346"), (None, "–")],
)
def test_numbers_have_three_digits(value, text):
    assert tables.number(value) == text


def test_markdown_has_as_many_cells_in_each_line():
    text = tables.markdown(synthetic(batches=(1, 2, 4, 8)))
    assert "| N | " not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4 + 1 + 2 + 1
    widths = {line.count("|") for line in lines[:7]}
    assert len(widths) == 1
    assert "| 8×3×4×4 | 0.00154 | serial | 2.00 | 0 | 0.00154 | 50.0 | 3.00 |" in text


def test_bars_are_percent_of_the_limit():
    pytest.importorskip("matplotlib")
    from nbbn.bench.plot import picture

    (axes,) = picture(synthetic()).axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights["nbbn, serial"] == [pytest.approx(50)]
    assert heights["torch, serial"] == [pytest.approx(50 / 3)]


def test_a_sweep_is_drawn_as_dots_and_a_line():
    pytest.importorskip("matplotlib")
    from nbbn.bench.plot import picture

    (axes,) = picture(synthetic(batches=(1, 2, 4, 8))).axes
    dots, line = axes.lines
    assert list(dots.get_ydata()) == pytest.approx([2.0] * 4)
    assert list(line.get_ydata()) == pytest.approx([2.0] * 4)


# --- the command line ------------------------------------------------------------------------------


def refused(capsys, *arguments):
    assert cli.main(["bench", *arguments]) == cli.NOT_STARTED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("option", "value", "needs"),
    [
        ("--shapes", "resnet", "resnet50"),
        ("--shapes", "8,0,3", "at least 1"),
        ("--shapes", "1,5", "one value per channel"),
        ("--batch", "0", "at least 1"),
        ("--batch", "1,x", "at least 1"),
        ("--layout", "nchw", "channels-first"),
        ("--dtype", "int8", "float32"),
        ("--mode", "training", "forward"),
        ("--path", "gpu", "serial"),
        ("--threads", "0", "at least 1"),
        ("--threads", "1000000", "at most"),
        ("--peer", "tensorflow", "torch"),
        ("--peer", "tensorflow", "none"),
        ("--rounds", "0", "at least 1"),
        ("--seed", "-1", "at least 0"),
        ("--json", "no/such/place.json", "can be written"),
        ("--json", ".", "directory"),
        ("--plot", "bench.gif", ".png"),
    ],
)
def test_bad_value(capsys, option, value, needs):
    line = refused(capsys, option, value)
    assert option in line
    assert "got" in line
    assert needs in line


def test_a_missing_peer(capsys, monkeypatch):
    monkeypatch.setattr(Contender, "missing", lambda self: self.packages[0] if self.name == "jax" else None)
    line = refused(capsys, "--peer", "jax,numpy")
    assert "'jax'" in line
    assert "pip install jax" in line
    assert "numpy" in line


def test_cuda_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(request, "no_cuda", lambda: "there is no NVIDIA GPU")
    line = refused(capsys, "--path", "serial,cuda")
    assert "there is no NVIDIA GPU" in line
    assert "serial" in line


def test_nothing_is_overwritten_by_a_command_line_that_is_refused(capsys, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("mine")
    refused(capsys, "--json", str(file), "--plot", str(tmp_path / "no" / "such.png"))
    refused(capsys, "--json", str(file), "--shapes", "resnet")
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_compare_refuses(capsys, tmp_path):
    file = tmp_path / "out.json"
    file.write_text("{}")
    assert "not a file of nbbn bench" in refused(capsys, "--compare", str(file), str(file))
    assert "cannot be read" in refused(capsys, "--compare", str(tmp_path / "none.json"), str(file))
    for name in ("json", "markdown", "plot"):
        other = tmp_path / "other.png"
        line = refused(capsys, "--compare", str(file), str(file), f"--{name}", str(other))
        assert f"--{name}" in line and "writes none" in line and not other.exists()


def test_from_measuring_to_comparing(no_large_arrays, capsys, tmp_path):
    """In a pipe: no escape sequences, no frames."""
    pytest.importorskip("matplotlib")
    names = "json", "markdown", "plot"
    files = dict(zip(names, (tmp_path / f"out.{end}" for end in ("json", "md", "svg")), strict=True))
    options = [text for name, file in files.items() for text in (f"--{name}", str(file))]
    asked = ["bench", "--shapes", "2,3,4,4", "--rounds", "2", "--peer", "numpy", *options]
    assert cli.main(asked) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "│" not in printed
    assert printed.count("2×3×4×4") >= 3
    assert files["plot"].read_text().lstrip().startswith("<?xml")
    assert "2×3×4×4" in files["markdown"].read_text()
    assert record.load(files["json"]).command.startswith("nbbn bench --shapes 2,3,4,4")
    assert cli.main(["bench", "--compare", str(files["json"]), str(files["json"])]) == 0
    assert "0 of " in capsys.readouterr().out


def test_help_has_examples(capsys):
    assert cli.main(["bench", "--help"]) == 0
    assert "nbbn bench --quick --plot bench.png" in capsys.readouterr().out


def test_the_path_on_a_gpu_in_the_simulator(python, tmp_path):
    file = tmp_path / "out.json"
    asked = ["bench", "--shapes", "2,3,2", "--path", "cuda", "--peer", "numpy", "--rounds", "1"]
    program = (
        "from nbbn import cli\nfrom nbbn.bench import measure\n"
        f"measure.LARGE = 1 << 12\nprint(cli.main({[*asked, '--json', str(file)]!r}))"
    )
    assert python(program, timeout=600, NUMBA_ENABLE_CUDASIM="1").rstrip().endswith("0")
    found = record.load(file)
    assert [row.case.mode for row in record.rows(found.report)] == list(MODES)
    assert found.report.wrong == []


def test_the_benchmarks_for_pytest():
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "benchmarks",
         "--shapes", "2,3,4,4", "--peer", "numpy", "--path", "serial"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda file: file.stem
)
def test_published_tables_are_what_was_measured(file):
    if "format" not in json.loads(file.read_text()):
        pytest.skip("made by benchmarks/peers.py, which test_docs.py looks at")
    found = record.load(file)
    assert found.report.wrong == []
    assert file.with_suffix(".md").read_text() == tables.markdown(found)
