"""The order of the layers, held by reading the imports; and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import catsparse

PACKAGE = Path(catsparse.__file__).parent

# A module imports from layers below its own, or from siblings where that is not ruled out.
LAYERS = {
    "_version": 0,
    "errors": 0,
    "footprint": 0,
    "strict_json": 0,
    "files": 0,
    "config": 0,
    "config_versions": 0,
    "data": 0,
    "kernels": 1,
    "card": 1,
    "sites": 2,
    "checkpoints": 2,
    "quantized_linear": 2,
    "weights": 2,
    "inputs": 2,
    "linears": 2,
    "products": 2,
    "shards": 2,
    "modules": 2,
    "derived": 2,
    "statistics": 2,
    "methods": 2,
    "statistics_file": 2,
    "thresholds_file": 2,
    "previews_file": 2,
    "sensitivities": 2,
    "calibration": 3,
    "batches": 3,
    "gptq": 3,
    "quantized": 3,
    "watching": 3,
    "observation": 3,
    "allocation": 3,
    "surgery": 3,
    "explanation": 3,
    "adapters": 3,
    "recalibration": 3,
    "probing": 3,
    "meter": 3,
    "decoding": 4,
    "dropped": 4,
    "prompts": 4,
    "text_stream": 4,
    "merged_weights": 3,
    "hub": 4,
    "judge": 4,
    "quantizer": 4,
    "rows": 4,
    "text": 5,
    "evaluate": 5,
    "tasks": 5,
    "finetune": 5,
    "bench": 5,
    "serve": 5,
    "vllm_plugin": 5,
    "report": 6,
    "pareto": 6,
    "page": 6,
    "curves": 6,
    "chat": 6,
    "compare": 6,
    "demo": 7,
    "cli": 7,
    "__init__": 8,
}
STRANGERS = 5  # siblings of this layer never import each other
MAX_LINES = 400


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """The name in LAYERS that a file belongs to: its module, or its folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(absolute module, names) of every import in a file, also those inside functions."""
    package = ["catsparse", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ()
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            if node.level:
                base = package[: len(package) - node.level + 1]
                yield ".".join([*base, *filter(None, [node.module])]), names
            else:
                yield node.module or "", names


def own_imports(path: Path) -> set[str]:
    """The units of this package that a file imports."""
    found = set()
    for module, names in imports(path):
        first, *rest = module.split(".")
        if first == "catsparse":
            # "from . import hub" names modules of the package itself.
            found |= {rest[0]} if rest else set(names)
    return found - {unit(path)}


def outside_imports(path: Path) -> set[str]:
    return {module.split(".")[0] for module, _ in imports(path)} - {"catsparse"}


def test_the_walk_sees_imports() -> None:
    assert {"calibration", "modules", "sites", "errors"} <= own_imports(PACKAGE / "surgery.py")
    assert "evaluate" in own_imports(PACKAGE / "demo.py")
    assert {"torch", "transformers"} <= outside_imports(PACKAGE / "hub.py")
    assert "torch" in outside_imports(PACKAGE / "kernels" / "reference.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downwards(path: Path) -> None:
    here = unit(path)
    assert here in LAYERS, f"give {here} a layer"
    for other in own_imports(path):
        assert other in LAYERS, f"{here} imports {other}, which is no module of a known layer"
        assert LAYERS[other] <= LAYERS[here], f"{here} imports {other}, from a higher layer"
        if LAYERS[here] == STRANGERS:
            assert LAYERS[other] < STRANGERS, f"{here} imports its sibling {other}"


def test_no_cycles_between_siblings() -> None:
    graph: dict[str, set[str]] = {}
    for path in files():
        if unit(path) != "__init__":
            graph.setdefault(unit(path), set()).update(own_imports(path))
    done: set[str] = set()
    while graph.keys() - done:
        ready = {name for name in graph if name not in done and graph[name] <= done}
        assert ready, f"a cycle among {sorted(graph.keys() - done)}"
        done |= ready


@pytest.mark.parametrize(
    "name", ["config", "config_versions", "errors", "files", "strict_json", "_version"]
)
def test_lowest_layer_needs_the_standard_library_only(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert outside_imports(path) <= sys.stdlib_module_names
    assert own_imports(path) <= {"config_versions", "errors", "footprint", "strict_json"}


def test_report_imports_no_torch() -> None:
    path = PACKAGE / "report.py"
    assert not outside_imports(path) & {"torch", "transformers"}
    assert "safetensors.torch" not in {module for module, _ in imports(path)}
    assert own_imports(path) <= {"config", "errors", "files"}


def test_kernels_know_no_models() -> None:
    for path in (PACKAGE / "kernels").rglob("*.py"):
        assert "transformers" not in outside_imports(path)
        assert own_imports(path) == set()


def test_the_loading_api_of_transformers_has_one_reader() -> None:
    """hub uses the Auto classes, quantizer the registry behind ``quant_method``; nobody else."""
    auto, registry = set(), set()
    for path in files():
        for module, names in imports(path):
            if module.split(".")[0] == "transformers":
                if any(name.startswith("Auto") for name in names):
                    auto.add(unit(path))
                if "quantizers" in module:
                    registry.add(unit(path))
    assert (auto, registry) == ({"hub"}, {"quantizer"})


def test_no_pickle() -> None:
    for path in files():
        assert not outside_imports(path) & {"pickle", "dill", "joblib", "shelve", "marshal"}
        source = path.read_text(encoding="utf-8")
        assert "torch.load(" not in source
        assert "torch.save(" not in source


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_every_public_name_is_there() -> None:
    assert len(set(catsparse.__all__)) == len(catsparse.__all__)
    for name in catsparse.__all__:
        assert getattr(catsparse, name) is not None
    assert {"calibrate", "sparsify", "densify", "load", "save"} <= set(catsparse.__all__)


def test_every_file_says_what_it_is_for() -> None:
    for path in files():
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring or path.name == "_version.py", path


IMPORT = """
import sys
import catsparse
import torch
assert not torch.cuda.is_initialized()
optional = {"datasets", "pyarrow", "matplotlib", "typer", "peft", "fastapi", "uvicorn", "openai"}
heavy = optional & set(sys.modules)
assert not heavy, heavy
assert torch.get_default_dtype() == torch.float32
assert torch.is_grad_enabled()
"""


def test_importing_is_quiet_and_lean() -> None:
    """In a fresh interpreter: no output of ours, no CUDA context, nothing optional loaded."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    # torchao, which transformers loads, has its own things to say.
    lines = [line for line in done.stderr.splitlines() if "torchao" not in line]
    assert not [line for line in lines if "catsparse" in line or "Traceback" in line]
