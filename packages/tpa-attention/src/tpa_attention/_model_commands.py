"""The commands that need torch and transformers: continue a text, convert a LLaMA.

Models are read from and written to directories as Hugging Face keeps them; nothing is downloaded and nothing
unpickled. A text is turned to tokens by the tokenizer in the model's directory, or, for a vocabulary of 256
without one, is its UTF-8 bytes.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BYTES = 256
DEFAULT_NEW_TOKENS = 64
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def generate(
    directory: str,
    *,
    prompt: str | None = None,
    tokens: list[int] | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    use_cache: bool = True,
) -> Iterator[str]:
    """The prompt and its continuation, as text, or as numbers joined by commas if `tokens` were given.

    Args:
        directory: of a saved model of type "t6".
        prompt: text, or None.
        tokens: token numbers instead of a prompt.
        max_new_tokens: at most so many are added; None for 64, or fewer where the context ends.
        temperature: 0 takes the likeliest token each time, more samples.
        top_k: sample among so many likeliest tokens; None for all.
        seed: of the sampling.
        device: of torch.
        use_cache: decode from cached factors, if the model can; without, every token is computed from the
            whole text.

    Raises:
        ImportError: without torch or transformers.
        ValueError: if the directory holds no T6, a token is outside of its vocabulary, the prompt is empty or
            has no tokenizer, the device cannot be used, temperature or seed are out of range, or prompt and
            continuation do not fit into the context.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if temperature == 0 and top_k is not None:
        raise ValueError(f"top_k needs a temperature > 0, got top_k {top_k}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in [0, 2^63), got {seed}")
    path = model_directory(directory, "t6")
    import torch

    from .torch import hf  # noqa: F401  # says what to install where transformers is missing

    check_device(device)
    model = load_model(path).to(device).eval()
    tokenizer = None if tokens is not None else load_tokenizer(path, model.config.vocab_size)
    given = tokens if tokens is not None else encode(tokenizer, prompt or "")
    check_tokens(given, model.config.vocab_size)
    max_new_tokens = new_tokens(len(given), max_new_tokens, model.config.max_position_embeddings)
    processors = []
    if temperature > 0:
        processors.append(_noisy_scores(temperature, top_k, torch.Generator(device).manual_seed(seed)))
    ids = torch.tensor([given], device=device)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            use_cache=use_cache and model.config.use_cache,
            do_sample=False,
            logits_processor=processors,
        )
    found = out[0].tolist()
    yield ",".join(map(str, found)) if tokens is not None else decode(tokenizer, found)


def _noisy_scores(temperature: float, top_k: int | None, generator: Any) -> Callable[[Any, Any], Any]:
    """Scores whose largest one is a sample from softmax(scores / temperature): Gumbel noise is added.

    The sampling of transformers itself takes no generator and draws from torch's global one.
    """

    def process(_ids: Any, scores: Any) -> Any:
        scores = scores.float() / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], float("-inf"))
        return scores - scores.new_empty(scores.shape).exponential_(generator=generator).log()

    return process


def convert(
    directory: str,
    output: str,
    *,
    k_rank: int | None = None,
    v_rank: int | None = None,
    q_rank: int | None = None,
) -> Iterator[str]:
    """Write a LLaMA as a T6 with free head factors; say what was lost per layer.

    Args:
        directory: of a saved LLaMA.
        output: directory to make; it appears only when it is complete.
        k_rank: R_K; None for the number of KV heads, which loses nothing.
        v_rank: R_V; likewise.
        q_rank: R_Q; None leaves queries as they are.

    Raises:
        ImportError: without torch, transformers or the module that converts.
        ValueError: if the directory holds no LLaMA, the output exists, or a rank does not fit.
    """
    path, target = model_directory(directory, "llama"), Path(output)
    if target.exists():
        raise ValueError(f"output must not exist yet, got {output}")
    conversion = import_module(".torch.convert", __package__)
    llama = load_model(path).eval()
    heads = llama.config.num_key_value_heads
    model, report = conversion.convert_hf_llama(
        llama,
        k_rank=heads if k_rank is None else k_rank,
        v_rank=heads if v_rank is None else v_rank,
        q_rank=q_rank,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as beside:
        whole = Path(beside) / "model"
        model.save_pretrained(whole)
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                shutil.copyfile(path / name, whole / name)
        whole.replace(target)
    yield str(report)
    yield f"wrote {target}"


def model_directory(directory: str, model_type: str) -> Path:
    """The directory, if it holds a model of this type.

    Raises:
        ValueError: if it does not.
    """
    path = Path(directory)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"model must be a directory with a config.json, got {directory}")
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is no model configuration: {error}") from None
    if found != model_type:
        raise ValueError(f"model must be of type {model_type!r}, got {found!r} in {config}")
    return path


def load_model(path: Path) -> Any:
    """The model that is saved in a directory, by AutoModelForCausalLM, which knows T6.

    Raises:
        ImportError: with what to install.
        OSError: if a file is missing.
        ValueError: if the files hold no such model.
    """
    from .torch import hf  # noqa: F401  # registers T6

    load = import_module("transformers").AutoModelForCausalLM.from_pretrained
    damaged = import_module("safetensors").SafetensorError
    try:
        return load(path, local_files_only=True)
    except (TypeError, RuntimeError, damaged) as error:  # an option of a wrong type, other shapes, no tensors
        raise ValueError(f"model in {path} cannot be loaded: {error}") from error


def load_tokenizer(path: Path, vocab_size: int) -> Any:
    """The tokenizer of a model; None where tokens are bytes."""
    if (path / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    if vocab_size != BYTES:
        raise ValueError(
            f"a prompt needs a tokenizer in {path} or a vocabulary of {BYTES} bytes, "
            f"got one of {vocab_size}; give --tokens"
        )
    return None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text."""
    if tokenizer is None:
        return list(text.encode("utf-8", "surrogateescape"))
    return tokenizer(text)["input_ids"]


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """Text of tokens; bytes that are no UTF-8 are shown as replacement characters."""
    if tokenizer is None:
        return bytes(tokens).decode("utf-8", "replace")
    return tokenizer.decode(tokens, skip_special_tokens=True)


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not know or cannot use here."""
    import torch

    try:
        torch.zeros(1, device=device).item()  # the meta device has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # as the builds of torch differ
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {reason}") from None


def new_tokens(given: int, wanted: int | None, context: int) -> int:
    """How many tokens to add.

    Raises:
        ValueError: if they do not fit into the context, or nothing does behind the prompt.
    """
    new = max(1, min(DEFAULT_NEW_TOKENS, context - given)) if wanted is None else wanted
    if given + new > context:
        raise ValueError(
            f"prompt and max_new_tokens must fit into the context of {context}, got {given} and {new}"
        )
    return new


def check_tokens(tokens: list[int], vocab_size: int) -> None:
    """Raise ValueError for no token at all, and for one outside of the vocabulary."""
    if not tokens:
        raise ValueError("the prompt must have at least one token, got none")
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(f"tokens must be in [0, {vocab_size}), got {token}")
