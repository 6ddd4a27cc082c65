"""The layout: one-way imports, the folders' names, and life beside an installed Hugging Face
`kernels` package."""

import ast
import os
import sys
from pathlib import Path

import prepared
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "exports", "compress", "runtime")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
MAY_IMPORT = {
    "kernels": {"kernels"},
    "exports": {"exports", "kernels"},
    "compress": {"compress", "exports", "kernels"},
    "runtime": {"runtime", "exports", "kernels"},
}
LOADERS = {  # commands that run an artifact
    "compress/bench/decode.py", "compress/bench/model.py", "compress/bench/prompt.py", "compress/cli/__init__.py",
    "compress/cli/kernels.py", "compress/evaluate.py", "compress/cli/generate.py",
    "compress/cli/live.py", "compress/tasks/generator.py", "compress/tasks/run.py",
}  # fmt: skip
MOST_LINES = 400


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    """Dotted names that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# what stands in sys.path of `python -c`: the working directory, PYTHONPATH, the installed packages
PATHS = """
import sys
code, tests, *path = sys.argv[1:]
installed = [folder for folder in sys.path if not folder.startswith(tests)]
sys.path[:] = ["", *path, *installed]
exec(code)
"""


def run(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """stdout of `python -c code` in the repository root, with `path` in front of the installed
    packages; PyTorch alone is already imported."""
    words = (code, ROOT / "tests", *path)
    done = prepared.python("torch", PATHS, *words, env={"HF_HUB_OFFLINE": "1"}, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_files_were_found():
    assert len(FILES) > 20
    assert {f.relative_to(ROOT).parts[0] for f in FILES} == set(FOLDERS)


def test_imports_go_one_way():
    for file in FILES:
        name = relative(file)
        allowed = MAY_IMPORT[name.split("/")[0]] | ({"runtime"} if name in LOADERS else set())
        for module in imported(parse(file)):
            top, _, rest = module.partition(".")
            assert top not in FOLDERS, (
                f"{name} imports {module}, which is only kvfold.{module} when installed"
            )
            if top == "kvfold" and rest.split(".")[0] in FOLDERS:
                assert rest.split(".")[0] in allowed, f"{name} imports {module}"


def test_the_top_imports_nothing():
    """Of kvfold or others, when it is imported; the hook on transformers' loader does when that is
    called."""
    for file in (ROOT / "src" / "kvfold").glob("*.py"):
        at_import = ast.Module(
            [n for n in parse(file).body if isinstance(n, ast.Import | ast.ImportFrom)], []
        )
        for name in imported(at_import):
            ours = (
                "kvfold.errors",
                "kvfold.autoclass",
                "kvfold.memory",
                "kvfold.pretrained",
                "kvfold.version",
            )
            assert name.startswith(ours) or name.split(".")[0] in sys.stdlib_module_names


def module_name(file: Path) -> str:
    """Of a file of the product, as others import it."""
    inside = file.relative_to(ROOT / "src" if (ROOT / "src") in file.parents else ROOT)
    parts = inside.with_suffix("").parts
    parts = parts if parts[0] == "kvfold" else ("kvfold", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or not: each circle once, sorted."""
    left = {
        name: {other for other in others if other in imports} for name, others in imports.items()
    }
    reach: dict[str, set[str]] = {}
    for name in left:
        seen, todo = set(), [name]
        while todo:
            for other in left[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[name] = seen
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in left if a in reach[a]}
    return sorted(map(sorted, found))


