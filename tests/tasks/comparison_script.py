"""Two processes compare, go on, and are refused; ``evaluate`` holds a device, which is another in each.

python -m torch.distributed.run --nproc_per_node 2 -m tests.tasks.comparison_script FOLDER OUT
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from hf_reram.evaluation import robustness
from hf_reram.evaluation.content import part_of
from hf_reram.tasks import comparison as room
from tests.samples.processes import save_all_and_leave
from tests.tasks.test_comparison import CONTROL, METHODS, NAIVE, Comparison


def main(folder: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    device, runs, written = torch.device("cuda", dist.get_rank()), [], set()
    write, measure = room.write_whole, robustness._measure

    def noted(path, text) -> None:
        written.add(Path(path).name)
        write(path, text)

    def counted(*args):  # not in evaluate, of which all that it holds counts
        runs.append(args[2])
        return measure(*args)

    room.write_whole, robustness._measure = noted, counted
    comparison = Comparison(Path(folder))
    perplexity = comparison.evaluate()

    def evaluate(model) -> dict[str, float]:
        return perplexity(model) if device.type == "cuda" else {}

    comparison.evaluate = lambda: evaluate
    compared = {"methods": (NAIVE, CONTROL, METHODS[3]), "chips": 2}
    reports = [comparison.run(**compared)]
    before = len(runs)
    reports.append(comparison.run(**compared))
    found = {"keys": part_of("evaluation", evaluate), "again": len(runs) - before, "written": written}
    pairs = zip(*(run.values() for run in reports), strict=True)
    found["reports"] = [[report.to_dict() for report in pair] for pair in pairs]
    try:
        comparison.run(**compared, settings={"steps": 2})
    except (ValueError, RuntimeError) as error:
        found["refused"] = str(error)
    save_all_and_leave(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
