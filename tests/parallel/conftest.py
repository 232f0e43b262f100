"""in_ranks   call a function of a test's file in P processes that are one group"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# One interpreter imports torch and the test's file, and forks: a rank begins within milliseconds and not seconds.
RANKS = """
    import gc
    import importlib.util
    import json
    import multiprocessing
    import os
    import sys
    import traceback
    from datetime import timedelta
    from pathlib import Path

    import torch
    import torch.distributed as dist

    file, name, folder, given = sys.argv[1:]
    sizes, arguments, dying, timeout = json.loads(given)
    spec = importlib.util.spec_from_file_location("of_the_test", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["of_the_test"] = module
    spec.loader.exec_module(module)


    def work(rank, size):
        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder, f"store{size}")), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        try:
            said = getattr(module, name)(rank, size, *arguments)
            Path(folder, f"{size}_{rank}.json").write_text(json.dumps(said))
            gc.collect()  # graphs hold the group: its threads end with the last of them, and not as Python does
            if dist.is_initialized() and not dying:  # a group that has lost a rank cannot meet again
                dist.barrier()
                dist.destroy_process_group()
            if dying:
                os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        for size in sizes:
            processes = [context.Process(target=work, args=(rank, size)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0 and rank not in dying]
            if failed:
                sys.exit(f"of {size} ranks these failed: {failed}")
"""


@pytest.fixture(scope="session")
def in_ranks(in_a_process_of_its_own, tmp_path_factory) -> Callable[..., dict[int, list[Any]]]:
    """A function: call `function(rank, P, *arguments)` in P forked processes of one gloo group, for each P of `sizes`.

    in_ranks(function, *arguments, sizes=(1, 2, 3, 4), timeout=60)[P][rank] is what it returned there, as JSON keeps it.
    The function stands at the top of the test's file, whose other imports should be few. A rank that raises fails the
    test with its traceback; the group's own waits end after a third of the timeout, in seconds. Ranks in `dying` may
    end as they like, and give None.
    """

    def run(function, *arguments, sizes=(1, 2, 3, 4), dying=(), timeout=60.0):
        folder = tmp_path_factory.mktemp("ranks")
        given = json.dumps([list(sizes), list(arguments), list(dying), timeout / 3])
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        file = sys.modules[function.__module__].__file__
        in_a_process_of_its_own(RANKS, file, function.__name__, folder, given, timeout=timeout, env=env)
        said: dict[int, list[Any]] = {size: [] for size in sizes}
        for size in sizes:
            for rank in range(size):
                kept = Path(folder, f"{size}_{rank}.json")
                said[size].append(json.loads(kept.read_text()) if rank not in dying else None)
        return said

    return run
