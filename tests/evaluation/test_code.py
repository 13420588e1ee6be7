"""What code of a script's own reads is told by what it is, wherever it stands."""

import argparse
import collections
import importlib
import itertools
import linecache
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_reram.evaluation.content import described, key_of
from hf_reram.model.code import globals_of, imports_of, reads_any, taken_whole
from hf_reram.model.description import added_attributes
from hf_reram.model.installed import is_installed
from hf_reram.model.source import set_since, source_of


def script(code, **names):
    """The function ``score`` of a script."""
    names = {"__name__": "__main__", **names}
    file = f"<script {hash(code)}>"
    linecache.cache[file] = len(code), None, code.splitlines(True), file  # as a notebook does
    exec(compile(code, file, "exec"), names)
    return names["score"]


def told(code, **names):
    return described(script(code, **names))


def test_globals_and_what_is_taken_of_them():
    code = compile("def f(p): return [os.path.join(g, x) for x in p.predictions] + CFG.a.b(h)(os)", "f", "exec")
    found = globals_of(code)
    assert found["os"] == {("path", "join"), ()} and found["g"] == found["h"] == {()} and found["CFG"] == {("a", "b")}
    assert "predictions" not in found and "x" not in found and "p" not in found


def test_an_attribute_is_no_global_of_its_name():
    code = "def score(p): return p.predictions.mean()"
    assert told(code) == told(code, predictions=1) == told(code, predictions=[2], mean=3)
    assert told("def score(p): return predictions", predictions=1) != told(
        "def score(p): return predictions", predictions=2
    )


class Metric:
    table = [1, 2]

    def __init__(self, weight):
        self.weight = weight

    @staticmethod
    def compute(p):
        return p


class Wider(Metric):
    table = [1, 3]


def test_objects_that_a_function_names_are_told_by_what_they_hold():
    code = "def score(p): return CFG.threshold"
    same = [told(code, CFG=SimpleNamespace(threshold=0.5)) for _ in range(2)]
    assert same[0] == same[1] != told(code, CFG=SimpleNamespace(threshold=0.7))
    code = "def score(p): return METRIC.compute(p)"
    assert told(code, METRIC=Metric(1)) == told(code, METRIC=Metric(1))
    assert len({told(code, METRIC=metric) for metric in (Metric(1), Metric(2), Wider(1))}) == 3
    marked = [script("def score(p): return score.factor") for _ in range(3)]
    for function, factor in zip(marked, (1, 1, 2)):
        function.factor = factor
    assert described(marked[0]) == described(marked[1]) != described(marked[2])


