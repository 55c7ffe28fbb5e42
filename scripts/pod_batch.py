"""`jdet run-batch` over the hosts of a TPU pod or a GPU cluster: the same bytes as on one device.

    python scripts/pod_batch.py -i /shared/in.jsonl -o /shared/out.jsonl     # on every host

One process a host, joined by `jax.distributed`, and an engine on each of its devices. Each device
takes every n-th line and writes a part beside the output; the first process merges them in input
order and removes them. A result depends on its line and the model alone, so the number of hosts and
devices changes no byte. Killed, on one host or all, it goes on where it ended once it is started
again on all of them, as many as before.

All hosts see the input and the output's folder under the same path. On TPU pods, under Slurm and
Open MPI jax finds the hosts by itself; elsewhere every process is told:
`--coordinator HOST:PORT --hosts 2 --host 0` (and `--host 1` on the other). No TPU has run it yet.
"""

import argparse
import concurrent.futures
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import jax

from jdet.batch.options import BatchOptions, add_arguments, options_of
from jdet.batch.parts import check_parts, merge, part, wait_for
from jdet.batch.runner import BatchRunner


def work(options: BatchOptions, source: Path, target: Path, device: Any) -> BatchRunner:
    """Write the part of one device; returns its runner."""
    devices = jax.devices()
    worker, workers = devices.index(device), len(devices)
    with jax.default_device(device):
        runner = options.runner()
        # One bar a host.
        progress = None if device == jax.local_devices()[0] else False
        shard = (worker, workers)
        runner.run(source, part(target, worker, workers), shard=shard, progress=progress)
    return runner


def run(options: BatchOptions, source: Path, target: Path) -> str:
    """Compute this process's parts and, in the first process, merge all; what it did.

    Raises:
      ValueError: the output or a part of it is of other lines, another model or another number
        of devices.
    """
    local, workers = jax.local_devices(), jax.device_count()
    parts = [part(target, i, workers) for i in range(workers)]
    first = jax.process_index() == 0
    if not target.exists():
        check_parts(target, workers)
        # Never waited for as a whole: what fails ends the process at once.
        pool = concurrent.futures.ThreadPoolExecutor(len(local))
        runners = [pool.submit(work, options, source, target, device) for device in local]
        for finished in concurrent.futures.as_completed(runners):
            finished.result()
        if first:
            wait_for(parts)
            # Other hosts' parts: of the same lines, model and contract, or refused.
            for i, path in enumerate(parts):
                runners[0].result().run(source, path, shard=(i, workers), progress=False)
            merge(parts, target)
    elif first:
        # Complete: it is only checked.
        options.runner().run(source, target, progress=False)
    if not first:
        return f"host {jax.process_index()}: done"
    for path in parts:
        path.unlink(missing_ok=True)
    hosts = jax.process_count()
    return f"{target}: complete, {workers} devices of {hosts} {'hosts' if hosts > 1 else 'host'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="jdet run-batch over hosts that jax joins.")
    add_arguments(parser)
    parser.add_argument("--coordinator", help="HOST:PORT of the first process")
    parser.add_argument("--hosts", type=int, help="how many processes there are")
    parser.add_argument("--host", type=int, help="which of them this is, from 0")
    args = parser.parse_args()
    options = options_of(parser, args)
    told = (args.coordinator, args.hosts, args.host)
    if None in told and any(value is not None for value in told):
        parser.error("--coordinator, --hosts and --host go together")
    jax.distributed.initialize(
        coordinator_address=args.coordinator, num_processes=args.hosts, process_id=args.host
    )
    try:
        message = run(options, args.input, args.output)
    except BaseException as error:
        if not isinstance(error, ValueError | OSError | NotImplementedError):
            traceback.print_exc()
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        # Not by sys.exit, which would wait for the other hosts: they end when this one is missed.
        os._exit(2)
    print(message, file=sys.stderr)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
