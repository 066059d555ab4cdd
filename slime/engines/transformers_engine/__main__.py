# ruff: noqa: T201 (a command line prints)
"""Command line of the transformers engine: settings, parts put together, serving until a signal."""

import argparse
import asyncio
import ipaddress
import logging
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from aiohttp import web

from slime.engines.sglang_serve import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE
from slime.engines.transformers_engine.answers import AnswerWriter
from slime.engines.transformers_engine.batcher import Batcher
from slime.engines.transformers_engine.control import Control
from slime.engines.transformers_engine.generation import Generator, Limits
from slime.engines.transformers_engine.images import ImageLoader
from slime.engines.transformers_engine.info import ServerInfo
from slime.engines.transformers_engine.memory import Memory
from slime.engines.transformers_engine.model import EngineModel
from slime.engines.transformers_engine.prompt import VisionTokens
from slime.engines.transformers_engine.server import EngineServer, Keys
from slime.engines.transformers_engine.stepper import Stepper
from slime.engines.transformers_engine.stopping import StopChecker
from slime.engines.transformers_engine.update_routes import UpdateRoutes
from slime.engines.transformers_engine.weight_group import UpdateGroups
from slime.engines.transformers_engine.weight_updates import WeightUpdates
from slime.utils.processing_utils import load_processor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNLIMITED_TOKENS = 2**40
SHUTDOWN_SECONDS = 1.0
BACKLOG = 1024
KV_SHARE = 0.6
"""Share of a GPU's free memory that keys and values may take."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(prog="slime.engines.transformers_engine", description=__doc__)
    parser.add_argument("--model-path", required=True, help="folder of a Qwen3-VL or Qwen3 checkpoint")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--host", default="127.0.0.1", help="beyond loopback, SLIME_ENGINE_API_KEY must be set"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default=None, help="default: float32 on cpu, bfloat16 on cuda"
    )
    parser.add_argument("--served-model-name", default=None, help="default: the model path")
    parser.add_argument("--weight-version", default="default", help="name of the weights at the start")
    parser.add_argument(
        "--max-running-requests", type=int, default=256, help="most responses generated at once"
    )
    parser.add_argument(
        "--max-prefill-tokens", type=int, default=16384, help="tokens of one prefill, padding included"
    )
    parser.add_argument(
        "--max-total-tokens",
        type=int,
        default=None,
        help="most tokens of keys and values; default: no limit on cpu, what fits the memory on cuda",
    )
    parser.add_argument("--context-length", type=int, default=None, help="default: the checkpoint's")
    parser.add_argument(
        "--threads", type=int, default=None, help="torch's threads on cpu; default: OMP_NUM_THREADS"
    )
    parser.add_argument("--random-seed", type=int, default=0, help="seed of requests that bring none")
    parser.add_argument(
        "--deterministic", action="store_true", help="repeat bit for bit; see the package's docstring"
    )
    parser.add_argument("--log-level", default="warning", choices=("debug", "info", "warning", "error"))
    args = parser.parse_args(argv)
    for name in (
        "max_running_requests",
        "max_prefill_tokens",
        "max_total_tokens",
        "context_length",
        "threads",
    ):
        value = vars(args)[name]
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not is_loopback(args.host) and not os.environ.get("SLIME_ENGINE_API_KEY"):
        parser.error(
            f"--host {args.host} can be reached from other machines, and no key guards the engine: "
            "set SLIME_ENGINE_API_KEY, or use --host 127.0.0.1."
        )
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def vision_tokens(config: Any, tokenizer: Any) -> VisionTokens:
    """Collect what prompts are expanded with."""
    vocab_size = config.get_text_config().vocab_size
    if not hasattr(config, "vision_config"):
        return VisionTokens.of_text_model(vocab_size)
    start, pad, end = tokenizer.convert_ids_to_tokens(
        [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    )
    pattern = rf"{re.escape(start)}(?:{re.escape(pad)})+{re.escape(end)}|<image>"
    return VisionTokens(
        image_pad=config.image_token_id,
        video_pad=config.video_token_id,
        merge=config.vision_config.spatial_merge_size,
        vocab_size=vocab_size,
        image_text=f"{start}{pad}{end}",
        image_pattern=re.compile(pattern),
    )


def total_tokens(args: argparse.Namespace, model: EngineModel) -> int:
    """Return how many tokens of keys and values may be held."""
    if args.max_total_tokens is not None:
        return args.max_total_tokens
    if args.device == "cpu":
        return UNLIMITED_TOKENS
    free, _ = torch.cuda.mem_get_info()
    return int(free * KV_SHARE) // model.kv_bytes_per_token()


async def serve(args: argparse.Namespace) -> int:
    """Load the checkpoint, serve until a signal comes or the model thread dies; return the exit status."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, ended.set)

    def end_soon() -> None:
        loop.call_soon_threadsafe(ended.set)

    batcher, generator, app = build(args, end_soon)
    batcher.start()
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    await web.TCPSite(runner, args.host, args.port, backlog=BACKLOG).start()
    print(f"transformers engine serves {args.model_path} at http://{args.host}:{args.port}", flush=True)
    await ended.wait()
    failed = batcher.failed
    generator.abort(None)
    await runner.cleanup()
    batcher.stop()
    generator.close()
    return 1 if failed else 0


def build(
    args: argparse.Namespace, on_failure: Callable[[], None]
) -> tuple[Batcher, Generator, web.Application]:
    """Load the checkpoint and put the engine together; nothing runs yet."""
    model = EngineModel(args.model_path, DTYPES[args.dtype], torch.device(args.device))
    processor = load_processor(args.model_path)
    tokenizer = processor.tokenizer
    stops = StopChecker(tokenizer)
    stepper = Stepper(
        model,
        stops,
        max_running=args.max_running_requests,
        max_prefill_tokens=args.max_prefill_tokens,
        max_total_tokens=total_tokens(args, model),
        deterministic=args.deterministic,
    )
    batcher = Batcher(stepper, args.weight_version, on_failure)
    context = args.context_length or model.text_config.max_position_embeddings
    eos = model.eos_ids | ({tokenizer.eos_token_id} - {None})
    generator = Generator(
        batcher,
        tokenizer,
        ImageLoader(processor.image_processor),
        vision_tokens(model.config, tokenizer),
        AnswerWriter(stops, model.vocab_size),
        Limits(context_length=context, eos_ids=eos),
        args.random_seed,
    )
    memory = Memory(model, stepper)
    served_name = args.served_model_name or args.model_path
    control = Control(batcher, generator, memory, args.model_path, served_name)
    updates = WeightUpdates(batcher, control, memory, UpdateGroups(model.device))
    info = ServerInfo(
        tokenizer_path=args.model_path,
        sees=model.sees,
        model_type=model.config.model_type,
        architectures=list(model.config.architectures or ()),
        context_length=context,
        settings=vars(args),
    )
    keys = Keys(os.environ.get(API_KEY_VARIABLE), os.environ.get(ADMIN_KEY_VARIABLE))
    server = EngineServer(batcher, generator, control, UpdateRoutes(control, updates), info, keys)
    return batcher, generator, server.application()


def main() -> int:
    """Run the engine."""
    args = parse_args()
    # Without one anybody on this machine could replace the weights. Who is to control it sets the variable.
    os.environ.setdefault(ADMIN_KEY_VARIABLE, secrets.token_hex(16))
    logging.basicConfig(
        level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        return asyncio.run(serve(args))
    except (OSError, ValueError) as error:
        print(f"transformers engine: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # All is closed by now; taking torch's modules apart would add seconds to every stop.
    os._exit(status)
