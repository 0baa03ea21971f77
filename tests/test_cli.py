"""The command line: what it prints, and how it refuses."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest

pytest.importorskip("typer")

import nbbn
from nbbn import cli, info


def refused(capsys, *arguments):
    """Run a command line that cannot be carried out, and return the one line that it gets."""
    assert cli.main(arguments) == cli.NOT_STARTED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("option", "value", "needs"),
    [
        ("--steps", "-3", "a whole number of at least 1"),
        ("--steps", "0", "a whole number of at least 1"),
        ("--steps", "many", "a whole number of at least 1"),
        ("--steps", "1.5", "a whole number of at least 1"),
        ("--seed", "-1", "a whole number of at least 0"),
        ("--learning-rate", "0", "a finite number above 0"),
        ("--learning-rate", "-0.1", "a finite number above 0"),
        ("--learning-rate", "nan", "a finite number above 0"),
        ("--learning-rate", "inf", "a finite number above 0"),
        ("--learning-rate", "fast", "a finite number above 0"),
    ],
)
def test_bad_value(capsys, option, value, needs):
    line = refused(capsys, "demo", option, value)
    assert option in line
    assert f"got {value!r}" in line
    assert needs in line


def test_output_that_is_a_file(capsys, tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    line = refused(capsys, "demo", "--output", str(file))
    assert "--output" in line
    assert repr(str(file)) in line
    assert "a directory that files can be written to" in line
    assert file.read_text() == ""


def test_output_inside_a_file(capsys, tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    assert "--output" in refused(capsys, "demo", "--output", str(file / "inside"))


def test_unknown_option(capsys):
    assert "--stepz" in refused(capsys, "demo", "--stepz", "3")


def test_option_without_a_value(capsys):
    assert "--steps" in refused(capsys, "demo", "--steps")


def test_unknown_command(capsys):
    line = refused(capsys, "train")
    assert "'train'" in line
    assert "demo" in line
    assert "info" in line


@pytest.mark.parametrize("missing", ["typer", "rich", "sklearn", "matplotlib"])
def test_missing_extra(missing, tmp_path):
    """In a process of its own, where importing the package fails."""
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from nbbn.cli import main\n"
        f"sys.exit(main(['demo', '--output', {str(tmp_path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == cli.NOT_STARTED
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert 'pip install ".[demo]"' in done.stderr


@pytest.mark.parametrize("missing", ["rich", "typer"])
def test_bench_without_its_extra(missing):
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from nbbn.cli import main\n"
        "sys.exit(main(['bench', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == cli.NOT_STARTED
    assert done.stderr.count("\n") == 1
    assert missing in done.stderr
    assert 'pip install ".[bench]"' in done.stderr


def test_info_needs_no_extra(python):
    program = (
        "import sys; sys.modules['typer'] = sys.modules['rich'] = None\n"
        "from nbbn.cli import main\n"
        "sys.exit(main(['info']))"
    )
    assert "threading layer" in python(program)


def test_an_error_of_nbbn_itself_is_not_taken_for_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "nbbn.info", None)
    with pytest.raises(ModuleNotFoundError, match=r"nbbn\.info"):
        cli.main(["info"])


def test_help_without_a_command(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "info" in printed


def test_module_and_exit_status():
    done = subprocess.run(
        [sys.executable, "-m", "nbbn", "demo", "--steps", "0"], capture_output=True, text=True
    )
    assert done.returncode == cli.NOT_STARTED
    assert "--steps" in done.stderr


def test_demo_runs(capsys, tmp_path):
    output = tmp_path / "new" / "directory"
    assert cli.main(["demo", "--steps", "3", "--no-progress", "--output", str(output)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert len(list(output.iterdir())) == 3


def test_demo_ends_with_status_1_if_scores_differ(monkeypatch, tmp_path):
    from nbbn.demo import run

    monkeypatch.setattr(run, "run", lambda *arguments, **options: False)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 1


def test_info_prints_every_fact(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["nbbn"] == nbbn.__version__
    for name in ("Python", "NumPy", "Numba", "llvmlite", "tbb", "CPU", "CUDA"):
        assert lines[name]
    assert "threading layer" in printed
    assert "vector width" in printed


def test_threads_and_layer():
    facts = info.facts()
    assert int(facts["threads"]) == numba.get_num_threads()
    assert facts["threading layer"] in ("tbb", "omp", "workqueue")


def test_kernel_cache_is_where_numba_is_told(python, tmp_path):
    program = "from nbbn.info import kernel_cache; print(kernel_cache())"
    assert Path(python(program, NUMBA_CACHE_DIR=str(tmp_path)).strip()).is_relative_to(tmp_path)


def test_cuda_says_why_not(monkeypatch):
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: "there is no NVIDIA GPU")
    assert info.cuda() == "no: there is no NVIDIA GPU"


def test_cuda_with_two_devices(monkeypatch):
    devices = [
        SimpleNamespace(name=name, compute_capability=(9, 0)) for name in (b"Some GPU", "Some other GPU")
    ]
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: None)
    monkeypatch.setattr(numba, "cuda", SimpleNamespace(gpus=devices), raising=False)
    assert info.cuda() == ("Some GPU, compute capability 9.0; Some other GPU, compute capability 9.0")


def test_importing_nbbn_imports_no_extra(python):
    extras = ("typer", "rich", "sklearn", "matplotlib", "torch", "numba.cuda")
    program = f"import sys, nbbn, nbbn.cli; print([name for name in {extras} if name in sys.modules])"
    assert python(program).strip() == "[]"
