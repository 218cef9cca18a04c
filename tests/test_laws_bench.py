"""Sweeps of tiny runs side by side: in processes, and through Ray where it is installed."""

import json
import subprocess
import sys
import types

import pytest

from pennyweight.errors import MissingExtraError, OptionError
from pennyweight.laws import bench

RUNS = bench.grid(bench.Run(steps=3, batch=2, held_out=8, warmup=1, depth=1), width=(4, 8), seed=(0, 1))

#: Run apart: Ray leaves threads and processes behind for a moment, and warns of this and that.
SCRIPT = """
import json, sys
import ray
from pennyweight.laws import bench
runs = bench.grid(bench.Run(steps=3, batch=2, held_out=8, warmup=1, depth=1), width=(4, 8), seed=(0, 1))
begun = []
start = ray.init
ray.init = lambda **options: begun.append(options["num_cpus"]) or start(**options)
first = bench.sweep(runs, cache=sys.argv[1], workers=2)  # Ray by itself, for it is installed
assert begun == [2] and not ray.is_initialized(), begun  # and stopped again
start(num_cpus=1, include_dashboard=False, log_to_driver=False)
second = bench.sweep(runs)  # the cluster one has joined
assert len(begun) == 1 and ray.is_initialized()
ray.shutdown()
assert first == second
print(json.dumps([bench.plain(record) for record in first]))
"""


def test_ray_gives_what_one_process_gives(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads(json.dumps([bench.plain(record) for record in bench.sweep(RUNS, workers=1)]))
    assert len(list(tmp_path.glob("run-*.json"))) == len(RUNS)


def test_processes_give_what_one_process_gives():
    assert bench.sweep(RUNS[:2], workers=2, through="processes") == bench.sweep(RUNS[:2], workers=1)


class Cluster(types.ModuleType):
    """What `bench` asks of Ray, done on the spot; remembers how it was asked."""

    def __init__(self, joined):
        super().__init__("ray")
        self.joined, self.most, self.waiting, self.calls = joined, 0, 0, []

    def is_initialized(self):
        return self.joined

    def init(self, **options):
        self.joined = True
        self.calls.append(("init", options["num_cpus"], options["include_dashboard"]))

    def shutdown(self):
        self.joined = False
        self.calls.append("shutdown")

    def remote(self, *, num_cpus):
        assert num_cpus == 1

        def submit(run):
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            return lambda: bench.train(run)

        return lambda function: types.SimpleNamespace(remote=submit)

    def wait(self, waiting):
        self.waiting -= 1
        return waiting[-1:], waiting[:-1]  # the last comes first

    def get(self, ready):
        return [one() for one in ready]


@pytest.mark.parametrize("joined", [False, True])
def test_runs_are_handed_out_as_workers_come_free(monkeypatch, joined):
    ray = Cluster(joined)
    monkeypatch.setitem(sys.modules, "ray", ray)
    plain = bench.sweep(RUNS, workers=1, through="processes")
    assert ray.calls == []
    assert bench.sweep(RUNS, workers=3) == plain
    assert ray.most == 3
    assert ray.calls == ([] if joined else [("init", 3, False), "shutdown"])
    assert ray.joined == joined


def test_a_sweep_that_fails_stops_the_ray_it_started(monkeypatch):
    ray = Cluster(joined=False)
    ray.get = lambda ready: (_ for _ in ()).throw(MemoryError)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(MemoryError):
        bench.sweep(RUNS, workers=2)
    assert ray.calls[-1] == "shutdown"


def test_ways_that_there_are_not(monkeypatch):
    with pytest.raises(OptionError, match="through = 'threads'; give ray, processes or None"):
        bench.sweep(RUNS, through="threads")
    with pytest.raises(OptionError, match="workers = 0; give 1 or more"):
        bench.sweep(RUNS, workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=r"pip install 'pennyweight\[ray\]'"):
        bench.sweep(RUNS, through="ray")
