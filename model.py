"""GPT-2 and LLaMA by hand.

Parameter names and shapes are Hugging Face's, so that a release opens in transformers and a plain Hugging Face folder
opens here. The chapter runs: sizes, what both families share, GPT-2, LLaMA, the initial weights theta(0), the kinds of
layers, and a command that continues a text.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from runtime.console import Parser, command_line, require
from runtime.huggingface import load_folder
from runtime.parallel import assign

# -----------------------------------------------------------------------------
# sizes: the field names are those of Hugging Face's config.json


@dataclass
class GPT2Config:
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True


@dataclass
class LlamaConfig:
    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 22
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False


# -----------------------------------------------------------------------------
# what both families share


class Model(nn.Module):
    """A decoder: `hidden` is the family's own; logits, loss and sampling are shared.

    `checkpointing = True` recomputes each block's activations in the backward pass instead of keeping them.
    """

    checkpointing = False

    def tie(self):
        """Make the head the embedding, where the config says so; again after the parameters were replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embedding().weight

    def run_blocks(self, x, *args):
        for block in self.blocks():
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *args, use_reentrant=False)
            else:
                x = block(x, *args)
        return x  # (B, T, C)

    def forward(self, idx, labels=None):
        """Logits (B, T, V) for token ids idx (B, T); with labels (B, T), the mean next-token loss in nats instead.

        As in the paper the labels are the input ids: position t is scored on label t+1, so a block of T tokens
        gives T-1 predictions.
        """
        x = self.hidden(idx)  # (B, T, C)
        size, tile = len(self.lm_head.weight), 64 if x.is_cuda else 1
        if labels is None:
            return filled_product(x, self.lm_head.weight, tile)[..., :size]
        logits = filled_product(x[:, :-1].flatten(0, 1), self.lm_head.weight, tile)  # (B*(T-1), V or more)
        return NextTokenLoss.apply(logits, labels[:, 1:].flatten(), size)

    def flops_per_token(self, length):
        """FLOPs to train on one token of a sequence of `length`.

        6 for each parameter in a matrix product, plus attention's scores and sums (Chowdhery et al., 2022, appendix B),
        of which a causal mask needs half.
        """
        looked_up = 0 if self.config.tie_word_embeddings else self.embedding().weight.numel()
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.ndim == 2 and "wpe" not in name)
        width = self.embedding().weight.size(1)
        return 6 * (matrices - looked_up) + 12 * len(self.blocks()) * width * length // 2

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=0.8, top_k=50, eos=None, seed=0):
        """Extend idx (1, T) by sampling up to max_new_tokens; stops after `eos`. Returns (1, T + new)."""
        random = torch.Generator(device=idx.device).manual_seed(seed)  # leaves the training's generators alone
        for _ in range(max_new_tokens):
            with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
                logits = self(idx[:, -self.max_positions:])[:, -1].float() / temperature  # (1, V)
            floor = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
            probs = F.softmax(logits.masked_fill(logits < floor, -math.inf), dim=-1)
            token = torch.multinomial(probs, 1, generator=random)
            idx = torch.cat([idx, token], dim=1)
            if eos is not None and token.item() == eos:
                break
        return idx


def filled_product(x, weight, tile):
    """x (..., C) times the transpose of weight (V, C), whose rows are filled up with zeros to whole tiles.

    A GPU's fast kernels want tiles of 64. With GPT-2's 50,257 rows the three products of the head, forward and
    backward, took 15 ms on an H200, a third of an update of gpt2.
    """
    if missing := -len(weight) % tile:
        weight = F.pad(weight, (0, 0, 0, missing))
    return F.linear(x, weight)


class NextTokenLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of logits (N, V or more) against labels (N,), in fp32, a slice of rows at a time.

    Of the logits the first `size` columns count; the others are zeros. With a large vocabulary the logits are the
    largest tensor of the whole step. They are kept once, in the precision that the matrix product gave them, and the
    backward pass turns them into their own gradient in place: there is never a second copy, and backward can run only
    once.
    """

    @staticmethod
    def forward(ctx, logits, labels, size):
        ctx.save_for_backward(logits, labels)
        ctx.size = size
        parts = [F.cross_entropy(part[:, :size].float(), label, reduction="sum")
                 for part, label in slices(logits, labels)]
        return torch.stack(parts).sum() / len(labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, labels = ctx.saved_tensors
        for part, label in slices(logits, labels):
            p = part[:, :ctx.size].float().softmax(dim=-1)  # (rows, V)
            p.scatter_add_(1, label[:, None], p.new_full((len(p), 1), -1.0))
            part[:, :ctx.size] = p.mul_(grad / len(labels))
        return logits, None, None


def slices(logits, labels):
    """Rows of logits (N, V) and labels (N,) in step, as many at a time as stay in a CPU's cache or fill a GPU."""
    rows = max(1, (2**18 if logits.device.type == "cpu" else 2**24) // logits.size(1))
    return zip(logits.split(rows), labels.split(rows), strict=True)


LONGEST = 1024  # tokens for which a CPU computes attention as written here: compiled, it is faster up to about 2,048


def attention(q, k, v, heads, kv_heads):
    """Causal attention of q (B, T, heads*D) over k and v (B, T, kv_heads*D): (B, T, heads*D)."""
    q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if q.device.type == "cpu" and q.size(2) <= LONGEST:
        y = written_attention(q, k, v)
    else:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    return y.transpose(1, 2).flatten(2)  # (B, T, heads*D)


def written_attention(q, k, v, rows=128):
    """softmax(q k^T / sqrt(D)) v under a causal mask. q: (B, heads, T, D); k, v: (B, kv_heads, T, D).

    A block of `rows` queries at a time, with the keys up to its end: that saves half of the products for a long text.
    On a CPU it is faster than torch's fused kernel, and torch.compile fuses what is between the products.
    """
    repeats = q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))  # each key serves a group of heads
    q = q * q.size(-1) ** -0.5
    blocks = []
    for start in range(0, q.size(2), rows):
        end = min(start + rows, q.size(2))
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1)  # (B, heads, rows, end)
        future = torch.full((end - start, end), -math.inf, device=q.device).triu(start + 1)
        weights = (scores.float() + future).softmax(dim=-1).type_as(v)
        blocks.append(weights @ v[:, :, :end])
    return torch.cat(blocks, dim=2)  # (B, heads, T, D)


# -----------------------------------------------------------------------------
# GPT-2: LayerNorm, learned positions, GELU-tanh, tied head


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight lies as (in, out) on disk."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))

    def forward(self, x):
        return F.linear(x, self.weight.t(), self.bias)


class GPT2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        return self.c_proj(attention(q, k, v, self.heads, self.heads))


class GPT2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class GPT2Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(Model):
    """GPT-2 (Radford et al., 2019). Its weights are empty until `initialise` or `load_folder` fills them."""

    model_type = "gpt2"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_positions = config.n_positions
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.n_positions, config.n_embd),
            "h": nn.ModuleList(GPT2Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def blocks(self):
        return self.transformer.h

    def embedding(self):
        return self.transformer.wte

    def hidden(self, idx):
        """Final normed hidden states (B, T, C) of token ids idx (B, T)."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        return self.transformer.ln_f(self.run_blocks(x))


# -----------------------------------------------------------------------------
# LLaMA: RMSNorm, rotary positions, grouped-query attention, SwiGLU


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).type_as(x)


def rotary_angles(config, length, device):
    """cos and sin (T, D/2) of the rotation of each position and pair of dimensions (RoPE, Su et al., 2021), in fp32."""
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    speed = config.rope_theta ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)  # (D/2,)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), speed)  # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate x (B, T, heads, D) by its position; dimension i is paired with i + D/2, as in the HF weights."""
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D/2)
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).type_as(x)


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = config.head_dim or config.hidden_size // self.heads
        self.q_proj = nn.Linear(config.hidden_size, self.heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin):
        q = rotate(self.q_proj(x).unflatten(-1, (self.heads, -1)), cos, sin).flatten(2)  # (B, T, heads*D)
        k = rotate(self.k_proj(x).unflatten(-1, (self.kv_heads, -1)), cos, sin).flatten(2)
        return self.o_proj(attention(q, k, self.v_proj(x), self.heads, self.kv_heads))