def test_a_metric_of_evaluate_is_told_by_its_code_and_not_by_its_last_use(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    features = datasets.Features({name: datasets.Value("int32") for name in ("predictions", "references")})
    about = dict.fromkeys(("description", "citation", "inputs_description"), "")

    class Mine(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(features=features, **about)

        def _compute(self, predictions, references):
            return {"n": len(predictions)}

    class Other(Mine):
        def _compute(self, predictions, references):
            return {"n": -len(predictions)}

    class Own(Mine):
        def __init__(self, table, **options):
            super().__init__(**options)
            self.table = table

    code = "def score(p): return METRIC.compute(predictions=p, references=p)"
    metric = Mine(cache_dir=str(tmp_path / "a"))
    before = told(code, METRIC=metric)
    assert script(code, METRIC=metric)([1, 2]) == {"n": 2}
    assert told(code, METRIC=metric) == before == told(code, METRIC=Mine(cache_dir=str(tmp_path / "b")))
    assert told(code, METRIC=Other(cache_dir=str(tmp_path / "a"))) != before
    assert told(code, METRIC=Mine("other", cache_dir=str(tmp_path / "a"))) != before
    tables = [Own([row], cache_dir=str(tmp_path / "a")) for row in (1, 2)]
    assert told(code, METRIC=tables[0]) != told(code, METRIC=tables[1])


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a script's own, which are then imported anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    counter = itertools.count()

    def write(**files):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("my_metrics", "my_tables")]:
            del sys.modules[name]
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
            os.utime(tmp_path / f"{name}.py", (next(counter),) * 2)  # or the compiled file is taken for its own
        importlib.invalidate_caches()
        return importlib.import_module("my_metrics")

    yield write
    write(my_metrics="")
    del sys.modules["my_metrics"]


WAYS = {
    "attribute": "import my_metrics\ndef score(p): return my_metrics.score(p)",
    "inside": "def score(p):\n  import my_metrics\n  return my_metrics.score(p)",
    "name": "from my_metrics import score as inner\ndef score(p): return inner(p)",
    "name inside": "def score(p):\n  from my_metrics import score as inner\n  return inner(p)",
    "closure": "def outer():\n  import my_metrics\n  def score(p): return my_metrics.score(p)\n  return score\n"
    "score = outer()",
    "default": "import my_metrics\ndef score(p, lib=my_metrics): return lib.score(p)",
    "listed": "import my_metrics\nLIBS = [my_metrics]\ndef score(p): return LIBS[0].score(p)",
    "argument": "import functools, my_metrics\ndef inner(lib, p): return lib.score(p)\n"
    "score = functools.partial(inner, my_metrics)",
    "held": "import my_metrics\nclass Own:\n  def __init__(self): self.lib = my_metrics\n"
    "  def __call__(self, p): return self.lib.score(p)\nscore = Own()",
    "alias": "import my_metrics\ndef score(p):\n  m = my_metrics\n  return m.score(p)",
}


@pytest.mark.parametrize("way", WAYS)
def test_modules_of_a_script_are_told_by_their_code(package, way):
    inner = "import math\nimport my_tables\ndef score(p): return my_tables.shift(p) * math.pi"
    table = "def shift(p): return p + 1"
    first = [(package(my_metrics=inner, my_tables=table), told(WAYS[way]))[1] for _ in range(2)]
    package(my_metrics=inner.replace("* math.pi", "* 2"))
    edited = told(WAYS[way])
    package(my_metrics=inner, my_tables=table.replace("+ 1", "- 1"))
    assert first[0] == first[1] and len({first[0], edited, told(WAYS[way])}) == 3


def test_a_value_that_is_set_in_a_module_counts(package):
    module = package(my_metrics="LIMIT = 1\ndef score(p): return p > LIMIT")
    before = told(WAYS["attribute"])
    module.LIMIT = 2
    assert told(WAYS["attribute"]) != before
    module.LIMIT, module.other = 1, 5  # which it does not read
    assert told(WAYS["attribute"]) == before


@pytest.mark.parametrize("way", ["inside", "name inside"])
def test_a_value_that_is_set_in_a_module_counts_wherever_it_is_imported(package, way):
    """And that it has been imported meanwhile makes no other evaluation."""
    text = (
        "import math\nLIMIT: int = 1\nPI = math.pi\nKNOWN = []\nTOP = 0\ndef limit(top):\n  global TOP\n  TOP = top\n"
    )
    module = package(my_metrics=text + "def score(p): return p > LIMIT and p not in KNOWN and p > TOP")
    imported = told(WAYS[way])
    del sys.modules["my_metrics"]
    assert told(WAYS[way]) == imported and "my_metrics" not in sys.modules
    sys.modules["my_metrics"] = module
    assert script(WAYS[way])(2) and told(WAYS[way]) == imported
    module.LIMIT = 2
    assert told(WAYS[way]) != imported and not script(WAYS[way])(2)
    module.LIMIT = 1
    assert told(WAYS[way]) == imported
    module.KNOWN.append(2)
    assert told(WAYS[way]) != imported and not script(WAYS[way])(2)
    module.KNOWN.clear()
    module.limit(2)
    assert told(WAYS[way]) != imported and not script(WAYS[way])(2)


def test_no_module_is_run_to_tell_what_it_is(package, tmp_path):
    """Nor the package that it is in, nor what is imported for types alone."""
    package(
        my_metrics="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import my_tables\ndef score(p): return p"
    )
    (tmp_path / "my_tables.py").write_text("raise SystemExit(3)")
    (tmp_path / "my_job").mkdir()
    (tmp_path / "my_job" / "__init__.py").write_text("raise SystemExit(3)")
    (tmp_path / "my_job" / "deep").mkdir()
    (tmp_path / "my_job" / "deep" / "args.py").write_text("VALUE = 1")
    (tmp_path / "my_job" / "old.py").write_text("print 'of Python 2'")
    importlib.invalidate_caches()
    names = ["my_job", "my_job.deep.args", "my_job.old", "my_metrics", "my_tables"]
    found = source_of(["my_metrics", "my_job.deep.args", "my_job.old", "my_job.args.Args", "no.such.module"])
    assert [name for name, _ in found] == names
    assert not {"my_job", "my_job.deep", "my_tables"} & sys.modules.keys()
    before = told("def score(p):\n  from my_job.deep.args import VALUE\n  return p * VALUE")
    (tmp_path / "my_job" / "deep" / "args.py").write_text("VALUE = 2")
    assert told("def score(p):\n  from my_job.deep.args import VALUE\n  return p * VALUE") != before


def test_installed_modules_have_no_source_of_a_script():
    assert is_installed("torch.nn") and is_installed("json") and is_installed("hf_reram.config")
    assert is_installed("torch.ops") and not is_installed("__main__") and not is_installed(__name__)
    assert source_of(["torch", "json", "hf_reram", "no.such.module"]) == []
    (name, _), *others = source_of(["tests.samples.texts"])
    assert others[-1][0] == "tests.samples.texts" and name == "tests"
    code = compile("from .a import b\nfrom .. import c\nimport d.e\nfrom f import *", "x", "exec")
    assert imports_of(code, "x.y") == {"x.y.a", "x.y.a.b", "x", "x.c", "d.e", "f"}


def test_packages_in_other_folders_of_the_path_are_installed_where_an_installer_noted_them(tmp_path, monkeypatch):
    noted, own = tmp_path / "target", tmp_path / "own"
    for folder in (noted, own):
        (folder / "pkg-1.0.dist-info").mkdir(parents=True)
        (folder / f"{folder.name}_pkg").mkdir()
        (folder / f"{folder.name}_pkg" / "__init__.py").write_text("from . import part")
        (folder / f"{folder.name}_pkg" / "part.py").write_text("")
        (folder / f"{folder.name}_single.py").write_text("import json")
        (folder / f"{folder.name}_script.py").write_text("")
        (folder / "pkg-1.0.dist-info" / "METADATA").write_text("Name: pkg\nVersion: 1.0\n")
        monkeypatch.syspath_prepend(str(folder))
    files = ["target_pkg/__init__.py", "target_pkg/part.py", "target_single.py", "../bin/target", "target-1.0/RECORD"]
    (noted / "pkg-1.0.dist-info" / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    (own / "pkg-1.0.dist-info" / "RECORD").write_text("__editable__.pkg-1.0.pth,,\n")  # its folder is on the path
    names = ["target_pkg", "target_single", "target_script", "own_pkg", "own_single", "own_script"]
    assert [name for name, _ in source_of(names)] == [
        *("own_pkg", "own_pkg.part", "own_script", "own_single", "target_script")
    ]
    before = set(sys.modules)
    found = {name: (importlib.import_module(name), is_installed(name))[1] for name in names}
    for name in set(sys.modules) - before:
        del sys.modules[name]
    assert found == {name: name in names[:2] for name in names}


READS = {
    "named": "def score(p): return p * args.batch",
    "around": "def outer(args):\n  def score(p): return p * args.batch\n  return score\nscore = outer(args)",
    "beside a method": "def helper(p, given): return p * given\n"
    "def score(p):\n  try: p.eval()\n  except AttributeError: return helper(p, args.batch)",
    "by name": "def score(p): return p * getattr(args, 'batch')",
    "handed on": "def helper(p, given): return p * given.batch\ndef score(p): return helper(p, args)",
    "inside": "class held: inner = args\ndef score(p): return p * held.inner.batch",
}


@dataclass
class Options:
    batch: int = 8
    chips: int = 1


@pytest.mark.parametrize("way", READS)
def test_of_a_script_s_arguments_those_count_that_its_code_reads(way):
    def made(**changed):
        return told(READS[way], args=argparse.Namespace(**{"batch": 8, "chips": 1, "out": "a", **changed}))

    assert script(READS[way], args=argparse.Namespace(batch=8))(2) == 16
    assert made() == made(chips=10, out="b") != made(batch=16)


HANDED = {
    "to a library's function": "import json\ndef score(p): return p * len(json.dumps(args, default=vars_of))",
    "by a script's function": "import json\ndef inner(p, a): return json.dumps(a, default=vars_of)\n"
    "def score(p): return len(inner(p, a=args))",
    "to a class": "class Own:\n  def __init__(self, a): self.a = a\ndef score(p): return p * Own(args).a.batch",
    "as a text": "def score(p): return f'{args} {p}'",
    "compared": "def score(p): return p if args == other else 0",
    "under another name": "def score(p):\n  a = args\n  return p * a.batch",
    "in vars": "def score(p): return p * vars(args)['batch']",
    "as a dict": "def score(p): return p * args.__dict__['batch']",
    "as a default": "def score(p, a=args): return p * a.batch",
    "bound": "import functools\ndef inner(args, p): return p * args.batch\nscore = functools.partial(inner, args)",
    "held": "class Own:\n  def __init__(self, args): self.args = args\n"
    "  def __call__(self, p): return p * self.args.batch\nscore = Own(args)",
}


@pytest.mark.parametrize("way", HANDED)
def test_a_namespace_of_which_code_takes_more_than_attributes_counts_whole(way):
    def made(**changed):
        args = argparse.Namespace(**{"batch": 8, "chips": 1, **changed})
        return told(HANDED[way], args=args, other=argparse.Namespace(batch=8), vars_of=lambda given: {})

    assert made() == made() != made(chips=2) and made() != made(batch=9)


def test_of_a_dataclass_s_object_what_code_takes_of_it_counts():
    named, whole = "def score(p): return p * args.batch", "def score(p): return p == args"
    assert told(named, args=Options()) == told(named, args=Options(chips=2)) != told(named, args=Options(16))
    assert told(whole, args=Options()) == told(whole, args=Options()) != told(whole, args=Options(chips=2))


def test_of_a_class_of_settings_those_count_that_code_takes():
    settings = "class CFG:\n  batch = 8\n  chips = 1\n  def size(): return CFG.batch\n"
    changes = [settings, settings.replace("chips = 1", "chips = 2"), settings.replace("8", "16")]
    for read, whole in (("CFG.batch", False), ("CFG.size()", True), ("len(vars(CFG))", True)):
        mine, chips, batch = (told(f"{code}def score(p): return p * {read}") for code in changes)
        assert mine != batch and (mine == chips) == (not whole)


def test_the_attribute_that_differs_is_named():
    def parts(**changed):
        args = argparse.Namespace(**{"batch": 8, "chips": 1, **changed})
        return key_of("evaluation", script(HANDED["as a text"], args=args))

    mine, other = parts(), parts(chips=2)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == ["evaluation", "evaluation.args.chips"]


def test_versions_of_libraries_count(monkeypatch):
    before = [told("def score(p): return np.mean(p)", np=np), described(np.mean)]
    monkeypatch.setattr(np, "__version__", "0.1")
    after = [told("def score(p): return np.mean(p)", np=np), described(np.mean)]
    assert before[0] != after[0] and before[1] != after[1]


class Weighted(Trainer):
    def __init__(self, *args, class_weights=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.class_weights = class_weights


@dataclass
class Factored(TrainingArguments):
    loss_factor: float = 1.0


def test_what_a_subclass_adds_to_a_library_s_class(tmp_path):
    options = {"report_to": [], "use_cpu": True}
    plain, more = TrainingArguments(str(tmp_path), **options), Factored(str(tmp_path), loss_factor=2.0, **options)
    trainer = Weighted(torch.nn.Linear(2, 2), plain, class_weights=[1, 2])
    assert added_attributes(trainer, "transformers", runs=True) == {"class_weights": [1, 2]}
    assert added_attributes(plain, "transformers") == {} and added_attributes(more, "transformers") == {
        "loss_factor": 2.0
    }
    trainer.compute_loss = len
    assert added_attributes(trainer, "transformers", runs=True) == {"class_weights": [1, 2], "compute_loss": len}


def test_of_arguments_that_a_library_reads_all_count():
    args = [argparse.Namespace(batch=8, chips=chips) for chips in (1, 2)]
    mine, other = (described(collections.deque([each])) for each in args)  # as an object of any library
    assert mine == described(collections.deque([argparse.Namespace(batch=8, chips=1)])) != other


TAKEN = {
    "an attribute": ("def score(p): return p * args.seed", ["seed"]),
    "whole": ("def score(p, f=len): return p * f(args)", ["seed", "bf16", "generation_max_length", "factor"]),
    "bound": (
        "import functools\ndef inner(args, p): return p\nscore = functools.partial(inner, args)",
        ["seed", "bf16", "generation_max_length", "factor"],
    ),
}


@pytest.mark.parametrize("way", TAKEN)
def test_of_a_trainer_s_arguments_those_count_that_evaluations_depend_on(tmp_path, way):
    @dataclass
    class Arguments(Seq2SeqTrainingArguments):
        factor: float = 1.0

    def made(**changed):
        return told(TAKEN[way][0], args=Arguments(str(tmp_path), report_to=[], use_cpu=True, **changed))

    changes = {"seed": 9, "bf16": True, "generation_max_length": 7, "factor": 2.0, "learning_rate": 0.1}
    assert [name for name, value in changes.items() if made(**{name: value}) != made()] == TAKEN[way][1]


def test_a_compiled_function_is_the_one_that_it_was_made_of():
    """Whatever the compiler's settings are, some of which name the working directory."""
    code = "import torch\ndef inner(p): return p + 1\nscore = torch.compile(inner)"
    assert told(code) == told(code.replace("inner)", "inner, mode='max-autotune')")) != told(code.replace("1", "2"))


READ_ANY = {
    "getattr(args, 'batch', 'none')": False,
    "getattr(args, name, 'none')": True,
    "getattr(args, name, '')": True,
    "getattr(args, 'chips' if p else name)": True,
    "getattr(args, name if p else 'chips')": True,
    "getattr(args, '{}'.format(name))": True,
    "getattr(args, name.removesuffix('_'))": True,
    "getattr(args, 'batch', args.batch)": False,
    "getattr(getattr(holder, 'inner'), name)": True,
    "getattr(args, name, {'chips': 1}['chips'])": True,
    "operator.attrgetter(*('batch', 'out'))(args)": True,
    "vars(args)": True,
    "args.vars()": False,
    "args.__dict__": True,
    "eval(name)": True,
    "p.eval()": False,
}


@pytest.mark.parametrize("read", READ_ANY)
def test_code_may_read_any_attribute_unless_it_says_which(read):
    assert reads_any(compile(f"def score(p): return {read}", "script", "exec")) == READ_ANY[read]


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        ("return self.args.a", False),
        ("args = self.args\n  return args.a + args.b", False),
        ("args = self.args\n  self.args.count = 1\n  args.b = 2", False),
        ("args = self.args\n  return args.a, args", True),
        ("return helper(self.args)", True),
        ("return lambda: vars(self.args)", True),
    ],
)
def test_what_code_takes_whole(body, whole):
    space: dict = {}
    exec(f"def score(self):\n  {body}", space)
    assert ("args" in taken_whole(space["score"].__code__)) == whole


def test_a_pattern_may_read_any_attribute():
    code = "def score(p):\n  match p:\n    case Own(batch): return batch\n"
    assert reads_any(compile(code, "script", "exec"))


def test_a_module_that_a_script_has_set_more_in(tmp_path, monkeypatch):
    (tmp_path / "my_settings.py").write_text(
        "import time\nHALF = 1 / 2\nA, B = 1, (2, 3)\nMADE = dict(a=1)\nNOW = time.time()\n"
        "class CFG:\n    split = 'a'\n    size = 4 * 4\n    def half(self): return HALF\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("my_settings")
    monkeypatch.setitem(sys.modules, "my_settings", module)
    assert set_since("my_settings") == {}
    module.HALF, module.B, module.CFG.split, module.NEW, module.NOW = 0.7, (2, 4), "b", 5, 0.0
    assert set_since("my_settings") == {"HALF": 0.7, "B": (2, 4), "CFG.split": "b", "NEW": 5}
    score = "def score(p):\n  from my_settings import CFG\n  return CFG.split"
    before = told(score)
    module.CFG.split = "c"
    assert told(score) != before


def test_long_lists_of_numbers_count_by_each_and_by_its_type():
    lists = [[1] * 20, [1] * 19 + [2], [1.0] * 20, [True] * 20, tuple([1] * 20), [1] * 21, [[1] * 20]]
    assert len({described(each) for each in lists}) == len(lists)
    assert described([1] * 20) == described([1] * 20)


def test_sets_of_classes_that_name_one_another_are_the_same_in_any_order():
    code = "class K:\n  def f(self): return L\nclass L:\n  def f(self): return K\n"
    found = set()
    for items in ("K, L", "L, K"):
        for padding in range(8):  # other ids, and so another order
            keep = [object() for _ in range(padding * 37)]
            found.add(told(f"{code}T = {{{items}}}\ndef score(p): return T", keep=keep))
    assert len(found) == 1


def test_what_lies_too_deep_says_so():
    code = "".join(f"class K{i}:\n  def f(self): return K{i + 1}\n" for i in range(400)) + "class K400: pass\n"
    with pytest.raises(ValueError, match="lie too deep in one another"):
        told(code + "def score(p): return K0")


def test_a_file_beside_a_script_counts_by_what_is_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = set()
    for content in ("1", "2"):
        (tmp_path / "probe.safetensors").write_text(content)
        found.add(told("def score(p): return open('probe.safetensors').read()"))
    assert len(found) == 2
