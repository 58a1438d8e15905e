"""
Compare FineTuneLLM's whole stack (HTTP, edge, NATS, inference and back) with llama-server alone:
same model, same sampler chain, two threads. bench/results/README.md describes the loads.

    just bench 135M Q8_0 --loads burst,turns --peer http://localhost:8080
"""

from services.runtime.huge_pages import ON, TUNABLES, use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # for loads that compute in this process; before slow imports

import argparse
import os
from pathlib import Path

from bench import (
    arrivals,
    attacks,
    burst,
    edge,
    failover,
    fleet,
    floor,
    gaps,
    history,
    history_turns,
    hybrid,
    memory,
    overload,
    prefix,
    report,
    restart,
    rotation,
    routing,
    share,
    streams,
    turns,
    window,
)
from bench.models import SHAPES, TYPES, make
from bench.pairs import Plan, show

LOADS = {
    "burst": burst.run,
    "idle": burst.run_idle,
    "prefix": prefix.run,
    "turns": turns.run,
    "arrivals": arrivals.run,
    "window": window.run,
    "hybrid": hybrid.run,
    "floor": floor.run,
    "gaps": gaps.run,
    "rotation": rotation.run,
    "share": share.run,
    "streams": streams.run,
    "memory": memory.run,
    "history": history.run,
    "history-turns": history_turns.run,
    "history-sessions": history_turns.run_sessions,
    "failover": failover.run,
    "restart": restart.run,
    "overload": overload.run,
    "routing": routing.run,
    "edge": edge.run,
    "edge-steps": edge.run_steps,
    "first-token": edge.run_first_token,
    "attacks": attacks.run,
    "fleet": fleet.run,
    "cluster": fleet.run_cluster,
}


def main() -> None:
    # not for the processes that loads start: workers ask for huge pages themselves
    os.environ[TUNABLES] = os.environ.get(TUNABLES, "").removesuffix(ON).rstrip(":")
    options = _options()
    model = options.gguf or make(options.size, options.kind)
    plan = Plan(model, options.pairs, tuple(options.peer), options.workers)
    for load in options.loads:
        show(f"{load}, {plan.model.stem}")
        section = LOADS[load](plan)
        print(report.format_table(section), flush=True)
        show(f"results written to {report.write_section(section, options.into)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare FineTuneLLM with llama-server.")
    parser.add_argument("size", choices=SHAPES, nargs="?", default="135M")
    parser.add_argument("kind", choices=TYPES, nargs="?", default="Q8_0")
    parser.add_argument(
        "--loads", type=_loads, default=list(LOADS), help=f"comma-separated, of: {', '.join(LOADS)}"
    )
    parser.add_argument("--gguf", type=Path, help="a model to use instead of a synthetic one")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs per load")
    parser.add_argument("--into", type=Path, default=report.RESULTS, help="folder of the tables")
    parser.add_argument("--peer", action="append", default=[], help="URL of a server to add")
    parser.add_argument(
        "--workers", type=int, default=1, help="our workers where llama-server is compared"
    )
    return parser.parse_args()


def _loads(text: str) -> list[str]:
    loads = text.split(",")
    if unknown := set(loads) - set(LOADS):
        raise argparse.ArgumentTypeError(
            f"unknown loads {', '.join(unknown)}: choose from {', '.join(LOADS)}"
        )
    return loads


if __name__ == "__main__":
    main()
