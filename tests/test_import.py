"""What imports load, and what they tell transformers, in processes that have imported nothing of it yet."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_reram
from hf_reram import ReRAMConfig, calibrate, patch_model
from tests.samples.interpreter import Interpreter
from tests.samples.models import bert_batch

HEAVY = (
    "accelerate",
    "datasets",
    "evaluate",
    "jinja2",
    "matplotlib",
    "peft",
    "rich",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torchvision",
    "transformers.modeling_utils",
    "transformers.pipelines",
    "transformers.quantizers",
    "transformers.trainer",
    "typer",
)
ROOMS = (
    "hf_reram.device",
    "hf_reram.device.plot",
    "hf_reram.config",
    "hf_reram.nn",
    "hf_reram.model.patch",
    "hf_reram.model.deploy",
    "hf_reram.calibration.settle",
    "hf_reram.training.losses",
    "hf_reram.training.checkpoints",
    "hf_reram.evaluation.robustness",
    "hf_reram.evaluation.report",
    "hf_reram.evaluation.plot",
    "hf_reram.evaluation.inspect",
    "hf_reram.hub.card",
    "hf_reram.hub.load",
    "hf_reram.hub.push",
    "hf_reram.integrations.upload",
    "hf_reram.tasks",
    "hf_reram.tasks.comparison",
    "hf_reram.tasks.image_classification",
    "hf_reram.tasks.question_answering",
)
COMPARE = f"""
import importlib, sys
def loaded(*modules):
    before = set(sys.modules)
    for module in modules:
        importlib.import_module(module)
    return sorted(set({HEAVY}) & (set(sys.modules) - before))
"""

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run():
    """Runs code where torch and transformers are, but no part of transformers that is loaded lazily; gives the last
    line that it prints."""
    interpreter = Interpreter(["torch", "transformers"])
    yield lambda code, *arguments: last_line(interpreter.run("-c", code, *map(str, arguments)))
    interpreter.close()


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def alone(*command) -> str:
    """The same in a process that has imported nothing."""
    return last_line(subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT))


def test_the_package_loads_nothing_until_it_is_used():
    code = (
        "import sys; before = set(sys.modules); import hf_reram\n"
        "found = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "hf_reram.ReRAMConfig\n"
        "print(sorted(found), *(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert alone("-c", code) == "['hf_reram'] True True"


def test_importing_loads_nothing_heavy_beside_torch_and_transformers(run):
    assert run(COMPARE + "print(loaded('hf_reram'))") == "[]"


def test_rooms_load_nothing_heavy(run):
    code = COMPARE + "print({room: found for room in sys.argv[1:] if (found := loaded(room))})"
    assert run(code, *ROOMS) == "{}"


def test_the_command_line_loads_only_what_it_shows(run):
    assert run(COMPARE + "print(loaded('hf_reram.cli'))") == "['rich', 'typer']"


def test_every_public_name_is_there():
    for name in hf_reram.__all__:
        assert getattr(hf_reram, name) is not None
        assert name in dir(hf_reram)
    assert hf_reram.tasks.__name__ == "hf_reram.tasks"
    with pytest.raises(AttributeError, match="no attribute 'patch_modle'"):
        hf_reram.patch_modle  # noqa: B018
    with pytest.raises(ImportError, match="patch_modle"):
        from hf_reram import patch_modle  # noqa: F401


@pytest.mark.parametrize("package", ["hf_reram", "hf_reram.tasks", "hf_reram.tasks.metrics"])
def test_lazy_names_are_those_that_type_checkers_see(package):
    """``__all__``, the table, and the imports under ``TYPE_CHECKING``."""
    file = Path(hf_reram.__file__).parents[1] / package.replace(".", "/") / "__init__.py"
    tree = ast.parse(file.read_text())
    branches = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in branches[0].body if isinstance(node, ast.ImportFrom)]
    seen = {"." * (node.level - 1) + str(node.module): [alias.name for alias in node.names] for node in imports}
    tables = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert ast.literal_eval(tables[0]) == seen
    module = sys.modules[package] if package in sys.modules else __import__(package, fromlist=["x"])
    assert sorted({*module.__all__} - {"__version__"}) == sorted(name for names in seen.values() for name in names)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.stem)
def test_recipes_use_public_names_alone(recipe):
    tree = ast.parse(recipe.read_text())
    used = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "hf_reram"
        for alias in node.names
    }
    whole = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    public = {(package.__name__, name) for package in (hf_reram, hf_reram.tasks) for name in package.__all__}
    assert used and not used - public
    assert not any(name.partition(".")[0] == "hf_reram" for name in whole)


def test_names_may_be_used_first_by_several_threads(run):
    """One needs a package and another a module of it, which Python alone refuses at times."""
    code = """
