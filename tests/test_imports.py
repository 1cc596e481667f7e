"""The package is layered; these tests read its import statements and hold the layers apart."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "titans"
LAYER = {
    "state": -1,
    "memory": 0,
    "nn": 1,
    "hf": 2,
    "stream": 3,
    "data": 4,
    "train": 5,
    "zoo": 5,
    "evaluate": 5,
    "baselines": 5,
    "inspection": 6,
    "experiments": 6,
    "cli": 7,
    "__main__": 8,
}


def imports(source: str, module: str, *, is_package: bool) -> Iterator[str]:
    """Full dotted names that `source` imports anywhere: `from a.b import c` gives `a.b.c`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*parents, *([origin] if origin else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def violation(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    parts, target = module.split("."), imported.split(".")
    own = parts[1]
    if target[0] == "titans":
        if len(target) == 1 or target[1] not in LAYER:
            return (
                None if imported in ("titans.__version__",) else "only titans.__version__ lives at the root"
            )
        if target[1] != own and LAYER[target[1]] >= LAYER[own]:
            return f"{own} must not import from {target[1]}"
    elif own in ("state", "memory", "nn"):
        # Kernels alone need triton, and are imported where one runs.
        known = {"torch", "safetensors", *sys.stdlib_module_names}
        if target[0] not in (
            known | {"triton"} if module.startswith("titans.memory.backends.triton.") else known
        ):
            return f"{own} needs torch and safetensors alone"
    elif target[0] == "transformers" and ("cache_utils" in target or target[-1].endswith("Cache")):
        return None if module == "titans.hf.cache" else "only titans.hf.cache knows the cache API"
    return None


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_import_points_downward() -> None:
    wrong = []
    for module, path in modules():
        if module == "titans":
            continue
        assert module.split(".")[1] in LAYER, f"{module} belongs to no layer: give it one in LAYER"
        for imported in imports(path.read_text(), module, is_package=path.name == "__init__.py"):
            reason = violation(module, imported)
            if reason:
                wrong.append(f"{module} imports {imported}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("titans.memory.decay", "import numpy"),
        ("titans.nn.memory", "def f():\n    from einops import rearrange"),
        ("titans.nn.memory", "from ..hf import cache"),
        ("titans.memory.state", "from titans import nn"),
        ("titans.hf.modeling", "from transformers.cache_utils import Cache"),
        ("titans.hf.modeling", "from transformers import DynamicCache"),
        ("titans.data.batches", "import titans.train.loop"),
        ("titans.train.loop", "from titans.evaluate import perplexity"),
        ("titans.stream", "from titans import Session"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    found = list(imports(source, module, is_package=False))
    assert any(violation(module, imported) for imported in found)


def test_import_titans_is_light_and_lists_its_names() -> None:
    program = (
        "import sys, titans\n"
        "heavy = {'torch', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "missing = set(titans.__all__) ^ (set(titans._HOME) | {'__version__'})\n"
        "assert not missing, missing\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_memory_and_layers_load_without_transformers() -> None:
    program = "import sys, titans.memory, titans.nn\nassert 'transformers' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_public_name_is_refused() -> None:
    import titans

    with pytest.raises(AttributeError, match="TitansForCausalLM"):
        _ = titans.TitansForCausalLanguageModel  # type: ignore[attr-defined]
