"""Who may know whom: the rooms of the house, held apart by reading every import, those inside functions included."""

import ast
import dataclasses
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OURS = "snapgen_jax"

# What a number of a config may be: the standard library alone, and every room with a config knows it.
EVERYWHERE = "bounds"
# Copied into every bundle.
BUNDLED = ("program", "sampler", "runtime", "older", "digits", "unpacking", "client", "verify")
ALONE = tuple(f"export.{name}" for name in BUNDLED)

# A room, or one file of it -> what else of ours it may import. The longest name that fits a file is its rule, and its
# own room is always allowed. "*" is everything.
MAY_IMPORT = {
    # tensors to tensors
    "networks": [],
    "diffusion": [],
    "losses": [],
    "bounds": [],
    # values checked against annotations, for every room that reads names or options
    "typed": [],
    # how every report looks
    "page": [],
    # the contracts
    "evaluation.interfaces": [],
    "inputs.interfaces": [],
    "training.state": [],
    "training.exports": [],
    "training.recipe": ["training.state", "training.exports", "evaluation.interfaces", "inputs.interfaces"],
    # what a method is fed, what it may use, and what runs it: the loop knows no recipe and no network
    "inputs": ["networks", "diffusion", "weights", "training.exits", "training.exports"],
    "recipes": [
        "inputs",
        "systems.denoiser",
        "networks",
        "diffusion",
        "losses",
        "weights",
        "training.state",
        "training.optimizer",
        "training.ema",
        "training.accumulate",
        "training.recipe",
        "training.exports",
        "training.exits",
        "evaluation.interfaces",
    ],
    "training": ["parallel", "evaluation.interfaces", "inputs.interfaces"],
    "parallel": [],
    "weights": ["networks", "parallel", "typed"],
    "weights.frozen": ["weights", "networks", "parallel", "training.checkpoint", "training.exits"],
    "systems": ["networks", "diffusion", "weights", "parallel", "typed"],
    "systems.denoiser": ["networks", "diffusion"],
    "preparation": [
        "inputs",
        "weights",
        "networks.module",
        "networks.rules",
        "data",
        "parallel",
        "training.exits",
        "training.files",
        "training.fingerprint",
        "training.lifetime",
        "page",
    ],
    "data": [],
    "data.shards": ["data", "training.files"],
    "data.tokenizer": ["data", "training.files"],
    "data.tokenizer_specs": ["data", "inputs.interfaces", "training.files"],
    # from a trained run to images, numbers and files
    "conditions": ["data.tokenizer", "training.exits", "training.recipe", "typed"],
    "generation": [
        "conditions",
        "networks",
        "diffusion",
        "systems",
        "parallel.mesh",
        "config",
        "data.tokenizer",
        "data.pretrained_tokenizers",
        "data.tokenizer_specs",
        "training.checkpoint",
        "training.exits",
        "training.keys",
        "training.recipe",
        "typed",
        "weights",
    ],
    "adapters": ["config", "experiment", "generation", "recipes.adapters", "training", "weights.peft"],
    "lazy_schedules": ["conditions", "config", "experiment", "generation", "recipes.lazy_gates", "training"],
    "coding": ["generation", "networks", "weights", "data.images", "training.exits"],
    "evaluation": [
        "conditions",
        "generation",
        "data.shapes",
        "data.shapes_grammar",
        "data.prompts",
        "data.words",
        "page",
        "typed",
    ],
    "evaluation.unchanged": ["evaluation", "parallel.mesh", "training.fingerprint"],
    "evaluation.report": ["evaluation", "data.prompts", "page", "training.files", "training.metrics"],
    "export": ["bounds", "diffusion.noise", "training.exports"],
    "export.apps": ["export", "training.exits"],
    "export.run": [
        "conditions",
        "evaluation.compositional",
        "evaluation.detector",
        "export",
        "generation",
        "training.exits",
        "training.files",
    ],
    "release": ["config", "generation", "networks", "training", "weights"],
    "export.latents": [
        "generation",
        "inputs",
        "networks",
        "weights",
        "data.tokenizer_specs",
        "training.exits",
        "training.exports",
    ],
    # copied into every bundle
    "export.program": [],
    "export.sampler": ["export.program"],
    "export.older": ["export.program"],
    "export.runtime": [],
    "export.digits": ["export.program"],
    "export.unpacking": ["export.digits"],
    "export.client": [
        "diffusion.noise",
        "export.program",
        "export.sampler",
        "export.runtime",
        "export.older",
        "export.unpacking",
    ],
    "export.verify": ["export.program", "export.sampler", "export.runtime", "export.client"],
    # configs and workdirs
    "config": [
        "config_file",
        "overrides",
        "data.config",
        "inputs.interfaces",
        "networks.attention_table",
        "training",
        "recipes",
        "systems",
        "typed",
    ],
    "config_file": ["training.exits"],
    "overrides": ["training.exits", "typed"],
    "workdir": ["config", "parallel.hosts", "training.exits", "training.files", "weights.folder"],
    "upgrade": ["config", "training.exits", "training.files"],
    # the edge
    "experiment": [
        "config",
        "data",
        "evaluation",
        "generation",
        "inputs.interfaces",
        "parallel",
        "preparation.stored",
        "training",
        "workdir",
    ],
    "drawing": ["conditions", "config", "data", "generation", "parallel", "training", "typed"],
    "scoring": ["config", "evaluation", "experiment", "generation", "training.exits"],
    "planning": ["config", "parallel", "training"],
    "seeds": ["experiment", "parallel", "training"],
    "in_memory": ["training"],
    "process": [],
    "quickstart": ["*"],
    "image_files": ["evaluation.pictures", "training.exits", "training.files"],
    "bookkeeping": ["training.appended", "training.exits", "training.files"],
    "chain": [
        "bookkeeping",
        "chain_derive",
        "config",
        "config_file",
        "data.prompts",
        "overrides",
        "training.exits",
        "typed",
    ],
    "chain_command": ["*"],
    "chain_derive": ["bookkeeping", "training.exits", "training.files", "typed"],
    "chain_run": ["*"],
    "chain_table": ["chain"],
    # what stages of a chain derive with: they may evaluate, and train through the same loop
    "derivations": ["*"],
    "cli": ["*"],
    "cli_adapters": ["adapters"],
    "cli_apps": ["export.apps", "training.exits", "training.files"],
    "cli_bench": ["export", "training.exits"],
    "cli_parser": [
        "cli_adapters",
        "cli_apps",
        "cli_bench",
        "cli_precisions",
        "cli_prepare",
        "overrides",
        "training.exits",
        "typed",
    ],
    "cli_precisions": ["export", "training.exits"],
    "cli_prepare": ["*"],
    "cli_sample": ["config", "export", "generation", "image_files", "overrides", "timing", "training.exits", "typed"],
    "timing": ["diffusion.stages"],
    "cli_exit": ["data.errors", "parallel.hosts", "training.exits"],
    "__init__": ["*"],
}

