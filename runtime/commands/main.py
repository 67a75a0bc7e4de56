"""The command `turbochain`: generate, serve, mcp, verify, inspect, bench, export-web, adapter."""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from turbochain.runtime.bundle.manifest import Check
from turbochain.runtime.bundle.opened import Bundle
from turbochain.runtime.checks import verify
from turbochain.runtime.commands import adapter, bench, console, generate, profile, web
from turbochain.runtime.commands.inspect import as_json, as_text
from turbochain.runtime.errors import InputError
from turbochain.runtime.serve import command as serve
from turbochain.runtime.serve import mcp


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command; returns the exit status (see console.run)."""
    parser = _Parser("turbochain", description="Run a bundle of compiled engines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    drawing = _command(commands, "generate", _generate, "make a picture", default="that of the other options")
    generate.add_arguments(drawing)

    server = commands.add_parser("serve", help="answer over HTTP and WebSocket", description=SERVE)
    server.set_defaults(command=serve.serve)
    console.add_debug(server)
    serve.add_arguments(server)

    protocol = _command(commands, "mcp", mcp.mcp, MCP, machine=False)
    mcp.add_arguments(protocol)

    check = _command(
        commands, "verify", _verify, "compare with what diffusers produced; exit status 1 if it differs", default="all"
    )
    adapter.add_lora(
        check,
        "compare the calls that were recorded with this LoRA (weight: default 1), or with all that are given together",
    )
    check.add_argument("--json", action="store_true")

    inspect = _command(commands, "inspect", _inspect, "show what a bundle holds", machine=False)
    inspect.add_argument("--json", action="store_true")

    timing = _command(commands, "bench", _bench, "time every stage and the whole chain")
    timing.add_argument("--runs", type=int, default=10, help="counted runs (default 10)")
    timing.add_argument("--warmup", type=int, default=2, help="runs before those (default 2)")
    timing.add_argument("--steps", type=int, help="step count (default: the fewest that the bundle has)")
    timing.add_argument("--strength", type=float, help="of a chain that starts from an image (default: the bundle's)")
    timing.add_argument("--controlnet", metavar="NAME", help="with this ControlNet or T2I-Adapter (default: none)")
    timing.add_argument("--profile", action="store_true", help="also the slowest operators of each stage (on a CPU)")
    timing.add_argument("--json", action="store_true")

    site = _command(commands, "export-web", web.export, web.HELP, machine=False)
    web.add_arguments(site)

    adapter.add_command(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    return console.run(parser, lambda arguments: arguments.command(arguments), _prompt_last(words))


SERVE = "Answer over HTTP (OpenAI's and A1111's image APIs) and WebSocket, with a page at /."
MCP = "draw for a language model: a server of the Model Context Protocol on stdin and stdout"
DASH = f"a prompt that begins with '-' is given as {generate.PROMPT} TEXT"
NEGATIVE_DASH = f"a text that begins with '-' is given as {generate.NEGATIVE_PROMPT}=TEXT"


class _Parser(argparse.ArgumentParser):
    """A parser that takes an unknown option for what it may be: the prompt."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as the base class does; if a prompt is expected, an unknown option is an error here."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown and "prompt" in found:
            self.error(f"unrecognized arguments: {' '.join(unknown)} ({DASH})")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End as the base class does; a prompt that is missing may have been taken for an option."""
        if message.endswith(" PROMPT"):
            message += f" ({DASH})"
        elif message.startswith(f"argument {generate.NEGATIVE_PROMPT}:"):
            message += f" ({NEGATIVE_DASH})"
        super().error(message)


def _prompt_last(words: list[str]) -> list[str]:
    """Move the text of `--prompt` to the end, as the positional argument that it stands for."""
    end = words.index("--") if "--" in words else len(words)
    for at, word in enumerate(words[:end]):
        if word.startswith(f"{generate.PROMPT}="):
            text, after = word.removeprefix(f"{generate.PROMPT}="), at + 1
        elif word == generate.PROMPT and at + 1 < len(words):
            text, after = words[at + 1], at + 2
        else:
            continue
        rest = [*words[:at], *words[after:]]
        return [*rest, *([] if "--" in rest else ["--"]), text]
    return words


def _command(
    commands: Any, name: str, function: console.Command, text: str, *, machine: bool = True, default: str = "the first"
) -> Any:
    """Add a command; `machine`: whether it runs an engine, `default`: the chain that it then takes."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function)
    console.add_debug(parser)
    parser.add_argument("bundle", help="a folder, or a bundle on the hub as OWNER/NAME or OWNER/NAME@REVISION")
    parser.add_argument(
        "--trust-engines", action="store_true", help="use the engines of a bundle from the hub: they may be code"
    )
    if machine:
        parser.add_argument("--backend", help="default: the best engine in the bundle that fits this machine")
        parser.add_argument("--device", help="default: the backend's own choice")
        parser.add_argument("--chain", help=f"a chain of the bundle (default: {default})")
        parser.add_argument("--engine", help="the engine with this folder name")
        parser.add_argument(
            "--engines", help="folder of the engines (default: the bundle's engines/, the user's cache)"
        )
        parser.add_argument("--threads", type=int, help="CPU threads per launch (default: the backend's own choice)")
    return parser