import sys, threading; sys.setswitchinterval(1e-5)
import hf_reram
names = ["patch_model", "DeviceConfig", "calibrate", "inspect_layers", "retention_loss", "ReRAMConfig"]
start, found = threading.Barrier(len(names)), {}
def use(name):
    start.wait()
    found[name] = getattr(hf_reram, name).__name__
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found == {name: name for name in names})
"""
    assert run(code) == "True"


# What transformers knows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("robust")
    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**shape, intermediate_size=32)).eval()
    calibrate(patch_model(model, ReRAMConfig()), [bert_batch()]).save_pretrained(folder)
    return folder


LOAD = """
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(sum(type(m).__name__ == "CrossbarLinear" for m in model.modules()))
"""
ORDERS = {
    "before transformers": "import hf_reram, sys",
    "after transformers' models": "import sys; from transformers import AutoModel, BertModel; import hf_reram",
    "transformers reloaded": (
        "import importlib, sys; import hf_reram; import transformers.quantizers.auto as auto\n"
        "importlib.reload(auto); importlib.reload(hf_reram); importlib.reload(auto)\n"
        "import transformers.modeling_utils as models; models.get_hf_quantizer = auto.get_hf_quantizer\n"
        "del sys.modules['transformers.quantizers.auto']; import transformers.quantizers.auto as auto\n"
        "assert 'reram' in auto.AUTO_QUANTIZER_MAPPING"
    ),
    "the quantizer first": "import sys; from hf_reram.integrations.quantizer import ReRAMQuantizer",
    "a room first": "import sys; from hf_reram.model.patch import patch_model",
    "threads": (
        "import importlib, sys, threading; sys.setswitchinterval(1e-5); errors = []\n"
        "def run(name):\n"
        "    start.wait()\n"
        "    try: importlib.import_module(name)\n"
        "    except BaseException as error: errors.append((name, error))\n"
        "names = 2 * ['hf_reram', 'transformers.quantizers.auto', 'transformers.modeling_utils', 'hf_reram.nn']\n"
        "start = threading.Barrier(len(names))\n"
        "threads = [threading.Thread(target=run, args=(name,)) for name in names]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
        "assert not errors, errors"
    ),
}
MADE = """
import hf_reram
from transformers.quantizers import auto
config = auto.AutoQuantizationConfig.from_dict(hf_reram.ReRAMConfig(gain="full_scale").to_dict())
quantizer = auto.AutoHfQuantizer.from_config(config, pre_quantized=True)
print(type(config) is hf_reram.ReRAMConfig, type(quantizer) is hf_reram.ReRAMQuantizer, config.gain)
"""


@pytest.mark.parametrize("order", ORDERS)
def test_quantizer_and_config_are_registered_whatever_is_imported_first(run, order):
    """Once: transformers refuses a second time."""
    assert run(ORDERS[order] + MADE) == "True True full_scale"


@pytest.mark.parametrize("order", list(ORDERS)[:2])
def test_crossbars_come_back(run, checkpoint, order):
    assert run(ORDERS[order] + LOAD, checkpoint) == "8"


def test_crossbars_come_back_in_a_spawned_worker(checkpoint, tmp_path):
    code = (
        "import sys, torch, hf_reram\n"
        "class Layers(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 1\n"
        "    def __getitem__(self, i):\n"
        "        from transformers import AutoModel\n"
        "        return len(hf_reram.crossbar_layers(AutoModel.from_pretrained(sys.argv[1])))\n"
        "if __name__ == '__main__':\n"
        "    loader = torch.utils.data.DataLoader(Layers(), num_workers=1, multiprocessing_context='spawn')\n"
        "    print(*(int(n) for n in loader))\n"
    )
    (tmp_path / "worker.py").write_text(code)
    assert alone(tmp_path / "worker.py", checkpoint) == "7"


def test_pipelines_are_told_by_tasks_alone(run):
    """Transformers' list of what it has given up stays as it is, and so does what is on it beside questions."""
    code = """
import hf_reram, transformers
from transformers import pipelines
from transformers.quantizers import auto
def refused(task):
    try: pipelines.check_task(task)
    except KeyError as error: return "removed" in str(error)
removed, tasks = dict(pipelines.REMOVED_TASKS), pipelines.get_supported_tasks()
assert refused("question-answering") and "question-answering" not in tasks
import hf_reram.tasks
assert pipelines.REMOVED_TASKS == removed
assert pipelines.get_supported_tasks() == sorted([*tasks, "question-answering"])
name, found, _ = pipelines.check_task("question-answering")
print(found["impl"].__name__, all(refused(task) for task in removed if task != "question-answering"))
"""
    assert run(code) == "QuestionAnsweringPipeline True"


@pytest.mark.parametrize(
    "order",
    [
        "import hf_reram.tasks",
        "import hf_reram.tasks, hf_reram.integrations.pipeline",
        "import hf_reram.integrations.pipeline as p; p.register(); p.register()",
    ],
)
def test_questions_are_answered_whatever_is_imported_first(run, order):
    code = f"{order}\nfrom transformers import pipelines\nprint(pipelines.check_task('question-answering')[0])"
    assert run(code) == "question-answering"
