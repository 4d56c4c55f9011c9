"""Train the small Llama model that ships with catsparse, tokenizer included, from plain books."""

import argparse
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from books import read_books
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
# Words take the space (or quotation mark) before them; a run of newlines is one piece.
WORDS = (
    r"'(?i:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def log(line: str) -> None:
    print(line, flush=True)


# ---- tokenizer and data ---------------------------------------------------------------------


def pieces(text: str, size: int = 1 << 14) -> Iterator[str]:
    """Cut a text after empty lines: the tokens are the same, the work spreads over the cores."""
    start = 0
    while start < len(text):
        cut = text.find("\n\n", start + size)
        end = len(text) if cut < 0 else cut + 2
        yield text[start:end]
        start = end


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text is encodable and comes back byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write what `AutoTokenizer.from_pretrained` reads. No special token is added to a text:
    windows of training start anywhere in a book, so a prompt needs none either."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """One stream of token ids, each text between its begin and end tokens: int32 `[N]`."""
    parts: list[np.ndarray] = []
    todo = [piece for text in texts for piece in pieces(BOS + text + EOS)]
    for start in range(0, len(todo), 512):  # bounds the memory that encodings take
        encodings = tokenizer.encode_batch_fast(todo[start : start + 512])
        parts += [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
    return torch.from_numpy(np.concatenate(parts))


def batches(tokens: Tensor, context: int, size: int, seed: int) -> Iterator[Tensor]:
    """Windows `[size, context + 1]` without end, every epoch cut at another offset."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(context + 1, device=tokens.device)
    while True:
        offset = int(torch.randint(context, (1,), generator=generator))
        count = (len(tokens) - offset - 1) // context
        if count < size:
            raise ValueError(f"{len(tokens)} tokens are too few for {size} windows of {context}")
        starts = torch.randperm(count, generator=generator) * context + offset
        starts = starts.to(tokens.device)
        for first in range(0, count - size + 1, size):
            yield tokens[starts[first : first + size, None] + reach].long()


# ---- model ----------------------------------------------------------------------------------


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Plain causal attention: transformers builds a full mask under torch.compile, which is
    slow, and windows without padding need none."""
    out = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal", causal_attention)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
        attn_implementation="causal",
    )
    return LlamaForCausalLM(config)


def window_loss(model: nn.Module, window: Tensor) -> Tensor:
    """Mean cross entropy of the tokens of `window` `[B, T + 1]` after the first."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    loss: Tensor = F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
    return loss


def autocast(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Tensor, context: int, size: int = 64) -> float:
    """Per token, in windows of `context` that start without any context."""
    count = (len(tokens) - 1) // context
    reach = torch.arange(context + 1, device=tokens.device)
    starts = torch.arange(count, device=tokens.device) * context
    total = 0.0
    for first in range(0, count, size):
        part = starts[first : first + size]
        with autocast(tokens.device):
            loss = window_loss(model, tokens[part[:, None] + reach].long())
        total += float(loss) * len(part)
    return math.exp(total / count)


# ---- optimization ---------------------------------------------------------------------------


def orthogonalize(update: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrices of a stack `[N, rows, cols]`."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    norm: Tensor = x.norm(dim=(-2, -1), keepdim=True)
    x = x / (norm + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with one Newton-Schulz per shape instead of one per matrix: a small model's step is
    bound by kernel launches. Updates have AdamW's usual size, so its learning rates fit."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, compiled: bool
    ) -> None:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for param in params:
            shapes.setdefault(param.shape, []).append(param)
        super().__init__(
            [{"params": group} for group in shapes.values()],
            {"lr": lr, "weight_decay": weight_decay, "momentum": 0.95},
        )
        self.orthogonalize = (
            torch.compile(orthogonalize, dynamic=False) if compiled else orthogonalize
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params, beta = group["params"], group["momentum"]
            grad = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(grad)
            momentum = state["momentum"].lerp_(grad, 1 - beta)
            update = self.orthogonalize(grad.lerp_(momentum, beta)).to(params[0].dtype)
            rate = group["lr"] * 0.2 * math.sqrt(max(params[0].shape))
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.unbind()), alpha=-rate)


def make_optimizers(
    model: LlamaForCausalLM, args: argparse.Namespace
) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [param for param in model.model.layers.parameters() if param.ndim == 2]
    other = [param for param in model.parameters() if all(param is not h for h in hidden)]
    muon = Muon(hidden, args.lr, args.weight_decay, compiled=args.compile)
    adamw = torch.optim.AdamW(other, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def schedule(progress: float, warmup: float = 0.01, decay: float = 0.4) -> float:
    """Warmup, stable, linear decay to zero: the learning rate's share of its peak."""
    return max(0.0, min(1.0, progress / warmup, (1 - progress) / decay))


def train(
    model: LlamaForCausalLM,
    tokens: Tensor,
    valid: Tensor,
    args: argparse.Namespace,
    deadline: float,
) -> dict[str, float]:
    """Run the steps; with `--minutes` the clock, not the step count, drives the schedule."""
    optimizers = make_optimizers(model, args)
    loss_of = torch.compile(window_loss, dynamic=False) if args.compile else window_loss
    started = time.monotonic()
    step, progress, size = 0, 0.0, args.batch * args.context
    for window in batches(tokens, args.context, args.batch, args.seed):
        share = schedule(progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
        with autocast(window.device):
            loss = loss_of(model, window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 0:  # its learning rate is zero; it compiled, so the clock starts after it
            loss.item()
            log(f"first step: {time.monotonic() - started:.1f} s")
            started = time.monotonic()
        step += 1
        if step % args.log_every == 0:
            value, rate = loss.item(), (step - 1) * size / (time.monotonic() - started)
            log(f"step {step}: loss {value:.3f}, lr x {share:.2f}, {rate:,.0f} tokens/s")
        if step % args.eval_every == 0:
            log(f"step {step}: held-out perplexity {perplexity(model, valid, args.context):.2f}")
        if args.steps:
            progress = step / args.steps
        else:
            progress = (time.monotonic() - started) / max(1.0, deadline - started)
        if progress >= 1:
            break
    held_out = perplexity(model, valid, args.context)
    seconds = time.monotonic() - started
    figures = {"steps": step, "tokens": step * size, "seconds": seconds, "perplexity": held_out}
    return {name: round(value, 2) for name, value in figures.items()}


# ---- command line ---------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, nargs="+", required=True, help="training books (.txt or .xz)")
    add("--valid", type=Path, required=True, help="held-out books")
    add("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps")
    length.add_argument("--minutes", type=float, help="end training this long after the start")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    add("--vocab", type=int, default=4096)
    add("--hidden", type=int, default=320)
    add("--intermediate", type=int, default=896)
    add("--layers", type=int, default=7)
    add("--heads", type=int, default=10)
    add("--kv-heads", type=int, default=5)
    add("--context", type=int, default=512, help="window length in tokens")
    add("--batch", type=int, default=128, help="windows a step")
    add("--lr", type=float, default=3e-3, help="peak learning rate of Muon")
    add("--adam-lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    add("--weight-decay", type=float, default=0.2, help="of the hidden matrices")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add("--log-every", type=int, default=200)
    add("--eval-every", type=int, default=2000)
    return parser.parse_args(argv)


def main() -> None:
    began = time.monotonic()
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)

    texts = [book.text for path in args.data for book in read_books(path)]
    tokenizer = train_tokenizer(texts, args.vocab)
    save_tokenizer(tokenizer, args.out)
    tokens = encode(tokenizer, texts)
    valid = encode(tokenizer, [book.text for book in read_books(args.valid)])
    log(f"{len(tokens):,} training tokens, {time.monotonic() - began:.1f} s")

    model = build_model(args).to(device)
    log(f"{sum(param.numel() for param in model.parameters()):,} parameters")
    deadline = began + 60 * (args.minutes or 0)
    figures = train(model, tokens.to(device), valid.to(device), args, deadline)

    model.to(torch.bfloat16).save_pretrained(args.out)
    GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        repetition_penalty=1.1,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    ).save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    log(json.dumps(figures))


if __name__ == "__main__":
    main()