MACHINE = ("chain", "backend", "device", "engine", "engines", "threads", "trust_engines")


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in MACHINE}


def _generate(arguments: argparse.Namespace) -> None:
    generate.generate(arguments, _machine(arguments))


def _verify(arguments: argparse.Namespace) -> None:
    loras = adapter.chosen(arguments.lora)
    name, checks = verify.verify_bundle(arguments.bundle, lora=loras, **_machine(arguments))
    every = [check for of_chain in checks.values() for check in of_chain]
    if arguments.json:
        plain = {chain: [dataclasses.asdict(c) for c in of_chain] for chain, of_chain in checks.items()}
        for check in (check for of_chain in plain.values() for check in of_chain):
            check["value"] = check["value"] if math.isfinite(check["value"]) else None  # JSON has no NaN
        values = {"engine": name, "passed": all(c.passed for c in every), "checks": plain}
        if not all(checks.values()):
            values["note"] = NOT_COMPARED
        print(json.dumps(values, indent=2))
    else:
        print("\n\n".join(f"chain {chain}\n{checks_text(of_chain)}" for chain, of_chain in checks.items()))
    verify.require(every)


NOT_COMPARED = (
    "not compared with diffusers: no call with these LoRA files and weights was recorded; build the bundle again with "
    "--reference-lora FILE:WEIGHT"
)


def checks_text(checks: Sequence[Check]) -> str:
    """Return the figures of a verification as text, or that there are none."""
    return checks_table(checks) if checks else NOT_COMPARED


def checks_table(checks: Sequence[Check]) -> str:
    """Return the figures of a verification as text."""
    rows = [["stage", "metric", "value", "bound", ""]]
    for c in checks:
        rows.append([c.stage, c.metric, verify.value_text(c), verify.bound_text(c), "ok" if c.passed else "FAILED"])
    return console.table(rows)


def _inspect(arguments: argparse.Namespace) -> None:
    bundle = Bundle.open(arguments.bundle, trust_engines=arguments.trust_engines)
    print(json.dumps(as_json(bundle), indent=2) if arguments.json else as_text(bundle))


def _bench(arguments: argparse.Namespace) -> None:
    for name, least in (("runs", 1), ("warmup", 0)):
        if (given := getattr(arguments, name)) < least:
            raise InputError(f"--{name} {given}: at least {least} was expected; give a larger number")
    call = {"steps": arguments.steps, "strength": arguments.strength, **_machine(arguments)}
    more = {"runs": arguments.runs, "warmup": arguments.warmup, "controlnet": arguments.controlnet}
    result = bench.bench(arguments.bundle, **more, **call)
    operators = {}
    if arguments.profile:
        operators = profile.profile(arguments.bundle, **call)
    if arguments.json:
        profiled = {graph: [dataclasses.asdict(o) for o in of] for graph, of in operators.items()}
        print(json.dumps({**result.to_json(), **({"profile": profiled} if profiled else {})}, indent=2))
    else:
        print(bench_text(result), *([profile.as_text(operators)] if operators else []), sep="\n\n")


def bench_text(result: bench.BenchResult) -> str:
    """Return a bench as text."""
    cached = "  text encoders skipped" if result.stream else "  encoders skipped"
    timings = {**result.stages, "end to end": result.end_to_end, cached: result.end_to_end_cached}
    timings["  overhead"] = result.overhead
    rows = [["", "p50 ms", "p90 ms", "p99 ms", "min ms", "n"]]
    for name, t in timings.items():
        rows.append([name, *(f"{v:.2f}" for v in (t.p50_ms, t.p90_ms, t.p99_ms, t.min_ms)), str(t.n)])
    height, width = result.size
    more = [
        "" if result.evaluations == result.steps else f"{result.evaluations} evaluation(s)",
        "" if result.controlnet is None else f"with {result.controlnet}",
        "" if result.strength is None else f"strength {result.strength:g}",
        f"one of each of {result.stream} frames in a call" if result.stream else "",
        f"guidance scale {result.guidance_scale:g}" if result.guidance_scale > 1 else "",
    ]
    call = ", ".join([f"{result.steps} step(s)", *filter(None, more)])
    return "\n".join(
        [
            f"{result.engine}: {result.chain}, {width}x{height}, batch {result.batch}, {call}",
            console.table(rows),
            f"load {result.load_ms:.0f} ms; first picture after it {result.first_image_ms:.0f} ms",
            result.includes,
            "overhead: end to end less what the device worked",
            *([f"not one CUDA graph: {result.uncaptured}"] if result.uncaptured else []),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
