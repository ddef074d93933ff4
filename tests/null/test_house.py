"""The house rules that a machine can keep: what imports what, the checks of `make lint`, golden texts."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import settings

from tests.conftest import GOLDEN, compare_golden, golden_path
from tools import check_names, check_sizes

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    """Runs `code` in a fresh interpreter at the root and returns what it prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- imports


def test_the_ir_and_the_algebra_do_not_import_jax() -> None:
    # Every module, not only what the packages import by themselves; lower_* is the floor where jax begins.
    loaded = python(
        "import importlib, pkgutil, sys, lowbit.ir, lowbit.passes\n"
        "for package in lowbit.ir, lowbit.passes:\n"
        "    for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not m.name.startswith('lowbit.passes.lower_'):\n"
        "            importlib.import_module(m.name)\n"
        "print(*sorted({'jax', 'jaxlib', 'flax', 'optax'} & set(sys.modules)))\n"
        "print(sum(m.startswith('lowbit.ir.') for m in sys.modules))"
    ).splitlines()
    assert loaded[0] == ""
    assert int(loaded[1]) > 5


def test_the_algebra_does_not_reach_for_its_lowerings() -> None:
    # import-linter lets lower_* import jax, and with it whoever imports lower_*; so nothing on the floor below may.
    for path in (ROOT / "lowbit" / "passes").glob("*.py"):
        if not path.stem.startswith("lower_"):
            imports = re.findall(r"^\s*(?:from|import) .*\blower_\w+", path.read_text("utf-8"), re.MULTILINE)
            assert imports == [], f"{path.name} is algebra and must not import a lowering"


def test_these_tests_are_collected_without_jax() -> None:
    out = python(
        "import sys, pytest\n"
        "code = pytest.main(['tests/null', '--collect-only', '-qq', '-p', 'no:cacheprovider'])\n"
        "print('code', int(code), 'jax' in sys.modules)"
    )
    assert out.splitlines()[-1] == "code 0 False", out


@pytest.mark.parametrize("name", ["ir", "passes"])
def test_the_root_links_lead_into_the_package_and_are_not_imported(name: str) -> None:
    link = ROOT / name
    if not link.exists():
        pytest.skip("installed without the repository around it")
    if not link.is_symlink():
        assert link.read_text() == f"lowbit/{name}"  # a checkout with core.symlinks=false
    else:
        assert link.readlink() == Path("lowbit", name)
        assert link.resolve() == ROOT / "lowbit" / name
    assert name not in sys.modules


def test_every_name_of_the_package_resolves() -> None:
    python("import lowbit\nfor name in lowbit.__all__: getattr(lowbit, name)")


# ---------------------------------------------------------------- lint


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("bcq", "bcq"),
        ("lower_bcq", "bcq"),
        ("bcq3", "bcq"),
        ("BCQLayer", "bcq"),
        ("NestedFP", "nested_fp"),
        ("any-precision", "any_precision"),
        ("is_any_precision_type", "any_precision"),
        ("FleXOR", "flexor"),
        ("NVFP4", "nvfp4"),
    ],
)
def test_a_name_is_found_in_every_spelling(word: str, name: str) -> None:
    for line in (f"{word} = 1", f"x = '{word}'", f"# not for {word}"):
        assert [(1, word, name)] == list(check_names.offences(line, check_names.KNOWN)), line


@pytest.mark.parametrize("line", ["codebooks", "max_entries", "uniformly", "mxu", "tritium = remix"])
def test_a_longer_word_is_not_a_name(line: str) -> None:
    assert list(check_names.offences(line, check_names.KNOWN)) == []


def test_a_registered_format_may_not_be_named_in_a_pass(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "lowbit/formats/horses.py": "@register_format('zebra')\ndef f(): ...\n",
            "lowbit/formats/base.py": "def register_format(name): ...\n",
            "lowbit/passes/fine.py": "base = 1\n",
            "lowbit/passes/bad.py": "x = 1\nif fmt == 'zebra': x = 2\nhorses = 1\n",
            "lowbit/kernels/zebra_mma.py": "",
            "lowbit/ir/zebra.py": "zebra = 1\n",
        },
    )
    assert check_names.check(tmp_path) == [
        "lowbit/kernels/zebra_mma.py: the file is named after the format zebra",
        "lowbit/passes/bad.py:2: 'zebra' names the format zebra",
        "lowbit/passes/bad.py:3: 'horses' names the format horses",
    ]


def function(lines: int, docstring: int = 0) -> str:
    doc = ['    """one' + "\n    more" * (docstring - 1) + '"""'] if docstring else []
    return "\n".join(["def f():", *doc, *["    x = 1"] * (lines - 1)]) + "\n"


def test_sizes() -> None:
    assert check_sizes.check_file(function(39, docstring=30), "lowbit/a.py") == []
    assert check_sizes.check_file(function(40), "lowbit/a.py") == [
        "lowbit/a.py:1: f has 40 lines; a function here stays under 40"
    ]
    assert check_sizes.check_file(function(150), "lowbit/kernels/a.py") == []
    assert len(check_sizes.check_file(function(151), "lowbit/kernels/a.py")) == 1
    assert check_sizes.check_file("x = 1\n" * 299, "lowbit/a.py") == []
    assert check_sizes.check_file("x = 1\n" * 300, "lowbit/a.py") == ["lowbit/a.py: 300 lines; a file stays under 300"]


# ---------------------------------------------------------------- tests


def test_random_examples_are_the_same_everywhere(request: pytest.FixtureRequest) -> None:
    assert settings.default is not None
    assert settings.default.derandomize
    assert settings.default.max_examples == request.config.getoption("--examples")


def test_golden_texts(tmp_path: Path) -> None:
    path = golden_path(tmp_path, "/somewhere/test_a.py", "test_b[x/y-3]", "after")
    assert path == tmp_path / "test_a" / "test_b-x-y-3-after.txt"
    with pytest.raises(pytest.fail.Exception, match=r"no golden text .*--update-golden"):
        compare_golden(path, "a\nb", update=False)
    compare_golden(path, "a\nb", update=True)
    compare_golden(path, "a\nb", update=False)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)the golden text differs.*\n a\n-b\n\+c"):
        compare_golden(path, "a\nc", update=False)


def test_every_golden_text_has_its_test() -> None:
    files = {p.stem: p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py")}
    for text in GOLDEN.rglob("*.txt"):
        test = text.parent.name
        assert test in files, f"{text} belongs to no test file: delete it"
        owned = any(f"def {name}(" in files[test] for name in prefixes(text.stem))
        assert owned, f"{text} belongs to no test: delete it"


def prefixes(stem: str) -> list[str]:
    """test_a-b-c -> test_a-b-c, test_a-b, test_a: a golden text's name less its parameters and part."""
    words = stem.split("-")
    return ["-".join(words[:n]) for n in range(len(words), 0, -1)]


# ---------------------------------------------------------------- metadata


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