# A room -> the libraries it may import. Rooms that are not listed may import what they need.
LIBRARIES = {
    "networks": {"jax", "flax", "einops", "numpy"},
    "diffusion": {"jax", "flax", "einops", "numpy"},
    "losses": {"jax", "flax", "einops", "numpy"},
    "evaluation.interfaces": {"numpy"},
    "inputs.interfaces": {"jax"},
    # copied into every bundle, where there is nothing else
    "diffusion.noise": {"numpy"},
    "export.program": {"numpy"},
    "export.sampler": {"numpy", "program"},
    "export.older": {"program"},
    "export.client": {"numpy", "tokenizers", "noise", "program", "sampler", "runtime", "older", "unpacking"},
    "export.runtime": {"numpy", "ai_edge_litert"},
    "export.digits": {"numpy", "program"},
    "export.unpacking": {"numpy", "digits"},
    "export.verify": {"numpy", "ai_edge_litert", "program", "sampler", "runtime", "client"},
}

# What brings TensorFlow in, and where it may be brought in: there only, and only when a function needs it.
TENSORFLOW = ("tensorflow", "tensorflow_datasets", "keras", "clu.metric_writers", "jax.experimental.jax2tf")
MAY_USE_TENSORFLOW = ("data", "export", "training.mirrors")
NEVER = ("torch", "diffusers")


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported name, where it stands, and whether it is imported only when a function runs."""

    name: str
    line: int
    lazy: bool


def _inside(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def _module(path: pathlib.Path) -> str:
    """`snapgen_jax/training/loop.py` -> "training.loop"; the `__init__` of a room is the room."""
    parts = path.relative_to(ROOT / OURS).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {_module(path): path for path in sorted((ROOT / OURS).rglob("*.py"))}


def _imports(source: str, module: str) -> Iterator[Import]:
    """Every import of a file, ours by full name: statements, and strings that name a module of ours.

    Such a string is what `importlib.import_module` is given, whole or as the beginning of an f-string.
    """
    package = [OURS, *module.split(".")]
    if MODULES.get(module, pathlib.Path()).name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                ours = _inside(base, OURS)
                known = full.removeprefix(OURS + ".") in MODULES
                yield Import(full if known or not ours else base, node.lineno, lazy)
        elif isinstance(node, ast.Constant) and re.fullmatch(rf"{OURS}(\.\w+)+\.?", str(node.value)):
            yield Import(str(node.value).rstrip("."), node.lineno, lazy)
        checking_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        lazy = lazy or checking_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy)

    yield from visit(ast.parse(source), False)


def _rule(module: str, table: dict) -> str | None:
    return max((room for room in table if _inside(module, room)), key=len, default=None)


def violations(source: str, module: str) -> list[str]:
    """What a file imports and may not, one sentence each."""
    found = []
    rule = _rule(module, MAY_IMPORT)
    if rule is None:
        return [f"{module}: no room of this name; give it a line in MAY_IMPORT of tests/test_imports.py"]
    libraries = LIBRARIES.get(_rule(module, LIBRARIES) or "")
    for item in _imports(source, module):
        where = f"{module}:{item.line}"
        top = item.name.partition(".")[0]
        if top == OURS:
            target = item.name.removeprefix(OURS).removeprefix(".")
            allowed = [rule, *MAY_IMPORT[rule]]
            if target == EVERYWHERE and module not in ALONE:
                continue
            if target and "*" not in allowed and not any(_inside(target, room) for room in allowed):
                found.append(f"{where}: {rule} may not import {target}")
        elif libraries is not None and top not in libraries and top not in sys.stdlib_module_names:
            found.append(f"{where}: {rule} may import {', '.join(sorted(libraries))} and not {item.name}")
        if any(_inside(item.name, name) for name in NEVER):
            found.append(f"{where}: {item.name} belongs in tests only")
        if any(_inside(item.name, name) for name in TENSORFLOW):
            if not any(_inside(module, room) for room in MAY_USE_TENSORFLOW):
                found.append(f"{where}: {item.name} brings in TensorFlow, which only {MAY_USE_TENSORFLOW} may do")
            elif not item.lazy:
                found.append(f"{where}: {item.name} brings in TensorFlow; import it inside the function that needs it")
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_its_room_may_know(module):
    assert not violations(MODULES[module].read_text(encoding="utf-8"), module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("networks.unet", "import snapgen_jax.training.state"),
        ("networks.unet", "def f():\n    from snapgen_jax.parallel import mesh"),
        ("networks.unet", "import optax"),
        ("export.client", "from snapgen_jax.bounds import check"),
        ("networks.unet", "from ..losses import flow_matching"),
        ("training.loop", "from snapgen_jax import recipes"),
        ("training.loop", "def f(name):\n    importlib.import_module(f'snapgen_jax.recipes.{name}')"),
        ("training.loop", "from snapgen_jax.networks.module import apply"),
        ("training.recipe", "from snapgen_jax.training import loop"),
        ("recipes.flow_matching", "from snapgen_jax.training.loop import train"),
        ("recipes.flow_matching", "from snapgen_jax.data.pipeline import Pipeline"),
        ("recipes.flow_matching", "from snapgen_jax.systems.sd35 import SD35"),
        ("inputs.captions", "from snapgen_jax.recipes.flow_matching import FlowMatching"),
        ("inputs.captions", "def f():\n    from snapgen_jax.data.tokenizer import CaptionTokenizer"),
        ("inputs.interfaces", "from snapgen_jax.networks.module import Network"),
        ("inputs.interfaces", "from snapgen_jax.inputs.images import ImagesConfig"),
        ("training.recipe", "from snapgen_jax.inputs.captions import CaptionsConfig"),
        ("training.loop", "from snapgen_jax.inputs import registry"),
        ("systems.denoiser", "from snapgen_jax.weights.loader import load"),
        ("data.tokenizer_specs", "from snapgen_jax.inputs.captions import CaptionsConfig"),
        ("data.shapes", "from snapgen_jax.networks.codec import CodecConfig"),
        ("evaluation.interfaces", "from snapgen_jax.evaluation import registry"),
        ("evaluation.sample_grid", "def f():\n    import tensorflow"),
        ("export.convert", "from jax.experimental import jax2tf"),
        ("data.tfds", "import tensorflow_datasets as tfds"),
        ("weights.clip", "def f():\n    import torch"),
        ("surprise", "import os"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("networks.unet", "import math\nimport jax.numpy as jnp\nfrom snapgen_jax.networks.text import TextContext"),
        ("recipes.flow_matching", "from snapgen_jax.training.optimizer import AdamWConfig"),
        ("recipes.flow_matching", "from snapgen_jax.inputs.captions import CaptionsConfig"),
        ("training.recipe", "from snapgen_jax.inputs.interfaces import Inputs"),
        ("losses.distillation", "from snapgen_jax.bounds import check"),
        ("data.tokenizer_specs", "from snapgen_jax.inputs.interfaces import TokenizerSpec"),
        ("export.jax2tf_backend", "def f():\n    import tensorflow\n    from jax.experimental import jax2tf"),
        ("cli", "import snapgen_jax.training.loop, snapgen_jax.recipes"),
        ("training.loop", '"""A recipe such as snapgen_jax.recipes.flow_matching is not known here."""'),
    ],
)
def test_an_allowed_import_passes(module, source):
    assert not violations(source, module)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Ways along imports from a file back to itself, one for each file that has one."""
    found = []
    for start in imports:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            for name in sorted(imports.get(way[-1], ())):
                if name == start:
                    found.append([*way, start])
                    ways = []
                    break
                if name not in seen:
                    seen.add(name)
                    ways.append([*way, name])
    return found


def test_no_network_imports_itself_in_a_circle():
    """Imports inside functions and for type checkers count too: a network's blocks know its fields, not the network."""
    files = {module: path for module, path in MODULES.items() if _inside(module, "networks")}
    imports = {
        module: {item.name.removeprefix(f"{OURS}.") for item in _imports(path.read_text(encoding="utf-8"), module)}
        for module, path in files.items()
    }
    assert any(imports.values()) and not circles(imports)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]


def test_configs_import_ml_collections_and_other_configs_and_nothing_of_ours():
    files = sorted((ROOT / "configs").rglob("*.py"))
    assert files
    for path in files:
        for item in _imports(path.read_text(encoding="utf-8"), "__init__"):
            allowed = {"ml_collections", "configs", *sys.stdlib_module_names} - {"importlib", "runpy"}
            assert item.name.partition(".")[0] in allowed, f"{path.name}:{item.line} imports {item.name}"


def test_importing_every_module_brings_in_neither_tensorflow_nor_torch():
    names = [f"{OURS}.{module}" for module in MODULES if module != "__init__"]
    script = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
    script += f"print([name for name in {(*TENSORFLOW, *NEVER)!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
