"""What is promised around the code: one version, the extras the README names, an import that needs torch alone."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sgc

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = PYPROJECT["project"]["optional-dependencies"]

# Modules that wrap an extra and may need it at import; everything else of `sgc` must import without.
NEEDS_AN_EXTRA = ("sgc.hf", "sgc.backends.triton", "sgc.backends.loops")
OPTIONAL = [
    "accelerate",
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "flwr",
    "matplotlib",
    "peft",
    "transformers",
    "triton",
]


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def modules_of_sgc() -> list[str]:
    return ["sgc", *(module.name for module in pkgutil.walk_packages(sgc.__path__, "sgc."))]


def test_one_version_everywhere() -> None:
    changelog = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert changelog is not None
    assert {"changelog": changelog[1], "citation": citation["version"]} == {
        "changelog": sgc.__version__,
        "citation": sgc.__version__,
    }


def test_the_readme_names_the_extras_that_exist() -> None:
    table = README.split("## Extras", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(EXTRAS)


def test_all_is_every_other_extra() -> None:
    (requirement,) = EXTRAS["all"]
    assert requirement == f"sgc[{','.join(extra for extra in EXTRAS if extra != 'all')}]"


def test_torch_is_the_only_dependency() -> None:
    assert [requirement_name(each) for each in PYPROJECT["project"]["dependencies"]] == ["torch"]


def test_every_requirement_has_a_tested_version() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {requirement_name(line) for line in constraints if line and not line.startswith("#")}
    wanted = {requirement_name(each) for extra in EXTRAS.values() for each in extra} | {"torch"}
    # torch's CUDA builds each name the one triton they work with.
    assert wanted - {"sgc", "triton"} <= pinned


def test_every_public_name_is_there_and_documented() -> None:
    assert 0 < len(sgc.__all__) < 10
    for name in sgc.__all__:
        assert getattr(sgc, name).__doc__, name


def test_importing_sgc_imports_no_extra() -> None:
    loaded = json.loads(run_python("import json, sys, sgc; print(json.dumps(sorted(sys.modules)))"))
    assert "torch" in loaded
    assert not {module.split(".")[0] for module in loaded} & {*OPTIONAL, "federated"}


def test_importing_sgc_needs_no_extra_to_be_installed() -> None:
    modules = [name for name in modules_of_sgc() if not name.startswith(NEEDS_AN_EXTRA)]
    run_python(
        f"import sys\nfor name in {[*OPTIONAL, 'numpy']!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
    )


@pytest.mark.parametrize("name", modules_of_sgc())
def test_every_module_says_what_it_is(name: str) -> None:
    assert importlib.import_module(name).__doc__


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(sgc.__file__).parent / "py.typed").is_file()
