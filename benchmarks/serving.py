"""Our server under load: against request batching, bare network calls and queueing theory.

    python -m benchmarks.serving [--rounds 3] [--seconds 10] [--models digits mnist]
                                 [--parts arrivals waits overhead leaving preview]
    python -m benchmarks.serving --parts overload ray   (each on a Ray of its own)

Models have the sizes of conf/train/digits.yaml and mnist.yaml, random weights and no classes, draw
by DDIM with eta 0, and compute in one thread. Requests come at the times of a Poisson process,
whatever has ended (open loop); each has 5, 20 or 50 steps and 1 or 2 images, all equally often. In
a round the contestants get the same requests in turn, each a new engine or queue with the same
model and width, 8 images. A row has the median of the rounds, with the least and the greatest.

`arrivals`: saturation is the rate at which requests end that are all there from the beginning.
Then requests arrive at 0.8 of the saturation of a peer, and the latencies of ours and its are
compared, from the time of the arrival to the image. Peers are `batch`, the rule of Ray Serve's
@serve.batch (contestants.py) with its default wait of 10 ms, and one request at a time. `largest
steps` is a batch function with one sampling loop for all requests: those of 5 steps get 50 if one
in the batch has 50. `equal steps` draws the groups of equal steps of a batch one after the other,
which wastes no step and has smaller network calls. Goals are ratios to the first.
`waits`: jobs of one call of a network that sleeps for 50 ms, at width 1, with the arrivals of that
of 64 seeds whose exact M/D/1 waits are nearest to their mean; S is measured in the same jobs.
`overhead`: 8 jobs of one image against as many calls of the bare network with 8 rows.
`leaving`: 30 % of the clients leave at a random time; steps that are computed for them afterwards.
`preview`: network calls that begin between the submission and the first preview of a request, at
0.8 of our saturation.
`overload`: the job serve, over HTTP: 10 x its saturation, for --seconds, after 1.2 x (full load).
Its queue takes 5 s of work, and is full after 25 s at 1.2 x: give --seconds 30.
`ray`: our server and a deployment with @serve.batch, on one local Ray, over HTTP.
"""

import argparse
from collections.abc import Callable, Iterable

import torch

from benchmarks.serving_load.arrivals_part import arrivals_rows
from benchmarks.serving_load.leaving_part import leaving_rows, preview_rows
from benchmarks.serving_load.models import SHAPES
from benchmarks.serving_load.overhead_part import overhead_rows
from benchmarks.serving_load.overload_part import overload_rows
from benchmarks.serving_load.table import Row, heading
from benchmarks.serving_load.waits_part import waits_rows


def ray_rows(model: str, rounds: int, seconds: float) -> Iterable[Row]:
    """See ray_part.py; Ray takes seconds to import."""
    from benchmarks.serving_load import ray_part

    return ray_part.ray_rows(model, rounds, seconds)


PARTS: dict[str, Callable[[str, int, float], Iterable[Row]]] = {
    "arrivals": arrivals_rows,
    "waits": lambda _, rounds, seconds: waits_rows(rounds, seconds),
    "overhead": lambda model, rounds, _: overhead_rows(model, rounds),
    "leaving": leaving_rows,
    "preview": preview_rows,
    "overload": overload_rows,
    "ray": ray_rows,
}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = [name for name in PARTS if name not in ("overload", "ray")]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of arrivals, each contestant's")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(given)
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts:
        for model in ["sleeping"] if part == "waits" else arguments.models:
            print(heading(f"{part}, {model}"), flush=True)
            for row in PARTS[part](model, arguments.rounds, arguments.seconds):
                print(row.text(), flush=True)


if __name__ == "__main__":
    main()
