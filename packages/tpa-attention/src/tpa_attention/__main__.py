"""`python -m tpa_attention`: sizes of caches, multiply-adds, conversion, generation, and what works here.

    python -m tpa_attention cache-size --preset medium --seq-len 32768
    python -m tpa_attention flops --layers 24 --d-model 2048 --heads 32 --head-dim 64 --q-rank 16 --kv-heads 4
    python -m tpa_attention convert LLAMA_DIR OUT_DIR --k-rank 4 --v-rank 4
    python -m tpa_attention generate MODEL_DIR --prompt "def main("
    python -m tpa_attention info

Wrong words or values end the process with status 2 and one line, a missing dependency with status 1 and what
to install. The first two need no framework.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

from . import accounting
from .comparison import CACHE_COLUMNS, FLOP_COLUMNS, Comparison
from .config import PRESET_MECHANISMS, PRESETS, ModelConfig, preset

OF_A_PRESET = ("mha", "mqa", "gqa", "mla_matched", "mla_paper", "kvonly", "tpa")
OF_SIZES = ("mha", "mqa", "gqa", "mla", "kvonly", "tpa")
# option -> field of ModelConfig
SIZES = {
    "layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "head_dim": "head_dim",
    "q_rank": "q_rank",
    "k_rank": "k_rank",
    "v_rank": "v_rank",
    "kv_heads": "num_key_value_heads",
    "kv_latent": "kv_latent",
    "q_latent": "q_latent",
    "rope_dim": "rope_dim",
}
REQUIRED = ("layers", "d_model", "heads", "head_dim")
# sizes that belong to one mechanism alone
OWN_SIZES = {"kv_heads": "gqa", "kv_latent": "mla", "q_latent": "mla", "rope_dim": "mla"}


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process if None.

    Returns:
        0. Wrong input ends the process with status 2, a missing dependency with status 1.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        sys.stdout.writelines(f"{line}\n" for line in options.run(options))
    except ImportError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return 0


# ------------------------------------------------------------------------------------------- the options


def _parser() -> Parser:
    parser = Parser(prog="python -m tpa_attention", description="Tensor Product Attention.")
    names = ("cache-size", "flops", "convert", "generate", "info")
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(names) + "}")

    cache = commands.add_parser("cache-size", help="sizes of KV caches, side by side")
    _add_model(cache)
    cache.add_argument("--quant", choices=accounting.QUANTISED, help="of caches that hold factors")
    cache.add_argument("--tp", type=_count, default=1, metavar="N", help="devices that divide the heads")
    cache.add_argument("--unpadded", action="store_true", help="records do not end on 16 bytes")
    cache.add_argument("--gpu-memory", type=float, metavar="GIB", help="adds the longest context that fits")
    cache.set_defaults(run=_cache_size)

    flops = commands.add_parser("flops", help="multiply-adds of a decode step, side by side")
    _add_model(flops)
    flops.add_argument(
        "--query",
        choices=("factored", "full", "auto"),
        default="factored",
        help="score with A_Q and B_Q, with Q formed once, or the cheaper",
    )
    flops.set_defaults(run=_flops)

    convert = commands.add_parser("convert", help="turn a LLaMA of Hugging Face into a T6")
    convert.add_argument("model", metavar="LLAMA_DIR")
    convert.add_argument("output", metavar="OUT_DIR", help="must not exist yet")
    for name in ("k", "v"):
        convert.add_argument(
            f"--{name}-rank", type=_count, metavar="R", help="default: number of KV heads, which is exact"
        )
    convert.add_argument("--q-rank", type=_count, metavar="R", help="default: queries stay as they are")
    convert.set_defaults(run=_convert)

    generate = commands.add_parser("generate", help="continue a text with a saved T6")
    generate.add_argument("model", metavar="MODEL_DIR")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text; bytes are its tokens where the model has no tokenizer")
    prompt.add_argument("--tokens", type=_tokens, metavar="1,2,3", help="token numbers")
    generate.add_argument("--max-new-tokens", type=_count, metavar="N", help="default: 64, or what fits")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 takes the likeliest")
    generate.add_argument("--top-k", type=_count, metavar="K", help="sample among the K likeliest")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="cpu")
    generate.add_argument("--no-cache", action="store_true", help="recompute everything for each token")
    generate.set_defaults(run=_generate)

    info = commands.add_parser("info", help="versions, and what works here or why not")
    info.add_argument("--compile", action="store_true", help="also try what has to be compiled first")
    info.set_defaults(run=_info)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name a model, and those both tables share."""
    parser.add_argument("--preset", choices=PRESETS, help="a trained size; sizes given beside it replace its")
    parser.add_argument(
        "--mechanism",
        action="append",
        choices=PRESET_MECHANISMS,
        help="a row; may be repeated; default: all whose sizes are given",
    )
    for name in SIZES:
        parser.add_argument(_flag(name), type=_count, metavar="N", help=SIZES[name])
    parser.add_argument("--seq-len", type=_count, default=32768, metavar="N", help="cached tokens")
    parser.add_argument("--batch", type=_count, default=1, metavar="N")
    parser.add_argument("--dtype", choices=tuple(accounting.ITEM_SIZES), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="every number, for programs")


