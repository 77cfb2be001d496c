"""Ray's no-op tasks, for the side-by-side of `jobs`: prints one JSON object.

Rate with 5,000 in flight, latency one at a time, and CPU of the whole machine a task, each after a warm-up.
"""

import json
import os
import sys
import time

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import ray


def cpu_seconds():
    """Busy time of the whole machine: user, nice, system, irq, softirq."""
    with open("/proc/stat") as stat:
        fields = [int(x) for x in stat.readline().split()[1:]]
    return (fields[0] + fields[1] + fields[2] + fields[5] + fields[6]) / os.sysconf("SC_CLK_TCK")


def main(rounds, batch, singles):
    ray.init(num_cpus=os.cpu_count(), include_dashboard=False, logging_level="ERROR", log_to_driver=False)

    @ray.remote
    def noop(x):
        return x

    ray.get([noop.remote(i) for i in range(2000)])
    rates, cpus = [], []
    for _ in range(rounds):
        cpu, start = cpu_seconds(), time.perf_counter()
        ray.get([noop.remote(i) for i in range(batch)])
        rates.append(batch / (time.perf_counter() - start))
        cpus.append((cpu_seconds() - cpu) / batch * 1e6)
    waits = []
    for i in range(singles):
        start = time.perf_counter()
        ray.get(noop.remote(i))
        waits.append(time.perf_counter() - start)
    print(json.dumps({"per_second": rates, "cpu_us": cpus, "ms": [wait * 1e3 for wait in waits]}))


if __name__ == "__main__":
    main(*(int(x) for x in sys.argv[1:4]))