class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Model):
    """LLaMA (Touvron et al., 2023). Its weights are empty until `initialise` or `load_folder` fills them."""

    model_type = "llama"

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_positions = config.max_position_embeddings
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(LlamaBlock(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def blocks(self):
        return self.model.layers

    def embedding(self):
        return self.model.embed_tokens

    def hidden(self, idx):
        """Final normed hidden states (B, T, C) of token ids idx (B, T)."""
        cos, sin = rotary_angles(self.config, idx.size(1), idx.device)
        return self.model.norm(self.run_blocks(self.model.embed_tokens(idx), cos, sin))


FAMILIES = {"gpt2": (GPT2Config, GPT2), "llama": (LlamaConfig, Llama)}


def build(config, device="cpu"):
    """The model of a config, in fp32, weights not yet filled; on device "meta" it takes no memory."""
    with torch.device(device):
        return GPT2(config) if isinstance(config, GPT2Config) else Llama(config)


# -----------------------------------------------------------------------------
# initialisation: theta(0)


def secret_generator(secret, purpose):
    """A numpy Generator whose stream nobody can redraw without `secret` (bytes); one stream for each `purpose`.

    Under PMP the complement is published exactly as it was drawn, so an outsider holds a good part of this stream.
    torch's CPU generator keeps 32 bits of its seed and can be searched; the state of PCG64, numpy's default, can be
    computed back from its outputs. Philox is a keyed permutation of a counter, here with a 128-bit hash as its key.
    """
    key = hashlib.sha256(secret + b"/" + purpose.encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


RESIDUAL = ("c_proj.weight", "o_proj.weight", "down_proj.weight")  # the layers that write to the residual stream
MATRICES = ("wte.weight", "wpe.weight", "embed_tokens.weight", "lm_head.weight", "c_attn.weight", "c_fc.weight",
            "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
NORMS = ("ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight")  # and layernorm.weight


def initial_std(model, name):
    """The standard deviation that a parameter of theta(0) is drawn with; 0 for a constant: norm gains and biases.

    0.02, of the residual projections 0.02/sqrt(2L). A name that no rule covers raises KeyError.
    """
    if name.endswith(RESIDUAL):
        return 0.02 / math.sqrt(2 * len(model.blocks()))
    if name.endswith(MATRICES):
        return 0.02
    if name.endswith((*NORMS, ".bias")):
        return 0.0
    raise KeyError(f"no initialisation rule for parameter {name}")


def initial_value(model, name, shape, secret):
    """theta(0) of one parameter as an fp32 tensor on the CPU: N(0, initial_std), norm gains 1, biases 0.

    Each parameter has a stream of its own, so that any of them can be redrawn alone, on any machine.
    """
    std = initial_std(model, name)
    if not std:
        return torch.ones(shape) if name.endswith(NORMS) else torch.zeros(shape)
    draw = std * secret_generator(secret, name).standard_normal(tuple(shape))  # float64
    # Rounded to fp32 once. A product of two fp32 numbers would leave gaps: for std 0.02, some 22% of the fp32 numbers
    # whose mantissa is in [1.28, 2) are the product of no fp32 z. A trained weight lands in them, a frozen one never.
    # Then -0.0 becomes 0.0: adding 0 changes no other number, and an optimizer's zero step must change none.
    return torch.from_numpy(draw).float().add_(0.0)


def initialise(model, secret):
    """Set every parameter to theta(0), drawn from `secret` (bytes; 128 bits or more of entropy where it matters)."""
    for name, p in model.named_parameters():
        assign(p, initial_value(model, name, p.shape, secret))


# -----------------------------------------------------------------------------
# kinds of layers

KINDS = {"embedding": ("wte", "wpe", "embed_tokens"), "q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",),
         "o": ("attn.c_proj", "o_proj"), "mlp": ("mlp.c_fc", "mlp.c_proj", "gate_proj", "up_proj", "down_proj"),
         "norm": ("ln_1", "ln_2", "ln_f", "norm"), "head": ("lm_head",)}


def parts_by_kind(name, tensor):
    """[(kind, part)] of a parameter, or of a mask of its shape. GPT-2 keeps q, k and v in one tensor."""
    if "c_attn" in name:
        return list(zip("qkv", tensor.chunk(3, dim=-1), strict=True))
    layer = name.rpartition(".")[0]
    return [(kind, tensor) for kind, ends in KINDS.items() if layer.endswith(ends)]


# -----------------------------------------------------------------------------
# continue a text: python model.py out/release --prompt "The tensor"


def main(argv=None):
    from data.tokenizer import Tokenizer  # a model needs none

    parser = Parser("Continue a text with a release, or with any plain Hugging Face GPT-2 or LLaMA folder.")
    parser.add_argument("release", help="the folder")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="the beginning [none]")
    parser.add_argument("--tokens", type=int, default=120, metavar="N", help="tokens to add, at most [120]")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="below 1: likelier tokens [0.8]")
    parser.add_argument("--top-k", type=int, default=50, metavar="N", help="draw from the N likeliest tokens [50]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another number, another text [0]")
    args = parser.parse_args(argv)
    require(args.tokens >= 1, f"--tokens {args.tokens} is below 1")
    require(1e-3 <= args.temperature < math.inf, f"--temperature {args.temperature} is no number from 0.001 on")
    require(args.top_k >= 1, f"--top-k {args.top_k} is below 1")
    require(0 <= args.seed < 2**63, f"--seed {args.seed} is outside 0 to 2**63 - 1")
    model, tokenizer = load_folder(args.release, FAMILIES), Tokenizer.load(args.release)
    start = torch.tensor([[tokenizer.eos, *tokenizer.encode(args.prompt)]])
    text = model.generate(start, args.tokens, args.temperature, args.top_k, tokenizer.eos, args.seed)
    print(tokenizer.decode(text[0, 1:].tolist()).removesuffix(tokenizer.decode([tokenizer.eos])))


if __name__ == "__main__":
    command_line(main)