def _count(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {word!r}")
    return value


def _tokens(word: str) -> list[int]:
    try:
        return [int(part) for part in word.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers joined by commas, got {word!r}") from None


# -------------------------------------------------------------------------------------------- the tables


def _models(options: argparse.Namespace) -> dict[str, ModelConfig]:
    """Rows of the table, by mechanism."""
    given = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    if options.preset is None:
        missing = [name for name in REQUIRED if name not in given]
        if missing:
            raise ValueError(f"give --preset, or sizes: {', '.join(map(_flag, missing))} missing")
        usual = [m for m in OF_SIZES if all(size in given for size, own in OWN_SIZES.items() if own == m)]
    else:
        usual = list(OF_A_PRESET)
    rows = options.mechanism or usual
    families = {_family(mechanism) for mechanism in rows}
    for size, own in OWN_SIZES.items():
        if size in given and own not in families:
            raise ValueError(f"{_flag(size)} is for mechanism {own}, got {', '.join(rows)}")
    return {mechanism: _model(mechanism, options.preset, given) for mechanism in rows}


def _model(mechanism: str, name: str | None, given: dict[str, int]) -> ModelConfig:
    family = _family(mechanism)
    fields: dict[str, Any] = {
        SIZES[size]: value for size, value in given.items() if OWN_SIZES.get(size, family) == family
    }
    if name is not None:
        return replace(preset(name, mechanism), **fields)
    if mechanism != family:
        raise ValueError(f"mechanism {mechanism} needs --preset; with sizes it is {family}")
    return ModelConfig(mechanism=family, **fields)


def _family(mechanism: str) -> str:
    return mechanism.partition("_")[0]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _cache_size(options: argparse.Namespace) -> Iterator[str]:
    memory = options.gpu_memory
    if memory is not None and not memory > 0:
        raise ValueError(f"--gpu-memory must be > 0, got {memory}")
    if memory == float("inf"):
        raise ValueError("--gpu-memory must be finite, got inf")
    table = accounting.compare(
        _models(options),
        seq_len=options.seq_len,
        batch=options.batch,
        dtype=options.dtype,
        quant=options.quant,
        tp=options.tp,
        padded=not options.unpadded,
        gpu_bytes=None if memory is None else int(memory * 2**30),
    )
    columns = CACHE_COLUMNS if memory is None else (*CACHE_COLUMNS, "max_context")
    return _print(table, columns, options)


def _flops(options: argparse.Namespace) -> Iterator[str]:
    table = accounting.compare(
        _models(options),
        seq_len=options.seq_len,
        batch=options.batch,
        dtype=options.dtype,
        query=options.query,
    )
    return _print(table, FLOP_COLUMNS, options)


def _print(table: Comparison, columns: tuple[str, ...], options: argparse.Namespace) -> Iterator[str]:
    if options.json:
        yield table.to_json()
        return
    yield (
        f"batch {table.batch}, {table.seq_len:,} cached tokens, {options.dtype}, devices {table.tp}, "
        f"saving against {table.baseline}"
    )
    yield table.to_text(columns)
    for row in table.rows:
        more = table.more_parameters(row.name)
        if more > 0.05:
            yield f"{row.name} has {100 * more:.1f} % more parameters than {table.baseline}"
        if "max_context" in columns and row.max_context is None:
            yield f"{row.name} does not fit: its weights alone take more than --gpu-memory"


# ------------------------------------------------------------------------------------- what needs a framework


def _info(options: argparse.Namespace) -> Iterator[str]:
    from ._info import info

    return info(compiled=options.compile)


def _generate(options: argparse.Namespace) -> Iterator[str]:
    from ._model_commands import generate

    return generate(
        options.model,
        prompt=options.prompt,
        tokens=options.tokens,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        seed=options.seed,
        device=options.device,
        use_cache=not options.no_cache,
    )


def _convert(options: argparse.Namespace) -> Iterator[str]:
    from ._model_commands import convert

    ranks = {"q_rank": options.q_rank, "k_rank": options.k_rank, "v_rank": options.v_rank}
    return convert(options.model, options.output, **ranks)


if __name__ == "__main__":
    sys.exit(main())
