"""What transformers' remote-code loader demands of the files that travel with a checkpoint."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HUB_FILES = sorted(
    ROOT / f"{name}.py"
    for name in (
        *("configuration_openvla", "action_tokenizer", "tf_image_ops", "vision_towers", "oft_files"),
        *("action_decoding", "action_heads", "linear_layers", "language_layers", "compiled_actions"),
        *("processing_openvla", "pretrained_openvla", "modeling_openvla"),
    )
)
ALLOWED = {"numpy", "torch", "PIL", "transformers", "huggingface_hub", "safetensors"} | set(sys.stdlib_module_names)


def imports(path: Path) -> list[ast.stmt]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_imports_are_flat_and_few(path):
    hub_modules = {other.stem for other in HUB_FILES}
    for node in imports(path):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module in hub_modules, f"line {node.lineno}: only `from .name import X`"
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {name.split(".")[0] for name in names} <= ALLOWED, f"line {node.lineno}: {names}"


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_the_loader_finds_exactly_the_imports_there_are(path):
    # it searches the text with these expressions, docstrings included (transformers.dynamic_module_utils)
    text = path.read_text()
    found = re.findall(r"^\s*import\s+\.(\S+)\s*$", text, flags=re.MULTILINE)
    found += re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE)
    written = [node.module for node in imports(path) if isinstance(node, ast.ImportFrom) and node.level]
    assert sorted(found) == sorted(written)


def relative_imports(name: str) -> set[str]:
    nodes = imports(ROOT / f"{name}.py")
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}


def test_what_is_loaded_first_imports_itself_all_it_needs():
    # 4.57 copies of a local folder the files that one imports, but not what those import; configurations come first
    def needed(name: str) -> set[str]:
        return set().union({name}, *(needed(other) for other in relative_imports(name)))

    ready = needed("configuration_openvla")
    assert ready == {"configuration_openvla"} | relative_imports("configuration_openvla")
    assert needed("processing_openvla") == {"processing_openvla"} | relative_imports("processing_openvla")
    assert needed("modeling_openvla") - ready == ({"modeling_openvla"} | relative_imports("modeling_openvla")) - ready


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_no_isinstance_on_our_own_classes(path):
    # from a local folder, transformers 5 imports each file on its own: the same class exists twice
    ours = {
        node.name
        for other in HUB_FILES
        if other != path
        for node in ast.walk(ast.parse(other.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            tested = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            assert not tested & ours, f"line {node.lineno}"


def test_forbidden_dependencies_appear_nowhere():
    metadata = (ROOT / "setup.cfg").read_text()
    assert not re.search(r"timm|torchvision|tensorflow", metadata)
