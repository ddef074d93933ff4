"""The kit as a pytest plugin, there as soon as lowbit is installed; it costs nothing until one of its options is used.

    pytest --lowbit-format=mypkg.formats:fp3_rows      the kit for a format: no test file needed
    pytest --lowbit-model=mypkg.models:quantized       the same for a model's weights and products
    pytest --lowbit-lowering=table,join                only these lowerings, in the kit and in `lowbit_lowering`

`MODULE:NAME` is a `Format`, or a function without arguments that returns one; for a model, a function that returns
`(model, batch)`. The module must be importable: `python -m pytest` adds the current folder. A format's default
quantizer is checked too (`lb.set_default_quantizer`). Both options may be given several times; files named beside them
run too. Each check is a test of its own, so `-k gradients` and `-x` work; a size that the format refuses is skipped.

A test of your own that asks for the fixture `lowbit_lowering` runs once in each lowering:

    def test_my_layer(lowbit_lowering):
        ...  # lb.matmul and every quantized layer run in this form; the fixture's value is its name

Where a product does not have a form, such a test is skipped, or fails if `--lowbit-lowering` names the form.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from typing import Any

import pytest

ALL = "all"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lowbit", "quantized formats and models")
    group.addoption("--lowbit-format", action="append", default=[], metavar="MODULE:NAME", help="check this format")
    group.addoption("--lowbit-model", action="append", default=[], metavar="MODULE:NAME", help="check this model")
    group.addoption("--lowbit-lowering", default=ALL, metavar="NAME[,NAME]", help="only in these lowerings (all)")


def pytest_configure(config: pytest.Config) -> None:
    known = _known() if _lowerings(config) else ()
    for name in _lowerings(config) or ():
        if name not in known:
            raise pytest.UsageError(f"--lowbit-lowering: there is no lowering {name!r}; use {', '.join([ALL, *known])}")
    if _named(config) and config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = []  # the kit alone: not every test below this folder


def _known() -> tuple[str, ...]:
    from lowbit.kernels.choice import KERNELS  # here, and so below: the plugin is loaded by every run of pytest
    from lowbit.passes.pipeline import PIPELINES

    return (*PIPELINES, *KERNELS)


def _named(config: pytest.Config) -> list[str]:
    return [*config.getoption("--lowbit-format"), *config.getoption("--lowbit-model")]


def _lowerings(config: pytest.Config) -> list[str] | None:
    given = config.getoption("--lowbit-lowering")
    return None if given == ALL else given.split(",")


# ---------------------------------------------------------------- the kit as tests


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if isinstance(collector, pytest.Session) and report.passed:
        for kind in ("format", "model"):
            for place in collector.config.getoption(f"--lowbit-{kind}"):
                report.result.append(Kit.from_parent(collector, kind=kind, place=place))
    return report


class Kit(pytest.Collector):
    """The checks of one format or model."""

    def __init__(self, parent: pytest.Session, kind: str, place: str) -> None:
        super().__init__(f"lowbit-{kind}={place}", parent, nodeid=f"lowbit-{kind}={place}")
        self.kind, self.place = kind, place

    def collect(self) -> Iterable[pytest.Item]:
        from lowbit.testing.kit import format_checks, model_checks

        found, lowerings = _find(self.place), _lowerings(self.config)
        refused: dict[str, str] = {}
        if self.kind == "format":
            checks, refused = format_checks(found() if callable(found) else found, lowerings=lowerings)
        else:
            made = found()
            if not isinstance(made, tuple) or len(made) != 2:
                raise self.CollectError(f"{self.place!r} gives a {type(made).__name__}, not the pair (model, batch)")
            model, batch = made
            checks = model_checks(model, batch, lowerings=lowerings)
        tests = {str(check): check.run for check in checks}
        tests |= {where: partial(pytest.skip, f"refused: {reason}") for where, reason in refused.items()}
        return [KitItem.from_parent(self, name=name, run=run) for name, run in tests.items()]


class KitItem(pytest.Item):
    """One check. A failed assertion is shown without the kit's own frames."""

    def __init__(self, name: str, parent: Kit, run: Callable[[], None]) -> None:
        super().__init__(name, parent)
        self.where, self.run = parent.name, run

    def runtest(self) -> None:
        self.run()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, AssertionError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.path, None, f"{self.where}: {self.name}"


def _find(place: str) -> Any:
    module, _, name = place.partition(":")
    if not name:
        raise pytest.Collector.CollectError(f"{place!r} is not MODULE:NAME")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as err:
        raise pytest.Collector.CollectError(f"{place!r} cannot be imported: {err}") from err


# ---------------------------------------------------------------- lowerings in tests of one's own


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "lowbit_lowering" in metafunc.fixturenames:
        metafunc.parametrize("lowbit_lowering", _lowerings(metafunc.config) or _known(), indirect=True)


@pytest.fixture
def lowbit_lowering(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a lowering, in which products run while the test does."""
    from lowbit.planning import lowering

    with lowering(request.param):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    if "lowbit_lowering" not in pyfuncitem.fixturenames or _lowerings(pyfuncitem.config):
        return (yield)
    from lowbit.planning import LoweringError

    try:
        return (yield)
    except LoweringError as err:
        pytest.skip(str(err))
