"""The cases of `nbbn bench`, each with each contender, for pytest-benchmark."""

import pytest

from nbbn.bench.cases import Data
from nbbn.bench.contenders import Unsupported
from nbbn.bench.measure import NBBN, ready
from nbbn.bench.request import Refused, settings

OPTIONS = {
    "--shapes": "resnet50, inception3, small, dense, a shape as 8,64,32,32, or a file (default: three)",
    "--batch": "the first dimension, instead of the usual one",
    "--layout": "channels-first, channels-last, or all",
    "--dtype": "float32, float64, float16, bfloat16, or all",
    "--mode": "forward, evaluation, backward, or all",
    "--path": "serial, parallel, cuda",
    "--threads": "threads on the CPU",
    "--peer": "numpy, torch, jax, onnxruntime, cupy; none, or all that are installed",
}


def pytest_addoption(parser):
    group = parser.getgroup("nbbn", "what is timed, as by nbbn bench")
    for name, text in OPTIONS.items():
        group.addoption(name, help=text)


def pytest_generate_tests(metafunc):
    given = {name[2:]: metafunc.config.getoption(name) for name in OPTIONS}
    shapes, batch = given.pop("shapes"), given.pop("batch")
    try:
        wanted = settings(
            texts=[shapes] if shapes else [],
            batches=batch,
            quick=not shapes,
            **{name: text for name, text in given.items() if text},
        )
    except Refused as error:
        raise pytest.UsageError(f"{error.option}: {error}") from error
    cases = [
        pytest.param(
            case,
            group,
            contender,
            wanted.seed,
            id=f"{case.text}-{group.text}-{contender.name}".replace(", ", "-").replace("×", "x"),
        )
        for case in wanted.cases()
        for group in wanted.groups
        for contender in (NBBN, *wanted.peers)
    ]
    metafunc.parametrize(("case", "group", "contender", "seed"), cases)


@pytest.fixture(scope="session")
def datas():
    """The arrays that were made last: cases of one shape come one after the other."""
    return {}


@pytest.fixture
def call(datas, case, group, contender, seed):
    """What is timed, once its answer has been checked."""
    key = case.shape, case.layout, case.dtype
    if key not in datas:
        datas.clear()
        datas[key] = Data(*key, seed)
    try:
        prepared, _ = ready(contender, case, datas[key], group)
    except Unsupported as error:
        pytest.skip(str(error))

    def done():
        prepared.call()
        prepared.wait()

    return done
