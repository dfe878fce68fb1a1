"""The BitBake recipes, read as text: what they must say, and that what they name is there."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
from pathlib import Path
from typing import Final

import pytest

from install.tree import AGENT, REPOSITORY, version

LAYER: Final = REPOSITORY / "config/yocto"
RECIPES: Final = sorted(LAYER.glob("recipes-*/*/*.bb"))
OURS: Final = LAYER / f"recipes-core/caam-hotplug/caam-hotplug_{version()}.bb"

PACKAGES: Final = {
    "python3-asyncio": {"asyncio", "concurrent"},
    "python3-compression": {"gzip"},
    "python3-crypt": {"hashlib"},
    "python3-ctypes": {"ctypes"},
    "python3-datetime": {"datetime"},
    "python3-difflib": {"difflib"},
    "python3-fcntl": {"fcntl"},
    "python3-io": {"socket", "tempfile", "termios"},
    "python3-json": {"json"},
    "python3-logging": {"logging"},
    "python3-math": {"random"},
    "python3-mmap": {"mmap"},
    "python3-netclient": {"secrets", "uuid"},
    "python3-resource": {"resource"},
    "python3-shell": {"shlex"},
    "python3-stringold": {"string"},
    "python3-threading": {"queue"},
    "python3-tomllib": {"tomllib"},
    "python3-core": {
        "__future__", "argparse", "array", "binascii", "bisect", "collections", "contextlib",
        "contextvars", "copy", "dataclasses", "enum", "errno", "fnmatch", "functools", "gc",
        "gettext", "grp", "heapq", "importlib", "inspect", "io", "itertools", "locale", "math",
        "operator", "os", "pathlib", "platform", "pwd", "re", "select", "selectors", "shutil",
        "signal", "stat", "struct", "subprocess", "sys", "textwrap", "threading", "time",
        "traceback", "types", "typing", "unicodedata", "warnings", "weakref",
    },
}  # fmt: skip
"""Modules of the standard library by scarthgap's packages (python3-manifest.json)."""
OTHERS: Final = {"pyudev": "python3-pyudev"}
OPTIONAL: Final = {"sdbus": "python3-sdbus"}


def variables(recipe: Path) -> dict[str, str]:
    """What the recipe sets; a value has its lines joined, and what is added to it appended."""
    text = recipe.read_text().replace("\\\n", " ")
    found: dict[str, str] = {}
    for name, _, value in re.findall(r'^([A-Za-z_:${}\[\]0-9]+) (\+?=|\?=) "(.*)"$', text, re.M):
        found[name] = f"{found.get(name, '')} {value}".strip()
    inherited = re.findall(r"^inherit (.*)$", text, re.M)
    return {**found, "inherit": " ".join(inherited)}


def imported() -> set[str]:
    """The names of all packages that the agent imports, at the top of a module or in a function."""
    names: set[str] = set()
    for source in AGENT.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names - {"caam_hotplug"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_what_bitbake_and_its_users_ask_for(recipe: Path) -> None:
    said = variables(recipe)
    for name in ("SUMMARY", "LICENSE", "LIC_FILES_CHKSUM", "RDEPENDS:${PN}", "inherit"):
        assert said[name]
    assert re.fullmatch(r"[a-z0-9-]+_[0-9.]+\.bb", recipe.name)
    if "pypi" in said["inherit"].split():
        assert re.fullmatch("[0-9a-f]{64}", said["SRC_URI[sha256sum]"])
        assert recipe.name.startswith(f"python3-{said['PYPI_PACKAGE']}_")


def test_the_licence_that_our_recipe_names_is_this_trees() -> None:
    named = variables(OURS)["LIC_FILES_CHKSUM"]
    digest = hashlib.md5((REPOSITORY / "LICENSE").read_bytes()).hexdigest()
    assert named == f"file://LICENSE;md5={digest}"


def test_our_recipe_builds_the_tree_that_it_lies_in() -> None:
    said = variables(OURS)
    levels = re.search(r"\[os\.pardir\] \* (\d+)", said["EXTERNALSRC"])
    assert levels
    assert OURS.parents[int(levels[1])] == REPOSITORY
    assert "externalsrc" in said["inherit"].split()


def test_what_our_recipe_starts_and_hands_to_make_is_there() -> None:
    said, text = variables(OURS), OURS.read_text()
    for unit in said["SYSTEMD_SERVICE:${PN}"].split():
        assert (REPOSITORY / "config" / unit).exists()
    assert {"systemd", "useradd"} <= set(said["inherit"].split())
    makefile = (REPOSITORY / "config/install.mk").read_text()
    handed = re.findall(r"\b([A-Z_]+)=", text.partition("oe_runmake")[2].partition("}\n")[0])
    assert handed
    for name in handed:
        assert re.search(rf"^{name} =", makefile, re.M), name
    group = (REPOSITORY / "config/sysusers.conf").read_text().splitlines()[-1].split()[1]
    assert said["GROUPADD_PARAM:${PN}"] == f"--system {group}"
    assert said["CONFFILES:${PN}"] == "${sysconfdir}/caam-hotplug/agent.toml"


def test_our_recipe_depends_on_every_module_that_the_agent_imports() -> None:
    said = variables(OURS)
    depends = set(said["RDEPENDS:${PN}"].split())
    for module in imported():
        if module in sys.stdlib_module_names:
            (package,) = (name for name, modules in PACKAGES.items() if module in modules)
        elif module in OPTIONAL:
            assert OPTIONAL[module] in said["RRECOMMENDS:${PN}"].split()
            continue
        else:
            package = OTHERS[module]
        assert package in depends, module
    loaded = {"libdevmapper", "keyutils", "libudev", "util-linux-libblkid"}
    assert loaded <= depends


def test_the_layer_names_the_layers_that_it_builds_upon() -> None:
    layer = (LAYER / "conf/layer.conf").read_text()
    assert 'LAYERSERIES_COMPAT_caam-hotplug = "scarthgap"' in layer
    assert 'LAYERDEPENDS_caam-hotplug = "core openembedded-layer meta-python"' in layer