def imports_of(file: Path, modules: set[str]) -> set[str]:
    """Modules of the product that a file imports anywhere: at its top, inside functions, and for
    types alone."""
    found = set()
    for name in imported(parse(file)):
        # `from kvfold.runtime import load` is the module load, and `from kvfold.errors import
        # KvfoldError` is kvfold.errors
        found |= {name} & modules or {name.rpartition(".")[0]} & modules
    return found - {module_name(file)}


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and for types count: what needs them can't be understood, or
    replaced, alone."""
    files = {module_name(file): file for file in (*FILES, *(ROOT / "src" / "kvfold").glob("*.py"))}
    assert len(files) > 150 and {
        "kvfold",
        "kvfold.runtime.cache.cache",
        "kvfold.kernels.formats",
    } <= set(files)
    assert circles({name: imports_of(file, set(files)) for name, file in files.items()}) == []


def test_that_test_sees_circles():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "a"}, "d": {"a", "e"}, "e": set()}) == [
        ["a", "b", "c"]
    ]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}) == [["a", "b"], ["c", "d"]]
    assert circles({"a": {"b", "json"}, "b": {"c"}, "c": set()}) == []


def test_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_wheel_has_every_folder():
    find = pytest.importorskip("setuptools").find_namespace_packages
    wanted = {
        f"kvfold.{file.relative_to(ROOT).parent.as_posix().replace('/', '.')}" for file in FILES
    }
    assert wanted <= set(find(str(ROOT / "src")))


def test_what_runs_on_the_device_knows_nothing_of_what_launches_it():
    for file in (ROOT / "kernels" / "gpu" / "device").glob("*.py"):
        ours = {name for name in imported(parse(file)) if name.startswith("kvfold")}
        assert all(name.startswith("kvfold.kernels.gpu.device.") for name in ours), file


def test_the_reference_needs_no_triton():
    for file in [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "kinds").glob("*.py")]:
        names = imported(parse(file))
        assert not any(
            name.split(".")[0] == "triton" or name.startswith("kvfold.kernels.gpu")
            for name in names
        ), file


def test_links_lead_to_the_folders():
    for folder in FOLDERS:
        link = ROOT / "src" / "kvfold" / folder
        assert link.is_symlink() and not Path(os.readlink(link)).is_absolute()
        assert link.resolve() == ROOT / folder


def test_files_are_short_and_say_what_they_are():
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= MOST_LINES, relative(file)
        tree = parse(file)
        assert ast.get_docstring(tree), f"{relative(file)} has no docstring"
        for node in tree.body:
            if isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef
            ) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{node.name} in {relative(file)} has no docstring"


def test_nothing_unpickles():
    for file in FILES:
        tree = parse(file)
        tops = {name.split(".")[0] for name in imported(tree)}
        assert not tops & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "marshal",
            "shelve",
            "joblib",
        }, relative(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                refused = {"torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load"}
                assert called not in refused, f"{called} in {relative(file)}"


DOOR = ROOT / "src" / "kvfold" / "pretrained.py"
HOOK = ROOT / "src" / "kvfold" / "autoclass.py"
SOURCES = sorted(
    {*FILES, *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")} - {DOOR, HOOK}
)


def doors_of(tree: ast.Module) -> list[str]:
    """What in a module could load a model's own code: Auto classes, pipelines, dynamic modules,
    classes' `from_pretrained`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            ("transformers", "optimum", "peft")
        ):
            names = [alias.name for alias in node.names]
            found += [
                name
                for name in names
                if name.startswith(("Auto", "pipeline", "dynamic_module", "get_class_"))
            ]
        if isinstance(node, ast.Attribute) and (
            node.attr in ("from_pretrained", "from_config", "load_custom_generate")
            or node.attr.startswith("AutoModel")
        ):
            found.append(ast.unparse(node))
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "custom_generate"):
            found.append(node.arg)
    return found


def test_nothing_but_the_one_door_loads_from_a_models_folder():
    found = {relative(file): doors_of(parse(file)) for file in SOURCES}
    assert {name: doors for name, doors in found.items() if doors} == {}


def test_the_door_itself_never_trusts_code():
    calls = [
        n
        for n in ast.walk(parse(DOOR))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    ]
    calls = [n for n in calls if n.func.attr in ("from_pretrained", "from_config")]  # type: ignore[attr-defined]
    assert len(calls) == 3
    for call in calls:
        assert [ast.unparse(k.value) for k in call.keywords if k.arg is None][-1].endswith(
            "**CODE_FREE}"
        )
    from kvfold.pretrained import CODE_FREE

    assert CODE_FREE == {"trust_remote_code": False}


@pytest.mark.parametrize(
    "code",
    [
        "from transformers import AutoConfig",
        "from transformers import pipeline",
        "transformers.AutoModelForCausalLM",
        "LlamaForCausalLM.from_pretrained(x)",
        "f(x, trust_remote_code=flag)",
        "from transformers.models.auto.modeling_auto import AutoModel",
    ],
)
def test_that_test_sees(code):
    assert doors_of(ast.parse(code))


def test_bare_import_from_the_root_is_the_installed_module():
    code = "import {0}; from kvfold import {0} as r; assert {0} is r; assert r.__name__ == 'kvfold.{0}'"
    run("; ".join(code.format(folder) for folder in ("runtime", "exports", "compress")))


# A stand-in for Hugging Face's `kernels`: whatever is asked of it is a decorator that does nothing.
FAKE = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, decorated): return decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
"""
IMPORTS = (
    "import transformers; from transformers import LlamaForCausalLM; "
    "import kvfold.runtime, kvfold.kernels.formats; "
)


def install_fake(folder: Path, version: str) -> Path:
    """A `kernels` distribution of that version."""
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(FAKE)
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "top_level.txt").write_text("kernels\n")
    return folder


@pytest.mark.parametrize("version", ["in range", "0.0.1"])
def test_beside_an_installed_kernels_package(tmp_path, version):
    """In transformers' range of versions its models import a dozen names from `kernels`, out of it
    they leave it alone."""
    inside = version == "in range"
    if inside:
        from transformers.utils import import_utils

        version = getattr(import_utils, "KERNELS_MIN_VERSION", None) or pytest.skip(
            "this transformers states no range"
        )
    fake = install_fake(tmp_path, version)
    code = IMPORTS + (
        "import kernels; from transformers.utils import is_kernels_available; "
        "print(kernels.__file__, kvfold.kernels.formats.__file__, is_kernels_available())"
    )
    theirs, ours, available = run(code, fake).split()
    assert Path(theirs) == fake / "kernels" / "__init__.py"
    assert Path(ours).resolve() == ROOT / "kernels" / "formats.py"
    assert available == str(inside)


def test_without_a_kernels_package():
    """The folder `kernels/` in the working directory isn't taken for Hugging Face's package."""
    code = IMPORTS + (
        "from importlib.util import find_spec; from transformers.utils import is_kernels_available; "
        "real = getattr(find_spec('kernels'), 'origin', None); assert real or not is_kernels_available()"
    )
    run(code)
